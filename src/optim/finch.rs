//! FINCH, a learning rate that follows the loss, against forgetting. Prashant et al. 2026, arXiv:2605.20005.
//! m <- a m + (1 - a) L, m_0 = the first loss;  factor = min(sqrt(r / (m + eps)), cap), at least `floor`
//! L loss of the step's batch in nats   m smoothed loss   r reference: 1 nat, or the first loss
//! What one step can cost old skills is bounded by C1 rate sqrt(L) + C2 rate^2 L, so rate * sqrt(L) is held constant: tokens of high loss
//! keep their full weight in the direction, only the step shrinks. With r = 1 the rate at a smoothed loss of 1 nat is `learning_rate`; with
//! the first loss as reference and `cap = 1` the rule scales an ordinary rate down while the loss is above where it began.

use super::schedule::Span;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// `optim.schedule.finch`: takes the place of a decay. The first steps may still warm up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Finch {
    pub warmup: Span,
    /// Weight of the past in the smoothed loss.
    pub smoothing: f64,
    /// The factor's upper limit.
    pub cap: f64,
    /// The factor's lower limit.
    pub floor: f64,
    /// Added to the smoothed loss, nats.
    pub eps: f64,
    pub reference: Reference,
}

/// The loss at which the factor is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// 1 nat, as published.
    OneNat,
    /// The run's first loss.
    First,
}

/// The paper's: 0.9, and a ceiling of 5e-5 over a base rate of 2e-5.
impl Default for Finch {
    fn default() -> Self {
        Self { warmup: Span::Steps(0), smoothing: 0.9, cap: 2.5, floor: 0.0, eps: 1e-8, reference: Reference::OneNat }
    }
}

/// What the rule made of a step's loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Nats.
    pub smoothed_loss: f64,
    /// What the rate is multiplied by.
    pub factor: f64,
    /// Whether a limit decided, and not the loss.
    pub limited: bool,
}

/// What the rule remembers, exactly as checkpoints hold it: smoothed loss, first loss, and 1 once a loss was seen.
pub(super) type State = [f32; 3];

impl Finch {
    /// Takes in the loss of the step to come. A loss that is not finite changes nothing.
    pub(super) fn observe(&self, state: &mut State, loss: f64) {
        if !loss.is_finite() {
            return;
        }
        let [smoothed, _, seen] = *state;
        *state = match seen {
            0.0 => [loss as f32, loss as f32, 1.0],
            _ => [(self.smoothing * f64::from(smoothed) + (1.0 - self.smoothing) * loss) as f32, state[1], 1.0],
        };
    }

    /// The rule itself; 1 before any loss was seen.
    pub(super) fn decide(&self, [smoothed, first, seen]: &State) -> Decision {
        let smoothed_loss = f64::from(*smoothed);
        if *seen == 0.0 {
            return Decision { smoothed_loss, factor: 1.0, limited: false };
        }
        let reference = match self.reference {
            Reference::OneNat => 1.0,
            Reference::First => f64::from(*first) + self.eps,
        };
        let wanted = (reference / (smoothed_loss.max(0.0) + self.eps)).sqrt();
        let factor = wanted.clamp(self.floor, self.cap);
        Decision { smoothed_loss, factor, limited: factor != wanted }
    }

    /// Whether the numbers are ones the formula can take.
    pub(super) fn check(&self) -> Result<()> {
        let sound = [
            ("smoothing", self.smoothing, (0.0..1.0).contains(&self.smoothing), "0.9 is usual"),
            ("cap", self.cap, self.cap > 0.0 && self.cap.is_finite(), "2.5 is usual"),
            ("floor", self.floor, self.floor >= 0.0 && self.floor <= self.cap, "give a number from 0 to the cap"),
            ("eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "1e-8 is usual"),
        ];
        match sound.into_iter().find(|(_, _, holds, _)| !holds) {
            Some((key, value, _, fix)) => {
                Err(Error::input(format!("optim.schedule.finch.{key}"), format!("{value} is out of range")).fix(fix))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rule: &Finch, losses: &[f64]) -> Vec<Decision> {
        let mut state = State::default();
        let decide = |&loss: &f64| {
            rule.observe(&mut state, loss);
            rule.decide(&state)
        };
        losses.iter().map(decide).collect()
    }

    #[test]
    fn rate_times_root_loss_is_constant_while_uncapped() {
        let losses: Vec<f64> = (0..60).map(|i| 6.0 / (1.0 + 0.2 * f64::from(i)) + 0.3 * f64::from(i % 3)).collect();
        let decisions = run(&Finch::default(), &losses);
        assert!(decisions.iter().any(|d| d.smoothed_loss > 2.0) && decisions.iter().all(|d| d.factor > 0.0 && d.factor <= 2.5));
        for d in decisions.iter().filter(|d| !d.limited) {
            assert!((d.factor * (d.smoothed_loss + 1e-8).sqrt() - 1.0).abs() < 1e-12);
        }
        assert!((decisions[1].smoothed_loss - (0.9 * losses[0] + 0.1 * losses[1])).abs() < 1e-6);
    }

    #[test]
    fn a_higher_loss_never_raises_the_rate() {
        let factors: Vec<f64> = [0.01, 0.16, 0.5, 1.0, 4.0, 12.0].iter().map(|&loss| run(&Finch::default(), &[loss])[0].factor).collect();
        assert_eq!((factors[0], factors[3], factors[4]), (2.5, 1.0 / (1.0 + 1e-8f64).sqrt(), (1.0 / (4.0 + 1e-8f64)).sqrt()));
        assert!(factors.windows(2).all(|pair| pair[1] <= pair[0]), "{factors:?}");
    }

    #[test]
    fn the_first_loss_as_reference_scales_an_ordinary_rate_down() {
        let rule = Finch { reference: Reference::First, cap: 1.0, floor: 0.1, ..Finch::default() };
        let decisions = run(&rule, &[3.0, 3.0, 1.0, 3.0, 400.0, 4000.0]);
        assert_eq!((decisions[0].factor, decisions[1].factor, decisions[2].factor), (1.0, 1.0, 1.0));
        assert!(decisions[4].factor < 0.3 && decisions[5].factor == 0.1 && decisions[5].limited);
    }

    #[test]
    fn a_loss_that_is_not_finite_changes_nothing() {
        let with = run(&Finch::default(), &[3.0, f64::NAN, f64::INFINITY, 2.0]);
        let without = run(&Finch::default(), &[3.0, 2.0]);
        assert_eq!((with[1], with[3]), (with[0], without[1]));
    }

    #[test]
    fn impossible_numbers_are_refused_by_key() {
        for (text, key) in [("smoothing = 1.0", "smoothing"), ("cap = 0.0", "cap"), ("floor = 3.0", "floor"), ("eps = 0.0", "eps")] {
            let error = toml::from_str::<Finch>(text).unwrap().check().unwrap_err();
            assert!(error.to_string().starts_with(&format!("optim.schedule.finch.{key}: ")), "{error}");
        }
    }
}
