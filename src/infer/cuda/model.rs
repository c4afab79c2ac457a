//! The decoder over weights on a device: the steps of the CPU's in the same order.

use super::attend::Attention;
use super::linear::{Rounded, Stack, half_matrix};
use super::sequence::CudaSequence;
use crate::error::{Error, Result};
use crate::export::parameter::Parameter;
use crate::infer::cache::Options;
use crate::infer::decoder::{EMBEDDING, Weights};
use crate::infer::kv::Format;
use crate::infer::model::{Model, Sequence};
use crate::model::{Activation, LinearKind, Spec};
use crate::ops::cpu::gated::Activation as Gate;
use crate::ops::cuda::dense::HalfMatrix;
use crate::ops::cuda::embedding::embedding_rows;
use crate::ops::cuda::gated::gate;
use crate::ops::cuda::norm::rms_norm;
use crate::ops::cuda::rope::{DeviceTable, WIDEST_HEAD};
use crate::ops::cuda::{Buffer, Device};
use std::collections::BTreeMap;

/// Rows whose logits are computed together.
const LOGIT_ROWS: usize = 64;

/// A model on a device, ready to run.
pub(in crate::infer) struct CudaModel<D: Device> {
    pub(super) device: D,
    pub(super) spec: Spec,
    embedding: HalfMatrix<D>,
    embedding_projection: Option<Stack<D>>,
    layers: Vec<Layer<D>>,
    norm: Buffer<D, f32>,
    head_projection: Option<Stack<D>>,
    /// Absent where it is the embedding.
    head: Option<HalfMatrix<D>>,
}

struct Layer<D: Device> {
    input_norm: Buffer<D, f32>,
    attention: Stack<D>,
    /// Gains of the norms over heads of q and k.
    head_norms: Option<[Buffer<D, f32>; 2]>,
    attention_sub_norm: Option<Buffer<D, f32>>,
    output: Stack<D>,
    middle_norm: Buffer<D, f32>,
    gate_up: Stack<D>,
    mlp_sub_norm: Option<Buffer<D, f32>>,
    down: Stack<D>,
}

impl<D: Device> CudaModel<D> {
    /// Copies stored parameters to the device: exactly those of `spec`, matrices row-major with rows in Hugging Face's order.
    ///
    /// # Errors
    /// When one is missing or has another shape, half precision cannot hold a weight, the kernels cannot hold a head, or there is no room.
    pub(in crate::infer) fn new(device: D, spec: &Spec, parameters: &BTreeMap<String, Parameter>) -> Result<Self> {
        check_heads(spec)?;
        let weights = Weights { parameters, spec };
        weights.check()?;
        let loading = Loading { device: &device, weights: &weights };
        let layers = (0..spec.layers).map(|layer| loading.layer(layer)).collect::<Result<Vec<_>>>()?;
        let projection = |name: &str| spec.embedding_projection.then(|| loading.stack(&[name.to_owned()], LinearKind::Dense)).transpose();
        let (embedding_projection, head_projection) =
            (projection("model.embed_projection.weight")?, projection("model.head_projection.weight")?);
        let matrix = |name: &str| half_matrix(&device, name, weights.get(name)?);
        Ok(Self {
            embedding: matrix(EMBEDDING)?,
            embedding_projection,
            norm: loading.gain("model.norm.weight")?,
            head_projection,
            head: (!spec.tied).then(|| matrix("lm_head.weight")).transpose()?,
            layers,
            spec: spec.clone(),
            device,
        })
    }

    fn head(&self) -> &HalfMatrix<D> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn epsilon(&self) -> f32 {
        self.spec.norm_eps as f32
    }

    fn head_rows(&self, x: &Buffer<D, f32>, rows: usize, rounded: &mut Rounded<D>, y: &Buffer<D, f32>) -> Result<()> {
        if rows == 1 {
            return self.head().multiply_row(&self.device, x, &[(self.spec.vocab, y)]);
        }
        rounded.halves.round(&self.device, x, rows, self.spec.dim)?;
        self.head().multiply_rows(&self.device, &rounded.halves, rows, 0..self.spec.vocab, y)
    }

    /// Logits of the last of the `rows` rows that a pass left behind.
    pub(super) fn last_logits(&self, rows: usize, work: &mut Work<D>) -> Result<Vec<f32>> {
        let dim = self.spec.dim;
        self.device.copy(&work.normalized, (rows - 1) * dim, &work.last, 0, dim)?;
        self.head().multiply_row(&self.device, &work.last, &[(self.spec.vocab, &work.logits)])?;
        self.device.download(&work.logits)
    }

