//! What carries sums from rank to rank, and the thread it runs on: collectives proceed there while the backward pass computes.

use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// A library of collectives. Every rank calls the same ones in the same order.
pub(super) trait Engine {
    /// Sums `values` over all ranks, in place.
    fn sum(&mut self, values: &mut [f32]) -> Result<()>;
    /// The same in double precision.
    fn sum_f64(&mut self, values: &mut [f64]) -> Result<()>;
    /// Gives every rank the values of rank `owner`.
    fn broadcast(&mut self, owner: usize, values: &mut [f32]) -> Result<()>;
    /// Makes later work on the device wait for the collectives so far. Where they run on the host, nothing is left to wait for.
    fn fence(&mut self) -> Result<()> {
        Ok(())
    }
    /// [`Engine::sum`] of a part of a flat f32 tensor on a device.
    fn sum_on_device(&mut self, flat: &Tensor, range: Range<usize>) -> Result<()>;
    /// [`Engine::broadcast`] of a part of a flat f32 tensor on a device.
    fn broadcast_on_device(&mut self, owner: usize, flat: &Tensor, range: Range<usize>) -> Result<()>;
}

/// Part of a flat tensor in main memory, handed to the engine's thread.
pub(super) struct HostRange {
    start: *mut f32,
    length: usize,
    /// Keeps the memory alive.
    _owner: Tensor,
}

// SAFETY: the range is used by one thread at a time: the engine's, from the moment it is sent until its completion is received; see
// `HostRange::new`.
unsafe impl Send for HostRange {}

impl HostRange {
    /// # Safety
    /// Nobody reads or writes `range` of `flat` until the job that takes it is complete.
    pub(super) unsafe fn new(flat: &Tensor, range: Range<usize>) -> Result<Self> {
        let mut start = std::ptr::null_mut();
        crate::ops::host::write(flat, |values| start = values[range.clone()].as_mut_ptr())?;
        Ok(Self { start, length: range.len(), _owner: flat.clone() })
    }

    fn values(&mut self) -> &mut [f32] {
        // SAFETY: within the storage of `_owner`, bounds checked in `new`, and nobody else's by the promise made there.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

/// One collective.
pub(super) enum Work {
    SumHost(HostRange),
    BroadcastHost(usize, HostRange),
    SumDevice(Tensor, Range<usize>),
    BroadcastDevice(usize, Tensor, Range<usize>),
    Fence,
    SumNumbers(Vec<f64>),
    BroadcastValues(usize, Vec<f32>),
}

/// What a finished collective gives back.
#[derive(Default)]
pub(super) struct Done {
    pub(super) numbers: Vec<f64>,
    pub(super) values: Vec<f32>,
    /// When it began and ended on the engine's thread.
    pub(super) times: Option<[Instant; 2]>,
}

pub(super) struct Job {
    work: Work,
    done: Sender<Result<Done>>,
}

/// Where a collective's end is heard.
pub(super) type Completion = Receiver<Result<Done>>;

/// The engine's thread.
pub(super) struct Runner {
    jobs: Sender<Job>,
    thread: std::thread::JoinHandle<()>,
}

impl Runner {
    /// Makes the engine on a thread of its own, which is the only one that ever calls it.
    pub(super) fn start<T: Send + 'static>(make: impl FnOnce() -> Result<(Box<dyn Engine>, T)> + Send + 'static) -> Result<(Self, T)> {
        let (jobs, inbox) = channel::<Job>();
        let (ready, made) = channel();
        let work = move || match make() {
            Ok((engine, facts)) => {
                let _ = ready.send(Ok(facts));
                serve(engine, &inbox);
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let thread = std::thread::Builder::new()
            .name("collectives".into())
            .spawn(work)
            .map_err(crate::error::Error::io("start a thread for", "collectives"))?;
        let facts = made.recv().unwrap_or_else(|_| Err(crate::error::Error::input("ranks", "the engine ended while it started")))?;
        Ok((Self { jobs, thread }, facts))
    }

    pub(super) fn submit(&self, work: Work) -> Completion {
        let (done, completion) = channel();
        // A send to a thread that is gone shows as a closed completion.
        let _ = self.jobs.send(Job { work, done });
        completion
    }

    /// Lets the engine end in order.
    pub(super) fn finish(self) {
        drop(self.jobs);
        let _ = self.thread.join();
    }
}

fn serve(mut engine: Box<dyn Engine>, inbox: &Receiver<Job>) {
    while let Ok(Job { work, done }) = inbox.recv() {
        let began = Instant::now();
        let result = run(&mut *engine, work);
        let _ = done.send(result.map(|found| Done { times: Some([began, Instant::now()]), ..found }));
    }
}

fn run(engine: &mut dyn Engine, work: Work) -> Result<Done> {
    match work {
        Work::SumHost(mut range) => engine.sum(range.values())?,
        Work::BroadcastHost(owner, mut range) => engine.broadcast(owner, range.values())?,
        Work::SumDevice(flat, range) => engine.sum_on_device(&flat, range)?,
        Work::BroadcastDevice(owner, flat, range) => engine.broadcast_on_device(owner, &flat, range)?,
        Work::Fence => engine.fence()?,
        Work::SumNumbers(mut numbers) => {
            engine.sum_f64(&mut numbers)?;
            return Ok(Done { numbers, ..Done::default() });
        }
        Work::BroadcastValues(owner, mut values) => {
            engine.broadcast(owner, &mut values)?;
            return Ok(Done { values, ..Done::default() });
        }
    }
    Ok(Done::default())
}
