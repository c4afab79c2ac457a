//! What a comparison found, in the contract's keys.

use super::cache::CacheReport;
use super::evaluate::Evaluation;
use super::limits::Limits;
use crate::data::builtin::{Skill, Spot};
use crate::infer::bench::Speed;
use serde::Serialize;

/// Whether an artifact may be shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Pass,
    Fail,
}

/// What happened to one token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLoss {
    /// Place of the document, from 0.
    pub document: usize,
    /// Place of the token in its document, BOS included.
    pub position: usize,
    /// As the vocabulary spells it.
    pub text: String,
    pub reference_nll: f64,
    pub nll: f64,
    /// Divergence of the artifact's prediction at this place from the reference's, in nats.
    pub kl: f64,
}

/// Shares of solved probes before and after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SkillPair {
    pub skill: Skill,
    pub probes: usize,
    pub reference: f64,
    pub artifact: f64,
}

/// Shares of solved probes before and after, of one skill at one place of long texts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SpotPair {
    pub skill: Skill,
    #[serde(flatten)]
    pub spot: Spot,
    pub probes: usize,
    pub reference: f64,
    pub artifact: f64,
}

/// An artifact against its reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    /// The limits that were passed, one sentence each.
    pub failures: Vec<String>,
    pub limits: Limits,
    pub reference_nll_per_token: f64,
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// Mean divergence from the reference, in nats per token.
    pub kl_mean: f64,
    pub kl_max: f64,
    /// Share of tokens on which both think the same next token likeliest.
    pub top1_agreement: f64,
    /// What the artifact's block matrices are stored as.
    pub format: String,
    pub bits_per_weight: f64,
    pub artifact_bytes: u64,
    #[serde(flatten)]
    pub speed: Speed,
    pub kv: String,
    /// Over all layers, of what attention reads.
    pub kv_bytes_per_token: f64,
    #[serde(flatten)]
    pub cache: CacheReport,
    /// Share of probes of recall, needles and pairs solved, where the model knows the built-in corpus.
    pub recall: Option<f64>,
    pub reference_recall: Option<f64>,
    pub skills: Vec<SkillPair>,
    /// Needles and pairs by length (in tokens) and depth.
    pub recall_by_place: Vec<SpotPair>,
    /// The tokens with the largest divergence, worst first.
    pub worst_tokens: Vec<TokenLoss>,
}

impl Report {
    /// Fills in verdict and failures.
    pub(super) fn judge(mut self) -> Self {
        let mut failures = vec![];
        let Limits { nll_gap, kl_mean, top1_agreement, skill_loss } = self.limits;
        let gap = self.evaluation.nll_per_token - self.reference_nll_per_token;
        if gap > nll_gap {
            failures.push(format!("the loss rose by {gap:.5} nats per token; {nll_gap} is allowed"));
        }
        if self.kl_mean > kl_mean {
            failures.push(format!("the mean divergence is {:.5} nats per token; {kl_mean} is allowed", self.kl_mean));
        }
        if self.top1_agreement < top1_agreement {
            let (found, asked) = (self.top1_agreement * 100.0, top1_agreement * 100.0);
            failures.push(format!("the likeliest token is the same for {found:.2}% of tokens; {asked}% is asked for"));
        }
        for SkillPair { skill, reference, artifact, .. } in &self.skills {
            if reference - artifact > skill_loss {
                let shares = format!("from {:.1}% to {:.1}%", reference * 100.0, artifact * 100.0);
                failures.push(format!("{} fell {shares}; {}% may be lost", skill.name(), skill_loss * 100.0));
            }
        }
        if let Some(violations) = self.cache.certificate_violations.filter(|violations| *violations > 0) {
            failures.push(format!("{violations} outputs of attention lie outside their certificates: a defect of this program"));
        }
        self.verdict = if failures.is_empty() { Verdict::Pass } else { Verdict::Fail };
        self.failures = failures;
        self
    }
}
