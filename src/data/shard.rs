//! Token shards: the tokens of one source's documents in one memory-mapped file, built once and reused.
//!
//! Layout, little-endian: a header of 96 bytes; the tokens (`u16`, or `u32` for vocabularies above 65,536); per document the
//! number of tokens up to and including it (`u64`); where tokens have weights, one `f32` for each. Documents without weights are text,
//! stored without BOS and EOS, which packing adds; documents with weights are whole sequences, to which nothing is added.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | magic `OSPRTOKS` |
//! | 8..12 | version |
//! | 12..16 | bytes per token (2 or 4) |
//! | 16..24 | tokens |
//! | 24..32 | documents |
//! | 32..40 | bytes of text they came from |
//! | 40..48 | documents left out because they were empty |
//! | 48..56 | vocabulary: every token is below it |
//! | 56..64 | fingerprint of the tokenizer |
//! | 64..72 | fingerprint of the source and of the part of it that is here |
//! | 72..80 | XXH3 of everything after the header |
//! | 80..88 | bytes per weight (4, or 0 where tokens have none) |
//! | 88..96 | XXH3 of bytes 0..88 |

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const MAGIC: [u8; 8] = *b"OSPRTOKS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 96;
const END_BYTES: usize = 8;
const WEIGHT_BYTES: usize = 4;

/// What a shard says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub token_bytes: u32,
    pub tokens: u64,
    pub documents: u64,
    pub text_bytes: u64,
    pub empty_documents: u64,
    pub vocabulary: u64,
    pub tokenizer: u64,
    pub source: u64,
    payload: u64,
    weight_bytes: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.token_bytes.to_le_bytes());
        let fields = [
            self.tokens,
            self.documents,
            self.text_bytes,
            self.empty_documents,
            self.vocabulary,
            self.tokenizer,
            self.source,
            self.payload,
            self.weight_bytes,
        ];
        for (slot, field) in bytes[16..88].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        let own = xxh3_64(&bytes[..88]);
        bytes[88..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// The header at the start of `bytes`, or what is wrong with it.
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let header =
            bytes.get(..HEADER_BYTES).ok_or_else(|| format!("cut short: {} bytes, the header alone has {HEADER_BYTES}", bytes.len()))?;
        if header[..8] != MAGIC {
            return Err("not a token shard".into());
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if word(8) != VERSION {
            return Err(format!("version {} of the format, this program reads version {VERSION}", word(8)));
        }
        if long(88) != xxh3_64(&header[..88]) {
            return Err("damaged: the header does not match its hash".into());
        }
        Ok(Self {
            token_bytes: word(12),
            tokens: long(16),
            documents: long(24),
            text_bytes: long(32),
            empty_documents: long(40),
            vocabulary: long(48),
            tokenizer: long(56),
            source: long(64),
            payload: long(72),
            weight_bytes: long(80),
        })
    }

    /// Bytes the whole file must have, where that is a number at all.
    fn file_bytes(&self) -> Option<u64> {
        let tokens = self.tokens.checked_mul(u64::from(self.token_bytes).checked_add(self.weight_bytes)?)?;
        self.documents.checked_mul(END_BYTES as u64)?.checked_add(tokens)?.checked_add(HEADER_BYTES as u64)
    }
}

