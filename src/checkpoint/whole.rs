//! Checkpoints as wholes: written, opened, damaged, interrupted, refused by a full disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;

const WEIGHTS: [f32; 6] = [1.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::NAN, -2.0];

fn meta(loss: Option<f64>) -> Meta {
    Meta { threads: 2, instruction_path: "avx2".into(), recipe: "[run]\n".into(), val_loss_quantized: loss, ..Meta::default() }
}

fn write(run: &Path, step: u64) -> PathBuf {
    let state = [0.5f32; 9];
    let files = vec![
        (
            "model.safetensors".to_owned(),
            Payload::Tensors(vec![Tensor::new("b", &[2, 3], &WEIGHTS), Tensor::new("a", &[1], &WEIGHTS[..1])]),
        ),
        ("optimizer.safetensors".to_owned(), Payload::Tensors(vec![Tensor::new("m.b", &[3, 3], &state)])),
        ("trainer.json".to_owned(), Payload::json(&json!({"step": step, "cursor": [1, 2]}))),
        ("empty".to_owned(), Payload::text("")),
    ];
    save(run, step, files, meta(Some(step as f64))).expect("saves")
}

/// Names in a folder, in order.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).expect("lists").map(|entry| entry.expect("entry").file_name().into_string().expect("text")).collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_opened() {
    let run = tempfile::tempdir().expect("a folder");
    let dir = write(run.path(), 12);
    assert_eq!(dir, run.path().join("step-000012"));
    assert_eq!(names(run.path()), ["step-000012"]);
    let checkpoint = open(&dir).expect("whole");
    assert_eq!((checkpoint.step(), checkpoint.manifest().recipe.as_str()), (12, "[run]\n"));
    let tensors = checkpoint.tensors("model.safetensors").expect("reads");
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
    let (shape, data) = &tensors["b"];
    assert_eq!(shape, &[2, 3]);
    assert!(data.iter().map(|v| v.to_bits()).eq(WEIGHTS.iter().map(|v| v.to_bits())));
    let trainer: serde_json::Value = checkpoint.json("trainer.json").expect("reads");
    assert_eq!(trainer["cursor"], json!([1, 2]));
    assert_eq!(checkpoint.bytes("empty").expect("is there"), b"");
    assert!(checkpoint.bytes("other").is_err());
    assert!(checkpoint.differences(2, "avx2").is_empty());
    assert_eq!(checkpoint.differences(3, "portable").len(), 2);
}

#[test]
fn equal_content_gives_equal_files() {
    let (one, two) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (a, b) = (write(one.path(), 3), write(two.path(), 3));
    assert_eq!(names(&a), names(&b));
    for name in names(&a) {
        assert_eq!(fs::read(a.join(&name)).expect("reads"), fs::read(b.join(&name)).expect("reads"), "{name}");
    }
}

#[test]
fn the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named() {
    let run = tempfile::tempdir().expect("a folder");
    assert!(latest(run.path()).expect("lists").checkpoint.is_none());
    for step in [10, 20, 30, 40] {
        write(run.path(), step);
    }
    let state = run.path().join("step-000030/optimizer.safetensors");
    fs::File::options().write(true).open(&state).and_then(|file| file.set_len(5)).expect("truncates");
    fs::rename(run.path().join("step-000040"), run.path().join("step-000050")).expect("renames");
    fs::create_dir(run.path().join("step-000060")).expect("creates");
    fs::create_dir(run.path().join(".step-000070.tmp-1")).expect("creates");
    let found = latest(run.path()).expect("lists");
    assert_eq!(found.checkpoint.expect("one is whole").step(), 20);
    let reasons: Vec<String> = found.rejected.iter().map(|(_, reason)| reason.to_string()).collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons[0].contains("step-000060/manifest.json: is missing"), "{reasons:?}");
    assert!(reasons[1].contains("step-000050: holds step 40"), "{reasons:?}");
    assert!(reasons[2].contains("step-000030/optimizer.safetensors: has 5 bytes"), "{reasons:?}");
}

#[test]
fn a_step_can_be_saved_again() {
    let run = tempfile::tempdir().expect("a folder");
    let dir = write(run.path(), 5);
    fs::write(dir.join("trainer.json"), "torn").expect("writes");
    write(run.path(), 5);
    open(&dir).expect("whole again");
    assert_eq!(names(run.path()), ["step-000005"]);
}

