//! The decoder over stored weights on the CPU. Every floating-point operation is the training forward's own kernel, applied in the same order
//! as in `model::decoder`, so with an f32 cache the logits have the same bits, however a sequence is cut into calls.

use super::cache::{self, Counters, Options, Times};
use super::kv::{self, Format, Queries, Store};
use super::linear::{Codes, Linear, products};
use super::model::{Model, Sequence};
use crate::error::{Error, Result};
use crate::export::adapter::LowRankAdapter;
use crate::export::parameter::Parameter;
use crate::model::{Activation, Spec};
use crate::ops::cpu::gated::{Activation as Gate, gated_forward};
use crate::ops::cpu::norm::rms_norm_forward;
use crate::ops::cpu::rope::RotaryTable;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Tokens that pass through the blocks together: enough for the matrix products, little enough for the caches of the processor.
const CHUNK: usize = 512;

/// Weights in the forms that the CPU's kernels read.
pub(super) struct Decoder {
    spec: Spec,
    embedding: Parameter,
    embedding_projection: Option<Linear>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head_projection: Option<Linear>,
    head: Linear,
}

struct Layer {
    input_norm: Vec<f32>,
    attention: [Linear; 3],
    /// Gains of the norms over heads of q and k.
    head_norms: Option<[Vec<f32>; 2]>,
    attention_sub_norm: Option<Vec<f32>>,
    output: Linear,
    middle_norm: Vec<f32>,
    gate_up: [Linear; 2],
    mlp_sub_norm: Option<Vec<f32>>,
    down: Linear,
}

impl Decoder {
    /// Takes in stored parameters: exactly those of `spec`, matrices row-major with rows in Hugging Face's order.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub(super) fn new(spec: &Spec, parameters: &BTreeMap<String, Parameter>) -> Result<Self> {
        let weights = Weights { parameters, spec };
        weights.check()?;
        let layers = (0..spec.layers).map(|layer| weights.layer(layer)).collect::<Result<Vec<_>>>()?;
        let projection = |name: &str| spec.embedding_projection.then(|| weights.dense(name)).transpose();
        Ok(Self {
            embedding: weights.get(EMBEDDING)?.clone(),
            embedding_projection: projection("model.embed_projection.weight")?,
            norm: weights.gain("model.norm.weight")?,
            head_projection: projection("model.head_projection.weight")?,
            head: weights.dense(if spec.tied { EMBEDDING } else { "lm_head.weight" })?,
            layers,
            spec: spec.clone(),
        })
    }

    /// Puts a low-rank adapter beside the matrices it names; it must fit (see [`LowRankAdapter::check`]).
    pub(super) fn adapt(&mut self, adapter: LowRankAdapter) {
        let mut modules = adapter.modules;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let [q, k, v] = &mut layer.attention;
            let [gate, up] = &mut layer.gate_up;
            let maps = [
                ("self_attn.q_proj", q),
                ("self_attn.k_proj", k),
                ("self_attn.v_proj", v),
                ("self_attn.o_proj", &mut layer.output),
                ("mlp.gate_proj", gate),
                ("mlp.up_proj", up),
                ("mlp.down_proj", &mut layer.down),
            ];
            for (name, map) in maps {
                if let Some(side) = modules.remove(&format!("model.layers.{index}.{name}")) {
                    map.adapt(side);
                }
            }
        }
        assert!(modules.is_empty(), "the adapter was checked against the base");
    }

    fn head_of(&self, hidden: &[f32]) -> Vec<f32> {
        let mut logits = vec![];
        products(hidden, [&self.head], [&mut logits], &mut Codes::default());
        logits
    }

    /// Runs `ids` at positions from `first` on and leaves what the head reads, `[ids, dim]`, in `work.normalized`. Keys and values are
    /// appended to `stores`, one per layer.
    fn forward(&self, ids: &[u32], first: usize, rope: &RotaryTable, stores: &mut [Box<dyn Store>], work: &mut Work) -> Result<()> {
        self.run(&Pass { decoder: self, first, rope, copies: 1 }, ids, stores, work)
    }

    fn run(&self, pass: &Pass<'_>, ids: &[u32], stores: &mut [Box<dyn Store>], work: &mut Work) -> Result<()> {
        let first = pass.first;
        work.positions.clear();
        work.positions.extend((first..first + ids.len()).map(|position| position as u32));
        self.embed(ids, work)?;
        for (index, (layer, store)) in self.layers.iter().zip(stores).enumerate() {
            pass.attend(layer, &mut **store, work)?;
            work.add_and_normalize(&layer.middle_norm, self.epsilon());
            pass.transform(layer, work);
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.input_norm);
            work.add_and_normalize(next, self.epsilon());
        }
        if let Some(projection) = &self.head_projection {
            products(&work.normalized, [projection], [&mut work.output], &mut work.codes);
            std::mem::swap(&mut work.normalized, &mut work.output);
        }
        Ok(())
    }

    fn epsilon(&self) -> f32 {
        self.spec.norm_eps as f32
    }

    /// The stream and its first norm.
    fn embed(&self, ids: &[u32], work: &mut Work) -> Result<()> {
        let dim = self.spec.dim;
        let row_bytes = self.embedding.bytes().len() / self.spec.vocab;
        work.x.resize(ids.len() * dim, 0.0);
        for (row, &id) in work.x.chunks_exact_mut(dim).zip(ids) {
            let bytes = self.embedding.bytes().get(id as usize * row_bytes..).and_then(|rest| rest.get(..row_bytes));
            let bytes = bytes.ok_or_else(|| Error::input("token", format!("id {id} is beyond the vocabulary of {}", self.spec.vocab)))?;
            self.embedding.format.decode_row(bytes, row)?;
        }
        if let Some(projection) = &self.embedding_projection {
            products(&work.x, [projection], [&mut work.output], &mut work.codes);
            std::mem::swap(&mut work.x, &mut work.output);
        }
        let gain = self.layers.first().map_or(&self.norm, |layer| &layer.input_norm);
        normalize(dim, self.epsilon(), &work.x, gain, &mut work.normalized, &mut work.scales);
        Ok(())
    }
}

