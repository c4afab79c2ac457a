//! Attention heads in f64 for the tests: originals, what a quantizer makes of them, and everything the bounds speak of.

use super::{PagePart, PageSquares, grouped_score_error, interval_score_error, radius_score_error, uniform_score_variance};
use crate::ops::rng::Stream;

/// Sizes and precision of a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) page: usize,
    pub(super) width: usize,
    /// Channels of a value that share a step.
    pub(super) group: usize,
    pub(super) key_bits: u32,
    pub(super) value_bits: u32,
    /// Subtractive dither instead of plain rounding.
    pub(super) dither: bool,
    /// Deviation of the logits.
    pub(super) spread: f64,
}

/// A head, its stored form and the steps it was rounded to.
pub(super) struct Head {
    pub(super) shape: Shape,
    pub(super) query: Vec<f64>,
    pub(super) keys: Vec<Vec<f64>>,
    pub(super) values: Vec<Vec<f64>>,
    pub(super) stored_keys: Vec<Vec<f64>>,
    pub(super) stored_values: Vec<Vec<f64>>,
    /// `[page][channel]`; 0 for original keys.
    pub(super) key_steps: Vec<Vec<f64>>,
    /// `[token][group]`; 0 for original values.
    pub(super) value_steps: Vec<Vec<f64>>,
}

/// A softmax over one set of logits and what it draws from one set of values.
pub(super) struct Output {
    pub(super) weights: Vec<f64>,
    pub(super) sum: f64,
    pub(super) maximum: f64,
    pub(super) vector: Vec<f64>,
}

pub(super) fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

