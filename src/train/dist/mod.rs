//! Ranks: processes that train one model together, each on its share of every batch.
//!
//! [`Ranks`] is what the training loop sees; a run of one process is [`Ranks::alone`], for which everything here is nothing. Collectives
//! run on a thread of their own (`engine`) over MPI or NCCL, the `watch` says who is missing when one does not end, [`Buckets`] reduce
//! gradients while the backward pass still computes.

mod buckets;
#[cfg_attr(not(any(feature = "mpi", feature = "nccl", test)), expect(dead_code, reason = "only engines that are built in use it"))]
mod engine;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod trace;
#[cfg_attr(not(any(feature = "mpi", feature = "nccl", test)), expect(dead_code, reason = "only engines that are built in use it"))]
mod watch;
mod world;

pub use buckets::{Buckets, Reducing};
pub use world::World;

use crate::error::{Error, Result};
use crate::ops::host;
use candle_core::{Device, Tensor};
use engine::{Completion, HostRange, Runner, Work};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use trace::Trace;
use watch::Watch;

/// The ranks of a run. Cheap to clone.
#[derive(Clone, Default)]
pub struct Ranks(Option<Arc<Group>>);

struct Group {
    rank: usize,
    size: usize,
    runner: Mutex<Option<Runner>>,
    watch: Watch,
    waited: Mutex<Duration>,
    /// The computation waits for a collective right now.
    awaited: Arc<AtomicBool>,
    trace: Trace,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

/// A collective in progress.
pub struct Pending {
    number: u64,
    name: String,
    completion: Completion,
}

impl Ranks {
    /// One process by itself.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Meets the other ranks of `world`: over MPI for a model in main memory, over NCCL for one on GPUs.
    ///
    /// # Errors
    /// When the engine is not built in, rank 0 is not reached, or the launcher and MPI count differently.
    pub fn join(world: World, device: &Device) -> Result<Self> {
        if world.size == 1 {
            return Ok(Self::alone());
        }
        let awaited = Arc::<AtomicBool>::default();
        let (runner, watch) = if device.is_cpu() { join_over_mpi(world, awaited.clone())? } else { join_over_nccl(world, device)? };
        watch.phase("starting");
        let trace = Trace::from_environment(world.rank);
        let runner = Mutex::new(Some(runner));
        Ok(Self(Some(Arc::new(Group { rank: world.rank, size: world.size, runner, watch, waited: Mutex::default(), awaited, trace }))))
    }

