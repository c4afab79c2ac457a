//! What a model knows, measured alike before and after fine-tuning: the loss on general text, tasks, the skills of the built-in corpus,
//! and the loss on held-out answers of the new data. What the first three lose is forgotten, what the last gains is learned.

use super::documents::{self, Document, Protocol};
use super::evaluate::{ROWS, evaluate};
use super::rows::log_sum_exp;
use super::skills::{SkillScore, skills};
use super::tasks::{TaskScore, task};
use crate::data::config::SourceConfig;
use crate::data::{Probe, builtin, skill_probes};
use crate::error::{Error, Result};
use crate::infer::cache::Options;
use crate::infer::sampler::argmax;
use crate::infer::{Engine, Session};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// `[forgetting]` of a recipe: what is measured, and what `osprey bench finetune` compares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// General text that the base knows.
    pub text: PathBuf,
    /// What stands between its documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// How many of its documents are measured.
    #[serde(default = "default_documents")]
    pub documents: usize,
    /// Files of questions by the names of the tasks.
    #[serde(default)]
    pub tasks: BTreeMap<String, PathBuf>,
    /// Most questions of a task.
    #[serde(default = "default_questions")]
    pub questions: usize,
    /// Questions for each skill of the built-in corpus, for bases that were trained on it.
    #[serde(default)]
    pub probes: usize,
    /// The rates that every method is tried with.
    pub rates: Vec<f64>,
    /// Each method and rate is run with each of these seeds.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// What replay mixes in; its weight is its share of the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<SourceConfig>,
    /// A document whose table is rebuilt, between the lines that mark it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<PathBuf>,
}

fn default_documents() -> usize {
    100
}

fn default_questions() -> usize {
    500
}

fn default_seeds() -> Vec<u64> {
    vec![1, 2, 3]
}

/// The seed of skill probes: no training document has it.
const PROBE_SEED: u64 = u64::MAX;

impl Config {
    /// Refuses what cannot be compared.
    ///
    /// # Errors
    /// The recipe's mistake, with its key.
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, cause: &str, fix: &str| Err(Error::input(format!("forgetting.{key}"), cause).fix(fix));
        if self.rates.is_empty() || self.rates.iter().any(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return wrong("rates", "is not a list of positive numbers", "give five rates, each some three times the one before");
        }
        if self.seeds.is_empty() {
            return wrong("seeds", "is empty", "give three seeds");
        }
        if self.documents == 0 {
            return wrong("documents", "is 0", "give at least 1");
        }
        Ok(())
    }
}

/// A held-out conversation: ids, and how much each counts as a target.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
}

/// What models are measured with.
pub struct Yardstick {
    documents: Vec<Document>,
    tasks: BTreeMap<String, PathBuf>,
    questions: usize,
    probes: Vec<Probe>,
    answers: Vec<Sequence>,
}

/// Where a model stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// Nats per token of general text.
    pub general_nll: f64,
    /// Nats per token of held-out answers.
    pub new_nll: f64,
    /// Accuracy by task.
    pub tasks: BTreeMap<String, f64>,
    /// Share of solved probes by skill.
    pub skills: BTreeMap<String, f64>,
}

impl Yardstick {
    /// Reads what `config` names, for `base` and what is made from it. `answers` come from the new data.
    ///
    /// # Errors
    /// A file is missing or malformed, the base has no tokenizer, or there are no held-out answers.
    pub fn new(config: &Config, base: &Engine, answers: Vec<Sequence>) -> Result<Self> {
        config.check()?;
        let protocol = Protocol { separator: config.separator.clone(), max_documents: Some(config.documents) };
        if answers.is_empty() {
            return Err(Error::input("data.validation", "there are no held-out conversations to measure learning with")
                .fix("hold some out with validation.every = 20"));
        }
        Ok(Self {
            documents: documents::read(&config.text, &protocol, base.tokenizer()?, base.spec().context)?,
            tasks: config.tasks.clone(),
            questions: config.questions,
            probes: if config.probes > 0 { skill_probes(&builtin::Config::default(), PROBE_SEED, config.probes) } else { Vec::new() },
            answers,
        })
    }

    /// Measures `engine`.
    ///
    /// # Errors
    /// As [`evaluate()`], [`task()`] and [`skills()`].
    pub fn measure(&self, engine: &Engine) -> Result<Standing> {
        let cache = Options::default();
        let tasks = self.tasks.iter().map(|(name, path)| Ok((name.clone(), task(engine, path, self.questions, cache)?)));
        let tasks = tasks.collect::<Result<BTreeMap<String, TaskScore>>>()?;
        let skills: Vec<SkillScore> = if self.probes.is_empty() { Vec::new() } else { skills(engine, &self.probes, cache)? };
        Ok(Standing {
            general_nll: evaluate(engine, &self.documents, cache, |_| ())?.nll_per_token,
            new_nll: answers(engine, &self.answers, cache)?.nll_per_token,
            tasks: tasks.into_iter().map(|(name, score)| (name, score.accuracy)).collect(),
            skills: skills.iter().map(|score| (score.skill.name().to_owned(), score.share())).collect(),
        })
    }
}

