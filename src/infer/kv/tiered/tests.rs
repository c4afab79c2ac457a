use super::*;
use crate::infer::attention::{Quest, TopK, Window};
use crate::infer::cache::Certificate;
use crate::infer::kv::{Format, store};
use crate::ops::rng::Stream;
use half::f16;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

/// Keys with means and scales of their own per channel, values, and queries of which every other looks for one key.
struct Text {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    tokens: usize,
}

impl Text {
    fn new(seed: u64, tokens: usize) -> Self {
        let mut stream = Stream::new(seed, "heads");
        let width = KV_HEADS * HEAD_DIM;
        let channels: Vec<(f64, f64)> = (0..width).map(|_| (stream.normal(), (0.5 * stream.normal()).exp())).collect();
        let keys: Vec<f32> = (0..tokens * width)
            .map(|i| {
                let (mean, scale) = channels[i % width];
                (mean + scale * stream.normal()) as f32
            })
            .collect();
        let values = (0..tokens * width).map(|_| stream.normal() as f32).collect();
        let mut queries: Vec<f32> = (0..tokens * HEADS * HEAD_DIM).map(|_| stream.normal() as f32).collect();
        for (line, query) in queries.chunks_exact_mut(HEAD_DIM).enumerate().filter(|(line, _)| line % 2 == 1) {
            let (row, kv_head) = (line / HEADS, line % HEADS * KV_HEADS / HEADS);
            let sought = stream.below(row as u64 + 1) as usize;
            let key = &keys[sought * width + kv_head * HEAD_DIM..][..HEAD_DIM];
            query.iter_mut().zip(key).enumerate().for_each(|(c, (q, k))| {
                let (mean, scale) = channels[kv_head * HEAD_DIM + c];
                *q = (2.5 * (f64::from(*k) - mean) / (scale * scale)) as f32;
            });
        }
        Self { keys, values, queries, tokens }
    }

    fn append(&self, store: &mut dyn Store, rows: Range<usize>) {
        let cut = |x: &'_ [f32], width: usize| x[rows.start * width..rows.end * width].to_vec();
        store.append(&cut(&self.keys, KV_HEADS * HEAD_DIM), &cut(&self.values, KV_HEADS * HEAD_DIM));
    }

    fn attend(&self, store: &mut dyn Store, rows: Range<usize>) -> Result<Vec<u32>> {
        let q = &self.queries[rows.start * HEADS * HEAD_DIM..rows.end * HEADS * HEAD_DIM];
        let mut out = vec![9.0; q.len()];
        store.attend(Queries { q, heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, first_position: rows.start }, &mut out)?;
        Ok(out.iter().map(|x| x.to_bits()).collect())
    }

    /// Outputs of all rows, the lengths of the calls repeating, and the counters.
    fn run(&self, options: impl Into<Options>, lengths: &[usize]) -> (Vec<u32>, Counters) {
        let mut store = fresh(options);
        let mut out = vec![];
        let mut first = 0;
        for length in lengths.iter().cycle() {
            let end = self.tokens.min(first + length);
            self.append(&mut *store, first..end);
            out.extend(self.attend(&mut *store, first..end).unwrap());
            first = end;
            if end == self.tokens {
                break;
            }
        }
        (out, store.counters())
    }
}

fn fresh(options: impl Into<Options>) -> Box<dyn Store> {
    store(&options.into(), 2, KV_HEADS, HEAD_DIM).unwrap()
}

fn floats(bits: &[u32]) -> Vec<f32> {
    bits.iter().map(|bits| f32::from_bits(*bits)).collect()
}

/// Every format that has pages.
fn paged() -> impl Iterator<Item = Format> {
    Format::all().into_iter().filter(|format| *format != Format::F32)
}

/// Every format that has pages, read densely and sparsely, without and with certificates of both kinds; all policies for two formats.
fn everything() -> Vec<Options> {
    let policies = [
        Attention::Dense,
        Attention::TopK(TopK::default()),
        Attention::Window(Window { tokens: 64, sinks: 1 }),
        Attention::Quest(Quest { pages: 2, dense_layers: 2 }),
    ];
    let mut all = vec![];
    for format in paged() {
        let usual = [Format::F16, Format::Coded("int8-int4")].contains(&format);
        for attention in policies.into_iter().take(if usual { 4 } else { 2 }) {
            let plain = Options { format, attention, ..Options::default() };
            all.push(plain);
            for certificate in Certificate::ALL {
                all.push(Options { epsilon: Some(0.2), certificate, ..plain });
            }
        }
    }
    all
}

#[test]
fn prefill_is_decode() {
    let text = Text::new(1, 6 * TILE + 9);
    for options in everything() {
        let (whole, counters) = text.run(options, &[1000]);
        for lengths in [&[1][..], &[63, 1, 1, 70, 5, 200]] {
            let (pieces, again) = text.run(options, lengths);
            assert!(pieces == whole, "{options:?} in pieces of {lengths:?}");
            assert_eq!(
                (again.head_steps(), again.pages_read, again.bytes_moved),
                (counters.head_steps(), counters.pages_read, counters.bytes_moved)
            );
            assert!((again.bound_sum - counters.bound_sum).abs() <= 1e-9 * counters.bound_sum, "{options:?}");
        }
    }
}

