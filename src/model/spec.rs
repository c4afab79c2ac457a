//! The resolved shape of a decoder: everything that fixes its mathematics and its parameter names.

use super::RopeScaling;
use serde::{Deserialize, Serialize};

/// Normalization of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// RMSNorm with a gain per channel (Zhang & Sennrich 2019).
    Rms,
    /// SSNorm: RMSNorm with one scalar gain (Outlier-Safe Pre-Training, arXiv 2506.19697); its gain has shape `[1]`.
    SingleScale,
}

/// What the seven matrices of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinearKind {
    /// Plain matrix product.
    Dense,
    /// BitNet b1.58: absmean ternary weights, per-token absmax int8 activations.
    Ternary,
}

/// Gated activation of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// silu(gate) * up.
    SwiGlu,
    /// relu(gate)^2 * up.
    Relu2Glu,
}

/// A decoder, completely resolved. Widths in elements, lengths in tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub vocab: usize,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub context: usize,
    pub norm: Norm,
    pub norm_eps: f64,
    /// EmbProj: learned square maps after the embedding and before the head, folded away at export.
    pub embedding_projection: bool,
    pub linear: LinearKind,
    /// SubLN: RMSNorm before the attention output and MLP down projections.
    pub sub_norm: bool,
    pub activation: Activation,
    /// RMSNorm over each head of q and k before RoPE.
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tied: bool,
    pub rope_theta: f64,
    /// Stretched rotary frequencies, where the model has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
}

impl Spec {
    /// Parameter names (Hugging Face's, plus EmbProj's two) with shapes, in name order. Matrices are `[out, in]`.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d, q, kv, f) = (self.dim, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn);
        let gain = match self.norm {
            Norm::Rms => d,
            Norm::SingleScale => 1,
        };
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, d]), ("model.norm.weight".to_owned(), vec![gain])];
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, d]));
        }
        if self.embedding_projection {
            all.push(("model.embed_projection.weight".to_owned(), vec![d, d]));
            all.push(("model.head_projection.weight".to_owned(), vec![d, d]));
        }
        for layer in 0..self.layers {
            let mut push = |name: &str, shape: Vec<usize>| all.push((format!("model.layers.{layer}.{name}.weight"), shape));
            push("input_layernorm", vec![gain]);
            push("post_attention_layernorm", vec![gain]);
            push("self_attn.q_proj", vec![q, d]);
            push("self_attn.k_proj", vec![kv, d]);
            push("self_attn.v_proj", vec![kv, d]);
            push("self_attn.o_proj", vec![d, q]);
            push("mlp.gate_proj", vec![f, d]);
            push("mlp.up_proj", vec![f, d]);
            push("mlp.down_proj", vec![d, f]);
            if self.qk_norm {
                push("self_attn.q_norm", vec![self.head_dim]);
                push("self_attn.k_norm", vec![self.head_dim]);
            }
            if self.sub_norm {
                push("self_attn.attn_sub_norm", vec![q]);
                push("mlp.ffn_sub_norm", vec![f]);
            }
        }
        all.sort();
        all
    }
}
