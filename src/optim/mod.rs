//! Optimizer rules, routing, schedules and clipping.
//!
//! A new rule is one file that implements [`Rule`], a variant of [`RuleName`] and its line in [`RuleName::build`]; the tests in
//! `conformance.rs` then run it.

mod adamw;
mod clip;
mod coefficients;
mod config;
mod distance_aware_muon;
mod finch;
mod groups;
mod lion;
mod lion_muon;
mod momentum;
mod muon;
mod nor_muon;
mod optimizer;
mod orthogonalize;
mod reduce;
mod rule;
mod schedule;
pub mod shard;
mod spectral;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod parity;
#[cfg(test)]
mod testing;

use serde::{Deserialize, Serialize};

pub use adamw::Adamw;
pub use clip::{GradientNorm, clip_factor, global_norm, scale};
pub use coefficients::Coefficients;
pub use config::Config;
pub use distance_aware_muon::{DistanceAwareMuon, DistanceAwareMuonConfig};
pub use finch::{Decision, Finch, Reference};
pub use groups::{Assignment, ParameterInfo, Role, Table};
pub use lion::Lion;
pub use lion_muon::{LionMuon, LionMuonConfig};
pub use momentum::Momentum;
pub use muon::Muon;
pub use nor_muon::{NorMuon, NorMuonConfig};
pub use optimizer::{Movement, Optimizer, ParameterSlice, StepReport};
pub use orthogonalize::orthogonalize;
pub use rule::{NotFinite, Rule, StepInfo};
pub use schedule::{Constant, Decay, Schedule, Span, Wsd};
pub use spectral::{Scale, Spectral};

/// Values per piece of parallel work. Fixed, so that sums over pieces do not depend on the number of threads; 16 Ki values of
/// each of AdamW's four arrays fit into a core's second-level cache.
const CHUNK: usize = 1 << 14;

/// The rules, by the names recipes use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleName {
    Adamw,
    Muon,
    Lion,
    LionMuon,
    NorMuon,
    DistanceAwareMuon,
}

impl RuleName {
    pub const ALL: [Self; 6] = [Self::Adamw, Self::Muon, Self::Lion, Self::LionMuon, Self::NorMuon, Self::DistanceAwareMuon];

    /// As written in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adamw => "adamw",
            Self::Muon => "muon",
            Self::Lion => "lion",
            Self::LionMuon => "lion-muon",
            Self::NorMuon => "nor-muon",
            Self::DistanceAwareMuon => "distance-aware-muon",
        }
    }

    /// The rule with its settings from `config`.
    pub fn build(self, config: &Config) -> Box<dyn Rule> {
        let (momentum, spectral) = (config.muon.clone(), config.spectral.clone());
        match self {
            Self::Adamw => Box::new(config.adamw.clone()),
            Self::Muon => Box::new(Muon { momentum, spectral }),
            Self::Lion => Box::new(config.lion.clone()),
            Self::LionMuon => Box::new(LionMuon { config: config.lion_muon.clone(), spectral }),
            Self::NorMuon => Box::new(NorMuon { config: config.nor_muon.clone(), momentum, spectral }),
            Self::DistanceAwareMuon => Box::new(DistanceAwareMuon { config: config.distance_aware_muon.clone(), momentum, spectral }),
        }
    }

    /// Whether each value is updated by itself, so that a parameter may be cut anywhere.
    pub fn is_elementwise(self) -> bool {
        matches!(self, Self::Adamw | Self::Lion)
    }

    /// Whether the configured learning rate sets the step's length.
    pub fn uses_learning_rate(self) -> bool {
        self != Self::DistanceAwareMuon
    }
}

/// Number of values of a tensor.
fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}
