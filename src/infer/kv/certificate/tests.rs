use super::heads::{Head, Shape, attend, distance, norm, quantize};
use super::*;
use crate::ops::rng::Stream;

const SMALL: Shape = Shape { tokens: 64, page: 8, width: 8, group: 8, key_bits: 4, value_bits: 4, dither: false, spread: 1.5 };
/// As deployed, but for pages of 16 and 256 tokens.
const WIDE: Shape = Shape { tokens: 256, page: 16, width: 64, group: 32, key_bits: 8, value_bits: 4, ..SMALL };

fn heads(shape: Shape, seed: u64, count: usize) -> impl Iterator<Item = Head> {
    let mut stream = Stream::new(seed, "certificates");
    (0..count).map(move |_| Head::new(shape, &mut stream))
}

#[test]
fn the_tail_bound_meets_its_ends() {
    for step in 0..60 {
        let delta = f64::from(step) * 0.05;
        assert!((tail_total_variation(1.0, delta) - total_variation(delta)).abs() < 1e-12);
        assert_eq!(tail_total_variation(0.0, delta), 0.0);
        for tail in (1..20).map(|i| f64::from(i) / 20.0) {
            assert!(tail_total_variation(tail, delta) <= tail_total_variation(tail, delta + 0.05));
            // The set of all else being exact, more of it disturbed can do more, up to the peak.
            assert!(tail_total_variation(tail, delta) <= total_variation(delta) * 1.2 + 1e-12);
        }
    }
    assert_eq!(tail_total_variation(0.5, 0.0), 0.0);
}

/// The largest gain over which part of the tail goes up and whether the head joins, by search.
fn searched(tail: f64, delta: f64) -> f64 {
    let x = delta.exp();
    let gain = |up: f64| {
        let whole = 1.0 - tail + up * x + (tail - up) / x;
        let without = up * x / whole - up;
        let with_head = (up * x + 1.0 - tail) / whole - up - (1.0 - tail);
        without.max(with_head)
    };
    (0..=20_000).map(|i| gain(tail * f64::from(i) / 20_000.0)).fold(0.0, f64::max)
}

#[test]
fn the_tail_bound_is_attained() {
    for tail in [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0] {
        for delta in [0.01, 0.2, 0.7, 1.5, 3.0] {
            let (bound, found) = (tail_total_variation(tail, delta), searched(tail, delta));
            assert!(bound >= found - 1e-12 && bound < found + 1e-6, "{tail} {delta}: {bound} {found}");
        }
    }
}

#[test]
fn the_identity_holds() {
    for head in heads(SMALL, 1, 50) {
        let (logits, stored) = (head.logits(&head.keys), head.logits(&head.stored_keys));
        let (exact, used) = (attend(&logits, &head.values), attend(&stored, &head.values));
        let weight = |token: usize| (logits[token] - stored[token]).exp();
        let whole: f64 = used.weights.iter().enumerate().map(|(token, u)| u * weight(token)).sum();
        let difference = |c: usize| {
            let terms = used.weights.iter().enumerate();
            terms.map(|(t, u)| u * (weight(t) - 1.0) * (head.values[t][c] - used.vector[c])).sum::<f64>() / whole
        };
        let identity: Vec<f64> = (0..SMALL.width).map(difference).collect();
        let actual: Vec<f64> = exact.vector.iter().zip(&used.vector).map(|(a, b)| a - b).collect();
        assert!(distance(&identity, &actual) < 1e-10);
    }
}

