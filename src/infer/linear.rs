//! The linear maps of a loaded model: dense weights in the bits of their file, or ternary codes multiplied with 8-bit activations.
//! Both give the bits of the training forward: products in one chain per element, integer dot products exact.

use super::dense::DenseMatrix;
use crate::error::{Error, Result};
use crate::export::adapter::LowRank;
use crate::export::parameter::Parameter;
use crate::model::LinearKind;
use crate::ops::cpu::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use crate::ops::low_rank::low_rank_forward;
use crate::quant::ternary_by_id;
use half::f16;
use rayon::prelude::*;

/// One linear map y = x W^T, W `[outputs, inputs]`.
pub enum Linear {
    /// f32 activations times stored weights.
    Dense(DenseMatrix),
    /// 8-bit activations times ternary codes under one scale (BitNet b1.58).
    Ternary(PackedTernary),
    /// Either of them with a low-rank adapter beside it, in f32.
    Adapted(Box<Linear>, LowRank),
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
        Ok(match ternary(name, weight, kind)? {
            Some(packed) => Self::Ternary(packed),
            None => Self::dense(name, weight)?,
        })
    }

    /// Width of y.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.outputs(),
            Self::Ternary(matrix) => matrix.rows(),
            Self::Adapted(base, _) => base.outputs(),
        }
    }

    /// Width of x.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.inputs(),
            Self::Ternary(matrix) => matrix.columns(),
            Self::Adapted(base, _) => base.inputs(),
        }
    }

    /// Puts an adapter beside it.
    pub(super) fn adapt(&mut self, side: LowRank) {
        let base = std::mem::replace(self, Self::Ternary(PackedTernary::from_codes(&[], 0, 0, f16::ZERO)));
        *self = Self::Adapted(Box::new(base), side);
    }

    /// The stored matrix, and the adapter beside it.
    fn parts(&self) -> (&Linear, Option<&LowRank>) {
        match self {
            Self::Adapted(base, side) => (base, Some(side)),
            plain => (plain, None),
        }
    }
}

/// The codes of a matrix of a block that meets 8-bit activations, as [`Linear::of_block`] decides it; `None` for a dense one.
///
/// # Errors
/// When `name` is no matrix.
pub(super) fn ternary(name: &str, weight: &Parameter, kind: LinearKind) -> Result<Option<PackedTernary>> {
    let (outputs, inputs) = sides(name, weight)?;
    if ternary_by_id(weight.format.layout().id).is_some() {
        return Ok(stored_codes(weight, inputs)?.map(|(codes, scale)| PackedTernary::from_codes(&codes, outputs, inputs, scale)));
    }
    Ok(match kind {
        LinearKind::Dense => None,
        LinearKind::Ternary => Some(PackedTernary::from_weights(&weight.to_vec()?, outputs, inputs)),
    })
}

pub(super) fn sides(name: &str, weight: &Parameter) -> Result<(usize, usize)> {
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
    let rows = codes.par_chunks_mut(inputs).zip(weight.bytes().par_chunks(row_bytes));
    let scales: Vec<Scale> = rows
        .map(|(codes, bytes)| {
            let scales = format.decode_codes(bytes, codes)?;
            Ok(codes.chunks_exact(layout.block).zip(scales).map(|(codes, scale)| Scale::of(codes, scale)).fold(Scale::Any, Scale::join))
        })
        .collect::<Result<_>>()?;
    Ok(match scales.into_iter().fold(Scale::Any, Scale::join) {
        Scale::Any => Some((codes, f16::ZERO)),
        Scale::One(scale) => Some((codes, scale)),
        Scale::Many => None,
    })
}

/// What scale some blocks have in common.
#[derive(Clone, Copy, PartialEq)]
enum Scale {
    /// All codes are zero.
    Any,
    One(f16),
    Many,
}

