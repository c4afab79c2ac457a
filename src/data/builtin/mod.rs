//! The corpus built into the program: stories from a grammar, mixed with skills that can be scored. Document `i` is a pure
//! function of (configuration, seed, i); nothing is copied from elsewhere.

mod grammar;
mod long;
mod skills;

use super::random::Random;
use super::source::{Source, Visitor};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

pub use long::long_probes;
pub use skills::{Probe, Skill, Spot, skill_probes};

/// What the built-in corpus contains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Share of this source in the mixture, relative to the others.
    pub weight: Option<f64>,
    /// How many documents there are.
    pub documents: u64,
    /// Another seed gives other documents.
    pub seed: u64,
    /// How often each kind of document comes, relative to the others.
    pub stories: f64,
    pub recall: f64,
    pub copying: f64,
    pub sums: f64,
    /// Facts hidden in long stories, asked for at the end.
    pub needles: f64,
    /// Long lists of keys with values, asked for some of them.
    pub lists: f64,
    /// Shortest and longest document of needles and lists, in bytes (200 to 1048576); each doubling between is as likely.
    pub shortest: usize,
    pub longest: usize,
    /// Keys in a recall list (2 to 10).
    pub pairs: usize,
    /// Most words in a row to copy (1 to 16); rows have from one word to this many.
    pub copy_words: usize,
    /// Sums add two numbers from 0 to this one (1 to 999).
    pub largest_addend: u64,
    /// Rows or sums in a document of copying or sums (1 to 64).
    pub items: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            weight: None,
            documents: 20_000,
            seed: 0,
            stories: 4.0,
            recall: 3.0,
            copying: 2.0,
            sums: 1.0,
            needles: 0.0,
            lists: 0.0,
            shortest: 400,
            longest: 4000,
            pairs: 4,
            copy_words: 8,
            largest_addend: 9,
            items: 4,
        }
    }
}

impl Config {
    /// Refuses what cannot be generated.
    pub fn check(&self) -> Result<()> {
        let wrong =
            |key: &str, cause: String| Err(Error::input(format!("data.sources builtin.{key}"), cause).fix("give a number in that range"));
        let shares = [self.stories, self.recall, self.copying, self.sums, self.needles, self.lists];
        if shares.iter().any(|share| !share.is_finite() || *share < 0.0) || shares.iter().sum::<f64>() <= 0.0 {
            return wrong("stories", format!("the shares {shares:?} must be 0 or more and not all 0"));
        }
        if !(200..=1 << 20).contains(&self.shortest) || !(self.shortest..=1 << 20).contains(&self.longest) {
            return wrong("longest", format!("lengths from {} to {} are not within 200 to {}", self.shortest, self.longest, 1 << 20));
        }
        if !(2..=10).contains(&self.pairs) {
            return wrong("pairs", format!("{} is outside 2 to 10: values are different digits", self.pairs));
        }
        if !(1..=16).contains(&self.copy_words) {
            return wrong("copy_words", format!("{} is outside 1 to 16", self.copy_words));
        }
        if !(1..=999).contains(&self.largest_addend) {
            return wrong("largest_addend", format!("{} is outside 1 to 999", self.largest_addend));
        }
        if !(1..=64).contains(&self.items) {
            return wrong("items", format!("{} is outside 1 to 64", self.items));
        }
        if !(1..=u64::from(u32::MAX)).contains(&self.documents) {
            return wrong("documents", format!("{} is outside 1 to {}", self.documents, u32::MAX));
        }
        Ok(())
    }

    /// Document `index`.
    pub fn document(&self, index: u64) -> String {
        let random = &mut Random::new(self.seed, "builtin", index);
        let mut at = random.unit() * (self.stories + self.recall + self.copying + self.sums + self.needles + self.lists);
        for (skill, share) in self.skills() {
            if at < share {
                return skills::document(skill, self, random);
            }
            at -= share;
        }
        // Rounding may leave `at` here even when stories are not asked for.
        if self.stories > 0.0 { grammar::grammar().story(random) } else { skills::document(self.any_skill(), self, random) }
    }

    /// Whether there are documents of `skill`.
    pub fn trains(&self, skill: Skill) -> bool {
        self.skills().iter().any(|(other, share)| *other == skill && *share > 0.0)
    }