/// One pass through the blocks.
struct Pass<'a> {
    decoder: &'a Decoder,
    first: usize,
    rope: &'a RotaryTable,
    /// How often the keys and values are appended: once, except to fill a cache for a benchmark.
    copies: usize,
}

impl Pass<'_> {
    /// `work.normalized` -> attention -> `work.output`.
    fn attend(&self, layer: &Layer, store: &mut dyn Store, work: &mut Work) -> Result<()> {
        let (spec, epsilon) = (&self.decoder.spec, self.decoder.epsilon());
        let Work { normalized, q, k, v, attended, output, codes, scales, positions, attention, .. } = work;
        products(normalized, layer.attention.each_ref(), [&mut *q, &mut *k, &mut *v], codes);
        if let Some(gains) = &layer.head_norms {
            for (projected, gain) in [&mut *q, &mut *k].into_iter().zip(gains) {
                normalize(spec.head_dim, epsilon, projected, gain, attended, scales);
                std::mem::swap(projected, attended);
            }
        }
        self.rope.rotate(q, positions);
        self.rope.rotate(k, positions);
        let start = Instant::now();
        store.append(k, v);
        attended.resize(q.len(), 0.0);
        let Spec { heads, kv_heads, head_dim, .. } = *spec;
        store.attend(Queries { q, heads, kv_heads, head_dim, first_position: self.first }, attended)?;
        *attention += start.elapsed();
        (1..self.copies).for_each(|_| store.append(k, v));
        if let Some(gain) = &layer.attention_sub_norm {
            normalize(spec.heads * spec.head_dim, epsilon, attended, gain, q, scales);
            std::mem::swap(attended, q);
        }
        products(attended, [&layer.output], [output], codes);
        Ok(())
    }

    /// `work.normalized` -> MLP -> `work.output`.
    fn transform(&self, layer: &Layer, work: &mut Work) {
        let spec = &self.decoder.spec;
        let Work { normalized, gate, up, inner, output, codes, scales, .. } = work;
        products(normalized, layer.gate_up.each_ref(), [&mut *gate, &mut *up], codes);
        let function = match spec.activation {
            Activation::SwiGlu => Gate::Silu,
            Activation::Relu2Glu => Gate::SquaredRelu,
        };
        inner.resize(gate.len(), 0.0);
        gated_forward(function, gate, up, inner);
        if let Some(gain) = &layer.mlp_sub_norm {
            normalize(spec.ffn, self.decoder.epsilon(), inner, gain, gate, scales);
            std::mem::swap(inner, gate);
        }
        products(inner, [&layer.down], [output], codes);
    }
}

fn normalize(width: usize, epsilon: f32, x: &[f32], gain: &[f32], y: &mut Vec<f32>, scales: &mut Vec<f32>) {
    y.resize(x.len(), 0.0);
    scales.resize(x.len() / width, 0.0);
    rms_norm_forward(width, epsilon, x, None, gain, y, scales);
}

/// Buffers that a session keeps, so that a step allocates nothing.
#[derive(Default)]
struct Work {
    /// The residual stream, `[rows, dim]`.
    x: Vec<f32>,
    /// The stream after the norm that comes next; in the end what the head reads.
    normalized: Vec<f32>,
    /// What the next add puts onto the stream.
    output: Vec<f32>,
    sum: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
    scales: Vec<f32>,
    positions: Vec<u32>,
    codes: Codes,
    /// Time spent in attention so far.
    attention: Duration,
}

impl Work {
    /// Adds `output` to the stream and normalizes it.
    fn add_and_normalize(&mut self, gain: &[f32], epsilon: f32) {
        let rows = self.positions.len();
        self.sum.resize(self.x.len(), 0.0);
        self.normalized.resize(self.x.len(), 0.0);
        self.scales.resize(rows, 0.0);
        let residual = Some((&self.x[..], &mut self.sum[..]));
        rms_norm_forward(self.x.len() / rows, epsilon, &self.output, residual, gain, &mut self.normalized, &mut self.scales);
        std::mem::swap(&mut self.x, &mut self.sum);
    }
}

