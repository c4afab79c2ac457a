//! Skills of the built-in corpus: the share of probes whose answer a model gives exactly when it always takes the likeliest token.

use crate::data::builtin::{Probe, Skill};
use crate::error::Result;
use crate::infer::generate::{Generation, prompt_ids};
use crate::infer::kv::Format;
use crate::infer::sampler::Config;
use crate::infer::{Engine, Session};
use serde::Serialize;

/// How one skill went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SkillScore {
    pub skill: Skill,
    pub solved: usize,
    pub probes: usize,
}

impl SkillScore {
    /// Share of probes solved.
    pub fn share(&self) -> f64 {
        self.solved as f64 / self.probes.max(1) as f64
    }
}

/// Puts every probe to `engine`; skills without probes are left out, and so are probes longer than the context.
///
/// # Errors
/// When the engine has no tokenizer, or one that cannot spell a probe.
pub fn skills(engine: &Engine, probes: &[Probe], cache: Format) -> Result<Vec<SkillScore>> {
    let mut session = Session::new(engine, cache, engine.spec().context)?;
    let mut scores: Vec<SkillScore> = Skill::ALL.map(|skill| SkillScore { skill, solved: 0, probes: 0 }).into();
    for probe in probes {
        let Some(solved) = solves(&mut session, probe)? else { continue };
        if let Some(score) = scores.iter_mut().find(|score| score.skill == probe.skill) {
            score.probes += 1;
            score.solved += usize::from(solved);
        }
    }
    scores.retain(|score| score.probes > 0);
    Ok(scores)
}

/// Whether the greedy continuation begins with the answer; `None` when there is no room for it.
fn solves(session: &mut Session<'_>, probe: &Probe) -> Result<Option<bool>> {
    let tokenizer = session.engine().tokenizer()?;
    let prompt = prompt_ids(tokenizer, &probe.prompt)?;
    session.truncate(0);
    // No token but BOS is shorter than a byte, so this is room enough.
    let most = probe.answer.len();
    if prompt.is_empty() || prompt.len() + most > session.capacity() {
        return Ok(None);
    }
    let mut text = String::new();
    for piece in Generation::new(session, &prompt, Config::greedy(), most)? {
        text += &piece?;
        if text.len() >= probe.answer.len() || !probe.answer.starts_with(&text) {
            break;
        }
    }
    Ok(Some(text.starts_with(&probe.answer)))
}
