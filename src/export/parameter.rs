//! A parameter as a file holds it: its bytes, not decoded, and how to decode them. The engine computes on the bytes; others ask for f32.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::quant::Format;

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

    /// All weights as an f32 tensor on the CPU.
    ///
    /// # Errors
    /// Never for a value made by the constructors above.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.to_vec()?, self.shape.as_slice(), &Device::Cpu)?)
    }
}

impl std::fmt::Debug for Parameter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?} {}", self.shape, self.format.layout().name)
    }
}
