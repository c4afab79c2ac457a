//! Typed recipes: TOML, overrides from the command line, and errors that name the line, the key and the nearest valid key.
//!
//! A recipe is one field per stage, each of the stage's own `Config` type with `deny_unknown_fields`; choices are externally tagged enums,
//! because serde buffers `flatten`, untagged and internally tagged values and loses the line numbers.

mod assemble;
mod explain;
mod finish;
mod load;
mod overrides;
pub mod run;
mod schema;
mod suggest;

pub use assemble::{Assembled, Batches, Origin, assemble, device};
pub use finish::{CacheConfig, ExportConfig, MERGE_LIMIT, ValidateConfig};
pub use load::{load, parse, to_toml};
pub use schema::keys;

use serde::{Deserialize, Serialize};

/// What was typed: one field per stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub run: run::Config,
    /// The model to build; a fine-tuning run has its base's instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<crate::model::Config>,
    /// The model to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finetune: Option<crate::train::finetune::Config>,
    pub data: crate::data::Config,
    #[serde(default)]
    pub optim: crate::optim::Config,
    pub train: crate::train::Config,
    #[serde(default)]
    pub eval: crate::train::EvalConfig,
    #[serde(default)]
    pub checkpoint: crate::checkpoint::Config,
    #[serde(default)]
    pub export: ExportConfig,
    #[serde(default)]
    pub validate: ValidateConfig,
    /// What `osprey bench finetune` measures and compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forgetting: Option<crate::validate::forgetting::Config>,
}
