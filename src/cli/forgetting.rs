//! `osprey bench finetune`: how much each way of fine-tuning forgets. Every method is run at every rate with every seed; what a run found is
//! kept in its folder, so that the same command goes on where it was stopped.

use super::arguments::Bench;
use super::printer::Printer;
use super::{Status, start_threads, train, write_json};
use crate::data::config::{SourceConfig, find};
use crate::error::{Error, Result};
use crate::infer::Engine;
use crate::optim::{Constant, Decay, Finch, Schedule, Wsd};
use crate::recipe::{Recipe, assemble, load, to_toml};
use crate::validate::forgetting::{Config, Sequence, Standing, Yardstick};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

/// New-task loss within this factor of the best counts as equal.
const EQUAL: f64 = 1.01;

/// The lines between which the table of a document lies.
const MARKS: [&str; 2] = ["<!-- forgetting: begin -->", "<!-- forgetting: end -->"];

/// A way of fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    Constant,
    Wsd,
    Cosine,
    /// Constant, with general text mixed in.
    Replay,
    LossAdaptive,
}

impl Method {
    const ALL: [Self; 5] = [Self::Constant, Self::Wsd, Self::Cosine, Self::Replay, Self::LossAdaptive];

    fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Wsd => "wsd",
            Self::Cosine => "cosine",
            Self::Replay => "replay",
            Self::LossAdaptive => "loss-adaptive",
        }
    }

    /// The recipe's own schedule where it is of this kind.
    fn schedule(self, own: &Schedule) -> Schedule {
        match (self, own) {
            (Self::Constant | Self::Replay, Schedule::Constant(_))
            | (Self::Wsd, Schedule::Wsd(_))
            | (Self::Cosine, Schedule::Cosine(_))
            | (Self::LossAdaptive, Schedule::Finch(_)) => own.clone(),
            (Self::Constant | Self::Replay, _) => Schedule::Constant(Constant::default()),
            (Self::Wsd, _) => Schedule::Wsd(Wsd::default()),
            (Self::Cosine, _) => Schedule::Cosine(Decay::default()),
            (Self::LossAdaptive, _) => Schedule::Finch(Finch::default()),
        }
    }
}

/// What one run found.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Trial {
    method: Method,
    rate: f64,
    seed: u64,
    after: Standing,
}

/// A method at a rate, over the seeds.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    method: Method,
    rate: f64,
    seeds: usize,
    new_nll: Spread,
    /// Rise of the loss on general text, nats per token.
    forgotten: Spread,
    tasks: BTreeMap<String, Spread>,
    skills: BTreeMap<String, Spread>,
}

/// Mean and standard deviation over seeds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    mean: f64,
    deviation: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        Self { mean, deviation: if values.len() > 1 { (squares / (values.len() - 1) as f64).sqrt() } else { 0.0 } }
    }

    fn show(self, digits: usize) -> String {
        format!("{:.digits$} ± {:.digits$}", self.mean, self.deviation)
    }
}

#[derive(Serialize)]
struct Found {
    before: Standing,
    /// The rate of each method that forgets least among those that learn as much as the best.
    chosen: Vec<Summary>,
    all: Vec<Summary>,
}

/// Runs what is missing, and rebuilds the table.
pub(super) fn run(command: &Bench, printer: &Printer) -> Result<Status> {
    let Some(path) = &command.input else {
        return Err(Error::input("osprey bench finetune", "no recipe was given").fix("give one with tables [finetune] and [forgetting]"));
    };
    let recipe: Recipe = load(path, &command.overrides)?;
    recipe.check()?;
    let config = recipe.forgetting.clone().ok_or_else(|| {
        Error::input(path.display(), "has no table [forgetting]").fix("add one with `text` and `rates`: what is measured and tried")
    })?;
    config.check()?;
    start_threads(recipe.run.threads)?;
    let comparison = Comparison::new(&recipe, path, config, printer)?;
    let Some(trials) = comparison.trials()? else {
        printer.note("stopped; the same command continues");
        return Ok(Status::Done);
    };
    let all = summaries(&comparison.before, &trials);
    let found = Found { chosen: choose(&all), before: comparison.before.clone(), all };
    write_json(command.report.json.as_deref(), &found)?;
    let table = table(&found);
    printer.data(table.trim_end())?;
    if let Some(document) = &comparison.config.table {
        replace(&find(document, comparison.folder)?, &table)?;
    }
    Ok(Status::Done)
}

