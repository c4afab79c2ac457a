//! The harness itself: what is right passes in every thread order, and each kind of mistake is caught.

use super::*;
use crate::ops::cuda::{Buffer, arguments};

/// A device with the kernels that try the harness.
fn harness() -> Option<Emulated> {
    Emulated::with_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/testing"))
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
fn block_sums_are_right_in_every_order() {
    let Some(device) = harness() else { return };
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (input, sums) = (device.upload(&values).unwrap(), device.zeros::<f32>(4).unwrap());
    device.launch("test_block_sum_f32", [4, 1, 1], [256, 1, 1], 0, arguments![&input, &sums, 1000u32]).unwrap();
    let expected: Vec<f32> = values.chunks(256).map(|part| part.iter().sum()).collect();
    assert_eq!(device.download(&sums).unwrap(), expected);
}

#[test]
fn a_race_is_caught() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<f32>(64).unwrap();
    let error = device.launch("test_race", [1, 1, 1], [64, 1, 1], 0, arguments![&out]).unwrap_err().to_string();
    assert!(error.contains("kernel test_race (grid [1, 1, 1]") && error.contains("race: "), "{error}");
}
