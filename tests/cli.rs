//! What users get wrong, each command as it would be typed: exit code 2, one message with its place, its cause and a hint, nothing left
//! half-written. And the list of commands and options, which scripts rely on.

use crate::support::{Ran, Sandbox};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Overrides of the tiny recipe that no run can have, with words of the message.
const RECIPE_MISTAKES: &[(&[&str], &[&str])] = &[
    (&["train.stesp=1"], &["--set train.stesp=1", "unknown key `train.stesp`", "did you mean `steps`?"]),
    (&["train.steps=abc"], &["train.steps", "\"abc\"", "whole number"]),
    (&["train.steps"], &["--set train.steps", "has no `=`"]),
    (&["train.steps=0"], &["train.steps", "0"]),
    (&["train.steps=-3"], &["train.steps", "-3"]),
    (&["train.batch=0"], &["train.batch"]),
    (&["train.batch=1000000"], &["train.batch", "GB"]),
    (&["train.batch=9223372036854775807"], &["train.batch"]),
    (&["train.accumulate=9223372036854775807"], &["train.accumulate"]),
    (&["train.z_loss=nan"], &["train.z_loss"]),
    (&["model.heads=3"], &["model.heads", "dim 64 is not a multiple of heads 3"]),
    (&["model.kv_heads=3"], &["model.kv_heads", "does not divide"]),
    (&["model.head_dim=7"], &["model.head_dim", "odd"]),
    (&["model.dim=0"], &["model.dim"]),
    (&["model.dim=1000000000000"], &["model.dim"]),
    (&["model.dim=65536", "model.layers=4000"], &["GB"]),
    (&["model.layers=9223372036854775807"], &["model.layers"]),
    (&["model.ffn=0"], &["model.ffn"]),
    (&["model.context=0"], &["model.context"]),
    (&["model.context=1000000000000"], &["model.context"]),
    (&["model.norm_eps=nan"], &["model.norm_eps"]),
    (&["model.rope_theta=inf"], &["model.rope_theta"]),
    (&["model.vocab=100"], &["model.vocab", "smaller than the tokenizer's 257 tokens"]),
    (&["model.face=ternary"], &["model.face", "ternary"]),
    (&["model.tied=true", "model.embedding_projection=true"], &["model.tied", "EmbProj"]),
    (&["run.threads=0"], &["run.threads"]),
    (&["run.threads=1000000"], &["run.threads"]),
    (&["run.dir="], &["run.dir"]),
    (&["run.seed=-1"], &["run.seed"]),
    (&["optim.rule=adam"], &["optim.rule", "adamw"]),
    (&["optim.learning_rate=nan"], &["optim.learning_rate"]),
    (&["optim.schedule.wsd.warmup.fraction=2"], &["optim.schedule"]),
    (&["data.prefetch=0"], &["data.prefetch"]),
    (&["data.validation.tail=2"], &["data.validation", "two choices"]),
    (&["data.validation={tail=2.0}"], &["data.validation.tail"]),
    (&["data.tokenizer={file=\"missing.json\"}"], &["missing.json"]),
    (&["data.tokenizer={bpe={vocab=10}}"], &["bpe"]),
    (&["data.sources=[{builtin={documents=0}}]"], &["documents", "0"]),
    (&["data.sources=[{builtin={weight=-1.0}}]"], &["weight"]),
    (&["data.sources=[]"], &["data"]),
    (&["data.sources=[]", "data.path=missing.txt"], &["missing.txt", "no such file"]),
    (&["export.formats=[\"gguf-q9\"]"], &["export.formats", "gguf-q9", "gguf-q8_0"]),
    (&["export.formats=[\"gguf-tq2_0\"]"], &["gguf-tq2_0", "ternary"]),
    (&["model.face=bitnet", "export.formats=[\"gguf-tq2_0\"]"], &["mlp.gate_proj.weight", "64", "256"]),
    (&["model.sub_norm=true", "model.qk_norm=true", "export.formats=[\"gguf-f16\"]"], &["llama.cpp", "SubLN"]),
];

