//! The forward pass of the decoder family: wiring only, the mathematics is in `ops`.
//!
//! Tensors are rows of tokens `[batch * tokens, width]`. The residual stream passes through fused add-and-normalize steps:
//! x -> norm -> attention -> (x + o, norm) -> MLP -> (x + d, next norm) ... -> final norm -> head.

use super::{Activation, LinearKind, Parameters, Spec, Weight};
use crate::error::Result;
use crate::ops::attention::{AttentionShape, attention};
use crate::ops::cross_entropy::{Loss, Targets, linear_cross_entropy};
use crate::ops::embedding::embedding;
use crate::ops::frozen::frozen_linears;
use crate::ops::gated::{GateFunction, gated};
use crate::ops::linear::linears;
use crate::ops::norm::{add_norm, norm};
use crate::ops::rope::{RotaryTable, rope};
use crate::ops::ternary::blended_linears;
use crate::tape::{Tape, Var};
use candle_core::Tensor;
use std::sync::Arc;

/// Token rows of equal length, packed documents marked by their starts.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub batch: usize,
    pub tokens: usize,
    /// `[batch * tokens]`.
    pub ids: Arc<Vec<u32>>,
    /// Position of each token in its document.
    pub positions: Arc<Vec<u32>>,
    /// In-row index of the first token of each token's document; absent when every row is one document.
    pub document_starts: Option<Arc<Vec<u32>>>,
}

impl Inputs {
    /// One document per row.
    pub fn rows(batch: usize, tokens: usize, ids: Vec<u32>) -> Self {
        let positions = (0..batch).flat_map(|_| 0..tokens as u32).collect();
        Self { batch, tokens, ids: Arc::new(ids), positions: Arc::new(positions), document_starts: None }
    }
}

/// A place in the forward pass that measurements and simulated quantization may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Residual stream: after the embedding (layer 0) or after block `layer - 1`; the last one after the final norm.
    Stream { layer: usize },
    /// Input of q, k and v.
    AttentionInput { layer: usize },
    /// q after RoPE.
    Query { layer: usize },
    /// k after RoPE.
    Key { layer: usize },
    /// v.
    Value { layer: usize },
    /// Input of the attention output projection.
    OutputInput { layer: usize },
    /// Input of gate and up.
    MlpInput { layer: usize },
    /// Input of the down projection.
    DownInput { layer: usize },
}

/// Looks at activations during evaluation and may replace them.
pub trait Observer {
    /// Called with the activation at `site`; a returned tensor takes its place (evaluation only: it carries no gradient).
    fn observe(&self, site: Site, value: &Tensor) -> Result<Option<Tensor>>;
}

/// A model's shape with its rotary table.
#[derive(Clone, Debug)]
pub struct Decoder {
    spec: Spec,
    rope: Arc<RotaryTable>,
    checkpointing: bool,
    blend: f32,
}

/// The two values that pass from block to block.
type Stream = [Var; 2];

impl Decoder {
    /// A decoder of this shape; with `checkpointing`, blocks are evaluated again in the backward pass instead of being remembered.
    pub fn new(spec: Spec, checkpointing: bool) -> Self {
        let positions = spec.context;
        Self::with_positions(spec, positions, checkpointing)
    }

    /// The same for rows of at most `positions` tokens, which may be fewer than the model's context.
    pub fn with_positions(spec: Spec, positions: usize, checkpointing: bool) -> Self {
        let rope = Arc::new(RotaryTable::from_frequencies(&spec.rotary_frequencies(), positions));
        Self { spec, rope, checkpointing, blend: 1.0 }
    }

    /// The same with ternary maps only partly rounded: 0 leaves them dense, 1 is what will be deployed.
    #[must_use]
    pub fn blended(&self, blend: f32) -> Self {
        Self { blend, ..self.clone() }
    }

    /// Its shape.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Loss of `inputs` against `targets`.
    pub fn loss(&self, tape: &Tape<'_>, parameters: &Parameters, inputs: &Inputs, targets: Targets<'_>) -> Result<Loss> {
        let hidden = self.hidden(tape, parameters, inputs, None)?;
        Ok(linear_cross_entropy(tape, &hidden, &self.head(parameters)?, targets)?)
    }

