//! Text to token ids and back: one wrapper over an ordinary `tokenizer.json`, whoever made it.
//!
//! Text is encoded without special tokens; who builds a sequence adds [`Tokenizer::bos`] and [`Tokenizer::eos`] itself. As in
//! transformers, a special token spelled out in the text becomes that token. Saved truncation and padding settings are dropped on
//! purpose: they would silently cut documents.

mod build;
mod stream;

use crate::error::{Error, Result};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

pub use build::END_OF_TEXT;
pub use stream::TextStream;

/// Documents longer than this are cut where a cut cannot change a token, so that one long book keeps all cores busy.
const PIECE_BYTES: usize = 1 << 14;

/// A `tokenizer.json` larger than this is refused: the largest vocabularies in use take some 30 MB.
const LARGEST_FILE_BYTES: u64 = 1 << 28;

/// The names by which chat templates know special tokens.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer with its beginning-of-sequence and end-of-sequence ids.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The definition without truncation and padding, as saved.
    json: Value,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Further tokens at which generation stops.
    ends: Vec<u32>,
    /// Special tokens by the names of [`NAMED`].
    named: BTreeMap<String, String>,
    chat_template: Option<String>,
    vocabulary: usize,
    cut: Cut,
    /// Bytes no token spells: such text would vanish without a word.
    missing_bytes: Vec<u8>,
}

/// Where a document may be cut without changing its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// After any newline: no token is longer than a character.
    Newline,
    /// After a newline between two characters that are not white space. The pattern of GPT-2 always ends a piece there, and the
    /// piece is that newline alone with or without the cut.
    LoneNewline,
    Nowhere,
}

impl Tokenizer {
    /// 256 byte tokens (id = byte) and [`END_OF_TEXT`] (id 256).
    pub fn byte() -> Self {
        build::byte()
    }

    /// One token per character of `text`, in order of code points, and [`END_OF_TEXT`].
    pub fn character(text: impl IntoIterator<Item = char>) -> Result<Self> {
        build::character(text.into_iter().collect())
    }

    /// Byte-level BPE with GPT-2's pattern and `vocabulary` tokens (fewer where `texts` do not hold enough pairs), trained on `texts`.
    pub fn train_bpe(texts: &[String], vocabulary: usize) -> Result<Self> {
        build::train_bpe(texts, vocabulary)
    }

    /// From the parts a GGUF file of the `gpt2` vocabulary model holds: byte-level `pieces` by id, `merges` as "left right",
    /// the ids that are special, and whether GPT-2's pattern cuts the text first.
    pub fn from_byte_level(
        pieces: &[String],
        merges: &[String],
        special: &[u32],
        bos: Option<u32>,
        eos: Option<u32>,
        pattern: bool,
    ) -> Result<Self> {
        build::from_byte_level(pieces, merges, special, bos, eos, pattern)
    }

    /// Reads a `tokenizer.json`, or the folder that holds one. Beside it, `tokenizer_config.json`, `generation_config.json` and
    /// `config.json` say which ids begin and end a sequence, and `chat_template.jinja` how conversations are spelled. A sequence begins with BOS when `add_bos_token` says so or, where that is absent, when the
    /// tokenizer's own template puts one there.
    pub fn load(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        let json = read_json(&file)?;
        let folder = file.parent().unwrap_or(Path::new("."));
        let optional = |name: &str| if folder.join(name).is_file() { read_json(&folder.join(name)) } else { Ok(Value::Null) };
        let mut tokenizer =
            Self::from_json(json, &optional("tokenizer_config.json")?, &optional("config.json")?).map_err(|error| match error {
                Error::Input { cause, fix, .. } => Error::Input { place: file.display().to_string(), cause, fix },
                other => other,
            })?;
        tokenizer.add_ends(&optional("generation_config.json")?);
        let template = folder.join("chat_template.jinja");
        if template.is_file() {
            tokenizer.chat_template = Some(std::fs::read_to_string(&template).map_err(Error::io("read", &template))?);
        }
        Ok(tokenizer)
    }

