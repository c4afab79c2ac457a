//! Bytes of pages, as `kernels/page.cuh` lays them out.

use half::f16;

use crate::error::{Error, Result};

/// Tokens of a page.
pub const PAGE: usize = 64;
/// Set in a page entry that names an exact page.
pub const EXACT: u32 = 1 << 31;
/// Channels of a value that share a scale.
const GROUP: usize = 32;
/// Head widths the kernels are made for; others are padded to the next.
const WIDTHS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

/// Heads of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub kv_heads: usize,
    /// Query heads that share a key-value head. Query head `h` reads key-value head `h / group`.
    pub group: usize,
    pub head_dim: usize,
}

impl Shape {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Channels of a head in a page: `head_dim` padded to what the kernels are made for.
    ///
    /// # Errors
    /// For heads wider than 256.
    pub fn width(&self) -> Result<usize> {
        let fitting = WIDTHS.into_iter().find(|width| *width >= self.head_dim);
        fitting.ok_or_else(|| {
            let cause = format!("the CUDA attention kernels take heads of up to 256 channels; this model's are {} wide", self.head_dim);
            Error::input("head_dim", cause).fix("run it with --device cpu")
        })
    }
}

/// Format of the near tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// None: every page is exact.
    F16,
    /// e4m3 with one f16 scale for the keys and one for the values of a page.
    Fp8,
    /// Keys in 8 bits per channel, values in 4 bits per group of 32 channels.
    Int8Int4,
}

impl Near {
    pub const ALL: [Near; 3] = [Near::F16, Near::Fp8, Near::Int8Int4];

    /// As it stands in kernels' names.
    pub fn name(self) -> &'static str {
        match self {
            Near::F16 => "f16",
            Near::Fp8 => "fp8",
            Near::Int8Int4 => "int8_int4",
        }
    }

    /// Bytes of a near page of one head, certificate included; for [`Near::F16`] those of an exact page.
    ///
    /// # Errors
    /// As [`Shape::width`].
    pub fn page_bytes(self, shape: &Shape) -> Result<usize> {
        let width = shape.width()?;
        Ok(match self {
            Near::F16 => exact_page_bytes(width),
            Near::Fp8 => 32 + 2 * PAGE + 2 * PAGE * width,
            Near::Int8Int4 => 16 + 2 * PAGE + 100 * width + 4 * PAGE * width.div_ceil(GROUP),
        })
    }
}

/// Bytes of an exact page of one head of padded `width`.
pub fn exact_page_bytes(width: usize) -> usize {
    2 * PAGE + 4 * PAGE * width
}

/// Element of `channel` of `token`'s key among the keys of an exact page.
fn key_index(token: usize, channel: usize, width: usize) -> usize {
    let lane = token % 8 * 4 + channel % 16 / 4;
    ((token / 16 * (width / 16) + channel / 16) * 32 + lane) * 8 + token / 8 % 2 * 4 + channel % 4
}

/// Element of `channel` of `token`'s value among the values of an exact page.
fn value_index(token: usize, channel: usize, width: usize) -> usize {
    let lane = channel % 8 * 4 + token % 8 / 2;
    ((token / 16 * (width / 16) + channel / 16) * 32 + lane) * 8 + token / 8 % 2 * 4 + channel / 8 % 2 * 2 + token % 2
}

/// The exact page of `keys` and `values` (`[tokens <= 64, head_dim]`), as `kv_append_f16` writes it. Tokens that are not there are 0.
pub fn exact_page(shape: &Shape, keys: &[f16], values: &[f16]) -> Result<Vec<u8>> {
    let width = shape.width()?;
    let mut halves = vec![f16::ZERO; exact_page_bytes(width) / 2];
    let (norms, rest) = halves.split_at_mut(PAGE);
    let (page_keys, page_values) = rest.split_at_mut(PAGE * width);
    let rows = keys.chunks_exact(shape.head_dim).zip(values.chunks_exact(shape.head_dim));
    for (token, (key, value)) in rows.enumerate() {
        for channel in 0..shape.head_dim {
            page_keys[key_index(token, channel, width)] = key[channel];
            page_values[value_index(token, channel, width)] = value[channel];
        }
        norms[token] = norm_up(value);
    }
    Ok(halves.iter().flat_map(|half| half.to_le_bytes()).collect())
}

/// Keys and values of the first `tokens` tokens of an exact page, `[tokens, head_dim]` each.
pub fn exact_rows(shape: &Shape, page: &[u8], tokens: usize) -> Result<(Vec<f16>, Vec<f16>)> {
    let width = shape.width()?;
    let half = |index: usize| f16::from_le_bytes([page[2 * index], page[2 * index + 1]]);
    let all = || (0..tokens).flat_map(|token| (0..shape.head_dim).map(move |channel| (token, channel)));
    let keys = all().map(|(token, channel)| half(PAGE + key_index(token, channel, width))).collect();
    let values = all().map(|(token, channel)| half(PAGE + PAGE * width + value_index(token, channel, width))).collect();
    Ok((keys, values))
}

/// At least the norm of `row`, by less than two units of the last place of a half.
fn norm_up(row: &[f16]) -> f16 {
    let norm = row.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>().sqrt() * (1.0 + 1.0 / 16384.0);
    let nearest = f16::from_f64(norm);
    if nearest.to_f64() < norm { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}
