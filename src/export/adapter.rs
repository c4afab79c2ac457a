//! A low-rank adapter beside a model: its matrices, and what becomes of them when they are merged into the base.
//! W' = W + s B A;  a ternary base is rounded again: codes of W' under the scale the base had, or under the absmean rule where the base
//! has master weights, so that an adapter of zeros changes nothing.
//! A: [rank, in]   B: [out, rank]   W: [out, in]   f32

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::import::Loaded;
use super::names::is_block_matrix;
use super::parameter::Parameter;
use super::ternary::TernaryWeights;
use crate::error::{Error, Result};
use crate::model::{LinearKind, Spec};
use crate::ops::cpu::gemm::{Matrix, gemm};
use crate::ops::cpu::ternary::ternary_code;
use crate::quant::F32;

/// The two matrices beside one module's.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    pub rank: usize,
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
    /// What B A is multiplied by.
    pub scale: f64,
}

impl LowRank {
    /// s B A, `[out, in]`.
    pub fn delta(&self) -> Vec<f32> {
        let (out, width) = (self.b.len() / self.rank, self.a.len() / self.rank);
        let scaled: Vec<f32> = self.b.iter().map(|value| (f64::from(*value) * self.scale) as f32).collect();
        let mut delta = vec![0.0; out * width];
        let (b, a) = (Matrix::row_major(&scaled, out, self.rank), Matrix::row_major(&self.a, self.rank, width));
        gemm(b, &a, &mut delta, width, false);
        delta
    }
}

/// An adapter, by module (`model.layers.0.self_attn.q_proj`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LowRankAdapter {
    pub modules: BTreeMap<String, LowRank>,
}

impl LowRankAdapter {
    /// Refuses an adapter that does not fit a model of shape `spec`; `place` is the adapter's.
    ///
    /// # Errors
    /// Names the first module that the base lacks, cannot adapt, or has in another shape.
    pub fn check(&self, spec: &Spec, place: &std::path::Path) -> Result<()> {
        let shapes: BTreeMap<String, Vec<usize>> = spec.parameters().into_iter().collect();
        for (module, part) in &self.modules {
            let name = format!("{module}.weight");
            let refuse = |cause: String| Err(Error::file(place, cause).fix("give the adapter of this base, or the base of this adapter"));
            match shapes.get(&name).map(Vec::as_slice) {
                None => return refuse(format!("adapts {module}, which its base does not have")),
                Some(_) if !is_block_matrix(&name) => {
                    return Err(Error::file(place, format!("adapts {module}; only the matrices of the blocks can be adapted"))
                        .fix("train it with other target_modules, or merge it with its own tool and give the merged model"));
                }
                Some(&[out, width]) if part.a.len() == part.rank * width && part.b.len() == out * part.rank => {}
                Some(shape) => {
                    let (inputs, outputs) = (part.a.len() / part.rank, part.b.len() / part.rank);
                    return refuse(format!("{module} is for a base matrix of {outputs} x {inputs}, this base's is {shape:?}"));
                }
            }
        }
        Ok(())
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> usize {
        self.modules.values().map(|part| 4 * (part.a.len() + part.b.len())).sum()
    }
}

/// What a ternary base becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Dense matrices, which hold the sum exactly.
    Dense,
    /// Ternary again: most of what the adapter learned is smaller than half a level and is lost.
    Ternary,
}

impl Loaded {
    /// The model with its adapter merged into the matrices; as it is when it has none. Stored formats become f32.
    ///
    /// # Errors
    /// When a matrix cannot be decoded.
    pub fn merged(mut self, into: Merge) -> Result<Self> {
        let Some(adapter) = self.adapter.take() else { return Ok(self) };
        if self.spec.linear == LinearKind::Ternary && into == Merge::Dense {
            self.make_dense()?;
        }
        for (module, part) in &adapter.modules {
            let name = format!("{module}.weight");
            let parameter = self.parameters.get(&name).ok_or_else(|| Error::input(&name, "is missing from the base"))?;
            let merged = match (self.spec.linear, self.ternary) {
                (LinearKind::Ternary, TernaryWeights::Deployed) => reternarized(&name, parameter, part)?,
                _ => sum(parameter.to_vec()?, part),
            };
            let merged = as_f32(&name, parameter.shape.clone(), &merged)?;
            self.parameters.insert(name, merged);
        }
        Ok(self)
    }

    /// Replaces ternary matrices by what they stand for: scale times code.
    fn make_dense(&mut self) -> Result<()> {
        let names: Vec<String> = self.parameters.keys().filter(|name| is_block_matrix(name)).cloned().collect();
        for name in names {
            let parameter = &self.parameters[&name];
            let (codes, scale) = super::ternary::codes(&name, &parameter.to_vec()?, self.ternary)?;
            let dense = as_f32(&name, parameter.shape.clone(), &super::gguf_model::dequantized(&codes, scale))?;
            self.parameters.insert(name, dense);
        }
        self.spec.linear = LinearKind::Dense;
        self.ternary = TernaryWeights::Master;
        Ok(())
    }
}

fn sum(mut weights: Vec<f32>, part: &LowRank) -> Vec<f32> {
    weights.par_iter_mut().zip(part.delta()).for_each(|(weight, delta)| *weight += delta);
    weights
}