#[test]
fn mistakes_in_a_recipe_are_refused_by_train_and_plan_before_anything_is_written() {
    let sandbox = Sandbox::new();
    let before = sandbox.listing();
    for (overrides, words) in RECIPE_MISTAKES {
        sandbox.train(overrides).refused(words);
        let mut arguments = vec!["plan", "tiny.toml"];
        overrides.iter().for_each(|one| arguments.extend(["--set", *one]));
        assert!(sandbox.osprey(&arguments).refused(words).out.is_empty());
    }
    assert_eq!(sandbox.listing(), before);
}

#[test]
fn mistakes_in_the_recipe_file_name_the_line() {
    let sandbox = Sandbox::new();
    let tiny = sandbox.text("tiny.toml");
    let cases: [(&str, String, &[&str]); 5] = [
        ("unknown.toml", tiny.replace("batch = 4", "batchh = 4"), &["unknown.toml:18:1", "`train.batchh`", "did you mean `batch`?"]),
        ("type.toml", tiny.replace("batch = 4", "batch = \"four\""), &["type.toml:18:9", "train.batch", "\"four\""]),
        ("syntax.toml", tiny.replace("[train]", "[train"), &["syntax.toml:16:"]),
        ("lacking.toml", tiny.replace("dim = 64", ""), &["lacking.toml:", "model.dim", "missing"]),
        ("twice.toml", tiny.replace("batch = 4", "batch = 4\nbatch = 5"), &["twice.toml:19:1", "duplicate"]),
    ];
    for (name, text, words) in cases {
        sandbox.write(name, text);
        for command in ["train", "plan", "data"] {
            sandbox.osprey(&[command, name]).refused(words);
        }
    }
    for command in [&["train", "absent.toml"][..], &["plan", "absent.toml"], &["data", "absent.toml"], &["bench", "train", "absent.toml"]] {
        sandbox.osprey(command).refused(&["absent.toml", "cannot read"]);
    }
    sandbox.write("binary.toml", [0xff, 0xfe, 0]);
    sandbox.osprey(&["train", "binary.toml"]).refused(&["binary.toml", "UTF-8"]);
}

#[test]
fn unusable_texts_are_named_with_the_line() {
    let sandbox = Sandbox::new();
    let files: [(&str, &[u8], &[&str]); 8] = [
        ("empty.txt", b"", &["empty", "no documents"]),
        ("blank.txt", b"<|endoftext|>\n<|endoftext|>\n", &["blank", "no documents"]),
        ("latin.txt", b"fine\ncaf\xe9 \n", &["latin.txt:2", "UTF-8"]),
        ("short.txt", b"a few words", &["data.validation"]),
        ("broken.jsonl", b"{\"text\":\"a\"}\n{\"text\": oops\n", &["broken.jsonl:2", "JSON"]),
        ("field.jsonl", b"{\"txt\":\"a\"}\n", &["field.jsonl:1", "\"text\""]),
        ("number.jsonl", b"{\"text\":1}\n", &["number.jsonl:1"]),
        ("list.jsonl", b"[1]\n", &["list.jsonl:1"]),
    ];
    for (name, content, words) in files {
        sandbox.write(name, content);
        let path = format!("data.path={name}");
        sandbox.train(&["data.sources=[]", &path]).refused(words);
        sandbox.osprey(&["data", "tiny.toml", "--set", "data.sources=[]", "--set", &path]).refused(words);
    }
    assert!(!sandbox.path("run").exists());
    // Documents without text among others are skipped, and counted in the report.
    let mut documents: String = (0..200).map(|n| format!("{{\"text\": \"document {n} of some length\"}}\n")).collect();
    documents += "{\"text\": \"\"}\n";
    sandbox.write("some.jsonl", documents);
    sandbox.train(&["data.sources=[]", "data.path=some.jsonl", "train.steps=1"]).done();
}

