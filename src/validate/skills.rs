//! Skills of the built-in corpus: the share of probes whose answer a model gives exactly when it always takes the likeliest token.

use crate::data::builtin::{Probe, Skill};
use crate::error::Result;
use crate::infer::generate::{Generation, prompt_ids};
use crate::infer::sampler::Config;
use crate::infer::{Engine, Session, cache};
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

    /// By skill, from what came of each probe; skills without an outcome are left out.
    pub(super) fn of(probes: &[Probe], outcomes: &[Option<bool>]) -> Vec<Self> {
        let mut scores: Vec<Self> = Skill::ALL.map(|skill| Self { skill, solved: 0, probes: 0 }).into();
        for (probe, solved) in probes.iter().zip(outcomes).filter_map(|(probe, outcome)| Some((probe, (*outcome)?))) {
            for score in scores.iter_mut().filter(|score| score.skill == probe.skill) {
                score.probes += 1;
                score.solved += usize::from(solved);
            }
        }
        scores.retain(|score| score.probes > 0);
        scores
    }
}

/// Puts every probe to `engine`; skills without probes are left out, and so are probes longer than the context.
///
/// # Errors
/// When the engine has no tokenizer, or one that cannot spell a probe.
pub fn skills(engine: &Engine, probes: &[Probe], cache: impl Into<cache::Options>) -> Result<Vec<SkillScore>> {
    Ok(SkillScore::of(probes, &outcomes(&mut Session::new(engine, cache, engine.spec().context)?, probes)?))
}

/// Whether each of `probes` is solved: the greedy continuation begins with the answer; nothing where there is no room for it.
pub(super) fn outcomes(session: &mut Session<'_>, probes: &[Probe]) -> Result<Vec<Option<bool>>> {
    let mut held = vec![];
    probes.iter().map(|probe| solves(session, &mut held, probe)).collect()
}

/// `held` is the prompt that the session went through last: what the next one shares with it stays in the cache.
fn solves(session: &mut Session<'_>, held: &mut Vec<u32>, probe: &Probe) -> Result<Option<bool>> {
    let tokenizer = session.engine().tokenizer()?;
    let prompt = prompt_ids(tokenizer, &probe.prompt)?;
    // No token but BOS is shorter than a byte, so this is room enough.
    let most = probe.answer.len();
    if prompt.is_empty() || prompt.len() + most > session.capacity() {
        return Ok(None);
    }
    let shared = held.iter().zip(&prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
    session.truncate(shared);
    let mut text = String::new();
    for piece in Generation::new(session, &prompt[shared..], Config::greedy(), most)? {
        text += &piece?;
        if text.len() >= probe.answer.len() || !probe.answer.starts_with(&text) {
            break;
        }
    }
    *held = prompt;
    Ok(Some(text.starts_with(&probe.answer)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::builtin::long_probes;
    use crate::infer::kv::Format;
    use crate::infer::testing::{Artifact, dense, weights};

    #[test]
    fn what_successive_prompts_share_changes_no_answer() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 7)).engine();
        let context = engine.spec().context;
        let mut probes = long_probes(1, 2, &[context / 2, context, 2 * context], &[0.0, 0.5, 1.0], &|text: &str| text.len());
        // Some that can be solved: what the model says of itself.
        for probe in probes.iter_mut().step_by(2) {
            let mut session = Session::new(&engine, Format::F16, context).unwrap();
            let ids = prompt_ids(engine.tokenizer().unwrap(), &probe.prompt).unwrap();
            if ids.len() + 8 < context {
                probe.answer = Generation::new(&mut session, &ids, Config::greedy(), 2).unwrap().map(|piece| piece.unwrap()).collect();
            }
        }
        let mut session = Session::new(&engine, Format::F16, context).unwrap();
        let together = outcomes(&mut session, &probes).unwrap();
        let alone: Vec<_> = probes
            .iter()
            .map(|probe| {
                let mut session = Session::new(&engine, Format::F16, context).unwrap();
                outcomes(&mut session, std::slice::from_ref(probe)).unwrap()[0]
            })
            .collect();
        assert_eq!(together, alone);
        assert!(together.contains(&None) && together.contains(&Some(true)) && together.contains(&Some(false)), "{together:?}");
    }
}
