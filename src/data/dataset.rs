//! From the recipe's sources to verified shards: trains or loads the tokenizer, tokenizes what changed, reuses the rest.

use super::bins::Bins;
use super::chat::{Document, end_of_turn};
use super::config::{BpeConfig, Config, Named, Order, TokenizerConfig, Validation, find};
use super::pack::{Batch, Rules, Stream};
use super::shard::{Shard, Writer};
use super::source::Source;
use super::tokenizer::Tokenizer;
use super::whole::WholeRows;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Documents are tokenized in groups of about this much text, all cores at a group.
const GROUP_BYTES: usize = 8 << 20;

/// A text longer than this is cut at line ends for training BPE, so that all cores count.
const TRAINING_PIECE_BYTES: usize = 1 << 16;

/// Tells a person what takes time.
pub type Notes<'a> = dyn FnMut(&str) + 'a;

/// One source as it is trained on.
#[derive(Debug, Clone)]
pub struct Part {
    pub name: String,
    /// Share of the training tokens; the shares of all parts sum to 1.
    pub share: f64,
    pub shard: Arc<Shard>,
}

/// Tokenizer and shards, ready to be packed.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub tokenizer: Arc<Tokenizer>,
    pub train: Vec<Part>,
    /// Held-out documents by source; none where nothing is held out. Shares are by size.
    pub validation: Vec<Part>,
    pub(super) order: Order,
    pub(super) first_rows: u64,
    pub(super) attend_across_documents: bool,
    pub(super) prefetch: usize,
}

/// Rows of a source: a window into its endless text, or whole sequences packed together.
#[derive(Debug)]
pub(super) enum Supply {
    Text(Stream),
    /// Documents that are not to be cut.
    Whole(Stream, WholeRows),
    Sequences(Bins),
}

/// Which part of a source a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    Validation,
}

impl Dataset {
    /// Reads, tokenizes and shards what `config` names. `recipe_folder` is where relative paths are tried second.
    pub fn open(config: &Config, recipe_folder: &Path, notes: &mut Notes<'_>) -> Result<Self> {
        config.check()?;
        let sources = config.open_sources(recipe_folder)?;
        let held_out = config.open_validation(recipe_folder)?;
        for path in sources.iter().chain(&held_out).flat_map(|source| source.source.left_out()) {
            notes(&format!("{} is left out: it has no field \"text\"", path.display()));
        }
        let mut tokenizer = Preparation { config, recipe_folder, sources: &sources, held_out: held_out.as_ref() }.tokenizer(notes)?;
        if let Some(end) = &config.end_of_text {
            tokenizer = tokenizer.with_end_of_text(end)?;
        }
        // A model is spoken to as its data spoke to it, and stops where its answers did.
        if let Some(chat) = sources.iter().find_map(|source| source.chat.as_ref()) {
            tokenizer = tokenizer.with_chat_template(chat.template());
            tokenizer = match end_of_turn(&tokenizer) {
                Some(end) => tokenizer.with_end(end),
                None => tokenizer,
            };
        }
        let tokenizer = Arc::new(tokenizer);
        let mut train = Vec::new();
        let mut validation = Vec::new();
        let conversations = conversations(config, &sources, &tokenizer, notes)?;
        for (source, conversations) in sources.iter().zip(conversations) {
            if let Some([first, second]) = conversations {
                train.push(Part::new(source, first));
                validation.push(Part::new(source, second));
                continue;
            }
            let [first, second] = shards(config, source, &config.validation, &tokenizer, notes)?;
            train.push(Part::new(source, first));
            validation.push(Part::new(source, second));
        }
        if let Some(empty) = train.iter().find(|part| part.shard.documents() == 0) {
            return Err(Error::input(&empty.name, "there are no documents to train on: the source is empty")
                .fix("point the recipe at a source with text in it"));
        }
        for (part, source) in train.iter_mut().zip(&sources) {
            part.share = source.weight.unwrap_or(part.share);
        }
        if let Some(source) = &held_out {
            let [shard, _] = shards(config, source, &Validation::None, &tokenizer, notes)?;
            validation.push(Part::new(source, shard));
        }
        validation.retain(|part| part.shard.documents() > 0);
        if validation.is_empty() && config.validation != Validation::None {
            let held = format!("{:?} holds out no document", config.validation);
            return Err(Error::input("data.validation", held)
                .fix("hold out a tail of the text with validation.tail = 0.1, or nothing with validation = \"none\""));
        }
        normalize(&mut train);
        normalize(&mut validation);
        Ok(Self {
            tokenizer,
            train,
            validation,
            order: config.order,
            first_rows: config.first_rows,
            attend_across_documents: config.attend_across_documents,
            prefetch: config.prefetch,
        })
    }

