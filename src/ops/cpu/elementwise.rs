//! Elementwise passes over large buffers, in parallel over fixed chunks.

use rayon::prelude::*;

/// Elements per task: small enough to balance two cores, large enough to hide the scheduling.
pub const CHUNK: usize = 1 << 14;

/// `target += other`.
///
/// # Panics
/// When the lengths differ.
pub fn add(target: &mut [f32], other: &[f32]) {
    assert_eq!(target.len(), other.len(), "add: lengths differ");
    target.par_chunks_mut(CHUNK).zip(other.par_chunks(CHUNK)).for_each(|(target, other)| {
        for (t, o) in target.iter_mut().zip(other) {
            *t += o;
        }
    });
}
