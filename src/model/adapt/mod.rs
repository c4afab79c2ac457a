//! Adapters: small trained tensors beside frozen matrices. A kind is one file that implements [`Adapter`].

mod lora;
mod targets;

use crate::ops::rng::Stream;
use crate::tape::{Tape, Var};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

pub use lora::Lora;
pub use targets::targeted;

/// A tensor that an adapter adds to a module: the end of its name, such as `lora_A.weight`, and its extents.
pub type Part = (&'static str, Vec<usize>);

/// What one kind of adapter does to a matrix `[out, in]`.
pub trait Adapter: Debug + Send + Sync {
    /// The tensors it trains beside a matrix of this shape, in the order in which the other functions get them.
    fn parts(&self, shape: [usize; 2]) -> Vec<Part>;

    /// Start values of `part`.
    fn initial(&self, part: &Part, stream: &mut Stream) -> Vec<f32>;

    /// Learning rate of the part with this name over the configured one.
    fn rate(&self, part: &str) -> f64;

    /// The adapted product: `y` is that of the frozen matrix with `x`, and nothing else reads it.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn apply(&self, tape: &Tape<'_>, x: &Var, y: Var, parts: &[Var]) -> candle_core::Result<Var>;
}

/// Which modules are adapted, and how.
#[derive(Clone, Debug)]
pub struct Adapted {
    pub adapter: Arc<dyn Adapter>,
    /// Module, such as `model.layers.0.self_attn.q_proj`, with its matrix' shape `[out, in]`.
    pub modules: BTreeMap<String, [usize; 2]>,
}

impl Adapted {
    /// Every trained tensor with its extents.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let parts = |(module, shape): (&String, &[usize; 2])| {
            self.adapter.parts(*shape).into_iter().map(move |(part, shape)| (format!("{module}.{part}"), shape)).collect::<Vec<_>>()
        };
        self.modules.iter().flat_map(parts).collect()
    }
}
