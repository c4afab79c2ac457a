use super::*;

/// Launches one warp.
fn warp(device: &Emulated, kernel: &str, shared_bytes: u32, args: &[Arg<'_, Emulated>]) {
    device.launch(kernel, [1, 1, 1], [32, 1, 1], shared_bytes, args).unwrap();
}

#[test]
fn buffers_are_filled() {
    let Some(device) = Emulated::new() else { return };
    let values: Buffer<_, f32> = device.alloc(300).unwrap();
    assert!(device.download(&values).unwrap().iter().all(|value| value.is_nan()));
    device.launch("fill_f32", [2, 1, 1], [128, 1, 1], 0, arguments![values.at(10), 2.5f32, 256u32]).unwrap();
    let host = device.download(&values).unwrap();
    assert!(host[..10].iter().chain(&host[266..]).all(|value| value.is_nan()));
    assert!(host[10..266].iter().all(|&value| value == 2.5));
}

#[test]
fn copies_go_where_they_should() {
    let Some(device) = harness() else { return };
    let (from, to) = (device.upload(&[1u16, 2, 3, 4]).unwrap(), device.zeros::<u16>(6).unwrap());
    device.copy(&from, 1, &to, 3, 3).unwrap();
    device.copy(&to, 4, &to, 0, 2).unwrap();
    assert_eq!(device.download(&to).unwrap(), [3, 4, 0, 2, 3, 4]);
    assert!(device.copy(&to, 0, &to, 1, 2).is_err());
    assert!(device.copy(&from, 2, &to, 0, 3).is_err());
    assert!(device.write(&to, 5, &[1, 2]).is_err());
    assert!(device.read(&to, usize::MAX / 2, &mut [0]).is_err());
}

#[test]
fn block_sums_are_right() {
    let Some(device) = harness() else { return };
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (input, sums) = (device.upload(&values).unwrap(), device.zeros::<f32>(4).unwrap());
    device.launch("test_block_sum_f32", [4, 1, 1], [256, 1, 1], 0, arguments![&input, &sums, 1000u32]).unwrap();
    let expected: Vec<f32> = values.chunks(256).map(|part| part.iter().sum()).collect();
    assert_eq!(device.download(&sums).unwrap(), expected);
}

/// c + a b^T with a [16, depth], b [8, depth] and c [16, 8], in f64.
fn product(a: &[f64], b: &[f64], c: &[f64], depth: usize) -> Vec<f64> {
    let dot = |row: usize, column: usize| (0..depth).map(|k| a[row * depth + k] * b[column * depth + k]).sum::<f64>();
    (0..128).map(|at| c[at] + dot(at / 8, at % 8)).collect()
}

#[test]
fn tensor_products_of_halves_match_plain_ones() {
    let Some(device) = harness() else { return };
    for seed in 0..20 {
        let small = |seed, count| -> Vec<f16> { floats(seed, count).into_iter().map(f16::from_f32).collect() };
        let (a, b, c) = (small(3 * seed, 256), small(3 * seed + 1, 128), floats(3 * seed + 2, 128));
        let wide = |values: &[f16]| values.iter().map(|value| value.to_f64()).collect::<Vec<_>>();
        let expected = product(&wide(&a), &wide(&b), &c.iter().map(|&value| f64::from(value)).collect::<Vec<_>>(), 16);
        let transposed: Vec<f16> = (0..128).map(|at| b[at % 8 * 16 + at / 8]).collect();
        let (left, right, upright) = (device.upload(&a).unwrap(), device.upload(&b).unwrap(), device.upload(&transposed).unwrap());
        let (sums, out) = (device.upload(&c).unwrap(), device.alloc::<f32>(128).unwrap());
        for (kernel, right, shared) in [("test_mma_f16", &right, 0), ("test_mma_f16_through_shared", &upright, 768)] {
            warp(&device, kernel, shared, arguments![&left, right, &sums, &out]);
            for (found, expected) in device.download(&out).unwrap().into_iter().zip(&expected) {
                assert!((f64::from(found) - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{kernel}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn tensor_products_of_bytes_match_plain_ones() {
    let Some(device) = harness() else { return };
    for seed in 0..10 {
        let small = |seed, count| -> Vec<i8> { words(seed).map(|word| word as i8).take(count).collect() };
        let (a, b) = (small(3 * seed, 512), small(3 * seed + 1, 256));
        let c: Vec<i32> = words(3 * seed + 2).map(|word| word as i16 as i32).take(128).collect();
        let wide = |values: &[i8]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
        let expected = product(&wide(&a), &wide(&b), &c.iter().map(|&value| f64::from(value)).collect::<Vec<_>>(), 32);
        let out = device.alloc::<i32>(128).unwrap();
        let (left, right, sums) = (device.upload(&a).unwrap(), device.upload(&b).unwrap(), device.upload(&c).unwrap());
        warp(&device, "test_mma_s8", 0, arguments![&left, &right, &sums, &out]);
        assert_eq!(device.download(&out).unwrap().into_iter().map(f64::from).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn tiles_come_out_of_shared_memory_in_fragments() {
    let Some(device) = harness() else { return };
    let tiles: Vec<u8> = (0u16..256).flat_map(u16::to_le_bytes).collect();
    let (input, out) = (device.upload(&tiles).unwrap(), device.alloc::<u32>(12 * 32).unwrap());
    warp(&device, "test_ldmatrix", 0, arguments![&input, &out]);
    let found = device.download(&out).unwrap();
    let element = |tile: usize, row: usize, column: usize| (tile * 64 + row * 8 + column) as u32;
    for (register, (tile, transposed)) in [
        (0, false),
        (1, false),
        (0, true),
        (1, true),
        (0, false),
        (1, false),
        (2, false),
        (3, false),
        (0, true),
        (1, true),
        (2, true),
        (3, true),
    ]
    .into_iter()
    .enumerate()
    {
        for lane in 0..32 {
            let (g, t) = (lane / 4, 2 * (lane % 4));
            let (low, high) =
                if transposed { (element(tile, t, g), element(tile, t + 1, g)) } else { (element(tile, g, t), element(tile, g, t + 1)) };
            assert_eq!(found[register * 32 + lane], low | high << 16, "register {register} of lane {lane}");
        }
    }
}

#[test]
fn lanes_exchange_values() {
    let Some(device) = harness() else { return };
    let values: Vec<i32> = words(5).map(|word| word as i32 % 50).take(32).collect();
    let (input, out) = (device.upload(&values).unwrap(), device.alloc::<u32>(14 * 32).unwrap());
    warp(&device, "test_warp", 0, arguments![&input, &out]);
    let found = device.download(&out).unwrap();
    let ballot = |lanes: std::ops::Range<usize>| lanes.filter(|&lane| values[lane] > 0).fold(0u32, |votes, lane| votes | 1 << lane);
    let sum: i32 = values.iter().sum();
    for lane in 0..32 {
        let at = |other: usize| values[other] as u32;
        let within = |width: usize| lane % width;
        let expected = [
            at((lane * 7 + 3) % 32),
            at(lane / 8 * 8 + 5),
            at(lane ^ 6),
            at(if lane < 3 { lane } else { lane - 3 }),
            at(if within(8) < 3 { lane } else { lane - 3 }),
            at(if lane + 5 > 31 { lane } else { lane + 5 }),
            at(if within(16) + 5 > 15 { lane } else { lane + 5 }),
            ballot(0..32),
            u32::from(values.contains(&3)),
            1,
            sum as u32,
            *values.iter().max().unwrap() as u32,
            *values.iter().min().unwrap() as u32,
            if lane < 16 { at(lane ^ 1) } else { ballot(16..32) },
        ];
        for (row, expected) in expected.into_iter().enumerate() {
            assert_eq!(found[row * 32 + lane], expected, "row {row}, lane {lane}");
        }
    }
}

#[test]
fn atomics_and_votes_count() {
    let Some(device) = harness() else { return };
    let values: Vec<u32> = words(9).take(777).collect();
    let (input, counts, votes) = (device.upload(&values).unwrap(), device.zeros::<u32>(16).unwrap(), device.zeros::<u32>(1).unwrap());
    device.launch("test_histogram", [3, 1, 1], [96, 1, 1], 0, arguments![&input, &counts, &votes, 777u32]).unwrap();
    let expected: Vec<u32> = (0..16).map(|bin| 3 * values.iter().filter(|&value| value % 16 == bin).count() as u32).collect();
    assert_eq!(device.download(&counts).unwrap(), expected);
    assert_eq!(device.download(&votes).unwrap(), [48 * 4 + 2]);
}

#[test]
fn blocks_and_threads_know_their_places() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<u32>(15 * 8 * 4).unwrap();
    device.launch("test_places", [3, 2, 4], [5, 4, 1], 0, arguments![&out]).unwrap();
    let expected: Vec<u32> = (0..4).flat_map(|z| (0..8).flat_map(move |y| (0..15).map(move |x| z * 10000 + y * 100 + x))).collect();
    assert_eq!(device.download(&out).unwrap(), expected);
}

#[test]
fn the_warps_barrier_orders_memory() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<f32>(192).unwrap();
    device.launch("test_exchange", [1, 1, 1], [64, 1, 1], 0, arguments![&out]).unwrap();
    let expected: Vec<f32> = (0..192).map(|at| (((at % 64) ^ 1) + at / 64) as f32).collect();
    assert_eq!(device.download(&out).unwrap(), expected);
}

#[test]
fn halves_convert_as_they_should() {
    let Some(device) = harness() else { return };
    let (wide, back) = (device.alloc::<f32>(65536).unwrap(), device.alloc::<u16>(65536).unwrap());
    device.launch("test_halves", [256, 1, 1], [256, 1, 1], 0, arguments![&wide, &back]).unwrap();
    let (wide, back) = (device.download(&wide).unwrap(), device.download(&back).unwrap());
    for bits in 0..=u16::MAX {
        let value = f16::from_bits(bits);
        if value.is_nan() {
            assert!(wide[usize::from(bits)].is_nan());
        } else {
            assert_eq!((wide[usize::from(bits)].to_bits(), back[usize::from(bits)]), (value.to_f32().to_bits(), bits));
        }
    }
}

/// Floats whose size spreads over what halves can hold, and beyond, with values halfway between two of them.
fn spread(count: usize) -> Vec<f32> {
    let scaled = words(3).zip(words(4)).map(|(word, scale)| (word as f32 / (1u64 << 31) as f32 - 1.0) * 2f32.powi(scale as i32 % 30));
    let between = halves(6, count / 4).into_iter().map(|value| (value.to_f32() + f16::from_bits(value.to_bits() ^ 1).to_f32()) / 2.0);
    let special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, -65520.0, 70000.0, f32::INFINITY, 6e-8, 2.9e-8, 2.98e-8, -1e-9, 3e38];
    special.into_iter().chain(between).chain(scaled).take(count).collect()
}

#[test]
fn floats_round_to_halves_in_each_direction() {
    let Some(device) = harness() else { return };
    let values = spread(8000);
    let (input, out) = (device.upload(&values).unwrap(), device.alloc::<u16>(32000).unwrap());
    device.launch("test_rounding", [32, 1, 1], [256, 1, 1], 0, arguments![&input, &out, 8000u32]).unwrap();
    let out = device.download(&out).unwrap();
    for (at, &value) in values.iter().enumerate() {
        let half = |row: usize| f16::from_bits(out[row * 8000 + at]);
        assert_eq!(half(0).to_bits(), f16::from_f32(value).to_bits(), "{value} to nearest");
        assert_eq!(out[3 * 8000 + at], bf16::from_f32(value).to_bits(), "{value} as bfloat16");
        let (up, down) = (half(1).to_f32(), half(2).to_f32());
        assert!(up >= value && down <= value, "{value}: {down} to {up}");
        let exact = half(0).to_f32() == value;
        let neighbours = if exact { up == down } else { f16::from_f32(down.next_up().max(down)) != half(1) && next(half(2)) == half(1) };
        assert!(neighbours, "{value}: {down} to {up}");
    }
}

/// The next larger half.
fn next(value: f16) -> f16 {
    match value.to_bits() {
        0x8000 => f16::from_bits(1),
        bits if bits & 0x8000 != 0 => f16::from_bits(bits - 1),
        bits => f16::from_bits(bits + 1),
    }
}

#[test]
fn arithmetic_of_halves_rounds_once() {
    let Some(device) = harness() else { return };
    let values = halves(8, 5000);
    let (input, out) = (device.upload(&values).unwrap(), device.alloc::<u16>(20000).unwrap());
    device.launch("test_half_arithmetic", [20, 1, 1], [256, 1, 1], 0, arguments![&input, &out, 5000u32]).unwrap();
    let out = device.download(&out).unwrap();
    for at in 0..5000 {
        let [a, b, c] = [0, 1, 2].map(|offset| values[(at + offset) % 5000].to_f64());
        // sums, products and sums of both fit an f64 exactly unless they are far apart, where the f64 is off by less than matters
        for (row, exact) in [a + b, a * b, a / b, a.mul_add(b, c)].into_iter().enumerate() {
            let (found, expected) = (f16::from_bits(out[row * 5000 + at]), f16::from_f64(exact));
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && exact.is_nan(), "row {row}: {found} for {exact}");
        }
    }
}

#[test]
fn directed_rounding_encloses() {
    let Some(device) = harness() else { return };
    let values: Vec<f32> = floats(12, 3000).into_iter().zip(words(13)).map(|(value, scale)| value * 2f32.powi(scale as i32 % 40)).collect();
    let input = device.upload(&values).unwrap();
    let (up, down) = (device.alloc::<f32>(18000).unwrap(), device.alloc::<f32>(18000).unwrap());
    device.launch("test_directed", [12, 1, 1], [256, 1, 1], 0, arguments![&input, &up, &down, 3000u32]).unwrap();
    let (up, down) = (device.download(&up).unwrap(), device.download(&down).unwrap());
    for at in 0..3000 {
        let (a, b) = (values[at], values[(at + 1) % 3000]);
        let (wide, other) = (f64::from(a), f64::from(b));
        let nearest = [wide + other, wide - other, wide * other, wide / other, wide.mul_add(other, wide), wide.abs().sqrt()];
        for (row, nearest) in nearest.into_iter().enumerate() {
            let (low, high) = (down[row * 3000 + at], up[row * 3000 + at]);
            assert!(f64::from(low) <= nearest && nearest <= f64::from(high), "row {row}: {low} to {high} for {nearest}");
            assert!(low == high || low.next_up() == high, "row {row}: {low} to {high} for {nearest}");
        }
        let sum = a + b;
        assert!(sum == up[at] || sum == down[at]);
    }
}

#[test]
fn words_are_taken_apart() {
    let Some(device) = harness() else { return };
    let values: Vec<u32> = words(21).take(1000).collect();
    let (input, out) = (device.upload(&values).unwrap(), device.alloc::<u32>(6000).unwrap());
    device.launch("test_words", [4, 1, 1], [256, 1, 1], 0, arguments![&input, &out, 1000u32]).unwrap();
    let out = device.download(&out).unwrap();
    for at in 0..1000 {
        let [a, b, c] = [0, 1, 2].map(|offset| values[(at + offset) % 1000]);
        let both = [a.to_le_bytes(), b.to_le_bytes()].concat();
        let picked = u32::from_le_bytes([0, 1, 2, 3].map(|byte| both[(c >> (4 * byte) & 7) as usize]));
        let dot: i32 = a.to_le_bytes().iter().zip(b.to_le_bytes()).map(|(&x, y)| i32::from(x as i8) * i32::from(y as i8)).sum();
        let shifted = ((u64::from(b) << 32 | u64::from(a)) >> (c & 31)) as u32;
        let high = ((u64::from(a) * u64::from(b)) >> 32) as u32;
        let expected = [picked, (dot + 17) as u32, a.count_ones() * 100 + a.leading_zeros(), high, shifted, a.reverse_bits()];
        for (row, expected) in expected.into_iter().enumerate() {
            assert_eq!(out[row * 1000 + at], expected, "row {row} of {a:#x} {b:#x} {c:#x}");
        }
    }
}

#[test]
fn a_partial_copy_ends_in_zeros() {
    let Some(device) = harness() else { return };
    let (input, out) = (device.upload(&[7u8; 16]).unwrap(), device.alloc::<u8>(16).unwrap());
    for valid in [0u32, 5, 16] {
        device.launch("test_partial_copy", [1, 1, 1], [1, 1, 1], 0, arguments![&input, &out, valid]).unwrap();
        let found = device.download(&out).unwrap();
        assert!(found.iter().enumerate().all(|(at, &byte)| byte == if at < valid as usize { 7 } else { 0 }), "{valid}: {found:?}");
    }
}

#[test]
fn an_empty_grid_is_nothing_to_do() {
    let Some(device) = harness() else { return };
    let out = device.zeros::<u32>(1).unwrap();
    device.launch("test_places", [0, 1, 1], [32, 1, 1], 0, arguments![&out]).unwrap();
    assert_eq!(device.download(&out).unwrap(), [0]);
}

#[test]
fn one_order_may_be_enough() {
    for order in [Order::Forward, Order::Reverse, Order::Random] {
        let Some(device) = harness().map(|device| device.in_order(order)) else { return };
        let out = device.alloc::<f32>(192).unwrap();
        device.launch("test_exchange", [1, 1, 1], [64, 1, 1], 0, arguments![&out]).unwrap();
        assert_eq!(device.download(&out).unwrap()[0], 1.0);
    }
}
