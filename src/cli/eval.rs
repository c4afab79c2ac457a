//! `osprey eval`.

use super::arguments::Eval;
use super::printer::Printer;
use super::{Status, model, start_threads, write_json};
use crate::error::{Error, Result};
use crate::infer::Engine;
use crate::validate::{Place, evaluate, places};
use std::io::{BufWriter, Write};

/// Measures the loss and prints it; with `--tokens`, every token's as well.
pub(super) fn run(command: &Eval, printer: &Printer) -> Result<Status> {
    let processor = command.processor.device.parse()?;
    let cache = command.cache.options(processor)?;
    start_threads(None)?;
    let engine = Engine::load_on(&command.model, processor)?;
    let documents = model::read(&command.text, engine.tokenizer()?, engine.spec().context)?;
    let found = evaluate(&engine, &documents, cache, |_| ())?;
    if let Some(path) = &command.tokens {
        write_lines(path, &places(&engine, &documents, cache)?)?;
    }
    write_json(command.report.json.as_deref(), &found)?;
    printer
        .data(format!("nll per token   {:.5} nats over {} tokens of {} documents", found.nll_per_token, found.tokens, found.documents))?;
    printer.data(format!("perplexity      {:.4}", found.perplexity))?;
    printer.data(format!("bits per byte   {:.4}", found.bits_per_byte))?;
    Ok(Status::Done)
}

fn write_lines(path: &std::path::Path, lines: &[Place]) -> Result<()> {
    let file = std::fs::File::create(path).map_err(Error::io("create", path))?;
    let mut out = BufWriter::new(file);
    for line in lines {
        let text = serde_json::to_string(line).map_err(|error| Error::file(path, error))?;
        writeln!(out, "{text}").map_err(Error::io("write", path))?;
    }
    out.flush().map_err(Error::io("write", path))
}
