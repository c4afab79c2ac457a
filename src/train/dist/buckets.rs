//! Gradients are summed over ranks in buckets, each as soon as the backward pass has made its last gradient, while the pass goes on.
//!
//! A bucket is a stretch of the flat gradient buffer: many small sums cost more than few large ones, and one sum of everything could only
//! begin when the pass is over. Every rank records the same tape, so buckets become complete in the same order on all of them.

use super::{Pending, Ranks};
use crate::error::Result;
use crate::model::{GradientBuffers, Parameters};
use crate::tape::Gradients;
use candle_core::Tensor;
use std::ops::Range;

/// Values per bucket: 4 MB, enough to reach full speed on both engines, little enough that the last one is soon through.
const BUCKET: usize = 1 << 20;

/// How the flat buffer is cut.
pub struct Buckets {
    /// Bucket of each parameter.
    of: Vec<usize>,
    ranges: Vec<Range<usize>>,
    names: Vec<String>,
    members: Vec<usize>,
}

impl Buckets {
    /// Whole parameters, in the order of the flat buffer.
    pub fn new(parameters: &Parameters) -> Self {
        let list = parameters.list();
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by_key(|&index| list[index].offset);
        let mut buckets = Self { of: vec![0; list.len()], ranges: vec![], names: vec![], members: vec![] };
        for index in order {
            let parameter = &list[index];
            let end = parameter.offset + parameter.len();
            let fits = buckets.ranges.last().is_some_and(|range| end - range.start <= BUCKET);
            if fits && let (Some(range), Some(count)) = (buckets.ranges.last_mut(), buckets.members.last_mut()) {
                range.end = end;
                *count += 1;
            } else {
                buckets.ranges.push(parameter.offset..end);
                buckets.names.push(format!("gradients from {} on", parameter.name));
                buckets.members.push(1);
            }
            buckets.of[index] = buckets.ranges.len() - 1;
        }
        buckets
    }
}

/// The gradients of the last micro-batch on their way: as the tape finishes them, their buckets are sent.
pub struct Reducing<'a> {
    ranks: &'a Ranks,
    buckets: &'a Buckets,
    gradients: &'a mut GradientBuffers,
    flat: Tensor,
    missing: Vec<usize>,
    pending: Vec<Pending>,
}

impl<'a> Reducing<'a> {
    pub(in crate::train) fn new(ranks: &'a Ranks, buckets: &'a Buckets, gradients: &'a mut GradientBuffers) -> Self {
        let flat = gradients.flat().clone();
        Self { ranks, buckets, gradients, flat, missing: buckets.members.clone(), pending: vec![] }
    }

    fn send(&mut self, bucket: usize) -> Result<()> {
        // SAFETY: all gradients of the bucket are final, so the tape touches this range no more; `finish` waits before anyone reads it.
        let pending = unsafe { self.ranks.start_sum(&self.buckets.names[bucket], &self.flat, self.buckets.ranges[bucket].clone())? };
        self.pending.extend(pending);
        Ok(())
    }

    /// Sends what no gradient has reached, and waits for all.
    pub(in crate::train) fn finish(mut self) -> Result<()> {
        self.gradients.settle()?;
        for bucket in 0..self.buckets.ranges.len() {
            if self.missing[bucket] > 0 {
                self.send(bucket)?;
            }
        }
        self.ranks.finish_all(self.pending)
    }
}

impl Gradients for Reducing<'_> {
    fn slot(&mut self, index: usize) -> (Tensor, bool) {
        self.gradients.slot(index)
    }

    fn finished(&mut self, index: usize) -> candle_core::Result<()> {
        self.gradients.finished(index)?;
        self.ranks.tick();
        let bucket = self.buckets.of[index];
        self.missing[bucket] -= 1;
        if self.missing[bucket] == 0 {
            self.send(bucket).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        }
        Ok(())
    }
}
