//! Attention of single lines over chosen tiles, with what each line drew from each tile on request: what sparse reading and certificates
//! are made from. A line is one query of one head.

use super::forward::{BLOCK, Block, GROUP, SEGMENT, Seen, Unwatched, Witness, segment};
use super::tiles::{KeyValueTiles, TILE, padded};
use crate::multiversion;
use crate::ops::cpu::reduce;
use rayon::prelude::*;
use std::ops::Range;

/// A set of tiles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TileSet {
    words: Vec<u64>,
}

impl TileSet {
    /// The tiles below `end`.
    pub fn below(end: usize) -> Self {
        (0..end).collect()
    }

    /// Adds a tile; says whether it is new.
    pub fn insert(&mut self, tile: usize) -> bool {
        let (word, bit) = (tile / 64, 1 << (tile % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Whether it holds a tile.
    pub fn contains(&self, tile: usize) -> bool {
        self.words.get(tile / 64).is_some_and(|word| word >> (tile % 64) & 1 == 1)
    }

    /// How many tiles it holds.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its tiles, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.words.len() * 64).filter(|tile| self.contains(*tile))
    }
}

impl FromIterator<usize> for TileSet {
    fn from_iter<I: IntoIterator<Item = usize>>(tiles: I) -> Self {
        tiles.into_iter().fold(Self::default(), |mut set, tile| {
            set.insert(tile);
            set
        })
    }
}

/// One query of one head, and what it reads.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// `[head_dim]`, not yet scaled.
    pub query: &'a [f32],
    /// It sees the keys up to here.
    pub position: usize,
    /// Which of the tiles that it sees it reads; all when absent.
    pub tiles: Option<&'a TileSet>,
}

impl Line<'_> {
    fn reads(&self, tile: usize) -> bool {
        self.tiles.is_none_or(|tiles| tiles.contains(tile))
    }
}

/// Is asked about tiles while lines read them.
pub trait Observer: Sync {
    /// Writes at least the squared norms of the 64 values of a tile.
    fn squared_norms(&self, tile: usize, norms: &mut [f32; TILE]);

    /// Errors of the scores of some lines with the keys of a tile: none unless the observer knows of some.
    fn score_errors(&self, tile: usize, lines: Range<usize>, errors: &mut [ScoreError]) {
        let _ = (tile, lines, errors);
    }
}

/// How far stored scores are from true ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScoreError {
    /// At least the largest.
    pub most: f32,
    /// Their variance.
    pub variance: f32,
}

/// What a line drew from one tile, in units of the softmax's weights exp(score - `maximum`), `maximum` the largest score of the tile's
/// segment up to this tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    pub tile: usize,
    pub maximum: f32,
    /// Sum of weights.
    pub mass: f32,
    /// Sum of weight times the value's squared norm.
    pub energy: f32,
    /// Sum of squared weights.
    pub squares: f32,
    /// The line's output over this tile and those before in its segment, times the whole line's output.
    pub reached: f32,
    pub error: ScoreError,
}

/// The shares of one line.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    /// In ascending order of tiles.
    pub tiles: Vec<Share>,
    /// The largest score of all.
    pub maximum: f32,
    /// Sum of weights exp(score - `maximum`).
    pub sum: f32,
    /// The output after each tile, `[tiles, padded head_dim]`, until the line is finished.
    outputs: Vec<f32>,
}

impl Shares {
    fn with_room(tiles: usize, head_dim: usize) -> Self {
        Self { tiles: Vec::with_capacity(tiles), outputs: Vec::with_capacity(tiles * padded(head_dim)), ..Self::default() }
    }

    /// The line's output is known.
    fn finish(&mut self, maximum: f32, sum: f32, out: &[f32]) {
        (self.maximum, self.sum) = (maximum, sum);
        let width = padded(out.len());
        for (share, output) in self.tiles.iter_mut().zip(self.outputs.chunks_exact(width)) {
            share.reached = product(&output[..out.len()], out);
        }
        self.outputs = vec![];
    }
}

