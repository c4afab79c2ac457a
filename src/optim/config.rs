//! `[optim]` of a recipe.

use serde::{Deserialize, Serialize};

use super::RuleName;
use super::adamw::Adamw;
use super::distance_aware_muon::DistanceAwareMuonConfig;
use super::lion::Lion;
use super::lion_muon::LionMuonConfig;
use super::momentum::Momentum;
use super::nor_muon::NorMuonConfig;
use super::schedule::Schedule;
use super::spectral::Spectral;
use crate::error::{Error, Result};

/// Everything about the update. Each rule's own settings are a table of their own; tables of rules not in use are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What hidden matrices get; everything else gets AdamW.
    pub rule: RuleName,
    /// Peak rate of the hidden matrices.
    pub learning_rate: f64,
    /// Peak rate of embeddings, head and gains; `learning_rate` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adamw_learning_rate: Option<f64>,
    /// Decoupled decay of hidden matrices and head. Gains never decay.
    pub weight_decay: f64,
    /// Decoupled decay of the embedding table.
    pub embedding_weight_decay: f64,
    /// Limit of the norm of all gradients together; 0 for none.
    pub clip: f64,
    /// The rates' factor over the run.
    pub schedule: Schedule,
    pub adamw: Adamw,
    /// Momentum of `muon`, `nor-muon` and `distance-aware-muon`.
    pub muon: Momentum,
    /// Orthogonalization of all rules that step along an orthogonalized matrix.
    pub spectral: Spectral,
    pub lion: Lion,
    pub lion_muon: LionMuonConfig,
    pub nor_muon: NorMuonConfig,
    pub distance_aware_muon: DistanceAwareMuonConfig,
}

/// Rates of models below 150M parameters; decay as in Liu et al. 2025, arXiv:2502.16982.
impl Default for Config {
    fn default() -> Self {
        Self {
            rule: RuleName::Muon,
            learning_rate: 1e-3,
            adamw_learning_rate: None,
            weight_decay: 0.1,
            embedding_weight_decay: 0.0,
            clip: 1.0,
            schedule: Schedule::default(),
            adamw: Adamw::default(),
            muon: Momentum::default(),
            spectral: Spectral::default(),
            lion: Lion::default(),
            lion_muon: LionMuonConfig::default(),
            nor_muon: NorMuonConfig::default(),
            distance_aware_muon: DistanceAwareMuonConfig::default(),
        }
    }
}

impl Config {
    /// Whether every number is one the formulas can take, for a run of `total_steps`.
    ///
    /// # Errors
    /// The recipe's mistake, with its key.
    pub fn check(&self, total_steps: u64) -> Result<()> {
        let positive = [
            ("learning_rate", self.learning_rate),
            ("adamw_learning_rate", self.adamw_learning_rate.unwrap_or(self.learning_rate)),
            ("adamw.eps", self.adamw.eps),
            ("lion_muon.sign_ratio", self.lion_muon.sign_ratio),
            ("distance_aware_muon.initial", self.distance_aware_muon.initial),
            ("distance_aware_muon.coefficient", self.distance_aware_muon.coefficient),
            ("distance_aware_muon.max_step", self.distance_aware_muon.max_step),
        ];
        let not_negative =
            [("weight_decay", self.weight_decay), ("embedding_weight_decay", self.embedding_weight_decay), ("clip", self.clip)];
        let below_one = [
            ("adamw.beta1", self.adamw.beta1),
            ("adamw.beta2", self.adamw.beta2),
            ("muon.momentum", self.muon.momentum),
            ("muon.warmup_from", self.muon.warmup_from),
            ("lion.beta1", self.lion.beta1),
            ("lion.beta2", self.lion.beta2),
            ("lion_muon.beta1", self.lion_muon.beta1),
            ("lion_muon.beta2", self.lion_muon.beta2),
            ("nor_muon.beta2", self.nor_muon.beta2),
        ];
        require(&positive, "a positive number", |x| x > 0.0 && x.is_finite())?;
        require(&not_negative, "zero or a positive number", |x| x >= 0.0 && x.is_finite())?;
        require(&below_one, "at least 0 and below 1", |x| (0.0..1.0).contains(&x))?;
        self.schedule.check(total_steps)
    }
}

fn require(values: &[(&str, f64)], what: &str, holds: impl Fn(f64) -> bool) -> Result<()> {
    match values.iter().find(|(_, value)| !holds(*value)) {
        Some((key, value)) => Err(Error::input(format!("optim.{key}"), format!("{value} is not {what}")).fix(format!("give {what}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_table_is_the_default_and_the_default_is_fine() {
        assert_eq!(toml::from_str::<Config>("").unwrap(), Config::default());
        Config::default().check(1).unwrap();
        Config::default().check(1_000_000).unwrap();
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = Config { adamw_learning_rate: Some(3e-4), rule: RuleName::LionMuon, ..Config::default() };
        let text = toml::to_string(&config).unwrap();
        assert!(text.contains("rule = \"lion-muon\""), "{text}");
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
    }

    #[test]
    fn unknown_keys_and_rules_are_named() {
        assert!(toml::from_str::<Config>("learning_rat = 1").unwrap_err().message().contains("learning_rat"));
        assert!(toml::from_str::<Config>("adamw.beta3 = 1").unwrap_err().message().contains("beta3"));
        assert!(toml::from_str::<Config>("rule = \"sgd\"").unwrap_err().message().contains("distance-aware-muon"));
    }

    #[test]
    fn impossible_numbers_are_refused_by_key() {
        let cases = [
            ("learning_rate = 0.0", "optim.learning_rate"),
            ("learning_rate = nan", "optim.learning_rate"),
            ("adamw_learning_rate = -1.0", "optim.adamw_learning_rate"),
            ("clip = -1.0", "optim.clip"),
            ("adamw.beta1 = 1.0", "optim.adamw.beta1"),
            ("muon.momentum = 1.5", "optim.muon.momentum"),
            ("weight_decay = inf", "optim.weight_decay"),
        ];
        for (text, key) in cases {
            let error = toml::from_str::<Config>(text).unwrap().check(10).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{key}: ")), "{error}");
        }
    }
}
