//! Fine-tuning data through the program and the training step: conversations, masks, tasks.

use crate::support::Sandbox;
use osprey::data::loader::Rows;
use osprey::data::{Batch, Dataset};
use osprey::model::{Config, Decoder, init};
use osprey::ops::cross_entropy::Targets;
use osprey::tape::Tape;
use osprey::train::step;
use std::path::Path;

/// Records of different lengths.
fn records(count: usize) -> String {
    let record = |at: usize| {
        let (asked, said) = ("and again ".repeat(at % 4), "yes ".repeat(1 + at * 7 % 9));
        format!("{{\"prompt\": \"number {at} {}\", \"completion\": \"{}\"}}\n", asked.trim(), said.trim())
    };
    (0..count).map(record).collect()
}

#[test]
fn packed_conversations_have_the_loss_of_single_ones() {
    let sandbox = Sandbox::new();
    sandbox.write("chat.jsonl", records(24));
    let section = format!(
        "cache = {:?}\nvalidation = \"none\"\nsources = [{{ chat = {{ path = {:?}, template = \"plain\" }} }}]",
        sandbox.path("cache"),
        sandbox.path("chat.jsonl")
    );
    let dataset = Dataset::open(&toml::from_str(&section).unwrap(), Path::new("."), &mut |_| ()).unwrap();
    let config = Config { dim: 64, layers: 2, heads: 2, context: 256, ..Config::default() };
    let spec = config.resolve(dataset.tokenizer.vocabulary()).unwrap();
    let parameters = init::initialize(&spec, 3, &candle_core::Device::Cpu).unwrap();
    let decoder = Decoder::new(spec, false);
    let loss = |batch: &Batch| {
        let targets = Targets { ids: &batch.targets, weights: &batch.weights, scale: 1.0, z_loss: 0.0 };
        decoder.loss(&Tape::evaluate(), &parameters, &step::inputs(batch), targets).unwrap().weighted_nll
    };
    let shard = &dataset.train[0].shard;
    let alone: f64 = (0..shard.documents())
        .map(|document| {
            let (tokens, weights) = (shard.document(document), shard.document_weights(document));
            let mut batch = Batch::padding(1, tokens.len() - 1);
            batch.inputs.copy_from_slice(&tokens[..tokens.len() - 1]);
            batch.targets.copy_from_slice(&tokens[1..]);
            batch.weights.copy_from_slice(&weights[1..]);
            batch.document_starts.fill(0);
            batch.positions = (0..tokens.len() as u32 - 1).collect();
            loss(&batch)
        })
        .sum();
    let mut rows = Rows::new(&dataset, 256, 0).unwrap();
    let mut documents = 0;
    let mut packed = 0.0;
    // One pass: rows until every document has come once.
    for row in 0.. {
        if documents == shard.documents() {
            break;
        }
        let batch = rows.batch(row, 1);
        let begins = |&at: &usize| batch.positions[at] == 0 && (batch.weights[at] > 0.0 || batch.targets[at] != 0);
        documents += (0..256).filter(begins).count() as u64;
        packed += loss(&batch);
    }
    assert_eq!(documents, 24);
    assert!((packed - alone).abs() <= 1e-6 * alone, "{packed} {alone}");
}

#[test]
fn conversations_are_trained_on() {
    let sandbox = Sandbox::new();
    sandbox.write("chat.jsonl", records(200));
    let set = ["--set", "data.sources=[{ chat = { path = \"chat.jsonl\", template = \"plain\" } }]", "--set", "model.context=256"];
    let data = sandbox.osprey(&[&["data", "tiny.toml", "--json", "data.json"], &set[..]].concat()).done();
    assert!(data.out.contains("Assistant: ⟦yes") && data.out.contains("190 answers") && !data.out.contains('\x1b'), "{}", data.out);
    let report: serde_json::Value = serde_json::from_slice(&sandbox.read("data.json")).unwrap();
    let found = &report["train"][0]["conversations"];
    assert_eq!((found["stop_tokens"][0]["answers"].as_u64(), found["truncated_answers"].as_u64()), (Some(190), Some(0)));
    sandbox.osprey(&[&["train", "tiny.toml"], &set[..]].concat()).done();
    let losses = sandbox.losses("run");
    assert!(losses.len() == 8 && losses[7] < losses[0], "{losses:?}");
    assert!(sandbox.text("run/step-000008/chat_template.jinja").contains("Assistant: "));
}

