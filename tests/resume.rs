//! A run's result depends on nothing but its recipe: not on interruptions, kills, damage to its newest checkpoint, the number of threads,
//! how a step is cut into micro-batches, or what shares a row. And what training refuses to go on from.

use crate::support::{Sandbox, TERNARY};
use candle_core::Device;
use osprey::data::Batch;
use osprey::model::{Config, Decoder, Inputs, Parameters, Spec, init::initialize};
use osprey::ops::cross_entropy::{Targets, linear_cross_entropy};
use osprey::tape::Tape;
use osprey::train::prove_gradients;
use std::sync::Arc;
use std::time::Duration;

/// Files of a checkpoint that must be equal to the last bit.
const STATE: [&str; 3] = ["model.safetensors", "optimizer.safetensors", "data_cursor.json"];

fn variants() -> Vec<(&'static str, Vec<&'static str>)> {
    vec![
        ("dense-muon", vec![]),
        ("osp-muon", vec!["model.face=osp"]),
        ("ternary-muon", TERNARY.to_vec()),
        ("dense-adamw", vec!["optim.rule=adamw", "train.accumulate=2"]),
        ("dense-lion-muon", vec!["optim.rule=lion-muon", "data.order=crops"]),
        ("dense-nor-muon", vec!["optim.rule=nor-muon", "model.activation_checkpointing=true"]),
        ("dense-distance-aware-muon", vec!["optim.rule=distance-aware-muon", "model.kv_heads=1"]),
        ("dense-lion", vec!["optim.rule=lion", "model.qk_norm=true", "train.z_loss=1e-4"]),
    ]
}

#[track_caller]
fn assert_same(sandbox: &Sandbox, one: &str, other: &str, files: &[&str]) {
    for file in files {
        assert!(sandbox.read(&format!("{one}/{file}")) == sandbox.read(&format!("{other}/{file}")), "{one} and {other} differ in {file}");
    }
}

#[test]
fn two_halves_are_one_run() {
    for (name, overrides) in variants() {
        let sandbox = Sandbox::new();
        sandbox.train(&[&overrides[..], &["run.dir=whole"]].concat()).done();
        // What a process that ended right after its first checkpoint leaves.
        for file in ["step-000004", "metrics.jsonl"] {
            sandbox.copy(format!("whole/{file}"), &format!("run/{file}"));
        }
        let resumed = sandbox.train(&overrides).done();
        assert!(resumed.err.contains("resuming from run/step-000004"), "{name}: {}", resumed.err);
        assert_same(&sandbox, "whole/step-000008", "run/step-000008", &STATE);
        assert_eq!(sandbox.metrics("whole"), sandbox.metrics("run"), "{name}");
        assert_eq!(sandbox.losses("run").len(), 8, "{name}");
    }
}

#[test]
fn verify_resume_proves_it_on_a_users_recipe() {
    let sandbox = Sandbox::new();
    let ran = sandbox.osprey(&["train", "tiny.toml", "--verify-resume"]).done();
    assert_eq!(ran.out, "model.safetensors: equal to the last bit\noptimizer.safetensors: equal to the last bit\n");
    assert!(!sandbox.path("run/verify-resume").exists() && !sandbox.path("run/step-000008").exists());
}

