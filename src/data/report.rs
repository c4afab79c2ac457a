//! What a batch really contains, for `osprey data`: text, boundaries, trained tokens, share of each source.

use super::chat_report::{ConversationReport, conversation_report};
use super::dataset::{Dataset, Part};
use super::loader::Rows;
use super::pack::Batch;
use crate::error::Result;
use serde::Serialize;
use std::fmt::{Display, Formatter, Write as _};
use std::ops::Range;

/// Rows over which the mixture is measured.
const MEASURED_ROWS: u64 = 1024;

/// The tokens, shards and first batch of a recipe.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub vocabulary: usize,
    pub tokenizer: String,
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub train: Vec<PartReport>,
    pub validation: Vec<PartReport>,
    pub batch: BatchReport,
}

/// One shard.
#[derive(Debug, Clone, Serialize)]
pub struct PartReport {
    pub name: String,
    /// Share of training tokens the recipe asks for.
    pub share: f64,
    /// Share among the first 1024 rows (validation: the share by size again).
    pub measured_share: f64,
    pub documents: u64,
    pub empty_documents: u64,
    pub tokens: u64,
    pub text_bytes: u64,
    pub bytes_per_token: f64,
    pub file: String,
    /// What of it is trained, where it holds conversations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversations: Option<ConversationReport>,
}

/// The first training batch.
#[derive(Debug, Clone, Serialize)]
pub struct BatchReport {
    pub rows: usize,
    pub context: usize,
    pub tokens: usize,
    pub trained_tokens: usize,
    pub trained_share: f64,
    /// Positions that hold nothing.
    pub padding_tokens: usize,
    /// Stretches of one document each.
    pub documents: usize,
    pub shown: Vec<RowReport>,
}

/// One row as text.
#[derive(Debug, Clone, Serialize)]
pub struct RowReport {
    pub source: String,
    pub trained_tokens: usize,
    /// The documents, or parts of documents, in the row.
    pub documents: Vec<DocumentReport>,
}

/// One document, or part of one, within a row.
#[derive(Debug, Clone, Serialize)]
pub struct DocumentReport {
    pub tokens: usize,
    /// Whether it starts here or goes on from an earlier row.
    pub begins: bool,
    /// Whether its end is predicted here.
    pub ends: bool,
    pub text: String,
    /// The mask, where the document has one: what is trained and what is not, special tokens spelled out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mask: Vec<Piece>,
}

/// A stretch of text under one side of the mask.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Piece {
    pub text: String,
    pub trained: bool,
}

/// Describes `dataset` and the first batch of `rows` x `context` tokens, the text of its first `shown` rows included.
pub fn report(dataset: &Dataset, rows: usize, context: usize, seed: u64, shown: usize) -> Result<Report> {
    let mut order = Rows::new(dataset, context, seed)?;
    let batch = order.batch(0, rows);
    let mut counts = vec![0u64; dataset.train.len()];
    for first in 0..MEASURED_ROWS {
        counts[order.source_of(first)] += 1;
    }
    let tokenizer = &dataset.tokenizer;
    let piece = |id: Option<u32>| id.and_then(|id| tokenizer.piece(id));
    let train = dataset
        .train
        .iter()
        .zip(counts)
        .map(|(part, count)| part_report(dataset, context, part, count as f64 / MEASURED_ROWS as f64))
        .collect();
    let validation = dataset.validation.iter().map(|part| part_report(dataset, context, part, part.share)).collect();
    let shown = (0..rows.min(shown)).map(|row| row_report(dataset, &batch, row)).collect::<Result<_>>()?;
    let padding_tokens = (0..rows * context).filter(|&at| is_padding(&batch, at)).count();
    let begins = |at: &usize| !is_padding(&batch, *at) && (at.is_multiple_of(context) || begins_stretch(dataset, &batch, *at));
    let documents = (0..rows * context).filter(begins).count();
    let (tokens, trained_tokens) = (rows * context, batch.trained_tokens());
    Ok(Report {
        vocabulary: tokenizer.vocabulary(),
        tokenizer: tokenizer.fingerprint(),
        bos: piece(tokenizer.bos()),
        eos: piece(tokenizer.eos()),
        train,
        validation,
        batch: BatchReport {
            rows,
            context,
            tokens,
            trained_tokens,
            trained_share: trained_tokens as f64 / tokens.max(1) as f64,
            padding_tokens,
            documents,
            shown,
        },
    })
}