    /// From 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |group| group.rank)
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |group| group.size)
    }

    /// Whether this is the rank that writes checkpoints, metrics and messages.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is only this process.
    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Sums `numbers` over all ranks.
    pub fn sum(&self, name: &str, numbers: &mut [f64]) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        let pending = group.submit(name, Work::SumNumbers(numbers.to_vec()))?;
        numbers.copy_from_slice(&group.wait(pending)?.numbers);
        Ok(())
    }

    /// Returns when every rank has come here.
    pub fn meet(&self, name: &str) -> Result<()> {
        self.sum(name, &mut [0.0])
    }

    /// Gives every rank the values that rank `owner` has.
    pub fn broadcast(&self, name: &str, owner: usize, values: &mut Vec<f32>) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        let pending = group.submit(name, Work::BroadcastValues(owner, std::mem::take(values)))?;
        *values = group.wait(pending)?.values;
        Ok(())
    }

    /// Begins to sum `range` of a flat f32 tensor over all ranks, in place.
    ///
    /// # Safety
    /// Nobody reads or writes that range until [`Ranks::finish_all`] has returned.
    pub(super) unsafe fn start_sum(&self, name: &str, flat: &Tensor, range: Range<usize>) -> Result<Option<Pending>> {
        let Some(group) = &self.0 else { return Ok(None) };
        let work = if host::is_host(flat) {
            // SAFETY: the caller's promise.
            Work::SumHost(unsafe { HostRange::new(flat, range)? })
        } else {
            Work::SumDevice(flat.clone(), range)
        };
        group.submit(name, work).map(Some)
    }

    /// Begins to overwrite `range` of a flat f32 tensor by what rank `owner` has there.
    ///
    /// # Safety
    /// As [`Ranks::start_sum`]; on the owner others may read.
    pub(super) unsafe fn start_broadcast(&self, name: &str, owner: usize, flat: &Tensor, range: Range<usize>) -> Result<Option<Pending>> {
        let Some(group) = &self.0 else { return Ok(None) };
        let work = if host::is_host(flat) {
            // SAFETY: the caller's promise.
            Work::BroadcastHost(owner, unsafe { HostRange::new(flat, range)? })
        } else {
            Work::BroadcastDevice(owner, flat.clone(), range)
        };
        group.submit(name, work).map(Some)
    }

    /// Waits for collectives begun before.
    pub(super) fn finish_all(&self, pending: impl IntoIterator<Item = Pending>) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        for one in pending {
            group.wait(one)?;
        }
        let fence = group.submit("fence", Work::Fence)?;
        group.wait(fence)?;
        Ok(())
    }

    /// Time that this rank has spent waiting for collectives, since the last call.
    pub fn take_waited(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |group| std::mem::take(&mut *lock(&group.waited)))
    }

    /// Ends the run with one message, unless `value` is the same on every rank.
    pub fn agree(&self, what: &str, value: &str) {
        if let Some(group) = &self.0 {
            group.watch.agree(what, value);
        }
    }

    /// What this rank does from here on. A rank that does not move within "step" is taken to hang.
    pub fn phase(&self, phase: Phase) {
        if let Some(group) = &self.0 {
            group.watch.phase(phase.name());
        }
    }

    /// Says that the computation moves.
    pub fn tick(&self) {
        if let Some(group) = &self.0 {
            group.watch.tick();
        }
    }

    /// Notes a moment of this rank's own work in the trace, when one is written.
    pub(super) fn trace(&self, name: &str, began: Instant) {
        if let Some(group) = &self.0 {
            group.trace.span("compute", name, began, Instant::now());
        }
    }

    /// This rank ends with an error. Whether it is the one that tells the user.
    pub fn fail(&self, error: &Error) -> bool {
        self.0.as_ref().is_none_or(|group| group.watch.fail(error.exit_code()))
    }

    /// The common part is over; rank 0 may go on alone.
    pub fn part(&self) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        self.meet("the end of training")?;
        group.watch.bye();
        if let Some(runner) = lock(&group.runner).take() {
            runner.finish();
        }
        group.trace.write()
    }
}

/// What a rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Opening data, building shards, reading a checkpoint.
    Preparing,
    /// Training.
    Step,
    /// Evaluating or saving, which only rank 0 does.
    Looking,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Step => watch::STEP,
            Self::Looking => "evaluating or saving",
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    fn submit(&self, name: &str, work: Work) -> Result<Pending> {
        let runner = lock(&self.runner);
        let Some(runner) = runner.as_ref() else { return Err(Error::input("ranks", format!("{name} after they parted"))) };
        let number = self.watch.begin(name);
        Ok(Pending { number, name: name.to_owned(), completion: runner.submit(work) })
    }

    /// The watch ends the process when a collective cannot end.
    fn wait(&self, pending: Pending) -> Result<engine::Done> {
        let began = Instant::now();
        self.awaited.store(true, Ordering::Relaxed);
        let first = pending.completion.recv_timeout(Duration::from_millis(20));
        let result = match first {
            Err(RecvTimeoutError::Timeout) => {
                self.watch.waits(Some((pending.number, &pending.name)));
                let result = pending.completion.recv();
                self.watch.waits(None);
                result.map_err(|_| RecvTimeoutError::Disconnected)
            }
            other => other,
        };
        self.awaited.store(false, Ordering::Relaxed);
        *lock(&self.waited) += began.elapsed();
        let gone = |_| Err(Error::input("ranks", format!("the engine ended in collective {} ({})", pending.number, pending.name)));
        let done = result.unwrap_or_else(gone)?;
        if let Some([began, ended]) = done.times {
            self.trace.span("collectives", &pending.name, began, ended);
        }
        Ok(done)
    }
}

