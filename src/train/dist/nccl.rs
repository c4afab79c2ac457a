//! Collectives over NCCL, for ranks on GPUs, on a stream of their own beside candle's: sums of gradients run while the backward pass goes
//! on, and the two streams wait for each other through events, never through the host.

use super::engine::Engine;
use crate::error::{Error, Result};
use candle_core::cuda_backend::CudaStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::{CudaDevice, InplaceOp1, Layout, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of an NCCL id, which rank 0 makes and every rank needs.
const ID_BYTES: usize = 128;

/// A new id, on rank 0.
pub(super) fn new_id() -> Result<Vec<u8>> {
    let id = Id::new().map_err(|error| failed("make an id", &format!("{error:?}")))?;
    Ok(id.internal().iter().map(|&byte| byte as u8).collect())
}

pub(super) struct Nccl {
    comm: Comm,
    stream: Arc<CudaStream>,
    compute: Arc<CudaStream>,
}

impl Nccl {
    /// Joins the communicator of `id` as `rank` of `size`, with the GPU that `device` is on.
    pub(super) fn start(device: &CudaDevice, rank: usize, size: usize, id: &[u8]) -> Result<Self> {
        if id.len() != ID_BYTES {
            return Err(Error::input("NCCL", format!("rank 0 sent an id of {} bytes", id.len())));
        }
        let id = Id::uninit(std::array::from_fn(|at| id[at] as std::ffi::c_char));
        let compute = device.cuda_stream();
        compute.context().bind_to_thread().map_err(|error| failed("bind its thread", &format!("{error:?}")))?;
        let stream = compute.context().new_stream().map_err(|error| failed("make a stream", &format!("{error:?}")))?;
        let comm = Comm::from_rank(stream.clone(), rank, size, id).map_err(|error| failed("connect", &format!("{error:?}")))?;
        Ok(Self { comm, stream, compute })
    }

    /// Stages `values` through the GPU around `work`.
    fn through_device<T>(
        &self,
        name: &'static str,
        values: &mut [T],
        work: impl FnOnce(&Comm, &mut CudaSlice<T>) -> std::result::Result<(), String>,
    ) -> Result<()>
    where
        T: candle_core::cuda_backend::cudarc::driver::DeviceRepr,
    {
        let mut staged = self.stream.clone_htod(&*values).map_err(|error| failed(name, &format!("{error:?}")))?;
        work(&self.comm, &mut staged).map_err(|error| failed(name, &error))?;
        self.stream.memcpy_dtoh(&staged, values).map_err(|error| failed(name, &format!("{error:?}")))?;
        self.stream.synchronize().map_err(|error| failed(name, &format!("{error:?}")))
    }

    fn on_device(&self, flat: &Tensor, range: Range<usize>, owner: Option<usize>) -> Result<()> {
        flat.inplace_op1(&Apply { engine: self, range, owner })?;
        Ok(())
    }
}

fn failed(what: &str, error: &str) -> Error {
    Error::input("NCCL", format!("cannot {what}: {error}")).fix("set NCCL_DEBUG=INFO and look at what it prints")
}

/// A collective on part of a tensor's memory.
struct Apply<'a> {
    engine: &'a Nccl,
    range: Range<usize>,
    /// Broadcast from this rank; a sum when absent.
    owner: Option<usize>,
}

impl InplaceOp1 for Apply<'_> {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("NCCL was given a tensor in main memory")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let slice = storage.as_cuda_slice_mut::<f32>()?;
        let start = layout.start_offset();
        let mut part = slice.slice_mut(start + self.range.start..start + self.range.end);
        let Nccl { comm, stream, compute } = self.engine;
        let wrap = |error: String| candle_core::Error::Msg(format!("NCCL: {error}"));
        stream.join(compute).map_err(|error| wrap(format!("{error:?}")))?;
        match self.owner {
            None => comm.all_reduce_in_place(&mut part, &ReduceOp::Sum).map_err(|error| wrap(format!("{error:?}")))?,
            Some(owner) => comm.broadcast_in_place(&mut part, owner as i32).map_err(|error| wrap(format!("{error:?}")))?,
        };
        Ok(())
    }
}

impl Engine for Nccl {
    fn fence(&mut self) -> Result<()> {
        self.compute.join(&self.stream).map_err(|error| failed("order its stream", &format!("{error:?}")))
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.through_device("sum", values, |comm, staged| {
            comm.all_reduce_in_place(staged, &ReduceOp::Sum).map(drop).map_err(|error| format!("{error:?}"))
        })
    }

    fn sum_f64(&mut self, values: &mut [f64]) -> Result<()> {
        self.through_device("sum", values, |comm, staged| {
            comm.all_reduce_in_place(staged, &ReduceOp::Sum).map(drop).map_err(|error| format!("{error:?}"))
        })
    }

    fn broadcast(&mut self, owner: usize, values: &mut [f32]) -> Result<()> {
        self.through_device("broadcast", values, |comm, staged| {
            comm.broadcast_in_place(staged, owner as i32).map(drop).map_err(|error| format!("{error:?}"))
        })
    }

    fn sum_on_device(&mut self, flat: &Tensor, range: Range<usize>) -> Result<()> {
        self.on_device(flat, range, None)
    }

    fn broadcast_on_device(&mut self, owner: usize, flat: &Tensor, range: Range<usize>) -> Result<()> {
        self.on_device(flat, range, Some(owner))
    }
}
