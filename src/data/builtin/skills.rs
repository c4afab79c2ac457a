//! Skills as texts of a fixed form, so that a damaged cache or a broken mask shows as lost recall and not as a vague
//! number:
//!
//! ```text
//! recall: fox 7, owl 3, cat 9; owl 3; cat 9; fox 7;
//! copy: moon stone boat | moon stone boat.
//! sum: 4 + 7 = 11.
//! ```

use super::grammar::grammar;
use super::{Config, long};
use crate::data::random::Random;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// What a probe asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Skill {
    /// The value that came with a key.
    Recall,
    /// A row of words again.
    Copy,
    /// An addition.
    Sum,
    /// A fact hidden in a long text.
    Needle,
    /// The value of one key of a long list.
    Pair,
}

impl Skill {
    /// Every skill.
    pub const ALL: [Self; 5] = [Self::Recall, Self::Copy, Self::Sum, Self::Needle, Self::Pair];

    /// Those of a few words.
    pub const SHORT: [Self; 3] = [Self::Recall, Self::Copy, Self::Sum];

    /// As printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recall => "recall",
            Self::Copy => "copy",
            Self::Sum => "sum",
            Self::Needle => "needle",
            Self::Pair => "pair",
        }
    }

    /// The share of probes that a model solves which knows the form but not the skill: one of the listed values for recall, any
    /// words for copy, the most common sum for sum, any number of two digits for needle and pair.
    pub fn chance(self, config: &Config) -> f64 {
        let words = grammar().words.nouns.len() as i32;
        match self {
            Self::Recall => 1.0 / config.pairs as f64,
            Self::Copy => {
                let row = |length: i32| (0..length).map(|used| 1.0 / f64::from(words - used)).product::<f64>();
                (1..=config.copy_words as i32).map(row).sum::<f64>() / config.copy_words as f64
            }
            Self::Sum => 1.0 / (config.largest_addend + 1) as f64,
            Self::Needle | Self::Pair => 1.0 / 90.0,
        }
    }
}

/// One question with its answer, which follows the prompt without a blank of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub skill: Skill,
    pub prompt: String,
    pub answer: String,
    /// Where in a long text the answer is.
    pub spot: Option<Spot>,
}

/// A place in a long text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spot {
    /// What prompt and answer take together at most, in the unit the probe was made with.
    pub length: usize,
    /// From 0, the beginning, to 1, just before the question.
    pub depth: f64,
}

/// `count` probes of each short skill, from random streams that no training document uses.
pub fn skill_probes(config: &Config, seed: u64, count: usize) -> Vec<Probe> {
    let one = |skill: Skill, index: usize| probe(skill, config, &mut Random::new(seed, &format!("probe {}", skill.name()), index as u64));
    Skill::SHORT.iter().flat_map(|&skill| (0..count).map(move |index| one(skill, index))).collect()
}

/// A probe of a short skill; for the others [`super::long_probes`] has the form of documents.
fn probe(skill: Skill, config: &Config, random: &mut Random) -> Probe {
    let (prompt, answer) = match skill {
        Skill::Recall | Skill::Needle | Skill::Pair => {
            let pairs = pairs(config, random);
            let (key, value) = random.pick(&pairs);
            (format!("recall: {}; {key}", listed(&pairs)), format!(" {value}"))
        }
        Skill::Copy => {
            // Rows of different lengths: at one fixed distance the copy could be found without looking at the words.
            let length = 1 + random.below(config.copy_words as u64) as usize;
            let words = random.sample(&grammar().words.nouns, length).join(" ");
            (format!("copy: {words} |"), format!(" {words}."))
        }
        Skill::Sum => {
            let (left, right) = addends(config, random);
            (format!("sum: {left} + {right} ="), format!(" {}.", left + right))
        }
    };
    Probe { skill, prompt, answer, spot: None }
}

/// A document of one skill: a list or text asked for what is in it, or several copies or sums.
pub(super) fn document(skill: Skill, config: &Config, random: &mut Random) -> String {
    match skill {
        Skill::Recall => recall(config, random),
        Skill::Needle => long::needles(long::length(config, random), random),
        Skill::Pair => long::list(long::length(config, random), random),
        Skill::Copy | Skill::Sum => items(skill, config, random),
    }
}

fn recall(config: &Config, random: &mut Random) -> String {
    let mut pairs = pairs(config, random);
    let mut text = format!("recall: {};", listed(&pairs));
    random.shuffle(&mut pairs);
    for (key, value) in pairs {
        write!(text, " {key} {value};").expect("writing to a string cannot fail");
    }
    text
}

fn items(skill: Skill, config: &Config, random: &mut Random) -> String {
    let items = (0..config.items).map(|_| probe(skill, config, random));
    items.map(|item| item.prompt + &item.answer).collect::<Vec<_>>().join("\n")
}

/// Different keys with different digits.
fn pairs(config: &Config, random: &mut Random) -> Vec<(String, u64)> {
    let keys = random.sample(&grammar().words.nouns, config.pairs);
    let values = random.sample(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], config.pairs);
    keys.into_iter().zip(values).collect()
}

fn listed(pairs: &[(String, u64)]) -> String {
    pairs.iter().map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>().join(", ")
}

fn addends(config: &Config, random: &mut Random) -> (u64, u64) {
    let bound = config.largest_addend + 1;
    (random.below(bound), random.below(bound))
}
