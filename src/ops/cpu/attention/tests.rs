use super::*;
use crate::ops::cpu::testing::{assert_same_bits_everywhere, finite_differences, relative_error, uniform, weigh, widen};

const fn shape(batch: usize, tokens: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, tokens, heads, kv_heads, head_dim }
}

struct Inputs {
    shape: AttentionShape,
    scale: f32,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    starts: Option<Vec<u32>>,
}

impl Inputs {
    fn new(shape: AttentionShape) -> Inputs {
        let spread = |seed, len| uniform(seed, len).iter().map(|x| 3.0 * x).collect::<Vec<_>>();
        let (queries, keys) = (shape.num_queries(), shape.num_keys());
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        Inputs { shape, scale, q: spread(1, queries), k: spread(2, keys), v: uniform(3, keys), d_out: uniform(4, queries), starts: None }
    }

    /// With documents that start at `starts` in every row.
    fn with_documents(self, starts: &[usize]) -> Inputs {
        let start = |token: usize| starts.iter().copied().filter(|start| *start <= token).max().unwrap_or(0) as u32;
        let row = (0..self.shape.tokens).map(start);
        Inputs { starts: Some((0..self.shape.batch).flat_map(|_| row.clone()).collect()), ..self }
    }

    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let lines = self.shape.batch * self.shape.heads * self.shape.tokens;
        let (mut out, mut lse) = (vec![9.0; self.q.len()], vec![9.0; lines]);
        attention_forward(self.shape, self.scale, &self.q, &self.k, &self.v, self.starts.as_deref(), &mut out, &mut lse);
        (out, lse)
    }

    fn backward(&self, out: &[f32], lse: &[f32]) -> [Vec<f32>; 3] {
        let (mut d_q, mut d_k, mut d_v) = (vec![9.0; self.q.len()], vec![9.0; self.k.len()], vec![9.0; self.v.len()]);
        let starts = self.starts.as_deref();
        let Inputs { shape, scale, q, k, v, d_out, .. } = self;
        attention_backward(*shape, *scale, q, k, v, out, lse, starts, d_out, &mut d_q, &mut d_k, &mut d_v);
        [d_q, d_k, d_v]
    }

    /// The definition in f64: out, lse and, from the weights, the gradients.
    fn reference(&self, q: &[f64], k: &[f64], v: &[f64]) -> Reference {
        let AttentionShape { batch, tokens, heads, kv_heads, head_dim } = self.shape;
        let scale = f64::from(self.scale);
        let mut r = Reference {
            out: vec![0.0; q.len()],
            lse: Vec::new(),
            d_q: vec![0.0; q.len()],
            d_k: vec![0.0; k.len()],
            d_v: vec![0.0; v.len()],
        };
        for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..tokens).map(move |i| (b, h, i)))) {
            let at_q = ((b * tokens + i) * heads + h) * head_dim;
            let at_k = |j: usize| ((b * tokens + j) * kv_heads + h / self.shape.group()) * head_dim;
            let first = self.starts.as_ref().map_or(0, |starts| starts[b * tokens + i] as usize);
            let score = |j: usize| scale * weigh(&q[at_q..at_q + head_dim], &k[at_k(j)..][..head_dim]);
            let scores: Vec<f64> = (first..=i).map(score).collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            r.lse.push(lse);
            let d_out = widen(&self.d_out[at_q..at_q + head_dim]);
            for (j, s) in (first..=i).zip(&scores) {
                (0..head_dim).for_each(|d| r.out[at_q + d] += (s - lse).exp() * v[at_k(j) + d]);
            }
            let delta = weigh(&d_out, &r.out[at_q..at_q + head_dim]);
            for (j, s) in (first..=i).zip(&scores) {
                let p = (s - lse).exp();
                let ds = p * (weigh(&d_out, &v[at_k(j)..][..head_dim]) - delta) * scale;
                for d in 0..head_dim {
                    r.d_q[at_q + d] += ds * k[at_k(j) + d];
                    r.d_k[at_k(j) + d] += ds * q[at_q + d];
                    r.d_v[at_k(j) + d] += p * d_out[d];
                }
            }
        }
        r
    }

    fn check(&self) {
        let reference = self.reference(&widen(&self.q), &widen(&self.k), &widen(&self.v));
        let (out, lse) = self.forward();
        let shape = self.shape;
        assert!(relative_error(&out, &reference.out) < 2e-6, "{shape:?}: {}", relative_error(&out, &reference.out));
        assert!(relative_error(&lse, &reference.lse) < 1e-6, "{shape:?}");
        let gradients = self.backward(&out, &lse);
        for (name, ours, exact) in
            [("q", &gradients[0], &reference.d_q), ("k", &gradients[1], &reference.d_k), ("v", &gradients[2], &reference.d_v)]
        {
            assert!(relative_error(ours, exact) < 1e-5, "{shape:?}: d_{name} {}", relative_error(ours, exact));
        }
    }
}

struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    d_q: Vec<f64>,
    d_k: Vec<f64>,
    d_v: Vec<f64>,
}

#[test]
fn reference_gradients_are_slopes() {
    let inputs = Inputs::new(shape(2, 6, 4, 2, 2)).with_documents(&[2]);
    let (q, k, v) = (widen(&inputs.q), widen(&inputs.k), widen(&inputs.v));
    let d_out = widen(&inputs.d_out);
    let exact = inputs.reference(&q, &k, &v);
    let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
    let by_q = finite_differences(&q, |q| weigh(&inputs.reference(q, &k, &v).out, &d_out));
    let by_k = finite_differences(&k, |k| weigh(&inputs.reference(&q, k, &v).out, &d_out));
    let by_v = finite_differences(&v, |v| weigh(&inputs.reference(&q, &k, v).out, &d_out));
    for (gradient, slope) in [(exact.d_q, by_q), (exact.d_k, by_k), (exact.d_v, by_v)] {
        assert!(relative_error(&narrow(&gradient), &slope) < 1e-6);
    }
}

#[test]
fn forward_and_backward_match_the_reference() {
    for shape in [
        shape(2, 5, 2, 1, 6),
        shape(1, 64, 1, 1, 8),
        shape(1, 65, 4, 2, 32),
        shape(2, 130, 3, 3, 18),
        shape(1, 200, 2, 1, 64),
        shape(1, 70, 1, 1, 128),
    ] {
        Inputs::new(shape).check();
    }
}

#[test]
fn a_lone_token_sees_itself() {
    let inputs = Inputs::new(shape(1, 1, 2, 1, 2));
    let (out, lse) = inputs.forward();
    assert_eq!(out, [inputs.v.clone(), inputs.v.clone()].concat());
    let [d_q, d_k, d_v] = inputs.backward(&out, &lse);
    assert!(d_q.iter().chain(&d_k).all(|gradient| gradient.abs() < 1e-6));
    assert!(relative_error(&d_v, &[inputs.d_out[0] + inputs.d_out[2], inputs.d_out[1] + inputs.d_out[3]].map(f64::from)) < 1e-6);
}

#[test]
fn document_masks_match_the_reference() {
    for starts in [&[1, 2, 3][..], &[64, 128], &[63, 65, 140], &[100, 101, 199]] {
        Inputs::new(shape(2, 200, 2, 1, 14)).with_documents(starts).check();
    }
}

