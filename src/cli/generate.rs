//! `osprey generate`.

use super::arguments::Generate;
use super::printer::Printer;
use super::{Status, start_threads};
use crate::data::chat::{Open, Prompt};
use crate::error::Result;
use crate::infer::generate::{Generation, prompt_ids};
use crate::infer::sampler::Config;
use crate::infer::{Engine, Session, cache};

/// Streams the continuation of the prompt, or the answer to the conversation.
pub(super) fn run(command: &Generate, printer: &Printer) -> Result<Status> {
    // A mistake in the conversation is said before a large model is read.
    let conversation = match (&command.chat, &command.messages) {
        (Some(text), _) => Some(Open::user(text)?),
        (None, Some(path)) => Some(Open::file(path)?),
        (None, None) => None,
    };
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
    match conversation {
        Some(conversation) => {
            let prompt = conversation.prompt(engine.tokenizer()?)?;
            answer(&engine, &prompt, config, cache, command.max_tokens, printer)?;
        }
        None => stream(&engine, &command.prompt, config, cache, command.max_tokens, printer)?,
    }
    Ok(Status::Done)
}

/// Prints the prompt and its continuation as it comes.
pub(super) fn stream(engine: &Engine, prompt: &str, config: Config, cache: cache::Options, most: usize, printer: &Printer) -> Result<()> {
    config.check()?;
    let ids = prompt_ids(engine.tokenizer()?, prompt)?;
    printer.stream(prompt)?;
    pieces(engine, &ids, &[], config, cache, most, printer)
}

/// Prints what the model answers as it comes.
pub(super) fn answer(
    engine: &Engine,
    prompt: &Prompt,
    config: Config,
    cache: cache::Options,
    most: usize,
    printer: &Printer,
) -> Result<()> {
    config.check()?;
    pieces(engine, &prompt.ids, &prompt.stops, config, cache, most, printer)
}

fn pieces(engine: &Engine, ids: &[u32], ends: &[u32], config: Config, cache: cache::Options, most: usize, printer: &Printer) -> Result<()> {
    let room = ids.len().saturating_add(most).min(engine.spec().context);
    let mut session = Session::new(engine, cache, room.max(ids.len()))?;
    for piece in Generation::new(&mut session, ids, config, most)?.ending_at(ends) {
        printer.stream(&piece?)?;
    }
    printer.stream("\n")
}