/// Codes of the sum under the base's own scale, times that scale.
fn reternarized(name: &str, parameter: &Parameter, part: &LowRank) -> Result<Vec<f32>> {
    let (codes, scale) = super::ternary::codes(name, &parameter.to_vec()?, TernaryWeights::Deployed)?;
    let alpha = scale.to_f32();
    if alpha == 0.0 {
        return Ok(vec![0.0; codes.len()]);
    }
    let sums = sum(super::gguf_model::dequantized(&codes, scale), part);
    Ok(sums.into_par_iter().map(|weight| f32::from(ternary_code(weight, alpha)) * alpha).collect())
}

fn as_f32(name: &str, shape: Vec<usize>, weights: &[f32]) -> Result<Parameter> {
    let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    Parameter::owned(name, shape, &F32, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::{flat, spec, ternary_spec, weights};

    fn loaded(spec: Spec, ternary: TernaryWeights) -> Loaded {
        let weights = weights(&spec);
        let parameters = weights.iter().map(|(name, tensor)| {
            let mut values = flat(tensor);
            if ternary == TernaryWeights::Deployed && is_block_matrix(name) {
                let (codes, scale) = crate::export::ternary::codes(name, &values, TernaryWeights::Master).unwrap();
                values = crate::export::gguf_model::dequantized(&codes, scale);
            }
            (name.clone(), as_f32(name, tensor.dims().to_vec(), &values).unwrap())
        });
        let parameters = parameters.collect();
        Loaded { parameters, spec, tokenizer: None, ternary, adapter: None, ids: Default::default() }
    }

    fn with_adapter(mut loaded: Loaded, size: f32) -> Loaded {
        let module = "model.layers.0.mlp.up_proj".to_owned();
        let [out, width] = loaded.parameters[&format!("{module}.weight")].shape[..] else { panic!("a matrix") };
        let part = LowRank {
            rank: 2,
            a: (0..2 * width).map(|i| size * (i as f32 * 0.7).sin()).collect(),
            b: (0..2 * out).map(|i| (i as f32 * 1.3).cos()).collect(),
            scale: 0.5,
        };
        loaded.adapter = Some(LowRankAdapter { modules: [(module, part)].into() });
        loaded
    }

    #[test]
    fn a_dense_base_takes_the_exact_sum() {
        let base = loaded(spec(), TernaryWeights::Master);
        let with = with_adapter(loaded(spec(), TernaryWeights::Master), 0.1);
        let part = with.adapter.as_ref().unwrap().modules["model.layers.0.mlp.up_proj"].clone();
        let merged = with.merged(Merge::Dense).unwrap();
        assert!(merged.adapter.is_none());
        let (before, after) = (&base.parameters, &merged.parameters);
        let name = "model.layers.0.mlp.up_proj.weight";
        let width = before[name].shape[1];
        let (old, new) = (before[name].to_vec().unwrap(), after[name].to_vec().unwrap());
        for (i, (old, new)) in old.iter().zip(&new).enumerate() {
            let (row, column) = (i / width, i % width);
            let product: f32 = (0..2).map(|k| part.b[row * 2 + k] * part.a[k * width + column]).sum();
            assert!((new - old - 0.5 * product).abs() < 1e-6);
        }
        assert!(before.iter().all(|(other, parameter)| other == name || parameter.bytes() == after[other].bytes()));
    }

    #[test]
    fn an_adapter_of_zeros_changes_no_ternary_code() {
        for kind in [TernaryWeights::Master, TernaryWeights::Deployed] {
            let (base, merged) =
                (loaded(ternary_spec(), kind), with_adapter(loaded(ternary_spec(), kind), 0.0).merged(Merge::Ternary).unwrap());
            for (name, parameter) in &base.parameters {
                assert_eq!(parameter.to_vec().unwrap(), merged.parameters[name].to_vec().unwrap(), "{name}");
            }
        }
    }

    #[test]
    fn a_ternary_base_stays_ternary_or_becomes_dense() {
        for kind in [TernaryWeights::Master, TernaryWeights::Deployed] {
            let ternary = with_adapter(loaded(ternary_spec(), kind), 0.2).merged(Merge::Ternary).unwrap();
            let name = "model.layers.0.mlp.up_proj.weight";
            assert!(crate::export::ternary::codes(name, &ternary.parameters[name].to_vec().unwrap(), ternary.ternary).is_ok());
            let dense = with_adapter(loaded(ternary_spec(), kind), 0.2).merged(Merge::Dense).unwrap();
            assert_eq!(dense.spec.linear, LinearKind::Dense);
        }
    }

    #[test]
    fn an_adapter_of_another_base_is_refused() {
        let place = std::path::Path::new("adapter");
        let with = with_adapter(loaded(spec(), TernaryWeights::Master), 0.1);
        let mut adapter = with.adapter.unwrap();
        adapter.check(&with.spec, place).unwrap();
        let wider = Spec { ffn: 2 * with.spec.ffn, ..with.spec.clone() };
        assert!(adapter.check(&wider, place).unwrap_err().to_string().contains("adapter: model.layers.0.mlp.up_proj is for a base matrix"));
        let part = adapter.modules.pop_first().unwrap().1;
        adapter.modules.insert("model.layers.99.mlp.up_proj".into(), part.clone());
        assert!(adapter.check(&with.spec, place).unwrap_err().to_string().contains("does not have"));
        adapter.modules = [("lm_head".to_owned(), part)].into();
        assert!(adapter.check(&with.spec, place).unwrap_err().to_string().contains("only the matrices of the blocks"));
    }
}
