//! What `osprey train` does after the last step: export, run what was exported, compare, and show a sample.

use super::export::Proof;
use super::generate::Settings;
use super::printer::Printer;
use super::{Status, export, generate, model, write_json};
use crate::data::chat::Open;
use crate::data::config::SourceConfig;
use crate::data::{Probe, Skill, builtin, skill_probes};
use crate::error::{Error, Result};
use crate::export::Target;
use crate::export::import::Loaded;
use crate::infer::sampler::Config;
use crate::infer::{Engine, cache};
use crate::model::LinearKind;
use crate::recipe::Assembled;
use crate::train::Outcome;
use crate::validate::forgetting::{self, Sequence};
use crate::validate::{Document, Limits, Options, Report, SkillPair, Verdict, compare, probing};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A model that ends fewer of its answers has not learned to.
const WELL_ENDED: f64 = 0.5;

/// Held-out conversations that the base and the result are compared on.
const MOST_ANSWERS: usize = 200;

#[derive(Serialize)]
struct Finished {
    step: u64,
    checkpoint: PathBuf,
    val_loss: Option<f64>,
    val_loss_quantized: Option<f64>,
    kurtosis_mean: Option<f64>,
    data_wait_fraction: f64,
    artifacts: Vec<Report>,
    /// The first artifact with the cache that the recipe asks for, against itself with an FP16 cache.
    cache: Option<Report>,
}

/// Exports and validates as the recipe asks.
pub(super) fn run(assembled: &Assembled, outcome: &Outcome, json: Option<&Path>, printer: &Printer) -> Result<Status> {
    let folder = assembled.setup.run_dir.join("export");
    let mut reports = vec![];
    show_training(outcome, printer)?;
    show_learning(assembled, outcome, printer)?;
    for target in assembled.recipe.export.targets()? {
        let path = place(&folder, target)?;
        let held_out = |_: &Loaded| Ok(some_held_out(assembled));
        let proof = Proof { documents: &held_out, limit: assembled.recipe.export.merge_limit };
        export::show(&export::artifact(&outcome.checkpoint, target, &path, &proof)?, printer)?;
        if let Some(report) = validate(assembled, &outcome.checkpoint, target, &path)? {
            model::show(&report, printer)?;
            show_chance(assembled, &report, printer)?;
            reports.push(report);
        }
    }
    let cache = validate_cache(assembled, &folder, outcome)?;
    if let Some(report) = &cache {
        printer.data(format!("the same weights with cache {}", model::cache_name(report)))?;
        model::show(report, printer)?;
        show_chance(assembled, report, printer)?;
    }
    sample(assembled, &folder, outcome, printer)?;
    ask(assembled, &folder, outcome, printer)?;
    let evaluation = outcome.evaluation.as_ref();
    let finished = Finished {
        step: outcome.step,
        checkpoint: outcome.checkpoint.clone(),
        val_loss: evaluation.map(|e| e.loss),
        val_loss_quantized: evaluation.map(|e| e.loss_quantized),
        kurtosis_mean: evaluation.map(|e| e.statistics.kurtosis_mean()),
        data_wait_fraction: outcome.data_wait_fraction,
        artifacts: reports,
        cache,
    };
    write_json(json, &finished)?;
    let passed = finished.artifacts.iter().chain(&finished.cache).all(|report| report.verdict == Verdict::Pass);
    Ok(if passed { Status::Done } else { Status::FellShort })
}

fn show_training(outcome: &Outcome, printer: &Printer) -> Result<()> {
    printer.data(format!("step {}: {}", outcome.step, outcome.checkpoint.display()))?;
    let Some(found) = &outcome.evaluation else { return Ok(()) };
    let statistics = &found.statistics;
    printer.data(format!("held-out loss {:.4} nats per token, quantized as deployed {:.4}", found.loss, found.loss_quantized))?;
    let layers = statistics.stream_kurtosis().iter().map(|k| format!("{k:.2}")).collect::<Vec<_>>().join(" ");
    printer.data(format!("excess kurtosis of the stream {:.3} (by layer: {layers})", statistics.kurtosis_mean()))?;
    printer.data(format!(
        "largest activation {:.1}; largest max/rms at the inputs of output and down projections {:.1}{}",
        statistics.largest_in_stream(),
        statistics.largest_ratio_inside(),
        found.zero_fraction.map_or_else(String::new, |zeros| format!("; {:.1}% of ternary codes are zero", zeros * 100.0)),
    ))?;
    if outcome.data_wait_fraction >= 0.01 {
        printer.warn(format!("training waited for data {:.1}% of the time", outcome.data_wait_fraction * 100.0));
    }
    Ok(())
}