    /// From the text of a `tokenizer.json` and what its companions say (`Value::Null` where absent).
    pub fn from_json(mut json: Value, tokenizer_config: &Value, config: &Value) -> Result<Self> {
        let broken = |cause: String| {
            Error::input("tokenizer", format!("not a usable tokenizer.json: {cause}"))
                .fix("give the tokenizer.json of a Hugging Face model")
        };
        for ignored in ["truncation", "padding"] {
            if let Some(value) = json.get_mut(ignored) {
                *value = Value::Null;
            }
        }
        let inner: tokenizers::Tokenizer =
            serde_json::from_value::<tokenizers::Tokenizer>(json.clone()).map_err(|error| broken(error.to_string()))?;
        let vocabulary = inner.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1);
        // Ids index the model's embedding: a single huge id must not ask for a huge one.
        let tokens = inner.get_vocab_size(true);
        if tokens == 0 || vocabulary > 2 * tokens + 1024 {
            return Err(broken(format!("{tokens} tokens with ids up to {}", vocabulary.saturating_sub(1))));
        }
        let named = |key: &str| named_token(&inner, tokenizer_config, config, key);
        let (first, last) = template_ends(&inner).map_err(|error| broken(error.to_string()))?;
        let bos = match tokenizer_config.get("add_bos_token").and_then(Value::as_bool) {
            Some(true) => Some(named("bos")?.or(first).ok_or_else(|| broken("add_bos_token is true but no bos_token is named".into()))?),
            Some(false) => None,
            None => first,
        };
        let eos = named("eos")?.or(last).or_else(|| [END_OF_TEXT, "</s>"].iter().find_map(|name| inner.token_to_id(name)));
        if let Some(id) = [bos, eos].into_iter().flatten().find(|&id| id as usize >= vocabulary) {
            return Err(broken(format!("special token {id} is outside the vocabulary of {vocabulary}")));
        }
        let cut = find_cut(&json);
        let missing_bytes = find_missing_bytes(&json, &inner);
        let (named, chat_template) = (named_specials(tokenizer_config), chat_template(tokenizer_config));
        let mut made = Self { inner, json, bos, eos, ends: vec![], named, chat_template, vocabulary, cut, missing_bytes };
        made.add_ends(config);
        Ok(made)
    }

    /// Takes over the ids at which a `config.json` or `generation_config.json` lets generation stop.
    fn add_ends(&mut self, config: &Value) {
        let listed = &config["eos_token_id"];
        let ids = listed.as_array().map_or(std::slice::from_ref(listed), Vec::as_slice).iter();
        ids.filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).for_each(|id| self.add_end(id));
    }

    fn add_end(&mut self, id: u32) {
        if Some(id) != self.eos && !self.ends.contains(&id) && (id as usize) < self.vocabulary {
            self.ends.push(id);
        }
    }

    /// The same, which lets generation stop at `id` too.
    #[must_use]
    pub fn with_end(mut self, id: u32) -> Self {
        self.add_end(id);
        self
    }

    /// The same with the special token `piece` at the end of documents.
    ///
    /// # Errors
    /// When the vocabulary has no such special token.
    pub fn with_end_of_text(mut self, piece: &str) -> Result<Self> {
        let Some(id) = self.id(piece).filter(|&id| self.is_special(id)) else {
            let known = self.special_pieces().join(", ");
            return Err(Error::input("data.end_of_text", format!("{piece:?} is no special token of the vocabulary"))
                .fix(format!("choose one of {known}, or leave the key out")));
        };
        self.eos = Some(id);
        self.named.insert("eos_token".to_owned(), piece.to_owned());
        self.ends.retain(|&end| end != id);
        Ok(self)
    }

    /// The same with another chat template.
    #[must_use]
    pub fn with_chat_template(mut self, text: impl Into<String>) -> Self {
        self.chat_template = Some(text.into());
        self
    }

    /// What turns a conversation into text: Jinja, as transformers runs it.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The special tokens by the names templates know them by (`bos_token`, `eos_token`, ...): those that its companions name, else its own.
    pub fn named_specials(&self) -> BTreeMap<String, String> {
        let own = [("bos_token", self.bos), ("eos_token", self.eos)];
        let own = own.into_iter().filter_map(|(name, id)| Some((name.to_owned(), id.and_then(|id| self.piece(id))?)));
        own.chain(self.named.clone()).collect()
    }

    /// Every token at which generation stops, the end-of-sequence token first.
    pub fn ends(&self) -> impl Iterator<Item = u32> {
        self.eos.into_iter().chain(self.ends.iter().copied())
    }

    /// The token every sequence starts with, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a document, where there is one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Rows an embedding needs: the largest id plus one.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The text of token `id` as the vocabulary spells it (byte-level alphabets and `▁` included).
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of the token spelled `piece`.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.inner.token_to_id(piece)
    }

    /// Whether `id` is a control token, which decoding leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The definition as saved in `tokenizer.json`: what an exporter reads vocabulary, merges and pattern from.
    pub fn definition(&self) -> &Value {
        &self.json
    }

    /// Identifies everything that turns text into ids: 16 hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        format!("{:016x}", self.fingerprint_bits())
    }

    pub(super) fn fingerprint_bits(&self) -> u64 {
        xxh3_64(format!("{}\n{:?} {:?}", self.json, self.bos, self.eos).as_bytes())
    }

    /// Ids of `text`, without special tokens added. Fails where the vocabulary cannot spell a character.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let pieces = self.cut_document(text);
        let ids: Vec<Vec<u32>> = if pieces.len() == 1 {
            vec![self.encode_piece(text)?]
        } else {
            pieces.par_iter().map(|piece| self.encode_piece(piece)).collect::<Result<_>>()?
        };
        Ok(ids.concat())
    }

    /// [`Tokenizer::encode`] with the bytes of `text` that each token stands for. White space that a token swallowed without saying so
    /// counts as its own; tokens that share a character share its bytes.
    pub fn encode_with_places(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, false).map_err(|error| Error::input("tokenizer", format!("cannot encode: {error}")))?;
        self.check_spelled(text, encoding.get_ids())?;
        let mut before = 0;
        let place = |(&id, &(start, end)): (&u32, &(usize, usize))| {
            let range = start.min(before)..end.max(before);
            before = range.end;
            (id, range)
        };
        Ok(encoding.get_ids().iter().zip(encoding.get_offsets()).map(place).collect())
    }

    /// How the control tokens are spelled, by id.
    pub fn special_pieces(&self) -> Vec<String> {
        let tokens = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut special: Vec<(u32, String)> =
            tokens.iter().filter(|(_, token)| token.special).map(|(&id, token)| (id, token.content.clone())).collect();
        special.sort_unstable();
        special.into_iter().map(|(_, piece)| piece).collect()
    }

    /// [`Tokenizer::encode`] for many documents on all cores.
    pub fn encode_all<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    fn encode_piece(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| Error::input("tokenizer", format!("cannot encode: {error}")))?;
        let ids = encoding.get_ids().to_vec();
        self.check_spelled(text, &ids)?;
        Ok(ids)
    }

    /// A vocabulary without all bytes drops what it cannot spell: compares the bytes spelled with the bytes given.
    fn check_spelled(&self, text: &str, ids: &[u32]) -> Result<()> {
        if self.missing_bytes.is_empty() {
            return Ok(());
        }
        let spelled: usize = ids
            .iter()
            .filter_map(|&id| self.piece(id).map(|piece| if self.is_special(id) { piece.len() } else { piece.chars().count() }))
            .sum();
        if spelled == text.len() {
            return Ok(());
        }
        let unknown =
            text.char_indices().find(|(_, letter)| letter.encode_utf8(&mut [0; 4]).bytes().any(|byte| self.missing_bytes.contains(&byte)));
        let (offset, letter) = unknown.unwrap_or((0, text.chars().next().unwrap_or(' ')));
        Err(Error::input(
            format!("text, byte {offset}"),
            format!("the character {letter:?} is not in the vocabulary of {} tokens", self.vocabulary),
        )
        .fix("leave the character out, or train with a byte or BPE tokenizer, which can spell any text"))
    }

    fn cut_document<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while rest.len() > 2 * PIECE_BYTES {
            let Some(at) = self.next_cut(rest) else { break };
            let (piece, tail) = rest.split_at(at);
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }

    fn next_cut(&self, text: &str) -> Option<usize> {
        let starts = text.as_bytes().iter().enumerate().skip(PIECE_BYTES).filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| at + 1);
        let fits = |&at: &usize| {
            let before = text[..at - 1].chars().next_back();
            let after = text[at..].chars().next();
            match self.cut {
                Cut::Newline => after.is_some(),
                Cut::LoneNewline => before.zip(after).is_some_and(|(before, after)| !before.is_whitespace() && !after.is_whitespace()),
                Cut::Nowhere => false,
            }
        };
        if self.cut == Cut::Nowhere { None } else { starts.into_iter().find(fits) }
    }

    /// The text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::input("tokenizer", format!("cannot decode: {error}")))
    }

    /// Decodes token by token: see [`TextStream`].
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// Names and texts of `tokenizer.json`, `tokenizer_config.json` and, where there are such things, `chat_template.jinja` and
    /// `generation_config.json`, as transformers reads them.
    pub fn files(&self) -> Vec<(String, String)> {
        let named = self.named_specials();
        let mut config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named.get("bos_token"),
            "eos_token": named.get("eos_token"),
            "add_bos_token": self.bos.is_some(),
            "add_eos_token": false,
            "clean_up_tokenization_spaces": false,
        });
        for (name, token) in named {
            config[name] = token.into();
        }
        let text = |value: &Value| serde_json::to_string_pretty(value).expect("a JSON value always prints") + "\n";
        let mut files = vec![("tokenizer.json".to_owned(), text(&self.json)), ("tokenizer_config.json".to_owned(), text(&config))];
        files.extend(self.chat_template.clone().map(|template| ("chat_template.jinja".to_owned(), template)));
        if !self.ends.is_empty() {
            let ends = serde_json::json!({ "bos_token_id": self.bos, "eos_token_id": self.ends().collect::<Vec<_>>() });
            files.push(("generation_config.json".to_owned(), text(&ends)));
        }
        files
    }

    /// Writes [`Tokenizer::files`] into `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        self.files().into_iter().try_for_each(|(name, text)| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(Error::io("write", &path))
        })
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, bos {:?}, eos {:?}, {})", self.vocabulary, self.bos, self.eos, self.fingerprint())
    }
}

