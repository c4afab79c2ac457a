//! TQ1_0 (ggml): 256 ternary weights in 54 bytes, 1.6875 bits per weight.
//! qs\[48\], qh\[4\], then f16 d. Five trits t = code + 1 make v = ((((t0*3 + t1)*3 + t2)*3 + t3)*3 + t4), stored as ceil(v * 256 / 243),
//! so that a decoder gets trit n from the top of byte * 3^n mod 256:
//! qs\[m\], m < 32: weights m + 32n; qs\[32 + m\], m < 16: weights 160 + m + 16n; qh\[j\]: weights 240 + j + 4n, n < 4, and a zero trit.

use super::ternary::{self, BLOCK};
use super::{Format, Layout, TernaryFormat};

/// Five ternary weights per byte.
pub struct Tq1_0;

impl Format for Tq1_0 {
    fn layout(&self) -> Layout {
        Layout { id: 34, name: "tq1_0", block: BLOCK, block_bytes: 54 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        ternary::encode_absmax(self, weights, bytes);
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        ternary::decode_block(self, bytes, weights);
    }
}

/// For byte `i` of a block: its first weight, the distance between its weights, and how many it holds.
fn place(i: usize) -> (usize, usize, usize) {
    match i {
        0..32 => (i, 32, 5),
        32..48 => (160 + i - 32, 16, 5),
        _ => (240 + i - 48, 4, 4),
    }
}

impl TernaryFormat for Tq1_0 {
    fn pack(&self, codes: &[i8; BLOCK], bytes: &mut [u8]) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let (first, stride, count) = place(i);
            let trit = |n: usize| if n < count { u16::from((codes[first + stride * n] + 1).cast_unsigned()) } else { 0 };
            let value = (0..5).fold(0, |value, n| value * 3 + trit(n));
            *byte = ((value * 256).div_ceil(243)) as u8;
        }
    }

    fn unpack(&self, bytes: &[u8], codes: &mut [i8; BLOCK]) {
        for (i, byte) in bytes.iter().enumerate() {
            let (first, stride, count) = place(i);
            let mut rest = *byte;
            for n in 0..count {
                codes[first + stride * n] = ((u16::from(rest) * 3) >> 8) as i8 - 1;
                rest = rest.wrapping_mul(3);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_blocks() {
        let expected: [Vec<u8>; 6] = [
            [vec![0xff; 48], vec![0xfd; 4], vec![0x00, 0x38]].concat(),
            [vec![0x00; 52], vec![0x00, 0x38]].concat(),
            [vec![0x80; 48], vec![0x7f; 4], vec![0x00, 0x00]].concat(),
            [vec![0xd5], vec![0x80; 47], vec![0x7f; 4], vec![0x00, 0x3c]].concat(),
            [vec![0x80; 48], vec![0x7f, 0x2a, 0x7f, 0x7f], vec![0x00, 0x3c]].concat(),
            [[0x45, 0x6c, 0xcf].repeat(10), vec![0x45, 0x6c], [0x94, 0xbb, 0x31].repeat(5), vec![0x94, 0x30, 0x92, 0xbb, 0x30, 0x00, 0x38]]
                .concat(),
        ];
        for (content, expected) in ternary::tests::golden_contents().iter().zip(expected) {
            let mut bytes = Vec::new();
            Tq1_0.encode_row(content, &mut bytes).unwrap();
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn every_five_trits_survive() {
        for value in 0..243u32 {
            let trits: Vec<i8> = (0..5).map(|n| (value / 3u32.pow(4 - n) % 3) as i8 - 1).collect();
            let mut codes = [0i8; BLOCK];
            (0..5).for_each(|n| codes[32 * n] = trits[n]);
            let mut bytes = [0u8; 52];
            Tq1_0.pack(&codes, &mut bytes);
            let mut back = [0i8; BLOCK];
            Tq1_0.unpack(&bytes, &mut back);
            assert_eq!(back, codes);
        }
    }
}
