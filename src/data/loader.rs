//! Training batches in an order that is a pure function of (data, seed, row): any batch size, accumulation split or rank count sees
//! the same rows in the same order.
//!
//! The first rows may come from the first source alone; from then on row g comes from the source that the mixture deals to it, as the k-th row of that source: `context` consecutive pairs, rows shuffled
//! within a pass ([`Order::Packed`]), documents that together fit ([`Order::Whole`]), or `context` pairs from a random place
//! ([`Order::Crops`]). With R ranks of B rows, micro-batch m of
//! rank r holds rows (m R + r) B to (m R + r + 1) B - 1, counted from the cursor.

use super::bins::Bins;
use super::config::Order;
use super::dataset::Dataset;
use super::mix::Mixture;
use super::pack::{Batch, Stream};
use super::random::Random;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Makes any row of the training order.
#[derive(Debug)]
pub struct Rows {
    mixture: Mixture,
    streams: Vec<Stream>,
    windows: Vec<Window>,
    /// Of each source, where documents stay whole.
    bins: Vec<Bins>,
    order: Order,
    /// Rows of the first source that come before the mixture.
    first_rows: u64,
    seed: u64,
    context: usize,
}

impl Rows {
    /// Rows of `context` tokens of `dataset` in the order of `seed`.
    pub fn new(dataset: &Dataset, context: usize, seed: u64) -> Result<Self> {
        let stream = |(at, part): (usize, &super::dataset::Part)| match dataset.order {
            Order::Packed => Stream::shuffled(part.shard.clone(), dataset.rules(), seed, at),
            Order::Whole | Order::Crops => Stream::stored(part.shard.clone(), dataset.rules()),
        };
        let streams: Vec<Stream> = dataset.train.iter().enumerate().map(stream).collect();
        if context == 0 || context > u32::MAX as usize {
            return Err(Error::input("model.context", format!("a context of {context} tokens cannot be filled")));
        }
        for (stream, part) in streams.iter().zip(&dataset.train) {
            if stream.pairs() < context as u64 {
                return Err(Error::input(
                    &part.name,
                    format!("the whole source has {} tokens to predict, fewer than one row of {context}", stream.pairs()),
                )
                .fix("give more text or a shorter model.context"));
            }
        }
        let bins: Vec<Bins> = match dataset.order {
            Order::Whole => streams.iter().map(|stream| Bins::new(stream, context)).collect(),
            Order::Packed | Order::Crops => vec![],
        };
        let rows = |(at, stream): (usize, &Stream)| bins.get(at).map_or(stream.pairs() / context as u64, |bins| bins.rows() as u64);
        let windows = streams.iter().enumerate().map(|(at, stream)| Window::new(seed, at, rows((at, stream)))).collect();
        let shares: Vec<f64> = dataset.train.iter().map(|part| part.share).collect();
        Ok(Self {
            mixture: Mixture::new(seed, &shares)?,
            streams,
            windows,
            bins,
            order: dataset.order,
            first_rows: dataset.first_rows,
            seed,
            context,
        })
    }

    /// The index of the source that row `row` comes from.
    pub fn source_of(&mut self, row: u64) -> usize {
        self.locate(row).0
    }

    /// The source of row `row` and the how-manieth row of that source it is.
    fn locate(&mut self, row: u64) -> (usize, u64) {
        let Some(mixed) = row.checked_sub(self.first_rows) else { return (0, row) };
        let (source, index) = self.mixture.locate(mixed);
        (source, if source == 0 { index + self.first_rows } else { index })
    }

    /// Rows `first..first + rows`.
    pub fn batch(&mut self, first: u64, rows: usize) -> Batch {
        let mut batch = Batch::padding(rows, self.context);
        for row in 0..rows {
            let (source, index) = self.locate(first + row as u64);
            let stream = &mut self.streams[source];
            match self.order {
                Order::Packed => stream.fill(self.windows[source].row(index) * self.context as u64, &mut batch, row),
                Order::Whole => stream.fill_parts(self.bins[source].row(self.windows[source].row(index)), &mut batch, row),
                Order::Crops => {
                    let places = stream.pairs() - self.context as u64 + 1;
                    stream.fill(Random::new(self.seed, &format!("crops {source}"), index).below(places), &mut batch, row);
                }
            }
            batch.sources[row] = source as u32;
        }
        batch
    }
}