/// The special tokens that a `tokenizer_config.json` names, each a string or `{"content": ...}`.
pub(super) fn named_specials(config: &Value) -> BTreeMap<String, String> {
    let token =
        |name: &str| config[name].as_str().or_else(|| config[name]["content"].as_str()).map(|token| (name.to_owned(), token.to_owned()));
    NAMED.into_iter().filter_map(token).collect()
}

/// The `chat_template` of a `tokenizer_config.json`: a string, or the one called `default` of a list.
fn chat_template(config: &Value) -> Option<String> {
    let listed = || config["chat_template"].as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    config["chat_template"].as_str().or_else(listed).map(str::to_owned)
}

fn read_json(path: &Path) -> Result<Value> {
    let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > LARGEST_FILE_BYTES {
        return Err(Error::file(path, format!("{size} bytes are too many for a tokenizer")));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::file(path, format!("not JSON: {error}")).fix("give the tokenizer.json of a Hugging Face model"))
}

/// The id `tokenizer_config.json` gives as `bos_token` or `eos_token` (a string or `{"content": ...}`), or `config.json` as
/// `bos_token_id` or `eos_token_id` (a number or a list, whose first entry counts).
fn named_token(inner: &tokenizers::Tokenizer, tokenizer_config: &Value, config: &Value, key: &str) -> Result<Option<u32>> {
    let entry = &tokenizer_config[format!("{key}_token")];
    if let Some(name) = entry.as_str().or_else(|| entry["content"].as_str()) {
        let missing =
            || Error::input("tokenizer", format!("tokenizer_config.json names the {key}_token {name:?}, which the vocabulary lacks"));
        return inner.token_to_id(name).ok_or_else(missing).map(Some);
    }
    let id = &config[format!("{key}_token_id")];
    Ok(id.as_u64().or_else(|| id[0].as_u64()).and_then(|id| u32::try_from(id).ok()))
}

