//! A `tokenizer.json` as GGUF keys, so that llama.cpp cuts text into the same tokens, and back.
//!
//! Byte-level BPE becomes the vocabulary model `gpt2` with its merges. llama.cpp always cuts text with a pattern first (`tokenizer.ggml.pre`);
//! a tokenizer without one is still exact when no merge crosses a character, because no pattern cuts inside a character.
//! BPE with byte fallback becomes the model `llama`, which merges the adjacent pair whose result has the highest score: with the scores set to
//! minus the merge ranks that is the same procedure, provided every way to split a token is a merge, as SentencePiece's conversions have it.
//! The file itself travels along as `osprey.tokenizer_json`, from which reading back is exact.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value as Json, json};

use super::gguf::{Metadata, Value};
use crate::data::chat::end_of_turn;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

const OWN_JSON: &str = "osprey.tokenizer_json";
const OWN_CONFIG: &str = "osprey.tokenizer_config";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
const END_OF_TURN: &str = "tokenizer.ggml.eot_token_id";
/// The score of pieces no merge makes: behind every merge.
const NO_MERGE: f32 = -1e9;

/// llama.cpp's token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Patterns that cut text before merging, with llama.cpp's names for them.
const PATTERNS: [(&str, &str); 2] = [
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "qwen2"),
];

/// Adds the keys of `tokenizer` for a model with `vocab` embedding rows. Returns what a user should know.
///
/// # Errors
/// When the tokenizer has more tokens than the model, or is of a kind llama.cpp cannot reproduce.
pub fn write(tokenizer: &Tokenizer, vocab: usize, metadata: &mut Metadata) -> Result<Vec<String>> {
    if tokenizer.vocabulary() > vocab {
        return Err(Error::input("tokenizer", format!("has {} tokens, the model has {vocab}", tokenizer.vocabulary()))
            .fix("give the tokenizer this model was trained with"));
    }
    let definition = Definition { json: tokenizer.definition(), tokenizer, vocab };
    let notes = match definition.kind()? {
        Kind::ByteLevel { pattern } => {
            definition.write_byte_level(pattern, metadata);
            Vec::new()
        }
        Kind::ByteFallback => definition.write_byte_fallback(metadata),
    };
    write_ids(tokenizer, metadata);
    if let Some(template) = tokenizer.chat_template() {
        metadata.set(CHAT_TEMPLATE, template);
        if let Some(end) = end_of_turn(tokenizer) {
            metadata.set(END_OF_TURN, end);
        }
    }
    metadata.set(OWN_JSON, definition.json.to_string());
    metadata.set(OWN_CONFIG, config(tokenizer).to_string());
    Ok(notes)
}

/// Keys of a model that comes without a tokenizer: llama.cpp loads it and takes ids only.
pub fn write_none(metadata: &mut Metadata) {
    metadata.set("tokenizer.ggml.model", "no_vocab");
}

/// The tokenizer inside a file, with its chat template: exact for files written here, rebuilt from merges for others of the `gpt2` model,
/// `None` otherwise.
///
/// # Errors
/// When the keys contradict each other.
pub fn read(metadata: &Metadata) -> Result<Option<Tokenizer>> {
    let tokenizer = read_vocabulary(metadata)?;
    let template = metadata.get(CHAT_TEMPLATE).and_then(Value::as_str);
    Ok(match (tokenizer, template) {
        (Some(tokenizer), Some(template)) => Some(tokenizer.with_chat_template(template)),
        (tokenizer, _) => tokenizer,
    })
}

