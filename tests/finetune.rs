//! Fine-tuning against transformers and PEFT, and what it keeps: bases, adapters, resumption, merges, memory, and what is refused.
//! `fixtures/finetune/make.py` made the files and says what is in them.

use crate::support::{Sandbox, TERNARY};
use candle_core::{Device, Tensor};
use osprey::data::Batch;
use osprey::export::import::load_any;
use osprey::infer::{Engine, Session, kv::Format};
use osprey::model::GradientBuffers;
use osprey::model::adapt::Lora;
use osprey::optim::{Adamw, Config, Constant, Optimizer, RuleName, Schedule, Span};
use osprey::train::finetune::{self, Finetune};
use osprey::train::step;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/finetune").join(name)
}

/// The trained stories model, where it is.
fn stories() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpora");
    let folder = std::env::var_os("OSPREY_CORPORA").map_or_else(beside, PathBuf::from).join("weights/stories260K-hf");
    if !folder.exists() {
        eprintln!("skipped: {} is not here (set OSPREY_CORPORA)", folder.display());
        return None;
    }
    Some(folder)
}

fn tensors(path: &Path) -> (HashMap<String, String>, HashMap<String, Tensor>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    (header.metadata().clone().unwrap_or_default(), candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap())
}

fn integers(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
}

#[test]
fn bases_of_both_families_and_an_adapter_of_peft_give_the_logits_of_transformers() {
    let (_, expected) = tensors(&fixture("logits.safetensors"));
    for name in ["llama3", "qwen3", "peft"] {
        let engine = Engine::load(&fixture(name)).unwrap();
        let mut session = Session::new(&engine, Format::F32, 64).unwrap();
        let hidden = session.hidden(&integers(&expected[&format!("{name}/ids")])).unwrap();
        let logits = engine.logits(&hidden).unwrap();
        let theirs = expected[&format!("{name}/logits")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let largest = theirs.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let error = logits.iter().zip(&theirs).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(error < 2e-5 * largest, "{name}: logits are {error:.1e} away, the largest is {largest:.1}");
    }
}

/// Rows of a fixture as training sees them: each token predicts the next.
fn batch(ids: &[u32], rows: usize) -> Arc<Batch> {
    let tokens = ids.len() / rows;
    let mut batch = Batch::padding(rows, tokens - 1);
    let inputs = ids.chunks(tokens).flat_map(|row| &row[..tokens - 1]);
    let targets = ids.chunks(tokens).flat_map(|row| &row[1..]);
    batch.inputs = inputs.copied().collect();
    batch.targets = targets.copied().collect();
    batch.weights.fill(1.0);
    batch.document_starts.fill(0);
    batch.positions.iter_mut().enumerate().for_each(|(at, position)| *position = (at % (tokens - 1)) as u32);
    Arc::new(batch)
}

/// Losses of 20 steps from PEFT's start on PEFT's batches, and PEFT's own.
fn twenty_steps(base: &Path, case: &str) -> (Vec<f64>, Vec<f64>) {
    let (settings, tensors) = tensors(&fixture(case));
    let number = |key: &str| settings[key].parse::<f64>().unwrap();
    let lora = Lora {
        rank: number("rank") as usize,
        alpha: number("alpha"),
        rank_stabilized: settings["rank_stabilized"] == "True",
        b_rate: number("b_rate"),
        targets: settings["targets"].split(' ').map(str::to_owned).collect(),
    };
    let finetune = Finetune::open(&recipe(base, Some(lora)), Path::new(".")).unwrap();
    let parameters = finetune.parameters(1, &Device::Cpu).unwrap();
    for (name, tensor) in tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("start/")?, tensor))) {
        parameters.list()[parameters.index(name)].value().slice_set(tensor, 0, 0).unwrap();
    }
    let config = Config {
        rule: RuleName::Adamw,
        learning_rate: number("rate"),
        weight_decay: 0.0,
        clip: 1.0,
        schedule: Schedule::Constant(Constant { warmup: Span::Steps(0) }),
        adamw: Adamw { beta1: 0.9, beta2: 0.95, eps: 1e-8 },
        ..Config::default()
    };
    let infos = step::parameter_infos(&parameters, finetune.spec.heads, finetune.spec.kv_heads);
    let mut optimizer = Optimizer::new(&config, &infos, 20).unwrap();
    let mut gradients = GradientBuffers::new(&parameters).unwrap();
    let decoder = osprey::model::Decoder::with_positions(finetune.spec.clone(), 64, false);
    let batches = &tensors["batches"];
    let rows = batches.dims()[1];
    let losses = (0..20).map(|number| {
        let batch = batch(&integers(&batches.get(number).unwrap()), rows);
        let loss = step::gradients(&decoder, &parameters, &[batch], 0.0, false, &mut gradients).unwrap();
        step::update(&mut optimizer, number as u64, &parameters, &gradients, false).unwrap();
        loss
    });
    (losses.collect(), tensors["losses"].to_vec1().unwrap())
}

