//! Q4_K (ggml): 256 weights in 144 bytes, 4.5 bits per weight: 8 groups of 32 with a 6-bit scale and a 6-bit minimum each.
//! f16 d, f16 dmin, scales\[12\], qs\[128\]; value = d * scale\[group\] * q - dmin * min\[group\], q in 0..16.
//! Group j < 4: scale in the low six bits of scales\[j\], minimum in those of scales\[j + 4\]. Group j >= 4: their low four bits in the nibbles of
//! scales\[j + 4\], their high two above scales\[j - 4\] and scales\[j\]. Weights 64i + l and 64i + 32 + l (l < 32) share byte 32i + l.
//! Scale and minimum of a group come from a search over 21 step sizes, each refined by weighted least squares.

use super::{Format, Layout, inverse, read_f16, write_f16};

const BLOCK: usize = 256;
const GROUP: usize = 32;
const GROUPS: usize = BLOCK / GROUP;
/// Offset of the packed scales and of the codes.
const SCALES: usize = 4;
const CODES: usize = 16;

/// Four-bit blocks with scales and minima of six bits.
pub struct Q4K;

impl Format for Q4K {
    fn layout(&self) -> Layout {
        Layout { id: 12, name: "q4_k", block: BLOCK, block_bytes: 144 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        bytes.fill(0);
        let mut fits = [Fit::default(); GROUPS];
        for (fit, group) in fits.iter_mut().zip(weights.chunks_exact(GROUP)) {
            *fit = search(group);
        }
        let scale = fits.iter().fold(0f32, |most, fit| most.max(fit.scale)) / 63.0;
        let minimum = fits.iter().fold(0f32, |most, fit| most.max(fit.depth)) / 63.0;
        write_f16(scale, bytes);
        write_f16(minimum, &mut bytes[2..]);
        let six_bits = |value: f32, unit: f32| (value * inverse(unit)).round_ties_even().clamp(0.0, 63.0) as u8;
        for (j, fit) in fits.iter().enumerate() {
            put_scales(&mut bytes[SCALES..CODES], j, six_bits(fit.scale, scale), six_bits(fit.depth, minimum));
        }
        for (j, group) in weights.chunks_exact(GROUP).enumerate() {
            let (step, depth) = steps(bytes, j);
            for (l, weight) in group.iter().enumerate() {
                let code = if step == 0.0 { 0 } else { ((weight + depth) / step).round_ties_even().clamp(0.0, 15.0) as u8 };
                bytes[CODES + j / 2 * GROUP + l] |= code << (j % 2 * 4);
            }
        }
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        for (j, group) in weights.chunks_exact_mut(GROUP).enumerate() {
            let (step, depth) = steps(bytes, j);
            for (l, weight) in group.iter_mut().enumerate() {
                *weight = step * f32::from(bytes[CODES + j / 2 * GROUP + l] >> (j % 2 * 4) & 15) - depth;
            }
        }
    }
}

/// d * scale and dmin * min of group `j`.
fn steps(bytes: &[u8], j: usize) -> (f32, f32) {
    let packed = &bytes[SCALES..CODES];
    let (scale, minimum) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (read_f16(bytes) * f32::from(scale), read_f16(&bytes[2..]) * f32::from(minimum))
}

fn put_scales(packed: &mut [u8], j: usize, scale: u8, minimum: u8) {
    if j < 4 {
        packed[j] |= scale;
        packed[j + 4] |= minimum;
    } else {
        packed[j + 4] |= scale & 15 | (minimum & 15) << 4;
        packed[j - 4] |= scale >> 4 << 6;
        packed[j] |= minimum >> 4 << 6;
    }
}

/// x ~ scale * q - depth, depth >= 0.
#[derive(Clone, Copy, Default)]
struct Fit {
    scale: f32,
    depth: f32,
}

/// Weighted sums over a group that do not depend on the codes. The weight of x is rms + |x|.
struct Sums {
    importance: [f32; GROUP],
    weight: f32,
    x: f32,
}

fn search(group: &[f32]) -> Fit {
    let least = group.iter().copied().fold(0f32, f32::min);
    let most = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if most <= least {
        return Fit { scale: 0.0, depth: -least };
    }
    let rms = (group.iter().map(|x| x * x).sum::<f32>() / GROUP as f32).sqrt();
    let importance: [f32; GROUP] = std::array::from_fn(|l| rms + group[l].abs());
    let weighted_sum = importance.iter().zip(group).map(|(w, x)| w * x).sum();
    let sums = Sums { importance, weight: importance.iter().sum(), x: weighted_sum };
    let codes = |steps: f32, depth: f32| {
        let inverse = steps / (most + depth);
        group.iter().map(move |x| (inverse * (x + depth)).round_ties_even().clamp(0.0, 15.0))
    };
    let error = |fit: Fit, codes: &mut dyn Iterator<Item = f32>| -> f32 {
        let differences = codes.zip(group).map(|(code, x)| fit.scale * code - fit.depth - x);
        differences.zip(&sums.importance).map(|(difference, w)| w * difference * difference).sum()
    };
    let mut best = Fit { scale: (most - least) / 15.0, depth: -least };
    let mut least_error = error(best, &mut codes(15.0, best.depth));
    for step in 0..=20u8 {
        // Each trial starts from the depth found so far, so the search walks instead of only comparing.
        let (steps, depth) = (14.0 + 0.1 * f32::from(step), best.depth);
        if let Some(fit) = least_squares(&sums, group, codes(steps, depth)) {
            let error = error(fit, &mut codes(steps, depth));
            if error < least_error {
                (best, least_error) = (fit, error);
            }
        }
    }
    best
}

/// The scale and depth with the smallest weighted error for given codes; the depth never below zero, which the file cannot hold.
fn least_squares(sums: &Sums, group: &[f32], codes: impl Iterator<Item = f32>) -> Option<Fit> {
    let (mut q, mut qq, mut xq) = (0f32, 0f32, 0f32);
    for ((code, x), w) in codes.zip(group).zip(&sums.importance) {
        q += w * code;
        qq += w * code * code;
        xq += w * code * x;
    }
    let determinant = sums.weight * qq - q * q;
    if determinant <= 0.0 || determinant.is_nan() {
        return None;
    }
    let fit = Fit { scale: (sums.weight * xq - sums.x * q) / determinant, depth: (q * xq - qq * sums.x) / determinant };
    Some(if fit.depth < 0.0 { Fit { scale: xq / qq, depth: 0.0 } } else { fit })
}