fn read_vocabulary(metadata: &Metadata) -> Result<Option<Tokenizer>> {
    let text = |key: &str| metadata.get(key).and_then(Value::as_str);
    if let Some(json) = text(OWN_JSON) {
        let parse = |what: &str, text: &str| {
            serde_json::from_str::<Json>(text).map_err(|error| Error::input(what, format!("is not JSON: {error}")))
        };
        let config = text(OWN_CONFIG).map_or(Ok(Json::Null), |text| parse(OWN_CONFIG, text))?;
        return Tokenizer::from_json(parse(OWN_JSON, json)?, &config, &config).map(Some);
    }
    if text("tokenizer.ggml.model") != Some("gpt2") || text("tokenizer.ggml.pre").is_some_and(|pre| pre != "gpt-2") {
        return Ok(None);
    }
    let strings = |key: &str| -> Result<Vec<String>> {
        let items = metadata.get(key).and_then(Value::items).ok_or_else(|| Error::input(key, "is missing or no array"))?;
        items
            .iter()
            .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| Error::input(key, "holds something other than text")))
            .collect()
    };
    let types = metadata.get("tokenizer.ggml.token_type").and_then(Value::items).unwrap_or(&[]);
    let special: Vec<u32> = (0u32..).zip(types).filter(|(_, kind)| kind.as_u64() == Some(CONTROL as u64)).map(|(id, _)| id).collect();
    let id = |key: &str| metadata.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let begins = metadata.get("tokenizer.ggml.add_bos_token").and_then(Value::as_bool).unwrap_or(false);
    let bos = id("tokenizer.ggml.bos_token_id").filter(|_| begins);
    let (tokens, merges) = (strings("tokenizer.ggml.tokens")?, strings("tokenizer.ggml.merges")?);
    Tokenizer::from_byte_level(&tokens, &merges, &special, bos, id("tokenizer.ggml.eos_token_id"), true).map(Some)
}

/// What `Tokenizer::save` writes beside `tokenizer.json`, as far as ids and templates depend on it.
fn config(tokenizer: &Tokenizer) -> Json {
    let named = tokenizer.named_specials();
    let mut config =
        json!({ "bos_token": named.get("bos_token"), "eos_token": named.get("eos_token"), "add_bos_token": tokenizer.bos().is_some() });
    for (name, token) in named {
        config[name] = token.into();
    }
    let ends: Vec<u32> = tokenizer.ends().collect();
    if ends.len() > 1 {
        config["eos_token_id"] = ends.into();
    }
    config
}

fn write_ids(tokenizer: &Tokenizer, metadata: &mut Metadata) {
    // llama.cpp assumes id 11 where a gpt2 vocabulary names none, so the end also stands for a missing beginning.
    if let Some(bos) = tokenizer.bos().or(tokenizer.eos()) {
        metadata.set("tokenizer.ggml.bos_token_id", bos);
    }
    if let Some(eos) = tokenizer.eos() {
        metadata.set("tokenizer.ggml.eos_token_id", eos);
    }
    metadata.set("tokenizer.ggml.add_bos_token", tokenizer.bos().is_some());
    metadata.set("tokenizer.ggml.add_eos_token", false);
}

/// The two families llama.cpp can follow exactly.
enum Kind {
    ByteLevel { pattern: &'static str },
    ByteFallback,
}

struct Definition<'a> {
    json: &'a Json,
    tokenizer: &'a Tokenizer,
    vocab: usize,
}

