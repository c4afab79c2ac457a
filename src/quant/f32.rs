//! F32: the weight itself, little-endian. 32 bits per weight. Lossless.

use super::{Format, Layout};

/// IEEE single precision.
pub struct F32;

impl Format for F32 {
    fn layout(&self) -> Layout {
        Layout { id: 0, name: "f32", block: 1, block_bytes: 4 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        bytes.copy_from_slice(&weights[0].to_le_bytes());
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        weights[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}
