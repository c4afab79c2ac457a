//! TQ2_0 (ggml): 256 ternary weights in 66 bytes, 2.0625 bits per weight.
//! qs\[64\], then f16 d. Weight 128h + 32l + m (h in 0..2, l in 0..4, m in 0..32) sits in byte 32h + m, bits 2l and 2l + 1, as code + 1.

use super::ternary::{self, BLOCK};
use super::{Format, Layout, TernaryFormat};

/// Two bits per ternary weight.
pub struct Tq2_0;

impl Format for Tq2_0 {
    fn layout(&self) -> Layout {
        Layout { id: 35, name: "tq2_0", block: BLOCK, block_bytes: 66 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        ternary::encode_absmax(self, weights, bytes);
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        ternary::decode_block(self, bytes, weights);
    }
}

impl TernaryFormat for Tq2_0 {
    fn pack(&self, codes: &[i8; BLOCK], bytes: &mut [u8]) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let first = i / 32 * 128 + i % 32;
            *byte = (0..4).fold(0, |packed, l| packed | (codes[first + 32 * l] + 1).cast_unsigned() << (2 * l));
        }
    }

    fn unpack(&self, bytes: &[u8], codes: &mut [i8; BLOCK]) {
        for (i, byte) in bytes.iter().enumerate() {
            let first = i / 32 * 128 + i % 32;
            for l in 0..4 {
                codes[first + 32 * l] = (byte >> (2 * l) & 3).cast_signed() - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_blocks() {
        let one_hot = |byte: u8| [vec![byte], vec![0x55; 63], vec![0x00, 0x3c]].concat();
        let expected: [Vec<u8>; 6] = [
            [vec![0xaa; 64], vec![0x00, 0x38]].concat(),
            [vec![0x00; 64], vec![0x00, 0x38]].concat(),
            [vec![0x55; 64], vec![0x00, 0x00]].concat(),
            one_hot(0x56),
            // Element 241 = 128 + 3 * 32 + 17: byte 49, top bits 00.
            [vec![0x55; 49], vec![0x15], vec![0x55; 14], vec![0x00, 0x3c]].concat(),
            [[0x18, 0x61, 0x86].repeat(21), vec![0x18, 0x00, 0x38]].concat(),
        ];
        for (content, expected) in ternary::tests::golden_contents().iter().zip(expected) {
            let mut bytes = Vec::new();
            Tq2_0.encode_row(content, &mut bytes).unwrap();
            assert_eq!(bytes, expected);
        }
    }
}