#[test]
fn totals_are_the_sums_over_pages_and_swings_are_rounded_up() {
    let mut stream = Stream::new(5, "totals");
    for x in (0..4000).map(|_| stream.uniform() * 0.6).chain([0.0, 1e-300, 1e-9, 0.25, 3.0, f64::INFINITY]) {
        let (exact, swing) = (x.exp_m1(), PagePart { score_error: x, ..PagePart::default() }.swing());
        // The library's own last bit is not certain.
        assert!(swing >= exact * (1.0 - 3e-16) && swing <= exact * (1.0 + 1e-12), "{x}: {exact} {swing}");
    }
    let part = |_| PagePart {
        mass: stream.uniform(),
        score_error: stream.uniform(),
        value_error: stream.uniform(),
        dispersion: stream.uniform(),
        radius: 1.0,
    };
    let parts: Vec<PagePart> = (0..9).map(part).collect();
    let mut totals = Totals::default();
    parts.iter().for_each(|part| totals.add(part, part.swing()));
    assert!((totals.least_mass() / least_mass(&parts) - 1.0).abs() < 1e-9);
    assert!((totals.error() / total_error(&parts) - 1.0).abs() < 1e-9);
}

#[test]
fn promoting_lowers_the_bound_to_nothing() {
    let mut stream = Stream::new(2, "parts");
    for _ in 0..200 {
        let mut parts: Vec<PagePart> = (0..8)
            .map(|_| PagePart {
                mass: stream.uniform(),
                score_error: stream.uniform(),
                value_error: stream.uniform(),
                dispersion: 0.0,
                radius: 0.5 + stream.uniform(),
            })
            .collect();
        // Fixed radii about a fixed centre.
        parts.iter_mut().for_each(|part| part.dispersion = part.mass * part.radius * part.radius);
        let mut before = total_error(&parts);
        assert!((share(&parts) - before).abs() < 1e-12 * before);
        for page in 0..8 {
            parts[page].score_error = 0.0;
            assert!(total_error(&parts) <= before);
            parts[page].value_error = 0.0;
            assert!(total_error(&parts) <= before);
            before = total_error(&parts);
        }
        assert_eq!(before, 0.0);
    }
}

fn share(parts: &[PagePart]) -> f64 {
    let least = least_mass(parts);
    parts.iter().map(|part| share_of_keys(part, least) + share_of_values(part, least)).sum()
}

#[test]
fn what_is_common_to_all_tokens_cancels() {
    for head in heads(SMALL, 3, 20) {
        let used = attend(&head.logits(&head.stored_keys), &head.values);
        let parts = head.parts(&used, &head.values);
        let moved: Vec<Vec<f64>> = head.values.iter().map(|value| value.iter().map(|x| x + 100.0).collect()).collect();
        let used_moved = attend(&head.logits(&head.stored_keys), &moved);
        let parts_moved = head.parts(&used_moved, &moved);
        assert!((used_moved.vector[0] - used.vector[0] - 100.0).abs() < 1e-9);
        assert!((centred_error(&parts) - centred_error(&parts_moved)).abs() < 1e-8);
        assert!((dispersed_error(&parts) - dispersed_error(&parts_moved)).abs() < 1e-8);
        let shifted: Vec<Vec<f64>> = head.keys.iter().map(|key| key.iter().map(|x| x + 1.0).collect()).collect();
        let (a, b) = (attend(&head.logits(&head.keys), &head.values), attend(&head.logits(&shifted), &head.values));
        assert!(distance(&a.weights, &b.weights) < 1e-12);
    }
}

#[test]
fn forms_are_ordered() {
    for head in heads(SMALL, 4, 50) {
        let used = attend(&head.logits(&head.stored_keys), &head.values);
        let parts = head.parts(&used, &head.values);
        let without: Vec<PagePart> = parts.iter().map(|part| PagePart { value_error: 0.0, ..*part }).collect();
        assert!(dispersed_error(&parts) <= centred_error(&parts) * (1.0 + 1e-12));
        assert!((total_error(&without) - dispersed_error(&parts)).abs() < 1e-12);
        for page in 0..head.pages() {
            let [interval, ..] = head.score_errors(page);
            assert!(head.score_errors(page).iter().all(|bound| head.worst_score_error(page) <= bound + 1e-12));
            assert!(interval > 0.0);
        }
        // For one token A3 is at most A2.
        let error: Vec<f64> = head.keys[5].iter().zip(&head.stored_keys[5]).map(|(k, s)| k - s).collect();
        let radii: Vec<f64> = error.chunks(2).map(norm).collect();
        assert!(grouped_score_error(&head.query, &radii) <= radius_score_error(&head.query, norm(&error)) + 1e-12);
    }
}

