//! What a model thinks of every token: the raw material of comparisons with other engines.

use super::documents::Document;
use super::evaluate::{ROWS, session_for};
use super::rows::log_sum_exp;
use crate::error::Result;
use crate::infer::sampler::argmax;
use crate::infer::{Engine, cache};
use rayon::prelude::*;
use serde::Serialize;

/// One predicted token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Place {
    /// Place of the document, from 0.
    pub document: usize,
    /// Place of the token in its document, BOS included.
    pub position: usize,
    /// The token that is there.
    pub token: u32,
    /// Its negative log-likelihood, in nats.
    pub nll: f64,
    /// The token thought likeliest.
    pub top1: u32,
}

/// Every predicted token of `documents`, in order.
///
/// # Errors
/// When a document is longer than the model's context or has ids beyond its vocabulary.
pub fn places(engine: &Engine, documents: &[Document], cache: impl Into<cache::Options>) -> Result<Vec<Place>> {
    let mut session = session_for(engine, documents, cache)?;
    let (dim, vocab) = (engine.spec().dim, engine.spec().vocab);
    let mut all = Vec::new();
    for (document, Document { ids, .. }) in documents.iter().enumerate() {
        session.truncate(0);
        let hidden = session.hidden(&ids[..ids.len() - 1])?;
        for (chunk, (hidden, targets)) in hidden.chunks(ROWS * dim).zip(ids[1..].chunks(ROWS)).enumerate() {
            let logits = engine.logits(hidden)?;
            let rows = logits.par_chunks(vocab).zip(targets).enumerate();
            let place = |(row, (logits, &token)): (usize, (&[f32], &u32))| Place {
                document,
                position: chunk * ROWS + row + 1,
                token,
                nll: log_sum_exp(logits) - f64::from(logits.get(token as usize).copied().unwrap_or(f32::NAN)),
                top1: argmax(logits),
            };
            all.extend(rows.map(place).collect::<Vec<_>>());
        }
    }
    Ok(all)
}
