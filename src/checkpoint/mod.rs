//! Atomic, hashed, resumable checkpoints.
//!
//! `RUN/step-NNNNNN/` is a Hugging Face directory with the trainer's state beside it and a manifest that names every file with its size and
//! hashes. It is written aside, synced and renamed, so a folder of that name is either whole or was damaged later, which opening it finds.

mod claim;
mod digest;
mod manifest;
mod open;
mod retain;
mod save;
mod tensors;
#[cfg(test)]
mod whole;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use claim::{Claim, claim};
pub use manifest::{Entry, MANIFEST, Manifest};
pub use open::{Checkpoint, Found, latest, open};
pub use retain::{Saved, best, doomed, prune};
pub use save::{Meta, Payload, save};
pub use tensors::{Tensor, TensorFile};

/// Keys of `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Steps between checkpoints; 0 saves only at the end and on a signal.
    pub every: u64,
    /// Newest checkpoints kept, beside the best one; 0 keeps all.
    pub keep_last: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { every: 500, keep_last: 2 }
    }
}

/// Name of the folder of step `step`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The step a folder name stands for; none for any other spelling.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

/// The checkpoint folders of a run with their steps, oldest first, unopened. A run folder that does not exist has none.
///
/// # Errors
/// The folder cannot be listed.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut all = Vec::new();
    for path in entries(run_dir)? {
        let step = path.file_name().and_then(|name| name.to_str()).and_then(step_of);
        if let Some(step) = step
            && path.is_dir()
        {
            all.push((step, path));
        }
    }
    all.sort();
    Ok(all)
}

/// Paths in `dir` in name order; none when it does not exist.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let mut paths = listing.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(Error::io("list", dir))?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_names_sort_and_read_back() {
        for step in [0, 7, 999_999, 1_000_000, 12_345_678] {
            assert_eq!(step_of(&folder_name(step)), Some(step));
        }
        for name in ["step-7", "step-0000007", "step-", "step-00000x", "latest", ".step-000007.tmp-1"] {
            assert_eq!(step_of(name), None, "{name}");
        }
    }

    #[test]
    fn only_checkpoint_folders_are_listed_oldest_first() {
        let run = tempfile::tempdir().expect("a folder");
        for name in ["step-1000000", "step-000200", "step-000030", "other", ".step-000300.tmp-5"] {
            std::fs::create_dir(run.path().join(name)).expect("creates");
        }
        std::fs::write(run.path().join("step-000001"), "a file").expect("writes");
        let steps: Vec<u64> = list(run.path()).expect("lists").into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [30, 200, 1_000_000]);
        assert!(list(&run.path().join("absent")).expect("lists").is_empty());
    }
}
