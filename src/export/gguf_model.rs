//! A planned model as a GGUF file: keys, encoding, and the comparison of what was read back with what was meant.

use std::cell::RefCell;
use std::path::Path;

use half::f16;
use xxhash_rust::xxh3::xxh3_64;

use super::gguf::{self, GgufFile, Metadata, TensorEntry};
use super::names::{Architecture, interleave};
use super::plan::{Plan, PlannedTensor};
use super::report::TensorReport;
use super::ternary::codes;
use super::{Source, Weights, tokenizer_gguf};
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::quant::{self, Format, ternary_by_id};

/// The exact spec, for reading back; other programs ignore it.
pub(super) const OWN_SPEC: &str = "osprey.spec";

/// Divisors of the rotary frequencies, f32 `[head_dim / 2]`, which llama.cpp's `llama` graph applies.
pub(super) const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

/// Writes the file and checks it before it gets its name. Returns each tensor's record and the tokenizer's notes.
pub(super) fn write(source: &Source, folded: &Weights, plan: &Plan, out: &Path) -> Result<(Vec<TensorReport>, Vec<String>)> {
    let mut metadata = model_keys(plan, source.name);
    let notes = match source.tokenizer {
        Some(tokenizer) => tokenizer_gguf::write(tokenizer, plan.spec.vocab, &mut metadata)?,
        None => {
            tokenizer_gguf::write_none(&mut metadata);
            vec!["there is no tokenizer inside, so other engines take token ids only".to_owned()]
        }
    };
    let divisors = rope_divisors(&plan.spec);
    let mut entries: Vec<_> = plan.tensors.iter().map(entry).collect();
    entries.extend(divisors.as_ref().map(|values| TensorEntry {
        name: ROPE_FREQUENCIES.to_owned(),
        shape: vec![values.len()],
        format: &quant::F32,
    }));
    let mut reports = Vec::new();
    // Shared by the two closures below: the check runs after the last tensor was filled in.
    let hashes = RefCell::new(Vec::new());
    let fill = |index: usize, bytes: &mut Vec<u8>| {
        match plan.tensors.get(index) {
            Some(tensor) => {
                let intended = encode(tensor, folded, source, bytes)?;
                reports.push(TensorReport::compare(&tensor.parameter, tensor.format, bytes, &intended)?);
            }
            None => quant::F32.encode_row(divisors.as_deref().unwrap_or_default(), bytes)?,
        }
        hashes.borrow_mut().push(xxh3_64(bytes));
        Ok(())
    };
    gguf::write(out, &metadata, &entries, fill, |path| verify(path, &metadata, &entries, &hashes.borrow()))?;
    Ok((reports, notes))
}

fn entry(tensor: &PlannedTensor) -> TensorEntry {
    TensorEntry { name: tensor.name.clone(), shape: tensor.shape.clone(), format: tensor.format }
}

fn rope_divisors(spec: &Spec) -> Option<Vec<f32>> {
    let scaling = spec.rope_scaling.as_ref()?;
    let plain = Spec { rope_scaling: None, ..spec.clone() }.rotary_frequencies();
    Some(scaling.divisors(&plain).into_iter().map(|divisor| divisor as f32).collect())
}

/// Appends the tensor's bytes; returns the values they stand for, in the file's row order: weights, or scale times code.
fn encode(tensor: &PlannedTensor, folded: &Weights, source: &Source, bytes: &mut Vec<u8>) -> Result<Vec<f32>> {
    let weights = folded.get(&tensor.parameter).ok_or_else(|| Error::input(&tensor.parameter, "is missing from the weights"))?;
    let mut weights: Vec<f32> = weights.flatten_all()?.to_vec1()?;
    let width = tensor.shape[tensor.shape.len() - 1];
    if tensor.ternary {
        let (mut codes, scale) = codes(&tensor.parameter, &weights, source.ternary)?;
        if let Some(heads) = tensor.interleaved_heads {
            codes = interleave(&codes, width, heads);
        }
        weights = dequantized(&codes, scale);
        if let Some(format) = ternary_by_id(tensor.format.layout().id) {
            format.encode_codes(&codes, scale, bytes)?;
            return Ok(weights);
        }
    } else if let Some(heads) = tensor.interleaved_heads {
        weights = interleave(&weights, width, heads);
    }
    tensor.format.encode_row(&weights, bytes)?;
    Ok(weights)
}

/// scale * code.
pub(super) fn dequantized(codes: &[i8], scale: f16) -> Vec<f32> {
    codes.iter().map(|&code| f32::from(code) * scale.to_f32()).collect()
}

/// Reads the finished file as any user would and compares everything in it with what was planned.
fn verify(path: &Path, metadata: &Metadata, entries: &[TensorEntry], hashes: &[u64]) -> Result<()> {
    let file = GgufFile::open(path)?;
    let fault = |what: &str| Err(Error::file(path, format!("reads back differently: {what}")).fix("check the disk and export again"));
    if file.metadata != *metadata {
        return fault("the keys");
    }
    if file.tensors.len() != entries.len() || hashes.len() != entries.len() {
        return fault("the number of tensors");
    }
    for ((info, entry), hash) in file.tensors.iter().zip(entries).zip(hashes) {
        let same_table = info.name == entry.name && info.shape == entry.shape && info.format_id == entry.format.layout().id;
        if !same_table || xxh3_64(file.data(info)?) != *hash {
            return fault(&entry.name);
        }
    }
    Ok(())
}

fn model_keys(plan: &Plan, name: &str) -> Metadata {
    let mut metadata = Metadata::default();
    let spec = &plan.spec;
    metadata.set("general.architecture", plan.architecture.as_str());
    metadata.set("general.name", name);
    if let Some(file_type) = plan.target.file_type() {
        metadata.set("general.file_type", file_type);
    }
    if plan.tensors.iter().any(|tensor| tensor.format.layout().block > 1) {
        metadata.set("general.quantization_version", 2u32);
    }
    let mut set = |key: &str, value: gguf::Value| metadata.set(format!("{}.{key}", plan.architecture), value);
    for (key, size) in sizes(spec) {
        set(key, (size as u32).into());
    }
    set("attention.layer_norm_rms_epsilon", (spec.norm_eps as f32).into());
    set("rope.freq_base", (spec.rope_theta as f32).into());
    if plan.architecture == Architecture::Bitnet.name() {
        set("rope.scaling.type", "linear".into());
        set("rope.scaling.factor", 1.0f32.into());
    }
    metadata.set(OWN_SPEC, serde_json::to_string(spec).expect("a spec is plain data"));
    metadata
}

/// The integer keys, in the order llama.cpp's converters write them. `check_spec` has bounded every size far below 2^32.
fn sizes(spec: &Spec) -> [(&'static str, usize); 10] {
    [
        ("vocab_size", spec.vocab),
        ("context_length", spec.context),
        ("embedding_length", spec.dim),
        ("block_count", spec.layers),
        ("feed_forward_length", spec.ffn),
        ("attention.head_count", spec.heads),
        ("attention.head_count_kv", spec.kv_heads),
        ("attention.key_length", spec.head_dim),
        ("attention.value_length", spec.head_dim),
        ("rope.dimension_count", spec.head_dim),
    ]
}
