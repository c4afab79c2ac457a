//! What every codec must do, whatever it does to the numbers.

use super::*;
use crate::ops::cpu::attention::{key_tile_len, padded, value_tile_len};
use crate::ops::cpu::isa::testing::on_every_isa;
use crate::ops::rng::Stream;

const WIDTHS: [usize; 6] = [8, 10, 24, 64, 80, 128];

/// Keys or values of a page, `[64, width]`, of the kinds that hurt.
fn pages(width: usize) -> Vec<(&'static str, Vec<f16>)> {
    let mut stream = Stream::new(11, "codec pages");
    let mut normal: Vec<f64> = (0..TILE * width).map(|_| stream.normal()).collect();
    let page = |f: &dyn Fn(usize, usize, f64) -> f64| -> Vec<f16> {
        normal.iter().enumerate().map(|(i, x)| f16::from_f64(f(i / width, i % width, *x).clamp(-65504.0, 65504.0))).collect()
    };
    let made = vec![
        ("normal", page(&|_, _, x| x)),
        ("zero", page(&|_, _, _| 0.0)),
        ("constant", page(&|_, _, _| 0.1)),
        ("constant channels", page(&|_, c, _| 0.3 * c as f64 - 7.0)),
        ("one outlier channel", page(&|_, c, x| if c == 3 { 400.0 + x } else { x })),
        ("one large token", page(&|t, _, x| if t == 17 { 100.0 * x } else { x })),
        ("one token alone", page(&|t, _, x| if t == 0 { x } else { 0.0 })),
        ("one-hot", page(&|t, c, _| if t % width == c { 1.0 } else { 0.0 })),
        ("subnormal", page(&|_, _, x| x * 1e-7)),
        ("narrow about a large mean", page(&|_, _, x| 1000.0 + 0.3 * x)),
        ("largest", page(&|t, c, _| if (t + c) % 2 == 0 { 1e9 } else { -1e9 })),
        ("heavy tails", page(&|_, _, x| x.powi(5))),
    ];
    normal.clear();
    made
}

struct Decoded {
    page: Vec<u8>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn decode(codec: &dyn Codec, keys: &[f16], values: &[f16]) -> Decoded {
    let width = codec.head_dim();
    let mut page = vec![0x5A; codec.page_bytes()];
    codec.encode(keys, values, &mut page);
    let (mut key_tile, mut value_tile) = (vec![f32::NAN; key_tile_len(width)], vec![f32::NAN; value_tile_len(width)]);
    codec.decode_keys(&page, &mut key_tile);
    codec.decode_values(&page, &mut value_tile);
    Decoded { page, keys: key_tile, values: value_tile }
}

fn for_each_case(mut check: impl FnMut(&dyn Codec, &str, &[f16])) {
    for name in NAMES {
        for width in WIDTHS {
            let codec = codec(name, width).unwrap();
            assert_eq!((codec.name(), codec.head_dim(), codec.page_bytes() % 16), (name, width, 0));
            for (kind, page) in pages(width) {
                check(&*codec, &format!("{name}, width {width}, {kind}"), &page);
            }
        }
    }
}

#[test]
fn bounds_hold() {
    let mut stream = Stream::new(2, "codec queries");
    for_each_case(|codec, case, originals| {
        let width = codec.head_dim();
        let decoded = decode(codec, originals, originals);
        let difference = |token: usize, channel: usize| -> f64 {
            originals[token * width + channel].to_f64() - f64::from(decoded.keys[channel * TILE + token])
        };
        // Random queries, and for some tokens the query along its own error, by direction and by sign alone.
        let mut queries: Vec<Vec<f32>> = (0..8).map(|_| (0..width).map(|_| stream.normal() as f32).collect()).collect();
        for token in [0, 17, 63] {
            queries.push((0..width).map(|channel| difference(token, channel) as f32).collect());
            queries.push((0..width).map(|channel| difference(token, channel).signum() as f32).collect());
        }
        queries.push((0..width).map(|channel| f32::from(u8::from(channel == 3))).collect());
        for factor in [1e-42, 1e-25, 1e12] {
            queries.push(queries[0].iter().map(|x| x * factor).collect());
        }
        for query in &queries {
            let score = |token: usize| (0..width).map(|c| f64::from(query[c]) * difference(token, c)).sum::<f64>().abs();
            let worst = (0..TILE).map(score).fold(0.0, f64::max) / (width as f64).sqrt();
            let bound = codec.score_error(&decoded.page, query);
            assert!(bound >= 0.0 && worst <= f64::from(bound), "{case}: {worst} > {bound}");
        }
        let mut norms = vec![0.0; TILE];
        codec.value_norms(&decoded.page, &mut norms);
        for (token, (row, norm)) in decoded.values.chunks(padded(width)).zip(norms).enumerate() {
            let original = originals[token * width..].iter();
            let error = row[..width].iter().zip(original).map(|(x, y)| (f64::from(*x) - y.to_f64()).powi(2)).sum::<f64>().sqrt();
            assert!(error <= f64::from(codec.value_error(&decoded.page)), "{case}: value error {error}");
            let true_norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!(true_norm <= f64::from(norm), "{case}: norm {true_norm} > {norm}");
            assert!(f64::from(norm) <= true_norm * 1.001 + 1e-7 || norm == f32::INFINITY, "{case}: norm {true_norm} << {norm}");
            assert!(row[width..].iter().all(|x| *x == 0.0), "{case}: padding");
        }
    });
}

/// Half a step per element, with the rounding of the result to f32; the interval form of the bound is no looser than that.
#[test]
fn eight_bit_keys_are_off_by_half_a_step_at_most() {
    for width in WIDTHS {
        let codec = Int8Int4::new(width);
        for (kind, originals) in pages(width) {
            let decoded = decode(&codec, &originals, &originals);
            let scales = &decoded.page[codec.layout().key_scales.clone()];
            for (i, x) in originals.iter().enumerate() {
                let stored = f64::from(decoded.keys[i % width * TILE + i / width]);
                let scale = f64::from(super::half::read(scales, i % width));
                let bound = scale / 2.0 * (1.0 + 2f64.powi(-10)) + stored.abs() * 2f64.powi(-24);
                assert!((x.to_f64() - stored).abs() <= bound, "width {width}, {kind}: {x} {stored} {scale}");
                assert!(!kind.starts_with("constant") || x.to_f64() == stored, "width {width}, {kind}");
            }
        }
        let (_, originals) = pages(width).swap_remove(0);
        let page = decode(&codec, &originals, &originals).page;
        let steps: f32 = (0..width).map(|channel| super::half::read(&page[codec.layout().key_scales.clone()], channel)).sum();
        assert!(codec.score_error(&page, &vec![1.0; width]) <= steps / 2.0 / (width as f32).sqrt() * 1.001);
    }
}

#[test]
fn boxes_hold_the_originals() {
    for_each_case(|codec, case, originals| {
        let width = codec.head_dim();
        let page = decode(codec, originals, originals).page;
        let (mut low, mut high) = (vec![f32::NAN; width], vec![f32::NAN; width]);
        if codec.key_box(&page, &mut low, &mut high) {
            let inside = |(i, x): (usize, &f16)| (low[i % width]..=high[i % width]).contains(&x.to_f32());
            assert!(originals.iter().enumerate().all(inside), "{case}");
        }
    });
}

#[test]
fn numbers_that_are_not_finite_give_finite_tiles_and_no_certificate() {
    for name in NAMES {
        let codec = codec(name, 24).unwrap();
        let (_, healthy) = pages(24).swap_remove(0);
        for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            let mut sick = healthy.clone();
            sick[100] = bad;
            let keys = decode(&*codec, &sick, &healthy);
            assert!(keys.keys.iter().chain(&keys.values).all(|x| x.is_finite()), "{name}");
            assert_eq!(codec.score_error(&keys.page, &[1.0; 24]), f32::INFINITY, "{name}");
            assert_eq!(codec.score_error(&keys.page, &[0.0; 24]), f32::INFINITY, "{name}");
            assert!(codec.value_error(&keys.page).is_finite(), "{name}");
            let values = decode(&*codec, &healthy, &sick);
            assert!(values.keys.iter().chain(&values.values).all(|x| x.is_finite()), "{name}");
            assert_eq!(codec.value_error(&values.page), f32::INFINITY, "{name}");
        }
    }
}