#[test]
fn a_cut_or_flipped_shard_is_built_again_and_refused_by_inspect() {
    let sandbox = Sandbox::new();
    sandbox.train(&["train.steps=1"]).done();
    let expected = sandbox.read("run/step-000001/model.safetensors");
    let cache = sandbox.path("data/cache");
    let shards: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).filter(|p| p.is_file()).collect();
    assert_eq!(shards.iter().filter(|path| path.extension().is_some_and(|ending| ending == "tokens")).count(), 2);
    for (number, shard) in shards.iter().enumerate() {
        let whole = std::fs::read(shard).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        for damaged in [&whole[..50], &whole[..whole.len() / 2], &flipped, b"not a shard"] {
            std::fs::write(shard, damaged).unwrap();
            let name = shard.display().to_string();
            sandbox.osprey(&["inspect", &name]).refused(&[&name]);
        }
        let run = format!("run.dir=again-{number}");
        let ran = sandbox.train(&["train.steps=1", &run]);
        if ran.code != Some(0) {
            ran.refused(&[&shard.file_name().unwrap().to_string_lossy()]);
        } else {
            assert_eq!(sandbox.read(&format!("again-{number}/step-000001/model.safetensors")), expected);
        }
        std::fs::write(shard, whole).unwrap();
    }
}

#[test]
fn places_that_cannot_be_written_are_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("file", "");
    for place in ["file", "file/below", "/proc/osprey"] {
        sandbox.train(&[&format!("run.dir={place}")]).refused(&[place]);
        sandbox.train(&[&format!("data.cache={place}")]).refused(&[place]);
    }
    let trained = trained();
    for place in ["file/below", "/proc/osprey.json"] {
        trained.osprey(&["eval", "model.gguf", "--text", "text.txt", "--json", &place.replace("file", "text.txt")]).refused(&["write"]);
        trained.osprey(&["eval", "model.gguf", "--text", "text.txt", "--tokens", &place.replace("file", "text.txt")]).refused(&["create"]);
        trained.osprey(&["export", "model.gguf", "--format", "gguf-f16", "--out", &place.replace("file", "text.txt")]).refused(&[]);
    }
}

#[test]
fn devices_that_are_not_there_are_refused() {
    let sandbox = Sandbox::new();
    for device in ["gpu", "cuda", "cuda:x", ""] {
        sandbox.osprey(&["train", "tiny.toml", "--device", device]).refused(&["--device"]);
    }
    let commands: [&[&str]; 3] = [
        &["eval", "absent", "--text", "absent"],
        &["validate", "absent", "--against", "absent", "--text", "absent"],
        &["generate", "absent"],
    ];
    for command in commands {
        sandbox.osprey(&[command, &["--device", "gpu"]].concat()).refused(&["--device", "cuda:N"]);
    }
    if !cfg!(feature = "cuda") {
        sandbox.osprey(&["train", "tiny.toml", "--device", "cuda:0"]).refused(&["--device", "without CUDA"]);
        for command in commands {
            sandbox.osprey(&[command, &["--device", "cuda:0"]].concat()).refused(&["cuda:0", "without CUDA", "--features cuda"]);
        }
    }
    assert!(!sandbox.path("run").exists());
}

/// A trained model in the forms a MODEL argument can have, made once: `run/step-000008`, `hf`, `model.gguf`.
fn trained() -> &'static Sandbox {
    static TRAINED: OnceLock<Sandbox> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let sandbox = Sandbox::new();
        sandbox.train(&[]).done();
        for (format, out) in [("hf", "hf"), ("gguf-q8_0", "model.gguf")] {
            sandbox.osprey(&["export", "run/step-000008", "--format", format, "--out", out]).done();
        }
        sandbox.write("text.txt", "Once upon a time there was a very short text.");
        sandbox
    })
}

/// A folder with copies of the models.
fn models() -> Sandbox {
    let sandbox = Sandbox::new();
    for name in ["run", "hf", "model.gguf", "text.txt"] {
        sandbox.copy(trained().path(name), name);
    }
    sandbox
}

#[track_caller]
fn eval(sandbox: &Sandbox, model: &str) -> Ran {
    sandbox.osprey(&["eval", model, "--text", "text.txt"])
}

