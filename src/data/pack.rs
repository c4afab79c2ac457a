//! Documents to fixed rows with boundaries.
//!
//! A document with tokens t becomes the sequence s = BOS t EOS (each where the tokenizer has it), and s gives the pairs
//! (s_j, s_(j+1)): input and target. A source is the endless sequence of its documents' pairs, shuffled anew for every pass, and a
//! row is `context` consecutive pairs. So every position is trained, no target lies beyond a boundary, EOS is never an input, and a
//! long document goes on in the next row (without its past, which lies outside the row).

use super::random::Random;
use super::shard::Shard;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// `rows` x `context` tokens, row-major.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    pub rows: usize,
    pub context: usize,
    pub inputs: Vec<u32>,
    /// What follows each input; 0 in padding.
    pub targets: Vec<u32>,
    /// How much each target counts: 1 in text, 0 in padding and where a conversation's mask says so.
    pub weights: Vec<f32>,
    /// For each token, the index in its row of the first token it may attend to.
    pub document_starts: Vec<u32>,
    /// For each token, its distance from there.
    pub positions: Vec<u32>,
    /// For each row, the index of its source.
    pub sources: Vec<u32>,
}

impl Batch {
    /// Room for `rows` rows, every position still padding that attends to nothing but itself.
    pub fn padding(rows: usize, context: usize) -> Self {
        let tokens = rows * context;
        let starts = (0..rows).flat_map(|_| 0..context as u32).collect();
        Self {
            rows,
            context,
            inputs: vec![0; tokens],
            targets: vec![0; tokens],
            weights: vec![0.0; tokens],
            document_starts: starts,
            positions: vec![0; tokens],
            sources: vec![0; rows],
        }
    }

    /// Tokens that count in the loss.
    pub fn trained_tokens(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }
}

/// What packing adds to documents and hides from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub attend_across_documents: bool,
}

impl Rules {
    /// Pairs of a document of `tokens` tokens (at least 1).
    fn pairs(self, tokens: u64) -> u64 {
        tokens - 1 + u64::from(self.bos.is_some()) + u64::from(self.eos.is_some())
    }
}

/// One pass over the documents.
#[derive(Debug)]
struct Pass {
    number: u64,
    /// Document at each place of the order; nothing when they come as stored.
    order: Option<Vec<u32>>,
    /// Pairs before each place, and in all.
    starts: Vec<u64>,
}

/// Pairs `skip..skip + count` of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub document: u64,
    pub skip: u64,
    pub count: usize,
}

/// The endless sequence of pairs of one source.
#[derive(Debug)]
pub struct Stream {
    shard: Arc<Shard>,
    rules: Rules,
    /// Seed and name of the order of documents; as stored when absent.
    shuffle: Option<(u64, String)>,
    pairs: u64,
    /// A row may reach from one pass into the next.
    passes: VecDeque<Pass>,
    tokens: Vec<u32>,
}

impl Stream {
    /// Documents shuffled anew for every pass by (`seed`, `source`, pass).
    pub fn shuffled(shard: Arc<Shard>, rules: Rules, seed: u64, source: usize) -> Self {
        Self::new(shard, rules, Some((seed, format!("documents {source}"))))
    }

    /// Documents as stored.
    pub fn stored(shard: Arc<Shard>, rules: Rules) -> Self {
        Self::new(shard, rules, None)
    }

    fn new(shard: Arc<Shard>, rules: Rules, shuffle: Option<(u64, String)>) -> Self {
        let mut stream = Self { shard, rules, shuffle, pairs: 0, passes: VecDeque::new(), tokens: Vec::new() };
        stream.pairs = stream.document_pairs().sum();
        stream
    }

    /// Pairs in one pass.
    pub fn pairs(&self) -> u64 {
        self.pairs
    }

    /// Fills row `row` of `batch` with the pairs from number `first` on, over the ends of passes; [`Stream::pairs`] is not 0.
    pub fn fill(&mut self, first: u64, batch: &mut Batch, row: usize) {
        let context = batch.context;
        let mut at = 0;
        while at < context {
            at += self.fill_fragment(first + at as u64, batch, row * context, at, context - at);
        }
    }

    /// [`Stream::fill`] within one pass: positions beyond its end stay as they are.
    pub fn fill_once(&mut self, first: u64, batch: &mut Batch, row: usize) {
        let room = (batch.context as u64).min(self.pairs.saturating_sub(first)) as usize;
        let mut at = 0;
        while at < room {
            at += self.fill_fragment(first + at as u64, batch, row * batch.context, at, room - at);
        }
    }