fn part_report(dataset: &Dataset, context: usize, part: &Part, measured_share: f64) -> PartReport {
    let header = part.shard.header();
    PartReport {
        name: part.name.clone(),
        share: part.share,
        measured_share,
        documents: header.documents,
        empty_documents: header.empty_documents,
        tokens: header.tokens,
        text_bytes: header.text_bytes,
        bytes_per_token: header.text_bytes as f64 / header.tokens.max(1) as f64,
        file: part.shard.path().display().to_string(),
        conversations: part.shard.is_weighted().then(|| conversation_report(dataset, part, context)),
    }
}

/// Whether position `at` holds nothing: it counts for nothing and attends to nothing but itself. A sequence always has a trained token.
fn is_padding(batch: &Batch, at: usize) -> bool {
    let is_alone = |at: usize| batch.document_starts[at] as usize == at % batch.context;
    let next = (at + 1) % batch.context;
    batch.weights[at] == 0.0 && is_alone(at) && batch.targets[at] == 0 && (next == 0 || is_alone(at + 1))
}

/// Whether token `at`, not the first of its row, belongs to another document than the one before it. With a switch that lets
/// tokens attend across documents only BOS (or the EOS predicted before) tells.
fn begins_stretch(dataset: &Dataset, batch: &Batch, at: usize) -> bool {
    let moved = batch.document_starts[at] != batch.document_starts[at - 1];
    if dataset.train[batch.sources[at / batch.context] as usize].shard.is_weighted() {
        return moved;
    }
    let said = dataset.tokenizer.bos().is_some_and(|bos| batch.inputs[at] == bos)
        || dataset.tokenizer.eos().is_some_and(|eos| batch.targets[at - 1] == eos);
    moved || said
}

fn row_report(dataset: &Dataset, batch: &Batch, row: usize) -> Result<RowReport> {
    let (first, end) = (row * batch.context, (row + 1) * batch.context);
    let end = (first..end).rev().find(|&at| !is_padding(batch, at)).map_or(first, |at| at + 1);
    let mut starts: Vec<usize> = (first + 1..end).filter(|&at| begins_stretch(dataset, batch, at)).collect();
    starts.insert(0, first);
    starts.push(end);
    let part = &dataset.train[batch.sources[row] as usize];
    let describe = |window: &[usize]| document_report(dataset, batch, part.shard.is_weighted(), first, window[0]..window[1]);
    let documents = starts.windows(2).map(describe).collect::<Result<_>>()?;
    let trained_tokens = batch.weights[first..end].iter().filter(|&&weight| weight > 0.0).count();
    Ok(RowReport { source: part.name.clone(), trained_tokens, documents })
}

fn document_report(dataset: &Dataset, batch: &Batch, is_sequence: bool, row: usize, place: Range<usize>) -> Result<DocumentReport> {
    let Range { start, end } = place;
    let tokenizer = &dataset.tokenizer;
    let last = batch.targets[end - 1];
    let fills_row = start == row && end == row + batch.context;
    let begins = is_sequence || start != row || tokenizer.bos().is_some_and(|bos| batch.inputs[start] == bos);
    let ends = !fills_row && (is_sequence || end != row + batch.context) || tokenizer.eos().is_some_and(|eos| last == eos);
    let text = tokenizer.decode(&batch.inputs[start..end])?;
    let mut mask = Vec::new();
    if is_sequence {
        let tokens = batch.inputs[start..end].iter().chain([&last]);
        let trained = [false].into_iter().chain(batch.weights[start..end].iter().map(|&weight| weight > 0.0));
        mask = pieces(dataset, &tokens.copied().zip(trained).collect::<Vec<_>>())?;
    }
    Ok(DocumentReport { tokens: end - start, begins, ends, text, mask })
}

