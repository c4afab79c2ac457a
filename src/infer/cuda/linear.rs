//! The linear maps of a loaded model on a device: dense weights in half precision, or ternary codes multiplied with 8-bit activations.
//! Maps that share their input lie one below the other, so that one launch multiplies a token with all of them.

use crate::error::{Error, Result};
use crate::export::parameter::Parameter;
use crate::infer::linear::{sides, ternary};
use crate::model::LinearKind;
use crate::ops::cpu::ternary::PackedTernary;
use crate::ops::cuda::dense::{HalfMatrix, HalfRows};
use crate::ops::cuda::ternary::{CodeRows, TernaryMatrix};
use crate::ops::cuda::{Buffer, Device};
use half::f16;
use rayon::prelude::*;

/// Up to three maps y_i = x W_i^T of the same x.
pub(super) struct Stack<D: Device> {
    runs: Vec<Run<D>>,
    inputs: usize,
}

/// Neighbouring maps of one kind.
struct Run<D: Device> {
    matrix: Matrix<D>,
    /// Rows of each map.
    outputs: Vec<usize>,
}

enum Matrix<D: Device> {
    Dense(HalfMatrix<D>),
    Ternary(TernaryMatrix<D>),
}

/// One map on its way to the device.
enum Part {
    Dense(Vec<f16>, usize),
    Ternary(PackedTernary),
}

impl Part {
    fn outputs(&self) -> usize {
        match self {
            Self::Dense(_, outputs) => *outputs,
            Self::Ternary(packed) => packed.rows(),
        }
    }

    fn is_ternary(&self) -> bool {
        matches!(self, Self::Ternary(_))
    }
}

impl<D: Device> Stack<D> {
    /// Matrices of a block, dense or ternary as on the CPU.
    ///
    /// # Errors
    /// When one is no matrix, they differ in their inputs, half precision cannot hold a weight, or there is no room.
    pub(super) fn of_block(device: &D, named: &[(String, &Parameter)], kind: LinearKind) -> Result<Self> {
        let inputs = named.first().map_or(Ok(0), |(name, weight)| sides(name, weight).map(|(_, inputs)| inputs))?;
        let part = |(name, weight): &(String, &Parameter)| {
            let (outputs, width) = sides(name, weight)?;
            if width != inputs {
                return Err(Error::input(name, format!("has {width} inputs where {inputs} are expected")));
            }
            Ok(match ternary(name, weight, kind)? {
                Some(packed) => Part::Ternary(packed),
                None => Part::Dense(halves(name, weight)?, outputs),
            })
        };
        let parts = named.iter().map(part).collect::<Result<Vec<_>>>()?;
        let same_kind = |a: &Part, b: &Part| a.is_ternary() == b.is_ternary();
        let runs = parts.chunk_by(same_kind).map(|parts| Run::new(device, parts, inputs)).collect::<Result<_>>()?;
        Ok(Self { runs, inputs })
    }

    /// Products of the first `rows` rows of `x` with every map, each `[rows, outputs]` into its own buffer of `y`.
    pub(super) fn multiply(
        &self,
        device: &D,
        x: &Buffer<D, f32>,
        rows: usize,
        rounded: &mut Rounded<D>,
        y: &[&Buffer<D, f32>],
    ) -> Result<()> {
        let mut rest = y;
        // Rounded once, whatever number of runs reads it.
        if self.runs.iter().any(|run| matches!(run.matrix, Matrix::Ternary(_))) {
            rounded.codes.quantize(device, x, rows, self.inputs)?;
        }
        if rows > 1 && self.runs.iter().any(|run| matches!(run.matrix, Matrix::Dense(_))) {
            rounded.halves.round(device, x, rows, self.inputs)?;
        }
        for run in &self.runs {
            let (now, later) = rest.split_at(run.outputs.len());
            run.multiply(device, x, rows, rounded, now)?;
            rest = later;
        }
        Ok(())
    }
}

