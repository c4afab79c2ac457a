//! Which checkpoints stay: the newest few and the best by quantized validation loss.

use std::fs;
use std::path::{Path, PathBuf};

use super::claim;
use super::manifest::Manifest;
use super::{list, save};
use crate::error::{Error, Result};

/// A checkpoint as the decision sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Quantized validation loss where it was measured.
    pub loss: Option<f64>,
}

/// Step of the lowest loss, the earlier of equals; none when no finite loss was measured.
pub fn best(saved: &[Saved]) -> Option<u64> {
    let measured = saved.iter().filter_map(|one| Some((one.loss.filter(|loss| loss.is_finite())?, one.step)));
    measured.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(_, step)| step)
}

/// Steps to delete: all but the newest `keep_last` and the best. 0 deletes nothing.
pub fn doomed(saved: &[Saved], keep_last: usize) -> Vec<u64> {
    if keep_last == 0 {
        return Vec::new();
    }
    let best = best(saved);
    let mut steps: Vec<u64> = saved.iter().map(|one| one.step).collect();
    steps.sort_unstable();
    let older = steps.len().saturating_sub(keep_last);
    steps.truncate(older);
    steps.retain(|&step| Some(step) != best);
    steps
}

/// Deletes from a run's folder what [`doomed`] says and returns the deleted folders. One whose manifest is damaged neither counts nor goes.
///
/// # Errors
/// The system refuses.
pub fn prune(run_dir: &Path, keep_last: usize) -> Result<Vec<PathBuf>> {
    let mut saved = Vec::new();
    for (step, dir) in list(run_dir)? {
        if let Ok(manifest) = Manifest::read(&dir) {
            saved.push(Saved { step, loss: manifest.val_loss_quantized });
        }
    }
    doomed(&saved, keep_last).into_iter().map(|step| remove(run_dir, step)).collect()
}

/// Renames before deleting, so that a kill in between leaves no checkpoint with missing files. The name is one that the sweep deletes.
fn remove(run_dir: &Path, step: u64) -> Result<PathBuf> {
    let dir = run_dir.join(super::folder_name(step));
    let hidden = run_dir.join(claim::aside_name(step));
    fs::rename(&dir, &hidden).map_err(Error::io("remove", &dir))?;
    save::sync_dir(run_dir)?;
    fs::remove_dir_all(&hidden).map_err(Error::io("remove", &hidden))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(losses: &[(u64, Option<f64>)]) -> Vec<Saved> {
        losses.iter().map(|&(step, loss)| Saved { step, loss }).collect()
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let all = saved(&[(10, Some(3.0)), (20, Some(1.0)), (30, Some(2.0)), (40, None), (50, Some(1.5))]);
        assert_eq!(doomed(&all, 2), [10, 30]);
        assert_eq!(doomed(&all, 1), [10, 30, 40]);
        assert!(doomed(&all, 5).is_empty());
        assert!(doomed(&all, 0).is_empty());
        assert!(doomed(&[], 1).is_empty());
    }

    #[test]
    fn the_best_is_finite_and_the_earlier_of_equals() {
        assert_eq!(best(&saved(&[(1, Some(f64::NAN)), (2, Some(f64::NEG_INFINITY)), (3, Some(2.0)), (4, Some(2.0))])), Some(3));
        assert_eq!(best(&saved(&[(1, None), (2, Some(f64::NAN))])), None);
    }

    proptest::proptest! {
        #[test]
        fn never_deletes_the_newest_or_the_best(losses in proptest::collection::vec(proptest::option::of(0.0f64..4.0), 1..20), keep in 1usize..6) {
            let all: Vec<Saved> = losses.iter().enumerate().map(|(i, &loss)| Saved { step: i as u64 * 10, loss }).collect();
            let gone = doomed(&all, keep);
            let left: Vec<u64> = all.iter().map(|one| one.step).filter(|step| !gone.contains(step)).collect();
            assert!(left.contains(&all.last().expect("not empty").step));
            assert!(best(&all).is_none_or(|step| left.contains(&step)));
            assert!(left.len() <= keep + 1 && left.len() >= keep.min(all.len()));
        }
    }
}