/// `OSPREY_TEST_KILLS=20` makes it the long check.
#[test]
fn kills_at_any_moment_change_nothing() {
    let kills: u32 = std::env::var("OSPREY_TEST_KILLS").map_or(4, |text| text.parse().unwrap());
    let sandbox = Sandbox::new();
    let steps = format!("train.steps={}", 40 * kills);
    let recipe = [steps.as_str(), "checkpoint.every=3", "checkpoint.keep_last=3", "eval.every=20"];
    let started = std::time::Instant::now();
    sandbox.train(&[&recipe[..], &["run.dir=whole"]].concat()).done();
    let whole = started.elapsed();
    let mut random = 0x2545_f491_4f6c_dd1d_u64 ^ u64::from(std::process::id());
    let mut hits = 0;
    for _ in 0..kills {
        let mut child = sandbox.start(&recipe);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // On the average as long as it takes for one in so many parts of the run, the start of the program included.
        let part = 0.1 + 1.8 * (random >> 40) as f64 / (1u64 << 24) as f64;
        std::thread::sleep(Duration::from_millis(30) + whole.mul_f64(part / f64::from(kills + 1)));
        hits += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(hits > 0, "the run always ended before it could be killed");
    sandbox.train(&recipe).done();
    let last = format!("step-{:06}", 40 * kills);
    assert_same(&sandbox, &format!("whole/{last}"), &format!("run/{last}"), &STATE);
    assert_eq!(sandbox.metrics("whole"), sandbox.metrics("run"));
    let leftovers: Vec<_> = sandbox.listing().into_iter().filter(|path| path.to_string_lossy().contains("/.step-")).collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn a_torn_newest_checkpoint_is_named_and_the_one_before_is_used() {
    let sandbox = Sandbox::new();
    sandbox.train(&["run.dir=whole"]).done();
    for (number, file) in ["model.safetensors", "optimizer.safetensors", "manifest.json", "tokenizer.json"].iter().enumerate() {
        let run = format!("run-{number}");
        sandbox.copy("whole", &run);
        let torn = format!("{run}/step-000008/{file}");
        let content = sandbox.read(&torn);
        sandbox.write(&torn, &content[..content.len() / 2]);
        let ran = sandbox.train(&[&format!("run.dir={run}")]).done();
        assert!(ran.err.contains(&format!("warning: skipping a damaged checkpoint: {torn}")), "{}", ran.err);
        assert!(ran.err.contains(&format!("resuming from {run}/step-000004")), "{}", ran.err);
        assert_same(&sandbox, "whole/step-000008", &format!("{run}/step-000008"), &STATE);
        assert_eq!(sandbox.metrics("whole"), sandbox.metrics(&run));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (name, overrides) in variants() {
        let sandbox = Sandbox::new();
        for threads in ["1", "2", "3"] {
            let own = [format!("run.threads={threads}"), format!("run.dir=threads-{threads}"), "train.steps=4".to_owned()];
            sandbox.train(&[&overrides[..], &own.each_ref().map(String::as_str)].concat()).done();
        }
        for threads in ["2", "3"] {
            let same = sandbox.read("threads-1/step-000004/model.safetensors")
                == sandbox.read(&format!("threads-{threads}/step-000004/model.safetensors"));
            assert!(same, "{name}: one thread and {threads} differ");
            assert_eq!(sandbox.metrics("threads-1"), sandbox.metrics(&format!("threads-{threads}")), "{name}");
        }
    }
}

/// Another instruction set is told of; by the design of the kernels it gives the same bits.
#[test]
fn the_instruction_set_is_recorded_and_a_change_is_told() {
    let sandbox = Sandbox::new();
    sandbox.train(&["run.dir=whole"]).done();
    sandbox.copy("whole/step-000004", "run/step-000004");
    let mut command = sandbox.command(&["train", "tiny.toml", "--set", "run.threads=1"]);
    command.env("OSPREY_ISA", "portable");
    let ran = crate::support::Ran::of(command).done();
    assert!(ran.err.contains("warning: the checkpoint was written with 2 threads, this run has 1"), "{}", ran.err);
    assert!(ran.err.contains("this run is on portable"), "{}", ran.err);
    let (whole, other) = (sandbox.losses("whole"), sandbox.losses("run"));
    for (one, other) in whole[4..].iter().zip(&other) {
        assert!((one - other).abs() <= 1e-5 * one, "{whole:?} {other:?}");
    }
}

#[test]
fn a_step_may_be_cut_into_micro_batches_in_any_way() {
    for (name, overrides, tolerance) in
        [("dense", vec![], 1e-5), ("osp", vec!["model.face=osp"], 1e-5), ("ternary", TERNARY.to_vec(), 2e-3)]
    {
        let sandbox = Sandbox::new();
        for (rows, accumulate) in [(8, 1), (4, 2), (2, 4), (1, 8)] {
            let own = [format!("train.batch={rows}"), format!("train.accumulate={accumulate}"), format!("run.dir=rows-{rows}")];
            let own = [&own.each_ref().map(String::as_str)[..], &["train.steps=5", "eval.every=0", "optim.rule=adamw"]].concat();
            sandbox.train(&[&overrides[..], &own].concat()).done();
        }
        let expected = sandbox.losses("rows-8");
        assert_eq!(expected.len(), 5);
        for rows in ["4", "2", "1"] {
            for (step, (one, other)) in expected.iter().zip(sandbox.losses(&format!("rows-{rows}"))).enumerate() {
                let off = (one - other).abs() / one;
                assert!(off < tolerance, "{name}, {rows} rows, step {}: off by {off:.1e}", step + 1);
            }
        }
    }
}

fn spec(face: &str) -> Spec {
    let config: Config =
        toml::from_str(&format!("face = \"{face}\"\ndim = 256\nlayers = 2\nheads = 4\nffn = 256\ncontext = 160\n")).unwrap();
    config.resolve(300).unwrap()
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|at| ((at * 7919 + seed * 104_729 + at * at * 31) % 300) as u32).collect()
}

/// Sum of the losses of predicting each document's tokens, in one row or in one each.
fn loss(spec: &Spec, parameters: &Parameters, inputs: &Inputs, targets: &[u32]) -> f64 {
    let (tape, decoder) = (Tape::evaluate(), Decoder::new(spec.clone(), false));
    let hidden = decoder.hidden(&tape, parameters, inputs, None).unwrap();
    let weights = vec![1.0; targets.len()];
    let targets = Targets { ids: targets, weights: &weights, scale: 1.0, z_loss: 0.0 };
    linear_cross_entropy(&tape, &hidden, &decoder.head(parameters).unwrap(), targets).unwrap().weighted_nll
}

#[test]
fn a_document_in_a_packed_row_has_the_loss_it_has_alone() {
    for face in ["dense", "osp", "bitnet"] {
        let spec = spec(face);
        let parameters = initialize(&spec, 5, &Device::Cpu).unwrap();
        let documents: Vec<Vec<u32>> = [33, 7, 65, 2, 53].iter().enumerate().map(|(seed, &count)| tokens(count, seed)).collect();
        let targets: Vec<Vec<u32>> = documents.iter().enumerate().map(|(seed, ids)| tokens(ids.len(), seed + 50)).collect();
        let alone = |ids: &Vec<u32>, targets: &Vec<u32>| loss(&spec, &parameters, &Inputs::rows(1, ids.len(), ids.clone()), targets);
        let separate: f64 = documents.iter().zip(&targets).map(|(ids, targets)| alone(ids, targets)).sum();
        let count: usize = documents.iter().map(Vec::len).sum();
        let mut starts = vec![];
        for ids in &documents {
            starts.extend(vec![starts.len() as u32; ids.len()]);
        }
        let positions: Vec<u32> = starts.iter().enumerate().map(|(at, start)| at as u32 - start).collect();
        let packed = Inputs {
            batch: 1,
            tokens: count,
            ids: Arc::new(documents.concat()),
            positions: Arc::new(positions),
            document_starts: Some(Arc::new(starts)),
        };
        let together = loss(&spec, &parameters, &packed, &targets.concat());
        let off = (together - separate).abs() / separate;
        assert!(off < 1e-6, "{face}: {together} in one row, {separate} apart");
        let blurred = Inputs { document_starts: None, positions: Arc::new((0..count as u32).collect()), ..packed };
        let mixed = loss(&spec, &parameters, &blurred, &targets.concat());
        assert!((mixed - separate).abs() / separate > 1e-5, "{face}: the test would not see a document that leaks");
    }
}

#[test]
fn a_parameter_without_a_usable_gradient_is_named() {
    let spec = spec("dense");
    let parameters = initialize(&spec, 1, &Device::Cpu).unwrap();
    let decoder = Decoder::new(spec.clone(), false);
    let batch = |context: usize| {
        let mut batch = Batch::padding(2, context);
        batch.inputs = tokens(2 * context, 3);
        batch.targets = tokens(2 * context, 4);
        batch.weights = vec![1.0; 2 * context];
        batch.document_starts = vec![0; 2 * context];
        batch.positions = (0..2).flat_map(|_| 0..context as u32).collect();
        vec![Arc::new(batch)]
    };
    for reference in [false, true] {
        prove_gradients(&decoder, &parameters, &batch(16), reference).unwrap();
    }
    let fill = |name: &str, value: f32| {
        let value = candle_core::Tensor::full(value, (256, 256), &Device::Cpu).unwrap();
        parameters.list()[parameters.index(name)].value().slice_set(&value, 0, 0).unwrap();
    };
    // What passes back through the smallest number there is comes out as nothing: the whole branch before it is cut off.
    fill("model.layers.1.self_attn.o_proj.weight", f32::from_bits(1));
    for reference in [false, true] {
        let error = prove_gradients(&decoder, &parameters, &batch(16), reference).unwrap_err();
        assert!(error.to_string().starts_with("model.layers.1.input_layernorm.weight: its gradient is zero"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("no training was done")));
    }
    fill("model.layers.1.self_attn.o_proj.weight", f32::NAN);
    let error = prove_gradients(&decoder, &parameters, &batch(16), false).unwrap_err().to_string();
    assert!(error.contains("is not finite"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update_and_can_be_replayed() {
    let sandbox = Sandbox::new();
    let absurd = ["optim.learning_rate=1e30", "optim.clip=0", "checkpoint.every=1"];
    let ran = sandbox.train(&absurd).refused(&["step 2", "NaN", "no weight was changed", "--replay run/failed/step-000001"]);
    assert!(!ran.err.contains("step 2: step 2"), "{}", ran.err);
    assert_same(&sandbox, "run/step-000001", "run/failed/step-000001", &["model.safetensors", "optimizer.safetensors"]);
    assert!(!sandbox.path("run/step-000002").exists());
    let replay = |file: &str| {
        let sets = absurd.iter().flat_map(|one| ["--set", one]);
        let arguments: Vec<&str> = ["train", "tiny.toml", "--replay", file, "--json", "replay.json"].into_iter().chain(sets).collect();
        sandbox.osprey(&arguments)
    };
    for file in ["run/failed/step-000001", "run/failed/step-000001/batches.json"] {
        let again = replay(file);
        assert_eq!(again.code, Some(1), "{}", again.err);
        assert!(again.out.contains("step 2 failed with") && again.out.contains("loss now: NaN"), "{}", again.out);
    }
    let report: serde_json::Value = serde_json::from_slice(&sandbox.read("replay.json")).unwrap();
    assert_eq!(report["step"], 2);
    let batches = sandbox.read("run/failed/step-000001/batches.json");
    sandbox.write("run/failed/step-000001/batches.json", &batches[..batches.len() / 2]);
    replay("run/failed/step-000001").refused(&["batches.json"]);
    replay("run/failed/absent").refused(&["absent"]);
    replay("tiny.toml").refused(&[]);
}
