//! A planned model as a Hugging Face directory, plain or with ternary matrices packed for transformers' `bitnet` quantizer.
//!
//! Packing: rows in four bands of R = out / 4; byte\[r, c\] = sum over i of (code\[i R + r, c\] + 1) << 2i. Beside each packed `weight` stands
//! `weight_scale`, one f32 which *multiplies* the product: the convention of `AutoBitLinear`, named in the configuration, because
//! `BitLinear`, the other class, divides by it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::config::{SpecialIds, config_json};
use super::gguf_model::dequantized;
use super::names::is_block_matrix;
use super::plan::Plan;
use super::report::TensorReport;
use super::ternary::codes;
use super::{Source, Target, Weights, aside, safetensors_dir};
use crate::error::{Error, Result};
use crate::model::LinearKind;
use crate::quant;

/// Codes per byte.
const BANDS: usize = 4;

/// Writes the directory and checks it before it gets its name.
pub(super) fn write(source: &Source, folded: &Weights, plan: &Plan, out: &Path) -> Result<(Vec<TensorReport>, Vec<String>)> {
    let mut tensors = BTreeMap::new();
    let mut reports = Vec::new();
    for (name, shape) in plan.spec.parameters() {
        let weights = folded.get(&name).ok_or_else(|| Error::input(&name, "is missing from the weights"))?;
        let ternary = source.spec.linear == LinearKind::Ternary && is_block_matrix(&name);
        if !ternary {
            reports.push(full_report(&name, weights)?);
            tensors.insert(name, weights.clone());
            continue;
        }
        let (codes, scale) = codes(&name, &weights.flatten_all()?.to_vec1::<f32>()?, source.ternary)?;
        if plan.target == Target::HfBitnet {
            reports.push(packed_report(&name, codes.len()));
            tensors.insert(format!("{name}_scale"), Tensor::from_vec(vec![scale.to_f32()], 1, &Device::Cpu)?);
            tensors.insert(name, Tensor::from_vec(pack(&codes, shape[0], shape[1]), (shape[0] / BANDS, shape[1]), &Device::Cpu)?);
        } else {
            let weights = Tensor::from_vec(dequantized(&codes, scale), shape, &Device::Cpu)?;
            reports.push(full_report(&name, &weights)?);
            tensors.insert(name, weights);
        }
    }
    let config = config(source, plan);
    let is_ours = |at: &Path| at.join("config.json").is_file() && at.join("model.safetensors").is_file();
    aside::write_directory(out, is_ours, |folder| {
        safetensors_dir::write(folder, &config, &tensors, source.tokenizer)?;
        verify(folder, &tensors, plan)
    })?;
    let notes = if source.tokenizer.is_none() { vec!["there is no tokenizer in the directory".to_owned()] } else { Vec::new() };
    Ok((reports, notes))
}

fn config(source: &Source, plan: &Plan) -> serde_json::Value {
    let ids = SpecialIds { bos: source.tokenizer.and_then(|it| it.bos()), eos: source.tokenizer.and_then(|it| it.eos()) };
    if plan.target != Target::HfBitnet {
        return config_json(&plan.spec, ids);
    }
    // The class is that of the same model with dense matrices; the quantizer replaces them while loading.
    let dense = crate::model::Spec { linear: LinearKind::Dense, ..plan.spec.clone() };
    let mut config = config_json(&dense, ids);
    config["osprey"] = json!({ "spec": plan.spec });
    config["quantization_config"] = json!({
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": false,
    });
    config
}

/// Four bands of rows share a byte; `rows` is a multiple of four, as the plan made sure.
fn pack(codes: &[i8], rows: usize, columns: usize) -> Vec<u8> {
    let band = rows / BANDS * columns;
    let bits = |at: usize| (0..BANDS).fold(0, |byte, i| byte | (codes[i * band + at] + 1).cast_unsigned() << (2 * i));
    (0..band).map(bits).collect()
}

fn full_report(name: &str, weights: &Tensor) -> Result<TensorReport> {
    let values: Vec<f32> = weights.flatten_all()?.to_vec1()?;
    let mut bytes = Vec::new();
    quant::Format::encode_row(&quant::F32, &values, &mut bytes)?;
    TensorReport::compare(name, &quant::F32, &bytes, &values)
}

/// Codes and scale are stored without loss.
fn packed_report(name: &str, weights: usize) -> TensorReport {
    let bytes = (weights / BANDS + 4) as u64;
    TensorReport { parameter: name.to_owned(), format: "packed ternary", weights: weights as u64, bytes, relative_error: 0.0 }
}

/// Reads the directory as any user would and compares it, bit for bit, with what was meant.
fn verify(folder: &Path, tensors: &BTreeMap<String, Tensor>, plan: &Plan) -> Result<()> {
    let differs = |name: &str| Err(Error::file(folder, format!("{name} reads back differently")).fix("check the disk and export again"));
    let stored = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    for (name, tensor) in tensors {
        match stored.get(name) {
            Some(found) if found.dims() == tensor.dims() && same_bits(found, tensor)? => {}
            _ => return differs(name),
        }
    }
    if plan.target == Target::Hf && safetensors_dir::read(folder)?.spec != plan.spec {
        return differs("config.json");
    }
    Ok(())
}

fn same_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dtype() != b.dtype() {
        return Ok(false);
    }
    if a.dtype() == candle_core::DType::U8 {
        return Ok(a.flatten_all()?.to_vec1::<u8>()? == b.flatten_all()?.to_vec1::<u8>()?);
    }
    let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
    Ok(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector of transformers' own documentation of `unpack_weights`.
    #[test]
    fn packing_is_that_of_transformers() {
        let codes = [0, -1, -1, 1, -1, 1, -1, 1, 1, 0, 0, -1, 1, -1, 1, -1];
        assert_eq!(pack(&codes, 8, 2), [0b1010_0001, 0b0001_1000, 0b1001_0000, 0b0000_1010]);
    }
}
