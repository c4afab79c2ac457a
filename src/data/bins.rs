//! Whole sequences to fixed rows: what [`super::pack`] does for text, for documents whose tokens have weights.
//!
//! A sequence s with weights w gives the pairs (s_j, s_(j+1)) of weight w_(j+1). Sequences are not divided between rows: each goes into
//! the fullest row that still has room (best fit, longest first), and the rest of a row is padding of weight 0. A sequence of more
//! pairs than a row is cut at its end; one that has nothing to train within a row is left out. The rows are the same for every pass and come in
//! an order shuffled anew.

use super::pack::Batch;
use super::random::Random;
use super::shard::Shard;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The rows of one source.
#[derive(Debug)]
pub struct Bins {
    shard: Arc<Shard>,
    context: usize,
    attend_across_documents: bool,
    /// Documents of each row.
    rows: Vec<Vec<u32>>,
    /// Seed and name of the order of rows; as packed when absent.
    shuffle: Option<(u64, String)>,
    /// The pass in use and its order of rows.
    order: Option<(u64, Vec<u32>)>,
}

impl Bins {
    /// Packs `shard` into rows of `context` pairs.
    pub fn new(shard: Arc<Shard>, context: usize, attend_across_documents: bool, shuffle: Option<(u64, usize)>) -> Self {
        let mut documents: Vec<(usize, u32)> = Vec::new();
        let mut weights = Vec::new();
        for document in 0..shard.documents() {
            let (begin, end) = (shard.end_before(document), shard.end_before(document + 1));
            let pairs = context.min((end - begin - 1) as usize);
            weights.clear();
            shard.read_weights(begin + 1, begin + 1 + pairs as u64, &mut weights);
            if weights.iter().any(|&weight| weight > 0.0) {
                documents.push((pairs, document as u32));
            }
        }
        documents.sort_by_key(|&(pairs, document)| (usize::MAX - pairs, document));
        let rows = best_fit(&documents, context);
        let shuffle = shuffle.map(|(seed, source)| (seed, format!("bins {source}")));
        Self { shard, context, attend_across_documents, rows, shuffle, order: None }
    }