/// A verified shard.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl Shard {
    /// Ending of the files' names.
    pub const ENDING: &str = "tokens";

    /// Maps the file at `path` and checks all of it: sizes, order of the document ends, hashes, every token below the vocabulary.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let bad = |cause: String| Error::file(path, cause).fix("delete the file, it is built again from the source");
        if file.metadata().map_err(Error::io("read", path))?.len() < HEADER_BYTES as u64 {
            return Err(bad("cut short: there is no whole header".into()));
        }
        // SAFETY: the map is read-only, and bytes are only read as integers, for which any bits are valid. Shards are never
        // written in place (see `Writer::finish`); a foreign program that cuts the file meanwhile ends us with SIGBUS.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let header = check(&map).map_err(bad)?;
        Ok(Self { path: path.to_path_buf(), map, header })
    }

    /// What the file says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Whether documents are whole sequences whose tokens have weights.
    pub fn is_weighted(&self) -> bool {
        self.header.weight_bytes != 0
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// The hash of the content: equal hashes mean equal tokens and documents.
    pub fn content_hash(&self) -> u64 {
        self.header.payload
    }

    /// Tokens of documents `..document`, for `document` up to the number of documents.
    pub fn end_before(&self, document: u64) -> u64 {
        if document == 0 { 0 } else { document_end(&self.map, &self.header, document - 1) }
    }

    /// Tokens `from..to` of the shard, appended to `out`.
    pub fn read(&self, from: u64, to: u64, out: &mut Vec<u32>) {
        let width = self.header.token_bytes as usize;
        let bytes = &self.map[HEADER_BYTES + from as usize * width..HEADER_BYTES + to as usize * width];
        decode_tokens(bytes, width, |token| out.push(token));
    }

    /// The weights of tokens `from..to` as targets, appended to `out`: 1 each where tokens have none of their own.
    pub fn read_weights(&self, from: u64, to: u64, out: &mut Vec<f32>) {
        if !self.is_weighted() {
            return out.extend((from..to).map(|_| 1.0));
        }
        let first = weights_start(&self.header);
        out.extend(decode_weights(&self.map[first + from as usize * WEIGHT_BYTES..first + to as usize * WEIGHT_BYTES]));
    }

    /// The weights of the tokens of one document.
    pub fn document_weights(&self, document: u64) -> Vec<f32> {
        let mut weights = Vec::new();
        self.read_weights(self.end_before(document), self.end_before(document + 1), &mut weights);
        weights
    }

    /// The tokens of one document.
    pub fn document(&self, document: u64) -> Vec<u32> {
        let mut tokens = Vec::new();
        self.read(self.end_before(document), self.end_before(document + 1), &mut tokens);
        tokens
    }
}

fn decode_tokens(bytes: &[u8], width: usize, mut give: impl FnMut(u32)) {
    if width == 2 {
        bytes.chunks_exact(2).for_each(|pair| give(u32::from(u16::from_le_bytes([pair[0], pair[1]]))));
    } else {
        bytes.chunks_exact(4).for_each(|four| give(u32::from_le_bytes([four[0], four[1], four[2], four[3]])));
    }
}

/// Where the weights begin.
fn weights_start(header: &Header) -> usize {
    HEADER_BYTES + header.tokens as usize * header.token_bytes as usize + header.documents as usize * END_BYTES
}

fn decode_weights(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(WEIGHT_BYTES).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

fn document_end(bytes: &[u8], header: &Header, document: u64) -> u64 {
    let at = HEADER_BYTES + header.tokens as usize * header.token_bytes as usize + document as usize * END_BYTES;
    u64::from_le_bytes(bytes[at..at + END_BYTES].try_into().expect("8 bytes"))
}

/// Everything that must hold before a byte is trusted.
fn check(bytes: &[u8]) -> Result<Header, String> {
    let header = Header::decode(bytes)?;
    if !matches!(header.token_bytes, 2 | 4) {
        return Err(format!("{} bytes per token, 2 or 4 are known", header.token_bytes));
    }
    if !matches!(header.weight_bytes, 0 | 4) {
        return Err(format!("{} bytes per weight, 0 or 4 are known", header.weight_bytes));
    }
    if header.file_bytes() != Some(bytes.len() as u64) {
        return Err(format!("damaged: {} bytes do not hold {} tokens and {} documents", bytes.len(), header.tokens, header.documents));
    }
    if xxh3_64(&bytes[HEADER_BYTES..]) != header.payload {
        return Err("damaged: the tokens do not match their hash".into());
    }
    let mut last = 0;
    for document in 0..header.documents {
        let end = document_end(bytes, &header, document);
        if end <= last || end > header.tokens {
            return Err(format!("damaged: document {document} ends at token {end} after one that ended at {last}"));
        }
        last = end;
    }
    if last != header.tokens {
        return Err(format!("damaged: the documents end at token {last} of {}", header.tokens));
    }
    let mut largest = 0;
    let tokens = header.tokens as usize * header.token_bytes as usize;
    decode_tokens(&bytes[HEADER_BYTES..HEADER_BYTES + tokens], header.token_bytes as usize, |token| largest = largest.max(token));
    if header.tokens > 0 && u64::from(largest) >= header.vocabulary {
        return Err(format!("token {largest} is outside the vocabulary of {}", header.vocabulary));
    }
    if header.weight_bytes != 0 && decode_weights(&bytes[weights_start(&header)..]).any(|weight| !weight.is_finite() || weight < 0.0) {
        return Err("damaged: a weight is not a number from 0 on".into());
    }
    Ok(header)
}

/// Writes a shard aside; [`Writer::finish`] puts it in place.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    aside: PathBuf,
    file: Option<BufWriter<File>>,
    header: Header,
    hash: Xxh3Debug,
    ends: Vec<u64>,
    weights: Vec<f32>,
}

