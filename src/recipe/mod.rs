//! Typed recipes: TOML, overrides from the command line, and errors that name the line, the key and the nearest valid key.
//!
//! A recipe is one field per stage, each of the stage's own `Config` type with `deny_unknown_fields`; choices are externally tagged enums,
//! because serde buffers `flatten`, untagged and internally tagged values and loses the line numbers.

mod explain;
mod load;
mod overrides;
pub mod run;
mod schema;
mod suggest;

pub use load::{load, parse, to_toml};
pub use schema::keys;
