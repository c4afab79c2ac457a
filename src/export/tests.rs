//! Whole exports: written, read back by this crate and by candle, and compared.

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};

use super::import::{Loaded, load_any};
use super::testing::{flat, spec, ternary_spec, weights};
use super::*;
use crate::model::LinearKind;
use crate::ops::cpu::ternary::{ternary_code, weight_scale};

const STORY: &str = "Once upon a time, there was a little girl named Lily.";

fn face() -> Spec {
    Spec { vocab: 260, dim: 64, head_dim: 16, ffn: 96, ..spec() }
}

fn exported(spec: &Spec, target: Target) -> (tempfile::TempDir, PathBuf, Report, Loaded) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    let tokenizer = Tokenizer::byte();
    let tokenizer = (spec.vocab >= tokenizer.vocabulary()).then_some(&tokenizer);
    let source = Source { spec, weights: &weights(spec), tokenizer, ternary: TernaryWeights::Master, name: "test" };
    let report = export(&source, target, &path).unwrap();
    let loaded = load_any(&path).unwrap();
    (folder, path, report, loaded)
}

#[test]
fn dense_exports_come_back_within_their_formats_error() {
    for (target, limit) in
        [(Target::Hf, 0.0), (Target::GgufF16, 5e-4), (Target::GgufBf16, 4e-3), (Target::GgufQ8_0, 8e-3), (Target::GgufQ4_0, 0.13)]
    {
        for spec in [face(), Spec { qk_norm: true, tied: true, ..face() }] {
            let (_folder, _, report, loaded) = exported(&spec, target);
            assert_eq!(loaded.spec, spec);
            assert_eq!(loaded.tokenizer.as_ref().unwrap().encode(STORY).unwrap().len(), STORY.len());
            let originals = weights(&spec);
            for (name, parameter) in &loaded.parameters {
                let (stored, original) = (parameter.to_vec().unwrap(), flat(&originals[name]));
                assert!(stored.iter().zip(&original).all(|(a, b)| (a - b).abs() <= limit * 1.2), "{name} {}", report.format);
            }
            assert!(report.tensors.iter().all(|tensor| tensor.relative_error <= f64::from(limit)), "{report:?}");
        }
    }
}

#[test]
fn sizes_and_notes_are_reported() {
    let (_folder, path, report, _) = exported(&face(), Target::GgufQ8_0);
    assert_eq!(report.artifact_bytes, fs::metadata(&path).unwrap().len());
    assert_eq!(report.block_bits_per_weight, 8.5);
    assert_eq!(report.architecture, "llama");
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let (_folder, _, odd, _) = exported(&spec(), Target::GgufQ8_0);
    assert!(odd.notes.iter().any(|note| note.contains("f32")) && odd.notes.iter().any(|note| note.contains("no tokenizer")));
}

#[test]
fn ternary_exports_keep_codes_and_the_trained_scale() {
    let spec = ternary_spec();
    let originals = weights(&spec);
    for target in [Target::GgufTq2_0, Target::GgufTq1_0] {
        let (_folder, path, report, loaded) = exported(&spec, target);
        assert_eq!(loaded.spec.linear, LinearKind::Ternary);
        assert!(report.block_bits_per_weight < 2.1);
        for (name, parameter) in loaded.parameters.iter().filter(|(name, _)| name.ends_with("_proj.weight")) {
            let original = flat(&originals[name]);
            let scale = weight_scale(&original);
            let expected: Vec<i8> = original.iter().map(|&weight| ternary_code(weight, scale.to_f32())).collect();
            assert_eq!(parameter.ternary(name).unwrap(), (expected, scale), "{name}");
        }
        // Exporting what was imported gives the same file: nothing is re-derived.
        let weights = loaded.weights().unwrap();
        let again = path.with_extension("again");
        let source =
            Source { spec: &loaded.spec, weights: &weights, tokenizer: loaded.tokenizer.as_ref(), ternary: loaded.ternary, name: "test" };
        export(&source, target, &again).unwrap();
        assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap());
    }
}

