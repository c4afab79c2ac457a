//! LoRA: y = W x + s B (A x). Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; LoRA+: Hayou et al. 2024,
//! arXiv:2402.12354.
//! A: [rank, in], uniform in +-1 / sqrt(in) at first (PyTorch's and PEFT's default)   B: [out, rank], zero at first
//! s = alpha / rank, or alpha / sqrt(rank) when rank-stabilized;  B learns `b_rate` times as fast as A.

use super::{Adapter, Part};
use crate::error::{Error, Result};
use crate::ops::low_rank::add_low_rank;
use crate::ops::rng::Stream;
use crate::tape::{Tape, Var};
use serde::{Deserialize, Serialize};

/// `[finetune.lora]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Width of the bottleneck.
    pub rank: usize,
    /// Strength: the added map is scaled by alpha / rank.
    pub alpha: f64,
    /// Scale by alpha / sqrt(rank) instead (rsLoRA).
    pub rank_stabilized: bool,
    /// Learning rate of B over that of A (LoRA+ uses 16).
    pub b_rate: f64,
    /// Modules to adapt: the last parts of their names, such as `q_proj` or `mlp.up_proj`; `*` stands for anything.
    pub targets: Vec<String>,
}

/// All matrices of the blocks: adapting the MLP matters most (Schulman et al. 2025, "LoRA Without Regret").
impl Default for Lora {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, rank_stabilized: false, b_rate: 1.0, targets: vec!["*_proj".to_owned()] }
    }
}

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
/// No useful adapter is wider, and products with it stay numbers.
const MAX_RANK: usize = 1 << 16;

impl Lora {
    /// What B (A x) is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Refuses numbers that mean nothing.
    ///
    /// # Errors
    /// The recipe's mistake, with its key.
    pub fn check(&self) -> Result<()> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            let cause = format!("{} is outside 1 to {MAX_RANK}", self.rank);
            return Err(Error::input("finetune.lora.rank", cause).fix("8 to 64 is usual; leave finetune.lora out to train every weight"));
        }
        for (key, value) in [("alpha", self.alpha), ("b_rate", self.b_rate)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::input(format!("finetune.lora.{key}"), format!("{value} is not a positive number"))
                    .fix("alpha = 32 and b_rate = 1 are usual"));
            }
        }
        Ok(())
    }
}

impl Adapter for Lora {
    fn parts(&self, [out, width]: [usize; 2]) -> Vec<Part> {
        vec![(A, vec![self.rank, width]), (B, vec![out, self.rank])]
    }

    fn initial(&self, (name, shape): &Part, stream: &mut Stream) -> Vec<f32> {
        let len = shape.iter().product();
        if *name == B {
            return vec![0.0; len];
        }
        let bound = 1.0 / (shape[1] as f64).sqrt();
        (0..len).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect()
    }

    fn rate(&self, part: &str) -> f64 {
        if part == B { self.b_rate } else { 1.0 }
    }

    fn apply(&self, tape: &Tape<'_>, x: &Var, y: Var, parts: &[Var]) -> candle_core::Result<Var> {
        add_low_rank(tape, x, y, [&parts[0], &parts[1]], self.scale() as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_and_starts_are_those_of_the_papers() {
        let lora = Lora { rank: 16, alpha: 32.0, ..Lora::default() };
        assert_eq!((lora.scale(), Lora { rank_stabilized: true, ..lora.clone() }.scale()), (2.0, 8.0));
        let parts = lora.parts([6, 100]);
        let a = lora.initial(&parts[0], &mut Stream::new(1, "a"));
        assert!(a.iter().all(|value| value.abs() <= 0.1) && a.iter().any(|value| value.abs() > 0.09));
        assert!(lora.initial(&parts[1], &mut Stream::new(1, "b")).iter().all(|&value| value == 0.0));
        assert_eq!(Lora { b_rate: 16.0, ..lora }.rate(parts[1].0), 16.0);
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for (text, key) in [("rank = 0", "rank"), ("alpha = 0.0", "alpha"), ("b_rate = nan", "b_rate")] {
            let error = toml::from_str::<Lora>(text).unwrap().check().unwrap_err();
            assert!(error.to_string().starts_with(&format!("finetune.lora.{key}: ")), "{error}");
        }
    }
}