fn recipe(base: &Path, lora: Option<Lora>) -> finetune::Config {
    finetune::Config { base: base.to_owned(), lora, quantize: None, ternary: None, context: None, activation_checkpointing: false }
}

#[test]
fn twenty_steps_of_lora_are_those_of_peft() {
    let mut cases = vec![
        (fixture("llama3"), "llama3-lora.safetensors"),
        (fixture("llama3"), "llama3-rslora-plus.safetensors"),
        (fixture("qwen3"), "qwen3-lora.safetensors"),
    ];
    cases.extend(stories().map(|folder| (folder, "stories-lora.safetensors")));
    for (base, case) in cases {
        let (ours, theirs) = twenty_steps(&base, case);
        let error = ours.iter().zip(&theirs).fold(0.0f64, |most, (a, b)| most.max((a - b).abs()));
        println!("{case}: {:.4} -> {:.4}, largest difference {error:.1e}", ours[0], ours[19]);
        assert!(error < 1e-4, "{case}: {ours:?} where PEFT has {theirs:?}");
    }
}

/// The first block's input needs no gradient when the embedding is frozen; its adapters still do.
#[test]
fn recomputing_blocks_changes_no_bit_of_an_adapters_gradient() {
    let finetune = Finetune::open(&recipe(&fixture("llama3"), Some(Lora::default())), Path::new(".")).unwrap();
    let parameters = finetune.parameters(1, &Device::Cpu).unwrap();
    let batch = batch(&(0..96).map(|i| (i * 11 + 5) % 90).collect::<Vec<u32>>(), 2);
    let [kept, recomputed] = [false, true].map(|checkpointing| {
        let decoder = osprey::model::Decoder::with_positions(finetune.spec.clone(), 64, checkpointing);
        let mut gradients = GradientBuffers::new(&parameters).unwrap();
        let loss = step::gradients(&decoder, &parameters, std::slice::from_ref(&batch), 0.0, false, &mut gradients).unwrap();
        (loss, gradients.finished().len(), gradients.flat().to_vec1::<f32>().unwrap())
    });
    assert!(kept.2.iter().any(|&gradient| gradient != 0.0) && kept.1 == parameters.list().len());
    assert!(kept == recomputed);
}

#[test]
fn nothing_is_held_for_a_frozen_weight_but_itself() {
    let lora = Lora { rank: 2, ..Lora::default() };
    let finetune = Finetune::open(&recipe(&fixture("llama3"), Some(lora)), Path::new(".")).unwrap();
    let parameters = finetune.parameters(1, &Device::Cpu).unwrap();
    let modules = finetune.targets.values().map(|[out, width]| 2 * (out + width)).sum::<usize>();
    assert_eq!((finetune.targets.len(), parameters.total()), (14, modules));
    assert_eq!(GradientBuffers::new(&parameters).unwrap().flat().elem_count(), modules);
    let infos = step::parameter_infos(&parameters, 4, 2);
    let state = Optimizer::new(&Config { rule: RuleName::Adamw, ..Config::default() }, &infos, 1).unwrap();
    assert_eq!(state.state_tensors().map(|(_, values)| values.len()).sum::<usize>(), 2 * modules);
    // bfloat16 matrices stay as they are on disk; vectors are widened.
    let stored: usize = finetune.loaded.parameters.values().map(|p| p.count() * if p.shape.len() == 2 { 2 } else { 4 }).sum();
    assert_eq!(parameters.frozen().values().map(osprey::ops::frozen::Frozen::bytes).sum::<usize>(), stored);
}