/// The text of tokens, cut where the mask changes; special tokens are spelled out.
fn pieces(dataset: &Dataset, tokens: &[(u32, bool)]) -> Result<Vec<Piece>> {
    let tokenizer = &dataset.tokenizer;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut stream = tokenizer.stream();
    for &(id, trained) in tokens {
        let text = if tokenizer.is_special(id) { tokenizer.piece(id).unwrap_or_default() } else { stream.push(id)? };
        match pieces.last_mut() {
            Some(last) if last.trained == trained => last.text += &text,
            _ => pieces.push(Piece { text, trained }),
        }
    }
    Ok(pieces)
}

impl Report {
    /// For a person; colours only where `colour` says so.
    pub fn render(&self, colour: bool) -> String {
        let mut text = String::new();
        self.write(&mut text, colour).expect("writing to a string cannot fail");
        text
    }

    fn write(&self, out: &mut String, colour: bool) -> std::fmt::Result {
        let special = |piece: &Option<String>| piece.clone().unwrap_or_else(|| "none".into());
        writeln!(
            out,
            "tokenizer {}: {} tokens, documents begin with {} and end with {}",
            self.tokenizer,
            self.vocabulary,
            special(&self.bos),
            special(&self.eos)
        )?;
        for (title, parts) in [("train", &self.train), ("validation", &self.validation)] {
            writeln!(
                out,
                "\n{title:<24} {:>8} {:>8} {:>10} {:>13} {:>12}  shard",
                "share", "measured", "documents", "tokens", "bytes/token"
            )?;
            for part in parts {
                let shares = (part.share * 100.0, part.measured_share * 100.0);
                write!(
                    out,
                    "{:<24} {:>7.2}% {:>7.2}% {:>10} {:>13} {:>12.3}  {}",
                    part.name, shares.0, shares.1, part.documents, part.tokens, part.bytes_per_token, part.file
                )?;
                let empty =
                    if part.empty_documents > 0 { format!("  ({} empty documents left out)", part.empty_documents) } else { String::new() };
                writeln!(out, "{empty}")?;
                if let Some(conversations) = &part.conversations {
                    conversations.write(out)?;
                }
            }
        }
        let batch = &self.batch;
        let padding = if batch.padding_tokens > 0 { format!(", {} of padding", batch.padding_tokens) } else { String::new() };
        let trained = format!("{} of {} tokens trained ({:.1}%){padding}", batch.trained_tokens, batch.tokens, batch.trained_share * 100.0);
        writeln!(out, "\nfirst batch: {} rows of {} tokens, {} documents, {trained}", batch.rows, batch.context, batch.documents)?;
        batch.shown.iter().enumerate().try_for_each(|(at, row)| row.write(out, at, colour))
    }
}

impl RowReport {
    fn write(&self, out: &mut String, at: usize, colour: bool) -> std::fmt::Result {
        let (dim, bold, plain) = if colour { ("\x1b[2m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        writeln!(out, "\n{bold}row {at}{plain} from {}, {} tokens trained", self.source, self.trained_tokens)?;
        for document in &self.documents {
            let begin = if document.begins { "begins" } else { "goes on" };
            let end = if document.ends { "ends" } else { "goes on in a later row" };
            writeln!(out, "{dim}--- document {begin} ({} tokens) ---{plain}", document.tokens)?;
            match document.mask.is_empty() {
                true => writeln!(out, "{}", document.text)?,
                false => writeln!(out, "{}", show_mask(&document.mask, colour))?,
            }
            writeln!(out, "{dim}--- document {end} ---{plain}")?;
        }
        Ok(())
    }
}

/// What is trained in green and the rest dim; without colours, what is trained between ⟦ and ⟧.
fn show_mask(pieces: &[Piece], colour: bool) -> String {
    let (open, close, dim, plain) = if colour { ("\x1b[32m", "\x1b[0m", "\x1b[2m", "\x1b[0m") } else { ("⟦", "⟧", "", "") };
    let piece = |piece: &Piece| match piece.trained {
        true => format!("{open}{}{close}", piece.text),
        false => format!("{dim}{}{plain}", piece.text),
    };
    pieces.iter().map(piece).collect()
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.render(false))
    }
}
