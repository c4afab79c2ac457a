//! From training to files that others open: every format that a face can have is written, read back, compared, written again; candle's
//! readers and models are the second opinion.

use crate::support::{Sandbox, TERNARY};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, quantized_llama};
use osprey::infer::kv::Format;
use osprey::infer::{Engine, Session};
use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;

/// A model trained for a few steps, in `run/step-000003`.
fn trained(overrides: &[&str]) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.train(&[overrides, &["train.steps=3", "eval.every=0", "model.context=64"]].concat()).done();
    let text = "Once upon a time a small fox met a large hen. They went to the river and came back in the evening.\n---\nCopy: red blue.";
    sandbox.write("text.txt", text.repeat(3));
    sandbox
}

fn dense() -> &'static Sandbox {
    static DENSE: OnceLock<Sandbox> = OnceLock::new();
    DENSE.get_or_init(|| trained(&["model.kv_heads=1"]))
}

const CHECKPOINT: &str = "run/step-000003";

fn export(sandbox: &Sandbox, model: &str, format: &str) -> String {
    let out = if let Some(format) = format.strip_prefix("gguf-") { format!("{format}.gguf") } else { format.to_owned() };
    sandbox.osprey(&["export", model, "--format", format, "--out", &out, "--json", "export.json"]).done();
    out
}

/// The report of a comparison whose loss and divergence stay within the format's limits. After so few steps the likeliest token is often
/// a tie that rounding decides, so its agreement, and with it the verdict, is asked for where nothing is rounded but to f16.
fn validate(sandbox: &Sandbox, artifact: &str, against: &str) -> serde_json::Value {
    let arguments =
        ["validate", artifact, "--against", against, "--text", "text.txt", "--document-separator", "---", "--json", "report.json"];
    let ran = sandbox.osprey(&arguments);
    assert!(matches!(ran.code, Some(0 | 1)), "{artifact}: {}{}", ran.out, ran.err);
    let report: serde_json::Value = serde_json::from_slice(&sandbox.read("report.json")).unwrap();
    let number = |place: &serde_json::Value, key: &str| place[key].as_f64().unwrap();
    let gap = number(&report, "nll_per_token") - number(&report, "reference_nll_per_token");
    assert!(gap <= number(&report["limits"], "nll_gap"), "{artifact}: {}", ran.out);
    assert!(number(&report, "kl_mean") <= number(&report["limits"], "kl_mean"), "{artifact}: {}", ran.out);
    assert_eq!(ran.code == Some(0), report["verdict"] == "pass", "{artifact}: {}", ran.out);
    report
}

#[test]
fn a_ternary_model_becomes_every_format_it_can_have_and_passes() {
    let sandbox = trained(&TERNARY);
    for (format, bits) in [
        ("hf", 32.0),
        ("hf-bitnet", 2.0),
        ("gguf-f16", 16.0),
        ("gguf-bf16", 16.0),
        ("gguf-q8_0", 8.5),
        ("gguf-q4_0", 4.5),
        ("gguf-q4_k", 4.5),
        ("gguf-q6_k", 6.5625),
        ("gguf-tq1_0", 1.6875),
        ("gguf-tq2_0", 2.0625),
    ] {
        let out = export(&sandbox, CHECKPOINT, format);
        let written: serde_json::Value = serde_json::from_slice(&sandbox.read("export.json")).unwrap();
        let per_weight = written["bits_per_weight"].as_f64().unwrap();
        assert!(per_weight >= bits && per_weight < 33.0, "{format}: {per_weight} bits per weight");
        if format.starts_with("gguf-tq") {
            let report = validate(&sandbox, &out, CHECKPOINT);
            assert_eq!(report["verdict"], "pass");
        }
        if format == "hf-bitnet" {
            continue; // Its weights are quantized already: this reader says so and refuses.
        }
        sandbox.osprey(&["eval", &out, "--text", "text.txt"]).done();
        // What was read is what was written: the same bytes again. The K formats search for the best scales, and find others.
        if format.starts_with("gguf-") && !format.ends_with("_k") {
            let again = format!("again-{out}");
            sandbox.osprey(&["export", &out, "--format", format, "--out", &again]).done();
            assert!(tensor_bytes(&sandbox.path(&out)) == tensor_bytes(&sandbox.path(&again)), "{format}");
        }
    }
    sandbox.osprey(&["eval", "hf-bitnet", "--text", "text.txt"]).refused(&["hf-bitnet/config.json", "quantized already"]);
    // The file's own codes and scales are those that training computed with: the same logits, bit for bit.
    let [trained, file] = [CHECKPOINT, "tq2_0.gguf"].map(|name| Engine::load(&sandbox.path(name)).unwrap());
    let ids = ids(&file, 40);
    assert_eq!(bits(&logits(&file, &ids)).len(), 40 * 257);
    let report = validate(&sandbox, "tq2_0.gguf", CHECKPOINT);
    assert!(report["kl_mean"].as_f64().unwrap() < 1e-4, "{report}");
    drop(trained);
    let [one, other] = ["tq1_0.gguf", "tq2_0.gguf"].map(|name| logits(&Engine::load(&sandbox.path(name)).unwrap(), &ids));
    assert!(bits(&one) == bits(&other), "tq1_0 and tq2_0 hold the same codes");
}