/// What the recipe of [`Sandbox`] becomes when it fine-tunes a model of the same sandbox.
const TUNE: [&str; 6] = [
    "optim.rule=adamw",
    "optim.learning_rate=1e-2",
    "optim.weight_decay=0",
    "finetune.lora.rank=4",
    "optim.schedule={constant={}}",
    "data.sources=[{builtin={documents=200, seed=5}}]",
];

/// A sandbox with a base in `base/step-000008` and `tune.toml`.
fn with_base(overrides: &[&str]) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.train(&[overrides, &["run.dir=base"]].concat()).done();
    let tiny = sandbox.text("tiny.toml");
    let start = tiny.find("[model]").unwrap();
    let end = tiny.find("[data]").unwrap();
    let schedule = tiny.find("schedule.wsd").unwrap();
    let tune = format!("{}[finetune]\nbase = \"base/step-000008\"\n\n{}", &tiny[..start], &tiny[end..schedule]);
    sandbox.write("tune.toml", tune);
    sandbox
}

fn tune(sandbox: &Sandbox, overrides: &[&str]) -> crate::support::Ran {
    let mut arguments = vec!["train", "tune.toml"];
    TUNE.iter().chain(overrides).for_each(|one| arguments.extend(["--set", one]));
    sandbox.osprey(&arguments)
}

fn nll(sandbox: &Sandbox, model: &str) -> f64 {
    sandbox.osprey(&["eval", model, "--text", "text.txt", "--json", "nll.json"]).done();
    let found: serde_json::Value = serde_json::from_str(&sandbox.text("nll.json")).unwrap();
    found["nll_per_token"].as_f64().unwrap()
}

#[test]
fn an_adapter_trains_resumes_loads_and_merges() {
    let sandbox = with_base(&[]);
    sandbox.write("text.txt", "A small house stood by the river, and nobody knew who lived in it.");
    tune(&sandbox, &["run.dir=whole", "optim.schedule={finch={}}"]).done();
    let adapter = "whole/step-000008";
    assert!(sandbox.path(adapter).join("adapter_model.safetensors").is_file() && !sandbox.path(adapter).join("model.safetensors").exists());
    for file in ["step-000004", "metrics.jsonl"] {
        sandbox.copy(format!("whole/{file}"), &format!("run/{file}"));
    }
    let resumed = tune(&sandbox, &["optim.schedule={finch={}}"]).done();
    assert!(resumed.err.contains("resuming from run/step-000004"), "{}", resumed.err);
    for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
        assert!(sandbox.read(&format!("{adapter}/{file}")) == sandbox.read(&format!("run/step-000008/{file}")), "{file}");
    }
    assert_eq!(sandbox.metrics("whole"), sandbox.metrics("run"));
    let decisions = sandbox.metrics("whole").iter().filter(|record| record.contains_key("finch_factor")).count();
    assert_eq!(decisions, 8, "every step's decision is on record");

    let (base, beside) = (nll(&sandbox, "base/step-000008"), nll(&sandbox, adapter));
    assert!((base - beside).abs() > 1e-3, "the adapter changed nothing: {base} {beside}");
    for (format, out) in [("hf", "hf"), ("gguf-f16", "model.gguf"), ("peft", "peft")] {
        sandbox.osprey(&["export", adapter, "--format", format, "--out", out]).done();
        assert!((nll(&sandbox, out) - beside).abs() < 1e-3, "{format}");
    }
    // A base may be a file of blocks, or quantized for training only; an adapter may be the base of the next run.
    sandbox.osprey(&["export", "base/step-000008", "--format", "gguf-q8_0", "--out", "base.gguf"]).done();
    tune(&sandbox, &["run.dir=q8", "finetune.base=base.gguf"]).done();
    assert!((nll(&sandbox, "q8/step-000008") - beside).abs() < 0.1);
    tune(&sandbox, &["run.dir=nf4", "finetune.quantize=nf4"]).done();
    tune(&sandbox, &["run.dir=again", &format!("finetune.base={adapter}")]).done();
}

