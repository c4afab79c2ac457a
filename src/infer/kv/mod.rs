//! Keys and values of the tokens seen so far. A store keeps one layer's in its own form and hands attention tiles of 64 positions;
//! a further format is one more implementation of [`Store`].

mod assess;
mod boxes;
pub mod certificate;
pub mod codec;
mod far;
mod pages;
mod recovery;
mod tiered;

use super::cache::{Counters, Options};
use crate::error::{Error, Result};
use crate::ops::cpu::attention::{KeyValueTiles, TILE, TiledKeyValues, attend_cached, key_tile_len, padded};
use far::FarTier;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;
use tiered::TieredStore;

/// Queries of consecutive tokens against one layer's cache.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[rows, heads * head_dim]`, not scaled.
    pub q: &'a [f32],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Position of the first row.
    pub first_position: usize,
}

impl Queries<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn rows(&self) -> usize {
        self.q.len() / (self.heads * self.head_dim)
    }
}

/// One layer's keys and values.
pub trait Store: Send {
    /// Appends rows of keys (after RoPE) and values, each `[rows, kv_heads * head_dim]`.
    fn append(&mut self, keys: &[f32], values: &[f32]);

    /// Forgets the positions from `positions` on.
    fn truncate(&mut self, positions: usize);

    /// Attention of queries that have been appended over what is stored up to each; overwrites `out`, shaped as the queries.
    ///
    /// # Errors
    /// When stored numbers are found to have changed.
    fn attend(&mut self, queries: Queries<'_>, out: &mut [f32]) -> Result<()>;

    /// What attention did so far.
    fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Time spent so far in deciding which pages are read.
    fn choosing(&self) -> Duration {
        Duration::ZERO
    }
}

/// How a cache stores numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As computed: logits have the bits of the training forward.
    #[default]
    F32,
    /// Rounded to half precision.
    F16,
    /// Full pages in the form of the [codec](codec::codec) of this name beside the halves, which are read only where a certificate
    /// asks for them.
    Coded(&'static str),
}

impl Format {
    /// Every format.
    pub fn all() -> Vec<Self> {
        [Self::F32, Self::F16].into_iter().chain(codec::NAMES.map(Self::Coded)).collect()
    }

    /// As `--kv` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Coded(name) => name,
        }
    }

    /// Bytes per token that attention reads in one layer when it reads every page: what has to be near. The halves that coded formats
    /// keep as originals come on top, [`Format::far_bytes_per_token`].
    ///
    /// # Errors
    /// When the format cannot store heads of this width.
    pub fn bytes_per_token(self, kv_heads: usize, head_dim: usize) -> Result<f64> {
        let tile = (head_dim + padded(head_dim)) as f64;
        let head = match self {
            Self::F32 => 4.0 * tile,
            Self::F16 => 2.0 * tile,
            Self::Coded(name) => codec::codec(name, head_dim)?.page_bytes() as f64 / TILE as f64,
        };
        Ok(kv_heads as f64 * head)
    }

    /// Bytes per token of originals that are kept beside, in one layer.
    pub fn far_bytes_per_token(self, kv_heads: usize, head_dim: usize) -> f64 {
        match self {
            Self::F32 | Self::F16 => 0.0,
            Self::Coded(_) => (2 * kv_heads * (head_dim + padded(head_dim))) as f64,
        }
    }
}

/// An empty store for one layer.
///
/// # Errors
/// When the options contradict each other or the format cannot store heads of this width.
pub fn store(options: &Options, layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn Store>> {
    options.check()?;
    let plain = options.attention.policy().is_dense_in(layer) && !options.certifies();
    Ok(match options.format {
        Format::F32 => Box::new(TiledKeyValues::new(kv_heads, head_dim)),
        Format::F16 if plain => Box::new(FarTier::new(kv_heads, head_dim)),
        Format::F16 => Box::new(TieredStore::new(options, layer, None, kv_heads, head_dim)),
        Format::Coded(name) => Box::new(TieredStore::new(options, layer, Some(codec::codec(name, head_dim)?), kv_heads, head_dim)),
    })
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::all().into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Self::all().into_iter().map(Self::name).collect();
            Error::input("kv", format!("there is no cache format {name:?}")).fix(format!("choose one of {}", names.join(", ")))
        })
    }
}

impl Store for TiledKeyValues {
    fn append(&mut self, keys: &[f32], values: &[f32]) {
        TiledKeyValues::append(self, keys, values);
    }

    fn truncate(&mut self, positions: usize) {
        TiledKeyValues::truncate(self, positions);
    }

    fn attend(&mut self, queries: Queries<'_>, out: &mut [f32]) -> Result<()> {
        attend_everything(queries, self, out);
        Ok(())
    }
}

impl Store for FarTier {
    fn append(&mut self, keys: &[f32], values: &[f32]) {
        FarTier::append(self, keys, values);
    }

    fn truncate(&mut self, positions: usize) {
        FarTier::truncate(self, positions);
    }

    fn attend(&mut self, queries: Queries<'_>, out: &mut [f32]) -> Result<()> {
        attend_everything(queries, self, out);
        Ok(())
    }
}

fn attend_everything(queries: Queries<'_>, tiles: &impl KeyValueTiles, out: &mut [f32]) {
    let Queries { q, heads, kv_heads, head_dim, first_position } = queries;
    attend_cached(heads, kv_heads, head_dim, queries.scale(), q, first_position, tiles, out);
}

/// Positions of a tile: (tile, slot within it).
fn place(position: usize) -> (usize, usize) {
    (position / TILE, position % TILE)
}

/// Elements of all heads' key tiles at one tile index.
fn key_tiles_len(kv_heads: usize, head_dim: usize) -> usize {
    kv_heads * key_tile_len(head_dim)
}