/// `Xxh3` prints its whole state; this prints its name.
struct Xxh3Debug(Xxh3);

impl std::fmt::Debug for Xxh3Debug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xxh3")
    }
}

impl Writer {
    /// Starts the shard that will lie at `path`, for tokens below `vocabulary`.
    pub fn create(path: &Path, vocabulary: usize, tokenizer: u64, source: u64) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io("create the folder", folder))?;
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let aside = path.with_extension(format!("{}-{count}.part", std::process::id()));
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&aside).map_err(Error::io("create", &aside))?);
        file.write_all(&[0; HEADER_BYTES]).map_err(Error::io("write", &aside))?;
        let token_bytes = if vocabulary <= 1 << 16 { 2 } else { 4 };
        let header = Header {
            token_bytes,
            tokens: 0,
            documents: 0,
            text_bytes: 0,
            empty_documents: 0,
            vocabulary: vocabulary as u64,
            tokenizer,
            source,
            payload: 0,
            weight_bytes: 0,
        };
        Ok(Self {
            path: path.to_path_buf(),
            aside,
            file: Some(file),
            header,
            hash: Xxh3Debug(Xxh3::new()),
            ends: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// Makes it a shard of whole sequences with weights; every document is then added by [`Writer::weighted_document`].
    #[must_use]
    pub fn with_weights(mut self) -> Self {
        self.header.weight_bytes = WEIGHT_BYTES as u64;
        self
    }

    /// Adds a whole sequence with the weight of each token as a target.
    pub fn weighted_document(&mut self, tokens: &[u32], weights: &[f32], text_bytes: u64) -> Result<()> {
        assert!(tokens.len() == weights.len() && self.header.weight_bytes != 0, "one weight for each token of a weighted shard");
        self.weights.extend_from_slice(weights);
        self.document(tokens, text_bytes)
    }

    /// Adds a document of `text_bytes` bytes; one without tokens is counted and left out.
    pub fn document(&mut self, tokens: &[u32], text_bytes: u64) -> Result<()> {
        if tokens.is_empty() {
            self.skipped(1);
            return Ok(());
        }
        debug_assert!(tokens.iter().all(|&token| u64::from(token) < self.header.vocabulary));
        let width = self.header.token_bytes as usize;
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes().into_iter().take(width)).collect();
        self.header.tokens += tokens.len() as u64;
        self.header.text_bytes += text_bytes;
        self.ends.push(self.header.tokens);
        self.write(&bytes)
    }

    /// Counts documents that were empty.
    pub fn skipped(&mut self, documents: u64) {
        self.header.empty_documents += documents;
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.0.update(bytes);
        self.file.as_mut().expect("open until finished").write_all(bytes).map_err(Error::io("write", &self.aside))
    }

    /// Writes ends and header, syncs, renames into place and opens the result.
    pub fn finish(mut self) -> Result<Shard> {
        let ends: Vec<u8> = self.ends.iter().flat_map(|end| end.to_le_bytes()).collect();
        self.write(&ends)?;
        let weights: Vec<u8> = std::mem::take(&mut self.weights).into_iter().flat_map(f32::to_le_bytes).collect();
        self.write(&weights)?;
        self.header.documents = self.ends.len() as u64;
        self.header.payload = self.hash.0.digest();
        let aside = self.aside.clone();
        let mut file =
            self.file.take().expect("open until finished").into_inner().map_err(|error| Error::io("write", &aside)(error.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io("write", &aside))?;
        file.write_all(&self.header.encode()).map_err(Error::io("write", &aside))?;
        file.sync_all().map_err(Error::io("sync", &aside))?;
        std::fs::rename(&aside, &self.path).map_err(Error::io("rename", &aside))?;
        Shard::open(&self.path)
    }
}

impl Drop for Writer {
    /// Leaves nothing half-written behind; after `finish` the file is no longer there under this name.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.aside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn build(path: &Path, vocabulary: usize, documents: &[Vec<u32>]) -> Shard {
        let mut writer = Writer::create(path, vocabulary, 11, 22).unwrap();
        for document in documents {
            writer.document(document, 3 * document.len() as u64).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn documents_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/a.tokens");
        for vocabulary in [300, 70_000] {
            let documents = vec![vec![1, 2, 3], vec![], vec![299], (0..200).collect()];
            let shard = build(&path, vocabulary, &documents);
            assert_eq!((shard.documents(), shard.tokens(), shard.header().empty_documents), (3, 204, 1));
            assert_eq!((shard.header().tokenizer, shard.header().source, shard.header().text_bytes), (11, 22, 612));
            assert_eq!((shard.document(0), shard.document(1), shard.document(2)), (vec![1, 2, 3], vec![299], documents[3].clone()));
            assert_eq!(shard.header().token_bytes, if vocabulary == 300 { 2 } else { 4 });
        }
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn weights_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tokens");
        let mut writer = Writer::create(&path, 300, 11, 22).unwrap().with_weights();
        writer.weighted_document(&[1, 2, 3], &[0.0, 1.0, 0.5], 3).unwrap();
        writer.weighted_document(&[4], &[2.0], 1).unwrap();
        let shard = writer.finish().unwrap();
        assert!(shard.is_weighted());
        assert_eq!(
            (shard.document(0), shard.document_weights(0), shard.document_weights(1)),
            (vec![1, 2, 3], vec![0.0, 1.0, 0.5], vec![2.0])
        );
        let plain = build(&path, 300, &[vec![1, 2]]);
        assert_eq!((plain.is_weighted(), plain.document_weights(0)), (false, vec![1.0, 1.0]));
        let mut writer = Writer::create(&path, 300, 11, 22).unwrap().with_weights();
        writer.weighted_document(&[1], &[f32::NAN], 3).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("a weight is not a number"));
    }

    #[test]
    fn an_abandoned_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("a.tokens"), 10, 0, 0).unwrap();
        writer.document(&[1], 1).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tokens");
        build(&path, 300, &[vec![1, 2, 3], vec![4]]);
        let good = std::fs::read(&path).unwrap();
        let cause = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = Shard::open(&path).unwrap_err();
            assert!(error.hint().is_some());
            error.to_string()
        };
        assert!(cause(&good[..50]).contains("cut short"));
        assert!(cause(&good[..good.len() - 1]).contains("do not hold 4 tokens and 2 documents"));
        assert!(cause(&[7; 200]).contains("not a token shard"));
        let mut other = good.clone();
        other[8] = 9;
        assert!(cause(&other).contains("version 9"));
        other = good.clone();
        other[97] ^= 1;
        assert!(cause(&other).contains("do not match their hash"));
        other = good.clone();
        other[17] ^= 1;
        assert!(cause(&other).contains("header does not match"));
    }

    /// A header whose own hash is right, whatever it claims.
    fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
        if bytes.len() >= HEADER_BYTES {
            let payload = xxh3_64(&bytes[HEADER_BYTES..]);
            bytes[72..80].copy_from_slice(&payload.to_le_bytes());
            let own = xxh3_64(&bytes[..88]);
            bytes[88..96].copy_from_slice(&own.to_le_bytes());
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(check(&bytes).is_err());
            let mut magic = bytes;
            magic.splice(..magic.len().min(12), MAGIC.into_iter().chain(VERSION.to_le_bytes()));
            prop_assert!(check(&resealed(magic)).is_err());
        }

        #[test]
        fn changed_shards_never_panic(at in 0usize..200, value in any::<u8>(), cut in 0usize..200, reseal in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.tokens");
            build(&path, 300, &[vec![1, 2, 3], vec![4], (0..20).collect()]);
            let mut bytes = std::fs::read(&path).unwrap();
            let length = bytes.len();
            bytes[at % length] = value;
            bytes.truncate(length - cut % 3);
            let bytes = if reseal { resealed(bytes) } else { bytes };
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(shard) = Shard::open(&path) {
                let tokens: usize = (0..shard.documents()).map(|document| shard.document(document).len()).sum();
                prop_assert_eq!(tokens as u64, shard.tokens());
            }
        }
    }
}
