//! The learning rate's factor as a pure function of the step (the part of `finch` that follows the loss is in its own file).
//! warm-up: (step + 1) / warmup. Decay: from 1 at its first step towards `final_fraction`, which it would reach at `total`; the last
//! step therefore still learns when that fraction is zero. Between the two, and before any decay, the factor is 1.

use serde::{Deserialize, Serialize};

use super::finch::Finch;
use crate::error::{Error, Result};

/// `[optim.schedule]`: one key names the form, for example `cosine = { warmup = { steps = 100 }, final_fraction = 0.1 }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// Warm up, stay, decay linearly (warm-up, stable, decay). Hu et al. 2024, arXiv:2404.06395.
    Wsd(Wsd),
    /// Warm up, then half a cosine over all that is left. Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    Cosine(Decay),
    /// Warm up, then linear decay over all that is left.
    Linear(Decay),
    /// Warm up, then stay.
    Constant(Constant),
    /// Warm up; the rate then follows the loss.
    Finch(Finch),
}

/// Warm-up, plateau, linear decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wsd {
    pub warmup: Span,
    /// The last part of the run.
    pub decay: Span,
    /// What the decay ends at, as a fraction of the peak.
    pub final_fraction: f64,
}

/// Warm-up and decay with nothing between.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Decay {
    pub warmup: Span,
    /// What the decay ends at, as a fraction of the peak.
    pub final_fraction: f64,
}

/// Warm-up only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Constant {
    pub warmup: Span,
}

/// A part of the run: `{ steps = 100 }` or `{ fraction = 0.02 }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Span {
    Steps(u64),
    /// Of all steps, rounded to the nearest whole step.
    Fraction(f64),
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Wsd(Wsd::default())
    }
}

/// Short runs gain from a long decay: 40% lies in the middle of what published records use (20% to 65%).
impl Default for Wsd {
    fn default() -> Self {
        Self { warmup: Span::default(), decay: Span::Fraction(0.4), final_fraction: 0.0 }
    }
}

impl Default for Decay {
    fn default() -> Self {
        Self { warmup: Span::default(), final_fraction: 0.1 }
    }
}

/// Two percent: a warm-up.
impl Default for Span {
    fn default() -> Self {
        Self::Fraction(0.02)
    }
}

impl Span {
    /// Length in steps of a run of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Fraction(fraction) => (fraction * total as f64).round() as u64,
        }
    }
}

impl Schedule {
    /// The factor in `[0, 1]` at `step`, counted from 0, of a run of `total` steps.
    pub fn factor(&self, step: u64, total: u64) -> f64 {
        let warmup = self.warmup().steps(total);
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        match self {
            Self::Constant(_) | Self::Finch(_) => 1.0,
            Self::Wsd(wsd) => {
                let start = total.saturating_sub(wsd.decay.steps(total)).max(warmup);
                mix(1.0 - progress(step, start, total), wsd.final_fraction)
            }
            Self::Linear(decay) => mix(1.0 - progress(step, warmup, total), decay.final_fraction),
            Self::Cosine(decay) => mix(0.5 + 0.5 * (std::f64::consts::PI * progress(step, warmup, total)).cos(), decay.final_fraction),
        }
    }

    fn warmup(&self) -> Span {
        match self {
            Self::Wsd(Wsd { warmup, .. })
            | Self::Cosine(Decay { warmup, .. })
            | Self::Linear(Decay { warmup, .. })
            | Self::Constant(Constant { warmup })
            | Self::Finch(Finch { warmup, .. }) => *warmup,
        }
    }

    /// Whether the parts fit into a run of `total` steps and the fractions are fractions.
    ///
    /// # Errors
    /// The recipe's mistake, with its key.
    pub fn check(&self, total: u64) -> Result<()> {
        let (decay, last) = match self {
            Self::Wsd(wsd) => (Some(wsd.decay), wsd.final_fraction),
            Self::Cosine(decay) | Self::Linear(decay) => (None, decay.final_fraction),
            Self::Constant(_) => (None, 1.0),
            Self::Finch(finch) => {
                finch.check()?;
                (None, 1.0)
            }
        };
        let fractions = [Some(self.warmup()), decay].into_iter().flatten().filter_map(|span| match span {
            Span::Fraction(fraction) => Some(fraction),
            Span::Steps(_) => None,
        });
        if let Some(bad) = fractions.chain([last]).find(|fraction| !(0.0..=1.0).contains(fraction)) {
            return Err(Error::input("optim.schedule", format!("{bad} is not a fraction")).fix("give a number from 0 to 1"));
        }
        let (warmup, decay) = (self.warmup().steps(total), decay.map_or(0, |span| span.steps(total)));
        if warmup.saturating_add(decay) > total {
            let cause = format!("warm-up ({warmup} steps) and decay ({decay} steps) are longer than the run ({total} steps)");
            return Err(Error::input("optim.schedule", cause).fix("shorten them, give them as fractions, or raise train.steps"));
        }
        Ok(())
    }
}