    /// The matrix that turns hidden states into logits, `[vocab, dim]`.
    ///
    /// # Errors
    /// When a frozen head in stored bits cannot be expanded.
    pub fn head(&self, parameters: &Parameters) -> Result<Var> {
        parameters.var(if self.spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" })
    }

    /// What the head reads, `[batch * tokens, dim]`: the final norm of the stream, through EmbProj's second map where there is one.
    pub fn hidden<'a>(&self, tape: &Tape<'a>, parameters: &Parameters, inputs: &Inputs, observer: Option<&dyn Observer>) -> Result<Var> {
        let pass = Pass { decoder: self, parameters, inputs, observer };
        let mut stream = pass.embed(tape)?;
        for layer in 0..self.spec.layers {
            stream = if self.checkpointing && observer.is_none() {
                let (decoder, parameters, inputs) = (self.clone(), parameters.clone(), inputs.clone());
                tape.checkpoint(&[&stream[0], &stream[1]], move |tape, saved| {
                    let pass = Pass { decoder: &decoder, parameters: &parameters, inputs: &inputs, observer: None };
                    pass.block(tape, layer, [saved[0].clone(), saved[1].clone()]).map_err(candle_core::Error::wrap)
                })?
            } else {
                pass.block(tape, layer, stream)?
            };
        }
        let [_, normalized] = stream;
        let normalized = pass.look(Site::Stream { layer: self.spec.layers }, normalized)?;
        if !self.spec.embedding_projection {
            return Ok(normalized);
        }
        let [projected] = linears(tape, &normalized, [&parameters.var("model.head_projection.weight")?])?;
        Ok(projected)
    }
}

struct Pass<'p> {
    decoder: &'p Decoder,
    parameters: &'p Parameters,
    inputs: &'p Inputs,
    observer: Option<&'p dyn Observer>,
}

