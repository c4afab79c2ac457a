//! Which documents share a row when none is to be cut (best fit, Ding et al. 2024, arXiv:2404.10830, with a bounded number of open rows):
//! each document goes into the fullest open row that has room for it, or else opens a row of its own.

use super::pack::{Part, Stream};

/// Rows that still take documents. With more, rows get fuller and neighbors in the source get farther apart.
const OPEN: usize = 64;

/// The rows of one pass over a source.
#[derive(Debug)]
pub struct WholeRows {
    parts: Vec<Part>,
    /// Where each row's parts begin in `parts`, and their end.
    starts: Vec<usize>,
}

impl WholeRows {
    /// Packs the documents of `stream`, as stored, into rows of `context` pairs. A document with more pairs fills rows of its own; what is
    /// left of it shares one.
    pub fn new(stream: &Stream, context: usize) -> Self {
        let mut rows = Self { parts: vec![], starts: vec![0] };
        let mut open: Vec<(usize, Vec<Part>)> = vec![];
        for (document, pairs) in stream.document_pairs().enumerate() {
            let document = document as u64;
            let whole = pairs / context as u64;
            for piece in 0..whole {
                rows.close(vec![Part { document, skip: piece * context as u64, count: context }]);
            }
            let count = (pairs % context as u64) as usize;
            if count > 0 {
                rows.place(Part { document, skip: whole * context as u64, count }, &mut open, context);
            }
        }
        open.into_iter().for_each(|(_, parts)| rows.close(parts));
        rows
    }

    fn place(&mut self, part: Part, open: &mut Vec<(usize, Vec<Part>)>, context: usize) {
        let fits = (0..open.len()).filter(|&at| open[at].0 + part.count <= context).max_by_key(|&at| open[at].0);
        let Some(at) = fits else {
            if open.len() == OPEN
                && let Some(fullest) = (0..open.len()).max_by_key(|&at| open[at].0)
            {
                self.close(open.remove(fullest).1);
            }
            open.push((part.count, vec![part]));
            return;
        };
        open[at].0 += part.count;
        open[at].1.push(part);
    }

    fn close(&mut self, parts: Vec<Part>) {
        self.parts.extend(parts);
        self.starts.push(self.parts.len());
    }

    /// Rows in a pass.
    pub fn rows(&self) -> usize {
        self.starts.len() - 1
    }

    /// The parts of row `row`, counted over passes.
    pub fn row(&self, row: u64) -> &[Part] {
        let row = (row % self.rows().max(1) as u64) as usize;
        &self.parts[self.starts[row]..self.starts[row + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::pack::{Batch, Rules};
    use crate::data::shard::Writer;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn documents_are_whole_and_none_is_lost(lengths in proptest::collection::vec(1usize..90, 1..200), context in 8usize..50) {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = Writer::create(&folder.path().join("a.tokens"), 1000, 0, 0).unwrap();
            for &length in &lengths {
                writer.document(&vec![7; length], 0).unwrap();
            }
            let shard = std::sync::Arc::new(writer.finish().unwrap());
            let mut stream = Stream::stored(shard, Rules { bos: Some(1), eos: Some(1), attend_across_documents: false });
            let rows = WholeRows::new(&stream, context);
            let mut seen = vec![0; lengths.len()];
            for row in 0..rows.rows() as u64 {
                let parts = rows.row(row);
                let used: usize = parts.iter().map(|part| part.count).sum();
                prop_assert!(!parts.is_empty() && used <= context);
                for part in parts {
                    seen[part.document as usize] += part.count;
                    let whole = lengths[part.document as usize] + 1;
                    prop_assert!(part.count == whole || whole > context);
                }
                let mut batch = Batch::padding(1, context);
                stream.fill_parts(parts, &mut batch, 0);
                prop_assert_eq!(batch.trained_tokens(), used);
                let begins = (0..used).filter(|&at| batch.document_starts[at] as usize == at).count();
                prop_assert_eq!(begins, parts.len());
            }
            prop_assert!(seen.iter().zip(&lengths).all(|(pairs, length)| *pairs == length + 1));
        }
    }

    #[test]
    fn short_documents_fill_what_long_ones_leave() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("a.tokens"), 1000, 0, 0).unwrap();
        for document in 0..4000usize {
            writer.document(&vec![7; 1 + document * 7919 % 400], 0).unwrap();
        }
        let stream = Stream::stored(
            std::sync::Arc::new(writer.finish().unwrap()),
            Rules { bos: Some(1), eos: None, attend_across_documents: false },
        );
        let rows = WholeRows::new(&stream, 512).rows() as u64;
        assert!(stream.pairs() * 100 > rows * 512 * 95, "{} pairs in {rows} rows", stream.pairs());
    }
}
