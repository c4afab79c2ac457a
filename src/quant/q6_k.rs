//! Q6_K (ggml): 256 weights in 210 bytes, 6.5625 bits per weight: 16 groups of 16 with an 8-bit scale each.
//! ql\[128\], qh\[64\], i8 scales\[16\], f16 d; value = d * scale\[group\] * (q - 32), q in 0..64.
//! Weight 128h + 32k + l (h in 0..2, k in 0..4, l in 0..32): the low four bits are in ql\[64h + 32 (k mod 2) + l\], low nibble for k < 2; the
//! high two in bits 2k of qh\[32h + l\].
//! Each group's scale is the best of nineteen by squared error weighted with x^2, which favours the large weights.

use super::{Format, Layout, read_f16, write_f16};

const BLOCK: usize = 256;
const GROUP: usize = 16;
const GROUPS: usize = BLOCK / GROUP;
/// Offset of qh, of the scales and of d.
const HIGH: usize = 128;
const SCALES: usize = 192;
const SCALE: usize = 208;
/// Blocks whose scales are all smaller are stored as zeros (ggml's `GROUP_MAX_EPS`).
const NEGLIGIBLE: f32 = 1e-15;

/// Six-bit blocks with scales of eight bits.
pub struct Q6K;

impl Format for Q6K {
    fn layout(&self) -> Layout {
        Layout { id: 14, name: "q6_k", block: BLOCK, block_bytes: 210 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        bytes.fill(0);
        let mut scales = [0f32; GROUPS];
        for (scale, group) in scales.iter_mut().zip(weights.chunks_exact(GROUP)) {
            *scale = group_scale(group);
        }
        let largest = scales.iter().fold(0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most });
        // NaN weights give NaN scales, which the exporter refuses before it comes here; they are stored as zeros.
        if largest.is_nan() || largest.abs() < NEGLIGIBLE {
            return;
        }
        let inverse = -128.0 / largest;
        write_f16(1.0 / inverse, &mut bytes[SCALE..]);
        let unit = read_f16(&bytes[SCALE..]);
        for (group, scale) in scales.iter().enumerate() {
            let scale = (inverse * scale).round_ties_even().clamp(-128.0, 127.0) as i8;
            bytes[SCALES + group] = scale.cast_unsigned();
            let step = unit * f32::from(scale);
            for (l, weight) in weights[GROUP * group..GROUP * (group + 1)].iter().enumerate() {
                let code = if step == 0.0 { 0.0 } else { (weight / step).round_ties_even().clamp(-32.0, 31.0) };
                put(bytes, GROUP * group + l, (code + 32.0) as u8);
            }
        }
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        let unit = read_f16(&bytes[SCALE..]);
        for (index, weight) in weights.iter_mut().enumerate() {
            let step = unit * f32::from(bytes[SCALES + index / GROUP].cast_signed());
            *weight = step * (f32::from(get(bytes, index)) - 32.0);
        }
    }
}

/// Byte and shift of the low four bits, byte and shift of the high two.
fn place(index: usize) -> (usize, usize, usize, usize) {
    let (half, quarter, l) = (index / 128, index / 32 % 4, index % 32);
    (64 * half + 32 * (quarter % 2) + l, quarter / 2 * 4, HIGH + 32 * half + l, 2 * quarter)
}

fn put(bytes: &mut [u8], index: usize, code: u8) {
    let (low, low_shift, high, high_shift) = place(index);
    bytes[low] |= (code & 15) << low_shift;
    bytes[high] |= code >> 4 << high_shift;
}

fn get(bytes: &[u8], index: usize) -> u8 {
    let (low, low_shift, high, high_shift) = place(index);
    (bytes[low] >> low_shift & 15) | (bytes[high] >> high_shift & 3) << 4
}

/// The scale that stores a group best, of those which put the largest weight at -32 or up to 0.9 beside it.
fn group_scale(group: &[f32]) -> f32 {
    let largest = group.iter().fold(0f32, |most, &weight| if weight.abs() > most.abs() { weight } else { most });
    if largest.abs() < NEGLIGIBLE {
        return 0.0;
    }
    // For codes l the best scale is sum(w x l) / sum(w l^2), and what it explains of sum(w x^2) is sum(w x l)^2 / sum(w l^2); w = x^2.
    let sums = |steps: f32| {
        let inverse = -steps / largest;
        group.iter().fold((0f32, 0f32), |(mixed, square), &weight| {
            let code = (inverse * weight).round_ties_even().clamp(-32.0, 31.0);
            let importance = weight * weight;
            (mixed + importance * weight * code, square + importance * code * code)
        })
    };
    let (mixed, square) = sums(32.0);
    let (mut scale, mut explained) = if square > 0.0 { (mixed / square, mixed * mixed / square) } else { (0.0, 0.0) };
    for tenths in (-9i8..=9).filter(|&tenths| tenths != 0) {
        let (mixed, square) = sums(32.0 + 0.1 * f32::from(tenths));
        if square > 0.0 && mixed * mixed > explained * square {
            (scale, explained) = (mixed / square, mixed * mixed / square);
        }
    }
    scale
}