#[test]
fn mistakes_in_evaluation_are_refused() {
    let sandbox = models();
    sandbox.write("empty.txt", " \n\t");
    sandbox.write("latin.txt", b"caf\xe9");
    sandbox.write("broken.jsonl", "{\"text\":");
    let cases: [(&[&str], &[&str]); 18] = [
        (&["--text", "absent.txt"], &["absent.txt"]),
        (&["--text", "empty.txt"], &["empty.txt"]),
        (&["--text", "latin.txt"], &["latin.txt:1", "UTF-8"]),
        (&["--text", "broken.jsonl"], &["broken.jsonl:1"]),
        (&["--text", "text.txt", "--context", "65"], &["--context", "64"]),
        (&["--text", "text.txt", "--context", "18446744073709551615"], &["--context", "64"]),
        (&["--text", "text.txt", "--context", "0"], &["context", "0"]),
        (&["--text", "text.txt", "--context", "1"], &["context", "1"]),
        (&["--text", "text.txt", "--document-separator", ""], &["document-separator"]),
        (&["--text", "text.txt", "--max-documents", "0"], &["max-documents"]),
        (&["--text", "text.txt", "--document-separator", "Once"], &[]),
        (&["--text", "text.txt", "--kv", "int3"], &["kv", "int3", "int8-int4"]),
        (&["--text", "text.txt", "--attention", "sparse"], &["attention", "sparse", "top-k"]),
        (&["--text", "text.txt", "--attention", "top-k=1.5"], &["attention", "top-k=1.5"]),
        (&["--text", "text.txt", "--kv", "int8-int4", "--epsilon", "1.5"], &["epsilon", "1.5"]),
        (&["--text", "text.txt", "--kv", "int8-int4", "--epsilon", "nan"], &["epsilon"]),
        (&["--text", "text.txt", "--kv", "f32", "--epsilon", "0.05"], &["kv", "f32"]),
        (&["--text", "text.txt", "--certificate", "soft"], &["certificate", "soft", "metered"]),
    ];
    for (options, words) in cases {
        for command in [&["eval", "model.gguf"][..], &["validate", "model.gguf", "--against", "hf"]] {
            let ran = sandbox.osprey(&[command, options].concat());
            if words.is_empty() {
                ran.done();
            } else {
                assert!(ran.refused(words).out.is_empty());
            }
        }
    }
    eval(&sandbox, "absent").refused(&["absent"]);
    eval(&sandbox, "text.txt").refused(&["text.txt", "neither a model directory nor a GGUF file"]);
    eval(&sandbox, "run").refused(&["run", "config.json", "step-000008"]);
    sandbox.osprey(&["validate", "model.gguf", "--against", "absent", "--text", "text.txt"]).refused(&["absent"]);
    sandbox.osprey(&["inspect", "absent"]).refused(&["absent"]);
    sandbox.osprey(&["bench", "decode"]).refused(&["no model was given"]);
    sandbox.osprey(&["bench", "train"]).refused(&["no recipe was given"]);
    sandbox.osprey(&["bench", "decode", "absent"]).refused(&["absent"]);
}

#[test]
fn mistakes_in_generation_and_export_are_refused() {
    let sandbox = models();
    let generate = |options: &[&str]| sandbox.osprey(&[&["generate", "model.gguf"], options].concat());
    for (option, value) in [
        ("--temperature", "-1"),
        ("--temperature", "NaN"),
        ("--temperature", "inf"),
        ("--top-p", "0"),
        ("--top-p", "NaN"),
        ("--min-p", "1.5"),
    ] {
        let ran = generate(&["--prompt", "a", &format!("{option}={value}")]);
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains(option.trim_start_matches('-')) && ran.out.is_empty(), "{option}={value}: {}{}", ran.out, ran.err);
    }
    let long = "many words ".repeat(20);
    assert!(generate(&["--prompt", &long]).refused(&["64"]).out.is_empty());
    generate(&[]).done();
    generate(&["--prompt", "a", "--max-tokens", "0"]).done();
    let all = generate(&["--prompt", "a", "--max-tokens", "18446744073709551615", "--temperature", "1"]).done();
    assert!(all.out.chars().count() > 2, "{:?}", all.out);
    let before = sandbox.listing();
    let export = |format: &str, out: &str| sandbox.osprey(&["export", "run/step-000008", "--format", format, "--out", out]);
    export("gguf-q9", "new.gguf").refused(&["gguf-q9", "gguf-q8_0"]);
    export("gguf-tq2_0", "new.gguf").refused(&["gguf-tq2_0", "ternary"]);
    export("hf", "run").refused(&["run"]);
    export("gguf-f16", "hf").refused(&["hf"]);
    assert_eq!(sandbox.listing(), before);
}

