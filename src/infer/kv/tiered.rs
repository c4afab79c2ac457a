//! One layer's cache in two tiers: coded pages near, the halves they were made from far. Reads what a policy chooses, and on request
//! certifies every output against the halves and reads those where the certificate falls short.

use super::codec::Codec;
use super::pages::{Kept, Pages, View, Watch};
use super::recovery::{Group, certify};
use super::{Queries, Store};
use crate::error::Result;
use crate::infer::attention::{Attention, GroupQuery};
use crate::infer::cache::{Counters, Options};
use crate::ops::cpu::attention::{Line, TILE, TileSet, attend_lines};
use rayon::prelude::*;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Lines of queries that one task reads a page for: more of them share the work of decoding it.
const LINES: usize = 64;

/// Multiply-adds below which other threads are left alone.
const SERIAL_WORK: usize = 1 << 18;

pub(super) struct TieredStore {
    pages: Pages,
    options: Options,
    /// Absent where the layer reads every page.
    attention: Option<Attention>,
    counters: Counters,
    choosing: Duration,
}

/// Consecutive rows on one page, for one key-value head.
struct Task {
    kv_head: usize,
    rows: Range<usize>,
    own_page: usize,
}

impl TieredStore {
    pub(super) fn new(options: &Options, layer: usize, codec: Option<Box<dyn Codec>>, kv_heads: usize, head_dim: usize) -> Self {
        let attention = Some(options.attention).filter(|attention| !attention.policy().is_dense_in(layer));
        let needs_bounds = attention.is_some_and(|attention| attention.policy().needs_bounds());
        let kept = Kept {
            norms: options.certifies(),
            boxes: needs_bounds || (attention.is_some() && options.certifies()),
            runs: attention.is_some_and(|attention| attention.policy().needs_estimates()),
        };
        Self {
            pages: Pages::new(codec, kept, kv_heads, head_dim),
            options: *options,
            attention,
            counters: Counters::default(),
            choosing: Duration::ZERO,
        }
    }

    fn tasks(queries: &Queries<'_>) -> Vec<Task> {
        let most = (LINES / queries.group()).max(1);
        let mut tasks = vec![];
        for kv_head in 0..queries.kv_heads {
            let mut first = 0;
            while first < queries.rows() {
                let own_page = (queries.first_position + first) / TILE;
                let end = queries.rows().min((own_page + 1) * TILE - queries.first_position).min(first + most);
                tasks.push(Task { kv_head, rows: first..end, own_page });
                first = end;
            }
        }
        tasks
    }

    /// Outputs of a task's lines, `[rows, heads of the group, head_dim]`.
    fn run(&self, queries: &Queries<'_>, task: &Task, sets: &[Option<TileSet>]) -> Result<(Vec<f32>, Counters)> {
        let (head_dim, group) = (queries.head_dim, queries.group());
        let width = group * head_dim;
        let row_queries = |row: usize| &queries.q[(row * queries.heads + task.kv_head * group) * head_dim..][..width];
        let lines: Vec<Line<'_>> = (task.rows.clone().zip(sets))
            .flat_map(|(row, tiles)| {
                let line = move |query| Line { query, position: queries.first_position + row, tiles: tiles.as_ref() };
                row_queries(row).chunks_exact(head_dim).map(line)
            })
            .collect();
        let mut counters = Counters::default();
        lines.iter().step_by(group).for_each(|line| self.count(line, task, &mut counters));
        let view = View { pages: &self.pages, own: task.own_page, promoted: None };
        let mut out = vec![0.0; lines.len() * head_dim];
        if !self.options.certifies() {
            attend_lines(head_dim, queries.scale(), &lines, &view, task.kv_head, None, &mut out);
            return Ok((out, counters));
        }
        let watch = Watch::new(&view, task.kv_head, &lines);
        let shares = attend_lines(head_dim, queries.scale(), &lines, &view, task.kv_head, Some(&watch), &mut out);
        for ((lines, shares), out) in lines.chunks(group).zip(shares.chunks(group)).zip(out.chunks_mut(width)) {
            let group = Group {
                pages: &self.pages,
                options: &self.options,
                kv_head: task.kv_head,
                own: task.own_page,
                scale: queries.scale(),
                lines,
            };
            certify(&group, shares, out, &mut counters)?;
        }
        Ok((out, counters))
    }

    /// What each row of a task reads.
    fn choices(&self, queries: &Queries<'_>, task: &Task) -> Vec<Option<TileSet>> {
        let width = queries.group() * queries.head_dim;
        let row_queries = |row: usize| &queries.q[(row * queries.kv_heads + task.kv_head) * width..][..width];
        task.rows.clone().map(|row| self.choose(row_queries(row), task)).collect()
    }

    /// What a row reads, its own page included; all when absent.
    fn choose(&self, queries: &[f32], task: &Task) -> Option<TileSet> {
        let attention = self.attention?;
        let query = GroupQuery { queries, head_dim: self.pages.head_dim() };
        let mut tiles = attention.policy().pages(&query, &self.pages.before(task.own_page, task.kv_head));
        tiles.insert(task.own_page);
        Some(tiles)
    }

    fn count(&self, line: &Line<'_>, task: &Task, counters: &mut Counters) {
        let read = line.tiles.map_or(task.own_page + 1, TileSet::len);
        counters.pages_read += read as u64;
        counters.pages_seen += task.own_page as u64 + 1;
        let own_bytes = 4 * self.pages.head_dim() * (line.position % TILE + 1);
        counters.bytes_read += ((read - 1) * self.pages.page_bytes() + own_bytes) as u64;
    }
}

impl Store for TieredStore {
    fn append(&mut self, keys: &[f32], values: &[f32]) {
        self.pages.append(keys, values);
    }

    fn truncate(&mut self, positions: usize) {
        self.pages.truncate(positions);
    }

    fn attend(&mut self, queries: Queries<'_>, out: &mut [f32]) -> Result<()> {
        let tasks = Self::tasks(&queries);
        let alone = queries.q.len() * (queries.first_position + queries.rows()) < SERIAL_WORK;
        let start = Instant::now();
        let sets = for_each(&tasks, alone, |task: &Task| self.choices(&queries, task));
        self.choosing += start.elapsed();
        let chosen: Vec<(&Task, Vec<Option<TileSet>>)> = tasks.iter().zip(sets).collect();
        let results = for_each(&chosen, alone, |(task, sets)| self.run(&queries, task, sets));
        let width = queries.group() * queries.head_dim;
        for (task, result) in tasks.iter().zip(results) {
            let (outputs, counters) = result?;
            for (row, output) in task.rows.clone().zip(outputs.chunks_exact(width)) {
                out[(row * queries.kv_heads + task.kv_head) * width..][..width].copy_from_slice(output);
            }
            self.counters.add(&counters);
        }
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn choosing(&self) -> Duration {
        self.choosing
    }
}

/// Maps `tasks`, on all threads unless `alone`.
fn for_each<T: Sync, R: Send>(tasks: &[T], alone: bool, run: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if alone { tasks.iter().map(run).collect() } else { tasks.par_iter().with_max_len(1).map(run).collect() }
}

#[cfg(test)]
mod tests;