#[test]
fn a_model_answers_through_the_template_it_was_trained_with() {
    let sandbox = Sandbox::new();
    sandbox.write("chat.jsonl", records(200));
    let set = ["data.sources=[{ chat = { path = \"chat.jsonl\", template = \"plain\" } }]", "model.context=256", "train.steps=60"];
    let finish = ["export.formats=[\"gguf-f16\",\"hf\"]", "validate.chat=[\"say yes 3\"]", "validate.sample_tokens=24"];
    let ran = sandbox.train(&[&set[..], &finish].concat()).done();
    let asked = ran.out.split_once("asked: say yes 3\n  after: ").expect(&ran.out).1.trim_end().to_owned();
    assert!(asked.contains("yes"), "{asked}");
    sandbox.write("turns.json", r#"[{"role": "user", "content": "say yes 3"}]"#);
    let common = ["--temperature", "0", "--max-tokens", "24"];
    for model in ["run/step-000060", "run/export/hf", "run/export/model-f16.gguf"] {
        let answer = |what: [&str; 2]| sandbox.osprey(&[&["generate", model], &what[..], &common].concat()).done().out;
        assert_eq!(answer(["--chat", "say yes 3"]).trim_end(), asked, "{model}");
        assert_eq!(answer(["--messages", "turns.json"]).trim_end(), asked, "{model}");
    }
    sandbox.write("bad.json", r#"[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]"#);
    let model = "run/step-000060";
    sandbox.osprey(&["generate", model, "--messages", "bad.json"]).refused(&["bad.json:1", "roles out of order"]);
    sandbox.osprey(&["generate", model, "--chat", " "]).refused(&["--chat", "empty"]);
    std::fs::remove_file(sandbox.path("run/export/hf/chat_template.jinja")).unwrap();
    sandbox.osprey(&["generate", "run/export/hf", "--chat", "a"]).refused(&["no chat template", "--prompt"]);
    sandbox.train(&["validate.chat=[\"a\"]", "run.dir=other"]).refused(&["validate.chat", "no chat template", "leave the key out"]);
    assert!(!sandbox.path("other").exists());
}

#[test]
fn conversations_that_cannot_be_trained_leave_nothing_behind() {
    let sandbox = Sandbox::new();
    let before = sandbox.listing();
    for (content, template, words) in [
        ("{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n", "plain", &["chat.jsonl:2", "hint"][..]),
        ("{\"prompt\": \"a\", \"completion\": \"b\"}\n", "chatml", &["chat.jsonl:1", "no special token"]),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"b\"}]}\n", "plain", &["chat.jsonl:1", "roles out of order"]),
    ] {
        sandbox.write("chat.jsonl", content);
        let set = format!("data.sources=[{{ chat = {{ path = \"chat.jsonl\", template = \"{template}\" }} }}]");
        for command in ["data", "train"] {
            sandbox.osprey(&[command, "tiny.toml", "--set", &set]).refused(words);
        }
        std::fs::remove_file(sandbox.path("chat.jsonl")).unwrap();
        assert_eq!(sandbox.listing(), before);
        assert!(!sandbox.path("data").exists());
    }
}

#[test]
fn tasks_are_scored() {
    let sandbox = Sandbox::new();
    sandbox.train(&["train.steps=2"]).done();
    let questions = "{\"query\": \"It is\", \"choices\": [\"red\", \"blue\"], \"gold\": 0}\n{\"query\": \"It is\", \"choices\": [\"red\", \"blue\"], \"gold\": 1}\n";
    sandbox.write("task.jsonl", questions);
    sandbox.write("text.txt", "Once upon a time.");
    let model = "run/step-000002";
    let ran = sandbox.osprey(&["eval", model, "--task", "two=task.jsonl", "--json", "eval.json"]).done();
    assert!(ran.out.contains("50.00%"), "{}", ran.out);
    let found: serde_json::Value = serde_json::from_slice(&sandbox.read("eval.json")).unwrap();
    assert_eq!(
        (found["accuracy"].as_f64(), found["n"].as_u64(), found["tasks"]["two"]["stderr"].as_f64()),
        (Some(0.5), Some(2), Some(0.5))
    );
    let both = [
        "eval",
        model,
        "--task",
        "a=task.jsonl",
        "--task",
        "b=task.jsonl",
        "--text",
        "text.txt",
        "--max-documents",
        "1",
        "--json",
        "eval.json",
    ];
    sandbox.osprey(&both).done();
    let found: serde_json::Value = serde_json::from_slice(&sandbox.read("eval.json")).unwrap();
    assert_eq!((found["tasks"]["b"]["n"].as_u64(), found.get("accuracy")), (Some(1), None));
    assert!(found["nll_per_token"].is_f64());
    sandbox.write("bad.jsonl", format!("{questions}{{}}\n"));
    for (task, words) in
        [("two", &["--task", "NAME=FILE"][..]), ("two=absent.jsonl", &["absent.jsonl"]), ("two=bad.jsonl", &["bad.jsonl:3", "no field"])]
    {
        sandbox.osprey(&["eval", model, "--task", task]).refused(words);
    }
    sandbox.osprey(&["eval", model, "--task", "a=task.jsonl", "--task", "a=task.jsonl"]).refused(&["given twice"]);
    sandbox.osprey(&["eval", model]).refused(&["--text"]);
    sandbox.osprey(&["eval", model, "--task", "a=task.jsonl", "--tokens", "tokens.jsonl"]).refused(&["--text"]);
}