    /// Runs `ids` at positions from `first` on and leaves what the head reads, `[ids, dim]`, in `work.normalized`. Keys and values go to the
    /// cache of `attention`.
    pub(super) fn forward(
        &self,
        ids: &[u32],
        first: usize,
        table: &DeviceTable<D>,
        attention: &mut Attention<D>,
        work: &mut Work<D>,
    ) -> Result<()> {
        let pass = Pass { engine: self, first, rows: ids.len(), table };
        self.embed(ids, work)?;
        for (index, layer) in self.layers.iter().enumerate() {
            pass.attend(index, layer, attention, work)?;
            pass.add_and_normalize(&layer.middle_norm, work)?;
            pass.transform(layer, work)?;
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.input_norm);
            pass.add_and_normalize(next, work)?;
        }
        if let Some(projection) = &self.head_projection {
            projection.multiply(&self.device, &work.normalized, ids.len(), &mut work.rounded, &[&work.output])?;
            std::mem::swap(&mut work.normalized, &mut work.output);
        }
        Ok(())
    }

    /// The stream and its first norm.
    fn embed(&self, ids: &[u32], work: &mut Work<D>) -> Result<()> {
        let (device, rows, dim) = (&self.device, ids.len(), self.spec.dim);
        device.write(&work.ids, 0, ids)?;
        embedding_rows(device, &self.embedding, &work.ids, &work.x, rows)?;
        if let Some(projection) = &self.embedding_projection {
            projection.multiply(device, &work.x, rows, &mut work.rounded, &[&work.output])?;
            std::mem::swap(&mut work.x, &mut work.output);
        }
        let gain = self.layers.first().map_or(&self.norm, |layer| &layer.input_norm);
        rms_norm(device, &work.x, None, gain, &work.normalized, rows, dim, self.epsilon())
    }
}

impl<D: Device> Model for CudaModel<D> {
    fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let (dim, vocab) = (self.spec.dim, self.spec.vocab);
        let most = LOGIT_ROWS.min(hidden.len() / dim);
        let (x, y) = (self.device.alloc(most * dim)?, self.device.alloc(most * vocab)?);
        let mut rounded = Rounded::new(&self.device, most, dim)?;
        let mut logits = Vec::with_capacity(hidden.len() / dim * vocab);
        for hidden in hidden.chunks(LOGIT_ROWS * dim) {
            let rows = hidden.len() / dim;
            self.device.write(&x, 0, hidden)?;
            self.head_rows(&x, rows, &mut rounded, &y)?;
            let first = logits.len();
            logits.resize(first + rows * vocab, 0.0);
            self.device.read(&y, 0, &mut logits[first..])?;
        }
        Ok(logits)
    }

    fn exact_cache(&self) -> Format {
        Format::F16
    }

    fn sequence<'m>(&'m self, options: &Options, capacity: usize) -> Result<Box<dyn Sequence + 'm>> {
        Ok(Box::new(CudaSequence::new(self, options, capacity)?))
    }
}

fn check_heads(spec: &Spec) -> Result<()> {
    if spec.head_dim > WIDEST_HEAD || !spec.head_dim.is_multiple_of(2) {
        let cause = format!("the CUDA kernels take heads of an even width up to {WIDEST_HEAD}; this model's are {} wide", spec.head_dim);
        return Err(Error::input("device", cause).fix("run it with --device cpu"));
    }
    Ok(())
}

/// One pass through the blocks.
struct Pass<'a, D: Device> {
    engine: &'a CudaModel<D>,
    first: usize,
    rows: usize,
    table: &'a DeviceTable<D>,
}