impl<D: Device> Run<D> {
    fn new(device: &D, parts: &[Part], inputs: usize) -> Result<Self> {
        let outputs: Vec<usize> = parts.iter().map(Part::outputs).collect();
        let packed: Vec<&PackedTernary> =
            parts.iter().filter_map(|part| if let Part::Ternary(packed) = part { Some(packed) } else { None }).collect();
        let matrix = if packed.is_empty() {
            let values: Vec<&[f16]> =
                parts.iter().filter_map(|part| if let Part::Dense(values, _) = part { Some(&values[..]) } else { None }).collect();
            Matrix::Dense(HalfMatrix::new(device, outputs.iter().sum(), inputs, &values.concat())?)
        } else {
            Matrix::Ternary(TernaryMatrix::new(device, &packed)?)
        };
        Ok(Self { matrix, outputs })
    }

    fn multiply(&self, device: &D, x: &Buffer<D, f32>, rows: usize, rounded: &Rounded<D>, y: &[&Buffer<D, f32>]) -> Result<()> {
        if rows == 1 {
            let parts: Vec<_> = self.outputs.iter().copied().zip(y.iter().copied()).collect();
            return match &self.matrix {
                Matrix::Dense(matrix) => matrix.multiply_row(device, x, &parts),
                Matrix::Ternary(matrix) => matrix.multiply_row(device, &rounded.codes, &parts),
            };
        }
        let mut first = 0;
        for (outputs, y) in self.outputs.iter().zip(y) {
            let range = first..first + outputs;
            first = range.end;
            match &self.matrix {
                Matrix::Dense(matrix) => matrix.multiply_rows(device, &rounded.halves, rows, range, y)?,
                Matrix::Ternary(matrix) => matrix.multiply_rows(device, &rounded.codes, rows, range, y)?,
            }
        }
        Ok(())
    }
}

/// Activations as products read them.
pub(super) struct Rounded<D: Device> {
    pub(super) halves: HalfRows<D>,
    codes: CodeRows<D>,
}

impl<D: Device> Rounded<D> {
    /// Room for `rows` rows of up to `width`.
    pub(super) fn new(device: &D, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { halves: HalfRows::new(device, rows, width)?, codes: CodeRows::new(device, rows, width)? })
    }
}

/// A matrix of its own, in half precision.
///
/// # Errors
/// When `name` is no matrix, or half precision cannot hold a weight.
pub(super) fn half_matrix<D: Device>(device: &D, name: &str, weight: &Parameter) -> Result<HalfMatrix<D>> {
    let (outputs, inputs) = sides(name, weight)?;
    HalfMatrix::new(device, outputs, inputs, &halves(name, weight)?)
}

/// The weights rounded to half precision.
fn halves(name: &str, weight: &Parameter) -> Result<Vec<f16>> {
    let rounded: Vec<f16> = if weight.format.layout().name == "f16" {
        weight.bytes().chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]])).collect()
    } else {
        weight.to_vec()?.par_iter().map(|weight| f16::from_f32(*weight)).collect()
    };
    match rounded.iter().position(|weight| !weight.is_finite()) {
        None => Ok(rounded),
        Some(at) => Err(Error::input(name, format!("has at place {at} a weight that half precision, as the GPU stores it, cannot hold"))
            .fix("run this model with --device cpu")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::quant::F32;

    #[test]
    fn weights_beyond_half_precision_are_named() {
        let Some(device) = Emulated::new() else { return };
        let parameter =
            |last: f32| Parameter::owned("w", vec![1, 2], &F32, [1f32, last].iter().flat_map(|x| x.to_le_bytes()).collect()).unwrap();
        assert!(half_matrix(&device, "w", &parameter(65504.0)).is_ok());
        let error = half_matrix(&device, "w", &parameter(70000.0)).err().unwrap().to_string();
        assert!(error.contains("w: has at place 1"), "{error}");
    }
}