    /// What packing adds to text and hides from it.
    pub fn rules(&self) -> Rules {
        Rules { bos: self.tokenizer.bos(), eos: self.tokenizer.eos(), attend_across_documents: self.attend_across_documents }
    }

    /// Rows of `context` tokens of `part`, documents as stored.
    fn stored(&self, part: &Part, context: usize) -> Supply {
        match part.shard.is_weighted() {
            false if self.order == Order::Whole => self.whole(part, context),
            false => Supply::Text(Stream::stored(part.shard.clone(), self.rules())),
            true => Supply::Sequences(self.bins(part, context, None)),
        }
    }

    pub(super) fn whole(&self, part: &Part, context: usize) -> Supply {
        let stream = Stream::stored(part.shard.clone(), self.rules());
        let rows = WholeRows::new(&stream, context);
        Supply::Whole(stream, rows)
    }

    pub(super) fn bins(&self, part: &Part, context: usize, shuffle: Option<(u64, usize)>) -> Bins {
        Bins::new(part.shard.clone(), context, self.attend_across_documents, shuffle)
    }

    /// Identifies tokens, tokenizer and order: a [`super::loader::Cursor`] of another dataset does not fit.
    pub fn fingerprint(&self) -> String {
        let parts: Vec<_> = self.train.iter().map(|part| (part.shard.content_hash(), part.share.to_bits())).collect();
        let text = format!("{} {parts:?} {:?} {}", self.tokenizer.fingerprint(), self.order, self.attend_across_documents);
        let begin = if self.first_rows > 0 { format!(" {}", self.first_rows) } else { String::new() };
        format!("{:016x}", xxh3_64((text + &begin).as_bytes()))
    }

    /// The held-out documents in batches of `rows` rows of `context` tokens, the same every time. With more than `most_rows` rows,
    /// evenly spaced ones are taken. Padding fills the last row of each source and the last batch, with weight 0.
    pub fn validation_batches(&self, rows: usize, context: usize, most_rows: Option<usize>) -> Vec<Arc<Batch>> {
        let mut supplies: Vec<Supply> = self.validation.iter().map(|part| self.stored(part, context)).collect();
        let rows_of = |supply: &Supply| match supply {
            Supply::Text(stream) => stream.pairs().div_ceil(context as u64),
            Supply::Whole(_, rows) => rows.rows() as u64,
            Supply::Sequences(bins) => bins.rows(),
        };
        let all: Vec<(usize, u64)> =
            supplies.iter().enumerate().flat_map(|(at, supply)| (0..rows_of(supply)).map(move |row| (at, row))).collect();
        let wanted = most_rows.unwrap_or(all.len()).min(all.len());
        let chosen: Vec<(usize, u64)> = (0..wanted).map(|at| all[(2 * at + 1) * all.len() / (2 * wanted)]).collect();
        let batches = chosen.chunks(rows).map(|chunk| {
            let mut batch = Batch::padding(rows, context);
            for (row, &(source, number)) in chunk.iter().enumerate() {
                match &mut supplies[source] {
                    Supply::Text(stream) => stream.fill_once(number * context as u64, &mut batch, row),
                    Supply::Whole(stream, rows) => stream.fill_parts(rows.row(number), &mut batch, row),
                    Supply::Sequences(bins) => bins.fill(number, &mut batch, row),
                }
                batch.sources[row] = source as u32;
            }
            Arc::new(batch)
        });
        batches.collect()
    }

    /// The held-out conversations: tokens, and how much each counts as a target.
    pub fn held_out_sequences(&self) -> Vec<(Vec<u32>, Vec<f32>)> {
        let weighted = self.validation.iter().filter(|part| part.shard.is_weighted());
        weighted.flat_map(|part| (0..part.shard.documents()).map(|at| (part.shard.document(at), part.shard.document_weights(at)))).collect()
    }