impl Pass<'_> {
    fn spec(&self) -> &Spec {
        &self.decoder.spec
    }

    fn gain(&self, layer: usize, name: &str) -> Result<Var> {
        self.parameters.var(&format!("model.layers.{layer}.{name}.weight"))
    }

    fn look(&self, site: Site, value: Var) -> Result<Var> {
        let Some(observer) = self.observer else { return Ok(value) };
        let replacement = observer.observe(site, value.tensor())?;
        Ok(replacement.map_or(value, Var::constant))
    }

    /// The stream before the first block and its first norm.
    fn embed(&self, tape: &Tape<'_>) -> Result<Stream> {
        let mut x = match self.parameters.weight("model.embed_tokens.weight") {
            Weight::Trained(table) => embedding(tape, &self.inputs.ids, &table)?,
            Weight::Frozen(table) => Var::constant(table.gather(&self.inputs.ids, self.parameters.flat().device())?),
        };
        if self.spec().embedding_projection {
            [x] = linears(tape, &x, [&self.parameters.var("model.embed_projection.weight")?])?;
        }
        let x = self.look(Site::Stream { layer: 0 }, x)?;
        let normalized = norm(tape, &x, &self.next_gain(0)?, self.spec().dim, self.spec().norm_eps)?;
        Ok([x, normalized])
    }

    /// Gain of the norm that opens block `layer`, or of the final norm.
    fn next_gain(&self, layer: usize) -> Result<Var> {
        if layer == self.spec().layers { self.parameters.var("model.norm.weight") } else { self.gain(layer, "input_layernorm") }
    }

    fn block<'a>(&self, tape: &Tape<'a>, layer: usize, [x, normalized]: Stream) -> Result<Stream> {
        let epsilon = self.spec().norm_eps;
        let attended = self.attend(tape, layer, normalized)?;
        let (x, normalized) = add_norm(tape, &attended, &x, &self.gain(layer, "post_attention_layernorm")?, epsilon)?;
        let transformed = self.transform(tape, layer, normalized)?;
        let (x, normalized) = add_norm(tape, &transformed, &x, &self.next_gain(layer + 1)?, epsilon)?;
        let last = layer + 1 == self.spec().layers;
        let x = if last { x } else { self.look(Site::Stream { layer: layer + 1 }, x)? };
        Ok([x, normalized])
    }

    /// Products of `x` with matrices of block `layer`, adapters included.
    fn products<'a, const N: usize>(&self, tape: &Tape<'a>, x: &Var, layer: usize, names: [&str; N]) -> Result<[Var; N]> {
        let names = names.map(|name| format!("model.layers.{layer}.{name}.weight"));
        let weights = names.each_ref().map(|name| self.parameters.weight(name));
        let trained: Vec<&Var> =
            weights.iter().filter_map(|weight| if let Weight::Trained(var) = weight { Some(var) } else { None }).collect();
        let outputs = match <[&Var; N]>::try_from(trained) {
            Ok(trained) => match self.spec().linear {
                LinearKind::Dense => linears(tape, x, trained)?,
                LinearKind::Ternary => blended_linears(tape, x, trained, self.decoder.blend)?,
            },
            Err(_) => {
                let frozen: Vec<_> =
                    weights.iter().filter_map(|weight| if let Weight::Frozen(it) = weight { Some(*it) } else { None }).collect();
                frozen_linears(tape, x, frozen.try_into().expect("the matrices of a block are trained together or frozen together"))?
            }
        };
        let mut adapted = Vec::with_capacity(N);
        for (output, name) in outputs.into_iter().zip(&names) {
            adapted.push(match self.parameters.adapter_of(name) {
                Some((adapter, parts)) => adapter.apply(tape, x, output, &parts)?,
                None => output,
            });
        }
        Ok(adapted.try_into().expect("one output per matrix"))
    }

    fn attend<'a>(&self, tape: &Tape<'a>, layer: usize, x: Var) -> Result<Var> {
        let spec = self.spec();
        let x = self.look(Site::AttentionInput { layer }, x)?;
        let [mut q, mut k, v] = self.products(tape, &x, layer, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?;
        if spec.qk_norm {
            q = norm(tape, &q, &self.gain(layer, "self_attn.q_norm")?, spec.head_dim, spec.norm_eps)?;
            k = norm(tape, &k, &self.gain(layer, "self_attn.k_norm")?, spec.head_dim, spec.norm_eps)?;
        }
        let q = self.look(Site::Query { layer }, rope(tape, &q, &self.inputs.positions, &self.decoder.rope)?)?;
        let k = self.look(Site::Key { layer }, rope(tape, &k, &self.inputs.positions, &self.decoder.rope)?)?;
        let v = self.look(Site::Value { layer }, v)?;
        let shape = AttentionShape {
            batch: self.inputs.batch,
            tokens: self.inputs.tokens,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
        };
        let mut attended = attention(tape, shape, [&q, &k, &v], self.inputs.document_starts.clone())?;
        if spec.sub_norm {
            let width = spec.heads * spec.head_dim;
            attended = norm(tape, &attended, &self.gain(layer, "self_attn.attn_sub_norm")?, width, spec.norm_eps)?;
        }
        let attended = self.look(Site::OutputInput { layer }, attended)?;
        let [output] = self.products(tape, &attended, layer, ["self_attn.o_proj"])?;
        Ok(output)
    }

    fn transform<'a>(&self, tape: &Tape<'a>, layer: usize, x: Var) -> Result<Var> {
        let spec = self.spec();
        let x = self.look(Site::MlpInput { layer }, x)?;
        let [gate, up] = self.products(tape, &x, layer, ["mlp.gate_proj", "mlp.up_proj"])?;
        let function = match spec.activation {
            Activation::SwiGlu => GateFunction::Silu,
            Activation::Relu2Glu => GateFunction::SquaredRelu,
        };
        let mut inner = gated(tape, function, &gate, &up)?;
        if spec.sub_norm {
            inner = norm(tape, &inner, &self.gain(layer, "mlp.ffn_sub_norm")?, spec.ffn, spec.norm_eps)?;
        }
        let inner = self.look(Site::DownInput { layer }, inner)?;
        let [output] = self.products(tape, &inner, layer, ["mlp.down_proj"])?;
        Ok(output)
    }
}
