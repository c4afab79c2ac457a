//! Conformance: every format in [`ALL`] passes these without being named here, except for its error bound and bits per weight.

use super::*;

/// Reproducible weights, roughly Gaussian, scaled like a trained matrix.
fn weights(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| 0.06 * (uniform() + uniform() + uniform() + uniform())).collect()
}

fn round_trip(format: &dyn Format, row: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    format.encode_row(row, &mut bytes).unwrap();
    assert_eq!(Some(bytes.len()), format.layout().row_bytes(row.len()));
    let mut back = vec![f32::NAN; row.len()];
    format.decode_row(&bytes, &mut back).unwrap();
    back
}

/// Largest error of one weight, in units of its block's largest magnitude, and the expected bits per weight.
fn promise(name: &str) -> (f32, f64) {
    match name {
        "f32" => (0.0, 32.0),
        "f16" => (1.0 / 2048.0, 16.0),
        "bf16" => (1.0 / 256.0, 16.0),
        // Half a step of 1/127, and the rounding of the scale.
        "q8_0" => (0.5 / 127.0 + 1.0 / 2048.0, 8.5),
        // A whole step of 1/8 at the clipped end.
        "q4_0" => (1.0 / 8.0 + 1.0 / 2048.0, 4.5),
        // Half a step of a range that may reach over zero, and the rounding of scale and minimum to six bits.
        "q4_k" => (1.0 / 15.0 + 2.0 / 63.0, 4.5),
        // Half a step of 1/32, and the rounding of the scale to eight bits.
        "q6_k" => (1.0 / 32.0 + 1.0 / 128.0, 6.5625),
        "tq1_0" => (0.5 + 1.0 / 2048.0, 1.6875),
        "tq2_0" => (0.5 + 1.0 / 2048.0, 2.0625),
        other => panic!("{other}: state its error bound and bits per weight here"),
    }
}

#[test]
fn error_is_bounded_and_size_is_as_stated() {
    for format in ALL {
        let layout = format.layout();
        let (bound, bits) = promise(layout.name);
        assert_eq!(layout.bits_per_weight(), bits, "{}", layout.name);
        let row = weights(1024, u64::from(layout.id));
        let back = round_trip(*format, &row);
        for (block, decoded) in row.chunks(layout.block).zip(back.chunks(layout.block)) {
            let limit = bound * absmax(block);
            assert!(block.iter().zip(decoded).all(|(a, b)| (a - b).abs() <= limit), "{}", layout.name);
        }
    }
}

#[test]
fn encoding_what_was_decoded_changes_nothing() {
    for format in ALL {
        let once = round_trip(*format, &weights(1024, 7));
        let twice = round_trip(*format, &once);
        // Where the largest weight is stored with a rounded scale the second scale may differ by one f16 step; the value then
        // differs by that step and no more.
        let limit = match format.layout().name {
            // Their search may settle on another scale and minimum; it cannot be off by more than it was the first time.
            "q4_k" | "q6_k" => promise(format.layout().name).0 * absmax(&once),
            name if format.layout().block == 1 || name.starts_with("tq") => 0.0,
            _ => absmax(&once) / 1024.0,
        };
        assert!(once.iter().zip(&twice).all(|(a, b)| (a - b).abs() <= limit), "{}", format.layout().name);
    }
}

#[test]
fn zeros_stay_zero_and_signs_are_kept() {
    for format in ALL {
        assert!(round_trip(*format, &[0.0; 512]).iter().all(|w| *w == 0.0), "{}", format.layout().name);
        let signs: Vec<f32> = weights(512, 3).iter().map(|w| w.signum() * 0.25).collect();
        let back = round_trip(*format, &signs);
        assert!(signs.iter().zip(&back).all(|(a, b)| a.signum() == b.signum()), "{}", format.layout().name);
    }
}

#[test]
fn rows_append_and_uneven_rows_are_refused() {
    for format in ALL {
        let Layout { block, block_bytes, name, .. } = format.layout();
        let mut bytes = vec![7];
        format.encode_row(&weights(block, 1), &mut bytes).unwrap();
        format.encode_row(&weights(block, 2), &mut bytes).unwrap();
        assert_eq!(bytes.len(), 1 + 2 * block_bytes, "{name}");
        if block > 1 {
            let refusal = format.encode_row(&vec![0.0; block + 1], &mut bytes).unwrap_err();
            assert!(refusal.to_string().contains(name), "{refusal}");
        }
        assert!(format.decode_row(&bytes, &mut vec![0.0; 2 * block]).is_err(), "{name}");
    }
}

/// candle's k-quants are a second implementation of both directions.
#[test]
fn candle_agrees_on_k_quants() {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    let (row, pairs): (_, [(&dyn Format, _); 2]) = (weights(4096, 11), [(&Q4K, GgmlDType::Q4K), (&Q6K, GgmlDType::Q6K)]);
    let error = |stored: &[f32]| row.iter().zip(stored).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    for (format, dtype) in pairs {
        let theirs = QTensor::quantize(&Tensor::from_slice(&row, 4096, &Device::Cpu).unwrap(), dtype).unwrap();
        let values: Vec<f32> = theirs.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
        let mut decoded = vec![0.0; row.len()];
        format.decode_row(&theirs.data().unwrap(), &mut decoded).unwrap();
        assert_eq!(decoded, values, "{}", format.layout().name);
        let ratio = error(&round_trip(format, &row)) / error(&values);
        assert!(ratio < 1.02, "{}: {ratio}", format.layout().name);
    }
}

#[test]
fn ids_and_names_are_unique_and_found() {
    for format in ALL {
        let layout = format.layout();
        assert_eq!(by_id(layout.id).unwrap().layout(), layout);
        assert_eq!(by_name(layout.name).unwrap().layout(), layout);
    }
    assert!(by_id(16).is_none());
}

proptest::proptest! {
    #[test]
    fn any_bytes_decode_without_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600), blocks in 0usize..4) {
        for format in ALL {
            let _ = format.decode_row(&bytes, &mut vec![0.0; blocks * format.layout().block]);
        }
    }

    #[test]
    fn any_weights_encode_without_panic(row in proptest::collection::vec(proptest::num::f32::ANY, 256)) {
        for format in ALL {
            format.encode_row(&row, &mut Vec::new()).unwrap();
        }
    }
}