    /// At most `most` held-out documents, evenly spaced over all of them: a conversation with the weights of its tokens, or a text with BOS in
    /// front where the tokenizer has one.
    pub fn held_out_documents(&self, most: usize) -> Vec<(Vec<u32>, Option<Vec<f32>>)> {
        let all: Vec<(&Part, u64)> = self.validation.iter().flat_map(|part| (0..part.shard.documents()).map(move |d| (part, d))).collect();
        let wanted = most.min(all.len());
        let document = |at: usize| {
            let (part, document) = all[(2 * at + 1) * all.len() / (2 * wanted)];
            let weights = part.shard.is_weighted().then(|| part.shard.document_weights(document));
            let bos = self.tokenizer.bos().filter(|_| weights.is_none());
            (bos.into_iter().chain(part.shard.document(document)).collect(), weights)
        };
        (0..wanted).map(document).collect()
    }
}

impl Part {
    /// With a share by size; [`normalize`] makes it one of the whole.
    fn new(source: &Named, shard: Shard) -> Self {
        Self { name: source.name.clone(), share: shard.tokens() as f64, shard: Arc::new(shard) }
    }
}

fn normalize(parts: &mut [Part]) {
    let total: f64 = parts.iter().map(|part| part.share).sum();
    parts.iter_mut().for_each(|part| part.share /= total);
}

/// What making a tokenizer needs.
struct Preparation<'a> {
    config: &'a Config,
    recipe_folder: &'a Path,
    sources: &'a [Named],
    held_out: Option<&'a Named>,
}

