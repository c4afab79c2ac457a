//! The GPU of a build that has none.

use std::convert::Infallible;

use super::device::{Arg, Device, Place};
use crate::error::{Error, Result};

/// A GPU. This build has no CUDA: it cannot be opened.
pub struct Cuda(Infallible);

impl Cuda {
    /// Opens the GPU with number `ordinal`.
    ///
    /// # Errors
    /// Always: it takes a build with the feature `cuda`.
    pub fn new(ordinal: usize) -> Result<Self> {
        let place = format!("device cuda:{ordinal}");
        Err(Error::input(place, "this osprey was built without CUDA").fix("build it with `cargo build --release --features cuda`"))
    }
}

impl Device for Cuda {
    type Memory = Infallible;

    fn describe(&self) -> String {
        match self.0 {}
    }

    fn multiprocessors(&self) -> u32 {
        match self.0 {}
    }

    fn resident_blocks(&self, _: &str, _: u32, _: u32) -> Result<u32> {
        match self.0 {}
    }

    fn room(&self) -> Result<(usize, usize)> {
        match self.0 {}
    }

    fn allocate(&self, _: usize, _: Place) -> Result<Self::Memory> {
        match self.0 {}
    }

    fn write_bytes(&self, _: &Self::Memory, _: usize, _: &[u8]) -> Result<()> {
        match self.0 {}
    }

    fn read_bytes(&self, _: &Self::Memory, _: usize, _: &mut [u8]) -> Result<()> {
        match self.0 {}
    }

    fn copy_bytes(&self, _: &Self::Memory, _: usize, _: &Self::Memory, _: usize, _: usize) -> Result<()> {
        match self.0 {}
    }

    fn fill_bytes(&self, _: &Self::Memory, _: usize, _: usize, _: u8) -> Result<()> {
        match self.0 {}
    }

    fn launch(&self, _: &str, _: [u32; 3], _: [u32; 3], _: u32, _: &[Arg<'_, Self>]) -> Result<()> {
        match self.0 {}
    }

    fn synchronize(&self) -> Result<()> {
        match self.0 {}
    }
}