/// The end of text that a model without BOS sees as its start does not exist: an empty prompt has nothing to continue.
#[test]
fn an_empty_prompt_needs_a_beginning_of_text() {
    let sandbox = models();
    sandbox.write("hf/tokenizer_config.json", r#"{"add_bos_token": false}"#);
    sandbox.osprey(&["generate", "hf"]).refused(&["prompt"]);
    sandbox.osprey(&["generate", "hf", "--prompt", "a"]).done();
}

#[test]
fn damaged_models_are_refused_by_name() {
    let sandbox = models();
    let damage = |name: &str, bytes: &[u8]| sandbox.write(name, bytes);
    let gguf = sandbox.read("model.gguf");
    for cut in [0, 3, 4, 23, 24, 100, 5000, gguf.len() - 1] {
        damage("model.gguf", &gguf[..cut]);
        eval(&sandbox, "model.gguf").refused(&["model.gguf"]);
    }
    damage("model.gguf", &noise(4096));
    eval(&sandbox, "model.gguf").refused(&["model.gguf"]);
    let weights = sandbox.read("hf/model.safetensors");
    for bytes in [&weights[..0], &weights[..7], &weights[..100], &weights[..weights.len() - 1], &noise(4096)] {
        damage("hf/model.safetensors", bytes);
        eval(&sandbox, "hf").refused(&["hf/model.safetensors"]);
    }
    std::fs::remove_file(sandbox.path("hf/model.safetensors")).unwrap();
    eval(&sandbox, "hf").refused(&["hf/model.safetensors"]);
    damage("hf/model.safetensors", &weights);
    let tokenizer = sandbox.read("hf/tokenizer.json");
    for bytes in [&tokenizer[..0], &tokenizer[..400], b"{}", &noise(400)] {
        damage("hf/tokenizer.json", bytes);
        eval(&sandbox, "hf").refused(&["hf/tokenizer.json"]);
    }
    std::fs::remove_file(sandbox.path("hf/tokenizer.json")).unwrap();
    eval(&sandbox, "hf").refused(&["tokenizer"]);
}

/// A plain Hugging Face file has no checksum: a flipped bit of a weight is a weight, one in the tables must be refused or mean nothing.
#[test]
fn flipped_bits_end_no_reader() {
    let sandbox = models();
    for name in ["model.gguf", "hf/model.safetensors", "hf/config.json", "hf/tokenizer.json"] {
        let good = sandbox.read(name);
        let model = name.split('/').next().unwrap();
        for (number, place) in noise(48).chunks(4).enumerate() {
            let place = u32::from_le_bytes(place.try_into().unwrap()) as usize % good.len().min(6000);
            let mut bad = good.clone();
            bad[place] ^= 1 << (number % 8);
            sandbox.write(name, &bad);
            let ran = eval(&sandbox, model);
            assert!(!ran.err.contains("panicked") && matches!(ran.code, Some(0 | 2)), "{name}, byte {place}: {:?} {}", ran.code, ran.err);
        }
        sandbox.write(name, &good);
    }
}

#[test]
fn a_damaged_checkpoint_is_refused_wherever_it_is_named() {
    let sandbox = models();
    let name = "run/step-000008";
    for file in ["model.safetensors", "optimizer.safetensors", "manifest.json", "data_cursor.json"] {
        let file = format!("{name}/{file}");
        let good = sandbox.read(&file);
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [&good[..good.len() / 2], &flipped] {
            sandbox.write(&file, bad);
            sandbox.osprey(&["train", "tiny.toml", "--resume", name]).refused(&[&file]);
            eval(&sandbox, name).refused(&[&file]);
            sandbox.osprey(&["export", name, "--format", "gguf-f16", "--out", "new.gguf"]).refused(&[&file]);
        }
        sandbox.write(&file, &good);
    }
    sandbox.osprey(&["train", "tiny.toml", "--resume", "run/step-000099"]).refused(&["run/step-000099"]);
    sandbox.osprey(&["train", "tiny.toml", "--resume", "never"]).refused(&["run/step-000008"]);
    sandbox.train(&["train.steps=4"]).refused(&["run/step-000008", "past the recipe's 4"]);
    let before = (sandbox.listing(), sandbox.read("run/recipe.toml"), sandbox.read("run/metrics.jsonl"));
    sandbox.train(&["model.dim=32", "train.steps=9"]).refused(&["run/step-000008"]);
    sandbox.train(&["optim.rule=adamw", "train.steps=9"]).refused(&["optimizer state"]);
    for change in ["run.seed=7", "data.order=crops", "model.context=32", "data.sources=[{builtin={documents=100}}]"] {
        sandbox.train(&[change, "train.steps=9"]).refused(&["data", "other data"]);
    }
    assert!(before == (sandbox.listing(), sandbox.read("run/recipe.toml"), sandbox.read("run/metrics.jsonl")), "something was written");
    assert!(!sandbox.path("new.gguf").exists());
}

#[test]
fn models_of_other_kinds_are_refused() {
    let sandbox = models();
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&sandbox.text("hf/config.json")).unwrap();
    config.remove("osprey");
    let try_with = |key: &str, value: serde_json::Value, words: &[&str]| {
        let mut changed = config.clone();
        changed.insert(key.to_owned(), value);
        sandbox.write("hf/config.json", serde_json::to_vec(&changed).unwrap());
        eval(&sandbox, "hf").refused(&[&["hf"], words].concat());
    };
    try_with("architectures", serde_json::json!(["GPT2LMHeadModel"]), &["config.json", "GPT2LMHeadModel", "LlamaForCausalLM"]);
    try_with("attention_bias", true.into(), &["attention_bias"]);
    try_with("hidden_act", "gelu".into(), &["gelu"]);
    try_with("rope_scaling", serde_json::json!({"rope_type": "yarn"}), &["rope_scaling"]);
    try_with("hidden_size", (-1).into(), &["hidden_size"]);
    try_with("hidden_size", 1_000_000_000_000u64.into(), &["hidden_size"]);
    try_with("num_hidden_layers", 3.into(), &["layers.2"]);
    try_with("vocab_size", 100.into(), &["100"]);
    sandbox.write("hf/config.json", "[]");
    eval(&sandbox, "hf").refused(&["config.json"]);
    sandbox.write("hf/config.json", "{");
    eval(&sandbox, "hf").refused(&["config.json"]);
}

