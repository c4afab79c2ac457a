//! The `[run]` table: where a run lives and what makes it repeatable.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Keys of `[run]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder of checkpoints, metrics and the resolved recipe.
    pub dir: String,
    /// Seed of every random stream: initialization, data order, sampling. A TOML integer, so at most 2^63 - 1.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Compute threads; all cores when absent. Part of what makes two runs bit-equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

fn default_seed() -> u64 {
    1
}

impl Config {
    /// Refuses values no run can have.
    pub fn check(&self) -> Result<()> {
        if self.dir.trim().is_empty() {
            return Err(Error::input("run.dir", "is empty").fix("name a folder, such as `checkpoints/first`"));
        }
        if let Some(threads) = self.threads.filter(|threads| !(1..=4096).contains(threads)) {
            let cause = format!("{threads} is outside 1 to 4096");
            return Err(Error::input("run.threads", cause).fix("give the number of cores, or leave the key out to use every one"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_keys_have_defaults_and_impossible_ones_are_refused() {
        let run: Config = toml::from_str("dir = 'out'").expect("valid");
        assert_eq!(run, Config { dir: "out".into(), seed: 1, threads: None });
        assert!(run.check().is_ok());
        assert!(Config { threads: Some(0), ..run.clone() }.check().is_err());
        assert!(Config { dir: " ".into(), ..run }.check().is_err());
    }
}