#[test]
fn a_dense_model_becomes_every_format_it_can_have_and_passes() {
    let sandbox = dense();
    for format in ["hf", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0"] {
        let out = export(sandbox, CHECKPOINT, format);
        let report = validate(sandbox, &out, CHECKPOINT);
        assert!(!["hf", "gguf-f16"].contains(&format) || report["verdict"] == "pass", "{format}: {report}");
    }
    let [one, other] = [CHECKPOINT, "hf"].map(|name| Engine::load(&sandbox.path(name)).unwrap());
    let ids = ids(&one, 50);
    assert!(bits(&logits(&one, &ids)) == bits(&logits(&other, &ids)), "hf holds the weights as they are");
}

#[test]
fn candle_reads_our_gguf_files_to_the_same_weights() {
    let sandbox = dense();
    for format in ["f16", "q8_0", "q4_0"] {
        let path = sandbox.path(&format!("candle-{format}.gguf"));
        sandbox.osprey(&["export", CHECKPOINT, "--format", &format!("gguf-{format}"), "--out", path.to_str().unwrap()]).done();
        let mut file = File::open(&path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let ours = osprey::export::gguf::GgufFile::open(&path).unwrap();
        assert_eq!(content.tensor_infos.len(), ours.tensors.len());
        for info in &ours.tensors {
            let theirs = content.tensor(&mut file, &info.name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            assert_eq!(theirs.dims(), info.shape, "{}", info.name);
            let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
            assert!(bits(&theirs) == bits(&ours.decode(info).unwrap()), "{format}: {}", info.name);
        }
    }
}

/// candle's quantized Llama rounds activations to blocks of 8 bits before it multiplies with q8_0 matrices; with f16 it does not.
#[test]
fn candles_quantized_llama_agrees_with_our_engine() {
    let sandbox = dense();
    for (format, tolerance) in [("f16", 2e-3), ("q8_0", 5e-2)] {
        let path = sandbox.path(&format!("llama-{format}.gguf"));
        sandbox.osprey(&["export", CHECKPOINT, "--format", &format!("gguf-{format}"), "--out", path.to_str().unwrap()]).done();
        let engine = Engine::load(&path).unwrap();
        let ids = ids(&engine, 24);
        let ours = logits(&engine, &ids);
        for length in [1, 7, 24] {
            let mut file = File::open(&path).unwrap();
            let content = gguf_file::Content::read(&mut file).unwrap();
            let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
            let theirs = model.forward(&row(&ids[..length]), 0).unwrap();
            assert_agrees(format, &ours[(length - 1) * 257..length * 257], &theirs, tolerance);
        }
    }
}

#[test]
fn candles_llama_agrees_with_our_engine_on_the_exported_directory() {
    for overrides in [&["model.kv_heads=1"][..], &["model.face=osp"]] {
        let sandbox = trained(overrides);
        export(&sandbox, CHECKPOINT, "hf");
        let engine = Engine::load(&sandbox.path("hf")).unwrap();
        let config: llama::LlamaConfig = serde_json::from_slice(&sandbox.read("hf/config.json")).unwrap();
        let config = config.into_config(false);
        let tensors = candle_core::safetensors::load(sandbox.path("hf/model.safetensors"), &Device::Cpu).unwrap();
        let model = llama::Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config).unwrap();
        let ids = ids(&engine, 24);
        let ours = logits(&engine, &ids);
        for length in [1, 7, 24] {
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            let theirs = model.forward(&row(&ids[..length]), 0, &mut cache).unwrap();
            assert_agrees("hf", &ours[(length - 1) * 257..length * 257], &theirs, 1e-4);
        }
    }
}

fn row(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

fn ids(engine: &Engine, count: usize) -> Vec<u32> {
    let ids = engine.tokenizer().unwrap().encode("Once upon a time a small fox met a large hen. They went to the river.").unwrap();
    ids[..count].to_vec()
}

/// `[ids, vocab]`.
fn logits(engine: &Engine, ids: &[u32]) -> Vec<f32> {
    Session::new(engine, Format::F32, ids.len()).unwrap().prefill_all(ids).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[track_caller]
fn assert_agrees(name: &str, ours: &[f32], theirs: &Tensor, tolerance: f32) {
    let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(ours.len(), theirs.len());
    let largest = |values: &[f32]| (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap();
    assert_eq!(largest(ours), largest(&theirs), "{name}: the likeliest token");
    let off = ours.iter().zip(&theirs).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
    assert!(off < tolerance, "{name}: logits are off by {off}");
}

/// Name, type and data of every tensor of a GGUF file.
fn tensor_bytes(path: &Path) -> Vec<(String, u32, Vec<u8>)> {
    let file = osprey::export::gguf::GgufFile::open(path).unwrap();
    file.tensors.iter().map(|info| (info.name.clone(), info.format_id, file.data(info).unwrap().to_vec())).collect()
}