/// Any bits at all: tiles are finite, and bounds are numbers.
#[test]
fn random_bits_are_stored_as_something_finite() {
    let mut stream = Stream::new(13, "codec bits");
    for name in NAMES {
        for width in [8, 10, 64] {
            let codec = codec(name, width).unwrap();
            for finite in [false, true] {
                let mut half = || loop {
                    let x = f16::from_bits(stream.bits() as u16);
                    if x.is_finite() || !finite {
                        return x;
                    }
                };
                let [keys, values] = [(); 2].map(|()| (0..TILE * width).map(|_| half()).collect::<Vec<_>>());
                let decoded = decode(&*codec, &keys, &values);
                assert!(decoded.keys.iter().chain(&decoded.values).all(|x| x.is_finite()), "{name}, width {width}");
                let bounds = [codec.score_error(&decoded.page, &vec![1.0; width]), codec.value_error(&decoded.page)];
                assert!(bounds.iter().all(|bound| bound.is_finite() == finite && *bound > 0.0), "{name}, width {width}: {bounds:?}");
            }
        }
    }
}

#[test]
fn meters_are_calibrated() {
    let mut stream = Stream::new(3, "codec meter");
    for name in NAMES {
        let width = 64;
        let codec = codec(name, width).unwrap();
        let (mut truth, mut meter) = (0.0, 0.0);
        for _ in 0..20 {
            let keys: Vec<f16> = (0..TILE * width).map(|_| f16::from_f64(stream.normal())).collect();
            let query: Vec<f32> = (0..width).map(|_| stream.normal() as f32).collect();
            let decoded = decode(&*codec, &keys, &keys);
            for token in 0..TILE {
                let error = |c: usize| f64::from(query[c]) * (keys[token * width + c].to_f64() - f64::from(decoded.keys[c * TILE + token]));
                truth += ((0..width).map(error).sum::<f64>()).powi(2) / (width * TILE) as f64;
            }
            meter += f64::from(codec.mean_squares(&decoded.page, &query).0);
        }
        let ratio = truth / meter;
        assert!((0.8..1.25).contains(&ratio), "{name}: true over metered variance {ratio}");
    }
}

#[test]
fn tiles_do_not_depend_on_the_instruction_set() {
    for name in NAMES {
        for width in [24, 64] {
            let codec = codec(name, width).unwrap();
            let (_, page) = pages(width).swap_remove(11);
            let runs = on_every_isa(|| {
                let decoded = decode(&*codec, &page, &page);
                let bits: Vec<u32> = decoded.keys.iter().chain(&decoded.values).map(|x| x.to_bits()).collect();
                (bits, decoded.page)
            });
            for (isa, run) in &runs {
                assert!(*run == runs[0].1, "{name}, width {width}, {isa}");
            }
        }
    }
}

#[test]
fn refuses_unknown_names_and_odd_widths() {
    let message = |name, width| codec(name, width).err().unwrap().to_string();
    assert!(message("int3", 64).contains("int3"));
    for width in [0, 4, 9, 2048] {
        assert!(message("int8-int4", width).contains(&width.to_string()));
    }
}