#[test]
fn unread_pages_are_charged_their_worst() {
    let mut stream = Stream::new(5, "unread");
    assert_eq!(unread_error(1.0, &[]), 0.0);
    assert_eq!(unread_error(1.0, &[Unread { mass: 0.0, radius: 9.0 }]), 0.0);
    assert_eq!(unread_error(1.0, &[Unread { mass: f64::INFINITY, radius: 9.0 }]), f64::INFINITY);
    for _ in 0..200 {
        let read = stream.uniform() + 0.01;
        let pages: Vec<Unread> = (0..6).map(|_| Unread { mass: 2.0 * stream.uniform().powi(3), radius: stream.uniform() }).collect();
        let bound = unread_error(read, &pages);
        // The largest value over all corners.
        let corner = |set: u32| {
            let taken = || pages.iter().enumerate().filter(|(page, _)| set >> page & 1 == 1).map(|(_, page)| page);
            taken().map(|page| page.mass * page.radius).sum::<f64>() / (read + taken().map(|page| page.mass).sum::<f64>())
        };
        let searched = (0..64).map(corner).fold(0.0, f64::max);
        assert!((bound - searched).abs() < 1e-12);
        let (mass, radius) = pages.iter().fold((0.0, 0.0), |(mass, radius), page| (mass + page.mass, f64::max(radius, page.radius)));
        assert!(bound <= mass / (read + mass) * radius + 1e-12);
    }
}

#[test]
fn boxes_and_balls_hold_the_largest_logit() {
    for head in heads(SMALL, 6, 50) {
        for page in 0..head.pages() {
            let keys = &head.keys[head.tokens(page)];
            let largest = head.logits(keys).into_iter().fold(f64::MIN, f64::max);
            let [low, high] = corners(keys);
            let centre: Vec<f64> = low.iter().zip(&high).map(|(low, high)| (low + high) / 2.0).collect();
            let radius = keys.iter().map(|key| distance(key, &centre)).fold(0.0, f64::max);
            assert!(box_score(&head.query, &low, &high) >= largest - 1e-12);
            assert!(ball_score(&head.query, &centre, radius) >= largest - 1e-12);
        }
    }
}

/// Least and largest per channel.
pub(super) fn corners(keys: &[Vec<f64>]) -> [Vec<f64>; 2] {
    let channel = |pick: fn(f64, f64) -> f64| -> Vec<f64> {
        (0..keys[0].len()).map(|c| keys.iter().map(|key| key[c]).reduce(pick).unwrap_or_default()).collect()
    };
    [channel(f64::min), channel(f64::max)]
}

#[test]
fn rounding_in_f32_is_covered() {
    let mut stream = Stream::new(7, "rounding");
    for width in [1, 8, 128, 1000] {
        for _ in 0..200 {
            let mut floats = || -> Vec<f32> { (0..width).map(|_| (stream.normal() * 10f64.powf(stream.normal())) as f32).collect() };
            let (q, k) = (floats(), floats());
            let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
            let exact: f64 = wide(&q).iter().zip(wide(&k)).map(|(q, k)| q * k).sum::<f64>() / f64::from(width).sqrt();
            let scale = 1.0 / (width as f32).sqrt();
            let fused = q.iter().zip(&k).fold(0f32, |sum, (q, k)| (q * scale).mul_add(*k, sum));
            let bound = rounding(norm(&wide(&q)), norm(&wide(&k)), width as usize);
            assert!((f64::from(fused) - exact).abs() <= bound, "{width}");
        }
    }
}

