//! From logits to the next token.
//!
//! Filters apply in this order to the distribution at the given temperature: the `top_k` most likely tokens, the smallest set with mass
//! `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751), tokens at least `min_p` times as likely as the likeliest
//! (Nguyen et al. 2024, arXiv:2407.01082). What is left is drawn from in proportion. Draw n is a pure function of seed and n.

use crate::error::{Error, Result};
use crate::ops::rng::Stream;
use serde::{Deserialize, Serialize};

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the smallest set of likeliest tokens with this mass; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this many times as likely as the likeliest; 0 for all.
    pub min_p: f64,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 0.95, min_p: 0.0, seed: 0 }
    }
}

impl Config {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Refuses values outside their ranges, naming the option.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::input("temperature", format!("{} is not a finite number from 0 up", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::input("top-p", format!("{} is not in (0, 1]", self.top_p)));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::input("min-p", format!("{} is not in [0, 1]", self.min_p)));
        }
        Ok(())
    }
}

/// Draws tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: Config,
    stream: Stream,
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// A sampler whose first draw is number 0 of its seed.
    pub fn new(config: Config) -> Result<Self> {
        config.check()?;
        let stream = Stream::new(config.seed, "sampler");
        Ok(Self { config, stream, candidates: vec![] })
    }

    /// The next token.
    ///
    /// # Errors
    /// When the logits are not numbers: the model's weights are broken.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits);
        let top = f64::from(logits[best as usize]);
        if !top.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::input("model", "gave logits that are not finite").fix("check the file; it may be damaged"));
        }
        // One number per token, greedy or not, so that changing another option does not shift the sequence.
        let point = self.stream.uniform();
        if self.config.temperature == 0.0 {
            return Ok(best);
        }
        self.weigh(logits, top);
        self.keep();
        Ok(draw(&self.candidates, point))
    }

    /// Candidates with their probability relative to the likeliest, likeliest first; equals by id.
    fn weigh(&mut self, logits: &[f32], top: f64) {
        let weight = |logit: f32| ((f64::from(logit) - top) / self.config.temperature).exp();
        self.candidates.clear();
        self.candidates
            .extend(logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit))).filter(|(_, weight)| *weight > 0.0));
        self.candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.config.top_k > 0 {
            self.candidates.truncate(self.config.top_k);
        }
    }

    fn keep(&mut self) {
        let mass: f64 = self.candidates.iter().map(|(_, weight)| weight).sum();
        let mut covered = 0.0;
        let nucleus = self.candidates.iter().take_while(|(_, weight)| {
            let needed = covered < self.config.top_p * mass;
            covered += weight;
            needed
        });
        let nucleus = nucleus.count().max(1);
        self.candidates.truncate(nucleus);
        self.candidates.retain(|(_, weight)| *weight >= self.config.min_p);
    }
}

/// The place of the largest logit, the first of equals; not-a-number never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || logits[best].is_nan() {
            best = id;
        }
    }
    best as u32
}

/// The candidate at `point` in [0, 1) of the mass; there is always one, since the likeliest has weight 1.
fn draw(candidates: &[(u32, f64)], point: f64) -> u32 {
    let mut left = point * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    for &(id, weight) in candidates {
        if left < weight {
            return id;
        }
        left -= weight;
    }
    candidates[candidates.len() - 1].0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(config: Config, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(config).unwrap();
        let mut counts = vec![0.0; logits.len()];
        (0..draws).for_each(|_| counts[sampler.sample(logits).unwrap() as usize] += 1.0 / draws as f64);
        counts
    }

    /// ln of probabilities 0.5, 0.25, 0.15, 0.1, in another order.
    fn logits() -> Vec<f32> {
        [0.15f32, 0.5, 0.1, 0.25].iter().map(|p| p.ln() + 3.0).collect()
    }

    const ALL: Config = Config { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 5 };

    #[test]
    fn plain_sampling_follows_the_distribution() {
        let seen = frequencies(ALL, &logits(), 20_000);
        for (seen, expected) in seen.iter().zip([0.15, 0.5, 0.1, 0.25]) {
            assert!((seen - expected).abs() < 0.015, "{seen} {expected}");
        }
    }

    #[test]
    fn temperature_sharpens() {
        let seen = frequencies(Config { temperature: 0.5, ..ALL }, &logits(), 20_000);
        let total = 0.15f64.powi(2) + 0.25 + 0.01 + 0.0625;
        assert!((seen[1] - 0.25 / total).abs() < 0.015, "{seen:?}");
    }

    #[test]
    fn filters_keep_what_they_should() {
        let kept = |config| frequencies(config, &logits(), 500).iter().map(|share| *share > 0.0).collect::<Vec<_>>();
        assert_eq!(kept(Config { top_k: 2, ..ALL }), [false, true, false, true]);
        assert_eq!(kept(Config { top_p: 0.8, ..ALL }), [true, true, false, true]);
        assert_eq!(kept(Config { top_p: 0.01, ..ALL }), [false, true, false, false]);
        assert_eq!(kept(Config { min_p: 0.4, ..ALL }), [false, true, false, true]);
        assert_eq!(kept(Config { min_p: 1.0, ..ALL }), [false, true, false, false]);
        assert_eq!(kept(Config::greedy()), [false, true, false, false]);
    }

    #[test]
    fn draws_repeat_with_the_seed() {
        let run = |seed| {
            let mut sampler = Sampler::new(Config { seed, ..ALL }).unwrap();
            (0..50).map(|_| sampler.sample(&logits()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn ties_go_to_the_first_and_bad_logits_are_refused() {
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -1.0, f32::NEG_INFINITY]), 1);
        let mut sampler = Sampler::new(ALL).unwrap();
        assert!(sampler.sample(&[f32::NAN, 0.0]).is_err());
        assert!(sampler.sample(&[f32::NEG_INFINITY; 2]).is_err());
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0]).unwrap(), 1);
    }

    #[test]
    fn options_out_of_range_are_named() {
        for (config, name) in [
            (Config { temperature: -1.0, ..ALL }, "temperature"),
            (Config { temperature: f64::NAN, ..ALL }, "temperature"),
            (Config { top_p: 0.0, ..ALL }, "top-p"),
            (Config { min_p: 1.5, ..ALL }, "min-p"),
        ] {
            assert!(Sampler::new(config).err().unwrap().to_string().starts_with(name));
        }
    }
}