#[test]
fn a_folder_in_use_is_refused_and_a_signal_ends_a_run_whole() {
    let sandbox = Sandbox::new();
    let long = ["train.steps=100000", "eval.every=0", "checkpoint.every=0"];
    let mut child = sandbox.start(&long);
    wait_until(|| sandbox.path("run/metrics.jsonl").is_file_with_bytes());
    sandbox.train(&long).refused(&["run", "another process is training"]);
    // SAFETY: sends a signal to a child that has not been waited for, so its number is still its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let saved: Vec<_> = sandbox.listing().into_iter().filter(|path| path.ends_with("manifest.json")).collect();
    assert_eq!(saved.len(), 1);
    let step = saved[0].parent().unwrap();
    let number: u64 = step.file_name().unwrap().to_str().unwrap()["step-".len()..].parse().unwrap();
    assert_eq!(sandbox.losses("run").len() as u64, number, "the last line is that of the saved step");
    let resumed = sandbox.train(&[&format!("train.steps={}", number + 1), "optim.schedule=constant"]);
    assert!(resumed.code == Some(0) || resumed.err.contains("hint"), "{}", resumed.err);
}

trait HasBytes {
    fn is_file_with_bytes(&self) -> bool;
}

impl HasBytes for std::path::PathBuf {
    fn is_file_with_bytes(&self) -> bool {
        self.metadata().is_ok_and(|found| found.len() > 0)
    }
}

