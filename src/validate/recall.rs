//! Probes put to both engines, by skill and by place.

use super::compare::Options;
use super::report::{Report, SkillPair, SpotPair};
use super::skills::{SkillScore, outcomes};
use crate::data::builtin::{Probe, Skill};
use crate::error::Result;
use crate::infer::{Engine, Session, cache};

/// What came of each probe, before and after.
pub(super) struct Answers<'p> {
    probes: &'p [Probe],
    reference: Vec<Option<bool>>,
    artifact: Vec<Option<bool>>,
}

/// Asks both for all probes of `options`.
pub(super) fn ask<'p>(artifact: &Engine, reference: &Engine, options: &'p Options) -> Result<Answers<'p>> {
    let context = artifact.spec().context.min(reference.spec().context);
    let ask = |engine, cache: cache::Options| match options.probes.as_slice() {
        [] => Ok(vec![]),
        probes => outcomes(&mut Session::new(engine, cache, context)?, probes),
    };
    Ok(Answers { probes: &options.probes, reference: ask(reference, options.reference_cache())?, artifact: ask(artifact, options.cache)? })
}

impl Answers<'_> {
    fn by_skill(&self) -> Vec<SkillPair> {
        let before = SkillScore::of(self.probes, &self.reference);
        let share = |skill: Skill| before.iter().find(|score| score.skill == skill).map_or(0.0, SkillScore::share);
        let pair = |score: &SkillScore| SkillPair {
            skill: score.skill,
            probes: score.probes,
            reference: share(score.skill),
            artifact: score.share(),
        };
        SkillScore::of(self.probes, &self.artifact).iter().map(pair).collect()
    }

    fn by_place(&self) -> Vec<SpotPair> {
        let mut places: Vec<SpotPair> = vec![];
        for (at, probe) in self.probes.iter().enumerate() {
            let (Some(spot), Some(reference), Some(artifact)) = (probe.spot, self.reference[at], self.artifact[at]) else { continue };
            let known = places.iter().position(|place| (place.skill, place.spot) == (probe.skill, spot));
            let place = known.unwrap_or_else(|| {
                places.push(SpotPair { skill: probe.skill, spot, probes: 0, reference: 0.0, artifact: 0.0 });
                places.len() - 1
            });
            let place = &mut places[place];
            // Shares, once they are divided by the number of probes.
            place.probes += 1;
            place.reference += f64::from(u8::from(reference));
            place.artifact += f64::from(u8::from(artifact));
        }
        for place in &mut places {
            place.reference /= place.probes as f64;
            place.artifact /= place.probes as f64;
        }
        places.sort_by(|a, b| (a.skill, a.spot.length).cmp(&(b.skill, b.spot.length)).then(a.spot.depth.total_cmp(&b.spot.depth)));
        places
    }
}

impl Report {
    /// Adds what the answers say.
    pub(super) fn with_recall(mut self, answers: &Answers<'_>) -> Self {
        self.skills = answers.by_skill();
        self.recall_by_place = answers.by_place();
        let recalls = |pair: &&SkillPair| matches!(pair.skill, Skill::Recall | Skill::Needle | Skill::Pair);
        let pairs: Vec<&SkillPair> = self.skills.iter().filter(recalls).collect();
        let probes: usize = pairs.iter().map(|pair| pair.probes).sum();
        let share = |of: fn(&SkillPair) -> f64| {
            let solved: f64 = pairs.iter().map(|pair| of(pair) * pair.probes as f64).sum();
            (probes > 0).then(|| solved / probes as f64)
        };
        self.recall = share(|pair| pair.artifact);
        self.reference_recall = share(|pair| pair.reference);
        self
    }
}