#[test]
fn masked_documents_equal_documents_alone() {
    let packed = Inputs::new(shape(1, 150, 2, 1, 16)).with_documents(&[37, 101]);
    let (out, lse) = packed.forward();
    let gradients = packed.backward(&out, &lse);
    for (first, end) in [(0, 37), (37, 101), (101, 150)] {
        let cut = |x: &[f32], width: usize| x[first * width..end * width].to_vec();
        let alone = Inputs {
            shape: AttentionShape { tokens: end - first, ..packed.shape },
            scale: packed.scale,
            q: cut(&packed.q, 32),
            k: cut(&packed.k, 16),
            v: cut(&packed.v, 16),
            d_out: cut(&packed.d_out, 32),
            starts: None,
        };
        let (out_alone, lse_alone) = alone.forward();
        let [d_q, d_k, d_v] = alone.backward(&out_alone, &lse_alone);
        let pairs = [(&out, out_alone, 32), (&gradients[0], d_q, 32), (&gradients[1], d_k, 16), (&gradients[2], d_v, 16)];
        for (together, alone, width) in pairs {
            assert!(relative_error(&cut(together, width), &widen(&alone)) < 1e-6);
        }
    }
}

#[test]
fn what_is_not_seen_contributes_nothing() {
    let clean = Inputs::new(shape(1, 100, 1, 1, 8)).with_documents(&[50]);
    let mut spoiled = Inputs::new(clean.shape).with_documents(&[50]);
    spoiled.k[..50 * 8].fill(1e30);
    spoiled.v[..50 * 8].fill(-1e30);
    assert!(clean.forward().0[50 * 8..] == spoiled.forward().0[50 * 8..]);
}

#[test]
fn not_a_number_is_not_hidden() {
    let mut inputs = Inputs::new(shape(1, 70, 1, 1, 8));
    inputs.q[66 * 8] = f32::NAN;
    let (out, lse) = inputs.forward();
    assert!(out[66 * 8..67 * 8].iter().all(|x| x.is_nan()) && lse[66].is_nan());
    assert!(out[..66 * 8].iter().all(|x| x.is_finite()));
}

#[test]
fn same_bits_everywhere() {
    let inputs = [
        Inputs::new(shape(2, 131, 4, 2, 18)),
        Inputs::new(shape(1, 70, 3, 3, 64)).with_documents(&[9, 66]),
        Inputs::new(shape(3, 64, 2, 1, 8)),
    ];
    for inputs in inputs {
        assert_same_bits_everywhere(|| {
            let (out, lse) = inputs.forward();
            let [d_q, d_k, d_v] = inputs.backward(&out, &lse);
            [out, lse, d_q, d_k, d_v].concat()
        });
    }
}

/// Feeds the sequence to a cache in pieces, the lengths repeating, and returns what each query got.
fn cached(inputs: &Inputs, lengths: &[usize]) -> Vec<f32> {
    let AttentionShape { tokens, heads, kv_heads, head_dim, .. } = inputs.shape;
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut cache = TiledKeyValues::new(kv_heads, head_dim);
    let mut out = vec![9.0; inputs.q.len()];
    for length in lengths.iter().cycle() {
        let first = cache.num_positions();
        let end = tokens.min(first + length);
        cache.append(&inputs.k[first * kv_width..end * kv_width], &inputs.v[first * kv_width..end * kv_width]);
        let (q, out) = (&inputs.q[first * width..end * width], &mut out[first * width..end * width]);
        attend_cached(heads, kv_heads, head_dim, inputs.scale, q, first, &cache, out);
        if end == tokens {
            break;
        }
    }
    out
}

#[test]
fn a_cache_gives_the_bits_of_training() {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for shape in [shape(1, 150, 4, 2, 8), shape(1, 135, 3, 1, 34), shape(1, 200, 2, 2, 64)] {
        let mut inputs = Inputs::new(shape);
        // Signed zeros and vanishing weights, where adding terms of weight 0 could show.
        inputs.v.iter_mut().step_by(3).for_each(|v| *v = -0.0);
        inputs.v.iter_mut().skip(1).step_by(3).for_each(|v| *v *= -1e-38);
        inputs.q.iter_mut().step_by(2).for_each(|q| *q *= 10.0);
        let expected = bits(&inputs.forward().0);
        for lengths in [&[1][..], &[1000], &[7, 1, 64], &[100, 3]] {
            for (isa, seen) in crate::ops::cpu::isa::testing::on_every_isa(|| bits(&cached(&inputs, lengths))) {
                assert!(seen == expected, "{shape:?} in pieces of {lengths:?} on {isa}");
            }
        }
    }
}

