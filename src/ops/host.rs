//! Plain slices of candle tensors that live in main memory: how fused kernels read and write them without copies.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor};
use std::cell::Cell;
use std::ops::Deref;

/// A contiguous f32 tensor borrowed as a slice.
pub struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.start + self.len],
            _ => unreachable!("checked by `host`"),
        }
    }
}

/// Borrows a contiguous f32 tensor in main memory.
///
/// # Errors
/// When the tensor is elsewhere, of another type, or strided.
pub fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("a fused kernel was given a strided tensor") };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(Host { storage, start, len: end - start }),
        _ => candle_core::bail!("a fused kernel was given a tensor that is not f32 in main memory"),
    }
}

/// Whether the fused CPU kernels can read `tensor`.
pub fn is_host(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == candle_core::DType::F32
}

/// A tensor in main memory that takes over `data`.
pub fn from_vec(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &candle_core::Device::Cpu)
}

/// A vector whose every element the caller is about to write; skips nothing but saves a name.
pub fn buffer(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

struct Write<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "host-write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("in-place write to a strided tensor") };
        let CpuStorage::F32(data) = storage else { candle_core::bail!("in-place write to a tensor that is not f32") };
        if let Some(write) = self.0.take() {
            write(&mut data[start..end]);
        }
        Ok(())
    }
}

/// Runs `write` on the elements of a contiguous f32 tensor in main memory, in place. Every tensor that shares the storage sees the
/// change, so only buffers that Osprey owns (parameters, gradients, freshly made tensors) may be passed.
///
/// # Errors
/// When the tensor is elsewhere, of another type, or strided.
pub fn write(tensor: &Tensor, write: impl FnOnce(&mut [f32])) -> Result<()> {
    tensor.inplace_op1(&Write(Cell::new(Some(write))))
}