#[test]
fn going_back_gives_the_bits_of_a_fresh_start() {
    let (text, other) = (Text::new(2, 5 * TILE), Text::new(3, 5 * TILE));
    for options in everything() {
        for keep in [1, TILE, TILE + 1, 2 * TILE + 30, 4 * TILE] {
            let (mut store, mut expected) = (fresh(options), fresh(options));
            other.append(&mut *expected, 0..keep);
            other.append(&mut *store, 0..keep);
            text.append(&mut *store, keep..5 * TILE);
            text.attend(&mut *store, 4 * TILE..5 * TILE).unwrap();
            store.truncate(keep);
            for store in [&mut store, &mut expected] {
                other.append(&mut **store, keep..5 * TILE);
            }
            let rows = keep..5 * TILE;
            let [again, expected] = [store, expected].map(|mut store| other.attend(&mut *store, rows.clone()).unwrap());
            assert!(again == expected, "{options:?} back to {keep}");
        }
    }
}

#[test]
fn no_tolerance_gives_the_halves_themselves() {
    let text = Text::new(4, 4 * TILE + 20);
    let (expected, _) = text.run(Format::F16, &[1000]);
    for options in everything().into_iter().filter(|options| options.epsilon.is_some()) {
        let (out, counters) = text.run(Options { epsilon: Some(0.0), check: true, ..options }, &[1000]);
        assert!(out == expected, "{options:?}");
        assert_eq!((counters.error_max, counters.bound_max, counters.violations), (0.0, 0.0, 0));
        // What sees no coded page is exact as it is.
        assert_eq!(counters.hard + counters.dense, counters.head_steps());
    }
}

#[test]
fn measuring_changes_nothing() {
    let text = Text::new(5, 5 * TILE + 3);
    for options in everything().into_iter().filter(|options| options.epsilon.is_none()) {
        let (plain, none) = text.run(options, &[1000]);
        let (measured, counters) = text.run(Options { epsilon: Some(f32::INFINITY), ..options }, &[1000]);
        assert!(plain == measured, "{options:?}");
        assert_eq!((none.head_steps(), counters.hard), (0, counters.head_steps()));
        assert_eq!((counters.pages_promoted, counters.bytes_moved), (0, 0));
        // Halves that are all read keep no counts.
        assert!(none.pages_read == counters.pages_read || none == Counters::default());
    }
}

#[test]
fn no_bound_is_broken() {
    for seed in 6..8 {
        let text = Text::new(seed, 7 * TILE + 11);
        for options in everything().into_iter().filter(|options| options.epsilon.is_some()) {
            for epsilon in [0.05, 0.5, f32::INFINITY] {
                let (_, counters) = text.run(Options { epsilon: Some(epsilon), check: true, ..options }, &[200]);
                assert_eq!(counters.checked, counters.head_steps());
                assert_eq!(counters.violations, 0, "{options:?} at {epsilon}");
                assert!(counters.error_max <= counters.bound_max, "{options:?} {counters:?}");
                if options.certificate == Certificate::Hard {
                    assert!(counters.bound_max <= f64::from(epsilon), "{options:?} {counters:?}");
                }
            }
        }
    }
}

#[test]
fn recovery_moves_less_than_everything() {
    let text = Text::new(10, 16 * TILE);
    let options = Options { format: Format::Coded("int8-int4"), epsilon: Some(0.1), check: true, ..Options::default() };
    let (_, counters) = text.run(options, &[1000]);
    assert!(counters.hard > 0 && counters.recovered > 0, "{counters:?}");
    let (_, metered) = text.run(Options { certificate: Certificate::Metered, ..options }, &[1000]);
    assert!(metered.bytes_moved < counters.bytes_moved / 4 && metered.metered > 0, "{metered:?}");
    assert!(metered.error_max < 0.2 && metered.meter_exceeded * 50 < metered.checked, "{metered:?}");
}

#[test]
fn reading_every_page_is_dense() {
    let text = Text::new(11, 6 * TILE + 1);
    let every = [
        Attention::Window(Window { tokens: 10_000, sinks: 1 }),
        Attention::Quest(Quest { pages: 100, dense_layers: 0 }),
        Attention::TopK("top-k=100".parse::<Attention>().map(|_| TopK { budget: "100".parse().unwrap(), ..TopK::default() }).unwrap()),
    ];
    for format in paged() {
        let (dense, _) = text.run(format, &[1000]);
        for attention in every {
            let (out, counters) = text.run(Options { format, attention, ..Options::default() }, &[1000]);
            assert!(out == dense, "{format} {attention}");
            assert_eq!(counters.pages_read, counters.pages_seen);
        }
    }
}

