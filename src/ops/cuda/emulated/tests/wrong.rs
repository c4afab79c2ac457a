use std::process::Command;

use super::*;

/// Set for the program that is to be ended by the sanitizer.
const OVERRUN: &str = "OSPREY_TEST_OVERRUN";

/// What is said of a launch of 64 threads of a kernel `wrong_*` with one output (and an input where it takes one).
fn complaint<T: Element>(device: &Emulated, kernel: &str, out: &Buffer<Emulated, T>, input: Option<&Buffer<Emulated, f32>>) -> String {
    let args: Vec<Arg<'_, Emulated>> = input.map(Arg::from).into_iter().chain([Arg::from(out)]).collect();
    let error = device.launch(kernel, [1, 1, 1], [64, 1, 1], 512, &args).expect_err(kernel).to_string();
    assert!(error.contains(&format!("kernel {kernel} (grid [1, 1, 1], block [64, 1, 1], 512 shared bytes): ")), "{error}");
    error
}

/// Expects each kernel to be caught with all the words beside it, in each order by itself.
fn caught(cases: &[(&str, &[&str])], takes_input: bool) {
    for order in [Order::Forward, Order::Reverse, Order::Random] {
        let Some(device) = harness().map(|device| device.in_order(order)) else { return };
        let (input, out) = (device.upload(&floats(1, 256)).unwrap(), device.alloc::<f32>(128).unwrap());
        for (kernel, words) in cases {
            let text = complaint(&device, kernel, &out, takes_input.then_some(&input));
            assert!(words.iter().all(|word| text.contains(word)), "{kernel} in {order:?} order: {text}");
        }
    }
}

#[test]
fn races_are_caught() {
    caught(
        &[
            ("wrong_race", &["race: ", " since the last barrier by thread (", "of block (0, 0, 0)", "static shared memory, byte"]),
            ("wrong_write_after_read", &["race: ", "since the last barrier by thread"]),
            ("wrong_two_writers", &["race: writes what was written"]),
            ("wrong_shuffle_as_barrier", &["race: reads what was written"]),
        ],
        false,
    );
}

#[test]
fn divergence_is_caught() {
    caught(
        &[
            ("wrong_exit_before_barrier", &["divergence: ", "__syncthreads at wrong.cu:", "ended", " more"]),
            ("wrong_two_barriers", &["divergence: ", "__syncthreads at wrong.cu:"]),
            ("wrong_barrier_and_shuffle", &["divergence: ", "__shfl_xor_sync at wrong.cu:", "__syncthreads at wrong.cu:"]),
            ("wrong_lane", &["reads lane 20, which does not take part"]),
            ("wrong_mask", &["mask"]),
            ("wrong_half_warp_mma", &["mma_m16n8k16_f16", "32 lanes"]),
        ],
        false,
    );
}

#[test]
fn asynchronous_copies_must_be_waited_for() {
    caught(
        &[
            ("wrong_no_wait", &["race: touches where an asynchronous copy"]),
            ("wrong_short_wait", &["race: touches where an asynchronous copy"]),
            ("wrong_wait_without_barrier", &["race: "]),
        ],
        true,
    );
}

#[test]
fn shared_memory_has_bounds() {
    caught(
        &[
            ("wrong_unwritten", &["unwritten: reads what nobody has written"]),
            ("wrong_index", &["shared memory: 4 bytes at element 64 of an array of 64"]),
            ("wrong_alignment", &["shared memory: element", "is not aligned to 16 bytes"]),
            ("wrong_dynamic_size", &["dynamic shared memory: bytes 0 to 516 of the 512"]),
        ],
        false,
    );
}

#[test]
fn writing_beside_a_buffer_is_caught() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<f32>(64).unwrap();
    if device.kernels.sanitizer().is_none() {
        assert!(complaint(&device, "wrong_overrun", &out, None).contains("written after a device buffer of 256 bytes"));
    } else if std::env::var_os(OVERRUN).is_some() {
        complaint(&device, "wrong_overrun", &out, None); // does not come back
    } else {
        // the sanitizer ends the program: that must be another one
        let mut child = Command::new(std::env::current_exe().unwrap());
        let name = "ops::cuda::emulated::tests::wrong::writing_beside_a_buffer_is_caught";
        let output = child.args([name, "--exact", "--nocapture"]).env(OVERRUN, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("AddressSanitizer") && said.contains("wrong_overrun"), "{said}");
    }
}

#[test]
fn results_must_not_depend_on_the_order() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<f32>(64).unwrap();
    assert!(
        complaint(&device, "wrong_order", &out, None).contains("the results of thread orders Forward and Reverse differ, first at byte")
    );
}

#[test]
fn arguments_must_fit_the_parameters() {
    let Some(device) = harness() else { return };
    let (values, bytes, wide) = (device.alloc::<f32>(8).unwrap(), device.alloc::<u8>(32).unwrap(), device.alloc::<f64>(4).unwrap());
    let refused = |args: &[Arg<'_, Emulated>]| {
        let error = device.launch("test_rounding", [1, 1, 1], [8, 1, 1], 0, args).unwrap_err();
        assert_eq!(error.exit_code(), 101);
        error.to_string()
    };
    assert!(refused(arguments![&values, &bytes]).contains("2 arguments for 3 parameters"));
    assert!(refused(arguments![&values, &bytes, 1i32]).contains("argument 2 is of another kind than Unsigned32"));
    assert!(refused(arguments![8u32, &bytes, 1u32]).contains("argument 0 is of another kind than Pointer"));
    assert!(refused(arguments![&wide, &bytes, 1u32]).contains("argument 0 has elements of 8 bytes where the kernel takes 4"));
    assert!(refused(arguments![&values, bytes.at(1), 1u32]).contains("argument 1 starts at byte 1 of 32"));
    assert!(refused(arguments![values.at(9), &bytes, 1u32]).contains("argument 0 starts at byte 36 of 32"));
    let other = harness().unwrap().alloc::<f32>(8).unwrap();
    assert!(refused(arguments![&other, &bytes, 1u32]).contains("memory of another device"));
}

#[test]
fn launches_have_limits() {
    let Some(device) = harness() else { return };
    let out = device.alloc::<u32>(64).unwrap();
    let refused = |grid, block, shared| device.launch("test_places", grid, block, shared, arguments![&out]).unwrap_err().to_string();
    assert!(refused([1, 1, 1], [1025, 1, 1], 0).contains("1 to 1024 threads"));
    assert!(refused([1, 1, 1], [0, 1, 1], 0).contains("1 to 1024 threads"));
    assert!(refused([1, 65536, 1], [1, 1, 1], 0).contains("a grid has at most"));
    assert!(refused([1, 1, 1], [1, 1, 1], 164 * 1024).contains("shared memory"));
    let unknown = device.launch("test_nothing", [1, 1, 1], [1, 1, 1], 0, arguments![&out]).unwrap_err().to_string();
    assert!(unknown.contains("kernel test_nothing") && unknown.contains("KERNEL(name)"), "{unknown}");
}