/// Collects the shares of a block's lines.
struct Ledger<'a> {
    observer: &'a dyn Observer,
    /// Number of the block's first line among all.
    first: usize,
    /// Tile whose norms are at hand.
    tile: Option<usize>,
    norms: [f32; TILE],
    shares: &'a mut [Shares],
}

impl Witness for Ledger<'_> {
    fn read(&mut self, block: &Block, tile: usize, first_line: usize, seen: &[Seen; GROUP], weights: &[f32]) {
        let hull = Seen::hull(seen);
        if hull.is_empty() {
            return;
        }
        if self.tile != Some(tile) {
            self.observer.squared_norms(tile, &mut self.norms);
            self.tile = Some(tile);
        }
        let count = GROUP.min(block.len() - first_line);
        let mut errors = [ScoreError::default(); GROUP];
        self.observer.score_errors(tile, self.first + first_line..self.first + first_line + count, &mut errors[..count]);
        let (first, columns) = hull.lanes();
        let lines = (first_line..block.len()).zip(seen).zip(errors).zip(weights.chunks_exact(TILE));
        for (((line, _), error), weights) in lines.filter(|(((_, seen), _), _)| !seen.is_empty()) {
            let lanes = first..first + columns;
            let [mass, energy, squares] = sums(&weights[lanes.clone()], &self.norms[lanes]);
            let shares = &mut self.shares[line];
            shares.tiles.push(Share { tile, maximum: block.maximum(line), mass, energy, squares, reached: 0.0, error });
            shares.outputs.extend_from_slice(block.unfinished(line));
        }
    }
}

multiversion! {
    /// Sums of the weights, of the weights times the norms, of the squared weights.
    fn sums(weights: &[f32], norms: &[f32]) -> [f32; 3] {
        [reduce::sum(weights), reduce::dot(weights, norms), reduce::sum_of_squares(weights)]
    }
}

multiversion! {
    fn product(x: &[f32], y: &[f32]) -> f32 {
        reduce::dot(x, y)
    }
}

/// Attention of `lines`, in ascending order of position, over one key-value head. Overwrites `out`, `[lines, head_dim]`. Given an
/// observer, returns every line's shares.
///
/// A line gets the bits that [`attend_cached`](super::attend_cached) gives it over the same keys with the others masked.
///
/// # Panics
/// When lengths disagree.
pub fn attend_lines(
    head_dim: usize,
    scale: f32,
    lines: &[Line<'_>],
    tiles: &impl KeyValueTiles,
    kv_head: usize,
    observer: Option<&dyn Observer>,
    out: &mut [f32],
) -> Vec<Shares> {
    assert_eq!(out.len(), lines.len() * head_dim, "one output per line");
    let mut all = vec![];
    for (index, (lines, out)) in lines.chunks(BLOCK).zip(out.chunks_mut(BLOCK * head_dim)).enumerate() {
        let run = Run { head_dim, scale, lines, first: index * BLOCK, kv_head, observer };
        all.extend(run.attend(tiles, out));
    }
    all
}

/// A block of lines.
struct Run<'a> {
    head_dim: usize,
    scale: f32,
    lines: &'a [Line<'a>],
    /// Number of the first line among all.
    first: usize,
    kv_head: usize,
    observer: Option<&'a dyn Observer>,
}

