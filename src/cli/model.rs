//! What the commands that run models share: opening one, reading the documents, and the table of a comparison.

use super::arguments;
use super::printer::Printer;
use crate::data::Skill;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::validate::{CacheReport, Classes, Document, Protocol, Report, SpotPair, Verdict, documents};
use std::path::Path;

/// The documents that the options name, cut to `context` tokens.
pub(super) fn read(text: &Path, options: &arguments::Documents, tokenizer: &Tokenizer, context: usize) -> Result<Vec<Document>> {
    let protocol = Protocol { separator: options.document_separator.clone(), max_documents: options.max_documents };
    if let Some(asked) = options.context.filter(|&asked| asked > context) {
        let cause = format!("{asked} tokens are more than the {context} the model was made for");
        return Err(Error::input("--context", cause).fix(format!("give at most {context}")));
    }
    documents::read(text, &protocol, tokenizer, options.context.unwrap_or(context))
}

/// Prints a comparison: the figures before and after, what passed its limit, and the tokens that suffered most.
pub(super) fn show(report: &Report, printer: &Printer) -> Result<()> {
    let (found, limits) = (&report.evaluation, &report.limits);
    let gap = found.nll_per_token - report.reference_nll_per_token;
    let mut rows = vec![
        row(
            "loss, nats per token",
            &[report.reference_nll_per_token, found.nll_per_token],
            5,
            format!("rise {gap:+.5}, at most {}", limits.nll_gap),
        ),
        row("perplexity", &[report.reference_nll_per_token.exp(), found.perplexity], 4, String::new()),
        row("mean KL, nats", &[0.0, report.kl_mean], 6, format!("at most {}", limits.kl_mean)),
        row(
            "same likeliest token, %",
            &[100.0, report.top1_agreement * 100.0],
            3,
            format!("at least {}", (limits.top1_agreement * 1e6).round() / 1e4),
        ),
    ];
    for skill in &report.skills {
        let label = format!("{}, % of {}", skill.skill.name(), skill.probes);
        rows.push(row(&label, &[skill.reference * 100.0, skill.artifact * 100.0], 1, String::new()));
    }
    printer.table(&["", "before", "after", ""], &rows)?;
    show_places(report, printer)?;
    printer.data(format!(
        "{} tokens of {} documents; {}: {:.3} bits per weight, {:.2} MB; {:.0} prompt and {:.0} decoded tokens/s; cache {}, {:.1} bytes per token",
        found.tokens,
        found.documents,
        report.format,
        report.bits_per_weight,
        report.artifact_bytes as f64 / 1e6,
        report.speed.prompt_tokens_per_second,
        report.speed.decode_tokens_per_second,
        cache_name(report),
        report.kv_bytes_per_token,
    ))?;
    show_certificates(report, printer)?;
    if let Some(worst) = report.worst_tokens.first().filter(|worst| worst.kl > 1e-4) {
        let place = format!("document {} position {}", worst.document + 1, worst.position);
        printer.data(format!(
            "worst token: {:?} at {place}: loss {:.4} -> {:.4}, KL {:.5}",
            worst.text, worst.reference_nll, worst.nll, worst.kl
        ))?;
    }
    report.failures.iter().try_for_each(|failure| printer.data(format!("fell short: {failure}")))?;
    printer.data(if report.verdict == Verdict::Pass { "verdict: pass" } else { "verdict: fail" })
}

/// `int8-int4, top-k=0.25 attention, epsilon 5% hard`.
pub(super) fn cache_name(report: &Report) -> String {
    let CacheReport { attention, epsilon, certificate, .. } = &report.cache;
    let mut name = report.kv.clone();
    if attention != "dense" {
        name += &format!(", {attention} attention");
    }
    if let (Some(epsilon), Some(certificate)) = (epsilon, certificate) {
        name += &format!(", epsilon {:.3}% {certificate}", epsilon * 100.0);
    }
    name
}

/// What was certified, what it took, and how far bounds are from errors.
fn show_certificates(report: &Report, printer: &Printer) -> Result<()> {
    let cache = &report.cache;
    let (Some(violations), Some(promoted), Some(_)) = (cache.certificate_violations, cache.pages_promoted, cache.bound_mean) else {
        return Ok(());
    };
    let percent = |share: Option<f64>| match share.map(|share| share * 100.0) {
        None => String::new(),
        Some(share) if share < 1e6 => format!("{share:.3}%"),
        Some(share) => format!("{share:.0e}%"),
    };
    printer.data(format!(
        "certificates: {violations} violations; bound {} in the mean and {} at most, error {} and {}{}; estimate {}, error beyond twice that {}",
        percent(cache.bound_mean),
        percent(cache.bound_max),
        percent(cache.error_mean),
        percent(cache.error_max),
        cache.bound_over_error.map_or_else(String::new, |factor| format!(", bound over error {factor:.1} in the median")),
        percent(cache.meter_mean),
        percent(cache.meter_exceeded),
    ))?;
    let classes = cache.classes.map_or_else(String::new, |Classes { hard, metered, recovered, dense }| {
        let [hard, metered, recovered, dense] = [hard, metered, recovered, dense].map(|share| share * 100.0);
        format!("; head-steps {hard:.2}% hard, {metered:.2}% metered, {recovered:.2}% recovered, {dense:.2}% dense")
    });
    printer.data(format!(
        "pages: {} read, {} promoted; {:.0} bytes read and {:.0} moved per token{classes}",
        percent(cache.pages_read),
        percent(Some(promoted)),
        cache.bytes_read_per_token.unwrap_or(0.0),
        cache.bytes_moved_per_token.unwrap_or(0.0),
    ))
}

/// Recall after, by length (down) and depth (across); with what it was before where that differs.
fn show_places(report: &Report, printer: &Printer) -> Result<()> {
    for skill in [Skill::Needle, Skill::Pair] {
        let spots: Vec<&SpotPair> = report.recall_by_place.iter().filter(|pair| pair.skill == skill).collect();
        let mut lengths: Vec<usize> = spots.iter().map(|pair| pair.spot.length).collect();
        lengths.dedup();
        let Some(&first) = lengths.first() else { continue };
        let depths = spots.iter().filter(|pair| pair.spot.length == first).map(|pair| format!("{:.0}% deep", pair.spot.depth * 100.0));
        let header: Vec<String> = std::iter::once(format!("{}, % by tokens", skill.name())).chain(depths).collect();
        let cell = |pair: &SpotPair| match (pair.reference * 100.0, pair.artifact * 100.0) {
            (before, after) if before == after => format!("{after:.0}"),
            (before, after) => format!("{after:.0} (was {before:.0})"),
        };
        let row = |length: &usize| {
            let cells = spots.iter().filter(|pair| pair.spot.length == *length).map(|pair| cell(pair));
            std::iter::once(length.to_string()).chain(cells).collect()
        };
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        printer.table(&header, &lengths.iter().map(row).collect::<Vec<Vec<String>>>())?;
    }
    Ok(())
}

fn row(label: &str, values: &[f64; 2], digits: usize, remark: String) -> Vec<String> {
    let mut row = vec![label.to_owned()];
    row.extend(values.map(|value| format!("{value:.digits$}")));
    row.push(remark);
    row
}
