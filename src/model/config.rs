//! The `[model]` section of a recipe: a face, and single keys that override what the face presets.

use super::{Activation, LinearKind, Norm, Spec};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Presets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Face {
    /// Llama: RMSNorm, dense linears, SwiGLU, untied head.
    #[default]
    Dense,
    /// Outlier-safe pre-training: SSNorm and EmbProj, otherwise as `dense`.
    Osp,
    /// BitNet b1.58 for stock engines: ternary linears, RMSNorm, SwiGLU, no SubLN, untied head.
    Bitnet,
}

/// What the recipe says about the model. Widths in elements, lengths in tokens; keys left out follow the face.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default)]
    pub face: Face,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    /// Heads of keys and values; `heads` unless queries share them.
    pub kv_heads: Option<usize>,
    /// Width of a head; `dim / heads` by default.
    pub head_dim: Option<usize>,
    /// Width of the MLP; 8/3 of `dim`, rounded up to 256 for ternary models and to 64 otherwise, by default.
    pub ffn: Option<usize>,
    pub context: usize,
    /// Size of the vocabulary; that of the tokenizer, which it may exceed, by default.
    pub vocab: Option<usize>,
    pub norm: Option<Norm>,
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    pub embedding_projection: Option<bool>,
    pub linear: Option<LinearKind>,
    pub sub_norm: Option<bool>,
    pub activation: Option<Activation>,
    pub qk_norm: Option<bool>,
    pub tied: Option<bool>,
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Recompute each block's activations in the backward pass instead of keeping them: less memory, about a third more time.
    #[serde(default)]
    pub activation_checkpointing: bool,
}

fn default_norm_eps() -> f64 {
    1e-5
}

fn default_rope_theta() -> f64 {
    10_000.0
}

/// A minimal dense model; recipes always say these numbers.
impl Default for Config {
    fn default() -> Self {
        Self {
            face: Face::Dense,
            dim: 64,
            layers: 2,
            heads: 2,
            kv_heads: None,
            head_dim: None,
            ffn: None,
            context: 64,
            vocab: None,
            norm: None,
            norm_eps: default_norm_eps(),
            embedding_projection: None,
            linear: None,
            sub_norm: None,
            activation: None,
            qk_norm: None,
            tied: None,
            rope_theta: default_rope_theta(),
            activation_checkpointing: false,
        }
    }
}

impl Config {
    /// Fills in the face's presets and checks that the widths fit together.
    pub fn resolve(&self, tokenizer_vocab: usize) -> Result<Spec> {
        let linear = self.linear.unwrap_or(if self.face == Face::Bitnet { LinearKind::Ternary } else { LinearKind::Dense });
        let osp = self.face == Face::Osp;
        self.check_sizes()?;
        if self.head_dim.is_none() && !self.dim.is_multiple_of(self.heads) {
            let cause = format!("dim {} is not a multiple of heads {}", self.dim, self.heads);
            return Err(Error::input("model.heads", cause).fix("choose heads that divide dim, or set model.head_dim"));
        }
        let head_dim = self.head_dim.unwrap_or(self.dim / self.heads);
        if !head_dim.is_multiple_of(2) {
            return Err(Error::input("model.head_dim", format!("{head_dim} is odd; rotary embedding needs pairs"))
                .fix("choose dim and heads so that dim / heads is even, or set an even model.head_dim"));
        }
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        if kv_heads == 0 || !self.heads.is_multiple_of(kv_heads) {
            return Err(Error::input("model.kv_heads", format!("{kv_heads} does not divide heads {}", self.heads))
                .fix("choose a divisor of model.heads, or leave the key out"));
        }
        let step = if linear == LinearKind::Ternary { 256 } else { 64 };
        let spec = Spec {
            vocab: self.vocab.unwrap_or(tokenizer_vocab),
            dim: self.dim,
            layers: self.layers,
            heads: self.heads,
            kv_heads,
            head_dim,
            ffn: self.ffn.unwrap_or((self.dim * 8 / 3).next_multiple_of(step)),
            context: self.context,
            norm: self.norm.unwrap_or(if osp { Norm::SingleScale } else { Norm::Rms }),
            norm_eps: self.norm_eps,
            embedding_projection: self.embedding_projection.unwrap_or(osp),
            linear,
            sub_norm: self.sub_norm.unwrap_or(false),
            activation: self.activation.unwrap_or(Activation::SwiGlu),
            qk_norm: self.qk_norm.unwrap_or(false),
            tied: self.tied.unwrap_or(false),
            rope_theta: self.rope_theta,
            rope_scaling: None,
        };
        check(&spec, tokenizer_vocab)?;
        Ok(spec)
    }

    /// Sizes are at least 1, and small enough that products of them are numbers.
    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("dim", Some(self.dim), 1 << 18),
            ("layers", Some(self.layers), 1 << 12),
            ("heads", Some(self.heads), 1 << 12),
            ("kv_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("ffn", self.ffn, 1 << 20),
            ("context", Some(self.context), 1 << 24),
            ("vocab", self.vocab, 1 << 24),
        ];
        for (key, value, most) in sizes {
            if let Some(value) = value.filter(|value| !(1..=most).contains(value)) {
                return Err(
                    Error::input(format!("model.{key}"), format!("{value} is outside 1 to {most}")).fix("give a number in that range")
                );
            }
        }
        Ok(())
    }
}

fn check(spec: &Spec, tokenizer_vocab: usize) -> Result<()> {
    if spec.vocab < tokenizer_vocab {
        let cause = format!("{} is smaller than the tokenizer's {tokenizer_vocab} tokens", spec.vocab);
        return Err(Error::input("model.vocab", cause).fix("leave the key out, or use a smaller tokenizer"));
    }
    if spec.tied && spec.embedding_projection {
        let cause = "EmbProj's two maps differ, so a tied head cannot hold both after folding";
        return Err(Error::input("model.tied", cause).fix("set model.tied = false or model.embedding_projection = false"));
    }
    if !(spec.norm_eps > 0.0 && spec.norm_eps < 1.0) {
        return Err(Error::input("model.norm_eps", format!("{} is not a small positive number", spec.norm_eps)).fix("1e-5 is usual"));
    }
    if !(spec.rope_theta > 1.0 && spec.rope_theta.is_finite()) {
        return Err(Error::input("model.rope_theta", format!("{} is not above 1", spec.rope_theta)).fix("10000 is usual"));
    }
    Ok(())
}
