//! Outlier statistics of activations, with the excess kurtosis of Outlier-Safe Pre-Training (arXiv 2506.19697, `evaluate_kurtosis.py`):
//! per token k = mean(x^4) / std(x)^4 - 3, fourth moment not centred, std with n - 1; then max(k, 0); mean over tokens; then the
//! unweighted mean over the layers + 1 states of the residual stream, the last one after the final norm.
//! Gaussian rows give the floor of the clipped statistic (0.12 at width 128, 0.08 at 512), a single spike its ceiling, width - 3.

use super::{Observer, Site};
use crate::error::Result;
use crate::ops::host::host;
use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Sums over the tokens seen at one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    pub tokens: u64,
    clipped: f64,
    plain: f64,
    /// Largest magnitude.
    pub largest: f32,
    /// Largest max|x| / rms(x) of a token.
    pub largest_ratio: f32,
}

impl Moments {
    /// Mean over tokens of max(k, 0).
    pub fn kurtosis(&self) -> f64 {
        self.clipped / self.tokens.max(1) as f64
    }

    /// Mean over tokens of k itself.
    pub fn unclipped_kurtosis(&self) -> f64 {
        self.plain / self.tokens.max(1) as f64
    }

    fn of_row(row: &[f32]) -> Self {
        let n = row.len() as f64;
        let (mut sum, mut square, mut fourth, mut largest) = (0.0f64, 0.0f64, 0.0f64, 0.0f32);
        for &x in row {
            let wide = f64::from(x);
            sum += wide;
            square += wide * wide;
            fourth += wide * wide * wide * wide;
            largest = largest.max(x.abs());
        }
        let variance = (square - sum * sum / n) / (n - 1.0).max(1.0);
        let k = if variance > 0.0 { fourth / n / (variance * variance) - 3.0 } else { 0.0 };
        let root_mean_square = (square / n).sqrt() as f32;
        let largest_ratio = if root_mean_square > 0.0 { largest / root_mean_square } else { 0.0 };
        Self { tokens: 1, clipped: k.max(0.0), plain: k, largest, largest_ratio }
    }

    fn merge(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            clipped: self.clipped + other.clipped,
            plain: self.plain + other.plain,
            largest: self.largest.max(other.largest),
            largest_ratio: self.largest_ratio.max(other.largest_ratio),
        }
    }
}

/// Collects [`Moments`] at every site of a forward pass.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    sites: RefCell<BTreeMap<Site, Moments>>,
}

impl Statistics {
    /// Moments by site.
    pub fn sites(&self) -> BTreeMap<Site, Moments> {
        self.sites.borrow().clone()
    }

    /// Kurtosis of each state of the residual stream, embedding first.
    pub fn stream_kurtosis(&self) -> Vec<f64> {
        let stream = |(site, moments): (&Site, &Moments)| if let Site::Stream { .. } = site { Some(moments.kurtosis()) } else { None };
        self.sites.borrow().iter().filter_map(stream).collect()
    }

    /// The headline figure: unweighted mean of [`Statistics::stream_kurtosis`].
    pub fn kurtosis_mean(&self) -> f64 {
        let layers = self.stream_kurtosis();
        layers.iter().sum::<f64>() / layers.len().max(1) as f64
    }

    /// Largest magnitude in the residual stream.
    pub fn largest_in_stream(&self) -> f32 {
        self.largest(|site| matches!(site, Site::Stream { .. }), |moments| moments.largest)
    }

    /// Largest max|x| / rms(x) of a token at the inputs of the output and down projections, which the stream's kurtosis does not see.
    pub fn largest_ratio_inside(&self) -> f32 {
        self.largest(|site| matches!(site, Site::OutputInput { .. } | Site::DownInput { .. }), |moments| moments.largest_ratio)
    }

    fn largest(&self, wanted: impl Fn(&Site) -> bool, value: impl Fn(&Moments) -> f32) -> f32 {
        self.sites.borrow().iter().filter(|(site, _)| wanted(site)).map(|(_, moments)| value(moments)).fold(0.0, f32::max)
    }
}

impl Observer for Statistics {
    fn observe(&self, site: Site, value: &Tensor) -> Result<Option<Tensor>> {
        let value = value.to_device(&candle_core::Device::Cpu)?;
        let width = value.dim(1)?;
        let rows = host(&value)?;
        // Rows are merged in order within fixed chunks and chunks in order, so the sums do not depend on the number of threads.
        let chunks: Vec<Moments> =
            rows.par_chunks(64 * width).map(|chunk| chunk.chunks(width).map(Moments::of_row).fold(Moments::default(), Moments::merge)).collect();
        let mut sites = self.sites.borrow_mut();
        let total = sites.entry(site).or_default();
        *total = chunks.into_iter().fold(*total, Moments::merge);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    #[test]
    fn a_spike_reaches_the_ceiling_and_scale_does_not_matter() {
        let width = 512;
        let mut row = vec![0.0f32; width];
        row[7] = 3.0;
        // The fourth moment is not centred, so a lone spike comes close to width - 3 as (1 - 1/n)^-2 allows.
        let spike = Moments::of_row(&row).kurtosis();
        assert!((spike / (width as f64 - 3.0) - 1.0).abs() < 0.01, "{spike}");
        row[7] = 3000.0;
        assert!((Moments::of_row(&row).kurtosis() - spike).abs() < 1e-6 * spike);
    }

    #[test]
    fn gaussian_rows_sit_on_the_floor() {
        let width = 512;
        let mut stream = Stream::new(5, "kurtosis");
        let rows: Vec<f32> = (0..2000 * width).map(|_| stream.normal() as f32).collect();
        let tensor = Tensor::from_vec(rows, (2000, width), &candle_core::Device::Cpu).unwrap();
        let statistics = Statistics::default();
        statistics.observe(Site::Stream { layer: 0 }, &tensor).unwrap();
        let floor = statistics.kurtosis_mean();
        assert!((floor - 0.079).abs() < 0.008, "{floor}");
        assert!(statistics.sites()[&Site::Stream { layer: 0 }].unclipped_kurtosis().abs() < 0.02);
    }
}
