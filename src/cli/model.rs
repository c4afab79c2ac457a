//! What the commands that run models share: opening one, reading the documents, and the table of a comparison.

use super::arguments;
use super::printer::Printer;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::validate::{Document, Protocol, Report, Verdict, documents};
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
        row("same likeliest token, %", &[100.0, report.top1_agreement * 100.0], 3, format!("at least {}", limits.top1_agreement * 100.0)),
    ];
    for skill in &report.skills {
        let label = format!("{}, % of {}", skill.skill.name(), skill.probes);
        rows.push(row(&label, &[skill.reference * 100.0, skill.artifact * 100.0], 1, String::new()));
    }
    printer.table(&["", "before", "after", ""], &rows)?;
    printer.data(format!(
        "{} tokens of {} documents; {}: {:.3} bits per weight, {:.2} MB; {:.0} prompt and {:.0} decoded tokens/s; cache {} {} bytes per token",
        found.tokens,
        found.documents,
        report.format,
        report.bits_per_weight,
        report.artifact_bytes as f64 / 1e6,
        report.speed.prompt_tokens_per_second,
        report.speed.decode_tokens_per_second,
        report.kv,
        report.kv_bytes_per_token,
    ))?;
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

fn row(label: &str, values: &[f64; 2], digits: usize, remark: String) -> Vec<String> {
    let mut row = vec![label.to_owned()];
    row.extend(values.map(|value| format!("{value:.digits$}")));
    row.push(remark);
    row
}
