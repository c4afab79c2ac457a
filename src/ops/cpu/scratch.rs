//! Cache-line-aligned working memory that a thread keeps between calls, so that kernels allocate nothing in steady state.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; Line::FLOATS]);

impl Line {
    const FLOATS: usize = 16;
}

thread_local! {
    static SPARE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of floats with unspecified content, aligned to 64 bytes; goes back to the dropping thread's spares.
pub(crate) struct Scratch {
    lines: Vec<Line>,
    length: usize,
}

impl Scratch {
    /// Takes the spare that was given back last. A kernel that takes its buffers in a fixed order meets the same ones every call;
    /// a task stolen while this one waits takes another, so nothing is ever borrowed twice.
    pub(crate) fn take(length: usize) -> Scratch {
        let mut lines = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        let needed = length.div_ceil(Line::FLOATS);
        if lines.len() < needed {
            lines.clear();
            lines.resize(needed, Line([0.0; Line::FLOATS]));
        }
        Scratch { lines, length }
    }
}

impl Scratch {
    /// The same memory as 32-bit words.
    pub(crate) fn words(&mut self) -> &mut [u32] {
        // SAFETY: floats and words have the same size and alignment, and every bit pattern is valid for both.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }
}

impl Scratch {
    /// The same memory as 16-bit words, two per float.
    pub(crate) fn shorts(&mut self) -> &mut [i16] {
        // SAFETY: a float is two such words, less strictly aligned, and every bit pattern is valid for both.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 2 * self.length) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that is ending has no spares left to add to; the buffer is then simply freed.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(lines));
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: `lines` holds at least `length` initialized floats back to back (`Line` is `repr(C)` and has no padding).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length) }
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_distinct_and_reused() {
        let first = Scratch::take(100);
        let second = Scratch::take(3);
        assert_eq!((first.len(), second.len()), (100, 3));
        assert_eq!(first.as_ptr() as usize % 64, 0);
        assert_ne!(first.as_ptr(), second.as_ptr());
        let place = first.as_ptr();
        drop(second);
        drop(first);
        assert_eq!(Scratch::take(90).as_ptr(), place);
    }
}