    /// Copies pairs of the one document that pair number `pair` belongs to, up to `room`, to position `at` of the row that starts
    /// at `row`; returns how many.
    fn fill_fragment(&mut self, pair: u64, batch: &mut Batch, row: usize, at: usize, room: usize) -> usize {
        let pass = self.pass(pair / self.pairs);
        let within = pair % self.pairs;
        let (starts, order) = (&self.passes[pass].starts, &self.passes[pass].order);
        let place = starts.partition_point(|&start| start <= within) - 1;
        let skip = within - starts[place];
        let count = (starts[place + 1] - within).min(room as u64) as usize;
        let document = order.as_ref().map_or(place as u64, |order| u64::from(order[place]));
        self.fill_part(Part { document, skip, count }, batch, row, at);
        count
    }

    /// Copies `part` to position `at` of the row that starts at `row`.
    fn fill_part(&mut self, part: Part, batch: &mut Batch, row: usize, at: usize) {
        let Part { document, skip, count } = part;
        self.read_sequence(document, skip, count + 1);
        let at_token = row + at;
        batch.inputs[at_token..at_token + count].copy_from_slice(&self.tokens[..count]);
        batch.targets[at_token..at_token + count].copy_from_slice(&self.tokens[1..=count]);
        batch.weights[at_token..at_token + count].fill(1.0);
        let start = if self.rules.attend_across_documents { 0 } else { at as u32 };
        batch.document_starts[at_token..at_token + count].fill(start);
        for (position, slot) in batch.positions[at_token..at_token + count].iter_mut().enumerate() {
            *slot = (at + position) as u32 - start;
        }
    }

    /// Fills the beginning of row `row` of `batch` with `parts`, which fit; the rest stays as it is.
    pub fn fill_parts(&mut self, parts: &[Part], batch: &mut Batch, row: usize) {
        let mut at = 0;
        for part in parts {
            self.fill_part(*part, batch, row * batch.context, at);
            at += part.count;
        }
    }

    /// Pairs of each document, as stored.
    pub fn document_pairs(&self) -> impl Iterator<Item = u64> {
        (0..self.shard.documents()).map(|document| self.rules.pairs(self.shard.end_before(document + 1) - self.shard.end_before(document)))
    }

    /// Elements `from..from + count` of [BOS] tokens [EOS] into `self.tokens`.
    fn read_sequence(&mut self, document: u64, from: u64, count: usize) {
        let (begin, end) = (self.shard.end_before(document), self.shard.end_before(document + 1));
        let leading = u64::from(self.rules.bos.is_some());
        self.tokens.clear();
        self.tokens.extend(self.rules.bos.filter(|_| from == 0));
        let first = begin + from.saturating_sub(leading);
        let wanted = (count - self.tokens.len()) as u64;
        self.shard.read(first.min(end), (first + wanted).min(end), &mut self.tokens);
        if self.tokens.len() < count {
            self.tokens.extend(self.rules.eos);
        }
    }

    /// The index in `self.passes` of pass `number`.
    fn pass(&mut self, number: u64) -> usize {
        // Stored order is the same for every pass.
        let number = if self.shuffle.is_some() { number } else { 0 };
        if let Some(at) = self.passes.iter().position(|pass| pass.number == number) {
            return at;
        }
        if self.passes.len() == 2 {
            self.passes.pop_front();
        }
        let pass = self.make_pass(number);
        self.passes.push_back(pass);
        self.passes.len() - 1
    }