/// Everything the trials share.
struct Comparison<'a> {
    recipe: &'a Recipe,
    path: &'a Path,
    folder: &'a Path,
    config: Config,
    yardstick: Yardstick,
    before: Standing,
    printer: &'a Printer,
}

impl<'a> Comparison<'a> {
    fn new(recipe: &'a Recipe, path: &'a Path, mut config: Config, printer: &'a Printer) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        config.text = find(&config.text, folder)?;
        for file in config.tasks.values_mut() {
            *file = find(file, folder)?;
        }
        let assembled =
            assemble(Recipe { forgetting: None, ..recipe.clone() }, path, candle_core::Device::Cpu, &mut |text| printer.note(text))?;
        let Some(finetune) = &assembled.setup.finetune else {
            return Err(Error::input(path.display(), "has no table [finetune]").fix("add one with the base to fine-tune"));
        };
        let base = Engine::load(&finetune.base)?;
        let answers = assembled.dataset.held_out_sequences().into_iter().map(|(ids, weights)| Sequence { ids, weights }).collect();
        let yardstick = Yardstick::new(&config, &base, answers)?;
        let before = yardstick.measure(&base)?;
        Ok(Self { recipe, path, folder, config, yardstick, before, printer })
    }

    /// Every trial; nothing when told to stop.
    fn trials(&self) -> Result<Option<Vec<Trial>>> {
        let methods = Method::ALL.into_iter().filter(|&method| method != Method::Replay || self.config.replay.is_some());
        let wanted: Vec<(Method, f64, u64)> = methods
            .flat_map(|method| self.config.rates.iter().map(move |&rate| (method, rate)))
            .flat_map(|(method, rate)| self.config.seeds.iter().map(move |&seed| (method, rate, seed)))
            .collect();
        let mut trials = Vec::new();
        for (done, &(method, rate, seed)) in wanted.iter().enumerate() {
            let Some(trial) = self.trial(method, rate, seed)? else { return Ok(None) };
            self.printer.note(format!(
                "{} of {}: {} at {rate:e}, seed {seed}: new {:.4}, general {:+.4}",
                done + 1,
                wanted.len(),
                method.name(),
                trial.after.new_nll,
                trial.after.general_nll - self.before.general_nll
            ));
            trials.push(trial);
        }
        Ok(Some(trials))
    }

    /// One trial: read where it was made before, else trained (or continued) and measured.
    fn trial(&self, method: Method, rate: f64, seed: u64) -> Result<Option<Trial>> {
        let recipe = self.variant(method, rate, seed)?;
        let folder = PathBuf::from(&recipe.run.dir);
        let place = folder.join("trial.json");
        let print = xxh3_64(format!("{}\n{:?}", to_toml(&recipe)?, self.config).as_bytes());
        if let Ok(text) = std::fs::read_to_string(&place) {
            let kept: Kept = serde_json::from_str(&text).map_err(|error| Error::file(&place, error).fix("delete the file"))?;
            if kept.print != format!("{print:016x}") {
                return Err(Error::file(&place, "was made by another recipe").fix("choose another run.dir, or delete the old folder"));
            }
            return Ok(Some(kept.trial));
        }
        let assembled = assemble(recipe, self.path, candle_core::Device::Cpu, &mut |text| self.printer.note(text))?;
        let outcome = train::session(&assembled, "auto", None, &mut Printer::new(true))?;
        if outcome.interrupted {
            return Ok(None);
        }
        let after = self.yardstick.measure(&Engine::load(&outcome.checkpoint)?)?;
        let kept = Kept { print: format!("{print:016x}"), trial: Trial { method, rate, seed, after } };
        write_json(Some(&place), &kept)?;
        Ok(Some(kept.trial))
    }

    /// The recipe of one trial.
    fn variant(&self, method: Method, rate: f64, seed: u64) -> Result<Recipe> {
        let mut recipe = Recipe { forgetting: None, ..self.recipe.clone() };
        recipe.run.seed = seed;
        recipe.run.dir = format!("{}/{}-{rate:e}-seed-{seed}", self.recipe.run.dir, method.name());
        recipe.export.formats.clear();
        recipe.optim.adamw_learning_rate = recipe.optim.adamw_learning_rate.map(|other| other * rate / recipe.optim.learning_rate);
        recipe.optim.learning_rate = rate;
        recipe.optim.schedule = method.schedule(&self.recipe.optim.schedule);
        if let (Method::Replay, Some(replay)) = (method, &self.config.replay) {
            mix(&mut recipe.data.sources, replay)?;
        }
        recipe.check()?;
        Ok(recipe)
    }
}

