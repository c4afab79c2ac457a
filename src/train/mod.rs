//! The training loop: a recipe's model on a recipe's data, proven before the first step and resumable to the bit.

mod config;
pub mod dist;
pub mod evaluate;
mod failure;
pub mod metrics;
mod probe;
mod run;
mod state;
pub mod step;

pub use config::{Config, EvalConfig};
pub use failure::{Replay, replay};
pub use probe::prove_gradients;
pub use run::{Feed, Monitor, Outcome, run};
pub use state::{State, cursor};

use crate::model::Spec;
use std::path::PathBuf;

/// Everything that fixes a run, resolved.
#[derive(Clone, Debug)]
pub struct Setup {
    pub spec: Spec,
    pub activation_checkpointing: bool,
    pub train: Config,
    pub eval: EvalConfig,
    pub optim: crate::optim::Config,
    pub checkpoint: crate::checkpoint::Config,
    pub run_dir: PathBuf,
    pub seed: u64,
    pub threads: usize,
    /// The processes that train together.
    pub ranks: dist::Ranks,
    pub device: candle_core::Device,
    /// Take the reference path of every operation, as devices without fused kernels do.
    pub reference: bool,
    /// The resolved recipe, for the record.
    pub recipe: String,
    /// Ids that generation needs, for `config.json`.
    pub special_ids: crate::export::config::SpecialIds,
    /// Names and contents of the tokenizer's files, which every checkpoint holds.
    pub tokenizer_files: Vec<(String, String)>,
}
