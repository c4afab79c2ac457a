//! Linear maps whose weights are only read: y_i = x W_i^T;  dx = sum_i dy_i W_i, and no gradient of W_i.
//! x: [rows, in]   W_i: [out_i, in], f32, or in the bits of a file, or ternary codes   y_i: [rows, out_i]
//! Stored weights are expanded a few rows at a time on the way into the product, so that nothing but the stored bits is held. Every element
//! is still one chain of fused multiply-adds in ascending `in`: the bits are those of the engine that reads the same file.

use super::cpu::gemm::{Matrix, gemm};
use super::cpu::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use super::host::{buffer, from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Weights expanded at a time: 4 MiB of f32.
const EXPANDED: usize = 1 << 20;

/// A matrix in some storage format.
pub trait StoredMatrix: Send + Sync {
    /// Rows, the outputs of the map.
    fn rows(&self) -> usize;

    /// Columns, its inputs.
    fn columns(&self) -> usize;

    /// Bytes held.
    fn bytes(&self) -> usize;

    /// All values, where they are stored as f32 and can be read in place.
    fn floats(&self) -> Option<&[f32]> {
        None
    }

    /// Expands whole rows from `first` on into `values`, `[count, columns]`.
    fn expand(&self, first: usize, values: &mut [f32]);
}

/// A parameter that is not trained.
#[derive(Clone)]
pub enum Frozen {
    /// f32, of any shape.
    Dense(Tensor),
    /// A matrix as a file holds it.
    Stored(Arc<dyn StoredMatrix>),
    /// BitNet b1.58: 8-bit activations times ternary codes under one scale.
    Ternary(Arc<PackedTernary>),
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kind, shape) = match self {
            Self::Dense(tensor) => ("dense", tensor.dims().to_vec()),
            Self::Stored(matrix) => ("stored", vec![matrix.rows(), matrix.columns()]),
            Self::Ternary(matrix) => ("ternary", vec![matrix.rows(), matrix.columns()]),
        };
        write!(formatter, "{kind} {shape:?}")
    }
}

impl Frozen {
    /// Its extents.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(tensor) => tensor.dims().to_vec(),
            Self::Stored(matrix) => vec![matrix.rows(), matrix.columns()],
            Self::Ternary(matrix) => vec![matrix.rows(), matrix.columns()],
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => 4 * tensor.elem_count(),
            Self::Stored(matrix) => matrix.bytes(),
            Self::Ternary(matrix) => matrix.bytes(),
        }
    }

    /// All values as one f32 tensor: scale times code for ternary matrices.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.to_device(device),
            Self::Stored(matrix) => {
                let mut values = buffer(matrix.rows() * matrix.columns());
                expand(&**matrix, 0, &mut values);
                from_vec(values, (matrix.rows(), matrix.columns()))?.to_device(device)
            }
            Self::Ternary(matrix) => {
                let mut values = buffer(matrix.rows() * matrix.columns());
                matrix.dequantize_into(&mut values);
                from_vec(values, (matrix.rows(), matrix.columns()))?.to_device(device)
            }
        }
    }

    /// The rows that `ids` name, `[ids, columns]`. Every id must be a row.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn gather(&self, ids: &[u32], device: &Device) -> Result<Tensor> {
        match self {
            Self::Dense(table) => table.index_select(&Tensor::from_slice(ids, ids.len(), table.device())?, 0),
            Self::Stored(matrix) => {
                let width = matrix.columns();
                let mut rows = buffer(ids.len() * width);
                rows.chunks_exact_mut(width).zip(ids).for_each(|(row, &id)| matrix.expand(id as usize, row));
                from_vec(rows, (ids.len(), width))?.to_device(device)
            }
            Self::Ternary(_) => self.to_tensor(device)?.index_select(&Tensor::from_slice(ids, ids.len(), device)?, 0),
        }
    }
}

/// Expands rows with all threads.
fn expand(matrix: &dyn StoredMatrix, first: usize, values: &mut [f32]) {
    let columns = matrix.columns();
    let rows_each = (EXPANDED / 16 / columns).max(1);
    values.par_chunks_mut(rows_each * columns).enumerate().for_each(|(chunk, rows)| matrix.expand(first + chunk * rows_each, rows));
}