#[cfg(feature = "mpi")]
fn join_over_mpi(world: World, awaited: Arc<AtomicBool>) -> Result<(Runner, Watch)> {
    // The port is chosen before the engine's thread starts, so that rank 0's address can travel over MPI itself.
    let listener = (world.rank == 0).then(|| watch::listen(0)).transpose()?;
    let port = listener.as_ref().and_then(|listener| listener.local_addr().ok()).map_or(0, |address| address.port());
    let mine = if world.local_size == world.size { format!("127.0.0.1:{port}") } else { format!("{}:{port}", host_name()) };
    let (runner, (rank, size, address)) = Runner::start(move || {
        let (engine, rank, size) = mpi::Mpi::start(awaited)?;
        let address = engine.share_text(&mine);
        Ok((Box::new(engine) as Box<dyn engine::Engine>, (rank, size, address)))
    })?;
    if (rank, size) != (world.rank, world.size) {
        let cause = format!("MPI counts this process as rank {rank} of {size}, its environment as rank {} of {}", world.rank, world.size);
        return Err(
            Error::input("MPI", cause).fix("start the ranks with mpirun (or srun --mpi=pmix) of the MPI that osprey was built with")
        );
    }
    let (watch, _) = Watch::join(rank, size, &address, listener, vec![])?;
    Ok((runner, watch))
}

#[cfg(feature = "mpi")]
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}

#[cfg(not(feature = "mpi"))]
fn join_over_mpi(world: World, _awaited: Arc<AtomicBool>) -> Result<(Runner, Watch)> {
    Err(Error::input("ranks", format!("this is rank {} of {}, and this osprey was built without MPI", world.rank, world.size))
        .fix("build with `cargo build --release --features mpi`, or start one process"))
}

#[cfg(feature = "nccl")]
fn join_over_nccl(world: World, device: &Device) -> Result<(Runner, Watch)> {
    let cuda = device.as_cuda_device()?.clone();
    let address = master_address(world)?;
    let (listener, id) = if world.rank == 0 {
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or(0);
        (Some(watch::listen(port)?), nccl::new_id()?)
    } else {
        (None, vec![])
    };
    let (watch, id) = Watch::join(world.rank, world.size, &address, listener, id)?;
    let (runner, ()) = Runner::start(move || {
        let engine = nccl::Nccl::start(&cuda, world.rank, world.size, &id)?;
        Ok((Box::new(engine) as Box<dyn engine::Engine>, ()))
    })?;
    Ok((runner, watch))
}

/// `MASTER_ADDR:MASTER_PORT`, which may stay unset when all ranks are on one machine.
#[cfg(feature = "nccl")]
fn master_address(world: World) -> Result<String> {
    let one_machine = world.local_size == world.size;
    let host = std::env::var("MASTER_ADDR").ok().or_else(|| one_machine.then(|| "127.0.0.1".to_owned()));
    let Some(host) = host else {
        return Err(Error::input("MASTER_ADDR", "is not set, so ranks on other machines cannot find rank 0")
            .fix("export MASTER_ADDR and MASTER_PORT with an address of rank 0's machine"));
    };
    let port = std::env::var("MASTER_PORT").unwrap_or_else(|_| "29500".to_owned());
    match port.trim().parse::<u16>() {
        Ok(port) => Ok(format!("{host}:{port}")),
        Err(_) => Err(Error::input("MASTER_PORT", format!("`{port}` is not a port")).fix("give a number from 1 to 65535")),
    }
}

#[cfg(not(feature = "nccl"))]
fn join_over_nccl(world: World, _device: &Device) -> Result<(Runner, Watch)> {
    Err(Error::input("ranks", format!("this is rank {} of {} on a GPU, and this osprey was built without NCCL", world.rank, world.size))
        .fix("build with `cargo build --release --features nccl`, or start one process"))
}

/// Which engines this program has, for `osprey doctor`.
pub fn engines() -> [(&'static str, bool); 2] {
    [("MPI", cfg!(feature = "mpi")), ("NCCL", cfg!(feature = "nccl"))]
}