#[test]
fn the_held_out_loss_of_training_is_that_of_the_engine() {
    let sandbox = with_base(&[]);
    sandbox.osprey(&["export", "base/step-000008", "--format", "gguf-q4_0", "--out", "base.gguf"]).done();
    tune(&sandbox, &["finetune.base=base.gguf"]).done();
    let (engine, finetune) = {
        let config = recipe(&sandbox.path("base.gguf"), Some(Lora { rank: 4, ..Lora::default() }));
        (Engine::load(&sandbox.path("run/step-000008")).unwrap(), Finetune::open(&config, Path::new(".")).unwrap())
    };
    let parameters = finetune.parameters(1, &Device::Cpu).unwrap();
    let (_, saved) = tensors(&sandbox.path("run/step-000008/adapter_model.safetensors"));
    let plain = saved.into_iter().map(|(name, tensor)| (name.strip_prefix("base_model.model.").unwrap().to_owned(), tensor));
    parameters.fill(&plain.collect()).unwrap();
    let ids: Vec<u32> = (0..64).map(|i| (i * 7 + 3) % 200).collect();
    let decoder = osprey::model::Decoder::new(finetune.spec.clone(), false);
    let inputs = osprey::model::Inputs::rows(1, ids.len(), ids.clone());
    let hidden = decoder.hidden(&osprey::tape::Tape::evaluate(), &parameters, &inputs, None).unwrap();
    let theirs = Session::new(&engine, Format::F32, 64).unwrap().hidden(&ids).unwrap();
    assert_eq!(hidden.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap(), theirs, "the adapter beside a file's blocks, bit for bit");
}

#[test]
fn a_ternary_base_keeps_its_adapter_beside_it_and_a_merge_is_limited() {
    let sandbox = with_base(&TERNARY);
    sandbox.write("text.txt", "A small house stood by the river, and nobody knew who lived in it. ".repeat(4));
    tune(&sandbox, &["train.steps=12", "finetune.lora.rank=8", "finetune.lora.alpha=64"]).done();
    let adapter = "run/step-000012";
    let (base, beside) = (nll(&sandbox, "base/step-000008"), nll(&sandbox, adapter));
    assert!((beside - base).abs() > 1e-3, "the adapter changed nothing: {base} {beside}");
    let export = |options: &[&str]| sandbox.osprey(&[&["export", adapter, "--out", "merged.gguf"], options].concat());
    export(&["--format", "gguf-tq2_0"]).refused(&["--text", "nothing was given to measure"]);
    export(&["--format", "gguf-tq2_0", "--text", "text.txt", "--merge-limit=-10"]).refused(&["run/step-000012", "nats per token"]);
    assert!(!sandbox.path("merged.gguf").exists());
    let done = export(&["--format", "gguf-tq2_0", "--text", "text.txt", "--merge-limit", "10", "--json", "merge.json"]).done();
    assert!(done.out.contains("the merge into the ternary base costs"), "{}", done.out);
    let report: serde_json::Value = serde_json::from_str(&sandbox.text("merge.json")).unwrap();
    let merged = report["merge"]["nll_merged"].as_f64().unwrap();
    assert!((report["merge"]["nll_beside"].as_f64().unwrap() - beside).abs() < 1e-6);
    assert!((nll(&sandbox, "merged.gguf") - merged).abs() < 1e-2);
    // A dense format holds the sum; only the rounding of activations is gone.
    sandbox.osprey(&["export", adapter, "--format", "gguf-f16", "--out", "dense.gguf"]).done();
    assert!((nll(&sandbox, "dense.gguf") - beside).abs() < 0.05);
}

#[test]
fn every_weight_of_a_base_can_be_trained_and_floats_become_ternary() {
    let sandbox = with_base(&["model.dim=256", "model.heads=4", "model.ffn=256", "model.layers=1"]);
    sandbox.write("text.txt", "A small house stood by the river.");
    let full = |overrides: &[&str]| {
        let mut arguments = vec!["train", "tune.toml"];
        TUNE.iter().filter(|one| !one.contains("lora")).chain(overrides).for_each(|one| arguments.extend(["--set", one]));
        sandbox.osprey(&arguments)
    };
    full(&["run.dir=full", "optim.learning_rate=1e-3"]).done();
    assert!(sandbox.path("full/step-000008/model.safetensors").is_file());
    full(&["run.dir=ternary", "finetune.ternary.warmup={steps=6}", "export.formats=[\"gguf-tq2_0\"]"]).done();
    assert!(sandbox.path("ternary/export/model-tq2_0.gguf").is_file());
    let blends: Vec<f64> =
        sandbox.metrics("ternary").iter().filter_map(|record| record.get("ternary_blend")?.as_f64()).map(|blend| blend * 6.0).collect();
    assert!(blends.iter().zip(0..).all(|(blend, step)| (blend - f64::from(step)).abs() < 1e-6) && blends.len() == 6, "{blends:?}");
    full(&["run.dir=halves", "finetune.ternary.warmup={steps=6}", "train.steps=8", "optim.schedule={finch={cap=1.0}}"]).done();
}

