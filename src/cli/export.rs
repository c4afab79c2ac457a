//! `osprey export`.

use super::arguments::{Documents, Export};
use super::printer::Printer;
use super::{Status, model, write_json};
use crate::error::{Error, Result};
use crate::export::adapter::Merge;
use crate::export::import::{Loaded, load_any};
use crate::export::{MergeCost, Report, Source, Target, export, peft};
use crate::infer::Engine;
use crate::infer::kv::Format;
use crate::model::LinearKind;
use crate::validate::{Document, evaluate};
use std::path::Path;

/// Writes the artifact and says what is in it.
pub(super) fn run(command: &Export, printer: &Printer) -> Result<Status> {
    super::start_threads(None)?;
    let target = Target::from_name(&command.format)?;
    let documents = |loaded: &Loaded| read_documents(command, loaded);
    let report = artifact(&command.model, target, &command.out, &Proof { documents: &documents, limit: command.merge_limit })?;
    write_json(command.report.json.as_deref(), &report)?;
    show(&report, printer)?;
    Ok(Status::Done)
}

/// How much a merge into a ternary base may cost, and on which documents that is measured.
pub(super) struct Proof<'p> {
    pub(super) documents: &'p dyn Fn(&Loaded) -> Result<Vec<Document>>,
    /// Nats per token.
    pub(super) limit: f64,
}

fn read_documents(command: &Export, loaded: &Loaded) -> Result<Vec<Document>> {
    let Some(path) = &command.text else {
        return Err(Error::input(
            "--text",
            "merging an adapter into a ternary base loses some of it, and nothing was given to measure how much",
        )
        .fix("add --text FILE, or keep the adapter beside its base with --format peft"));
    };
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        Error::file(&command.model, "has no tokenizer, so the cost of the merge cannot be measured")
            .fix("put tokenizer.json beside its base")
    })?;
    let options = Documents { document_separator: command.document_separator.clone(), max_documents: command.max_documents, context: None };
    model::read(path, &options, tokenizer, loaded.spec.context)
}

/// Exports the model at `model` to `out`; an adapter is merged, or written by itself as `peft`.
pub(super) fn artifact(model: &Path, target: Target, out: &Path, proof: &Proof<'_>) -> Result<Report> {
    if target == Target::Peft {
        return peft_report(model, out);
    }
    let (loaded, cost) = merge(model, load_any(model)?, target, proof)?;
    let name = model.file_stem().map_or_else(|| "osprey".to_owned(), |stem| stem.to_string_lossy().into_owned());
    let weights = loaded.weights()?;
    let source =
        Source { spec: &loaded.spec, weights: &weights, tokenizer: loaded.tokenizer.as_ref(), ternary: loaded.ternary, name: &name };
    let mut report = export(&source, target, out)?;
    report.merge = cost;
    Ok(report)
}

/// Merges an adapter where there is one. Only a merge that rounds again can lose anything; it is measured.
fn merge(model: &Path, loaded: Loaded, target: Target, proof: &Proof<'_>) -> Result<(Loaded, Option<MergeCost>)> {
    let rounds = loaded.adapter.is_some() && loaded.spec.linear == LinearKind::Ternary && target.packs_ternary();
    if !rounds {
        return Ok((loaded.merged(Merge::Dense)?, None));
    }
    // Refused before anything is measured, when the format cannot hold the model.
    crate::export::plan::plan(&loaded.spec, target)?;
    let documents = (proof.documents)(&loaded)?;
    let merged = loaded.merged(Merge::Ternary)?;
    let loss = |engine: &Engine| Ok::<_, Error>(evaluate(engine, &documents, Format::default(), |_| ())?.nll_per_token);
    let beside = loss(&Engine::load(model)?)?;
    let together = loss(&Engine::new(merged.spec.clone(), &merged.parameters, None)?)?;
    let cost = MergeCost { nll_beside: beside, nll_merged: together, limit: proof.limit };
    match cost.rise() <= cost.limit {
        true => Ok((merged, Some(cost))),
        false => Err(Error::file(model, format!("{cost}")).fix(
            "keep the adapter beside its base (--format peft), export a dense format, or train the base itself (leave finetune.lora out)",
        )),
    }
}

fn peft_report(model: &Path, out: &Path) -> Result<Report> {
    let bytes = peft::export(model, out)?;
    Ok(Report {
        format: Target::Peft.name(),
        path: out.to_owned(),
        architecture: "LoRA".to_owned(),
        artifact_bytes: bytes,
        parameters: bytes / 4,
        bits_per_weight: 32.0,
        block_bits_per_weight: 32.0,
        tensors: Vec::new(),
        notes: Vec::new(),
        merge: None,
    })
}

/// One line per artifact, and its notes.
pub(super) fn show(report: &Report, printer: &Printer) -> Result<()> {
    let size = report.artifact_bytes as f64 / 1e6;
    printer.data(format!("{}  {size:.2} MB  {:.3} bits per weight", report.path.display(), report.bits_per_weight))?;
    if let Some(cost) = &report.merge {
        printer.data(cost.to_string())?;
    }
    report.notes.iter().for_each(|note| printer.note(note));
    Ok(())
}
