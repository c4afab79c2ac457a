//! Removes what other engines do not have, without changing the function: SSNorm's scalar becomes a constant RMSNorm gain, EmbProj goes
//! into the tables around it (Outlier-Safe Pre-Training, arXiv 2506.19697).
//! x = P1 e, so E' = E P1^T;  logits = H (P2 h), so H' = H P2. Sums in f64, rounded to f32 once.
//! E, H: [vocab, d]   P1, P2: [d, d] as linear layers, [out, in]

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::Weights;
use crate::error::{Error, Result};
use crate::model::{Norm, Spec};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const EMBED_PROJECTION: &str = "model.embed_projection.weight";
const HEAD_PROJECTION: &str = "model.head_projection.weight";

/// `spec` as it is after [`fold`].
pub fn folded_spec(spec: &Spec) -> Spec {
    Spec { norm: Norm::Rms, embedding_projection: false, ..spec.clone() }
}

/// The same function with vector gains and without EmbProj.
///
/// # Errors
/// When a weight is missing, or EmbProj stands beside a tied head (one table cannot take both maps).
pub fn fold(spec: &Spec, weights: &Weights) -> Result<(Spec, Weights)> {
    let mut folded = weights.clone();
    if spec.embedding_projection {
        if spec.tied {
            return Err(Error::input("EmbProj", "cannot be folded into a tied head").fix("train with model.tied = false"));
        }
        fold_projections(&mut folded)?;
    }
    if spec.norm == Norm::SingleScale {
        let result = folded_spec(spec);
        for (name, shape) in result.parameters() {
            let gain = take(&folded, &name)?;
            if gain.dims() == [1] && shape.len() == 1 {
                folded.insert(name, gain.broadcast_as(shape)?.contiguous()?);
            }
        }
    }
    Ok((folded_spec(spec), folded))
}

fn fold_projections(weights: &mut Weights) -> Result<()> {
    let remove = |weights: &mut Weights, name: &str| weights.remove(name).ok_or_else(|| missing(name));
    let into_embedding = remove(weights, EMBED_PROJECTION)?;
    let into_head = remove(weights, HEAD_PROJECTION)?.t()?.contiguous()?;
    let embedding = times_transposed(take(weights, EMBED)?, &into_embedding)?;
    let head = times_transposed(take(weights, HEAD)?, &into_head)?;
    weights.insert(EMBED.to_owned(), embedding);
    weights.insert(HEAD.to_owned(), head);
    Ok(())
}

fn take<'a>(weights: &'a Weights, name: &str) -> Result<&'a Tensor> {
    weights.get(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Error {
    Error::input(name, "is missing from the weights")
}

/// table \[rows, d\] times map^T, map \[d', d\].
fn times_transposed(table: &Tensor, map: &Tensor) -> Result<Tensor> {
    let (rows, width) = table.dims2()?;
    let (out_width, _) = map.dims2()?;
    let map: Vec<f64> = map.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    let table: Vec<f32> = table.flatten_all()?.to_vec1()?;
    let mut out = vec![0f32; rows * out_width];
    out.par_chunks_mut(out_width).zip(table.par_chunks(width)).for_each(|(out, row)| {
        let row: Vec<f64> = row.iter().copied().map(f64::from).collect();
        for (out, weights) in out.iter_mut().zip(map.chunks_exact(width)) {
            *out = dot(&row, weights) as f32;
        }
    });
    Ok(Tensor::from_vec(out, (rows, out_width), &Device::Cpu)?)
}

/// Eight independent sums, so that the compiler may use vector registers; the order depends on the length only.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::{flat, spec, values, weights};

    /// matrix \[out, in\] times vector, in f64.
    fn apply(matrix: &Tensor, vector: &[f64]) -> Vec<f64> {
        let rows = matrix.to_vec2::<f32>().unwrap();
        rows.iter().map(|row| row.iter().zip(vector).map(|(w, x)| f64::from(*w) * x).sum()).collect()
    }

    fn close(a: &[f64], b: &[f64]) {
        let scale = a.iter().fold(0f64, |most, x| most.max(x.abs()));
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-6 * scale), "{a:?}\n{b:?}");
    }

    #[test]
    fn folding_changes_neither_what_enters_the_blocks_nor_the_logits() {
        let face = Spec { norm: Norm::SingleScale, embedding_projection: true, ..spec() };
        let before = weights(&face);
        let (after_spec, after) = fold(&face, &before).unwrap();
        assert_eq!(after_spec, spec());
        let names: Vec<_> = after.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
        assert_eq!(names, after_spec.parameters());

        for (token, embedding) in before[EMBED].to_vec2::<f32>().unwrap().iter().enumerate() {
            let embedding: Vec<f64> = embedding.iter().map(|&x| f64::from(x)).collect();
            let folded: Vec<f64> = after[EMBED].to_vec2::<f32>().unwrap()[token].iter().map(|&x| f64::from(x)).collect();
            close(&apply(&before[EMBED_PROJECTION], &embedding), &folded);
        }
        let hidden: Vec<f64> = values(face.dim, 99).into_iter().map(f64::from).collect();
        close(&apply(&before[HEAD], &apply(&before[HEAD_PROJECTION], &hidden)), &apply(&after[HEAD], &hidden));
        let scalar = flat(&before["model.norm.weight"])[0];
        assert_eq!(flat(&after["model.norm.weight"]), vec![scalar; face.dim]);
    }

    #[test]
    fn a_plain_model_passes_unchanged() {
        let before = weights(&spec());
        let (after_spec, after) = fold(&spec(), &before).unwrap();
        assert_eq!(after_spec, spec());
        assert!(before.iter().zip(&after).all(|(a, b)| a.0 == b.0 && flat(a.1) == flat(b.1)));
    }

    #[test]
    fn tied_heads_and_missing_tables_are_refused() {
        let tied = Spec { tied: true, embedding_projection: true, ..spec() };
        assert!(fold(&tied, &weights(&tied)).unwrap_err().hint().unwrap().contains("tied = false"));
        let face = Spec { embedding_projection: true, ..spec() };
        let mut some = weights(&face);
        some.remove(HEAD);
        assert!(fold(&face, &some).unwrap_err().to_string().contains(HEAD));
    }
}
