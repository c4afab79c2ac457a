//! Memory of an emulated device: each allocation by itself, between two strips that nobody may touch.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;

use crate::error::{Error, Result};

/// Bytes on either side, and the alignment of an allocation.
const STRIP: usize = 256;
/// Fills the strips and fresh memory: NaN in every float format.
const POISON: u8 = 0xff;

/// Tells the address sanitizer what may be touched.
#[derive(Clone, Copy)]
pub(super) struct Sanitizer {
    pub(super) guard: unsafe extern "C" fn(*const c_void, usize),
    pub(super) unguard: unsafe extern "C" fn(*const c_void, usize),
}

/// One allocation of an emulated device.
pub(crate) struct Memory {
    pub(super) device: u64,
    base: *mut u8,
    layout: Layout,
    len: usize,
    sanitizer: Option<Sanitizer>,
}

// SAFETY: the allocation belongs to this value alone; its device serializes every access to the bytes.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn new(device: u64, len: usize, sanitizer: Option<Sanitizer>) -> Result<Self> {
        let too_large = || Error::input("emulated device", format!("no room for {len} bytes"));
        let size = len.checked_add(2 * STRIP).ok_or_else(too_large)?;
        let layout = Layout::from_size_align(size, STRIP).map_err(|_| too_large())?;
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            return Err(too_large());
        }
        // SAFETY: `base` owns `size` bytes.
        unsafe { base.write_bytes(POISON, size) };
        let memory = Self { device, base, layout, len, sanitizer };
        if let Some(sanitizer) = sanitizer {
            // SAFETY: both strips belong to the allocation, which outlives the guard.
            unsafe {
                (sanitizer.guard)(base.cast(), STRIP);
                (sanitizer.guard)(memory.pointer().add(len).cast(), STRIP);
            }
        }
        Ok(memory)
    }

    /// How many bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The first byte.
    pub(super) fn pointer(&self) -> *mut u8 {
        // SAFETY: the first strip is within the allocation.
        unsafe { self.base.add(STRIP) }
    }

    /// A copy of all bytes. The device is busy with nothing else.
    pub(super) fn contents(&self) -> Vec<u8> {
        // SAFETY: the bytes were initialized at allocation.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len) }.to_vec()
    }

    /// Sets all bytes. The device is busy with nothing else.
    pub(super) fn set_contents(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len, "a copy of the contents");
        // SAFETY: as many bytes as the allocation has.
        unsafe { self.pointer().copy_from_nonoverlapping(bytes.as_ptr(), self.len) };
    }

    /// Checks that nobody wrote next to the allocation.
    pub(super) fn check_surroundings(&self) -> Result<(), String> {
        if self.sanitizer.is_some() {
            return Ok(()); // it has seen every access
        }
        for (side, at) in [("before", self.base.cast_const()), ("after", self.pointer().cast_const().wrapping_add(self.len))] {
            // SAFETY: a strip of the allocation.
            let strip = unsafe { std::slice::from_raw_parts(at, STRIP) };
            if strip.iter().any(|&byte| byte != POISON) {
                return Err(format!("something was written {side} a device buffer of {} bytes", self.len));
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(sanitizer) = self.sanitizer {
            // SAFETY: the whole allocation, which is given back as it was taken.
            unsafe { (sanitizer.unguard)(self.base.cast(), self.layout.size()) };
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}