/// The special tokens that the post-processor puts before and after a text.
fn template_ends(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Option<u32>, Option<u32>)> {
    let plain = inner.encode_fast("a", false)?.get_ids().to_vec();
    let full = inner.encode_fast("a", true)?.get_ids().to_vec();
    let Some(at) = full.windows(plain.len().max(1)).position(|window| window == plain) else { return Ok((None, None)) };
    let before = full[..at].first().copied();
    let after = full[at + plain.len()..].last().copied();
    Ok((before, after))
}

fn find_cut(json: &Value) -> Cut {
    let byte_level = &json["pre_tokenizer"];
    let added = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let plain_added = added.iter().all(|token| {
        let content = token["content"].as_str().unwrap_or("");
        token["lstrip"] != true && token["rstrip"] != true && token["single_word"] != true && !content.contains('\n')
    });
    let plain = json["normalizer"].is_null() && byte_level["type"] == "ByteLevel" && byte_level["add_prefix_space"] == false;
    if !plain || !plain_added || json["model"]["type"] != "BPE" {
        Cut::Nowhere
    } else if byte_level["use_regex"] != false {
        Cut::LoneNewline
    } else if build::merges_stay_inside_characters(json) {
        Cut::Newline
    } else {
        Cut::Nowhere
    }
}

/// For byte-level BPE: the bytes without a token of their own.
fn find_missing_bytes(json: &Value, inner: &tokenizers::Tokenizer) -> Vec<u8> {
    let plain =
        json["normalizer"].is_null() && json["pre_tokenizer"]["type"] == "ByteLevel" && json["pre_tokenizer"]["add_prefix_space"] == false;
    if !plain || json["model"]["type"] != "BPE" {
        return Vec::new();
    }
    (0..=255u8).filter(|&byte| inner.token_to_id(&build::byte_letter(byte).to_string()).is_none()).collect()
}

#[cfg(test)]
mod tests;
