//! `osprey bench decode`.

use super::arguments::Bench;
use super::printer::Printer;
use super::{Status, start_threads, write_json};
use crate::error::{Error, Result};
use crate::infer::bench::{LongSpeed, measure, measure_at};
use crate::infer::{Engine, Processor};
use std::path::Path;

/// Prompt and decode speed of a model file, or what a token costs at the end of a long cache.
pub(super) fn run(command: &Bench, printer: &Printer) -> Result<Status> {
    let Some(path) = &command.input else {
        return Err(Error::input("osprey bench decode", "no model was given").fix("for example: osprey bench decode model.gguf"));
    };
    let options = command.cache.options(Processor::Cpu)?;
    start_threads(None)?;
    let engine = Engine::load(path)?;
    if let Some(context) = command.context {
        let speed = measure_at(&engine, options, context.max(2), command.steps.max(1))?;
        write_json(command.report.json.as_deref(), &speed)?;
        printer.data(describe(path, &speed))?;
        return Ok(Status::Done);
    }
    let speed = measure(&engine, options, command.steps.max(1))?;
    write_json(command.report.json.as_deref(), &speed)?;
    printer.data(format!(
        "osprey {} prompt {:.1} tok/s decode {:.1} tok/s",
        name(path),
        speed.prompt_tokens_per_second,
        speed.decode_tokens_per_second
    ))?;
    Ok(Status::Done)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn describe(path: &Path, speed: &LongSpeed) -> String {
    let mut line = format!(
        "osprey {} kv {} attention {} context {}: {:.1} tok/s, {:.2} ms per token, {:.2} in attention ({:.2} choosing pages); \
         {:.1} MB of cache per token at {:.1} GB/s, plain reads {:.1} GB/s",
        name(path),
        speed.kv,
        speed.attention,
        speed.context,
        speed.tokens_per_second,
        speed.milliseconds,
        speed.attention_milliseconds,
        speed.choosing_milliseconds,
        speed.cache_bytes / 1e6,
        speed.cache_gbytes_per_second,
        speed.plain_gbytes_per_second,
    );
    let counters = &speed.counters;
    if counters.head_steps() > 0 {
        let share = |count: u64| 100.0 * count as f64 / counters.head_steps() as f64;
        let classes = [counters.hard, counters.metered, counters.recovered, counters.dense].map(share);
        let [hard, metered, recovered, dense] = classes;
        line += &format!("; hard {hard:.1}%, metered {metered:.1}%, recovered {recovered:.1}%, dense {dense:.1}% of head-steps");
    }
    line
}
