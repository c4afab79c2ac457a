//! `osprey eval`.

use super::arguments::Eval;
use super::printer::Printer;
use super::{Status, model, start_threads, write_json};
use crate::error::{Error, Result};
use crate::infer::Engine;
use crate::validate::{Evaluation, Place, TaskScore, evaluate, places, task};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// What was measured. The figures of a single task stand at the top level as well.
#[derive(Default, Serialize)]
struct Found {
    #[serde(flatten)]
    text: Option<Evaluation>,
    #[serde(flatten)]
    only_task: Option<TaskScore>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tasks: BTreeMap<String, TaskScore>,
}

/// Measures the loss on a text, with `--tokens` every token's as well, and the accuracy on tasks.
pub(super) fn run(command: &Eval, printer: &Printer) -> Result<Status> {
    let processor = command.processor.device.parse()?;
    let cache = command.cache.options(processor)?;
    let tasks = tasks(&command.tasks)?;
    if command.text.is_none() && (tasks.is_empty() || command.tokens.is_some()) {
        return Err(
            Error::input("osprey eval", "there is no text to evaluate").fix("give --text FILE, or --task NAME=FILE without --tokens")
        );
    }
    start_threads(None)?;
    let engine = Engine::load_on(&command.model, processor)?;
    let mut found = Found::default();
    if let Some(text) = &command.text {
        let documents = model::read(text, &command.documents, engine.tokenizer()?, engine.spec().context)?;
        found.text = Some(evaluate(&engine, &documents, cache, |_| ())?);
        if let Some(path) = &command.tokens {
            write_lines(path, &places(&engine, &documents, cache)?)?;
        }
    }
    for (name, path) in &tasks {
        printer.note(format!("scoring {name}"));
        let most = command.documents.max_documents.unwrap_or(usize::MAX);
        found.tasks.insert(name.clone(), task(&engine, path, most, cache)?);
    }
    found.only_task = found.tasks.values().next().copied().filter(|_| found.tasks.len() == 1);
    write_json(command.report.json.as_deref(), &found)?;
    show(&found, printer)?;
    Ok(Status::Done)
}

/// `NAME=FILE`, each name once.
fn tasks(given: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut tasks = BTreeMap::new();
    for text in given {
        let Some((name, path)) = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty()) else {
            return Err(Error::input("--task", format!("{text:?} is not NAME=FILE")).fix("give for example --task arc=arc_easy.jsonl"));
        };
        if tasks.insert(name.to_owned(), PathBuf::from(path)).is_some() {
            return Err(Error::input("--task", format!("{name} is given twice")).fix("give each task a name of its own"));
        }
    }
    Ok(tasks)
}

fn show(found: &Found, printer: &Printer) -> Result<()> {
    if let Some(text) = &found.text {
        printer
            .data(format!("nll per token   {:.5} nats over {} tokens of {} documents", text.nll_per_token, text.tokens, text.documents))?;
        printer.data(format!("perplexity      {:.4}", text.perplexity))?;
        printer.data(format!("bits per byte   {:.4}", text.bits_per_byte))?;
    }
    if found.tasks.is_empty() {
        return Ok(());
    }
    let percent = |share: f64, error: f64| format!("{:.2}% +- {:.2}", share * 100.0, error * 100.0);
    let row = |(name, score): (&String, &TaskScore)| {
        vec![
            name.clone(),
            percent(score.accuracy, score.stderr),
            percent(score.accuracy_normalized, score.stderr_normalized),
            score.n.to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = found.tasks.iter().map(row).collect();
    printer.table(&["task", "accuracy", "normalized", "questions"], &rows)
}

fn write_lines(path: &Path, lines: &[Place]) -> Result<()> {
    let file = std::fs::File::create(path).map_err(Error::io("create", path))?;
    let mut out = BufWriter::new(file);
    for line in lines {
        let text = serde_json::to_string(line).map_err(|error| Error::file(path, error))?;
        writeln!(out, "{text}").map_err(Error::io("write", path))?;
    }
    out.flush().map_err(Error::io("write", path))
}
