//! `osprey export`.

use super::arguments::Export;
use super::printer::Printer;
use super::{Status, write_json};
use crate::error::Result;
use crate::export::import::load_any;
use crate::export::{Report, Source, Target, export};
use std::path::Path;

/// Writes the artifact and says what is in it.
pub(super) fn run(command: &Export, printer: &Printer) -> Result<Status> {
    super::start_threads(None)?;
    let target = Target::from_name(&command.format)?;
    let report = artifact(&command.model, target, &command.out)?;
    write_json(command.report.json.as_deref(), &report)?;
    show(&report, printer)?;
    Ok(Status::Done)
}

/// Exports the model at `model` to `out`.
pub(super) fn artifact(model: &Path, target: Target, out: &Path) -> Result<Report> {
    let loaded = load_any(model)?;
    let name = model.file_stem().map_or_else(|| "osprey".to_owned(), |stem| stem.to_string_lossy().into_owned());
    let weights = loaded.weights()?;
    let source =
        Source { spec: &loaded.spec, weights: &weights, tokenizer: loaded.tokenizer.as_ref(), ternary: loaded.ternary, name: &name };
    export(&source, target, out)
}

/// One line per artifact, and its notes.
pub(super) fn show(report: &Report, printer: &Printer) -> Result<()> {
    let size = report.artifact_bytes as f64 / 1e6;
    printer.data(format!("{}  {size:.2} MB  {:.3} bits per weight", report.path.display(), report.bits_per_weight))?;
    report.notes.iter().for_each(|note| printer.note(note));
    Ok(())
}
