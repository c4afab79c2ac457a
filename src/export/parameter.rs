//! A parameter as a file holds it: its bytes, not decoded, and how to decode them. The engine computes on the bytes; others ask for f32.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::f16;
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::ops::frozen::StoredMatrix;
use crate::quant::{Format, ternary_by_id};

/// One stored parameter. Rows are in Hugging Face's order whatever file they came from.
#[derive(Clone)]
pub struct Parameter {
    /// Row-major, matrices `[out, in]`.
    pub shape: Vec<usize>,
    pub format: &'static dyn Format,
    bytes: Bytes,
}

#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mmap>, Range<usize>),
    Owned(Arc<Vec<u8>>),
}

impl Parameter {
    /// A parameter whose bytes are `range` of a mapped file.
    ///
    /// # Errors
    /// When the range is outside the file or does not have the size that shape and format ask for.
    pub fn mapped(name: &str, shape: Vec<usize>, format: &'static dyn Format, map: Arc<Mmap>, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > map.len() {
            return Err(Error::input(name, "lies beyond the end of its file"));
        }
        Self { shape, format, bytes: Bytes::Mapped(map, range) }.checked(name)
    }

    /// A parameter that owns its bytes.
    ///
    /// # Errors
    /// When the bytes do not have the size that shape and format ask for.
    pub fn owned(name: &str, shape: Vec<usize>, format: &'static dyn Format, bytes: Vec<u8>) -> Result<Self> {
        Self { shape, format, bytes: Bytes::Owned(Arc::new(bytes)) }.checked(name)
    }

    fn checked(self, name: &str) -> Result<Self> {
        let rows = self.shape[..self.shape.len().saturating_sub(1)].iter().try_fold(1usize, |rows, &size| rows.checked_mul(size));
        let row = self.shape.last().and_then(|&width| self.format.layout().row_bytes(width));
        match rows.zip(row).and_then(|(rows, row)| rows.checked_mul(row)) {
            Some(bytes) if bytes == self.bytes().len() => Ok(self),
            _ => Err(Error::input(
                name,
                format!("{} bytes do not hold {:?} weights as {}", self.bytes().len(), self.shape, self.format.layout().name),
            )),
        }
    }

    /// The stored bytes, row after row.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map, range) => &map[range.clone()],
            Bytes::Owned(bytes) => bytes,
        }
    }

    /// Gives the memory of a mapped file's pages back: they are read again when they are asked for again.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Bytes::Mapped(map, range) = &self.bytes {
            // SAFETY: the map is a read-only view of a file, so dropping pages changes no byte that is read through it later. It is advice:
            // a refusal changes nothing either.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }

    /// Number of weights.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// All weights, decoded, row-major.
    ///
    /// # Errors
    /// Never for a value made by the constructors above.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut weights = vec![0.0; self.count()];
        self.format.decode_row(self.bytes(), &mut weights)?;
        Ok(weights)
    }

    /// The codes in {-1, 0, 1} and the one scale of a matrix in a ternary format.
    ///
    /// # Errors
    /// When the format is another one, or the blocks do not share a scale (files made elsewhere may have one per block; blocks of zeros may
    /// say anything).
    pub fn ternary(&self, name: &str) -> Result<(Vec<i8>, f16)> {
        let id = self.format.layout().id;
        let format = ternary_by_id(id)
            .ok_or_else(|| Error::input(name, format!("is stored as {}, not as ternary codes", self.format.layout().name)))?;
        let mut codes = vec![0i8; self.count()];
        let scales = format.decode_codes(self.bytes(), &mut codes)?;
        let mut shared = None;
        for (scale, codes) in scales.into_iter().zip(codes.chunks(format.layout().block)) {
            if codes.contains(&2) {
                return Err(Error::input(name, "holds a code outside -1, 0, 1"));
            }
            if codes.iter().any(|&code| code != 0) && *shared.get_or_insert(scale) != scale {
                return Err(Error::input(name, "has blocks with different scales, where one per matrix is needed")
                    .fix("export the model with Osprey, which stores the trained scale in every block"));
            }
        }
        Ok((codes, shared.unwrap_or(f16::ZERO)))
    }

    /// All weights as an f32 tensor on the CPU.
    ///
    /// # Errors
    /// Never for a value made by the constructors above.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.to_vec()?, self.shape.as_slice(), &Device::Cpu)?)
    }
}

/// Training reads frozen matrices from their files as the engine does.
impl StoredMatrix for Parameter {
    fn rows(&self) -> usize {
        self.count() / self.columns()
    }

    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn bytes(&self) -> usize {
        self.bytes().len()
    }

    fn floats(&self) -> Option<&[f32]> {
        if self.format.layout().name != "f32" || cfg!(target_endian = "big") {
            return None;
        }
        // SAFETY: every pattern of four bytes is an f32, and `align_to` puts only whole, aligned ones into the middle.
        let (before, values, after) = unsafe { self.bytes().align_to::<f32>() };
        (before.is_empty() && after.is_empty()).then_some(values)
    }

    fn expand(&self, first: usize, values: &mut [f32]) {
        let row = self.format.layout().row_bytes(self.columns()).expect("checked by the constructors");
        let count = values.len() / self.columns();
        self.format.decode_row(&self.bytes()[first * row..][..count * row], values).expect("whole rows of a checked size");
    }
}

impl std::fmt::Debug for Parameter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?} {}", self.shape, self.format.layout().name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Q8_0, Tq2_0};

    #[test]
    fn sizes_must_agree() {
        assert!(Parameter::owned("w", vec![2, 32], &Q8_0, vec![0; 68]).is_ok());
        assert!(Parameter::owned("w", vec![2, 32], &Q8_0, vec![0; 67]).unwrap_err().to_string().contains("w: 67 bytes"));
        assert!(Parameter::owned("w", vec![2, 33], &Q8_0, vec![0; 68]).is_err());
        assert!(Parameter::owned("w", vec![usize::MAX, 32], &Q8_0, vec![0; 68]).is_err());
        assert!(Parameter::owned("w", vec![], &Q8_0, vec![]).is_err());
    }

    #[test]
    fn one_scale_per_matrix_is_demanded_of_blocks_that_hold_anything() {
        let blocks = |first: f32, second: f32| {
            let mut bytes = Vec::new();
            Tq2_0.encode_row(&[[first; 256], [second; 256]].concat(), &mut bytes).unwrap();
            Parameter::owned("w", vec![1, 512], &Tq2_0, bytes).unwrap().ternary("w")
        };
        assert_eq!(blocks(0.5, 0.0).unwrap(), ([[1i8; 256], [0; 256]].concat(), f16::from_f32(0.5)));
        assert_eq!(blocks(0.5, -0.5).unwrap().0[256], -1);
        assert!(blocks(0.5, 0.25).unwrap_err().to_string().contains("different scales"));
        let dense = Parameter::owned("w", vec![1, 32], &Q8_0, vec![0; 34]).unwrap();
        assert!(dense.ternary("w").unwrap_err().to_string().contains("q8_0"));
    }
}
