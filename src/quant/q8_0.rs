//! Q8_0 (ggml): 32 weights in 34 bytes, 8.5 bits per weight.
//! f16 d = max|x| / 127, then i8[32] = round(x / d), ties away from zero; value = d * q.
//! The rounding uses the f32 scale and the decoder the f16 one, as ggml's reference quantizer does.

use super::{Format, Layout, absmax, inverse, read_f16, write_f16};

/// Eight-bit blocks with one scale.
pub struct Q8_0;

impl Format for Q8_0 {
    fn layout(&self) -> Layout {
        Layout { id: 8, name: "q8_0", block: 32, block_bytes: 34 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        let scale = absmax(weights) / 127.0;
        let inverse = inverse(scale);
        write_f16(scale, bytes);
        for (byte, weight) in bytes[2..].iter_mut().zip(weights) {
            *byte = ((weight * inverse).round() as i8).cast_unsigned();
        }
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        let scale = read_f16(bytes);
        for (weight, byte) in weights.iter_mut().zip(&bytes[2..]) {
            *weight = scale * f32::from(byte.cast_signed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// x\[k\] = (2k - 31) / 16 has no rounding ties; bytes worked out by hand from the formula above.
    #[test]
    fn ramp_encodes_to_known_bytes() {
        let ramp: Vec<f32> = (0..32).map(|k| (2.0 * k as f32 - 31.0) / 16.0).collect();
        let expected = [
            0xd0, 0x23, 0x81, 0x89, 0x91, 0x9a, 0xa2, 0xaa, 0xb2, 0xba, 0xc3, 0xcb, 0xd3, 0xdb, 0xe3, 0xec, 0xf4, 0xfc, 0x04, 0x0c, 0x14,
            0x1d, 0x25, 0x2d, 0x35, 0x3d, 0x46, 0x4e, 0x56, 0x5e, 0x66, 0x6f, 0x77, 0x7f,
        ];
        let mut bytes = Vec::new();
        Q8_0.encode_row(&ramp, &mut bytes).unwrap();
        assert_eq!(bytes, expected);
    }
}