pub(super) fn norm(a: &[f64]) -> f64 {
    a.iter().map(|a| a * a).sum::<f64>().sqrt()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rounds numbers to 2^bits levels over their range; returns the step. With dither the range takes one step less, so that nothing clips.
pub(super) fn quantize(numbers: &mut [f64], bits: u32, dither: Option<&mut Stream>) -> f64 {
    let (least, most) = numbers.iter().fold((f64::MAX, f64::MIN), |(least, most), x| (least.min(*x), most.max(*x)));
    let levels = f64::from((1u32 << bits) - 1);
    let step = (most - least) / if dither.is_some() { levels - 1.0 } else { levels };
    if step == 0.0 {
        return 0.0;
    }
    match dither {
        None => numbers.iter_mut().for_each(|x| *x = least + step * ((*x - least) / step).round()),
        Some(stream) => numbers.iter_mut().for_each(|x| {
            let offset = stream.uniform() - 0.5;
            let code = ((*x - least) / step + 0.5 + offset).round().clamp(0.0, levels);
            *x = least + step * (code - 0.5 - offset);
        }),
    }
    step
}

impl Head {
    /// Keys with log-normal scales and means per channel, normal values and a query whose logits have the shape's spread.
    pub(super) fn new(shape: Shape, stream: &mut Stream) -> Self {
        let Shape { tokens, width, .. } = shape;
        let channels: Vec<(f64, f64)> = (0..width).map(|_| (stream.normal(), stream.normal().exp())).collect();
        let mut row =
            |channels: &[(f64, f64)]| -> Vec<f64> { channels.iter().map(|(mean, scale)| mean * scale + scale * stream.normal()).collect() };
        let keys: Vec<Vec<f64>> = (0..tokens).map(|_| row(&channels)).collect();
        let plain = vec![(0.3, 1.0); width];
        let values = (0..tokens).map(|_| row(&plain)).collect();
        let mut query: Vec<f64> = row(&vec![(0.0, 1.0); width]);
        let variance = query.iter().zip(&channels).map(|(q, (_, scale))| (q * scale).powi(2)).sum::<f64>() / width as f64;
        query.iter_mut().for_each(|q| *q *= shape.spread / variance.sqrt());
        Self::stored(shape, query, keys, values, stream)
    }

    /// Stores the given head.
    pub(super) fn stored(shape: Shape, query: Vec<f64>, keys: Vec<Vec<f64>>, values: Vec<Vec<f64>>, stream: &mut Stream) -> Self {
        let (mut stored_keys, mut stored_values, mut key_steps) = (keys.clone(), values.clone(), vec![]);
        for page in stored_keys.chunks_mut(shape.page) {
            let channel = |c: usize| {
                let mut column: Vec<f64> = page.iter().map(|key| key[c]).collect();
                let step = quantize(&mut column, shape.key_bits, shape.dither.then_some(&mut *stream));
                page.iter_mut().zip(column).for_each(|(key, x)| key[c] = x);
                step
            };
            key_steps.push((0..shape.width).map(channel).collect());
        }
        let mut groups = |value: &mut Vec<f64>| -> Vec<f64> {
            value.chunks_mut(shape.group).map(|group| quantize(group, shape.value_bits, shape.dither.then_some(&mut *stream))).collect()
        };
        let value_steps = stored_values.iter_mut().map(&mut groups).collect();
        Self { shape, query, keys, values, stored_keys, stored_values, key_steps, value_steps }
    }

    pub(super) fn pages(&self) -> usize {
        self.key_steps.len()
    }

    pub(super) fn tokens(&self, page: usize) -> std::ops::Range<usize> {
        page * self.shape.page..self.keys.len().min((page + 1) * self.shape.page)
    }

    /// Reads a page's original keys.
    pub(super) fn promote_keys(&mut self, page: usize) {
        for token in self.tokens(page) {
            self.stored_keys[token] = self.keys[token].clone();
        }
        self.key_steps[page].fill(0.0);
    }

    /// Reads a page's original values.
    pub(super) fn promote_values(&mut self, page: usize) {
        for token in self.tokens(page) {
            self.stored_values[token] = self.values[token].clone();
            self.value_steps[token].fill(0.0);
        }
    }

    pub(super) fn logits(&self, keys: &[Vec<f64>]) -> Vec<f64> {
        keys.iter().map(|key| dot(&self.query, key) / (self.shape.width as f64).sqrt()).collect()
    }

    /// Largest logit error of a page.
    pub(super) fn worst_score_error(&self, page: usize) -> f64 {
        let [logits, stored] = [&self.keys, &self.stored_keys].map(|keys| self.logits(&keys[self.tokens(page)]));
        logits.iter().zip(stored).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    /// A1, A2 and A3 (over pairs of channels) of a page.
    pub(super) fn score_errors(&self, page: usize) -> [f64; 3] {
        let error = |token: usize| -> Vec<f64> { self.keys[token].iter().zip(&self.stored_keys[token]).map(|(k, s)| k - s).collect() };
        let largest = |norms: &mut dyn Iterator<Item = f64>| norms.fold(0.0, f64::max);
        let radius = largest(&mut self.tokens(page).map(|token| norm(&error(token))));
        let pair = |pair: usize| largest(&mut self.tokens(page).map(|token| norm(&error(token)[2 * pair..2 * pair + 2])));
        let radii: Vec<f64> = (0..self.shape.width / 2).map(pair).collect();
        [
            interval_score_error(&self.query, &self.key_steps[page]),
            radius_score_error(&self.query, radius),
            grouped_score_error(&self.query, &radii),
        ]
    }

    /// The parts of pages in `output` over `values`, distances about the output; logit errors are the least of A.
    pub(super) fn parts(&self, output: &Output, values: &[Vec<f64>]) -> Vec<PagePart> {
        let part = |page: usize| {
            let tokens = || self.tokens(page);
            let square = |token: usize| distance(&values[token], &output.vector).powi(2);
            PagePart {
                mass: tokens().map(|token| output.weights[token]).sum(),
                score_error: self.score_errors(page).into_iter().fold(f64::MAX, f64::min),
                value_error: tokens().map(|token| distance(&self.values[token], &self.stored_values[token])).fold(0.0, f64::max),
                dispersion: tokens().map(|token| output.weights[token] * square(token)).sum(),
                radius: tokens().map(square).fold(0.0, f64::max).sqrt(),
            }
        };
        (0..self.pages()).map(part).collect()
    }

    /// What the meter needs, exactly.
    pub(super) fn squares(&self, output: &Output) -> Vec<PageSquares> {
        let page = |page: usize| {
            let squares = || self.tokens(page).map(|token| output.weights[token].powi(2));
            let distances = self.tokens(page).map(|token| distance(&self.stored_values[token], &output.vector).powi(2));
            let steps = self.tokens(page).map(|token| self.value_steps[token].iter().map(|step| step * step).sum::<f64>());
            PageSquares {
                score_variance: uniform_score_variance(&self.query, &self.key_steps[page]),
                value_square: steps.sum::<f64>() / self.tokens(page).len() as f64 * self.shape.group as f64 / 12.0,
                squares: squares().sum(),
                dispersion: squares().zip(distances).map(|(square, distance)| square * distance).sum(),
            }
        };
        (0..self.pages()).map(page).collect()
    }
}

/// Attention with these logits over these values.
pub(super) fn attend(logits: &[f64], values: &[Vec<f64>]) -> Output {
    let maximum = logits.iter().copied().fold(f64::MIN, f64::max);
    let mut weights: Vec<f64> = logits.iter().map(|logit| (logit - maximum).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= sum);
    let mut vector = vec![0.0; values[0].len()];
    for (weight, value) in weights.iter().zip(values) {
        vector.iter_mut().zip(value).for_each(|(out, x)| *out += weight * x);
    }
    Output { weights, sum, maximum, vector }
}

/// Half the sum of absolute differences.
pub(super) fn variation(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0
}
