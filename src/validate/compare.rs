//! An artifact against the model it came from, token by token.

use super::cache::CacheReport;
use super::documents::Document;
use super::evaluate::{Evaluation, ROWS, check_finite, session_for};
use super::limits::Limits;
use super::recall::ask;
use super::report::{Report, TokenLoss, Verdict};
use super::rows::{divergence, log_sum_exp};
use crate::data::builtin::Probe;
use crate::error::{Error, Result};
use crate::infer::kv::Format;
use crate::infer::sampler::argmax;
use crate::infer::{Engine, bench, cache};
use rayon::prelude::*;

/// What to compare, beside the documents.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How the artifact keeps and reads keys and values. Unless that is in f32, the reference does it in f16, densely.
    pub cache: cache::Options,
    /// Defaults to those of the artifact's format.
    pub limits: Option<Limits>,
    /// Questions to both; none for models that never saw the built-in corpus.
    pub probes: Vec<Probe>,
    /// How many of the worst tokens to list.
    pub worst: usize,
}

impl Options {
    /// How the reference keeps and reads keys and values.
    pub(super) fn reference_cache(&self) -> cache::Options {
        if self.cache.format == Format::F32 { Format::F32.into() } else { Format::F16.into() }
    }

    /// The artifact's cache with every output compared with the FP16 cache, where there can be a difference.
    fn checked_cache(&self) -> cache::Options {
        let Self { cache, .. } = self;
        let exact = cache.format == Format::F32 || *cache == Format::F16.into();
        cache::Options { check: !exact, ..*cache }
    }
}

/// Runs both engines over `documents` (ids of the artifact's tokenizer) and judges the artifact. `progress` is told how many are done.
///
/// # Errors
/// When the two do not have the same vocabulary, or as [`evaluate`](super::evaluate()).
pub fn compare(
    artifact: &Engine,
    reference: &Engine,
    documents: &[Document],
    options: &Options,
    mut progress: impl FnMut(usize),
) -> Result<Report> {
    check_vocabularies(artifact, reference)?;
    let mut sessions =
        [session_for(artifact, documents, options.checked_cache())?, session_for(reference, documents, options.reference_cache())?];
    let mut totals = Totals::default();
    for (index, document) in documents.iter().enumerate() {
        let mut hidden = [vec![], vec![]];
        for (session, hidden) in sessions.iter_mut().zip(&mut hidden) {
            session.truncate(0);
            *hidden = session.hidden(&document.ids[..document.predicted()])?;
        }
        for (first, targets) in document.ids[1..].chunks(ROWS).enumerate() {
            let logits = |engine: &Engine, hidden: &[f32]| {
                let dim = engine.spec().dim;
                engine.logits(&hidden[first * ROWS * dim..][..targets.len() * dim])
            };
            let logits = [logits(artifact, &hidden[0])?, logits(reference, &hidden[1])?];
            totals.add((index, document), first * ROWS + 1, targets, &logits, artifact.spec().vocab, options.worst);
        }
        check_finite(totals.nll + totals.reference_nll, index)?;
        progress(index + 1);
    }
    let counters = sessions[0].counters();
    let found = totals.report(
        artifact,
        documents,
        options,
        CacheReport::new(options, &counters, documents.iter().map(Document::predicted).sum()),
    )?;
    Ok(found.with_recall(&ask(artifact, reference, options)?).judge())
}

fn check_vocabularies(artifact: &Engine, reference: &Engine) -> Result<()> {
    let (ours, theirs) = (artifact.spec().vocab, reference.spec().vocab);
    if ours != theirs {
        return Err(Error::input("reference", format!("has {theirs} tokens, the artifact {ours}"))
            .fix("compare with the model it was exported from"));
    }
    Ok(())
}

/// Sums over tokens.
#[derive(Default)]
struct Totals {
    nll: f64,
    reference_nll: f64,
    kl: f64,
    kl_max: f64,
    agreed: usize,
    worst: Vec<(TokenLoss, u32)>,
}

/// Figures of one place: losses of artifact and reference, divergence, whether the likeliest token is the same.
struct Place {
    nll: [f64; 2],
    kl: f64,
    agrees: bool,
}

fn place(logits: [&[f32]; 2], target: u32) -> Place {
    let sums = logits.map(log_sum_exp);
    let nll = std::array::from_fn(|model| sums[model] - f64::from(logits[model].get(target as usize).copied().unwrap_or(f32::NAN)));
    let [artifact, reference] = logits;
    Place { nll, kl: divergence(reference, sums[1], artifact, sums[0]), agrees: argmax(artifact) == argmax(reference) }
}

impl Totals {
    /// Adds the scored predictions of `targets`, the first at `position` of the document, which comes with its number.
    fn add(
        &mut self,
        (document, scoring): (usize, &Document),
        position: usize,
        targets: &[u32],
        logits: &[Vec<f32>; 2],
        vocab: usize,
        worst: usize,
    ) {
        let rows = logits[0].par_chunks(vocab).zip(logits[1].par_chunks(vocab)).zip(targets);
        let places: Vec<Place> = rows.map(|((artifact, reference), &target)| place([artifact, reference], target)).collect();
        for (offset, (place, &target)) in places.iter().zip(targets).enumerate().filter(|(offset, _)| scoring.scores(position + offset)) {
            self.nll += place.nll[0];
            self.reference_nll += place.nll[1];
            self.kl += place.kl;
            self.kl_max = self.kl_max.max(place.kl);
            self.agreed += usize::from(place.agrees);
            let [nll, reference_nll] = place.nll;
            let token = TokenLoss { document, position: position + offset, text: String::new(), reference_nll, nll, kl: place.kl };
            self.worst.push((token, target));
        }
        // Stable, so equals stay in the order of the text.
        self.worst.sort_by(|a, b| b.0.kl.total_cmp(&a.0.kl));
        self.worst.truncate(worst);
    }

    fn report(self, artifact: &Engine, documents: &[Document], options: &Options, cache: CacheReport) -> Result<Report> {
        let evaluation = Evaluation::new(self.nll, documents);
        let tokens = evaluation.tokens as f64;
        let (spec, size) = (artifact.spec(), artifact.size());
        let spell = |id: u32| artifact.tokenizer().ok().and_then(|tokenizer| tokenizer.piece(id)).unwrap_or_else(|| id.to_string());
        Ok(Report {
            verdict: Verdict::Pass,
            failures: vec![],
            limits: options.limits.unwrap_or_else(|| Limits::of(size.format)).and(Limits::of_cache(&options.cache)),
            reference_nll_per_token: self.reference_nll / tokens,
            evaluation,
            kl_mean: self.kl / tokens,
            kl_max: self.kl_max,
            top1_agreement: self.agreed as f64 / tokens,
            format: size.format.to_owned(),
            bits_per_weight: size.bits_per_weight(),
            artifact_bytes: size.artifact_bytes,
            speed: bench::measure(artifact, options.cache, 1)?,
            kv: options.cache.format.name().to_owned(),
            kv_bytes_per_token: spec.layers as f64 * options.cache.format.bytes_per_token(spec.kv_heads, spec.head_dim)?,
            cache,
            recall: None,
            reference_recall: None,
            skills: vec![],
            recall_by_place: vec![],
            worst_tokens: self.worst.into_iter().map(|(token, id)| TokenLoss { text: spell(id), ..token }).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