    fn make_pass(&self, number: u64) -> Pass {
        let documents = self.shard.documents();
        let order = self.shuffle.as_ref().map(|(seed, name)| {
            let mut order: Vec<u32> = (0..documents as u32).collect();
            Random::new(*seed, name, number).shuffle(&mut order);
            order
        });
        let mut starts = Vec::with_capacity(documents as usize + 1);
        let mut total = 0;
        starts.push(0);
        for place in 0..documents {
            let document = order.as_ref().map_or(place, |order| u64::from(order[place as usize]));
            total += self.rules.pairs(self.shard.end_before(document + 1) - self.shard.end_before(document));
            starts.push(total);
        }
        Pass { number, order, starts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::Writer;
    use proptest::prelude::*;

    fn shard(lengths: &[usize]) -> (tempfile::TempDir, Arc<Shard>) {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("a.tokens"), 1000, 0, 0).unwrap();
        // The hundreds of a token name its document, so that a leak shows.
        for (document, &length) in lengths.iter().enumerate() {
            let tokens: Vec<u32> = (0..length as u32).map(|at| 100 + 100 * (document as u32 % 8) + at % 100).collect();
            writer.document(&tokens, 0).unwrap();
        }
        let shard = Arc::new(writer.finish().unwrap());
        (folder, shard)
    }

    fn rules(bos: bool, eos: bool, attend_across_documents: bool) -> Rules {
        Rules { bos: bos.then_some(1), eos: eos.then_some(2), attend_across_documents }
    }

    #[test]
    fn a_row_is_what_it_says() {
        let (_folder, shard) = shard(&[3, 2]);
        let mut stream = Stream::stored(shard, rules(true, true, false));
        assert_eq!(stream.pairs(), 7);
        let mut batch = Batch::padding(2, 5);
        stream.fill(0, &mut batch, 0);
        stream.fill(5, &mut batch, 1);
        assert_eq!(batch.inputs, [1, 100, 101, 102, 1, 200, 201, 1, 100, 101]);
        assert_eq!(batch.targets, [100, 101, 102, 2, 200, 201, 2, 100, 101, 102]);
        assert_eq!(batch.document_starts, [0, 0, 0, 0, 4, 0, 0, 2, 2, 2]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 0, 1, 0, 1, 2]);
        assert_eq!(batch.trained_tokens(), 10);
        let mut end = Batch::padding(1, 5);
        stream.fill_once(5, &mut end, 0);
        assert_eq!((end.trained_tokens(), end.inputs[2], end.document_starts[4], end.positions[4]), (2, 0, 4, 0));
    }

    #[test]
    fn passes_are_shuffled_and_complete() {
        let (_folder, shard) = shard(&[4; 50]);
        let rules = rules(true, true, false);
        let mut stream = Stream::shuffled(shard.clone(), rules, 3, 0);
        let pass_of = |stream: &mut Stream, number: u64| {
            let mut batch = Batch::padding(1, stream.pairs() as usize);
            stream.fill(number * stream.pairs(), &mut batch, 0);
            batch
        };
        let (first, second) = (pass_of(&mut stream, 0), pass_of(&mut stream, 1));
        assert_ne!(first.inputs, second.inputs);
        let sorted = |batch: &Batch| {
            let mut inputs = batch.inputs.clone();
            inputs.sort_unstable();
            inputs
        };
        assert_eq!(sorted(&first), sorted(&second));
        assert_eq!(pass_of(&mut Stream::shuffled(shard.clone(), rules, 3, 0), 1), second);
        assert_ne!(pass_of(&mut Stream::shuffled(shard, rules, 4, 0), 1).inputs, second.inputs);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn nothing_leaks_and_nothing_is_lost(
            lengths in proptest::collection::vec(1usize..30, 1..12), context in 1usize..40, seed in 0u64..50,
            bos in any::<bool>(), eos in any::<bool>(),
        ) {
            let (_folder, shard) = shard(&lengths);
            let mut stream = Stream::shuffled(shard, rules(bos, eos, false), seed, 0);
            prop_assume!(stream.pairs() > 0);
            let rows = (2 * stream.pairs()).div_ceil(context as u64) as usize;
            let mut batch = Batch::padding(rows, context);
            (0..rows).for_each(|row| stream.fill((row * context) as u64, &mut batch, row));
            prop_assert_eq!(batch.trained_tokens(), rows * context);
            for row in 0..rows {
                for at in 0..context {
                    let index = row * context + at;
                    let (input, target, start) = (batch.inputs[index], batch.targets[index], batch.document_starts[index] as usize);
                    prop_assert_eq!(batch.positions[index] as usize, at - start);
                    prop_assert!(input != 2);
                    if input != 1 && target != 2 {
                        prop_assert_eq!(input / 100, target / 100);
                    }
                    // All that a token may attend to is of its own document and in order.
                    if at > start {
                        prop_assert_eq!(batch.targets[index - 1], input);
                        prop_assert_eq!(batch.document_starts[index - 1] as usize, start);
                        prop_assert!(input != 1);
                    }
                }
            }
            // Two passes hold every pair twice.
            let pairs = stream.pairs() as usize;
            let mut both: Vec<_> = batch.inputs.iter().zip(&batch.targets).take(2 * pairs).collect();
            both.sort_unstable();
            prop_assert!(both.chunks(2).all(|two| two[0] == two[1]) || lengths.len() > 8);
        }
    }
}
