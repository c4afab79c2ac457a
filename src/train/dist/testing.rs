//! Ranks within one process, for tests: threads that meet over a shared sum.

use super::engine::{Engine, Runner};
use super::trace::Trace;
use super::watch::{Watch, listen};
use super::{Group, Ranks};
use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex};

struct Shared {
    barrier: Barrier,
    /// What each rank brings.
    brought: Mutex<Vec<Vec<f64>>>,
}

struct InMemory {
    rank: usize,
    shared: Arc<Shared>,
}

impl InMemory {
    fn exchange(&self, mine: Vec<f64>) -> Vec<Vec<f64>> {
        self.shared.brought.lock().unwrap()[self.rank] = mine;
        self.shared.barrier.wait();
        let all = self.shared.brought.lock().unwrap().clone();
        self.shared.barrier.wait();
        all
    }
}

impl Engine for InMemory {
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        let all = self.exchange(values.iter().map(|&x| f64::from(x)).collect());
        values.iter_mut().enumerate().for_each(|(at, value)| *value = all.iter().fold(0.0, |sum: f32, one| sum + one[at] as f32));
        Ok(())
    }

    fn sum_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let all = self.exchange(values.to_vec());
        values.iter_mut().enumerate().for_each(|(at, value)| *value = all.iter().map(|one| one[at]).sum());
        Ok(())
    }

    fn broadcast(&mut self, owner: usize, values: &mut [f32]) -> Result<()> {
        let all = self.exchange(values.iter().map(|&x| f64::from(x)).collect());
        values.iter_mut().zip(&all[owner]).for_each(|(value, theirs)| *value = *theirs as f32);
        Ok(())
    }

    fn sum_on_device(&mut self, _: &Tensor, _: Range<usize>) -> Result<()> {
        unreachable!("tests are in main memory")
    }

    fn broadcast_on_device(&mut self, _: usize, _: &Tensor, _: Range<usize>) -> Result<()> {
        unreachable!("tests are in main memory")
    }
}

/// Runs `work` as each of `size` ranks, on threads, and returns what they return.
pub(in crate::train) fn as_ranks<T: Send>(size: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let listener = listen(0).unwrap();
    let address = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
    let listener = Mutex::new(Some(listener));
    let shared = Arc::new(Shared { barrier: Barrier::new(size), brought: Mutex::new(vec![vec![]; size]) });
    let one = |rank: usize| {
        let mine = if rank == 0 { listener.lock().unwrap().take() } else { None };
        let (watch, payload) = Watch::join(rank, size, &address, mine, if rank == 0 { vec![7] } else { vec![] }).unwrap();
        assert_eq!(payload, [7]);
        let shared = shared.clone();
        let (runner, ()) = Runner::start(move || Ok((Box::new(InMemory { rank, shared }) as Box<dyn Engine>, ()))).unwrap();
        let ranks = Ranks(Some(Arc::new(Group {
            rank,
            size,
            runner: Mutex::new(Some(runner)),
            watch,
            waited: Mutex::default(),
            awaited: Arc::default(),
            trace: Trace::from_environment(rank),
        })));
        // A pool of its own, as a process has: ranks that shared threads would wait for each other on them for ever.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let result = pool.install(|| work(ranks.clone()));
        ranks.part().unwrap();
        result
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                let one = &one;
                scope.spawn(move || one(rank))
            })
            .collect::<Vec<_>>();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
