//! F16: IEEE half precision, rounded to nearest, ties to even. 16 bits per weight; relative error at most 2^-11 above 2^-14.

use super::{Format, Layout, read_f16, write_f16};

/// IEEE half precision. Magnitudes from 65520 overflow to infinity; exports check for that.
pub struct F16;

impl Format for F16 {
    fn layout(&self) -> Layout {
        Layout { id: 1, name: "f16", block: 1, block_bytes: 2 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        write_f16(weights[0], bytes);
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        weights[0] = read_f16(bytes);
    }
}
