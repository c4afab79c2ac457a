//! Results of one row of activations with several matrices, one below the other.

use super::device::defect;
use super::{Buffer, Device, fits};
use crate::error::Result;

/// Where the results of up to three stacked matrices go: each one's number of outputs and its buffer.
pub(super) struct Stacked<'a, D: Device> {
    pub(super) first: &'a Buffer<D, f32>,
    pub(super) second: &'a Buffer<D, f32>,
    pub(super) third: &'a Buffer<D, f32>,
    pub(super) first_end: u32,
    pub(super) second_end: u32,
}

impl<'a, D: Device> Stacked<'a, D> {
    /// # Errors
    /// When the parts are not one to three that make up `outputs`, or a buffer is too small for its part.
    pub(super) fn new(parts: &[(usize, &'a Buffer<D, f32>)], outputs: usize) -> Result<Self> {
        let fit =
            parts.iter().all(|(count, buffer)| buffer.len() >= *count) && parts.iter().map(|(count, _)| count).sum::<usize>() == outputs;
        let end = |part: usize| fits(parts[..part].iter().map(|(count, _)| count).sum(), "outputs");
        match *parts {
            [(_, first)] if fit => Ok(Self { first, second: first, third: first, first_end: end(1)?, second_end: end(1)? }),
            [(_, first), (_, second)] if fit => Ok(Self { first, second, third: second, first_end: end(1)?, second_end: end(2)? }),
            [(_, first), (_, second), (_, third)] if fit => Ok(Self { first, second, third, first_end: end(1)?, second_end: end(2)? }),
            _ => Err(defect(format!("buffers of a product with {outputs} outputs"))),
        }
    }
}