/// What lies in a trial's folder.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of the recipe and of what was measured.
    print: String,
    trial: Trial,
}

/// Adds `replay`, whose weight is its share of the tokens, to the sources.
fn mix(sources: &mut Vec<SourceConfig>, replay: &SourceConfig) -> Result<()> {
    let share = replay.weight().filter(|share| *share > 0.0 && *share < 1.0).ok_or_else(|| {
        Error::input("forgetting.replay", "has no weight between 0 and 1").fix("give it one, such as 0.1: its share of the tokens")
    })?;
    let weights: Vec<f64> = sources.iter().map(|source| source.weight().unwrap_or(1.0)).collect();
    let total: f64 = weights.iter().sum();
    for (source, weight) in sources.iter_mut().zip(weights) {
        source.set_weight(weight / total * (1.0 - share));
    }
    sources.push(replay.clone());
    Ok(())
}

/// Means and deviations over seeds, in the order of methods and rates.
fn summaries(before: &Standing, trials: &[Trial]) -> Vec<Summary> {
    let mut groups: Vec<Vec<&Trial>> = Vec::new();
    for trial in trials {
        match groups.last_mut() {
            Some(group) if group[0].method == trial.method && group[0].rate == trial.rate => group.push(trial),
            _ => groups.push(vec![trial]),
        }
    }
    let summary = |group: &Vec<&Trial>| {
        let spread = |of: &dyn Fn(&Standing) -> f64| Spread::of(group.iter().map(|trial| of(&trial.after)));
        let each = |names: &BTreeMap<String, f64>, of: &dyn Fn(&Standing, &str) -> f64| {
            names.keys().map(|name| (name.clone(), spread(&|standing| of(standing, name)))).collect()
        };
        Summary {
            method: group[0].method,
            rate: group[0].rate,
            seeds: group.len(),
            new_nll: spread(&|after| after.new_nll),
            forgotten: spread(&|after| after.general_nll - before.general_nll),
            tasks: each(&before.tasks, &|after, name| after.tasks.get(name).copied().unwrap_or(f64::NAN)),
            skills: each(&before.skills, &|after, name| after.skills.get(name).copied().unwrap_or(f64::NAN)),
        }
    };
    groups.iter().map(summary).collect()
}

/// Of each method the rate that forgets least among those whose new-task loss is within one percent of the best there is; where none is,
/// the one that learns most.
fn choose(all: &[Summary]) -> Vec<Summary> {
    let best = all.iter().map(|summary| summary.new_nll.mean).fold(f64::INFINITY, f64::min);
    let of = |method: Method| {
        let own = || all.iter().filter(move |summary| summary.method == method);
        let equal = own().filter(|summary| summary.new_nll.mean <= EQUAL * best);
        let least = equal.min_by(|one, two| one.forgotten.mean.total_cmp(&two.forgotten.mean));
        least.or_else(|| own().min_by(|one, two| one.new_nll.mean.total_cmp(&two.new_nll.mean))).cloned()
    };
    Method::ALL.into_iter().filter_map(of).collect()
}

/// A Markdown table: the base, then each method at its chosen rate.
fn table(found: &Found) -> String {
    let names: Vec<&String> = found.before.tasks.keys().chain(found.before.skills.keys()).collect();
    let mut lines = vec![
        ["method", "rate", "new answers, nats", "general text, nats more"]
            .map(str::to_owned)
            .into_iter()
            .chain(names.iter().map(|name| (*name).clone()))
            .collect(),
        vec!["---".to_owned(); 4 + names.len()],
    ];
    let percent = |share: f64| format!("{:.1}%", share * 100.0);
    let before = &found.before;
    let known = before.tasks.values().chain(before.skills.values()).map(|&share| percent(share));
    let first = ["base".to_owned(), String::new(), format!("{:.4}", before.new_nll), format!("0 ({:.4})", before.general_nll)];
    lines.push(first.into_iter().chain(known).collect::<Vec<String>>());
    for summary in &found.chosen {
        let known = summary.tasks.values().chain(summary.skills.values());
        let known = known.map(|spread| format!("{:.1}% ± {:.1}", spread.mean * 100.0, spread.deviation * 100.0));
        let first = [summary.method.name().to_owned(), format!("{:e}", summary.rate), summary.new_nll.show(4), summary.forgotten.show(4)];
        lines.push(first.into_iter().chain(known).collect());
    }
    lines.iter().map(|cells| format!("| {} |\n", cells.join(" | "))).collect()
}

