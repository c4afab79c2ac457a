//! `osprey validate`.

use super::arguments::Validate;
use super::printer::Printer;
use super::{Status, model, start_threads, write_json};
use crate::error::Result;
use crate::infer::Engine;
use crate::validate::{Options, Verdict, compare, probing};

/// Runs both models and says what was lost; exit code 1 when a limit is passed.
pub(super) fn run(command: &Validate, printer: &Printer) -> Result<Status> {
    let processor = command.processor.device.parse()?;
    let cache = command.cache.options(processor)?;
    start_threads(None)?;
    let (artifact, reference) = (Engine::load_on(&command.artifact, processor)?, Engine::load_on(&command.against, processor)?);
    let context = artifact.spec().context.min(reference.spec().context);
    let documents = model::read(&command.text, &command.documents, artifact.tokenizer()?, context)?;
    let probes = probing::probes(&reference, context)?;
    let options = Options { worst: 10, probes, cache, ..Options::default() };
    let report = compare(&artifact, &reference, &documents, &options, |_| ())?;
    write_json(command.report.json.as_deref(), &report)?;
    model::show(&report, printer)?;
    Ok(if report.verdict == Verdict::Pass { Status::Done } else { Status::FellShort })
}