/// Stored parameters on their way into an engine.
pub(super) struct Weights<'a> {
    pub(super) parameters: &'a BTreeMap<String, Parameter>,
    pub(super) spec: &'a Spec,
}

impl Weights<'_> {
    pub(super) fn check(&self) -> Result<()> {
        for (name, shape) in self.spec.parameters() {
            let found = &self.get(&name)?.shape;
            if *found != shape {
                return Err(Error::input(name, format!("has the shape {found:?} where {shape:?} is expected")));
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Result<&Parameter> {
        self.parameters.get(name).ok_or_else(|| Error::input(name, "is missing from the model"))
    }

    pub(super) fn gain(&self, name: &str) -> Result<Vec<f32>> {
        self.get(name)?.to_vec()
    }

    fn dense(&self, name: &str) -> Result<Linear> {
        Linear::dense(name, self.get(name)?)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let gain = |part: &str| self.gain(&name(part));
        let matrix = |part: &str| Linear::of_block(&name(part), self.get(&name(part))?, self.spec.linear);
        let (qk_norm, sub_norm) = (self.spec.qk_norm, self.spec.sub_norm);
        Ok(Layer {
            input_norm: gain("input_layernorm")?,
            attention: [matrix("self_attn.q_proj")?, matrix("self_attn.k_proj")?, matrix("self_attn.v_proj")?],
            head_norms: if qk_norm { Some([gain("self_attn.q_norm")?, gain("self_attn.k_norm")?]) } else { None },
            attention_sub_norm: sub_norm.then(|| gain("self_attn.attn_sub_norm")).transpose()?,
            output: matrix("self_attn.o_proj")?,
            middle_norm: gain("post_attention_layernorm")?,
            gate_up: [matrix("mlp.gate_proj")?, matrix("mlp.up_proj")?],
            mlp_sub_norm: sub_norm.then(|| gain("mlp.ffn_sub_norm")).transpose()?,
            down: matrix("mlp.down_proj")?,
        })
    }
}

impl Model for Decoder {
    fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        Ok(self.head_of(hidden))
    }

    fn exact_cache(&self) -> Format {
        Format::F32
    }

    fn sequence<'m>(&'m self, options: &Options, capacity: usize) -> Result<Box<dyn Sequence + 'm>> {
        let spec = &self.spec;
        let bytes = cache::bytes(options, capacity, spec.layers, spec.kv_heads, spec.head_dim)?;
        cache::check_memory(bytes, cache::available_memory())?;
        Ok(Box::new(CpuSequence {
            decoder: self,
            rope: RotaryTable::from_frequencies(&spec.rotary_frequencies(), capacity),
            stores: (0..spec.layers).map(|layer| kv::store(options, layer, spec.kv_heads, spec.head_dim)).collect::<Result<_>>()?,
            work: Work::default(),
        }))
    }
}

/// A sequence in progress on the CPU.
struct CpuSequence<'m> {
    decoder: &'m Decoder,
    rope: RotaryTable,
    stores: Vec<Box<dyn Store>>,
    work: Work,
}

impl CpuSequence<'_> {
    fn run(&mut self, ids: &[u32], first: usize, mut take: impl FnMut(&[f32])) -> Result<()> {
        let mut position = first;
        for chunk in ids.chunks(CHUNK) {
            self.decoder.forward(chunk, position, &self.rope, &mut self.stores, &mut self.work)?;
            position += chunk.len();
            take(&self.work.normalized);
        }
        Ok(())
    }
}

impl Sequence for CpuSequence<'_> {
    fn hidden(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        let mut hidden = Vec::with_capacity(ids.len() * self.decoder.spec.dim);
        on_pool(|| self.run(ids, first, |rows| hidden.extend_from_slice(rows)))?;
        Ok(hidden)
    }

    fn logits_after(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        let decoder = self.decoder;
        on_pool(|| {
            let mut last = vec![];
            self.run(ids, first, |rows| {
                last.clear();
                last.extend_from_slice(&rows[rows.len() - decoder.spec.dim..]);
            })?;
            Ok(decoder.head_of(&last))
        })
    }

    fn repeat(&mut self, ids: &[u32], copies: usize) -> Result<()> {
        let Self { decoder, rope, stores, work } = self;
        on_pool(|| decoder.run(&Pass { decoder, first: 0, rope, copies }, ids, stores, work))
    }

    fn times(&self) -> Times {
        Times { attention: self.work.attention, choosing: self.stores.iter().map(|store| store.choosing()).sum() }
    }

    fn truncate(&mut self, positions: usize) {
        self.stores.iter_mut().for_each(|store| store.truncate(positions));
    }

    fn counters(&self) -> Counters {
        self.stores.iter().fold(Counters::default(), |mut sum, store| {
            sum.add(&store.counters());
            sum
        })
    }
}

/// Runs `work` on a thread of the pool: a parallel kernel called from there starts at once, while one called from any other thread would
/// put that thread to sleep and wake it again, for each of a token's many products.
fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