#[test]
fn mistakes_are_refused_before_anything_is_written() {
    let sandbox = with_base(&[]);
    sandbox.write("text.txt", "A small house.");
    tune(&sandbox, &[]).done();
    sandbox.osprey(&["export", "base/step-000008", "--format", "gguf-q8_0", "--out", "base.gguf"]).done();
    let before = sandbox.listing();
    let cases: &[(&[&str], &[&str])] = &[
        (&["finetune.lora.rank=0"], &["finetune.lora.rank", "0"]),
        (&["finetune.lora.targets=[\"query\"]"], &["finetune.lora.targets", "\"query\" matches no module", "q_proj"]),
        (&["finetune.lora.targets=[]"], &["finetune.lora.targets"]),
        (&["finetune.lora.alpha=nan"], &["finetune.lora.alpha"]),
        (&["finetune.base=absent"], &["finetune.base", "absent"]),
        (&["finetune.base=text.txt"], &["text.txt", "neither a model directory"]),
        (&["finetune.context=65"], &["finetune.context", "65", "64"]),
        (&["finetune.ternary={}"], &["finetune.ternary"]),
        (&["model.dim=64"], &["model"]),
        (&["data.tokenizer=character"], &["data.tokenizer"]),
        (&["optim.schedule={finch={cap=0.0}}"], &["optim.schedule.finch.cap"]),
        (&["export.formats=[\"gguf-tq2_0\"]"], &["gguf-tq2_0"]),
    ];
    for (overrides, words) in cases {
        tune(&sandbox, &[&["run.dir=new"], *overrides].concat()).refused(words);
    }
    let without = sandbox.osprey(&["train", "tune.toml", "--set", "run.dir=new", "--set", "finetune.base=base.gguf"]);
    without.refused(&["base.gguf", "q8_0", "cannot be trained in full"]);
    sandbox.osprey(&["export", "base/step-000008", "--format", "peft", "--out", "new"]).refused(&["base/step-000008", "is no adapter"]);
    assert_eq!(sandbox.listing(), before);
}

#[test]
fn an_adapter_is_refused_without_its_own_base() {
    let sandbox = with_base(&[]);
    sandbox.write("text.txt", "A small house.");
    tune(&sandbox, &[]).done();
    sandbox.osprey(&["export", "run/step-000008", "--format", "peft", "--out", "peft"]).done();
    sandbox.train(&["run.dir=other", "model.dim=32"]).done();
    sandbox.train(&["run.dir=twin", "run.seed=9"]).done();
    let config = sandbox.text("peft/adapter_config.json");
    let base = load_any(&sandbox.path("base/step-000008")).unwrap().spec.dim;
    assert_eq!(base, 64);
    let eval = |model: &str| sandbox.osprey(&["eval", model, "--text", "text.txt"]);
    let with = |folder: &str, config: &str| sandbox.write(&format!("{folder}/adapter_config.json"), config);
    with("peft", &config.replace("base/step-000008", "other/step-000008"));
    eval("peft").refused(&["peft", "is for a base matrix"]);
    with("peft", &config.replace("base/step-000008", "absent"));
    eval("peft").refused(&["adapter_config.json", "not on this machine"]);
    for (from, to, word) in [
        ("\"LORA\"", "\"IA3\"", "IA3"),
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "modules_to_save"),
        ("{", "", "not JSON"),
    ] {
        with("peft", &config.replacen(from, to, 1));
        eval("peft").refused(&["adapter_config.json", word]);
    }
    // A relative base, and one of the same shape that is another model.
    sandbox.copy("base/step-000008", "peft/inner");
    let absolute = sandbox.path("base/step-000008").canonicalize().unwrap();
    with("peft", &config.replace(absolute.to_str().unwrap(), "inner"));
    eval("peft").done();
    std::fs::remove_dir_all(sandbox.path("base/step-000008")).unwrap();
    sandbox.copy("twin/step-000008", "base/step-000008");
    eval("run/step-000008").refused(&["run/step-000008", "another base"]);
    tune(&sandbox, &["train.steps=9"]).refused(&["another base"]);
}