/// In f64 over the halves, with an explicit mask.
fn masked(text: &Text, row: usize, head: usize, sees: impl Fn(usize) -> bool) -> Vec<f64> {
    let half = |x: f32| f16::from_f32(x).to_f64();
    let at = |token: usize| (token * KV_HEADS + head * KV_HEADS / HEADS) * HEAD_DIM;
    let query = &text.queries[(row * HEADS + head) * HEAD_DIM..][..HEAD_DIM];
    let tokens: Vec<usize> = (0..=row).filter(|token| sees(*token)).collect();
    let score = |token: &usize| {
        let products = query.iter().zip(&text.keys[at(*token)..]).map(|(q, k)| f64::from(*q) * half(*k));
        products.sum::<f64>() / (HEAD_DIM as f64).sqrt()
    };
    let scores: Vec<f64> = tokens.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let value = |c: usize| tokens.iter().zip(&scores).map(|(t, s)| (s - largest).exp() / sum * half(text.values[at(*t) + c])).sum();
    (0..HEAD_DIM).map(value).collect()
}

#[test]
fn a_window_is_a_mask() {
    let text = Text::new(12, 6 * TILE);
    let attention = Attention::Window(Window { tokens: 64, sinks: 1 });
    let (out, _) = text.run(Options { format: Format::F16, attention, ..Options::default() }, &[1000]);
    for row in [0, 63, 64, 130, 6 * TILE - 1] {
        let sees = |token: usize| token < TILE || token / TILE + 1 >= row / TILE;
        for head in 0..HEADS {
            let out = floats(&out[(row * HEADS + head) * HEAD_DIM..][..HEAD_DIM]);
            let expected = masked(&text, row, head, sees);
            assert!(out.iter().zip(&expected).all(|(out, expected)| (f64::from(*out) - expected).abs() < 1e-5), "row {row} head {head}");
        }
    }
}

#[test]
fn bounds_hold_every_score_of_a_page() {
    let text = Text::new(13, 5 * TILE);
    for format in paged() {
        let codec = if let Format::Coded(name) = format { Some(super::super::codec::codec(name, HEAD_DIM).unwrap()) } else { None };
        let mut pages = Pages::new(codec, Kept { norms: true, boxes: true, runs: true }, KV_HEADS, HEAD_DIM);
        pages.append(&text.keys, &text.values);
        for (row, kv_head, page) in [(300, 0, 0), (310, 1, 3), (319, 1, 1)] {
            let queries = &text.queries[(row * HEADS + kv_head * 2) * HEAD_DIM..][..2 * HEAD_DIM];
            let query = GroupQuery { queries, head_dim: HEAD_DIM };
            let mut bounds = [0.0; 2];
            crate::infer::attention::PageTable::score_bounds(&pages.before(4, kv_head), page, &query, &mut bounds);
            for (bound, query) in bounds.iter().zip(query.heads()) {
                let score = |token: usize| {
                    let key = &text.keys[((page * TILE + token) * KV_HEADS + kv_head) * HEAD_DIM..][..HEAD_DIM];
                    query.iter().zip(key).map(|(q, k)| q * f16::from_f32(*k).to_f32()).sum::<f32>() / (HEAD_DIM as f32).sqrt()
                };
                let largest = (0..TILE).map(score).fold(f32::MIN, f32::max);
                assert!(*bound >= largest - 1e-5 && *bound < largest + 100.0, "{format}: {bound} {largest}");
            }
        }
    }
}

#[test]
fn damaged_originals_are_noticed() {
    let text = Text::new(14, 8 * TILE);
    let options = Options { format: Format::Coded("int8-int4"), epsilon: Some(0.05), ..Options::default() };
    let mut store = TieredStore::new(&options, 0, Some(super::super::codec::codec("int8-int4", HEAD_DIM).unwrap()), KV_HEADS, HEAD_DIM);
    text.append(&mut store, 0..8 * TILE);
    text.attend(&mut store, 7 * TILE..8 * TILE).unwrap();
    store.pages.damage_originals();
    let error = text.attend(&mut store, 7 * TILE..8 * TILE).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("changed in memory"));
}

#[test]
fn contradictions_are_refused() {
    let refused = |options: Options| store(&options, 0, 1, 32).err().unwrap().to_string();
    assert!(refused(Options { epsilon: Some(-1.0), ..Format::F16.into() }).contains("epsilon"));
    assert!(refused(Options { epsilon: Some(f32::NAN), ..Format::F16.into() }).contains("epsilon"));
    assert!(refused(Options { epsilon: Some(0.1), ..Options::default() }).contains("f32"));
    assert!(refused(Options { attention: Attention::TopK(TopK::default()), ..Options::default() }).contains("f32"));
    assert!(store(&Format::Coded("int8-int4").into(), 0, 1, 7).is_err());
}