impl Definition<'_> {
    fn kind(&self) -> Result<Kind> {
        let refuse = |cause: String| {
            Err(Error::input("tokenizer", cause).fix("export to hf, or train with a byte, character or BPE tokenizer of Osprey's"))
        };
        let model = &self.json["model"];
        if model["type"] != "BPE" {
            return refuse(format!("a {} vocabulary has no equivalent in GGUF", model["type"]));
        }
        if model["byte_fallback"] == true {
            return if self.normalizes_like_sentence_piece() {
                Ok(Kind::ByteFallback)
            } else {
                refuse("its normalizer is not SentencePiece's".to_owned())
            };
        }
        match self.pattern() {
            Some(pattern) => Ok(Kind::ByteLevel { pattern }),
            None => refuse("llama.cpp has no equivalent of its pre-tokenizer".to_owned()),
        }
    }

    /// llama.cpp's name of what cuts the text before byte-level merges.
    fn pattern(&self) -> Option<&'static str> {
        let pre = &self.json["pre_tokenizer"];
        let (split, byte_level) = match pre["type"].as_str()? {
            "ByteLevel" => (None, pre),
            "Sequence" => {
                let steps = pre["pretokenizers"].as_array().filter(|steps| steps.len() == 2)?;
                (Some(steps[0]["pattern"]["Regex"].as_str()?), &steps[1])
            }
            _ => return None,
        };
        if byte_level["type"] != "ByteLevel" || byte_level["add_prefix_space"] == true {
            return None;
        }
        match (split, byte_level["use_regex"] != false) {
            (None, true) => Some("gpt-2"),
            (None, false) => self.merges_stay_inside_characters().then_some("gpt-2"),
            (Some(split), false) => PATTERNS.iter().find(|(pattern, _)| *pattern == split).map(|(_, name)| *name),
            (Some(_), true) => None,
        }
    }

    fn merges_stay_inside_characters(&self) -> bool {
        let starts = |letter: char| byte_of_letter(letter).is_none_or(|byte| byte & 0xc0 != 0x80);
        self.merges().iter().all(|(left, right)| left.chars().chain(right.chars()).skip(1).all(|letter| !starts(letter)))
    }

    /// `Prepend ▁` and `Replace " " -> ▁`, or the `Metaspace` pre-tokenizer, with or without the prefix.
    fn normalizes_like_sentence_piece(&self) -> bool {
        let is_step = |step: &Json| {
            (step["type"] == "Prepend" && step["prepend"] == "\u{2581}")
                || (step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "\u{2581}")
        };
        let (normalizer, pre) = (&self.json["normalizer"], &self.json["pre_tokenizer"]);
        match normalizer["type"].as_str() {
            None => pre["type"] == "Metaspace" && pre["split"] == false,
            Some("Sequence") => pre.is_null() && normalizer["normalizers"].as_array().is_some_and(|steps| steps.iter().all(is_step)),
            Some(_) => pre.is_null() && is_step(normalizer),
        }
    }

    fn prepends_space(&self) -> bool {
        let normalizer = &self.json["normalizer"];
        let steps = normalizer["normalizers"].as_array();
        normalizer["type"] == "Prepend"
            || steps.is_some_and(|steps| steps.iter().any(|step| step["type"] == "Prepend"))
            || matches!(self.json["pre_tokenizer"]["prepend_scheme"].as_str(), Some("first" | "always"))
    }

    fn merges(&self) -> Vec<(&str, &str)> {
        let merges = self.json["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
        let pairs = merges.iter().filter_map(|merge| match merge {
            Json::String(text) => text.split_once(' '),
            other => other[0].as_str().zip(other[1].as_str()),
        });
        pairs.collect()
    }

    fn write_byte_level(&self, pattern: &str, metadata: &mut Metadata) {
        let (tokens, types) = self.tokens_and_types();
        metadata.set("tokenizer.ggml.model", "gpt2");
        metadata.set("tokenizer.ggml.pre", pattern);
        metadata.set("tokenizer.ggml.tokens", Value::strings(tokens));
        metadata.set("tokenizer.ggml.token_type", Value::i32s(types));
        metadata.set("tokenizer.ggml.merges", Value::strings(self.merges().iter().map(|(left, right)| format!("{left} {right}"))));
    }

    fn write_byte_fallback(&self, metadata: &mut Metadata) -> Vec<String> {
        let (tokens, types) = self.tokens_and_types();
        let merges = self.merges();
        let mut ranks: BTreeMap<String, f32> = BTreeMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(-(rank as f32 + 1.0));
        }
        let score = |token: &String, kind: &i32| match *kind {
            NORMAL if token.chars().count() > 1 => ranks.get(token).copied().unwrap_or(NO_MERGE),
            _ => 0.0,
        };
        let scores: Vec<f32> = tokens.iter().zip(&types).map(|(token, kind)| score(token, kind)).collect();
        let complete = self.every_split_is_a_merge(&tokens, &types, &merges);
        metadata.set("tokenizer.ggml.model", "llama");
        metadata.set("tokenizer.ggml.pre", "default");
        metadata.set("tokenizer.ggml.tokens", Value::strings(tokens));
        metadata.set("tokenizer.ggml.scores", Value::f32s(scores));
        metadata.set("tokenizer.ggml.token_type", Value::i32s(types));
        metadata.set("tokenizer.ggml.add_space_prefix", self.prepends_space());
        if let Some(unknown) = self.json["model"]["unk_token"].as_str().and_then(|piece| self.tokenizer.id(piece)) {
            metadata.set("tokenizer.ggml.unknown_token_id", unknown);
        }
        if complete {
            return Vec::new();
        }
        vec!["llama.cpp may cut some words into other tokens, because the tokenizer lacks merges that SentencePiece would have".to_owned()]
    }

    /// Whether scores can stand for the merges: no way to build a token is missing, and its merges follow one another.
    fn every_split_is_a_merge(&self, tokens: &[String], types: &[i32], merges: &[(&str, &str)]) -> bool {
        let normal: BTreeSet<&str> =
            tokens.iter().zip(types).filter(|(_, kind)| **kind == NORMAL).map(|(token, _)| token.as_str()).collect();
        let known: BTreeSet<(&str, &str)> = merges.iter().copied().collect();
        let whole = normal.iter().all(|token| {
            let mut splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            splits.all(|(left, right)| !(normal.contains(left) && normal.contains(right)) || known.contains(&(left, right)))
        });
        let mut finished = BTreeSet::new();
        let mut previous = String::new();
        let grouped = merges.iter().all(|(left, right)| {
            let result = format!("{left}{right}");
            let fresh = result == previous || finished.insert(result.clone());
            previous = result;
            fresh
        });
        whole && grouped
    }

    /// One entry per embedding row; rows no token uses are named so that names stay unique.
    fn tokens_and_types(&self) -> (Vec<String>, Vec<i32>) {
        let unknown = self.json["model"]["unk_token"].as_str();
        let falls_back = self.json["model"]["byte_fallback"] == true;
        let added: BTreeSet<u64> =
            self.json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice).iter().filter_map(|token| token["id"].as_u64()).collect();
        let describe = |id: u32| match self.tokenizer.piece(id) {
            None => (format!("[PAD{id}]"), UNUSED),
            Some(piece) if Some(piece.as_str()) == unknown => (piece, UNKNOWN),
            Some(piece) if self.tokenizer.is_special(id) => (piece, CONTROL),
            Some(piece) if added.contains(&u64::from(id)) => (piece, USER_DEFINED),
            Some(piece) if falls_back && is_byte_token(&piece) => (piece, BYTE),
            Some(piece) => (piece, NORMAL),
        };
        (0..self.vocab as u32).map(describe).unzip()
    }
}