#[test]
fn the_meter_is_calibrated() {
    let mut ratios: Vec<f64> = heads(WIDE, 8, 200)
        .map(|head| {
            let exact = attend(&head.logits(&head.keys), &head.values);
            let used = attend(&head.logits(&head.stored_keys), &head.stored_values);
            distance(&exact.vector, &used.vector) / expected_square(&head.squares(&used)).sqrt()
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    assert!((0.8..1.2).contains(&ratios[100]), "{}", ratios[100]);
    assert!(ratios[199] < 2.0);
}

#[test]
fn dithered_errors_are_uniform_and_reproducible() {
    let dithered = |seed: u64| {
        let mut stream = Stream::new(seed, "dither");
        let numbers: Vec<f64> = (0..20_000).map(|_| stream.normal()).collect();
        let mut stored = numbers.clone();
        let step = quantize(&mut stored, 4, Some(&mut stream));
        let errors: Vec<f64> = stored.iter().zip(&numbers).map(|(stored, x)| (stored - x) / step).collect();
        (numbers, errors)
    };
    let (numbers, errors) = dithered(1);
    assert_eq!(errors, dithered(1).1);
    let mut sorted = errors.clone();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let gap = |(i, error): (usize, &f64)| ((i as f64 + 0.5) / count - (error + 0.5)).abs();
    let largest = sorted.iter().enumerate().map(gap).fold(0.0, f64::max);
    // Kolmogorov and Smirnov at 0.1%: 1.95 / sqrt n.
    assert!(largest < 1.95 / count.sqrt() && sorted[0] >= -0.5 - 1e-9 && sorted[sorted.len() - 1] <= 0.5 + 1e-9, "{largest}");
    let correlation = numbers.iter().zip(&errors).map(|(x, error)| x * error).sum::<f64>() / count * 12f64.sqrt();
    assert!(correlation.abs() < 4.0 / count.sqrt(), "{correlation}");
}

/// Whether values' and keys' errors are within J, and how far below: bound over true.
pub(super) fn dithered(head: &Head, p: f64) -> [f64; 2] {
    let exact = attend(&head.logits(&head.keys), &head.values);
    let used = attend(&head.logits(&head.stored_keys), &head.values);
    let stored = attend(&head.logits(&head.stored_keys), &head.stored_values);
    let proxy = |c: usize| {
        let terms = stored.weights.iter().zip(&head.value_steps);
        terms.map(|(u, steps)| (u * steps[c / head.shape.group]).powi(2)).sum::<f64>() / 12.0
    };
    let proxies: Vec<f64> = (0..head.shape.width).map(proxy).collect();
    let values = dithered_value_error(&proxies, p) / distance(&stored.vector, &used.vector);
    let (mut trace, mut rest, mut least) = (0.0, 0.0, 0.0);
    for page in 0..head.pages() {
        let steps = &head.key_steps[page];
        let delta = dithered_score_error(&head.query, steps, head.keys.len(), p / 2.0);
        let (mut mass, mut dispersion) = (0.0, 0.0);
        for token in head.tokens(page) {
            let (weight, square) = (exact.weights[token], distance(&head.values[token], &exact.vector).powi(2));
            trace += weight * weight * uniform_score_variance(&head.query, steps) * square;
            mass += weight;
            dispersion += weight * square;
        }
        rest += (delta.exp_m1() - delta) * f64::sqrt(mass * dispersion);
        least += mass * (-delta).exp();
    }
    [values, dithered_key_error(trace, rest, least, p / 2.0) / distance(&exact.vector, &used.vector)]
}

#[test]
fn dithered_bounds_fail_as_rarely_as_they_say() {
    let shape = Shape { dither: true, width: 64, tokens: 128, ..WIDE };
    let (mut missed, mut ratios) = ([0, 0], vec![]);
    for head in heads(shape, 9, 500) {
        let [values, keys] = dithered(&head, 1e-2);
        missed[0] += usize::from(values < 1.0);
        missed[1] += usize::from(keys < 1.0);
        ratios.push(values);
    }
    ratios.sort_by(f64::total_cmp);
    assert!(missed[0] <= 10 && missed[1] <= 10, "{missed:?}");
    assert!(ratios[250] < 1.6, "{}", ratios[250]);
}