impl Preparation<'_> {
    fn tokenizer(&self, notes: &mut Notes<'_>) -> Result<Tokenizer> {
        match &self.config.tokenizer {
            TokenizerConfig::Byte => Ok(Tokenizer::byte()),
            TokenizerConfig::File(path) => Tokenizer::load(&find(path, self.recipe_folder)?),
            TokenizerConfig::Character => {
                self.cached("every character", notes, |preparation| Tokenizer::character(preparation.characters()?))
            }
            TokenizerConfig::Bpe(bpe) => {
                self.cached(&format!("{bpe:?}"), notes, |preparation| Tokenizer::train_bpe(&preparation.training_texts(bpe)?, bpe.vocab))
            }
        }
    }

    /// The tokenizer that `make` makes from these sources, kept in the cache under `what` and their fingerprints.
    fn cached(&self, what: &str, notes: &mut Notes<'_>, make: impl FnOnce(&Self) -> Result<Tokenizer>) -> Result<Tokenizer> {
        let prints = self.sources.iter().chain(self.held_out).map(|source| source.source.fingerprint()).collect::<Result<Vec<_>>>()?;
        let key = xxh3_64(format!("{what} {prints:?} {:?}", self.config.validation).as_bytes());
        let folder = self.config.cache.join(format!("tokenizer-{key:016x}"));
        if let Ok(tokenizer) = Tokenizer::load(&folder) {
            return Ok(tokenizer);
        }
        notes(&format!("making the tokenizer ({what})"));
        let tokenizer = make(self)?;
        keep(&tokenizer, &folder)?;
        Ok(tokenizer)
    }

    fn characters(&self) -> Result<BTreeSet<char>> {
        let mut letters = BTreeSet::new();
        for source in self.sources.iter().chain(self.held_out) {
            source.source.visit(&mut |text| {
                letters.extend(text.chars());
                Ok(())
            })?;
        }
        Ok(letters)
    }

    /// Training documents, evenly spaced ones where all are more than the sample.
    fn training_texts(&self, bpe: &BpeConfig) -> Result<Vec<String>> {
        let mut total = 0u64;
        self.visit_training(&mut |text| total += text.len() as u64)?;
        let step = total.div_ceil(bpe.sample_bytes.max(1)).max(1);
        let mut texts = Vec::new();
        let mut document = 0u64;
        self.visit_training(&mut |text| {
            if document.is_multiple_of(step) {
                texts.extend(pieces(text));
            }
            document += 1;
        })?;
        Ok(texts)
    }

    fn visit_training(&self, visit: &mut dyn FnMut(&str)) -> Result<()> {
        for source in self.sources {
            walk(source.source.as_ref(), &self.config.validation, &mut |split, text| {
                if split == Split::Train {
                    visit(text);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn pieces(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for line in text.split_inclusive('\n') {
        if pieces.last().is_some_and(|piece| piece.len() >= TRAINING_PIECE_BYTES) {
            pieces.push(String::new());
        }
        pieces.last_mut().expect("starts with one").push_str(line);
    }
    pieces
}

/// Saves aside and renames, so that a half-written tokenizer is never found.
fn keep(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    let aside = folder.with_extension(format!("{}.part", std::process::id()));
    std::fs::create_dir_all(&aside).map_err(Error::io("create the folder", &aside))?;
    let saved = tokenizer.save(&aside);
    // What lies there did not load; another run may also have just put the same tokenizer there.
    let _ = std::fs::remove_dir_all(folder);
    let renamed = saved.and_then(|()| std::fs::rename(&aside, folder).map_err(Error::io("rename", &aside)));
    let _ = std::fs::remove_dir_all(&aside);
    renamed
}

/// Hands every document of `source` to `visit` with the part it belongs to; returns how many were empty.
fn walk(source: &dyn Source, validation: &Validation, visit: &mut dyn FnMut(Split, &str) -> Result<()>) -> Result<u64> {
    match *validation {
        Validation::None | Validation::Path(_) => source.visit(&mut |text| visit(Split::Train, text)),
        Validation::Every(every) => {
            let mut document = 0u64;
            source.visit(&mut |text| {
                document += 1;
                visit(if document.is_multiple_of(every) { Split::Validation } else { Split::Train }, text)
            })
        }
        Validation::Tail(tail) => {
            let mut characters = 0u64;
            source.visit(&mut |text| {
                characters += text.chars().count() as u64;
                Ok(())
            })?;
            let mut left = (characters as f64 * (1.0 - tail)) as u64;
            source.visit(&mut |text| {
                let (head, rest) = split_after(text, left);
                left -= head.chars().count() as u64;
                [(Split::Train, head), (Split::Validation, rest)]
                    .into_iter()
                    .filter(|(_, part)| !part.is_empty())
                    .try_for_each(|(split, part)| visit(split, part))
            })
        }
    }
}

/// The first `characters` characters and the rest.
fn split_after(text: &str, characters: u64) -> (&str, &str) {
    let at = text.char_indices().nth(usize::try_from(characters).unwrap_or(usize::MAX)).map_or(text.len(), |(at, _)| at);
    text.split_at(at)
}

/// Where the two shards of a source lie, and what they must have been made from.
struct Places<'a> {
    config: &'a Config,
    name: &'a str,
    tokenizer: &'a Tokenizer,
    validation: &'a Validation,
    content: u64,
}

impl<'a> Places<'a> {
    fn new(config: &'a Config, source: &'a Named, validation: &'a Validation, tokenizer: &'a Tokenizer) -> Result<Self> {
        Ok(Self { config, name: &source.name, tokenizer, validation, content: source.source.fingerprint()? })
    }

    fn print(&self, split: Split) -> u64 {
        xxh3_64(format!("{:016x} {:?} {split:?}", self.content, self.validation).as_bytes())
    }

    fn path(&self, split: Split) -> PathBuf {
        let key = xxh3_64(format!("{:016x} {}", self.print(split), self.tokenizer.fingerprint()).as_bytes());
        let part = if split == Split::Train { "train" } else { "validation" };
        self.config.cache.join(format!("{}-{part}-{key:016x}.tokens", self.name))
    }

    fn reuse(&self, split: Split) -> Option<Shard> {
        let shard = Shard::open(&self.path(split)).ok()?;
        (shard.header().source == self.print(split) && shard.header().tokenizer == self.tokenizer.fingerprint_bits()).then_some(shard)
    }

    /// Both shards, where content, split and tokenizer are those they were made from.
    fn reuse_both(&self) -> Option<[Shard; 2]> {
        Some([self.reuse(Split::Train)?, self.reuse(Split::Validation)?])
    }

    fn writer(&self, split: Split) -> Result<Writer> {
        Writer::create(&self.path(split), self.tokenizer.vocabulary(), self.tokenizer.fingerprint_bits(), self.print(split))
    }
}

/// The shards of the sources that hold conversations, nothing for the others. All are read before the first shard is written: a mistake
/// in one leaves nothing behind.
fn conversations(config: &Config, sources: &[Named], tokenizer: &Tokenizer, notes: &mut Notes<'_>) -> Result<Vec<Option<[Shard; 2]>>> {
    let mut read = Vec::new();
    for source in sources {
        let Some(chat) = &source.chat else {
            read.push(None);
            continue;
        };
        let places = Places::new(config, source, &config.validation, tokenizer)?;
        let kept = places.reuse_both();
        let documents = match kept {
            Some(_) => Vec::new(),
            None => {
                notes(&format!("rendering and tokenizing {}", source.name));
                chat.documents(tokenizer)?
            }
        };
        if kept.is_none() && documents.is_empty() {
            return Err(Error::input(&source.name, "there are no conversations to train on: the source is empty")
                .fix("point the recipe at a file or folder with records in it"));
        }
        read.push(Some((places, kept, documents)));
    }
    let write = |entry: Option<(Places<'_>, Option<[Shard; 2]>, Vec<Document>)>| {
        let Some((places, kept, documents)) = entry else { return Ok(None) };
        kept.map_or_else(|| write_conversations(&places, &documents), Ok).map(Some)
    };
    read.into_iter().map(write).collect()
}

fn write_conversations(places: &Places<'_>, documents: &[Document]) -> Result<[Shard; 2]> {
    let mut writers = [places.writer(Split::Train)?.with_weights(), places.writer(Split::Validation)?.with_weights()];
    let held_back = |at: usize| match *places.validation {
        Validation::None | Validation::Path(_) => false,
        Validation::Every(every) => (at as u64 + 1).is_multiple_of(every),
        Validation::Tail(tail) => at >= (documents.len() as f64 * (1.0 - tail)) as usize,
    };
    for (at, document) in documents.iter().enumerate() {
        writers[usize::from(held_back(at))].weighted_document(&document.tokens, &document.weights, document.text_bytes as u64)?;
    }
    let [train, validation] = writers;
    Ok([train.finish()?, validation.finish()?])
}

/// The training and the validation shard of one source of text: reused when content, split and tokenizer are those they were made from.
fn shards(config: &Config, source: &Named, validation: &Validation, tokenizer: &Tokenizer, notes: &mut Notes<'_>) -> Result<[Shard; 2]> {
    let places = Places::new(config, source, validation, tokenizer)?;
    if let Some(kept) = places.reuse_both() {
        return Ok(kept);
    }
    notes(&format!("tokenizing {}", source.name));
    let mut encoder = Encoder {
        tokenizer,
        name: &source.name,
        train: places.writer(Split::Train)?,
        validation: places.writer(Split::Validation)?,
        waiting: Vec::new(),
        bytes: 0,
        number: 0,
    };
    let empty = walk(source.source.as_ref(), validation, &mut |split, text| encoder.add(split, text))?;
    encoder.train.skipped(empty);
    encoder.finish()
}

/// Collects documents and tokenizes them in groups.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    name: &'a str,
    train: Writer,
    validation: Writer,
    waiting: Vec<(Split, String)>,
    bytes: usize,
    /// Documents tokenized so far, to name the one at fault.
    number: u64,
}

impl Encoder<'_> {
    fn add(&mut self, split: Split, text: &str) -> Result<()> {
        self.bytes += text.len();
        self.waiting.push((split, text.to_string()));
        if self.bytes >= GROUP_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        self.bytes = 0;
        let texts: Vec<&str> = waiting.iter().map(|(_, text)| text.as_str()).collect();
        let encoded = self.tokenizer.encode_all(&texts).map_err(|error| self.locate(&texts, error))?;
        for ((split, text), tokens) in waiting.iter().zip(&encoded) {
            let writer = if *split == Split::Train { &mut self.train } else { &mut self.validation };
            writer.document(tokens, text.len() as u64)?;
        }
        self.number += waiting.len() as u64;
        Ok(())
    }

    /// The same mistake with source and document named.
    fn locate(&self, texts: &[&str], error: Error) -> Error {
        let at = texts.iter().position(|text| self.tokenizer.encode(text).is_err()).unwrap_or(0) as u64;
        match error {
            Error::Input { place, cause, fix } => {
                Error::Input { place: format!("{}, document {}, {place}", self.name, self.number + at), cause, fix }
            }
            other => other,
        }
    }

    fn finish(mut self) -> Result<[Shard; 2]> {
        self.flush()?;
        let Self { name, train, validation, .. } = self;
        let shards = [train.finish()?, validation.finish()?];
        if let Some(shard) = shards.iter().find(|shard| shard.documents() > u64::from(u32::MAX)) {
            return Err(
                Error::input(name, format!("{} documents are more than one source may have", shard.documents())).fix("divide the source")
            );
        }
        Ok(shards)
    }
}
