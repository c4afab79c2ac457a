//! Keys and values of the tokens seen so far. A store keeps one layer's in its own form and hands attention tiles of 64 positions;
//! a further format is one more implementation of [`Store`].

pub mod codec;
mod half_tiles;

use crate::ops::cpu::attention::{KeyValueTiles, TiledKeyValues, attend_cached, key_tile_len, padded};
use half_tiles::HalfKeyValues;
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// One layer's keys and values.
pub trait Store: KeyValueTiles + Send {
    /// Appends rows of keys (after RoPE) and values, each `[rows, kv_heads * head_dim]`.
    fn append(&mut self, keys: &[f32], values: &[f32]);

    /// Forgets the positions from `positions` on.
    fn truncate(&mut self, positions: usize);

    /// Attention of `q` (`[rows, heads * head_dim]`), whose first row is at `first_position`, over what is stored; overwrites `out`.
    fn attend(&self, heads: usize, kv_heads: usize, head_dim: usize, q: &[f32], first_position: usize, out: &mut [f32]) {
        attend_cached(heads, kv_heads, head_dim, 1.0 / (head_dim as f32).sqrt(), q, first_position, self, out);
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
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 2] = [Self::F32, Self::F16];

    /// As `--kv` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// An empty store.
    pub fn store(self, kv_heads: usize, head_dim: usize) -> Box<dyn Store> {
        match self {
            Self::F32 => Box::new(TiledKeyValues::new(kv_heads, head_dim)),
            Self::F16 => Box::new(HalfKeyValues::new(kv_heads, head_dim)),
        }
    }

    /// Bytes that one token takes in one layer.
    pub fn bytes_per_token(self, kv_heads: usize, head_dim: usize) -> usize {
        let element = match self {
            Self::F32 => 4,
            Self::F16 => 2,
        };
        kv_heads * (head_dim + padded(head_dim)) * element
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            Error::input("kv", format!("there is no cache format {name:?}"))
                .fix(format!("choose one of {}", Self::ALL.map(Self::name).join(", ")))
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
}

/// Positions of a tile: (tile, slot within it).
fn place(position: usize) -> (usize, usize) {
    use crate::ops::cpu::attention::TILE;
    (position / TILE, position % TILE)
}

/// Elements of all heads' key tiles at one tile index.
fn key_tiles_len(kv_heads: usize, head_dim: usize) -> usize {
    kv_heads * key_tile_len(head_dim)
}