/// Rows of a source that are shuffled among themselves: at most one pass, so that a pass still trains every token once.
const WINDOW: u64 = 1 << 16;

/// Shuffles the rows of one source within windows. Without it a batch would hold consecutive rows of one long document.
#[derive(Debug)]
struct Window {
    seed: u64,
    name: String,
    rows: u64,
    /// The window in use and the order of its rows.
    order: Option<(u64, Vec<u32>)>,
}

impl Window {
    fn new(seed: u64, source: usize, rows_of_a_pass: u64) -> Self {
        Self { seed, name: format!("rows {source}"), rows: rows_of_a_pass.clamp(1, WINDOW), order: None }
    }

    /// The row that comes at place `index`.
    fn row(&mut self, index: u64) -> u64 {
        let window = index / self.rows;
        if self.order.as_ref().is_none_or(|(made, _)| *made != window) {
            let mut order: Vec<u32> = (0..self.rows as u32).collect();
            Random::new(self.seed, &self.name, window).shuffle(&mut order);
            self.order = Some((window, order));
        }
        let (_, order) = self.order.as_ref().expect("made above");
        window * self.rows + u64::from(order[(index % self.rows) as usize])
    }
}

/// Which rows one process takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of a micro-batch on one rank.
    pub rows: usize,
    pub context: usize,
    pub rank: usize,
    pub ranks: usize,
}

/// Where the order stands: everything a checkpoint needs to go on with the very next row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Rows that all ranks have used.
    pub row: u64,
    /// Of the data and its order.
    pub fingerprint: String,
}

/// Prepares batches ahead on a thread of its own.
#[derive(Debug)]
pub struct Loader {
    batches: Option<Receiver<Batch>>,
    thread: Option<JoinHandle<()>>,
    cursor: Cursor,
    shape: Shape,
    waited: Duration,
}

impl Loader {
    /// Starts at the first row, or goes on at `cursor`, which must be of the same data, seed and context.
    pub fn start(dataset: &Dataset, shape: Shape, seed: u64, cursor: Option<&Cursor>) -> Result<Self> {
        let mut rows = Rows::new(dataset, shape.context, seed)?;
        let fingerprint = format!("{} seed {seed} context {}", dataset.fingerprint(), shape.context);
        if let Some(cursor) = cursor.filter(|cursor| cursor.fingerprint != fingerprint) {
            return Err(Error::input(
                "data",
                format!("the checkpoint stopped within other data ({} there, {fingerprint} here)", cursor.fingerprint),
            )
            .fix("give the data, seed and context of the run, or start anew with --resume never"));
        }
        if shape.rows == 0 || shape.rank >= shape.ranks {
            return Err(Error::input(
                "train.batch",
                format!("{} rows on rank {} of {} make no batch", shape.rows, shape.rank, shape.ranks),
            ));
        }
        let start = cursor.map_or(0, |cursor| cursor.row);
        let (sender, batches) = sync_channel(dataset.prefetch);
        let work = move || {
            let mut first = start + (shape.rank * shape.rows) as u64;
            // The receiver hangs up when the loader is dropped.
            while sender.send(rows.batch(first, shape.rows)).is_ok() {
                first += (shape.ranks * shape.rows) as u64;
            }
        };
        let thread =
            std::thread::Builder::new().name("loader".into()).spawn(work).map_err(Error::io("start a thread for", "the loader"))?;
        Ok(Self { batches: Some(batches), thread: Some(thread), cursor: Cursor { row: start, fingerprint }, shape, waited: Duration::ZERO })
    }

    /// The next micro-batch of this rank.
    pub fn next_batch(&mut self) -> Result<Arc<Batch>> {
        let begin = Instant::now();
        let receiver = self.batches.as_ref().expect("open until dropped");
        let batch = receiver
            .recv()
            .map_err(|_| Error::input("data", "the loader thread stopped").fix("look for a shard file that was changed during the run"))?;
        self.waited += begin.elapsed();
        self.cursor.row += (self.shape.ranks * self.shape.rows) as u64;
        Ok(Arc::new(batch))
    }

    /// After the batches handed out so far.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Time spent waiting for batches, in all.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