/// `x W_i^T` for frozen weights that share `x`.
pub fn frozen_linears<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Frozen; N]) -> Result<[Var; N]> {
    let fused = tape.fuses(x.tensor());
    let outputs = if fused { products(x.tensor(), weights)? } else { products_reference(x.tensor(), weights)? };
    let (target, weights, device) = (x.target(), weights.map(Clone::clone), x.tensor().device().clone());
    Ok(tape.record(&[x], outputs, move |flow, gradients| {
        let pairs = gradients.iter().zip(&weights).filter_map(|(gradient, weight)| Some((gradient.as_ref()?, weight)));
        let d_x = if fused { input_gradient(pairs)? } else { input_gradient_reference(pairs, &device)? };
        flow.add(target, d_x)
    }))
}

fn products<const N: usize>(x: &Tensor, weights: [&Frozen; N]) -> Result<[Tensor; N]> {
    let (rows, width) = x.dims2()?;
    let x = host(x)?;
    let mut codes = None;
    let mut outputs = Vec::with_capacity(N);
    for weight in weights {
        let out = weight.shape()[0];
        let mut y = buffer(rows * out);
        match weight {
            Frozen::Dense(matrix) => {
                gemm(Matrix::row_major(&x, rows, width), &Matrix::row_major(&host(matrix)?, out, width).transposed(), &mut y, out, false);
            }
            Frozen::Stored(matrix) => {
                for_row_tiles(&**matrix, |first, count, values| {
                    let tile = Matrix::row_major(values, count, width).transposed();
                    gemm(Matrix::row_major(&x, rows, width), &tile, &mut y[first..], out, false);
                });
            }
            Frozen::Ternary(matrix) => {
                let (codes, gammas) = codes.get_or_insert_with(|| quantized(&x, width));
                ternary_matmul(codes, gammas, matrix, &mut y);
            }
        }
        outputs.push(from_vec(y, (rows, out))?);
    }
    Ok(outputs.try_into().expect("one output per weight"))
}

fn quantized(x: &[f32], width: usize) -> (Vec<i8>, Vec<f32>) {
    let (mut codes, mut gammas) = (vec![0i8; x.len()], buffer(x.len() / width));
    quantize_activations(x, width, &mut codes, &mut gammas);
    (codes, gammas)
}

/// Expands the matrix tile by tile: `use_tile(first row, rows, values)`. One that is f32 already is a single tile.
fn for_row_tiles(matrix: &dyn StoredMatrix, mut use_tile: impl FnMut(usize, usize, &[f32])) {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    if let Some(values) = matrix.floats() {
        return use_tile(0, rows, values);
    }
    let height = (EXPANDED / columns).max(1).min(rows);
    let mut values = buffer(height * columns);
    for first in (0..rows).step_by(height) {
        let count = height.min(rows - first);
        expand(matrix, first, &mut values[..count * columns]);
        use_tile(first, count, &values[..count * columns]);
    }
}

/// sum_i dy_i W_i; straight through the rounding of ternary maps.
fn input_gradient<'g>(pairs: impl Iterator<Item = (&'g Tensor, &'g Frozen)>) -> Result<Tensor> {
    let mut sum: Option<(Vec<f32>, (usize, usize))> = None;
    for (gradient, weight) in pairs {
        let (rows, out) = gradient.dims2()?;
        let width = weight.shape()[1];
        let accumulate = sum.is_some();
        let (d_x, _) = sum.get_or_insert_with(|| (buffer(rows * width), (rows, width)));
        let gradient = host(gradient)?;
        let mut add = |first: usize, count: usize, values: &[f32], accumulate: bool| {
            let part = Matrix::with_row_stride(&gradient[first..], rows, count, out);
            gemm(part, &Matrix::row_major(values, count, width), d_x, width, accumulate);
        };
        match weight {
            Frozen::Stored(matrix) => for_row_tiles(&**matrix, |first, count, values| add(first, count, values, accumulate || first > 0)),
            Frozen::Dense(matrix) => add(0, out, &host(matrix)?, accumulate),
            Frozen::Ternary(_) => add(0, out, &host(&weight.to_tensor(&Device::Cpu)?)?, accumulate),
        }
    }
    let (d_x, shape) = sum.expect("a step runs only with a gradient");
    from_vec(d_x, shape)
}

fn products_reference<const N: usize>(x: &Tensor, weights: [&Frozen; N]) -> Result<[Tensor; N]> {
    let product = |weight: &Frozen| {
        let matrix = weight.to_tensor(x.device())?;
        let input = if matches!(weight, Frozen::Ternary(_)) { super::ternary::rounded_activations(x)? } else { x.clone() };
        input.matmul(&matrix.t()?)
    };
    let outputs = weights.into_iter().map(product).collect::<Result<Vec<_>>>()?;
    Ok(outputs.try_into().expect("one output per weight"))
}