/// A source that decodes every tile into the scratch it is given.
struct Decoding<'a>(&'a TiledKeyValues);

impl KeyValueTiles for Decoding<'_> {
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        scratch.copy_from_slice(self.0.keys(kv_head, tile, &mut []));
        scratch
    }

    fn values<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        scratch.copy_from_slice(self.0.values(kv_head, tile, &mut []));
        scratch
    }
}

#[test]
fn tiles_may_be_decoded_on_the_way() {
    let inputs = Inputs::new(shape(1, 150, 4, 2, 18));
    let mut cache = TiledKeyValues::new(2, 18);
    cache.append(&inputs.k, &inputs.v);
    let mut out = vec![9.0; inputs.q.len()];
    attend_cached(4, 2, 18, inputs.scale, &inputs.q, 0, &Decoding(&cache), &mut out);
    assert_eq!(out, inputs.forward().0);
}

#[test]
fn truncated_caches_forget() {
    let inputs = Inputs::new(shape(1, 80, 2, 1, 8));
    let mut cache = TiledKeyValues::new(1, 8);
    cache.append(&inputs.k, &inputs.v);
    cache.truncate(70);
    assert_eq!(cache.num_positions(), 70);
    cache.append(&inputs.k[70 * 8..71 * 8], &inputs.v[70 * 8..71 * 8]);
    let mut out = vec![9.0; 16];
    attend_cached(2, 1, 8, inputs.scale, &inputs.q[70 * 16..71 * 16], 70, &cache, &mut out);
    assert_eq!(out, inputs.forward().0[70 * 16..71 * 16]);
}

#[test]
fn threads_share_a_long_text_without_a_trace() {
    let (heads, head_dim, tokens) = (4, 16, 2 * SEGMENT * TILE + 100);
    let (q, scale) = (uniform(7, 70 * heads * head_dim), 0.9);
    let mut cache = TiledKeyValues::new(1, head_dim);
    let (keys, values) = (uniform(8, tokens * head_dim), uniform(9, tokens * head_dim));
    cache.append(&keys, &values);
    let first = tokens - 70;
    let mut together = vec![0.0; q.len()];
    attend_cached(heads, 1, head_dim, scale, &q, first, &cache, &mut together);
    let width = heads * head_dim;
    for row in [0, 35, 69] {
        let (query, expected) = (&q[row * width..][..width], &together[row * width..][..width]);
        for threads in [1, 3] {
            let mut alone = vec![9.0; width];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| attend_cached(heads, 1, head_dim, scale, query, first + row, &cache, &mut alone));
            assert_eq!(alone, expected, "row {row} on {threads} threads");
        }
        let lines: Vec<Line<'_>> = query.chunks(head_dim).map(|query| Line { query, position: first + row, tiles: None }).collect();
        let mut chosen = vec![9.0; width];
        attend_lines(head_dim, scale, &lines, &cache, 0, None, &mut chosen);
        assert_eq!(chosen, expected);
    }
    // In f64, for the last row's first head.
    let query = &q[69 * width..][..head_dim];
    let dot = |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(q * scale) * f64::from(*k)).sum::<f64>();
    let weights: Vec<f64> = keys.chunks(head_dim).map(|key| dot(key).exp()).collect();
    let sum: f64 = weights.iter().sum();
    for (channel, out) in together[69 * width..][..head_dim].iter().enumerate() {
        let exact: f64 = weights.iter().zip(values.chunks(head_dim)).map(|(w, value)| w * f64::from(value[channel])).sum::<f64>() / sum;
        assert!((f64::from(*out) - exact).abs() < 1e-6, "{out} {exact}");
    }
}
