//! Which questions of the built-in corpus a model can be asked. A file does not say what its model was trained on, so the model is asked.

use super::skills::{SkillScore, skills};
use crate::data::builtin::{Config, Probe, Skill, long_probes, skill_probes};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::infer::Engine;

/// The seed of probes: no training document has it.
pub const SEED: u64 = u64::MAX;

/// Where needles lie and keys stand.
pub const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// The shortest long text, in tokens.
const SHORTEST: usize = 256;

/// Texts of each form and length; each is asked once for every depth.
const TEXTS: usize = 8;

/// Probes that decide whether a skill is known.
const TRIALS: usize = 16;

/// A model that solves fewer of the trials does not know the skill. One that only knows the form of short recall solves a quarter.
const KNOWN: f64 = 0.5;

/// Questions about texts of at most `context` tokens and of halves of that, at least `count` for each form and length.
pub fn long(tokenizer: &Tokenizer, context: usize, count: usize) -> Result<Vec<Probe>> {
    // An unspellable text has no length; asking would say why.
    tokenizer.encode("Asked: Remember 0123456789")?;
    let lengths: Vec<usize> = (0..4).map(|halvings| context >> halvings).take_while(|length| *length >= SHORTEST).collect();
    let lengths: Vec<usize> = lengths.into_iter().rev().collect();
    let measure = |text: &str| tokenizer.encode(text).map_or(0, |ids| ids.len());
    Ok(long_probes(SEED, count.div_ceil(DEPTHS.len()), &lengths, &DEPTHS, &measure))
}

/// The questions of recall that `engine` can be asked up to `context` tokens; none when it does not know the corpus.
///
/// # Errors
/// When it cannot run at all.
pub fn probes(engine: &Engine, context: usize) -> Result<Vec<Probe>> {
    let Ok(tokenizer) = engine.tokenizer() else { return Ok(vec![]) };
    let short = skill_probes(&Config::default(), SEED, TRIALS).into_iter().filter(|probe| probe.skill == Skill::Recall);
    let Ok(long) = long(tokenizer, context, TEXTS * DEPTHS.len()) else { return Ok(vec![]) };
    let shortest = long.first().and_then(|probe| probe.spot).map_or(0, |spot| spot.length);
    let is_trial = |probe: &&Probe| probe.spot.is_some_and(|spot| spot.length == shortest);
    let trials = |skill| long.iter().filter(is_trial).filter(move |probe| probe.skill == skill).take(TRIALS).cloned();
    let trials: Vec<Probe> = short.chain(trials(Skill::Needle)).chain(trials(Skill::Pair)).collect();
    let scores = skills(engine, &trials, engine.exact_cache())?;
    let knows = |skill: Skill| scores.iter().any(|score: &SkillScore| score.skill == skill && score.share() >= KNOWN);
    let more = skill_probes(&Config::default(), SEED, 100);
    Ok(more.into_iter().filter(|probe| probe.skill == Skill::Recall).chain(long).filter(|probe| knows(probe.skill)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::testing::{Artifact, dense, weights};

    #[test]
    fn an_untrained_model_is_asked_nothing() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 1)).engine();
        assert_eq!(probes(&engine, engine.spec().context).unwrap(), []);
    }

    #[test]
    fn lengths_go_up_to_the_context() {
        let probes = long(&Tokenizer::byte(), 1024, 5).unwrap();
        let mut lengths: Vec<usize> = probes.iter().map(|probe| probe.spot.unwrap().length).collect();
        lengths.dedup();
        assert_eq!(lengths, [256, 512, 1024]);
        assert!(long(&Tokenizer::byte(), 128, 5).unwrap().is_empty());
    }
}