/// What fine-tuning on conversations taught: the loss on held-out answers of the base and of what was made from it.
fn show_learning(assembled: &Assembled, outcome: &Outcome, printer: &Printer) -> Result<()> {
    let Some(finetune) = &assembled.setup.finetune else { return Ok(()) };
    let answers = assembled.dataset.held_out_sequences().into_iter().take(MOST_ANSWERS);
    let answers: Vec<Sequence> = answers.map(|(ids, weights)| Sequence { ids, weights }).collect();
    if answers.is_empty() {
        return Ok(());
    }
    let measure = |path: &Path| forgetting::answers(&Engine::load(path)?, &answers, cache::Options::default());
    let (before, after) = (measure(&finetune.base)?, measure(&outcome.checkpoint)?);
    printer.data(format!(
        "answers of {} held-out conversations: {:.4} nats per token before, {:.4} after; {:.0}% stop where they end ({:.0}% before)",
        answers.len(),
        before.nll_per_token,
        after.nll_per_token,
        after.ended * 100.0,
        before.ended * 100.0
    ))?;
    if after.ended < WELL_ENDED {
        printer.warn(
            "the model seldom stops after an answer: train longer, or name a special token that the base knows better with data.end_of_text",
        );
    }
    Ok(())
}

/// `RUN/export/FORMAT` or `RUN/export/FORMAT.gguf`, its folder made, an older artifact of the same name removed.
fn place(folder: &Path, target: Target) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let path = place_of(folder, target);
    if path.is_dir() {
        std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
    }
    Ok(path)
}

fn validate(assembled: &Assembled, checkpoint: &Path, target: Target, path: &Path) -> Result<Option<Report>> {
    let documents = held_out(assembled);
    if documents.is_empty() {
        return Ok(None);
    }
    let (artifact, reference) = (Engine::load(path)?, Engine::load(checkpoint)?);
    let probes = probes(assembled, &artifact)?;
    // Engines run a dequantized ternary model with unrounded activations: another arithmetic than it was trained with.
    let limits = (assembled.setup.spec.linear == LinearKind::Ternary && !target.packs_ternary()).then_some(Limits::DEQUANTIZED_TERNARY);
    let options = Options { worst: 10, probes, limits, ..Options::default() };
    compare(&artifact, &reference, &documents, &options, |_| ()).map(Some)
}

/// The first artifact, or else the checkpoint, with the recipe's cache against itself with an FP16 cache.
fn validate_cache(assembled: &Assembled, folder: &Path, outcome: &Outcome) -> Result<Option<Report>> {
    let documents = held_out(assembled);
    let Some(config) = assembled.recipe.validate.cache.as_ref().filter(|_| !documents.is_empty()) else { return Ok(None) };
    let engine = Engine::load(&deployed(assembled, folder, outcome)?)?;
    let probes = probes(assembled, &engine)?;
    let options = Options { worst: 10, probes, limits: Some(Limits::NONE), cache: config.options()? };
    compare(&engine, &engine, &documents, &options, |_| ()).map(Some)
}

/// What the run made to be run: its first artifact, or else the checkpoint.
fn deployed(assembled: &Assembled, folder: &Path, outcome: &Outcome) -> Result<PathBuf> {
    let first = assembled.recipe.export.targets()?.first().map(|&target| place_of(folder, target));
    Ok(first.unwrap_or_else(|| outcome.checkpoint.clone()))
}

