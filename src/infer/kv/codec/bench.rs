//! What each codec costs and loses, measured: bytes, distortion, time.

use super::{NAMES, codec};
use crate::error::Result;
use crate::ops::cpu::attention::{TILE, key_tile_len, padded, value_tile_len};
use crate::ops::cpu::bench::best_time;
use crate::ops::rng::Stream;
use half::f16;
use serde::Serialize;
use std::time::Duration;

/// Pages that distortion is averaged over.
const PAGES: usize = 100;

/// One codec at one head width. Distortions are squared errors over squared norms.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// As `--kv` spells it.
    pub name: &'static str,
    /// Channels of a head.
    pub head_dim: usize,
    /// Per token and head, certificate included.
    pub bytes_per_token: f64,
    /// Keys whose channels are independent standard normals.
    pub keys: f64,
    /// Keys with a mean and a spread of their own in each channel, four channels far larger.
    pub keys_with_outliers: f64,
    /// Standard normal values.
    pub values: f64,
    /// Keys and values of a page.
    pub encode_microseconds: f64,
    /// Keys and values of a page.
    pub decode_microseconds: f64,
}

/// Figures of every codec at each width.
pub fn figures(widths: &[usize], budget: Duration) -> Result<Vec<Figures>> {
    widths.iter().flat_map(|width| NAMES.map(|name| (name, *width))).map(|(name, width)| measure(name, width, budget)).collect()
}

fn measure(name: &str, head_dim: usize, budget: Duration) -> Result<Figures> {
    let codec = codec(name, head_dim)?;
    let mut page = vec![0; codec.page_bytes()];
    let (mut key_tile, mut value_tile) = (vec![0.0; key_tile_len(head_dim)], vec![0.0; value_tile_len(head_dim)]);
    let mut lost = |keys: &[f16], values: &[f16]| {
        codec.encode(keys, values, &mut page);
        codec.decode_keys(&page, &mut key_tile);
        codec.decode_values(&page, &mut value_tile);
        let key = distortion(keys, head_dim, |token, channel| key_tile[channel * TILE + token]);
        [key, distortion(values, head_dim, |token, channel| value_tile[token * padded(head_dim) + channel])]
    };
    let mut stream = Stream::new(1, "codec bench");
    let [mut keys, mut keys_with_outliers, mut values] = [0.0; 3];
    for _ in 0..PAGES {
        let plain = normal(&mut stream, head_dim);
        let [key, value] = lost(&plain, &plain);
        let [outlier, _] = lost(&with_outliers(&mut stream, head_dim), &plain);
        keys += key / PAGES as f64;
        keys_with_outliers += outlier / PAGES as f64;
        values += value / PAGES as f64;
    }
    let plain = normal(&mut stream, head_dim);
    let encode = best_time(budget, || codec.encode(&plain, &plain, &mut page));
    let decode = best_time(budget, || {
        codec.decode_keys(&page, &mut key_tile);
        codec.decode_values(&page, &mut value_tile);
    });
    Ok(Figures {
        name: codec.name(),
        head_dim,
        bytes_per_token: codec.page_bytes() as f64 / TILE as f64,
        keys,
        keys_with_outliers,
        values,
        encode_microseconds: encode * 1e6,
        decode_microseconds: decode * 1e6,
    })
}

fn normal(stream: &mut Stream, head_dim: usize) -> Vec<f16> {
    (0..TILE * head_dim).map(|_| f16::from_f64(stream.normal())).collect()
}

/// Channel means are 1.5 of its spread, spreads log-normal (sigma 0.5); four channels have 8 times the mean and 3 times the spread.
fn with_outliers(stream: &mut Stream, head_dim: usize) -> Vec<f16> {
    let mut channels: Vec<(f64, f64)> = (0..head_dim)
        .map(|_| {
            let spread = (0.5 * stream.normal()).exp();
            (1.5 * stream.normal() * spread, spread)
        })
        .collect();
    for _ in 0..4 {
        let (mean, spread) = &mut channels[stream.below(head_dim as u64) as usize];
        (*mean, *spread) = (8.0 * *mean, 3.0 * *spread);
    }
    (0..TILE)
        .flat_map(|_| channels.iter().map(|(mean, spread)| f16::from_f64(mean + spread * stream.normal())).collect::<Vec<_>>())
        .collect()
}

fn distortion(originals: &[f16], head_dim: usize, stored: impl Fn(usize, usize) -> f32) -> f64 {
    let (mut error, mut square) = (0.0, 0.0);
    for (i, x) in originals.iter().enumerate() {
        error += (x.to_f64() - f64::from(stored(i / head_dim, i % head_dim))).powi(2);
        square += x.to_f64().powi(2);
    }
    error / square
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More bytes lose less; every codec loses what its number of bits says.
    #[test]
    fn figures_are_in_order() {
        let all = figures(&[64], Duration::ZERO).unwrap();
        let of = |name: &str| all.iter().find(|figures| figures.name == name).unwrap();
        let rates = ["turboquant-2", "turboquant-2.5", "turboquant-3", "turboquant-3.5", "turboquant-4", "int8-int4"].map(of);
        assert!(rates.is_sorted_by(|a, b| a.bytes_per_token < b.bytes_per_token));
        assert!(rates.is_sorted_by(|a, b| a.keys > b.keys && a.keys_with_outliers > b.keys_with_outliers));
        assert!(of("fp8").keys < 1.5e-3 && of("int8-int4").keys < 3e-5 && of("int8-int4").values < 1e-2);
        assert!(of("oscar-2").keys < 0.2, "{}", of("oscar-2").keys);
    }
}
