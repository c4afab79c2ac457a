//! How fast an engine reads a prompt and continues it.

use super::cache::{Counters, Options};
use super::engine::Engine;
use super::session::Session;
use crate::error::Result;
use crate::ops::cpu::bench::{median, read_bandwidth};
use serde::Serialize;
use std::time::{Duration, Instant};

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

/// Tokens whose keys and values fill a long cache, over and over.
const FILLING: usize = 512;

/// Bytes that the plain read goes through: far beyond any processor's caches.
const PLAIN_BYTES: usize = 512 << 20;

/// What a decoded token costs at one length of the cache.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LongSpeed {
    pub kv: &'static str,
    pub attention: String,
    pub epsilon: Option<f32>,
    pub certificate: &'static str,
    /// Tokens in the cache after the last step.
    pub context: usize,
    pub tokens_per_second: f64,
    pub milliseconds: f64,
    /// Of that, in attention, the append of the new key and value included.
    pub attention_milliseconds: f64,
    /// Of that, in deciding which pages are read.
    pub choosing_milliseconds: f64,
    /// Bytes of keys and values that attention reads for one token, those of recovery included.
    pub cache_bytes: f64,
    /// Those over the time in attention.
    pub cache_gbytes_per_second: f64,
    /// What all threads read per second when they do nothing else.
    pub plain_gbytes_per_second: f64,
    /// What the timed steps did.
    pub counters: Counters,
}

/// Times `steps` tokens at the end of a cache of `context` tokens, which may be longer than the model's own context. Figures are medians.
///
/// The cache is not the product of a prompt: the keys and values of a text of 512 tokens fill it over and over. The numbers are a model's own,
/// in their sizes and in how they lie to each other, and so are the queries; what a token of a long text would pay attention to is not
/// in them. Times of what always reads the same pages do not depend on that. What recovery reads does.
pub fn measure_at(engine: &Engine, options: Options, context: usize, steps: usize) -> Result<LongSpeed> {
    let vocab = engine.spec().vocab as u64;
    let ids: Vec<u32> = (0..FILLING as u64).map(|i| (i * 7919 % 1000 + 3).min(vocab - 1) as u32).collect();
    let plain = read_bandwidth(PLAIN_BYTES, Duration::from_millis(500));
    let copies = context.div_ceil(FILLING).max(1);
    let mut session = Session::beyond(engine, options, copies * FILLING)?;
    session.repeat(&ids, copies)?;
    let steps = steps.clamp(1, context.saturating_sub(1).max(1));
    session.truncate(context - steps);
    // Brings in the pages of every buffer.
    session.step(ids[0])?;
    session.truncate(context - steps);
    let before = session.counters();
    let (mut whole, mut attention, mut choosing) = (vec![], vec![], vec![]);
    for step in 0..steps {
        let (start, times) = (Instant::now(), session.times());
        session.step(ids[step % ids.len()])?;
        whole.push(start.elapsed());
        attention.push(session.times().attention - times.attention);
        choosing.push(session.times().choosing - times.choosing);
    }
    let [whole, attention, choosing] = [whole, attention, choosing].map(|times| median(times).as_secs_f64());
    let counters = session.counters().since(&before);
    let counted = (counters.bytes_read + counters.bytes_moved) as f64 / steps as f64;
    // Stores that read everything do not count.
    let cache_bytes = if counted > 0.0 { counted } else { session.kv_bytes_per_token()? * (context as f64 - steps as f64 / 2.0) };
    Ok(LongSpeed {
        kv: options.format.name(),
        attention: options.attention.to_string(),
        epsilon: options.epsilon,
        certificate: options.certificate.name(),
        context,
        tokens_per_second: 1.0 / whole,
        milliseconds: whole * 1e3,
        attention_milliseconds: attention * 1e3,
        choosing_milliseconds: choosing * 1e3,
        cache_bytes,
        cache_gbytes_per_second: cache_bytes / attention / 1e9,
        plain_gbytes_per_second: plain / 1e9,
        counters,
    })
}