fn wait_until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited for a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A limit on the size of files stands for the full disk: the checkpoint cannot be written, the metrics can.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_earlier_checkpoints_and_the_run_goes_on_from_them() {
    let sandbox = Sandbox::new();
    sandbox.train(&["run.dir=whole"]).done();
    sandbox.copy("whole/step-000004", "run/step-000004");
    let before = sandbox.listing();
    let script = format!("ulimit -f 300; exec {} train tiny.toml", env!("CARGO_BIN_EXE_osprey"));
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", &script]).current_dir(sandbox.path(".")).stdin(Stdio::null());
    Ran::of(limited).refused(&["run/", ".safetensors", "cannot be written", "earlier checkpoints are untouched"]);
    let after = sandbox.listing();
    let new: Vec<_> = after.difference(&before).filter_map(|path| path.file_name()?.to_str()).collect();
    let is_log = |name: &&str| name.starts_with("events.") || [".lock", "metrics.jsonl", "recipe.toml"].contains(name);
    assert!(new.iter().all(is_log), "{new:?}");
    sandbox.train(&[]).done();
    assert_eq!(sandbox.read("run/step-000008/model.safetensors"), sandbox.read("whole/step-000008/model.safetensors"));
}

#[test]
fn a_finished_run_started_again_changes_nothing() {
    let sandbox = models();
    let (manifest, metrics) = (sandbox.read("run/step-000008/manifest.json"), sandbox.read("run/metrics.jsonl"));
    sandbox.train(&[]).done();
    assert_eq!(sandbox.read("run/step-000008/manifest.json"), manifest);
    assert_eq!(sandbox.read("run/metrics.jsonl"), metrics);
}

#[test]
fn every_command_works_on_what_it_is_for() {
    let sandbox = models();
    let run = |arguments: &[&str]| sandbox.osprey(arguments).done();
    assert!(run(&["plan", "tiny.toml", "--json", "plan.json"]).out.contains("parameters"));
    assert!(run(&["data", "tiny.toml", "--json", "data.json"]).out.contains("builtin"));
    assert!(run(&["inspect", "run", "--json", "run.json"]).out.contains("curves.svg"));
    assert!(run(&["inspect", "run/step-000008"]).out.contains("lm_head.weight"));
    assert!(run(&["inspect", "model.gguf"]).out.contains("q8_0"));
    assert!(run(&["inspect", "hf"]).out.contains("lm_head.weight"));
    let mut cache = std::fs::read_dir(sandbox.path("data/cache")).unwrap().map(|entry| entry.unwrap().path());
    let shard = cache.find(|path| path.extension().is_some_and(|ending| ending == "tokens")).unwrap();
    assert!(run(&["inspect", &shard.display().to_string()]).out.contains("documents"));
    let found = run(&["eval", "hf", "--text", "text.txt", "--json", "eval.json", "--tokens", "tokens.jsonl"]);
    assert!(found.out.contains("nll per token") && sandbox.text("tokens.jsonl").lines().count() == 45, "{}", found.out);
    for (file, keys) in [
        ("eval.json", &["nll_per_token", "perplexity", "bits_per_byte", "tokens"][..]),
        ("plan.json", &["parameters", "step_seconds"]),
        ("run.json", &["steps", "val_loss_quantized"]),
        ("data.json", &[]),
    ] {
        let value: serde_json::Value = serde_json::from_slice(&sandbox.read(file)).unwrap();
        keys.iter().for_each(|key| assert!(value.get(key).is_some_and(|found| !found.is_null()), "{file}: {key}"));
    }
    let validate = sandbox.osprey(&["validate", "model.gguf", "--against", "hf", "--text", "text.txt", "--json", "validate.json"]);
    assert!(matches!(validate.code, Some(0 | 1)), "{}", validate.err);
    let value: serde_json::Value = serde_json::from_slice(&sandbox.read("validate.json")).unwrap();
    for key in ["nll_per_token", "reference_nll_per_token", "kl_mean", "top1_agreement", "bits_per_weight", "artifact_bytes", "verdict"] {
        assert!(value.get(key).is_some_and(|found| !found.is_null()), "{key}");
    }
    assert!(run(&["--quiet", "plan", "tiny.toml"]).err.is_empty());
}

