//! Held-out loss of one model.

use super::documents::Document;
use super::rows::log_sum_exp;
use crate::error::{Error, Result};
use crate::infer::{Engine, Session, cache};
use rayon::prelude::*;
use serde::Serialize;

/// Positions whose logits are in memory at a time.
pub(super) const ROWS: usize = 64;

/// Loss over documents. Means are over the predicted tokens that are scored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Nats.
    pub nll_per_token: f64,
    pub perplexity: f64,
    /// Bits per byte of the text that the predicted tokens spell.
    pub bits_per_byte: f64,
    /// Tokens predicted and scored.
    pub tokens: usize,
    pub documents: usize,
    /// Documents longer than the context.
    pub cut_documents: usize,
}

impl Evaluation {
    /// From the summed loss in nats.
    pub(super) fn new(nll: f64, documents: &[Document]) -> Self {
        let tokens: usize = documents.iter().map(Document::scored).sum();
        let bytes: usize = documents.iter().map(|document| document.predicted_bytes).sum();
        let mean = nll / tokens as f64;
        Self {
            nll_per_token: mean,
            perplexity: mean.exp(),
            bits_per_byte: nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
            tokens,
            documents: documents.len(),
            cut_documents: documents.iter().filter(|document| document.is_cut).count(),
        }
    }
}

/// The loss of `engine` on `documents`. `progress` is told how many documents are done.
///
/// # Errors
/// When a document is longer than the model's context, has ids beyond its vocabulary, or the model gives logits that are not finite.
pub fn evaluate(
    engine: &Engine,
    documents: &[Document],
    cache: impl Into<cache::Options>,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let mut session = session_for(engine, documents, cache)?;
    let mut total = 0.0;
    for (done, document) in documents.iter().enumerate() {
        let (inputs, targets) = (&document.ids[..document.predicted()], &document.ids[1..]);
        session.truncate(0);
        let hidden = session.hidden(inputs)?;
        let dim = engine.spec().dim;
        let mut nll = 0.0;
        for (chunk, (hidden, targets)) in hidden.chunks(ROWS * dim).zip(targets.chunks(ROWS)).enumerate() {
            let logits = engine.logits(hidden)?;
            let losses: Vec<f64> = logits.par_chunks(engine.spec().vocab).zip(targets).map(|(row, &target)| loss(row, target)).collect();
            nll += losses.iter().enumerate().filter(|(row, _)| document.scores(chunk * ROWS + row + 1)).map(|(_, loss)| loss).sum::<f64>();
        }
        check_finite(nll, done)?;
        total += nll;
        progress(done + 1);
    }
    Ok(Evaluation::new(total, documents))
}

/// A session that holds the longest of `documents` but its last token, which is only predicted.
pub(super) fn session_for<'e>(engine: &'e Engine, documents: &[Document], cache: impl Into<cache::Options>) -> Result<Session<'e>> {
    Session::new(engine, cache, documents.iter().map(Document::predicted).max().unwrap_or(0))
}

fn loss(logits: &[f32], target: u32) -> f64 {
    log_sum_exp(logits) - f64::from(logits.get(target as usize).copied().unwrap_or(f32::NAN))
}

pub(super) fn check_finite(nll: f64, document: usize) -> Result<()> {
    if nll.is_finite() {
        return Ok(());
    }
    Err(Error::input("model", format!("gives a loss that is not finite on document {}", document + 1))
        .fix("check that the tokenizer belongs to the model and the file is not damaged"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::kv::Format;
    use crate::infer::testing::{Artifact, dense, ids, training_logits, weights};

    #[test]
    fn loss_is_that_of_the_training_forward() {
        let spec = dense();
        let masters = weights(&spec, 1);
        let engine = Artifact::checkpoint(&spec, &masters).engine();
        let document =
            |count: usize, seed| Document { ids: ids(count, spec.vocab, seed), scored: None, predicted_bytes: 10, is_cut: seed == 2 };
        let documents = [document(2, 1), document(150, 2), document(70, 3)];
        let evaluation = evaluate(&engine, &documents, Format::F32, |_| {}).unwrap();
        let expected: f64 = documents
            .iter()
            .map(|document| {
                let logits = training_logits(&spec, &masters, &document.ids);
                let rows = logits.chunks(spec.vocab).zip(&document.ids[1..]);
                rows.map(|(row, &id)| {
                    let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
                    sum.ln() - f64::from(row[id as usize])
                })
                .sum::<f64>()
            })
            .sum();
        assert_eq!((evaluation.tokens, evaluation.documents, evaluation.cut_documents), (219, 3, 1));
        assert!((evaluation.nll_per_token - expected / 219.0).abs() < 1e-6);
        assert!((evaluation.perplexity.ln() - evaluation.nll_per_token).abs() < 1e-9);
        assert!((evaluation.bits_per_byte - expected / 30.0 / std::f64::consts::LN_2).abs() < 1e-4);
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 1)).engine();
        let document = |ids: Vec<u32>| [Document { ids, scored: None, predicted_bytes: 1, is_cut: false }];
        assert!(evaluate(&engine, &document(vec![300, 1]), Format::F32, |_| {}).is_err());
        assert!(evaluate(&engine, &document(vec![1, 300]), Format::F32, |_| {}).is_err());
        assert!(evaluate(&engine, &document(vec![1; 202]), Format::F32, |_| {}).unwrap_err().to_string().contains("201"));
    }
}
