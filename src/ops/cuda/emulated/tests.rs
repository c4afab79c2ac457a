//! The harness itself: what is right gives the right numbers in every thread order, and each kind of mistake is caught.

use half::{bf16, f16};

use super::*;
use crate::ops::cuda::{Buffer, Element, Emulated, Order, arguments};

mod right;
mod wrong;

/// A device with the kernels that try the harness.
fn harness() -> Option<Emulated> {
    Emulated::with_folder(&repository_kernels().join("testing"))
}

/// Words that are the same every time.
fn words(seed: u64) -> impl Iterator<Item = u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    })
}

/// Numbers of all sizes that halves have.
fn halves(seed: u64, count: usize) -> Vec<f16> {
    words(seed).map(|word| f16::from_bits(word as u16)).filter(|value| value.is_finite()).take(count).collect()
}

/// Numbers between -1 and 1.
fn floats(seed: u64, count: usize) -> Vec<f32> {
    words(seed).map(|word| word as f32 / (1u64 << 31) as f32 - 1.0).take(count).collect()
}