#[test]
fn ternary_models_become_dense_where_the_format_is() {
    let spec = ternary_spec();
    let originals = weights(&spec);
    for target in [Target::Hf, Target::GgufF16] {
        let (_folder, _, report, loaded) = exported(&spec, target);
        assert_eq!((loaded.spec.linear, loaded.spec.embedding_projection), (LinearKind::Dense, false));
        assert!(report.notes[0].contains("scale times code"));
        let name = "model.layers.1.self_attn.q_proj.weight";
        let (codes, scale) = ternary::codes(name, &flat(&originals[name]), TernaryWeights::Master).unwrap();
        assert_eq!(loaded.parameters[name].to_vec().unwrap(), gguf_model::dequantized(&codes, scale));
    }
}

#[test]
fn packed_directories_hold_codes_and_multipliers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let spec = ternary_spec();
    let source = Source { spec: &spec, weights: &weights(&spec), tokenizer: None, ternary: TernaryWeights::Master, name: "test" };
    let report = export(&source, Target::HfBitnet, &path).unwrap();
    assert!(report.block_bits_per_weight < 2.01);
    let stored = candle_core::safetensors::load(path.join("model.safetensors"), &Device::Cpu).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    assert_eq!((stored[name].dtype(), stored[name].dims()), (DType::U8, &[spec.ffn / 4, spec.dim][..]));
    let scale = weight_scale(&flat(&source.weights[name])).to_f32();
    assert_eq!(flat(&stored[&format!("{name}_scale")]), [scale]);
    let config: serde_json::Value = serde_json::from_str(&fs::read_to_string(path.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["linear_class"], "autobitlinear");
}

#[test]
fn bitnet_files_have_sub_norms_and_no_head() {
    let spec = Spec { sub_norm: true, tied: true, embedding_projection: false, ..ternary_spec() };
    let (_folder, path, report, loaded) = exported(&spec, Target::GgufTq2_0);
    assert_eq!(report.architecture, "bitnet");
    assert!(loaded.spec.sub_norm && loaded.spec.tied);
    let file = gguf::GgufFile::open(&path).unwrap();
    assert!(file.tensor("output.weight").is_none() && file.tensor("blk.1.ffn_sub_norm.weight").is_some());
}