/// How a model does on answers that it did not learn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answers {
    /// Mean loss over the trained tokens, by weight, in nats.
    pub nll_per_token: f64,
    /// Share of the special tokens that end answers which are the likeliest where they stand: what makes generation stop.
    pub ended: f64,
}

/// Runs `engine` over `sequences`.
///
/// # Errors
/// An id is beyond the vocabulary, or the model gives a loss that is not finite.
pub fn answers(engine: &Engine, sequences: &[Sequence], cache: Options) -> Result<Answers> {
    let tokenizer = engine.tokenizer()?;
    let (mut ends, mut ended) = (0usize, 0usize);
    let (dim, vocab, context) = (engine.spec().dim, engine.spec().vocab, engine.spec().context);
    let mut session = Session::new(engine, cache, context)?;
    let (mut sum, mut weight) = (0.0, 0.0);
    for Sequence { ids, weights } in sequences {
        let inputs = ids.len().saturating_sub(1).min(context);
        session.truncate(0);
        let hidden = session.hidden(&ids[..inputs])?;
        let trained: Vec<usize> = (0..inputs).filter(|&at| weights[at + 1] > 0.0).collect();
        for places in trained.chunks(ROWS) {
            let rows: Vec<f32> = places.iter().flat_map(|&at| &hidden[at * dim..(at + 1) * dim]).copied().collect();
            let logits = engine.logits(&rows)?;
            for (row, &at) in logits.chunks(vocab).zip(places) {
                let target = row.get(ids[at + 1] as usize).copied().unwrap_or(f32::NAN);
                sum += f64::from(weights[at + 1]) * (log_sum_exp(row) - f64::from(target));
                weight += f64::from(weights[at + 1]);
                if tokenizer.is_special(ids[at + 1]) {
                    ends += 1;
                    ended += usize::from(argmax(row) == ids[at + 1]);
                }
            }
        }
    }
    let mean = sum / weight;
    if mean.is_finite() {
        return Ok(Answers { nll_per_token: mean, ended: ended as f64 / ends.max(1) as f64 });
    }
    Err(Error::input("model", "gives no finite loss on the held-out answers").fix("check the data with `osprey data`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::testing::{Artifact, dense, ids, training_logits, weights};

    #[test]
    fn answers_count_by_their_weights() {
        let spec = dense();
        let masters = weights(&spec, 1);
        let engine = Artifact::checkpoint(&spec, &masters).engine();
        let sequence = |count: usize, seed: u64| Sequence {
            ids: ids(count, spec.vocab, seed),
            weights: (0..count).map(|at| [0.0, 1.0, 0.5][(at + seed as usize) % 3]).collect(),
        };
        // The last is longer than the context of 200.
        let sequences = [sequence(70, 1), sequence(150, 2), sequence(260, 3)];
        let (mut sum, mut weight) = (0.0, 0.0);
        for Sequence { ids, weights } in &sequences {
            let inputs = (ids.len() - 1).min(200);
            let logits = training_logits(&spec, &masters, &ids[..inputs]);
            for at in 0..inputs {
                let row = &logits[at * spec.vocab..(at + 1) * spec.vocab];
                let log_sum = row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
                sum += f64::from(weights[at + 1]) * (log_sum - f64::from(row[ids[at + 1] as usize]));
                weight += f64::from(weights[at + 1]);
            }
        }
        let found = answers(&engine, &sequences, Options::default()).unwrap().nll_per_token;
        assert!((found - sum / weight).abs() < 1e-5, "{found} {}", sum / weight);
        assert!(answers(&engine, &[], Options::default()).is_err());
    }

    #[test]
    fn comparisons_that_say_nothing_are_refused() {
        let config = |extra: &str| toml::from_str::<Config>(&format!("text = \"a.txt\"\n{extra}")).unwrap();
        assert!(config("rates = [1e-3]").check().is_ok());
        for wrong in ["rates = []", "rates = [-1.0]", "rates = [1e-3]\nseeds = []", "rates = [1e-3]\ndocuments = 0"] {
            assert!(config(wrong).check().unwrap_err().to_string().starts_with("forgetting."), "{wrong}");
        }
    }
}
