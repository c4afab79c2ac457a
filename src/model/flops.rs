//! Counts that follow from a model's shape: parameters, floating-point operations, bytes.

use super::Spec;

/// Number of parameters.
pub fn parameters(spec: &Spec) -> usize {
    spec.parameters().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// Parameters that take part in matrix products: all matrices but the embedding table, which is only looked up.
pub fn multiplied_parameters(spec: &Spec) -> usize {
    let all = spec.parameters();
    let matrices = all.iter().filter(|(name, shape)| shape.len() == 2 && (spec.tied || name != "model.embed_tokens.weight"));
    matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// Floating-point operations of forward and backward over `tokens` tokens in rows of the full context: 6 per multiplied parameter and
/// token, and 12 * layers * width * context / 2 per token for causal attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
pub fn training(spec: &Spec, tokens: usize) -> f64 {
    passes(spec, tokens, 6.0)
}

/// The same where the model's weights are frozen and a small adapter is trained: no product forms their gradients, which leaves 4.
pub fn adapter_training(spec: &Spec, tokens: usize) -> f64 {
    passes(spec, tokens, 4.0)
}

fn passes(spec: &Spec, tokens: usize, per_parameter: f64) -> f64 {
    let attention = 6.0 * (spec.layers * spec.heads * spec.head_dim * spec.context) as f64;
    tokens as f64 * (per_parameter * multiplied_parameters(spec) as f64 + attention)
}

/// Bytes that training holds: weights, gradients and optimizer state, and the activations one micro-batch of `rows` rows saves.
pub fn training_bytes(spec: &Spec, rows: usize, state_bytes: usize, checkpointing: bool) -> usize {
    (8 * parameters(spec) + state_bytes).saturating_add(activation_bytes(spec, rows, checkpointing))
}

/// Bytes of the activations that one micro-batch of `rows` rows of the full context saves.
pub fn activation_bytes(spec: &Spec, rows: usize, checkpointing: bool) -> usize {
    let (d, q, kv, f) = (spec.dim, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.ffn);
    // Per token and layer: two normalized inputs, two stream states, q, k, v, attention output and branch outputs, gate, up and product.
    let block = 4 * d + 2 * q + 2 * kv + 3 * f;
    let kept = if checkpointing { spec.layers * 2 * d + block } else { spec.layers * block };
    let logits = 256 * spec.vocab;
    (4.0 * (rows as f64 * spec.context as f64 * kept as f64 + logits as f64)) as usize
}