/// Questions about what the recipe trains on: short skills as its sources have them, and needles and lists where there are some.
fn probes(assembled: &Assembled, artifact: &Engine) -> Result<Vec<Probe>> {
    let count = assembled.recipe.validate.probes;
    let trained = |skill: Skill| builtin_sources(assembled).find(|config| config.trains(skill));
    let short = |skill: Skill| trained(skill).map_or_else(Vec::new, |config| skill_probes(config, probing::SEED, count));
    let mut probes: Vec<Probe> =
        Skill::SHORT.into_iter().flat_map(|skill| short(skill).into_iter().filter(move |probe| probe.skill == skill)).collect();
    if trained(Skill::Needle).is_some() || trained(Skill::Pair).is_some() {
        let long = probing::long(artifact.tokenizer()?, artifact.spec().context, count)?;
        probes.extend(long.into_iter().filter(|probe| trained(probe.skill).is_some()));
    }
    Ok(probes)
}

/// What a model scores that knows the form of a skill's documents but not the skill.
fn show_chance(assembled: &Assembled, report: &Report, printer: &Printer) -> Result<()> {
    let chance = |pair: &SkillPair| {
        let config = builtin_sources(assembled).find(|config| config.trains(pair.skill))?;
        Some(format!("{} {:.1}%", pair.skill.name(), pair.skill.chance(config) * 100.0))
    };
    match report.skills.iter().filter_map(chance).collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        chances => printer.data(format!("chance: {}", chances.join(", "))),
    }
}

fn builtin_sources(assembled: &Assembled) -> impl Iterator<Item = &builtin::Config> {
    assembled.recipe.data.sources.iter().filter_map(|source| if let SourceConfig::Builtin(config) = source { Some(config) } else { None })
}

/// The first held-out documents, as many as the recipe asks for, cut to the context.
fn held_out(assembled: &Assembled) -> Vec<Document> {
    documents(assembled, assembled.recipe.validate.documents)
}

/// The same, a few at least: what a merge costs is measured even where nothing else is.
fn some_held_out(assembled: &Assembled) -> Vec<Document> {
    documents(assembled, assembled.recipe.validate.documents.max(32))
}

fn documents(assembled: &Assembled, wanted: usize) -> Vec<Document> {
    let context = assembled.setup.row_tokens;
    assembled
        .dataset
        .held_out_documents(wanted)
        .into_iter()
        .filter_map(|(ids, weights)| match weights {
            Some(weights) => Document::of_answers(ids, &weights, context, &assembled.dataset.tokenizer),
            None => Document::from_ids(ids, context, &assembled.dataset.tokenizer),
        })
        .collect()
}

fn sample(assembled: &Assembled, folder: &Path, outcome: &Outcome, printer: &Printer) -> Result<()> {
    let Some(prompt) = &assembled.recipe.validate.sample else { return Ok(()) };
    let engine = Engine::load(&deployed(assembled, folder, outcome)?)?;
    printer.data("sample:")?;
    let sampling = Config { temperature: 0.7, top_k: 0, top_p: 1.0, min_p: 0.05, seed: assembled.setup.seed };
    let settings = Settings { sampling, cache: cache::Options::default(), most: assembled.recipe.validate.sample_tokens };
    generate::stream(&engine, prompt, &settings, printer)
}

/// Puts the recipe's questions to the base and to what was made from it.
fn ask(assembled: &Assembled, folder: &Path, outcome: &Outcome, printer: &Printer) -> Result<()> {
    let validate = &assembled.recipe.validate;
    if validate.chat.is_empty() {
        return Ok(());
    }
    let base = assembled.setup.finetune.as_ref().map(|finetune| Engine::load(&finetune.base)).transpose()?;
    let made = Engine::load(&deployed(assembled, folder, outcome)?)?;
    let settings = Settings { sampling: Config::greedy(), cache: cache::Options::default(), most: validate.sample_tokens };
    for question in &validate.chat {
        let prompt = Open::user(question)?.prompt(&assembled.dataset.tokenizer)?;
        printer.data(format!("asked: {question}"))?;
        for (name, engine) in base.iter().map(|base| ("before", base)).chain([("after", &made)]) {
            printer.stream(&format!("  {name}: "))?;
            generate::answer(engine, &prompt, &settings, printer)?;
        }
    }
    Ok(())
}

fn place_of(folder: &Path, target: Target) -> PathBuf {
    let name = target.name();
    folder.join(name.strip_prefix("gguf-").map_or_else(|| name.to_owned(), |format| format!("model-{format}.gguf")))
}
