//! What the ternary formats share: blocks of 256 codes in {-1, 0, 1} and one f16 scale.
//! Two ways in: codes with a scale given by the model (BitNet's one absmean per tensor, stored in every block, all-zero ones included,
//! so that reading back gives the trained scale and never a re-derived one), or ggml's own rule d = max|x|, q = round(x / d).

use half::f16;

use super::{Format, Layout, Tq1_0, Tq2_0, absmax, inverse, read_f16};
use crate::error::{Error, Result};

/// Weights per block of both ternary formats.
pub const BLOCK: usize = 256;

/// A format that stores ternary codes without loss.
pub trait TernaryFormat: Format {
    /// Packs 256 codes into the block's bytes, all but the scale.
    fn pack(&self, codes: &[i8; BLOCK], bytes: &mut [u8]);

    /// The inverse of [`pack`](Self::pack); a byte no encoder writes gives some code in {-1, 0, 1, 2}.
    fn unpack(&self, bytes: &[u8], codes: &mut [i8; BLOCK]);

    /// Appends a row of `codes`, each in {-1, 0, 1}, with `scale` in every block.
    ///
    /// # Errors
    /// When the row is no whole number of blocks.
    fn encode_codes(&self, codes: &[i8], scale: f16, out: &mut Vec<u8>) -> Result<()> {
        let Layout { name, block_bytes, .. } = self.layout();
        let bytes = self.layout().row_bytes(codes.len()).ok_or_else(|| super::uneven(name, codes.len(), BLOCK))?;
        let start = out.len();
        out.resize(start + bytes, 0);
        let (blocks, _) = codes.as_chunks::<BLOCK>();
        for (codes, bytes) in blocks.iter().zip(out[start..].chunks_exact_mut(block_bytes)) {
            self.pack(codes, &mut bytes[..block_bytes - 2]);
            bytes[block_bytes - 2..].copy_from_slice(&scale.to_le_bytes());
        }
        Ok(())
    }

    /// Reads codes and the scale of each block.
    ///
    /// # Errors
    /// When lengths do not belong together.
    fn decode_codes(&self, bytes: &[u8], codes: &mut [i8]) -> Result<Vec<f16>> {
        let Layout { name, block_bytes, .. } = self.layout();
        if self.layout().row_bytes(codes.len()) != Some(bytes.len()) {
            return Err(Error::input(name, format!("{} bytes do not hold {} codes", bytes.len(), codes.len())));
        }
        let (blocks, _) = codes.as_chunks_mut::<BLOCK>();
        let scales = bytes.chunks_exact(block_bytes).zip(blocks).map(|(bytes, codes)| {
            self.unpack(&bytes[..block_bytes - 2], codes);
            f16::from_le_bytes([bytes[block_bytes - 2], bytes[block_bytes - 1]])
        });
        Ok(scales.collect())
    }
}

/// The ternary format with ggml type `id`.
pub fn ternary_by_id(id: u32) -> Option<&'static dyn TernaryFormat> {
    let all: [&'static dyn TernaryFormat; 2] = [&Tq1_0, &Tq2_0];
    all.into_iter().find(|format| format.layout().id == id)
}

/// ggml's generic rule: d = max|x|, q = round(x / d), ties away from zero.
pub(super) fn encode_absmax(format: &impl TernaryFormat, weights: &[f32], bytes: &mut [u8]) {
    let scale = absmax(weights);
    let inverse = inverse(scale);
    let mut codes = [0i8; BLOCK];
    for (code, weight) in codes.iter_mut().zip(weights) {
        // A subnormal scale has an infinite inverse, hence the clamp.
        *code = (weight * inverse).round().clamp(-1.0, 1.0) as i8;
    }
    let split = bytes.len() - 2;
    format.pack(&codes, &mut bytes[..split]);
    super::write_f16(scale, &mut bytes[split..]);
}

pub(super) fn decode_block(format: &impl TernaryFormat, bytes: &[u8], weights: &mut [f32]) {
    let split = bytes.len() - 2;
    let scale = read_f16(&bytes[split..]);
    let mut codes = [0i8; BLOCK];
    format.unpack(&bytes[..split], &mut codes);
    for (weight, code) in weights.iter_mut().zip(codes) {
        *weight = f32::from(code) * scale;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The contents whose encodings the two formats' tests list, in the same order.
    pub(in crate::quant) fn golden_contents() -> Vec<Vec<f32>> {
        let one_hot = |at: usize, value: f32| (0..BLOCK).map(|k| if k == at { value } else { 0.0 }).collect();
        vec![
            vec![0.5; BLOCK],
            vec![-0.5; BLOCK],
            vec![0.0; BLOCK],
            one_hot(0, 1.0),
            one_hot(241, -1.0),
            (0..BLOCK).map(|k| 0.5 * ((7 * k % 3) as f32 - 1.0)).collect(),
        ]
    }

    #[test]
    fn given_scale_is_stored_in_every_block_also_all_zero_ones() {
        let scale = f16::from_f32(0.037);
        let codes: Vec<i8> = (0..3 * BLOCK).map(|k| if k / BLOCK == 1 { 0 } else { (k * 7 % 3) as i8 - 1 }).collect();
        for id in [34, 35] {
            let format = ternary_by_id(id).unwrap();
            let mut bytes = Vec::new();
            format.encode_codes(&codes, scale, &mut bytes).unwrap();
            let mut back = vec![0i8; codes.len()];
            assert_eq!(format.decode_codes(&bytes, &mut back).unwrap(), vec![scale; 3]);
            assert_eq!(back, codes);
            let mut weights = vec![0f32; codes.len()];
            format.decode_row(&bytes, &mut weights).unwrap();
            assert!(weights.iter().zip(&codes).all(|(w, &c)| *w == f32::from(c) * scale.to_f32()));
        }
    }

    #[test]
    fn wrong_lengths_are_errors() {
        assert!(Tq2_0.encode_codes(&[0; 255], f16::ONE, &mut Vec::new()).is_err());
        assert!(Tq1_0.decode_codes(&[0; 53], &mut [0; 256]).is_err());
        assert!(Tq2_0.decode_codes(&[0; 66], &mut [0; 255]).is_err());
    }
}