/// Puts `table` between the marks of a document.
fn replace(document: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(document).map_err(Error::io("read", document))?;
    let places = MARKS.map(|mark| text.find(mark));
    let [Some(begin), Some(end)] = places else {
        return Err(Error::file(document, "has no place for the table").fix(format!("add the lines {} and {}", MARKS[0], MARKS[1])));
    };
    let head = begin + MARKS[0].len();
    if end < head {
        return Err(Error::file(document, "ends the place for the table before it begins").fix("exchange the two marks"));
    }
    let text = format!("{}\n\n{table}\n{}", &text[..head], &text[end..]);
    std::fs::write(document, text).map_err(Error::io("write", document))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(method: Method, rate: f64, seed: u64, new_nll: f64, general_nll: f64) -> Trial {
        let after = Standing { general_nll, new_nll, tasks: [("copa".to_owned(), 0.5)].into(), skills: BTreeMap::new() };
        Trial { method, rate, seed, after }
    }

    #[test]
    fn the_least_forgetful_of_those_that_learn_is_chosen() {
        let before = trial(Method::Constant, 0.0, 0, 3.0, 1.0).after;
        let trials = [
            trial(Method::Constant, 1e-3, 1, 2.0, 1.4),
            trial(Method::Constant, 1e-3, 2, 2.02, 1.6),
            trial(Method::Constant, 1e-2, 1, 2.005, 1.2),
            trial(Method::Constant, 1e-4, 1, 2.5, 1.01),
            trial(Method::LossAdaptive, 1e-3, 1, 2.2, 1.1),
            trial(Method::LossAdaptive, 1e-2, 1, 2.1, 1.3),
        ];
        let all = summaries(&before, &trials);
        assert_eq!((all.len(), all[0].seeds), (5, 2));
        assert!((all[0].forgotten.mean - 0.5).abs() < 1e-12 && (all[0].forgotten.deviation - 0.02f64.sqrt()).abs() < 1e-12);
        let chosen = choose(&all);
        assert_eq!(
            chosen.iter().map(|summary| (summary.method, summary.rate)).collect::<Vec<_>>(),
            [(Method::Constant, 1e-2), (Method::LossAdaptive, 1e-2)]
        );
        let table = table(&Found { before, chosen, all });
        assert!(table.contains("| constant | 1e-2 | 2.0050 ± 0.0000 | 0.2000 ± 0.0000 | 50.0% ± 0.0 |\n"), "{table}");
    }

    #[test]
    fn replay_takes_its_share() {
        let source = |weight: &str| {
            toml::from_str::<crate::data::Config>(&format!("sources = [{{ builtin = {{ {weight} }} }}]")).unwrap().sources.remove(0)
        };
        let mut sources = vec![source("weight = 1.0"), source("weight = 3.0")];
        mix(&mut sources, &source("weight = 0.2")).unwrap();
        let weights: Vec<f64> = sources.iter().map(|source| source.weight().unwrap()).collect();
        assert!(weights.iter().zip([0.2, 0.6, 0.2]).all(|(one, two)| (one - two).abs() < 1e-12), "{weights:?}");
        assert!(mix(&mut sources, &source("")).is_err());
    }

    #[test]
    fn a_table_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.md");
        std::fs::write(&path, format!("before\n{}\nold\n{}\nafter\n", MARKS[0], MARKS[1])).unwrap();
        replace(&path, "| new |\n").unwrap();
        replace(&path, "| new |\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("before\n{}\n\n| new |\n\n{}\nafter\n", MARKS[0], MARKS[1]));
        std::fs::write(&path, "nothing").unwrap();
        assert!(replace(&path, "x").unwrap_err().hint().unwrap().contains("begin"));
    }
}
