//! `[train]` and `[eval]` of a recipe.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How long and in which portions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Rows of `model.context` tokens in one forward pass.
    pub batch: usize,
    /// Forward passes per optimizer step; their gradients are weighted by the tokens that count in each.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Coefficient of the z-loss, which keeps the logits' normalizer near 1; 0 for none.
    #[serde(default)]
    pub z_loss: f32,
    /// Steps between lines of the log and the metrics.
    #[serde(default = "ten")]
    pub log_every: u64,
}

fn one() -> usize {
    1
}

fn ten() -> u64 {
    10
}

impl Config {
    /// Refuses numbers that mean nothing.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("train.steps", self.steps, 1 << 40),
            ("train.batch", self.batch as u64, 1 << 20),
            ("train.accumulate", self.accumulate as u64, 1 << 20),
            ("train.log_every", self.log_every, u64::MAX),
        ];
        for (key, value, most) in counts {
            if !(1..=most).contains(&value) {
                return Err(Error::input(key, format!("{value} is outside 1 to {most}")).fix("give a number in that range"));
            }
        }
        if !(self.z_loss >= 0.0 && self.z_loss.is_finite()) {
            return Err(Error::input("train.z_loss", format!("{} is not a number from 0 up", self.z_loss)).fix("1e-4 is usual, 0 is none"));
        }
        Ok(())
    }
}

/// When to look at held-out documents, and how many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Steps between evaluations; 0 evaluates only at the end.
    pub every: u64,
    /// Rows of held-out tokens per evaluation, fixed over the run; 0 takes all there are.
    pub rows: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 0, rows: 64 }
    }
}
