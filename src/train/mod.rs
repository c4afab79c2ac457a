//! The training loop: a recipe's model on a recipe's data, proven before the first step and resumable to the bit.

mod config;
pub mod dist;
pub mod evaluate;
mod failure;
pub mod finetune;
pub mod metrics;
mod probe;
mod run;
mod state;
pub mod step;

pub use config::{Config, EvalConfig};
pub use failure::{Replay, replay};
pub use finetune::Finetune;
pub use probe::prove_gradients;
pub use run::{Feed, Monitor, Outcome, run};
pub use state::{State, cursor};

use crate::error::Result;
use crate::model::{Decoder, Parameters, Spec, init::initialize};
use std::path::PathBuf;

/// Everything that fixes a run, resolved.
#[derive(Clone, Debug)]
pub struct Setup {
    pub spec: Spec,
    /// Tokens per training row; at most the model's context.
    pub row_tokens: usize,
    /// What the run starts from, where that is a trained model.
    pub finetune: Option<Finetune>,
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

impl Setup {
    /// The parameters before the first step.
    ///
    /// # Errors
    /// When the base of a fine-tuning run cannot be decoded.
    pub fn parameters(&self) -> Result<Parameters> {
        match &self.finetune {
            Some(finetune) => finetune.parameters(self.seed, &self.device),
            None => initialize(&self.spec, self.seed, &self.device),
        }
    }

    /// The model as it is deployed, for rows of this run.
    pub fn decoder(&self) -> Decoder {
        Decoder::with_positions(self.spec.clone(), self.row_tokens, self.activation_checkpointing)
    }

    /// How much of the rounding of ternary maps is done at `step`.
    pub fn blend(&self, step: u64) -> f32 {
        self.finetune.as_ref().map_or(1.0, |finetune| finetune.blend(step, self.train.steps))
    }

    /// Whether an adapter is trained, and not the model itself.
    pub fn trains_adapter(&self) -> bool {
        self.finetune.as_ref().is_some_and(|finetune| finetune.config.lora.is_some())
    }

    /// The file of a checkpoint that holds what is trained.
    pub fn weights_file(&self) -> &'static str {
        if self.trains_adapter() { crate::export::peft::WEIGHTS } else { "model.safetensors" }
    }
}
