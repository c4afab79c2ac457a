//! Collectives over the system's MPI, for ranks on CPUs. All calls come from the engine's thread, so MPI need only be safe for one.

use super::engine::Engine;
use crate::error::{Error, Result};
use candle_core::Tensor;
use mpi::collective::SystemOperation;
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::request::Scope;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Between looks at a collective that the computation overlaps with: MPI's own waiting would take the core from it.
const PAUSE: Duration = Duration::from_micros(50);

pub(super) struct Mpi {
    world: SimpleCommunicator,
    /// What this rank adds, while the sum is written over it.
    mine: Vec<f32>,
    /// The computation waits for the collective, so that there is no core to spare.
    awaited: Arc<AtomicBool>,
    /// Dropped last: it finalizes MPI.
    _universe: Universe,
}

impl Mpi {
    /// Initializes MPI on the current thread; returns the engine with rank and size.
    pub(super) fn start(awaited: Arc<AtomicBool>) -> Result<(Self, usize, usize)> {
        let Some((universe, _)) = mpi::initialize_with_threading(mpi::Threading::Funneled) else {
            return Err(Error::input("MPI", "is initialized already"));
        };
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        Ok((Self { world, mine: vec![], awaited, _universe: universe }, rank, size))
    }

    /// Rank 0's text, on every rank.
    pub(super) fn share_text(&self, text: &str) -> String {
        let root = self.world.process_at_rank(0);
        let mut length = text.len() as u64;
        root.broadcast_into(&mut length);
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(length as usize, 0);
        root.broadcast_into(&mut bytes[..]);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Waits for `request`, without keeping a core busy that computes. Large messages move a little at each look.
fn wait<'a, D: ?Sized, S: Scope<'a>>(awaited: &AtomicBool, mut request: mpi::request::Request<'a, D, S>) {
    loop {
        match request.test() {
            Ok(_) => return,
            Err(pending) => request = pending,
        }
        if awaited.load(Ordering::Relaxed) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
}

impl Mpi {
    fn add<T: Equivalence + Clone>(&self, mine: &[T], values: &mut [T]) {
        mpi::request::scope(|scope| {
            wait(&self.awaited, self.world.immediate_all_reduce_into(scope, mine, values, SystemOperation::sum()));
        });
    }
}

impl Engine for Mpi {
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        let mut mine = std::mem::take(&mut self.mine);
        mine.clear();
        mine.extend_from_slice(values);
        self.add(&mine, values);
        self.mine = mine;
        Ok(())
    }

    fn sum_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let mine = values.to_vec();
        self.add(&mine, values);
        Ok(())
    }

    fn broadcast(&mut self, owner: usize, values: &mut [f32]) -> Result<()> {
        let root = self.world.process_at_rank(owner as i32);
        mpi::request::scope(|scope| wait(&self.awaited, root.immediate_broadcast_into(scope, values)));
        Ok(())
    }

    fn sum_on_device(&mut self, _flat: &Tensor, _range: Range<usize>) -> Result<()> {
        Err(no_devices())
    }

    fn broadcast_on_device(&mut self, _owner: usize, _flat: &Tensor, _range: Range<usize>) -> Result<()> {
        Err(no_devices())
    }
}

fn no_devices() -> Error {
    Error::input("MPI", "carries tensors in main memory only").fix("train ranks on GPUs over NCCL: cargo build --release --features nccl")
}