/// `<0x00>` to `<0xFF>`.
fn is_byte_token(piece: &str) -> bool {
    piece
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// The byte a letter of GPT-2's byte alphabet stands for: printable Latin-1 stands for itself, the other bytes follow from U+0100 on.
fn byte_of_letter(letter: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(letter) {
        code @ 0..=0xff => Some(code as u8).filter(printable),
        code => (0..=255u8).filter(|byte| !printable(byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Hello world's 1234 caf\u{e9}s \u{2014} \u{1F680}\n\n\tok  end \n";

    fn keys(tokenizer: &Tokenizer) -> Metadata {
        let mut metadata = Metadata::default();
        write(tokenizer, tokenizer.vocabulary() + 3, &mut metadata).unwrap();
        metadata
    }

    fn sentence_piece(merges: &Json) -> Json {
        let mut vocab =
            json!({ "<unk>": 0, "<s>": 1, "</s>": 2, "\u{2581}": 259, "a": 260, "b": 261, "ab": 262, "\u{2581}a": 263, "\u{2581}ab": 264 });
        (0..256).for_each(|byte| vocab[format!("<0x{byte:02X}>")] = json!(byte + 3));
        let special = |id: u32, content: &str| json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "\u{2581}" }, { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" }] },
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": merges },
        })
    }

    #[test]
    fn every_tokenizer_made_here_travels_and_returns() {
        for tokenizer in
            [Tokenizer::byte(), Tokenizer::character(TEXT.chars()).unwrap(), Tokenizer::train_bpe(&[TEXT.repeat(3)], 280).unwrap()]
        {
            let mut metadata = keys(&tokenizer);
            assert_eq!(metadata.get("tokenizer.ggml.pre").unwrap().as_str(), Some("gpt-2"));
            assert_eq!(metadata.get("tokenizer.ggml.tokens").unwrap().items().unwrap().len(), tokenizer.vocabulary() + 3);
            let back = read(&metadata).unwrap().unwrap();
            assert_eq!(back.fingerprint(), tokenizer.fingerprint());
            // What other programs see gives the same tokens, too.
            metadata.set(OWN_JSON, 0u32);
            let rebuilt = read(&metadata).unwrap().unwrap();
            assert_eq!(rebuilt.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
            assert_eq!((rebuilt.bos(), rebuilt.eos()), (tokenizer.bos(), tokenizer.eos()));
        }
    }

    #[test]
    fn merge_ranks_become_scores() {
        let merges = json!([["a", "b"], ["\u{2581}", "a"], ["\u{2581}", "ab"], ["\u{2581}a", "b"]]);
        let tokenizer =
            Tokenizer::from_json(sentence_piece(&merges), &json!({ "bos_token": "<s>", "add_bos_token": true }), &Json::Null).unwrap();
        let mut metadata = Metadata::default();
        assert_eq!(write(&tokenizer, 266, &mut metadata).unwrap(), Vec::<String>::new());
        let scores: Vec<f64> =
            metadata.get("tokenizer.ggml.scores").unwrap().items().unwrap().iter().map(|score| score.as_f64().unwrap()).collect();
        assert_eq!(scores[259..], [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, 0.0]);
        let types: Vec<u64> =
            metadata.get("tokenizer.ggml.token_type").unwrap().items().unwrap().iter().map(|kind| kind.as_u64().unwrap()).collect();
        assert_eq!((&types[..4], types[265]), (&[2, 3, 3, 6][..], 5));
        assert_eq!(metadata.get("tokenizer.ggml.add_space_prefix").unwrap().as_bool(), Some(true));
        assert_eq!(read(&metadata).unwrap().unwrap().fingerprint(), tokenizer.fingerprint());
    }

    #[test]
    fn missing_merges_are_said() {
        let merges = json!([["a", "b"], ["\u{2581}", "a"], ["\u{2581}", "ab"]]);
        let tokenizer = Tokenizer::from_json(sentence_piece(&merges), &Json::Null, &Json::Null).unwrap();
        assert!(write(&tokenizer, 300, &mut Metadata::default()).unwrap()[0].contains("merges"));
    }

    #[test]
    fn what_llama_cpp_cannot_follow_is_refused() {
        let trained = Tokenizer::train_bpe(&[TEXT.repeat(3)], 280).unwrap();
        let mut definition = trained.definition().clone();
        definition["pre_tokenizer"]["use_regex"] = json!(false);
        let unsplit = Tokenizer::from_json(definition, &Json::Null, &Json::Null).unwrap();
        let refusal = write(&unsplit, 300, &mut Metadata::default()).unwrap_err();
        assert!(refusal.to_string().contains("pre-tokenizer") && refusal.hint().is_some());
        assert!(write(&trained, 100, &mut Metadata::default()).unwrap_err().to_string().contains("has 280 tokens, the model has 100"));
    }

    #[test]
    fn no_vocabulary_and_broken_keys() {
        let mut metadata = Metadata::default();
        write_none(&mut metadata);
        assert!(read(&metadata).unwrap().is_none());
        metadata.set("tokenizer.ggml.model", "gpt2");
        assert!(read(&metadata).unwrap_err().to_string().contains("tokenizer.ggml.tokens"));
        metadata.set(OWN_JSON, "{");
        assert!(read(&metadata).unwrap_err().to_string().contains(OWN_JSON));
    }

    #[test]
    fn letters_and_bytes() {
        let all: BTreeSet<u8> = (0u32..0x144).filter_map(char::from_u32).filter_map(byte_of_letter).collect();
        assert_eq!(all.len(), 256);
        assert_eq!((byte_of_letter('\u{120}'), byte_of_letter('A'), byte_of_letter('\u{200}')), (Some(b' '), Some(b'A'), None));
    }
}