impl Run<'_> {
    fn attend(&self, tiles: &impl KeyValueTiles, out: &mut [f32]) -> Vec<Shares> {
        let last = self.lines.iter().map(|line| line.position / TILE + 1).max().unwrap_or(0);
        let most = self.lines.iter().map(|line| line.tiles.map_or(last, TileSet::len)).max().unwrap_or(0);
        // A few lines over a long text are shared by the threads, segment by segment.
        let (block, mut shares) = if self.lines.len() <= GROUP && most > SEGMENT {
            let part = |index: usize| self.part(tiles, segment(index));
            let parts: Vec<(Block, Vec<Shares>)> = (0..last.div_ceil(SEGMENT)).into_par_iter().with_max_len(1).map(part).collect();
            let (mut block, mut all) = (self.block(), vec![]);
            for (part, shares) in parts {
                block.join(&part.into_drawn());
                all.push(shares);
            }
            (block, all)
        } else {
            let (block, shares) = self.part(tiles, 0..last);
            (block, vec![shares])
        };
        let mut block = block;
        block.close();
        for (line, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
            block.finish(line, out);
            let (maximum, sum) = (block.maximum(line), block.sum(line));
            shares.iter_mut().filter_map(|part| part.get_mut(line)).for_each(|shares| shares.finish(maximum, sum, out));
        }
        let mut parts = shares.into_iter();
        let mut all = parts.next().unwrap_or_default();
        parts.for_each(|part| all.iter_mut().zip(part).for_each(|(all, part)| all.tiles.extend(part.tiles)));
        all
    }

    fn block(&self) -> Block {
        let mut block = Block::new(self.head_dim);
        block.clear();
        self.lines.iter().for_each(|line| block.push(line.query, self.scale, 0, line.position));
        block
    }

    /// What the lines draw from the tiles of `within`.
    fn part(&self, tiles: &impl KeyValueTiles, within: Range<usize>) -> (Block, Vec<Shares>) {
        let mut block = self.block();
        let reads = |line: usize, tile: usize| self.lines[line].reads(tile);
        let Some(observer) = self.observer else {
            block.attend_chosen(tiles, self.kv_head, within, reads, &mut Unwatched);
            return (block, vec![]);
        };
        let room = |line: &Line<'_>| within.len().min(line.tiles.map_or(line.position / TILE + 1, TileSet::len));
        let mut shares: Vec<Shares> = self.lines.iter().map(|line| Shares::with_room(room(line), self.head_dim)).collect();
        let mut ledger = Ledger { observer, first: self.first, tile: None, norms: [0.0; TILE], shares: &mut shares };
        block.attend_chosen(tiles, self.kv_head, within, reads, &mut ledger);
        (block, shares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::attention::{TiledKeyValues, attend_cached};
    use crate::ops::cpu::testing::{uniform, widen};

    const HEAD_DIM: usize = 18;
    const TOKENS: usize = 5 * TILE + 7;

    fn cache() -> TiledKeyValues {
        let mut cache = TiledKeyValues::new(1, HEAD_DIM);
        let keys: Vec<f32> = uniform(1, TOKENS * HEAD_DIM).iter().map(|x| 3.0 * x).collect();
        cache.append(&keys, &uniform(2, TOKENS * HEAD_DIM));
        cache
    }

    struct Norms<'a>(&'a TiledKeyValues);

    impl Observer for Norms<'_> {
        fn squared_norms(&self, tile: usize, norms: &mut [f32; TILE]) {
            let values = self.0.values(0, tile, &mut []);
            for (norm, value) in norms.iter_mut().zip(values.chunks(padded(HEAD_DIM))) {
                *norm = value.iter().map(|x| x * x).sum();
            }
        }
    }

    fn queries(count: usize) -> Vec<f32> {
        uniform(3, count * HEAD_DIM)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn all_tiles_give_the_bits_of_a_cache() {
        let (cache, q, scale) = (cache(), queries(70), 0.3);
        let first = TOKENS - 70;
        let mut expected = vec![9.0; q.len()];
        attend_cached(1, 1, HEAD_DIM, scale, &q, first, &cache, &mut expected);
        let every = TileSet::below(6);
        for tiles in [None, Some(&every)] {
            let lines: Vec<Line<'_>> =
                q.chunks(HEAD_DIM).enumerate().map(|(row, query)| Line { query, position: first + row, tiles }).collect();
            for observer in [None, Some(&Norms(&cache) as &dyn Observer)] {
                let mut out = vec![9.0; q.len()];
                attend_lines(HEAD_DIM, scale, &lines, &cache, 0, observer, &mut out);
                assert!(bits(&out) == bits(&expected));
            }
        }
    }

    /// In f64, with an explicit mask over positions.
    fn masked(cache: &TiledKeyValues, query: &[f32], scale: f32, position: usize, tiles: &TileSet) -> Vec<f64> {
        let seen: Vec<usize> = (0..=position).filter(|position| tiles.contains(position / TILE)).collect();
        let key = |position: usize, i: usize| f64::from(cache.keys(0, position / TILE, &mut [])[i * TILE + position % TILE]);
        let value =
            |position: usize, i: usize| f64::from(cache.values(0, position / TILE, &mut [])[position % TILE * padded(HEAD_DIM) + i]);
        let score = |&t: &usize| (0..HEAD_DIM).map(|i| f64::from(query[i] * scale) * key(t, i)).sum::<f64>();
        let weights: Vec<f64> = seen.iter().map(|t| score(t).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..HEAD_DIM).map(|i| seen.iter().zip(&weights).map(|(t, w)| w / sum * value(*t, i)).sum()).collect()
    }

    #[test]
    fn chosen_tiles_are_a_mask_and_lines_are_independent() {
        let (cache, q, scale) = (cache(), queries(3), 0.3);
        let mut sets = [[0, 5].into_iter().collect(), [1, 3, 4, 5].into_iter().collect(), TileSet::below(6)];
        assert!(!sets[1].insert(3) && sets[1].iter().eq([1, 3, 4, 5]) && sets[1].len() == 4 && !sets[1].is_empty());
        let lines: Vec<Line<'_>> = q
            .chunks(HEAD_DIM)
            .zip(&sets)
            .enumerate()
            .map(|(row, (query, tiles))| Line { query, position: 5 * TILE + row, tiles: Some(tiles) })
            .collect();
        let mut together = vec![9.0; q.len()];
        attend_lines(HEAD_DIM, scale, &lines, &cache, 0, None, &mut together);
        for (line, out) in lines.iter().zip(together.chunks(HEAD_DIM)) {
            let expected = masked(&cache, line.query, scale, line.position, line.tiles.unwrap());
            assert!(out.iter().zip(&expected).all(|(out, expected)| (f64::from(*out) - expected).abs() < 1e-6));
            let mut alone = vec![9.0; HEAD_DIM];
            attend_lines(HEAD_DIM, scale, &[*line], &cache, 0, None, &mut alone);
            assert!(bits(&alone) == bits(out));
        }
    }

    #[test]
    fn shares_add_up() {
        let (cache, q, scale) = (cache(), queries(2), 0.3);
        let tiles: TileSet = [0, 1, 3, 4, 5].into_iter().collect();
        let lines = [
            Line { query: &q[..HEAD_DIM], position: TOKENS - 2, tiles: Some(&tiles) },
            Line { query: &q[HEAD_DIM..], position: TOKENS - 1, tiles: None },
        ];
        let mut out = vec![0.0; q.len()];
        let all = attend_lines(HEAD_DIM, scale, &lines, &cache, 0, Some(&Norms(&cache)), &mut out);
        assert_eq!(all.iter().map(|shares| shares.tiles.len()).collect::<Vec<_>>(), [5, 6]);
        for (shares, out) in all.iter().zip(out.chunks(HEAD_DIM)) {
            let unit = |share: &Share| f64::from(share.maximum - shares.maximum).exp() / f64::from(shares.sum);
            let mass: f64 = shares.tiles.iter().map(|share| unit(share) * f64::from(share.mass)).sum();
            assert!((mass - 1.0).abs() < 1e-6);
            let last = shares.tiles.last().unwrap();
            let norm: f64 = widen(out).iter().map(|x| x * x).sum();
            assert!((unit(last) * f64::from(last.reached) - norm).abs() < 1e-6 * norm.max(0.1));
            assert!(shares.tiles.iter().all(|share| share.squares > 0.0 && share.squares <= share.mass));
        }
    }
}
