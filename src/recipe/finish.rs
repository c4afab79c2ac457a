//! `[export]` and `[validate]` of a recipe: what happens when training is done.

use crate::error::{Error, Result};
use crate::export::Target;
use crate::infer::cache::Options;
use serde::{Deserialize, Serialize};

/// What merging an adapter into a ternary base may cost by default, nats per token: as much as other losses of an export.
pub const MERGE_LIMIT: f64 = 0.05;

/// Artifacts to write from the last checkpoint, into `RUN/export/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// Names as of `osprey export --format`.
    pub formats: Vec<String>,
    /// The most nats per token that merging an adapter into a ternary base may cost, on held-out documents.
    pub merge_limit: f64,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self { formats: Vec::new(), merge_limit: MERGE_LIMIT }
    }
}

impl ExportConfig {
    /// The formats, checked.
    pub fn targets(&self) -> Result<Vec<Target>> {
        self.formats.iter().map(|name| Target::from_name(name).map_err(at_formats)).collect()
    }
}

/// Names the recipe's key, and keeps the list of formats there are.
fn at_formats(error: Error) -> Error {
    match error {
        Error::Input { cause, fix, .. } => Error::Input { place: "export.formats".to_owned(), cause, fix },
        other => other,
    }
}

/// What each artifact is put through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidateConfig {
    /// Held-out documents to compare on; 0 skips validation.
    pub documents: usize,
    /// Questions per skill of the built-in corpus, where the recipe trains on it; 0 asks none.
    pub probes: usize,
    /// A cache and attention that the first artifact is run with as well; absent, only the cache in full precision is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// Prompt of the printed sample; absent prints none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// Length of the sample, and of answers at most.
    pub sample_tokens: usize,
    /// Questions put to a model that was trained on conversations, and to the base it comes from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chat: Vec<String>,
}

impl Default for ValidateConfig {
    fn default() -> Self {
        Self { documents: 0, probes: 0, cache: None, sample: None, sample_tokens: 120, chat: Vec::new() }
    }
}

/// How keys and values are kept and read, as the command line spells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// As `--kv`.
    pub kv: String,
    /// As `--attention`.
    pub attention: String,
    /// As `--epsilon`; absent certifies nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f32>,
    /// As `--certificate`.
    pub certificate: String,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { kv: "int8-int4".to_owned(), attention: "dense".to_owned(), epsilon: None, certificate: "hard".to_owned() }
    }
}

impl CacheConfig {
    /// The settings, checked.
    ///
    /// # Errors
    /// When a name is unknown, epsilon is outside 0 to 1, or settings contradict each other.
    pub fn options(&self) -> Result<Options> {
        if let Some(epsilon) = self.epsilon.filter(|epsilon| !(0.0..=1.0).contains(epsilon)) {
            return Err(Error::input("epsilon", format!("{epsilon} is outside 0 to 1"))
                .fix("give the largest error relative to an output's norm, such as 0.05"));
        }
        let options = Options {
            format: self.kv.parse()?,
            attention: self.attention.parse()?,
            epsilon: self.epsilon,
            certificate: self.certificate.parse()?,
            check: false,
        };
        options.check()?;
        Ok(options)
    }
}
