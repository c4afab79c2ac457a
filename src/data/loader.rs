//! Training batches in an order that is a pure function of (data, seed, row): any batch size, accumulation split or rank count sees
//! the same rows in the same order.
//!
//! The first rows may come from the first source alone; from then on row g comes from the source that the mixture deals to it, as the k-th row of that source: `context` consecutive pairs, rows shuffled
//! within a pass ([`Order::Packed`]), documents that together fit ([`Order::Whole`]), or `context` pairs from a random place
//! ([`Order::Crops`]); conversations come whole, several to a row ([`super::bins`]). With R ranks of B rows, micro-batch m of
//! rank r holds rows (m R + r) B to (m R + r + 1) B - 1, counted from the cursor.

use super::config::Order;
use super::dataset::{Dataset, Supply};
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
    supplies: Vec<Supply>,
    windows: Vec<Window>,
    order: Order,
    /// Rows of the first source that come before the mixture.
    first_rows: u64,
    seed: u64,
    context: usize,
}

impl Rows {
    /// Rows of `context` tokens of `dataset` in the order of `seed`.
    pub fn new(dataset: &Dataset, context: usize, seed: u64) -> Result<Self> {
        if context == 0 || context > u32::MAX as usize {
            return Err(Error::input("model.context", format!("a context of {context} tokens cannot be filled")));
        }
        let supply = |(at, part): (usize, &super::dataset::Part)| match dataset.order {
            _ if part.shard.is_weighted() => Supply::Sequences(dataset.bins(part, context, Some((seed, at)))),
            Order::Whole => dataset.whole(part, context),
            Order::Packed => Supply::Text(Stream::shuffled(part.shard.clone(), dataset.rules(), seed, at)),
            Order::Crops => Supply::Text(Stream::stored(part.shard.clone(), dataset.rules())),
        };
        let supplies: Vec<Supply> = dataset.train.iter().enumerate().map(supply).collect();
        for (supply, part) in supplies.iter().zip(&dataset.train) {
            check_supply(supply, &part.name, context)?;
        }
        let rows_of_a_pass = |supply: &Supply| match supply {
            Supply::Text(stream) => stream.pairs() / context as u64,
            Supply::Whole(_, rows) => rows.rows() as u64,
            Supply::Sequences(bins) => bins.rows(),
        };
        let windows = supplies.iter().enumerate().map(|(at, supply)| Window::new(seed, at, rows_of_a_pass(supply))).collect();
        let shares: Vec<f64> = dataset.train.iter().map(|part| part.share).collect();
        Ok(Self {
            mixture: Mixture::new(seed, &shares)?,
            supplies,
            windows,
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
            match (&mut self.supplies[source], self.order) {
                (Supply::Sequences(bins), _) => bins.fill(index, &mut batch, row),
                (Supply::Whole(stream, rows), _) => stream.fill_parts(rows.row(self.windows[source].row(index)), &mut batch, row),
                (Supply::Text(stream), Order::Crops) => {
                    let places = stream.pairs() - self.context as u64 + 1;
                    stream.fill(Random::new(self.seed, &format!("crops {source}"), index).below(places), &mut batch, row);
                }
                (Supply::Text(stream), Order::Packed | Order::Whole) => {
                    stream.fill(self.windows[source].row(index) * self.context as u64, &mut batch, row);
                }
            }
            batch.sources[row] = source as u32;
        }
        batch
    }
}

/// Refuses a source that cannot fill one row.
fn check_supply(supply: &Supply, name: &str, context: usize) -> Result<()> {
    match supply {
        Supply::Text(stream) | Supply::Whole(stream, _) if stream.pairs() < context as u64 => {
            let cause = format!("the whole source has {} tokens to predict, fewer than one row of {context}", stream.pairs());
            Err(Error::input(name, cause).fix("give more text or a shorter model.context"))
        }
        Supply::Sequences(bins) if bins.rows() == 0 => {
            let cause = format!("no conversation has a trained token among its first {context}: the mask is empty");
            Err(Error::input(name, cause).fix("give a longer model.context or shorter conversations"))
        }
        Supply::Text(_) | Supply::Whole(..) | Supply::Sequences(_) => Ok(()),
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
