//! One run per folder: a lock held while training, and the sweep of what a killed run left.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::{entries, folder_name, step_of};
use crate::error::{Error, Result};

const LOCK: &str = ".lock";

/// The right to write into a run's folder, given back when dropped or when the process ends in any way.
#[derive(Debug)]
pub struct Claim {
    _lock: File,
}

/// Name of the folder a checkpoint is written in before it is whole.
pub(super) fn aside_name(step: u64) -> String {
    format!(".{}.tmp-{}", folder_name(step), std::process::id())
}

/// Name of a checkpoint that is being replaced or removed.
pub(super) fn old_name(step: u64) -> String {
    format!(".{}.old-{}", folder_name(step), std::process::id())
}

/// Creates `run_dir` where needed, locks it against other runs, and removes half-written checkpoints.
///
/// # Errors
/// Another process trains in this folder, or the system refuses.
pub fn claim(run_dir: &Path) -> Result<Claim> {
    fs::create_dir_all(run_dir).map_err(Error::io("create", run_dir))?;
    let path = run_dir.join(LOCK);
    let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("create", &path))?;
    // A file system without locks (some network mounts) cannot tell; the run goes on.
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        return Err(
            Error::file(run_dir, "another process is training in this folder").fix("wait for it, or give this run a `run.dir` of its own")
        );
    }
    sweep(run_dir)?;
    Ok(Claim { _lock: lock })
}

/// Removes hidden leftovers; a checkpoint that was set aside and never replaced gets its name back.
fn sweep(run_dir: &Path) -> Result<()> {
    for path in entries(run_dir)? {
        let Some((step, kind)) = path.file_name().and_then(|name| name.to_str()).and_then(leftover) else { continue };
        let target = run_dir.join(folder_name(step));
        if kind == "old" && !target.exists() {
            fs::rename(&path, &target).map_err(Error::io("restore", &target))?;
        } else {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Step and kind (`tmp`, `old`) of a leftover's name.
fn leftover(name: &str) -> Option<(u64, &str)> {
    let (folder, rest) = name.strip_prefix('.')?.split_once('.')?;
    let (kind, process) = rest.split_once('-')?;
    let known = matches!(kind, "tmp" | "old") && process.bytes().all(|byte| byte.is_ascii_digit());
    known.then_some((step_of(folder)?, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_folder_is_refused_to_others_until_given_back() {
        let run = tempfile::tempdir().expect("a folder");
        let first = claim(run.path()).expect("free");
        assert!(claim(run.path()).expect_err("taken").to_string().contains("another process is training"));
        drop(first);
        claim(run.path()).expect("free again");
    }

    #[test]
    fn leftovers_go_and_a_displaced_checkpoint_returns() {
        let run = tempfile::tempdir().expect("a folder");
        for name in
            [".step-000001.tmp-12", ".step-000002.old-12", ".step-000003.old-12", "step-000003", ".step-000004.tmp-x", ".git", "notes"]
        {
            fs::create_dir(run.path().join(name)).expect("creates");
        }
        fs::write(run.path().join(".step-000002.old-12/here"), "").expect("writes");
        claim(run.path()).expect("sweeps");
        let mut left: Vec<String> =
            fs::read_dir(run.path()).expect("lists").map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
        left.sort();
        assert_eq!(left, [".git", LOCK, ".step-000004.tmp-x", "notes", "step-000002", "step-000003"]);
        assert!(run.path().join("step-000002/here").exists());
    }
}