/// candle's reader is the second opinion on container and codecs.
#[test]
fn candle_reads_the_same_values() {
    let formats = [Target::GgufF16, Target::GgufBf16, Target::GgufQ8_0, Target::GgufQ4_0, Target::GgufQ4K, Target::GgufQ6K];
    for target in formats {
        let wide = Spec { dim: 256, head_dim: 64, ffn: 512, ..face() };
        let (_folder, path, _, _) = exported(&wide, target);
        let ours = gguf::GgufFile::open(&path).unwrap();
        let mut reader = fs::File::open(&path).unwrap();
        let theirs = Content::read(&mut reader).unwrap();
        assert_eq!(theirs.tensor_infos.len(), ours.tensors.len());
        for info in &ours.tensors {
            let tensor = theirs.tensor(&mut reader, &info.name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            assert_eq!(tensor.dims(), info.shape);
            assert_eq!(flat(&tensor), ours.decode(info).unwrap(), "{} {}", info.name, target.name());
        }
        assert_eq!(theirs.metadata["llama.block_count"].to_u32().unwrap(), 2);
    }
}

#[test]
fn files_without_our_own_keys_are_understood() {
    let divisors = (0..face().head_dim / 2).map(|i| 1.0 + 0.5 * i as f32).collect();
    for (spec, target) in [
        (face(), Target::GgufF16),
        (ternary_spec(), Target::GgufTq2_0),
        (Spec { tied: true, qk_norm: true, ..face() }, Target::GgufQ8_0),
        (Spec { rope_scaling: Some(crate::model::RopeScaling::Divisors(divisors)), ..face() }, Target::GgufF16),
    ] {
        let (_folder, path, _, ours) = exported(&spec, target);
        let file = gguf::GgufFile::open(&path).unwrap();
        let mut metadata = gguf::Metadata::default();
        file.metadata
            .entries()
            .iter()
            .filter(|(key, _)| !key.starts_with("osprey."))
            .for_each(|(key, value)| metadata.set(key.clone(), value.clone()));
        let entries: Vec<_> = file
            .tensors
            .iter()
            .map(|info| gguf::TensorEntry { name: info.name.clone(), shape: info.shape.clone(), format: info.format().unwrap() })
            .collect();
        let foreign = path.with_extension("foreign");
        gguf::write(
            &foreign,
            &metadata,
            &entries,
            |index, bytes| {
                bytes.extend(file.data(&file.tensors[index])?);
                Ok(())
            },
            |_| Ok(()),
        )
        .unwrap();
        let theirs = load_any(&foreign).unwrap();
        // Epsilon travels as f32.
        assert_eq!(Spec { norm_eps: ours.spec.norm_eps, ..theirs.spec.clone() }, ours.spec);
        assert!((theirs.spec.norm_eps - ours.spec.norm_eps).abs() < 1e-12);
        assert!(ours.parameters.iter().all(|(name, parameter)| parameter.bytes() == theirs.parameters[name].bytes()));
    }
}

#[test]
fn bad_weights_and_places_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    let (spec, tokenizer) = (face(), Tokenizer::byte());
    let attempt = |weights: &Weights, spec: &Spec, target| {
        let source = Source { spec, weights, tokenizer: Some(&tokenizer), ternary: TernaryWeights::Master, name: "test" };
        export(&source, target, &path).unwrap_err()
    };
    let good = weights(&spec);
    let name = "model.layers.0.mlp.up_proj.weight";
    let with = |value: f32| {
        let mut changed = good.clone();
        let mut values = flat(&good[name]);
        values[5] = value;
        changed.insert(name.into(), Tensor::from_vec(values, good[name].dims(), &Device::Cpu).unwrap());
        changed
    };
    assert!(attempt(&with(f32::NAN), &spec, Target::Hf).to_string().contains(name));
    assert!(attempt(&with(1e6), &spec, Target::GgufF16).hint().unwrap().contains("bf16"));
    assert!(attempt(&with(1e8), &spec, Target::GgufQ8_0).to_string().contains("outside the range"));
    let mut missing = good.clone();
    missing.remove(name);
    assert!(attempt(&missing, &spec, Target::GgufQ4_0).to_string().contains("missing"));
    let small = Spec { vocab: 100, ..spec.clone() };
    assert!(attempt(&weights(&small), &small, Target::GgufF16).to_string().contains("257 tokens, the model has 100"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("notes.txt"), "mine").unwrap();
    assert!(attempt(&good, &spec, Target::Hf).to_string().contains("already exists"));
    assert!(attempt(&good, &spec, Target::GgufF16).to_string().contains("artifact"));
    assert_eq!(fs::read_to_string(path.join("notes.txt")).unwrap(), "mine");
}

#[test]
fn what_is_no_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("story.txt");
    assert!(load_any(&path).unwrap_err().to_string().contains("story.txt"));
    fs::write(&path, STORY).unwrap();
    assert!(load_any(&path).unwrap_err().hint().unwrap().contains(".gguf"));
    assert!(load_any(folder.path()).unwrap_err().to_string().contains("config.json"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_models_never_panic(edits in proptest::collection::vec((0usize..4000, proptest::num::u8::ANY), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("artifact");
        let source = Source { spec: &spec(), weights: &weights(&spec()), tokenizer: None, ternary: TernaryWeights::Master, name: "test" };
        export(&source, Target::GgufQ8_0, &path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in edits {
            bytes[at] = value;
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(loaded) = load_any(&path) {
            loaded.weights().unwrap();
        }
    }
}
