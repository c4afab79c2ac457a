//! Small random models for the tests of this stage and the next.

use super::Engine;
use crate::data::tokenizer::Tokenizer;
use crate::export::config::{SpecialIds, config_json};
use crate::export::import::load_any;
use crate::export::{Source, Target, TernaryWeights, Weights, export, safetensors_dir};
use crate::model::{Activation, Decoder, Inputs, LinearKind, Norm, Parameters, Spec};
use crate::ops::cross_entropy::logits;
use crate::ops::rng::Stream;
use crate::tape::Tape;
use candle_core::{Device, Tensor};
use std::path::PathBuf;

/// A dense Llama.
pub(crate) fn dense() -> Spec {
    Spec {
        vocab: 300,
        dim: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 96,
        context: 200,
        norm: Norm::Rms,
        norm_eps: 1e-5,
        embedding_projection: false,
        linear: LinearKind::Dense,
        sub_norm: false,
        activation: Activation::SwiGlu,
        qk_norm: false,
        tied: false,
        rope_theta: 10_000.0,
        rope_scaling: None,
    }
}

/// The ternary face for stock engines.
pub(crate) fn ternary() -> Spec {
    Spec { dim: 256, head_dim: 64, ffn: 256, linear: LinearKind::Ternary, ..dense() }
}

/// Normal weights with deviation 0.3 and gains near 1.
pub(crate) fn weights(spec: &Spec, seed: u64) -> Weights {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let mut stream = Stream::new(seed, &name);
        let (mean, deviation) = if shape.len() == 1 { (1.0, 0.1) } else { (0.0, 0.3) };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| (mean + deviation * stream.normal()) as f32).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    spec.parameters().into_iter().map(tensor).collect()
}

/// A model on disk.
pub(crate) struct Artifact {
    /// Keeps the file.
    _folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl Artifact {
    /// An export.
    pub(crate) fn exported(spec: &Spec, weights: &Weights, target: Target) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let tokenizer = Tokenizer::byte();
        let source = Source { spec, weights, tokenizer: Some(&tokenizer), ternary: TernaryWeights::Master, name: "test" };
        export(&source, target, &path).unwrap();
        Self { _folder: folder, path }
    }

    /// A checkpoint with its master weights.
    pub(crate) fn checkpoint(spec: &Spec, weights: &Weights) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        safetensors_dir::write(&path, &config_json(spec, SpecialIds::default()), weights, None).unwrap();
        Tokenizer::byte().save(&path).unwrap();
        Self { _folder: folder, path }
    }

    pub(crate) fn engine(&self) -> Engine {
        Engine::load(&self.path).unwrap()
    }

    /// What training would compute with the values of the file: those of ternary matrices are `masters`, whose codes the file holds.
    pub(crate) fn imported(&self, masters: &Weights) -> (Spec, Weights) {
        let loaded = load_any(&self.path).unwrap();
        let mut weights = loaded.weights().unwrap();
        if loaded.spec.linear == LinearKind::Ternary {
            let matrices = masters.iter().filter(|(name, _)| name.ends_with("_proj.weight"));
            weights.extend(matrices.map(|(name, tensor)| (name.clone(), tensor.clone())));
        }
        (loaded.spec, weights)
    }
}

/// Logits of the training forward over `ids` as one document.
pub(crate) fn training_logits(spec: &Spec, weights: &Weights, ids: &[u32]) -> Vec<f32> {
    let parameters = Parameters::from_tensors(spec, weights, &Device::Cpu).unwrap();
    let decoder = Decoder::new(spec.clone(), false);
    let hidden = decoder.hidden(&Tape::evaluate(), &parameters, &Inputs::rows(1, ids.len(), ids.to_vec()), None).unwrap();
    logits(hidden.tensor(), decoder.head(&parameters).unwrap().tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Reproducible token ids.
pub(crate) fn ids(count: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut stream = Stream::new(seed, "ids");
    (0..count).map(|_| stream.below(vocab as u64) as u32).collect()
}
