//! The linear maps of a loaded model: dense weights in the bits of their file, or ternary codes multiplied with 8-bit activations.
//! Both give the bits of the training forward: products in one chain per element, integer dot products exact.

use super::dense::DenseMatrix;
use crate::error::{Error, Result};
use crate::export::parameter::Parameter;
use crate::model::LinearKind;
use crate::ops::cpu::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use crate::quant::ternary_by_id;
use half::f16;

/// One linear map y = x W^T, W `[outputs, inputs]`.
pub enum Linear {
    /// f32 activations times stored weights.
    Dense(DenseMatrix),
    /// 8-bit activations times ternary codes under one scale (BitNet b1.58).
    Ternary(PackedTernary),
}

impl Linear {
    /// Dense weights.
    ///
    /// # Errors
    /// When `name` is no matrix.
    pub fn dense(name: &str, weight: &Parameter) -> Result<Self> {
        let (outputs, inputs) = sides(name, weight)?;
        Ok(Self::Dense(DenseMatrix::new(outputs, inputs, weight.format, weight.bytes())?))
    }

    /// A matrix of a block. Stored ternary codes under one scale are BitNet's and meet 8-bit activations. Ternary blocks whose scales differ
    /// are a compression of a dense matrix and meet f32 activations. Anything else is master weights in a ternary model, which are rounded as
    /// in training, and dense weights otherwise.
    ///
    /// # Errors
    /// When `name` is no matrix.
    pub fn of_block(name: &str, weight: &Parameter, kind: LinearKind) -> Result<Self> {
        let (outputs, inputs) = sides(name, weight)?;
        if ternary_by_id(weight.format.layout().id).is_some() {
            return match stored_codes(weight, inputs)? {
                Some((codes, scale)) => Ok(Self::Ternary(PackedTernary::from_codes(&codes, outputs, inputs, scale))),
                None => Self::dense(name, weight),
            };
        }
        match kind {
            LinearKind::Dense => Self::dense(name, weight),
            LinearKind::Ternary => Ok(Self::Ternary(PackedTernary::from_weights(&weight.to_vec()?, outputs, inputs))),
        }
    }

    /// Width of y.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.outputs(),
            Self::Ternary(matrix) => matrix.rows(),
        }
    }

    /// Width of x.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.inputs(),
            Self::Ternary(matrix) => matrix.columns(),
        }
    }

    /// Bytes read for one row of x.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.bytes(),
            Self::Ternary(matrix) => matrix.bytes(),
        }
    }
}

fn sides(name: &str, weight: &Parameter) -> Result<(usize, usize)> {
    match weight.shape[..] {
        [outputs, inputs] => Ok((outputs, inputs)),
        _ => Err(Error::input(name, format!("has the shape {:?} where a matrix is expected", weight.shape))),
    }
}

/// Codes and scale of a ternary matrix in which every block with a non-zero code has the same scale.
fn stored_codes(weight: &Parameter, inputs: usize) -> Result<Option<(Vec<i8>, f16)>> {
    let layout = weight.format.layout();
    let (Some(format), Some(row_bytes)) = (ternary_by_id(layout.id), layout.row_bytes(inputs)) else { return Ok(None) };
    let mut codes = vec![0i8; weight.count()];
    let mut common: Option<f16> = None;
    for (codes, bytes) in codes.chunks_exact_mut(inputs).zip(weight.bytes().chunks_exact(row_bytes)) {
        let scales = format.decode_codes(bytes, codes)?;
        for (codes, scale) in codes.chunks_exact(layout.block).zip(scales) {
            // The two-bit code 3 stands for twice the scale; no encoder writes it, and only the dense path can hold it.
            if codes.iter().any(|code| *code > 1) {
                return Ok(None);
            }
            if codes.iter().any(|code| *code != 0) && *common.get_or_insert(scale) != scale {
                return Ok(None);
            }
        }
    }
    Ok(Some((codes, common.unwrap_or(f16::ZERO))))
}

/// Working memory of [`products`].
#[derive(Default)]
pub struct Codes {
    codes: Vec<i8>,
    gammas: Vec<f32>,
}

/// y_i = x W_i^T for maps that share `x` (`[rows, inputs]`); activations are quantized once. Each `y` is resized to `[rows, outputs]`.
pub fn products<const N: usize>(x: &[f32], maps: [&Linear; N], outputs: [&mut Vec<f32>; N], scratch: &mut Codes) {
    let inputs = maps[0].inputs();
    let rows = x.len() / inputs;
    if maps.iter().any(|map| matches!(map, Linear::Ternary(_))) {
        scratch.codes.resize(x.len(), 0);
        scratch.gammas.resize(rows, 0.0);
        quantize_activations(x, inputs, &mut scratch.codes, &mut scratch.gammas);
    }
    for (map, y) in maps.into_iter().zip(outputs) {
        y.resize(rows * map.outputs(), 0.0);
        match map {
            Linear::Dense(matrix) => matrix.multiply(x, y),
            Linear::Ternary(matrix) => ternary_matmul(&scratch.codes, &scratch.gammas, matrix, y),
        }
    }
}