#[test]
fn a_model_runs_with_every_cache_and_policy() {
    let sandbox = models();
    let cache = ["--kv", "int8-int4", "--attention", "top-k=0.5", "--epsilon", "0.05", "--certificate", "metered"];
    let validate = ["validate", "hf", "--against", "hf", "--text", "text.txt", "--json", "cache.json"];
    let ran = sandbox.osprey(&[&validate[..], &cache].concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    let value: serde_json::Value = serde_json::from_slice(&sandbox.read("cache.json")).unwrap();
    for key in ["kv_bytes_per_token", "certificate_violations", "pages_promoted"] {
        assert!(value[key].is_number(), "{key}: {value}");
    }
    assert_eq!(
        (&value["certificate_violations"], &value["kv"], &value["attention"]),
        (&0.into(), &"int8-int4".into(), &"top-k=0.5".into())
    );
    // No page is full within a context of 64, so nothing is lost.
    assert_eq!(value["kl_mean"], 0.0);
    let text = |options: &[&str]| {
        let generate = ["generate", "hf", "--prompt", "Once", "--temperature", "0", "--max-tokens", "20"];
        sandbox.osprey(&[&generate[..], options].concat()).done().out
    };
    assert_eq!(text(&cache), text(&["--kv", "f16"]));
    for kv in ["f16", "int8-int4"] {
        for attention in ["dense", "window=64", "quest", "top-k"] {
            sandbox.osprey(&["eval", "model.gguf", "--text", "text.txt", "--kv", kv, "--attention", attention]).done();
        }
    }
}

/// Commands with their arguments and options, which scripts rely on: a change here is a change of the contract.
const COMMANDS: &str = "\
osprey <COMMAND> --help --quiet --version
train <RECIPE> --device --help --json --quiet --replay --resume --set --verify-resume
export <MODEL> --document-separator --format --help --json --max-documents --merge-limit --out --quiet --text
validate <ARTIFACT> --against --attention --certificate --context --device --document-separator --epsilon --help --json --kv --max-documents --quiet --text
eval <MODEL> --attention --certificate --context --device --document-separator --epsilon --help --json --kv --max-documents --quiet --task --text --tokens
generate <MODEL> --attention --certificate --chat --device --epsilon --help --kv --max-tokens --messages --min-p --prompt --quiet --seed --temperature --top-k --top-p
data <RECIPE> --help --json --quiet --set
plan <RECIPE> --help --json --quiet --set
inspect <PATH> --help --json --quiet
doctor --checks-only --help --json --quiet
bench <WHAT> [INPUT] --attention --certificate --compare --context --epsilon --help --json --kv --osp --quiet --set --steps
";

#[test]
fn the_commands_and_their_options_are_those_that_are_known() {
    let sandbox = Sandbox::new();
    let top = sandbox.osprey(&["--help"]).done().out;
    let commands = top.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<String> = commands.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect();
    let mut found = usage("osprey", &top);
    for name in names {
        found += &usage(&name, &sandbox.osprey(&[&name, "--help"]).done().out);
    }
    assert_eq!(found, COMMANDS);
    sandbox.osprey(&["help"]).code.filter(|&code| code == 2).expect("there is no such command");
    assert_eq!(sandbox.osprey(&[]).code, Some(2));
    assert_eq!(sandbox.osprey(&["train"]).code, Some(2));
}

/// One line: the name, the arguments, the options in order.
fn usage(name: &str, help: &str) -> String {
    let line = help.lines().find(|line| line.starts_with("Usage:")).unwrap();
    let words = line.split_whitespace().skip_while(|word| *word != name && !word.ends_with("osprey")).skip(1);
    let arguments = words.filter(|word| (word.starts_with('<') || word.starts_with('[')) && *word != "[OPTIONS]");
    let mut shown: Vec<&str> = arguments.take_while(|word| !word.starts_with("--")).collect();
    let starts = help.lines().filter(|line| line.trim_start().starts_with('-'));
    let mut options: Vec<&str> = starts.filter_map(|line| line.split([' ', ',', '=']).find(|word| word.starts_with("--"))).collect();
    options.sort_unstable();
    // Values of required options follow them in the usage line; they are no arguments.
    shown.retain(|word| !line.contains(&format!("-- {word}")) && !required_value(line, word));
    [vec![name], shown, options].concat().join(" ") + "\n"
}

fn required_value(usage: &str, word: &str) -> bool {
    let words: Vec<&str> = usage.split_whitespace().collect();
    words.windows(2).any(|pair| pair[0].starts_with("--") && pair[1] == word)
}

/// Bytes that look random, the same every time.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(|_| next()).collect()
}
