//! `osprey train --verify-resume`: proves on the user's own recipe that interruption does not change the result.

use super::Status;
use super::printer::Printer;
use super::train::session;
use crate::checkpoint::{self, folder_name};
use crate::error::{Error, Result};
use crate::recipe::Assembled;
use std::path::{Path, PathBuf};

/// Steps before and after the interruption: enough for the optimizer's state, the data's order and the schedule to matter.
const HALF: u64 = 5;

/// Trains 2N steps at once, and N steps, resumed for N more, in a folder of its own; compares the bytes of weights and optimizer state.
pub(super) fn run(mut assembled: Assembled, printer: &mut Printer) -> Result<Status> {
    let steps = (2 * HALF).min(assembled.setup.train.steps);
    let base = assembled.setup.run_dir.join("verify-resume");
    if base.exists() {
        std::fs::remove_dir_all(&base).map_err(Error::io("remove", &base))?;
    }
    let whole = attempt(&mut assembled, &base.join("whole"), &[steps], printer)?;
    let parts = attempt(&mut assembled, &base.join("interrupted"), &[steps / 2, steps], printer)?;
    let mut equal = true;
    for file in [assembled.setup.weights_file(), "optimizer.safetensors"] {
        let same = checkpoint::open(&whole)?.bytes(file)? == checkpoint::open(&parts)?.bytes(file)?;
        printer.data(format!("{file}: {}", if same { "equal to the last bit" } else { "DIFFERENT" }))?;
        equal &= same;
    }
    std::fs::remove_dir_all(&base).map_err(Error::io("remove", &base))?;
    Ok(if equal { Status::Done } else { Status::FellShort })
}

/// Trains in `dir`, stopping after each of `stops`, and returns the last checkpoint.
fn attempt(assembled: &mut Assembled, dir: &Path, stops: &[u64], printer: &mut Printer) -> Result<PathBuf> {
    assembled.setup.run_dir = dir.to_owned();
    for &stop in stops {
        session(assembled, "auto", Some(stop), printer)?;
    }
    Ok(dir.join(folder_name(stops[stops.len() - 1])))
}
