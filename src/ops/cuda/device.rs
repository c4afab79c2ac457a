//! What a device that runs kernels can do.

use std::marker::PhantomData;
use std::mem;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// Where an allocation lies. Kernels reach both kinds by pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the device's own memory.
    Device,
    /// In the host's, page-locked: far more of it, read over the bus.
    Host,
}

/// Runs kernels of `kernels/*.cu` over memory of its own. Copies and launches happen in the order they are asked for.
pub trait Device: Send + Sync + Sized {
    /// One allocation.
    type Memory: Send + Sync;

    /// The device in words, for messages and reports.
    fn describe(&self) -> String;

    /// How many multiprocessors run blocks side by side.
    fn multiprocessors(&self) -> u32;

    /// How many blocks of a kernel, of `block` threads with `shared_bytes` of dynamic shared memory each, the device runs side by side.
    ///
    /// # Errors
    /// When the kernel cannot be loaded or given so much.
    fn resident_blocks(&self, kernel: &str, block: u32, shared_bytes: u32) -> Result<u32>;

    /// Bytes of the device's own memory: free, and in all.
    ///
    /// # Errors
    /// When the driver does not say.
    fn room(&self) -> Result<(usize, usize)>;

    /// Takes `bytes` bytes, aligned to 256. Their contents are not defined (NaN under emulation).
    ///
    /// # Errors
    /// When there is no room for them.
    fn allocate(&self, bytes: usize, place: Place) -> Result<Self::Memory>;

    /// Copies `from` to byte `at` of `to`.
    ///
    /// # Errors
    /// When it does not fit there.
    fn write_bytes(&self, to: &Self::Memory, at: usize, from: &[u8]) -> Result<()>;

    /// Copies from byte `at` of `from`, once everything asked for before is done.
    ///
    /// # Errors
    /// When there are not as many bytes, or a kernel before this failed.
    fn read_bytes(&self, from: &Self::Memory, at: usize, to: &mut [u8]) -> Result<()>;

    /// Copies `bytes` bytes between allocations, or within one without overlap.
    ///
    /// # Errors
    /// When they do not fit.
    fn copy_bytes(&self, from: &Self::Memory, from_at: usize, to: &Self::Memory, to_at: usize, bytes: usize) -> Result<()>;

    /// Sets every byte of `bytes` from byte `at` on.
    ///
    /// # Errors
    /// When they do not fit.
    fn fill_bytes(&self, to: &Self::Memory, at: usize, bytes: usize, value: u8) -> Result<()>;

    /// Runs a kernel over `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory; nothing when the grid is empty.
    ///
    /// The arguments are checked against the kernel's parameters as far as the device knows them. What the kernel does with its pointers
    /// is the kernel's: those of this repository are trusted like any other code of it.
    ///
    /// # Errors
    /// Names the kernel and the shape of the launch.
    fn launch(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, args: &[Arg<'_, Self>]) -> Result<()>;

    /// Waits until everything asked for is done.
    ///
    /// # Errors
    /// When any of it failed.
    fn synchronize(&self) -> Result<()>;

    /// A buffer of `len` elements whose contents are not defined.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        self.alloc_in(len, Place::Device)
    }

    /// A buffer of `len` elements whose contents are not defined, in `place`.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn alloc_in<T: Element>(&self, len: usize, place: Place) -> Result<Buffer<Self, T>> {
        let bytes = len.checked_mul(mem::size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let bytes = bytes.ok_or_else(|| defect(format!("a buffer of {len} elements is larger than memory can be")))?;
        Ok(Buffer { memory: self.allocate(bytes, place)?, len, element: PhantomData })
    }

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        let buffer = self.alloc(len)?;
        self.fill_bytes(&buffer.memory, 0, len * mem::size_of::<T>(), 0)?;
        Ok(buffer)
    }

