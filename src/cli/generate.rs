//! `osprey generate`.

use super::arguments::Generate;
use super::printer::Printer;
use super::{Status, start_threads};
use crate::error::Result;
use crate::infer::generate::{Generation, prompt_ids};
use crate::infer::sampler::Config;
use crate::infer::{Engine, Session, cache};

/// Streams the continuation of the prompt.
pub(super) fn run(command: &Generate, printer: &Printer) -> Result<Status> {
    let processor = command.processor.device.parse()?;
    let cache = command.cache.options(processor)?;
    start_threads(None)?;
    let engine = Engine::load_on(&command.model, processor)?;
    let config = Config {
        temperature: f64::from(command.temperature),
        top_k: command.top_k,
        top_p: f64::from(command.top_p),
        min_p: f64::from(command.min_p),
        seed: command.seed,
    };
    stream(&engine, &command.prompt, config, cache, command.max_tokens, printer)?;
    Ok(Status::Done)
}

/// Prints the prompt and its continuation as it comes.
pub(super) fn stream(engine: &Engine, prompt: &str, config: Config, cache: cache::Options, most: usize, printer: &Printer) -> Result<()> {
    config.check()?;
    let ids = prompt_ids(engine.tokenizer()?, prompt)?;
    let room = ids.len().saturating_add(most).min(engine.spec().context);
    let mut session = Session::new(engine, cache, room.max(ids.len()))?;
    printer.stream(prompt)?;
    for piece in Generation::new(&mut session, &ids, config, most)? {
        printer.stream(&piece?)?;
    }
    printer.stream("\n")
}
