//! `osprey bench decode`.

use super::arguments::Bench;
use super::printer::Printer;
use super::{Status, start_threads, write_json};
use crate::error::{Error, Result};
use crate::infer::Engine;
use crate::infer::bench::measure;
use crate::infer::kv::Format;

/// Prompt and decode speed of a model file.
pub(super) fn run(command: &Bench, printer: &Printer) -> Result<Status> {
    let Some(path) = &command.input else {
        return Err(Error::input("osprey bench decode", "no model was given").fix("for example: osprey bench decode model.gguf"));
    };
    start_threads(None)?;
    let engine = Engine::load(path)?;
    let speed = measure(&engine, Format::default(), command.steps.max(1))?;
    write_json(command.report.json.as_deref(), &speed)?;
    printer.data(format!(
        "osprey {} prompt {:.1} tok/s decode {:.1} tok/s",
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy(),
        speed.prompt_tokens_per_second,
        speed.decode_tokens_per_second
    ))?;
    Ok(Status::Done)
}