#[test]
fn pruning_keeps_the_newest_the_best_and_the_damaged() {
    let run = tempfile::tempdir().expect("a folder");
    for step in [1, 2, 3, 4, 5] {
        write(run.path(), step);
    }
    fs::write(run.path().join("step-000005/manifest.json"), "torn").expect("writes");
    let gone = prune(run.path(), 2).expect("removes");
    assert_eq!(gone, [run.path().join("step-000002")]);
    assert_eq!(names(run.path()), ["step-000001", "step-000003", "step-000004", "step-000005"]);
}

#[test]
fn bad_names_and_tensors_leave_nothing() {
    let run = tempfile::tempdir().expect("a folder");
    let twice = vec![Tensor::new("a", &[1], &WEIGHTS[..1]), Tensor::new("a", &[1], &WEIGHTS[..1])];
    for (name, payload) in [("../out", Payload::text("")), (MANIFEST, Payload::text("")), ("t", Payload::Tensors(twice))] {
        assert!(save(run.path(), 1, vec![(name.to_owned(), payload)], meta(None)).is_err(), "{name}");
    }
    assert!(names(run.path()).is_empty());
}

/// The child's part of the next test: a file size limit stands for a full disk, which takes no privileges to arrange.
fn save_with_a_limit(run: &Path) {
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    // SAFETY: both calls only read their arguments, which live until they return.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    let data = vec![1.0f32; 5000];
    let files = vec![("model.safetensors".to_owned(), Payload::Tensors(vec![Tensor::new("w", &[5000], &data)]))];
    let error = save(run, 2, files, meta(None)).expect_err("does not fit");
    let shown = format!("{error} | {}", error.hint().unwrap_or_default());
    assert!(
        shown.contains("model.safetensors: cannot be written") && shown.contains("free space") && shown.contains("needs 1 MiB"),
        "{shown}"
    );
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay() {
    const CHILD: &str = "OSPREY_TEST_LIMITED_RUN";
    if let Some(run) = std::env::var_os(CHILD) {
        return save_with_a_limit(Path::new(&run));
    }
    let run = tempfile::tempdir().expect("a folder");
    write(run.path(), 1);
    let this = "checkpoint::whole::a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay";
    let output =
        Command::new(std::env::current_exe().expect("a path")).args(["--exact", this]).env(CHILD, run.path()).output().expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(names(run.path()), ["step-000001"]);
    open(&run.path().join("step-000001")).expect("untouched");
}

/// How a file is spoiled.
#[derive(Clone, Debug)]
enum Damage {
    Flip { at: prop::sample::Index, mask: u8 },
    Truncate(prop::sample::Index),
    Extend,
    Remove,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        6 => (any::<prop::sample::Index>(), 1u8..).prop_map(|(at, mask)| Damage::Flip { at, mask }),
        4 => any::<prop::sample::Index>().prop_map(Damage::Truncate),
        1 => Just(Damage::Extend),
        1 => Just(Damage::Remove),
    ]
}

fn spoil(path: &Path, damage: &Damage) {
    let mut bytes = fs::read(path).expect("reads");
    match damage {
        Damage::Flip { at, mask } => {
            let at = at.index(bytes.len());
            bytes[at] ^= mask;
        }
        Damage::Truncate(at) => bytes.truncate(at.index(bytes.len())),
        Damage::Extend => bytes.push(b'\n'),
        Damage::Remove => return fs::remove_file(path).expect("removes"),
    }
    fs::write(path, bytes).expect("writes");
}

proptest! {
    #[test]
    fn any_damage_is_an_error_that_names_the_file(which in 0usize..4, damage in damage()) {
        // Written and synced once; each case works on a plain copy.
        static ORIGINAL: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
            let run = tempfile::tempdir().expect("a folder");
            let dir = write(run.path(), 8);
            (run, dir)
        });
        let run = tempfile::tempdir().expect("a folder");
        let dir = run.path().join(folder_name(8));
        fs::create_dir(&dir).expect("creates");
        for name in names(&ORIGINAL.1) {
            fs::copy(ORIGINAL.1.join(&name), dir.join(&name)).expect("copies");
        }
        let name = ["model.safetensors", "optimizer.safetensors", "trainer.json", MANIFEST][which];
        spoil(&dir.join(name), &damage);
        let error = open(&dir).expect_err("must be found").to_string();
        prop_assert!(error.contains(name), "{error}");
        prop_assert!(latest(run.path()).expect("lists").checkpoint.is_none());
    }
}