/// How much of `start..end` lies behind `step`: 0 up to the start, 1 from the end on.
fn progress(step: u64, start: u64, end: u64) -> f64 {
    if step >= end {
        return 1.0;
    }
    step.saturating_sub(start) as f64 / (end - start.min(end - 1)) as f64
}

/// From `last` at 0 to 1 at 1.
fn mix(height: f64, last: f64) -> f64 {
    last + (1.0 - last) * height
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: u64 = 1000;

    fn all(warmup: Span, decay: Span, final_fraction: f64) -> [Schedule; 4] {
        let falling = Decay { warmup, final_fraction };
        [
            Schedule::Wsd(Wsd { warmup, decay, final_fraction }),
            Schedule::Cosine(falling.clone()),
            Schedule::Linear(falling),
            Schedule::Constant(Constant { warmup }),
        ]
    }

    #[test]
    fn ends() {
        for schedule in all(Span::Steps(20), Span::Fraction(0.3), 0.1) {
            assert_eq!(schedule.factor(0, TOTAL), 0.05);
            assert_eq!(schedule.factor(19, TOTAL), 1.0);
            assert_eq!(schedule.factor(20, TOTAL), 1.0, "{schedule:?}");
            let last = if matches!(schedule, Schedule::Constant(_)) { 1.0 } else { 0.1 };
            assert!((schedule.factor(TOTAL - 1, TOTAL) - last).abs() < 4e-3);
            assert_eq!(schedule.factor(TOTAL, TOTAL), last);
            assert_eq!(schedule.factor(u64::MAX, TOTAL), last);
        }
    }

    #[test]
    fn the_factor_never_jumps_and_never_leaves_its_range() {
        for schedule in all(Span::Fraction(0.05), Span::Fraction(0.4), 0.0) {
            let factors: Vec<f64> = (0..=TOTAL).map(|step| schedule.factor(step, TOTAL)).collect();
            assert!(factors.iter().all(|factor| (0.0..=1.0).contains(factor)));
            assert!(factors.windows(2).all(|pair| (pair[1] - pair[0]).abs() < 0.021), "{schedule:?}");
            assert!(factors[49..].windows(2).all(|pair| pair[1] <= pair[0]), "{schedule:?}");
        }
    }

    #[test]
    fn the_plateau_lies_between() {
        let schedule = Schedule::Wsd(Wsd { warmup: Span::Steps(10), decay: Span::Steps(200), final_fraction: 0.0 });
        assert!((10..=800).all(|step| schedule.factor(step, TOTAL) == 1.0));
        assert!((schedule.factor(900, TOTAL) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn half_a_cosine_is_half_way_in_the_middle() {
        let schedule = Schedule::Cosine(Decay { warmup: Span::Steps(0), final_fraction: 0.2 });
        assert!((schedule.factor(TOTAL / 2, TOTAL) - 0.6).abs() < 1e-12);
    }

    #[test]
    fn parts_of_any_length() {
        for (warmup, decay, total) in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (3, 2, 5), (5, 0, 5), (0, 5, 5)] {
            for schedule in all(Span::Steps(warmup), Span::Steps(decay), 0.0) {
                schedule.check(total).unwrap();
                assert!((0..total).all(|step| schedule.factor(step, total) > 0.0), "{schedule:?} {total}");
            }
        }
    }

    #[test]
    fn impossible_parts_are_refused() {
        let too_long = Schedule::Wsd(Wsd { warmup: Span::Steps(600), decay: Span::Fraction(0.5), final_fraction: 0.0 });
        assert!(too_long.check(TOTAL).unwrap_err().to_string().contains("longer than the run"));
        for bad in [-0.1, 1.5, f64::NAN] {
            assert!(Schedule::Cosine(Decay { final_fraction: bad, ..Decay::default() }).check(TOTAL).is_err());
            assert!(Schedule::Constant(Constant { warmup: Span::Fraction(bad) }).check(TOTAL).is_err());
        }
    }

    #[test]
    fn recipes_read_well() {
        #[derive(Deserialize)]
        struct Recipe {
            schedule: Schedule,
        }
        let parse = |text: &str| toml::from_str::<Recipe>(text).map(|recipe| recipe.schedule);
        let schedule = parse("[schedule]\ncosine = { warmup = { steps = 100 }, final_fraction = 0.2 }").unwrap();
        assert_eq!(schedule, Schedule::Cosine(Decay { warmup: Span::Steps(100), final_fraction: 0.2 }));
        assert_eq!(parse("schedule.wsd.decay.fraction = 0.4").unwrap(), Schedule::default());
        assert_eq!(parse("schedule.constant = {}").unwrap(), Schedule::Constant(Constant::default()));
        assert!(parse("schedule.cosine = { warm_up = { steps = 1 } }").unwrap_err().message().contains("warm_up"));
    }
}