impl Scale {
    fn of(codes: &[i8], scale: f16) -> Self {
        // The two-bit code 3 stands for twice the scale; no encoder writes it, and only the dense path can hold it.
        if codes.iter().any(|code| *code > 1) {
            Self::Many
        } else if codes.iter().any(|code| *code != 0) {
            Self::One(scale)
        } else {
            Self::Any
        }
    }

    fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Any, scale) | (scale, Self::Any) => scale,
            (one, other) if one == other => one,
            _ => Self::Many,
        }
    }
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
    if maps.iter().any(|map| matches!(map.parts().0, Linear::Ternary(_))) {
        scratch.codes.resize(x.len(), 0);
        scratch.gammas.resize(rows, 0.0);
        quantize_activations(x, inputs, &mut scratch.codes, &mut scratch.gammas);
    }
    for (map, y) in maps.into_iter().zip(outputs) {
        y.resize(rows * map.outputs(), 0.0);
        let (base, side) = map.parts();
        match base {
            Linear::Dense(matrix) => matrix.multiply(x, y),
            Linear::Ternary(matrix) => ternary_matmul(&scratch.codes, &scratch.gammas, matrix, y),
            Linear::Adapted(..) => unreachable!("an adapter stands beside a stored matrix"),
        }
        if let Some(side) = side {
            low_rank_forward(x, &side.a, &side.b, side.rank, side.scale as f32, y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;
    use crate::quant::{Format, TernaryFormat, Tq1_0, Tq2_0};

    /// Two rows of two blocks, the third block all zero and under a scale of its own.
    fn codes() -> Vec<i8> {
        let mut stream = Stream::new(1, "codes");
        (0..1024).map(|i| if i / 256 == 2 { 0 } else { stream.below(3) as i8 - 1 }).collect()
    }

    fn parameter(format: &'static dyn Format, scales: [f32; 4], pack: &dyn TernaryFormat) -> Parameter {
        let mut bytes = vec![];
        codes().chunks(256).zip(scales).for_each(|(codes, scale)| pack.encode_codes(codes, f16::from_f32(scale), &mut bytes).unwrap());
        Parameter::owned("w", vec![2, 512], format, bytes).unwrap()
    }

    fn product(map: &Linear, x: &[f32]) -> Vec<f32> {
        let mut y = vec![];
        products(x, [map], [&mut y], &mut Codes::default());
        y
    }

    fn exact(scales: [f32; 4], x: &[f32]) -> Vec<f64> {
        let weights: Vec<f64> =
            codes().iter().enumerate().map(|(i, code)| f64::from(*code) * f64::from(f16::from_f32(scales[i / 256]).to_f32())).collect();
        weights.chunks(512).map(|row| row.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum()).collect()
    }

    #[test]
    fn one_scale_meets_integers_and_several_meet_floats() {
        let mut stream = Stream::new(2, "x");
        let x: Vec<f32> = (0..512).map(|_| stream.normal() as f32).collect();
        let formats: [(&'static dyn Format, &dyn TernaryFormat); 2] = [(&Tq1_0, &Tq1_0), (&Tq2_0, &Tq2_0)];
        for (format, pack) in formats {
            for (scales, integers) in [([0.5, 0.5, 0.0, 0.5], true), ([0.5, 0.25, 0.0, 0.5], false)] {
                let map = Linear::of_block("w", &parameter(format, scales, pack), LinearKind::Ternary).unwrap();
                assert_eq!(matches!(map, Linear::Ternary(_)), integers);
                // Eight bits of activation cost up to half a step per term; floats are exact but for rounding.
                let tolerance = if integers { 0.5 } else { 1e-4 };
                let close = product(&map, &x).iter().zip(exact(scales, &x)).all(|(y, exact)| (f64::from(*y) - exact).abs() < tolerance);
                assert!(close, "{} {scales:?}", format.layout().name);
            }
        }
    }

    #[test]
    fn vectors_are_no_matrices() {
        let vector = Parameter::owned("w", vec![4], &crate::quant::F32, vec![0; 16]).unwrap();
        assert!(Linear::dense("w", &vector).err().unwrap().to_string().contains("[4]"));
    }
}
