//! Names of architectures and tensors in GGUF files, and the row order of their q and k matrices.

/// A llama.cpp architecture this crate writes and reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Rotary pairs are neighbouring rows, so q and k rows are permuted.
    Llama,
    /// QK-norm; rotary pairs are half a head apart, as in Hugging Face's models.
    Qwen3,
    /// SubLN; tied head; rotary pairs half a head apart.
    Bitnet,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::Llama, Self::Qwen3, Self::Bitnet];

    /// `general.architecture`, also the prefix of the model's keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
            Self::Bitnet => "bitnet",
        }
    }

    /// The architecture called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// Whether q and k rows are stored as neighbouring rotary pairs.
    pub fn interleaves_heads(self) -> bool {
        self == Self::Llama
    }
}

/// Hugging Face names inside a layer beside llama.cpp's.
const LAYER: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
];
const OUTSIDE: [(&str, &str); 3] = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// The GGUF name of a parameter; `None` for those that are folded away.
pub fn gguf_name(parameter: &str) -> Option<String> {
    let stem = parameter.strip_suffix(".weight")?;
    if let Some((_, name)) = OUTSIDE.iter().find(|(hugging_face, _)| *hugging_face == stem) {
        return Some(format!("{name}.weight"));
    }
    let (layer, rest) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, name) = LAYER.iter().find(|(hugging_face, _)| *hugging_face == rest)?;
    Some(format!("blk.{layer}.{name}.weight"))
}

/// Whether the parameter is one of a block's seven matrices.
pub fn is_block_matrix(parameter: &str) -> bool {
    parameter.ends_with("_proj.weight")
}

/// Heads whose rows are permuted in an interleaving architecture: those of q and k.
pub fn rotary_heads(parameter: &str, heads: usize, kv_heads: usize) -> Option<usize> {
    match parameter.rsplit('.').nth(1) {
        Some("q_proj") => Some(heads),
        Some("k_proj") => Some(kv_heads),
        _ => None,
    }
}

/// Reorders rows of `row` elements from half-split to interleaved rotary pairs: per head, row 2j + i comes from row i * half + j.
pub fn interleave<T: Copy>(rows: &[T], row: usize, heads: usize) -> Vec<T> {
    permuted(rows, row, heads, |at, half| at % 2 * half + at / 2)
}

/// The inverse of [`interleave`].
pub fn deinterleave<T: Copy>(rows: &[T], row: usize, heads: usize) -> Vec<T> {
    permuted(rows, row, heads, |at, half| at % half * 2 + at / half)
}

fn permuted<T: Copy>(rows: &[T], row: usize, heads: usize, source: impl Fn(usize, usize) -> usize) -> Vec<T> {
    let head_rows = rows.len() / row / heads;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_rows * row) {
        for at in 0..head_rows {
            let from = source(at, head_rows / 2) * row;
            out.extend_from_slice(&head[from..from + row]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::spec;
    use crate::model::Spec;

    #[test]
    fn every_parameter_has_its_own_name() {
        let face = Spec { qk_norm: true, sub_norm: true, ..spec() };
        let names: std::collections::BTreeSet<_> = face.parameters().iter().map(|(name, _)| gguf_name(name).unwrap()).collect();
        assert_eq!(names.len(), face.parameters().len());
        assert!(names.contains("blk.1.attn_output.weight") && names.contains("output.weight"));
        assert_eq!(gguf_name("model.embed_projection.weight"), None);
    }

    #[test]
    fn interleaving_pairs_the_halves_and_is_undone() {
        // Two heads of four rows, one element per row.
        let rows: Vec<u32> = (0..8).collect();
        let mixed = interleave(&rows, 1, 2);
        assert_eq!(mixed, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(deinterleave(&mixed, 1, 2), rows);
        let wide: Vec<u32> = (0..6 * 3 * 2).collect();
        assert_eq!(deinterleave(&interleave(&wide, 3, 2), 3, 2), wide);
    }

    /// Rotating interleaved pairs of permuted rows gives the same scores as rotating half-split pairs of the original rows.
    #[test]
    fn both_rotary_conventions_give_the_same_scores() {
        let (head_dim, angle) = (8, |j: usize| 0.3 * (j as f64 + 1.0));
        let rotate = |x: &[f64], first: &dyn Fn(usize) -> (usize, usize)| {
            let mut out = x.to_vec();
            for j in 0..head_dim / 2 {
                let (a, b) = first(j);
                let (sin, cos) = angle(j).sin_cos();
                (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
            }
            out
        };
        let q: Vec<f64> = (0..head_dim).map(|i| (i as f64 * 1.7).sin()).collect();
        let half_split = rotate(&q, &|j| (j, j + head_dim / 2));
        let interleaved = rotate(&interleave(&q, 1, 1), &|j| (2 * j, 2 * j + 1));
        assert_eq!(interleave(&half_split, 1, 1), interleaved);
    }
}