fn input_gradient_reference<'g>(pairs: impl Iterator<Item = (&'g Tensor, &'g Frozen)>, device: &Device) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (gradient, weight) in pairs {
        let part = gradient.matmul(&weight.to_tensor(device)?)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => (sum + part)?,
        });
    }
    Ok(sum.expect("a step runs only with a gradient"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gated::{GateFunction, gated};
    use crate::ops::linear::linears;
    use crate::ops::testing::{check, gaussian};
    use candle_core::DType;

    /// Small integers, one byte each.
    struct Bytes(Vec<i8>, usize);

    impl StoredMatrix for Bytes {
        fn rows(&self) -> usize {
            self.0.len() / self.1
        }

        fn columns(&self) -> usize {
            self.1
        }

        fn bytes(&self) -> usize {
            self.0.len()
        }

        fn expand(&self, first: usize, values: &mut [f32]) {
            values.iter_mut().zip(&self.0[first * self.1..]).for_each(|(value, &byte)| *value = f32::from(byte) / 8.0);
        }
    }

    fn stored(rows: usize, columns: usize, seed: usize) -> Frozen {
        Frozen::Stored(Arc::new(Bytes((0..rows * columns).map(|i| ((i * 37 + seed) % 23) as i8 - 11).collect(), columns)))
    }

    fn dense(name: &str, rows: usize) -> Frozen {
        Frozen::Dense(gaussian(name, &[rows, 5]).to_dtype(DType::F32).unwrap())
    }

    /// Frozen weights in the type of the check's values: f64 for the reference.
    fn like(weight: &Frozen, x: &Var) -> Frozen {
        Frozen::Dense(weight.to_tensor(&Device::Cpu).unwrap().to_dtype(x.tensor().dtype()).unwrap())
    }

    #[test]
    fn gradients_of_the_input() {
        for pair in [[stored(6, 5, 1), stored(6, 5, 2)], [dense("a", 6), dense("b", 6)]] {
            check(
                |tape, v| {
                    let pair = [like(&pair[0], &v[0]), like(&pair[1], &v[0])];
                    let [a, b] = frozen_linears(tape, &v[0], [&pair[0], &pair[1]])?;
                    gated(tape, GateFunction::Silu, &a, &b)
                },
                &[gaussian("x", &[7, 5])],
            );
        }
    }

    /// Stored, dense and trained weights of equal value give equal bits, over several tiles.
    #[test]
    fn storage_does_not_change_a_bit() {
        let (rows, columns) = (EXPANDED / 512 + 100, 512);
        let matrix = stored(rows, columns, 3);
        let x = Var::parameter(0, gaussian("x", &[3, columns]).to_dtype(DType::F32).unwrap());
        let value = matrix.to_tensor(&Device::Cpu).unwrap();
        let same = Frozen::Dense(value.clone());
        let run = |frozen: &Frozen| frozen_linears(&Tape::new(), &x, [frozen]).unwrap()[0].tensor().flatten_all().unwrap();
        let [trained] = linears(&Tape::new(), &x, [&Var::constant(value)]).unwrap();
        let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&run(&matrix)), bits(trained.tensor()));
        assert_eq!(bits(&run(&same)), bits(trained.tensor()));
        assert_eq!(matrix.gather(&[1, 0], &Device::Cpu).unwrap().dims(), [2, columns]);
    }

    #[test]
    fn frozen_ternary_codes_are_the_trained_ones() {
        let (rows, columns) = (24, 40);
        let weights = gaussian("w", &[rows, columns]).to_dtype(DType::F32).unwrap();
        let packed = PackedTernary::from_weights(&host(&weights).unwrap(), rows, columns);
        let frozen = Frozen::Ternary(Arc::new(packed));
        let x = Var::parameter(0, gaussian("x", &[7, columns]).to_dtype(DType::F32).unwrap());
        let [ours] = frozen_linears(&Tape::new(), &x, [&frozen]).unwrap();
        let [trained] = crate::ops::ternary::ternary_linears(&Tape::new(), &x, [&Var::constant(weights)]).unwrap();
        let bits = |var: &Var| var.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&ours), bits(&trained));
    }
}
