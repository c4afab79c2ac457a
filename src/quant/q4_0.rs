//! Q4_0 (ggml): 32 weights in 18 bytes, 4.5 bits per weight.
//! f16 d = m / -8 with m the signed weight of largest magnitude (the first of equals), then 16 bytes: weight j in the low nibble of
//! byte j, weight j + 16 in the high one; q = min(15, trunc(x / d + 8.5)); value = d * (q - 8).

use super::{Format, Layout, inverse, read_f16, write_f16};

/// Four-bit blocks with one signed scale: m itself is stored exactly (up to f16), the opposite end is clipped by up to d.
pub struct Q4_0;

impl Format for Q4_0 {
    fn layout(&self) -> Layout {
        Layout { id: 2, name: "q4_0", block: 32, block_bytes: 18 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        let largest = weights.iter().fold(0.0f32, |largest, &weight| if weight.abs() > largest.abs() { weight } else { largest });
        let scale = largest / -8.0;
        let inverse = inverse(scale);
        let quantize = |weight: f32| ((weight * inverse + 8.5) as u8).min(15);
        write_f16(scale, bytes);
        for (j, byte) in bytes[2..].iter_mut().enumerate() {
            *byte = quantize(weights[j]) | quantize(weights[j + 16]) << 4;
        }
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        let scale = read_f16(bytes);
        for (j, byte) in bytes[2..].iter().enumerate() {
            weights[j] = scale * (f32::from(byte & 15) - 8.0);
            weights[j + 16] = scale * (f32::from(byte >> 4) - 8.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// x\[k\] = (2k - 31) / 16: both ends have the same magnitude and the first, negative one sets the sign of d = 31/128.
    #[test]
    fn ramp_encodes_to_known_bytes() {
        let ramp: Vec<f32> = (0..32).map(|k| (2.0 * k as f32 - 31.0) / 16.0).collect();
        let expected = [0xc0, 0x33, 0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3, 0xc4, 0xc4, 0xd5, 0xd5, 0xe6, 0xe6, 0xf7, 0xf7, 0xf8];
        let mut bytes = Vec::new();
        Q4_0.encode_row(&ramp, &mut bytes).unwrap();
        assert_eq!(bytes, expected);
    }
}
