//! The tokenizers Osprey makes itself. All are byte-level BPE in the layout of GPT-2, so that transformers reads their
//! `tokenizer.json` and llama.cpp their vocabulary (model `gpt2`) without a line of special code.

use super::Tokenizer;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Begins and ends every document in the tokenizers made here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The printable letter that stands for `byte` in a byte-level vocabulary: the byte itself where Latin-1 prints it, otherwise the
/// next free code point from U+0100 on (Radford et al. 2019, `bytes_to_unicode` of GPT-2's encoder).
pub(super) fn byte_letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(0x100 + rank).expect("U+0100 to U+0143 are letters")
}

fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| byte_letter(byte)).collect()
}

/// The bytes that `piece` of a byte-level vocabulary stands for; nothing where it uses a letter outside the alphabet.
fn bytes_of(piece: &str) -> Option<Vec<u8>> {
    let letters: Vec<char> = (0..=255).map(byte_letter).collect();
    piece.chars().map(|letter| letters.iter().position(|&other| other == letter).map(|byte| byte as u8)).collect()
}

/// Whether every merge builds (part of) one UTF-8 character, so that no token reaches across two.
pub(super) fn merges_stay_inside_characters(json: &Value) -> bool {
    let within = |piece: &str| {
        bytes_of(piece).is_some_and(|bytes| {
            let length = match bytes.first() {
                Some(0xC2..=0xDF) => 2,
                Some(0xE0..=0xEF) => 3,
                Some(0xF0..=0xF4) => 4,
                _ => 1,
            };
            bytes.len() <= length && bytes.iter().skip(1).all(|byte| (0x80..=0xBF).contains(byte))
        })
    };
    let merges = json["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
    merges.iter().all(|merge| match merge {
        Value::Array(pair) => within(&pair.iter().filter_map(Value::as_str).collect::<String>()),
        Value::String(pair) => within(&pair.replacen(' ', "", 1)),
        _ => false,
    })
}

/// A byte-level BPE definition. `pieces` by id; [`Tokenizer::bos`] comes from the template.
fn definition(pieces: &[String], merges: Vec<Value>, special: &[u32], bos: Option<&str>, pattern: bool) -> Value {
    let vocabulary: Map<String, Value> = pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), id.into())).collect();
    let added: Vec<Value> = special
        .iter()
        .filter_map(|&id| pieces.get(id as usize).map(|piece| (id, piece)))
        .map(|(id, piece)| json!({"id": id, "content": piece, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let post_processor = bos.map_or(Value::Null, |bos| {
        let first = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let id = pieces.iter().position(|piece| piece == bos).unwrap_or(0);
        json!({
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        })
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": pattern});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": merges,
        },
    })
}

/// Adds [`END_OF_TEXT`] as the last id, beginning and end of every document.
fn finish(mut pieces: Vec<String>, merges: Vec<Value>, pattern: bool) -> Result<Tokenizer> {
    let end = pieces.len() as u32;
    pieces.push(END_OF_TEXT.into());
    let json = definition(&pieces, merges, &[end], Some(END_OF_TEXT), pattern);
    Tokenizer::from_json(json, &json!({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": true}), &Value::Null)
}

pub(super) fn byte() -> Tokenizer {
    let pieces = (0..=255).map(|byte| spell(&[byte])).collect();
    finish(pieces, Vec::new(), false).expect("the byte vocabulary is the same every time")
}

pub(super) fn character(letters: BTreeSet<char>) -> Result<Tokenizer> {
    if letters.is_empty() {
        return Err(Error::input("data.tokenizer", "there are no characters to make a vocabulary of").fix("give a source with text in it"));
    }
    let mut pieces: Vec<String> = letters.iter().map(|letter| spell(letter.encode_utf8(&mut [0; 4]).as_bytes())).collect();
    let mut known: BTreeSet<String> = pieces.iter().cloned().collect();
    let mut merges = Vec::new();
    let mut merged = BTreeSet::new();
    // A character of several bytes is built from the left: (b1 b2), then (b1b2 b3), then (b1b2b3 b4).
    for letter in &letters {
        let mut buffer = [0; 4];
        let bytes = letter.encode_utf8(&mut buffer).as_bytes();
        for part in bytes.iter().map(|&byte| spell(&[byte])).chain((2..bytes.len()).map(|end| spell(&bytes[..end]))) {
            if known.insert(part.clone()) {
                pieces.push(part);
            }
        }
        for end in 2..=bytes.len() {
            let (left, right) = (spell(&bytes[..end - 1]), spell(&bytes[end - 1..end]));
            if merged.insert((left.clone(), right.clone())) {
                merges.push(json!([left, right]));
            }
        }
    }
    finish(pieces, merges, false)
}

pub(super) fn train_bpe(texts: &[String], vocabulary: usize) -> Result<Tokenizer> {
    if !(257..=1 << 24).contains(&vocabulary) {
        return Err(Error::input(
            "data.tokenizer.bpe.vocab",
            format!("{vocabulary} is outside 257 to {}: 256 bytes and {END_OF_TEXT} come first", 1 << 24),
        )
        .fix("choose a vocabulary of 512 or more"));
    }
    let failed = |error: tokenizers::Error| Error::input("data.tokenizer.bpe", format!("cannot train: {error}"));
    let mut alphabet: Vec<char> = (0..=255).map(byte_letter).collect();
    alphabet.sort_unstable();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocabulary - 1)
        .min_frequency(2)
        .initial_alphabet(alphabet.iter().copied().collect())
        .build();
    let mut trained = tokenizers::Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    trained.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    trained.train(&mut TrainerWrapper::BpeTrainer(trainer), texts.iter()).map_err(failed)?;
    let json: Value = serde_json::from_str(&trained.to_string(false).map_err(failed)?).expect("a tokenizer prints JSON");
    let ids = json["model"]["vocab"].as_object().expect("a BPE model has a vocabulary");
    let mut pieces = vec![String::new(); ids.len()];
    for (piece, id) in ids {
        pieces[id.as_u64().expect("ids are counted from 0") as usize].clone_from(piece);
    }
    let merges = json["model"]["merges"].as_array().expect("a BPE model has merges").clone();
    finish(pieces, merges, true)
}

pub(super) fn from_byte_level(
    pieces: &[String],
    merges: &[String],
    special: &[u32],
    bos: Option<u32>,
    eos: Option<u32>,
    pattern: bool,
) -> Result<Tokenizer> {
    let name = |id: Option<u32>| {
        id.map(|id| {
            pieces
                .get(id as usize)
                .cloned()
                .ok_or_else(|| Error::input("tokenizer", format!("token {id} is outside the vocabulary of {}", pieces.len())))
        })
        .transpose()
    };
    let (bos, eos) = (name(bos)?, name(eos)?);
    let pairs = merges.iter().map(|merge| match merge.split_once(' ') {
        Some((left, right)) => Ok(json!([left, right])),
        None => Err(Error::input("tokenizer", format!("{merge:?} is not a merge: two pieces with a blank between them are"))),
    });
    let json = definition(pieces, pairs.collect::<Result<_>>()?, special, bos.as_deref(), pattern);
    Tokenizer::from_json(json, &json!({"bos_token": bos, "eos_token": eos, "add_bos_token": bos.is_some()}), &Value::Null)
}
