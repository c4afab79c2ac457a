//! How fast an engine reads a prompt and continues it.

use super::cache::Options;
use super::engine::Engine;
use super::session::Session;
use crate::error::Result;
use serde::Serialize;
use std::time::Instant;

/// Tokens of the prompt, where the context allows.
pub const PROMPT_TOKENS: usize = 256;

/// Tokens decoded one at a time, where the context allows.
pub const DECODE_TOKENS: usize = 64;

/// Speeds of one engine on all threads of the current pool.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    pub prompt_tokens_per_second: f64,
    pub decode_tokens_per_second: f64,
}

/// Times a prompt, of which only the last logits are computed, and the tokens after it; the best of `repeats` runs each.
pub fn measure(engine: &Engine, cache: impl Into<Options>, repeats: usize) -> Result<Speed> {
    let (context, vocab) = (engine.spec().context, engine.spec().vocab as u64);
    let decode = DECODE_TOKENS.min(context / 2);
    let prompt = PROMPT_TOKENS.min(context - decode);
    let ids: Vec<u32> = (0..prompt as u64).map(|i| (i * 7919 % 1000 + 3).min(vocab - 1) as u32).collect();
    let mut session = Session::new(engine, cache, prompt + decode)?;
    // The first pass touches pages and sizes buffers.
    session.prefill(&ids[..prompt.min(8)])?;
    let mut speed = Speed { prompt_tokens_per_second: 0.0, decode_tokens_per_second: 0.0 };
    for _ in 0..repeats.max(1) {
        session.truncate(0);
        let start = Instant::now();
        session.prefill(&ids)?;
        speed.prompt_tokens_per_second = speed.prompt_tokens_per_second.max(prompt as f64 / start.elapsed().as_secs_f64());
        let start = Instant::now();
        for step in 0..decode {
            session.step(ids[step % ids.len()])?;
        }
        speed.decode_tokens_per_second = speed.decode_tokens_per_second.max(decode as f64 / start.elapsed().as_secs_f64());
    }
    Ok(speed)
}