    /// A buffer with a copy of `values`.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<Self, T>> {
        let buffer = self.alloc(values.len())?;
        self.write(&buffer, 0, values)?;
        Ok(buffer)
    }

    /// All of `buffer`.
    ///
    /// # Errors
    /// As [`Device::read_bytes`].
    fn download<T: Element>(&self, buffer: &Buffer<Self, T>) -> Result<Vec<T>> {
        let mut values = vec![T::default(); buffer.len];
        self.read(buffer, 0, &mut values)?;
        Ok(values)
    }

    /// Copies `values` to elements `at` and on.
    ///
    /// # Errors
    /// As [`Device::write_bytes`].
    fn write<T: Element>(&self, to: &Buffer<Self, T>, at: usize, values: &[T]) -> Result<()> {
        self.write_bytes(&to.memory, at * mem::size_of::<T>(), bytes(values))
    }

    /// Copies elements `at` and on to `values`.
    ///
    /// # Errors
    /// As [`Device::read_bytes`].
    fn read<T: Element>(&self, from: &Buffer<Self, T>, at: usize, values: &mut [T]) -> Result<()> {
        self.read_bytes(&from.memory, at * mem::size_of::<T>(), bytes_mut(values))
    }

    /// Copies `len` elements between buffers, or within one without overlap.
    ///
    /// # Errors
    /// As [`Device::copy_bytes`].
    fn copy<T: Element>(&self, from: &Buffer<Self, T>, from_at: usize, to: &Buffer<Self, T>, to_at: usize, len: usize) -> Result<()> {
        let size = mem::size_of::<T>();
        self.copy_bytes(&from.memory, from_at * size, &to.memory, to_at * size, len * size)
    }
}

/// `len` elements on a device.
pub struct Buffer<D: Device, T> {
    memory: D::Memory,
    len: usize,
    element: PhantomData<T>,
}

impl<D: Device, T: Element> Buffer<D, T> {
    /// How many elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The argument that points to element `index`.
    pub fn at(&self, index: usize) -> Arg<'_, D> {
        let element = mem::size_of::<T>();
        Arg::Memory { memory: &self.memory, at: index * element, element }
    }
}

/// An argument of a kernel. Built from `&Buffer`, [`Buffer::at`] or a number, most easily by [`arguments!`](crate::arguments).
pub enum Arg<'a, D: Device> {
    /// A pointer to byte `at` of an allocation whose elements have `element` bytes (1: bytes that the kernel reads as it likes).
    Memory {
        memory: &'a D::Memory,
        at: usize,
        element: usize,
    },
    /// The null pointer, for an input that a kernel can do without.
    Null,
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
}

impl<'a, D: Device, T: Element> From<&'a Buffer<D, T>> for Arg<'a, D> {
    fn from(buffer: &'a Buffer<D, T>) -> Self {
        buffer.at(0)
    }
}

impl<'a, D: Device, T: Element> From<Option<&'a Buffer<D, T>>> for Arg<'a, D> {
    fn from(buffer: Option<&'a Buffer<D, T>>) -> Self {
        buffer.map_or(Self::Null, |buffer| buffer.at(0))
    }
}

macro_rules! scalar_argument {
    ($($type:ty => $variant:ident),*) => {$(
        impl<D: Device> From<$type> for Arg<'_, D> {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        }
    )*};
}
scalar_argument!(u32 => U32, i32 => I32, u64 => U64, f32 => F32);

/// The arguments of a launch: `arguments![&x, y.at(3), 5u32, 0.5f32]`.
#[macro_export]
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        &[$($crate::ops::cuda::Arg::from($value)),*]
    };
}

/// A plain number that means the same on the device.
///
/// # Safety
/// Every bit pattern is a value and there is no padding.
pub unsafe trait Element: Copy + Default + Send + Sync + 'static {}

macro_rules! elements {
    ($($type:ty),*) => {$(
        // SAFETY: a number without padding, whose every bit pattern is one.
        unsafe impl Element for $type {}
    )*};
}
elements!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, f16, bf16);

fn bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: an Element has no padding, so all its bytes are initialized; u8 has no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), mem::size_of_val(values)) }
}

fn bytes_mut<T: Element>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes`, and any bytes written make valid Elements.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), mem::size_of_val(values)) }
}

/// A mistake of ours that no input can cause.
pub(super) fn defect(text: impl ToString) -> Error {
    Error::Tensor(candle_core::Error::Msg(text.to_string()))
}

/// Checks that `bytes` bytes at `at` lie within an allocation of `size`.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn within(size: usize, at: usize, bytes: usize) -> Result<()> {
    match at.checked_add(bytes) {
        Some(end) if end <= size => Ok(()),
        _ => Err(defect(format!("{bytes} bytes at byte {at} of a device buffer of {size}"))),
    }
}

/// `count` as a kernel takes it.
///
/// # Errors
/// When it needs more than 32 bits; `what` names it.
pub fn fits(count: usize, what: &str) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::input(what, format!("{count} is more than the CUDA kernels count to")))
}