impl<D: Device> Pass<'_, D> {
    /// `work.normalized` -> attention -> `work.output`.
    fn attend(&self, index: usize, layer: &Layer<D>, attention: &mut Attention<D>, work: &mut Work<D>) -> Result<()> {
        let (device, spec, epsilon, rows) = (&self.engine.device, &self.engine.spec, self.engine.epsilon(), self.rows);
        let Work { normalized, q, k, v, attended, output, rounded, .. } = work;
        layer.attention.multiply(device, normalized, rows, rounded, &[&*q, &*k, &*v])?;
        self.table.rotate(device, [&*q, &*k], layer.head_norms.as_ref(), epsilon, rows, [spec.heads, spec.kv_heads], self.first)?;
        attention.append(device, index, [&*k, &*v], rows, self.first)?;
        attention.attend(device, index, q, rows, self.first, attended)?;
        if let Some(gain) = &layer.attention_sub_norm {
            rms_norm(device, attended, None, gain, q, rows, spec.heads * spec.head_dim, epsilon)?;
            std::mem::swap(attended, q);
        }
        layer.output.multiply(device, attended, rows, rounded, &[&*output])
    }

    /// `work.normalized` -> MLP -> `work.output`.
    fn transform(&self, layer: &Layer<D>, work: &mut Work<D>) -> Result<()> {
        let (device, spec, rows) = (&self.engine.device, &self.engine.spec, self.rows);
        let Work { normalized, gate: gates, up, output, rounded, .. } = work;
        layer.gate_up.multiply(device, normalized, rows, rounded, &[&*gates, &*up])?;
        let function = match spec.activation {
            Activation::SwiGlu => Gate::Silu,
            Activation::Relu2Glu => Gate::SquaredRelu,
        };
        gate(device, function, gates, up, gates, rows * spec.ffn)?;
        if let Some(gain) = &layer.mlp_sub_norm {
            rms_norm(device, gates, None, gain, up, rows, spec.ffn, self.engine.epsilon())?;
            std::mem::swap(gates, up);
        }
        layer.down.multiply(device, gates, rows, rounded, &[&*output])
    }

    /// Adds `work.output` to the stream and normalizes it.
    fn add_and_normalize(&self, gain: &Buffer<D, f32>, work: &Work<D>) -> Result<()> {
        let (engine, dim) = (self.engine, self.engine.spec.dim);
        rms_norm(&engine.device, &work.x, Some(&work.output), gain, &work.normalized, self.rows, dim, engine.epsilon())
    }
}

/// Buffers that a session keeps, so that a step allocates nothing.
pub(super) struct Work<D: Device> {
    ids: Buffer<D, u32>,
    /// The residual stream, `[rows, dim]`.
    x: Buffer<D, f32>,
    /// The stream after the norm that comes next; in the end what the head reads.
    pub(super) normalized: Buffer<D, f32>,
    /// What the next add puts onto the stream.
    output: Buffer<D, f32>,
    q: Buffer<D, f32>,
    k: Buffer<D, f32>,
    v: Buffer<D, f32>,
    attended: Buffer<D, f32>,
    gate: Buffer<D, f32>,
    up: Buffer<D, f32>,
    rounded: Rounded<D>,
    /// One row for the head, and its logits.
    last: Buffer<D, f32>,
    logits: Buffer<D, f32>,
}

impl<D: Device> Work<D> {
    /// For passes of up to `rows` tokens.
    pub(super) fn new(device: &D, spec: &Spec, rows: usize) -> Result<Self> {
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let buffer = |width: usize| device.alloc(rows * width);
        Ok(Self {
            ids: device.alloc(rows)?,
            x: buffer(spec.dim)?,
            normalized: buffer(spec.dim)?,
            output: buffer(spec.dim)?,
            q: buffer(queries)?,
            k: buffer(keys)?,
            v: buffer(keys)?,
            attended: buffer(queries)?,
            gate: buffer(spec.ffn)?,
            up: buffer(spec.ffn)?,
            rounded: Rounded::new(device, rows, spec.dim.max(queries).max(spec.ffn))?,
            last: device.alloc(spec.dim)?,
            logits: device.alloc(spec.vocab)?,
        })
    }
}

/// Stored parameters on their way to a device.
struct Loading<'a, D: Device> {
    device: &'a D,
    weights: &'a Weights<'a>,
}

impl<D: Device> Loading<'_, D> {
    fn gain(&self, name: &str) -> Result<Buffer<D, f32>> {
        self.device.upload(&self.weights.gain(name)?)
    }

    fn stack(&self, names: &[String], kind: LinearKind) -> Result<Stack<D>> {
        let named = names.iter().map(|name| Ok((name.clone(), self.weights.get(name)?))).collect::<Result<Vec<_>>>()?;
        Stack::of_block(self.device, &named, kind)
    }

    fn layer(&self, index: usize) -> Result<Layer<D>> {
        let spec = self.weights.spec;
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let gain = |part: &str| self.gain(&name(part));
        let stack = |parts: &[&str]| self.stack(&parts.iter().map(|part| name(part)).collect::<Vec<_>>(), spec.linear);
        Ok(Layer {
            input_norm: gain("input_layernorm")?,
            attention: stack(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
            head_norms: if spec.qk_norm { Some([gain("self_attn.q_norm")?, gain("self_attn.k_norm")?]) } else { None },
            attention_sub_norm: spec.sub_norm.then(|| gain("self_attn.attn_sub_norm")).transpose()?,
            output: stack(&["self_attn.o_proj"])?,
            middle_norm: gain("post_attention_layernorm")?,
            gate_up: stack(&["mlp.gate_proj", "mlp.up_proj"])?,
            mlp_sub_norm: spec.sub_norm.then(|| gain("mlp.ffn_sub_norm")).transpose()?,
            down: stack(&["mlp.down_proj"])?,
        })
    }
}
