//! Many short trainings of one recipe with different settings, each remembered the moment it is done: the same command goes on where it was
//! interrupted, and repeats nothing.

use super::printer::Printer;
use crate::error::{Error, Result};
use crate::recipe::{Recipe, assemble, to_toml};
use crate::train::metrics::Record;
use crate::train::{Monitor, State, run};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// One training.
pub(super) struct Trial {
    /// What tells it from the others, for people and for the file of results.
    pub(super) label: String,
    pub(super) recipe: Recipe,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) label: String,
    /// Of the whole recipe: a finding counts for the very recipe it was made with.
    pub(super) recipe: String,
    pub(super) steps: u64,
    pub(super) seconds: f64,
    /// Held-out, nats per token; absent when the run diverged.
    pub(super) loss: Option<f64>,
    pub(super) loss_quantized: Option<f64>,
    pub(super) kurtosis: Option<f64>,
}

/// Runs trials one after the other and keeps what they found in `FOLDER/findings.jsonl`.
pub(super) struct Sweep<'p> {
    folder: PathBuf,
    known: BTreeMap<String, Finding>,
    printer: &'p Printer,
    begun: bool,
}

impl<'p> Sweep<'p> {
    /// Goes on with what `folder` holds.
    pub(super) fn open(folder: &Path, printer: &'p Printer) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = folder.join("findings.jsonl");
        let text = if path.exists() { std::fs::read_to_string(&path).map_err(Error::io("read", &path))? } else { String::new() };
        // A line cut short by the end of the program is run again.
        let known = text.lines().filter_map(|line| serde_json::from_str(line).ok()).map(|found: Finding| (found.recipe.clone(), found));
        Ok(Self { folder: folder.to_owned(), known: known.collect(), printer, begun: false })
    }

    /// The finding of `trial`, from the file or from training now.
    pub(super) fn find(&mut self, trial: Trial) -> Result<Finding> {
        let key = key(&trial.recipe)?;
        if let Some(found) = self.known.get(&key) {
            return Ok(found.clone());
        }
        if !std::mem::replace(&mut self.begun, true) {
            self.printer.note(format!("results are kept in {}", self.folder.join("findings.jsonl").display()));
        }
        let found = self.train(trial, key)?;
        self.keep(&found)?;
        self.known.insert(found.recipe.clone(), found.clone());
        Ok(found)
    }

    /// Seconds per step of each of `recipes`, measured once for all of them together and then remembered.
    pub(super) fn costs(&self, recipes: &[Recipe], measure: impl FnOnce(&[Recipe]) -> Result<Vec<f64>>) -> Result<Vec<f64>> {
        let path = self.folder.join("costs.json");
        let key = recipes.iter().map(key).collect::<Result<Vec<_>>>()?;
        let kept = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<(Vec<String>, Vec<f64>)>(&bytes).ok());
        if let Some((_, costs)) = kept.filter(|(known, costs)| *known == key && costs.len() == key.len()) {
            return Ok(costs);
        }
        self.printer.note("timing a step of every arm, alternating: let nothing else run");
        let costs = measure(recipes)?;
        let text = serde_json::to_string(&(key, &costs)).map_err(|error| Error::file(&path, error))?;
        std::fs::write(&path, text).map_err(Error::io("write", &path))?;
        Ok(costs)
    }

    fn train(&self, trial: Trial, key: String) -> Result<Finding> {
        let folder = self.folder.join("run");
        if folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
        }
        let mut recipe = trial.recipe;
        recipe.run.dir = folder.display().to_string();
        let steps = recipe.train.steps;
        let mut assembled = assemble(recipe, Path::new("recipe.toml"), candle_core::Device::Cpu, &mut |_| ())?;
        assembled.setup.checkpoint.every = 0;
        let started = Instant::now();
        let mut feed = assembled.feed(None)?;
        let state = State::fresh(&assembled.setup)?;
        let stop = AtomicBool::new(false);
        let outcome = run(&assembled.setup, state, &mut feed, &assembled.validation(), &stop, &mut Silent);
        let seconds = started.elapsed().as_secs_f64();
        // A rate that is too high is an answer, not a failure of the sweep.
        let evaluation = outcome.ok().and_then(|outcome| outcome.evaluation).filter(|found| found.loss.is_finite());
        let found = Finding {
            label: trial.label,
            recipe: key,
            steps,
            seconds,
            loss: evaluation.as_ref().map(|found| found.loss),
            loss_quantized: evaluation.as_ref().map(|found| found.loss_quantized),
            kurtosis: evaluation.as_ref().map(|found| found.statistics.kurtosis_mean()),
        };
        let loss = found.loss.map_or_else(|| "diverged".to_owned(), |loss| format!("{loss:.4}"));
        self.printer.note(format!("{:<56} {steps:>6} steps {seconds:>6.1} s  held-out loss {loss}", found.label));
        Ok(found)
    }

    fn keep(&self, found: &Finding) -> Result<()> {
        let path = self.folder.join("findings.jsonl");
        let line = serde_json::to_string(found).map_err(|error| Error::file(&path, error))? + "\n";
        let mut file = File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        file.write_all(line.as_bytes()).map_err(Error::io("write", &path))
    }
}

/// What a finding is remembered by: everything that decides it.
fn key(recipe: &Recipe) -> Result<String> {
    Ok(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(to_toml(recipe)?.as_bytes())))
}

struct Silent;

impl Monitor for Silent {
    fn record(&mut self, _: &Record) {}
    fn stepped(&mut self, _: u64, _: f64) {}
    fn note(&mut self, _: &str) {}
}

/// Mean with the half-width of its 95% interval (Student's t); none when a value is missing.
pub(super) fn interval(values: &[Option<f64>]) -> Option<(f64, f64)> {
    let values: Vec<f64> = values.iter().copied().collect::<Option<_>>()?;
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return Some((mean, f64::NAN));
    }
    let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (count - 1.0);
    Some((mean, quantile(values.len() - 1) * (variance / count).sqrt()))
}

/// The 97.5% quantile of Student's t with `freedom` degrees of freedom (standard tables).
fn quantile(freedom: usize) -> f64 {
    const TABLE: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    TABLE.get(freedom - 1).copied().unwrap_or(1.96)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_students() {
        let (mean, half) = interval(&[Some(1.0), Some(2.0), Some(3.0)]).unwrap();
        assert!((mean - 2.0).abs() < 1e-12 && (half - 4.303 / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(interval(&[Some(1.0), None]), None);
        assert!(interval(&[Some(5.0)]).unwrap().1.is_nan());
    }
}