    /// Rows of one pass.
    pub fn rows(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Fills row `row` of `batch`, all padding until then, with row `number` of the endless sequence of passes; there is at least one row.
    pub fn fill(&mut self, number: u64, batch: &mut Batch, row: usize) {
        let place = (number % self.rows()) as usize;
        let at = match &self.shuffle {
            None => place,
            Some((seed, name)) => {
                let pass = number / self.rows();
                if self.order.as_ref().is_none_or(|(made, _)| *made != pass) {
                    let mut order: Vec<u32> = (0..self.rows.len() as u32).collect();
                    Random::new(*seed, name, pass).shuffle(&mut order);
                    self.order = Some((pass, order));
                }
                self.order.as_ref().expect("made above").1[place] as usize
            }
        };
        let mut begin = 0;
        for document in self.rows[at].clone() {
            begin += self.copy(u64::from(document), batch, row * self.context, begin);
        }
    }

    /// Copies a document to position `at` of the row that starts at `row`; returns its pairs.
    fn copy(&self, document: u64, batch: &mut Batch, row: usize, at: usize) -> usize {
        let (begin, end) = (self.shard.end_before(document), self.shard.end_before(document + 1));
        let pairs = self.context.min((end - begin - 1) as usize);
        let (mut tokens, mut weights) = (Vec::new(), Vec::new());
        self.shard.read(begin, begin + 1 + pairs as u64, &mut tokens);
        self.shard.read_weights(begin + 1, begin + 1 + pairs as u64, &mut weights);
        let place = row + at..row + at + pairs;
        batch.inputs[place.clone()].copy_from_slice(&tokens[..pairs]);
        batch.targets[place.clone()].copy_from_slice(&tokens[1..]);
        batch.weights[place.clone()].copy_from_slice(&weights);
        let start = if self.attend_across_documents { 0 } else { at as u32 };
        batch.document_starts[place.clone()].fill(start);
        for (position, slot) in batch.positions[place].iter_mut().enumerate() {
            *slot = (at + position) as u32 - start;
        }
        pairs
    }
}

/// Rows of (pairs, document), longest first, each put where it leaves the least room.
fn best_fit(documents: &[(usize, u32)], context: usize) -> Vec<Vec<u32>> {
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Rows by the room they have, the oldest last.
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &(pairs, document) in documents {
        let found = room.range_mut(pairs..).next().map(|(&free, rows)| (free, rows.pop(), rows.is_empty()));
        let (free, row) = match found {
            Some((free, Some(row), emptied)) => {
                if emptied {
                    room.remove(&free);
                }
                (free, row)
            }
            _ => {
                rows.push(Vec::new());
                (context, rows.len() - 1)
            }
        };
        rows[row].push(document);
        if free > pairs {
            room.entry(free - pairs).or_default().push(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::Writer;
    use proptest::prelude::*;

    /// Documents of these lengths; the hundreds of a token name its document, every second token is trained.
    fn shard(lengths: &[usize]) -> (tempfile::TempDir, Arc<Shard>) {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("a.tokens"), 10_000, 0, 0).unwrap().with_weights();
        for (document, &length) in lengths.iter().enumerate() {
            let tokens: Vec<u32> = (0..length as u32).map(|at| 100 * (document as u32 + 1) + at).collect();
            let weights: Vec<f32> = (0..length).map(|at| (at % 2) as f32).collect();
            writer.weighted_document(&tokens, &weights, 0).unwrap();
        }
        let shard = Arc::new(writer.finish().unwrap());
        (folder, shard)
    }

    #[test]
    fn a_row_holds_whole_documents() {
        let (_folder, shard) = shard(&[3, 9, 2, 1]);
        let mut bins = Bins::new(shard, 4, false, None);
        assert_eq!(bins.rows(), 2);
        let mut batch = Batch::padding(2, 4);
        bins.fill(0, &mut batch, 0);
        bins.fill(1, &mut batch, 1);
        // The long document is cut; the one of a single token has nothing to predict.
        assert_eq!(batch.inputs, [200, 201, 202, 203, 100, 101, 300, 0]);
        assert_eq!(batch.targets, [201, 202, 203, 204, 101, 102, 301, 0]);
        assert_eq!(batch.weights, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(batch.document_starts, [0, 0, 0, 0, 0, 0, 2, 3]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 1, 0, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_document_comes_once_in_a_pass(
            lengths in proptest::collection::vec(2usize..30, 1..40), context in 1usize..40, seed in 0u64..50,
        ) {
            let (_folder, shard) = shard(&lengths);
            let mut bins = Bins::new(shard, context, false, Some((seed, 0)));
            let rows = bins.rows() as usize;
            let mut batch = Batch::padding(2 * rows, context);
            (0..2 * rows).for_each(|row| bins.fill(row as u64, &mut batch, row));
            let mut seen = vec![0; lengths.len()];
            for row in 0..2 * rows {
                for at in 0..context {
                    let index = row * context + at;
                    let (input, target, start) = (batch.inputs[index], batch.targets[index], batch.document_starts[index] as usize);
                    prop_assert_eq!(batch.positions[index] as usize, at - start);
                    if input == 0 {
                        prop_assert_eq!((batch.weights[index], start), (0.0, at));
                        continue;
                    }
                    prop_assert_eq!(target, input + 1);
                    prop_assert_eq!(batch.weights[index] as u32, target % 100 % 2);
                    prop_assert_eq!(input % 100, (at - start) as u32);
                    if at == start {
                        seen[(input / 100 - 1) as usize] += 1;
                    }
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 2), "{:?}", seen);
            // Never more than half empty in all, except for the last row.
            let used = lengths.iter().map(|&length| context.min(length - 1)).sum::<usize>();
            prop_assert!(rows <= 1 || 2 * used >= (rows - 1) * context);
        }
    }
}