    fn skills(&self) -> [(Skill, f64); 5] {
        [
            (Skill::Recall, self.recall),
            (Skill::Copy, self.copying),
            (Skill::Sum, self.sums),
            (Skill::Needle, self.needles),
            (Skill::Pair, self.lists),
        ]
    }

    fn any_skill(&self) -> Skill {
        self.skills().into_iter().find(|(_, share)| *share > 0.0).map_or(Skill::Sum, |(skill, _)| skill)
    }
}

impl Source for Config {
    fn name(&self) -> String {
        "builtin".into()
    }

    fn fingerprint(&self) -> Result<u64> {
        self.check()?;
        // The generator's code is part of the content: what its first documents say stands for it.
        let sample: String = (0..64).map(|index| self.document(index)).collect();
        let content = Self { weight: None, ..self.clone() };
        Ok(xxh3_64(format!("{content:?}\n{}\n{sample}", grammar::SOURCE).as_bytes()))
    }

    fn visit(&self, visit: &mut Visitor<'_>) -> Result<u64> {
        self.check()?;
        (0..self.documents).try_for_each(|index| visit(&self.document(index)))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_a_pure_function_of_seed_and_index() {
        let config = Config::default();
        let first: Vec<String> = (0..50).map(|index| config.document(index)).collect();
        assert!((0..50).rev().all(|index| config.document(index) == first[index as usize]));
        let other = Config { seed: 1, ..config };
        assert!((0..50).filter(|&index| other.document(index) == first[index as usize]).count() < 3);
    }

    #[test]
    fn shares_are_kept() {
        let config = Config { stories: 1.0, recall: 1.0, copying: 1.0, sums: 1.0, ..Config::default() };
        let count = |prefix: &str| (0..4000).filter(|&index| config.document(index).starts_with(prefix)).count();
        for prefix in ["recall:", "copy:", "sum:"] {
            assert!((900..1100).contains(&count(prefix)), "{prefix} {}", count(prefix));
        }
        let sums = Config { stories: 0.0, recall: 0.0, copying: 0.0, sums: 1.0, ..config };
        assert!((0..200).all(|index| sums.document(index).starts_with("sum:")));
    }

    #[test]
    fn probes_are_solvable_and_have_the_form_of_documents() {
        let config = Config::default();
        let probes = skill_probes(&config, 5, 100);
        assert_eq!(probes.len(), 300);
        for Probe { skill, prompt, answer, .. } in &probes {
            match skill {
                Skill::Recall => {
                    let (list, key) = prompt.strip_prefix("recall: ").unwrap().split_once("; ").unwrap();
                    assert_eq!(list.split(", ").filter(|pair| *pair == format!("{key}{answer}")).count(), 1);
                    assert_eq!(list.split(", ").count(), config.pairs);
                }
                Skill::Copy => {
                    assert_eq!(prompt.strip_prefix("copy:").unwrap().strip_suffix(" |").unwrap(), answer.strip_suffix('.').unwrap())
                }
                Skill::Sum => {
                    let terms: Vec<u32> = prompt
                        .strip_prefix("sum: ")
                        .unwrap()
                        .strip_suffix(" =")
                        .unwrap()
                        .split(" + ")
                        .map(|n| n.parse().unwrap())
                        .collect();
                    assert_eq!(*answer, format!(" {}.", terms[0] + terms[1]));
                }
                Skill::Needle | Skill::Pair => unreachable!("asked for by `long_probes`"),
            }
        }
        assert_eq!(probes, skill_probes(&config, 5, 100));
        assert!(skill_probes(&config, 6, 100) != probes);
        let recall: String = (0..).map(|index| config.document(index)).find(|text| text.starts_with("recall")).unwrap();
        assert_eq!(recall.matches(';').count(), config.pairs + 1);
        assert!(
            (Skill::Recall.chance(&config) - 0.25).abs() < 1e-9 && Skill::Copy.chance(&config) < 0.02 && Skill::Sum.chance(&config) == 0.1
        );
    }

    #[test]
    fn impossible_settings_are_named() {
        for config in [
            Config { pairs: 11, ..Config::default() },
            Config { stories: f64::NAN, ..Config::default() },
            Config { documents: 0, ..Config::default() },
            Config { items: 0, ..Config::default() },
            Config { shortest: 100, ..Config::default() },
            Config { shortest: 900, longest: 800, ..Config::default() },
        ] {
            assert!(config.check().unwrap_err().to_string().contains("builtin."));
        }
    }
}
