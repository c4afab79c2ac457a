//! Small models for the tests of this stage.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::Weights;
use crate::model::{Activation, LinearKind, Norm, Spec};

/// A dense Llama with every size different.
pub(super) fn spec() -> Spec {
    Spec {
        vocab: 24,
        dim: 16,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        ffn: 40,
        context: 32,
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

/// The default ternary face, with widths that ternary formats hold.
pub(super) fn ternary_spec() -> Spec {
    Spec { dim: 256, head_dim: 64, ffn: 512, norm: Norm::SingleScale, embedding_projection: true, linear: LinearKind::Ternary, ..spec() }
}

/// Reproducible values in (-1, 1).
pub(super) fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights of `spec`, norm gains near 1.
pub(super) fn weights(spec: &Spec) -> Weights {
    let mut all = BTreeMap::new();
    for (seed, (name, shape)) in spec.parameters().into_iter().enumerate() {
        let mut data = values(shape.iter().product(), seed as u64 + 1);
        if shape.len() == 1 {
            data.iter_mut().for_each(|value| *value = 1.0 + 0.1 * *value);
        }
        all.insert(name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap());
    }
    all
}

/// All values of a tensor.
pub(super) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
