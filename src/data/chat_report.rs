//! What of a source of conversations is trained, and what usually goes wrong with it unseen: answers cut off, stop tokens that are never
//! learned or that nobody will stop at, sequences that begin twice.

use super::dataset::{Dataset, Part};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The mask of a source in figures.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ConversationReport {
    /// Tokens that count in the loss, before the context cuts anything.
    pub trained_tokens: u64,
    /// Their share of all tokens.
    pub trained_share: f64,
    /// Stretches that are trained.
    pub answers: u64,
    /// Those that lose their end, or all of themselves, to the context.
    pub truncated_answers: u64,
    /// Conversations with nothing trained within the context: they never enter a row.
    pub left_out: u64,
    pub longest_tokens: u64,
    /// Share of positions of the packed rows that hold nothing.
    pub padding_share: f64,
    /// The special tokens that end answers and are trained.
    pub stop_tokens: Vec<StopToken>,
    /// Answers that end without one (turns of a user that have a weight may).
    pub answers_without_stop: u64,
    /// Conversations whose first two tokens are both the beginning-of-sequence token.
    pub double_bos: u64,
    /// Conversations without it, where the tokenizer puts one in front of every text.
    pub missing_bos: u64,
}

/// A special token that ends answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StopToken {
    pub token: String,
    pub answers: u64,
    /// Whether generation stops at it by itself, without the template: the tokenizer's end-of-sequence token is one.
    pub is_eos: bool,
}

/// Measures the sequences of `part` in rows of `context`.
pub(super) fn conversation_report(dataset: &Dataset, part: &Part, context: usize) -> ConversationReport {
    let (shard, tokenizer) = (&part.shard, &dataset.tokenizer);
    let mut stops: BTreeMap<u32, u64> = BTreeMap::new();
    let mut used = 0u64;
    let mut report = ConversationReport::default();
    for document in 0..shard.documents() {
        let (tokens, weights) = (shard.document(document), shard.document_weights(document));
        report.trained_tokens += weights.iter().filter(|&&weight| weight > 0.0).count() as u64;
        report.longest_tokens = report.longest_tokens.max(tokens.len() as u64);
        for end in answer_ends(&weights) {
            report.answers += 1;
            report.truncated_answers += u64::from(end > context + 1);
            match tokenizer.is_special(tokens[end - 1]) {
                true => *stops.entry(tokens[end - 1]).or_default() += 1,
                false => report.answers_without_stop += 1,
            }
        }
        let pairs = context.min(tokens.len() - 1);
        match weights[1..=pairs].iter().any(|&weight| weight > 0.0) {
            true => used += pairs as u64,
            false => report.left_out += 1,
        }
        if let Some(bos) = tokenizer.bos() {
            report.double_bos += u64::from(tokens.starts_with(&[bos, bos]));
            report.missing_bos += u64::from(tokens[0] != bos);
        }
    }
    let stop = |(id, answers)| StopToken {
        token: tokenizer.piece(id).unwrap_or_default(),
        answers,
        is_eos: tokenizer.ends().any(|end| end == id),
    };
    report.stop_tokens = stops.into_iter().map(stop).collect();
    report.trained_share = report.trained_tokens as f64 / shard.tokens().max(1) as f64;
    let positions = dataset.bins(part, context, None).rows() * context as u64;
    report.padding_share = positions.saturating_sub(used) as f64 / positions.max(1) as f64;
    report
}

/// Where stretches of weights above 0 end.
fn answer_ends(weights: &[f32]) -> impl Iterator<Item = usize> + '_ {
    (1..=weights.len()).filter(|&end| weights[end - 1] > 0.0 && weights.get(end).is_none_or(|&weight| weight == 0.0))
}

impl ConversationReport {
    pub(super) fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "  {} answers, {:.1}% of the tokens trained; {} cut off by the context, {} conversations left out by it; longest {} tokens; padding {:.1}%",
            self.answers,
            self.trained_share * 100.0,
            self.truncated_answers,
            self.left_out,
            self.longest_tokens,
            self.padding_share * 100.0
        )?;
        for stop in &self.stop_tokens {
            let remark = if stop.is_eos {
                "the end-of-sequence token"
            } else {
                "not the end-of-sequence token: generation must be told to stop at it"
            };
            writeln!(out, "  stop token {} is trained after {} answers ({remark})", stop.token, stop.answers)?;
        }
        if self.answers_without_stop > 0 {
            writeln!(out, "  {} trained stretches end without a special token", self.answers_without_stop)?;
        }
        if self.double_bos > 0 {
            writeln!(out, "  warning: {} conversations begin with the beginning-of-sequence token twice", self.double_bos)?;
        }
        if self.missing_bos > 0 {
            writeln!(
                out,
                "  warning: {} conversations begin without the token that the tokenizer puts before every text",
                self.missing_bos
            )?;
        }
        Ok(())
    }
}
