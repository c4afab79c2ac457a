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
    let sampling = Config {
        temperature: f64::from(command.temperature),
        top_k: command.top_k,
        top_p: f64::from(command.top_p),
        min_p: f64::from(command.min_p),
        seed: command.seed,
    };
    let settings = Settings { sampling, cache, most: command.max_tokens };
    match conversation {
        Some(conversation) => {
            let prompt = conversation.prompt(engine.tokenizer()?)?;
            answer(&engine, &prompt, &settings, printer)?;
        }
        None => stream(&engine, &command.prompt, &settings, printer)?,
    }
    Ok(Status::Done)
}

/// How text is generated.
pub(super) struct Settings {
    pub(super) sampling: Config,
    pub(super) cache: cache::Options,
    /// Tokens at most.
    pub(super) most: usize,
}

/// Prints the prompt and its continuation as it comes.
pub(super) fn stream(engine: &Engine, prompt: &str, settings: &Settings, printer: &Printer) -> Result<()> {
    let ids = prompt_ids(engine.tokenizer()?, prompt)?;
    pieces(engine, &ids, &[], prompt, settings, printer)
}

/// Prints what the model answers as it comes.
pub(super) fn answer(engine: &Engine, prompt: &Prompt, settings: &Settings, printer: &Printer) -> Result<()> {
    pieces(engine, &prompt.ids, &prompt.stops, "", settings, printer)
}

/// Prints `shown` once there is room for the tokens, then what follows them.
fn pieces(engine: &Engine, ids: &[u32], ends: &[u32], shown: &str, settings: &Settings, printer: &Printer) -> Result<()> {
    settings.sampling.check()?;
    let room = ids.len().saturating_add(settings.most).min(engine.spec().context);
    let mut session = Session::new(engine, settings.cache, room.max(ids.len()))?;
    printer.stream(shown)?;
    for piece in Generation::new(&mut session, ids, settings.sampling.clone(), settings.most)?.ending_at(ends) {
        printer.stream(&piece?)?;
    }
    printer.stream("\n")
}
