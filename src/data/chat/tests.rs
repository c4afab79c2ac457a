//! Against transformers' output (tests/fixtures/chat), and the whole way from records to batches.

use super::*;
use crate::data::loader::Rows;
use crate::data::{Dataset, config};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat").join(name)
}

struct Cases {
    json: Value,
}

impl Cases {
    fn read() -> Self {
        Self { json: serde_json::from_str(&std::fs::read_to_string(fixture("cases.json")).unwrap()).unwrap() }
    }

    fn list(&self) -> &[Value] {
        self.json["cases"].as_array().unwrap()
    }

    fn template(&self, case: &Value) -> Template {
        let name = case["template"].as_str().unwrap();
        let entry = &self.json["templates"][name];
        let specials = ["bos_token", "eos_token"].iter().filter_map(|key| Some(((*key).to_owned(), entry[*key].as_str()?.to_owned())));
        let text = Text { name: name.into(), text: entry["text"].as_str().unwrap().into() };
        Template::new(&text, specials.collect(), Date::parse(self.json["date"].as_str().unwrap())).unwrap()
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let cases = Cases::read();
    for case in cases.list() {
        let template = cases.template(case);
        let messages = case["messages"].as_array().unwrap();
        // transformers leaves out what is null.
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                message
                    .as_object()
                    .unwrap()
                    .iter()
                    .filter(|(_, value)| !value.is_null())
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect::<files::Record>()
                    .into()
            })
            .collect();
        for (expected, found) in [
            (&case["text"], template.render(&messages, &case["tools"], false)),
            (&case["prompt"], template.render(&messages[..messages.len() - 1], &case["tools"], true)),
        ] {
            match expected.as_str() {
                Some(text) => assert_eq!(found.as_deref(), Ok(text), "{}", case["template"]),
                None => {
                    let error = found.unwrap_err();
                    assert!(error.contains(expected["error"].as_str().unwrap()), "{error}");
                }
            }
        }
    }
}

#[test]
fn masks_are_those_of_the_generation_tags() {
    let cases = Cases::read();
    let tokenizer = Tokenizer::load(&fixture("tokenizer.json")).unwrap();
    let mut compared = 0;
    for case in cases.list().iter().filter(|case| case["ids"].is_array()) {
        let record: files::Record = case.as_object().unwrap().clone();
        let Ok(conversation) = Records::Messages.read(&record) else { continue };
        let template = cases.template(case);
        let stops = tokenizer.special_pieces().into_iter().filter(|piece| piece != template.special("bos_token")).collect();
        let rendered = match Renderer::new(&template, stops, Train::Answers).render(&conversation) {
            Ok(rendered) => rendered,
            // These print nothing of a call: an empty turn is not to be learned.
            Err(fault) => {
                assert!(
                    fault.cause.contains("prints nothing of turn") && ["chatml", "gemma"].contains(&case["template"].as_str().unwrap()),
                    "{fault:?}"
                );
                continue;
            }
        };
        let document = document(&tokenizer, &rendered).unwrap();
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let mask: String = document.weights.iter().map(|&weight| if weight > 0.0 { '1' } else { '0' }).collect();
        assert_eq!(document.tokens, ids);
        assert_eq!(mask, case["mask"].as_str().unwrap(), "{} {}\n{:?}", case["template"], rendered.text, rendered.spans);
        compared += 1;
    }
    assert!(compared > 25, "{compared}");
}

fn open(records: &str, options: &str) -> crate::error::Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jsonl");
    std::fs::write(&path, records).unwrap();
    let section = format!("validation = \"none\"\nsources = [{{ chat = {{ path = {path:?}, {options} }} }}]");
    let mut config: config::Config = toml::from_str(&section).unwrap();
    config.cache = folder.path().join("cache");
    let dataset = Dataset::open(&config, Path::new("."), &mut |_| ());
    assert!(dataset.is_ok() || !config.cache.exists(), "a refused source leaves nothing behind");
    // The shard stays mapped after its folder is gone.
    dataset
}

/// The first document with trained tokens in brackets.
fn masked(dataset: &Dataset) -> String {
    let shard = &dataset.train[0].shard;
    let mut out = String::new();
    let mut inside = false;
    for (&token, &weight) in shard.document(0).iter().zip(&shard.document_weights(0)) {
        if (weight > 0.0) != inside {
            inside = !inside;
            out.push(if inside { '[' } else { ']' });
        }
        out += &if dataset.tokenizer.is_special(token) {
            dataset.tokenizer.piece(token).unwrap()
        } else {
            dataset.tokenizer.decode(&[token]).unwrap()
        };
    }
    if inside { out + "]" } else { out }
}

const TWO_TURNS: &str = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}]}"#;

#[test]
fn answers_and_their_ends_are_trained() {
    let end = "<|endoftext|>";
    let plain = |options: &str| masked(&open(TWO_TURNS, options).unwrap());
    assert_eq!(plain("template = \"plain\""), format!("{end}User: Hi\nAssistant: [Yo{end}]\nUser: Bye\nAssistant: [See you{end}]\n"));
    let last = format!("{end}User: Hi\nAssistant: Yo{end}\nUser: Bye\nAssistant: [See you{end}]\n");
    assert_eq!(plain("template = \"plain\", train = \"last-answer\""), last);
    let all = format!("[{end}User: Hi\nAssistant: Yo{end}\nUser: Bye\nAssistant: See you{end}]\n");
    assert_eq!(plain("template = \"plain\", train = \"everything\""), all);
    assert_eq!(plain("template = \"raw\""), format!("{end}Hi[Yo{end}]Bye[See you{end}]"));
    let alpaca =
        format!("{end}### Instruction:\nHi\n\n### Response:\n[Yo{end}]\n\n### Instruction:\nBye\n\n### Response:\n[See you{end}]\n\n");
    assert_eq!(plain("template = \"alpaca\""), alpaca);
}

#[test]
fn weights_of_turns_are_the_weights_of_their_tokens() {
    let record = r#"{"messages": [{"role": "user", "content": "Hi", "weight": 0.5}, {"role": "assistant", "content": "Yo", "weight": 2}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you", "weight": 0}]}"#;
    let dataset = open(record, "template = \"plain\"").unwrap();
    let (tokens, weights) = (dataset.train[0].shard.document(0), dataset.train[0].shard.document_weights(0));
    let of = |text: &str, at: usize| {
        let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
        let starts: Vec<usize> = (0..tokens.len()).filter(|&start| tokens[start..].starts_with(&bytes)).collect();
        weights[starts[at]..starts[at] + bytes.len()].to_vec()
    };
    assert_eq!((of("Hi", 0), of("Yo", 0), of("Bye", 0), of("See you", 0)), (vec![0.5; 2], vec![2.0; 2], vec![0.0; 3], vec![0.0; 7]));
    let everything = open(record, "template = \"plain\", train = \"everything\"").unwrap();
    let weights = everything.train[0].shard.document_weights(0);
    assert_eq!(
        (weights[0], weights.iter().filter(|&&weight| weight == 0.5).count(), weights.iter().filter(|&&weight| weight == 2.0).count()),
        (1.0, 2, 3)
    );
}

#[test]
fn mistakes_name_file_and_line() {
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    let second = |line: &str, options: &str| {
        let error = open(&format!("{good}\n\n{line}\n"), options).unwrap_err();
        assert!(error.hint().is_some() && error.exit_code() == 2, "{error}");
        error.to_string()
    };
    let plain = "template = \"plain\"";
    assert!(second("{", plain).contains("chat.jsonl:3: not JSON"));
    assert!(second(r#"{"prompt": "a"}"#, plain).contains("chat.jsonl:3: there is no prompt with its completion"));
    assert!(second(r#"{"prompt": "a", "completion": " "}"#, plain).contains("chat.jsonl:3: turn 2 (assistant) is empty"));
    assert!(second(r#"{"messages": []}"#, plain).contains("chat.jsonl:3"));
    let weightless =
        r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b", "weight": 0}]}"#;
    assert!(second(weightless, plain).contains("chat.jsonl:3: no token of this record is trained"));
    // The byte vocabulary has no <|im_end|>.
    let error = second(good, "template = \"chatml\"");
    assert!(error.contains("chat.jsonl:1: after turn 2 (assistant) the built-in template chatml prints no special token"), "{error}");
    let error = second(good, "");
    assert!(error.contains("this tokenizer has no chat template"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = |text: &str| {
        std::fs::write(folder.path().join("t.jinja"), text).unwrap();
        second(good, &format!("template.file = {:?}", folder.path().join("t.jinja")))
    };
    let failing = file("{{ bos_token }}\n{% if messages[0].content == 'a' %}{{ raise_exception('no a') }}{% endif %}");
    assert!(failing.contains("chat.jsonl:1: ") && failing.contains("t.jinja fails: line 2: no a"), "{failing}");
    assert!(file("{% for %}").contains("t.jinja: line 1"));
    let lost = file("{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}{{ eos_token }}");
    assert!(lost.contains("cannot be split into turns"), "{lost}");
    assert!(second(good, "template = \"plain\", date = \"today\"").contains("\"today\" is not a day"));
}

#[test]
fn records_become_rows() {
    let records: String =
        (0..40).map(|at| format!("{{\"prompt\": \"count to {at}\", \"completion\": \"{}\"}}\n", "1 ".repeat(at + 1).trim())).collect();
    let dataset = open(&records, "template = \"plain\"").unwrap();
    assert!(dataset.tokenizer.files().iter().any(|(name, text)| name == "chat_template.jinja" && text.contains("Assistant: ")));
    let mut rows = Rows::new(&dataset, 128, 5).unwrap();
    let batch = rows.batch(0, 64);
    let share = batch.trained_tokens() as f64 / (64.0 * 128.0);
    assert!((0.2..0.8).contains(&share), "{share}");
    assert_eq!(rows.batch(7, 1).inputs, batch.inputs[7 * 128..8 * 128]);
    let error = Rows::new(&dataset, 8, 5).unwrap_err().to_string();
    assert!(error.contains("the mask is empty"), "{error}");
}

#[test]
fn the_sets_of_the_corpora_are_read() {
    let Some(model) = crate::data::testing::corpora("weights/stories260K-hf") else { return };
    for name in [
        "alpaca_en_1k.json",
        "chat_loss_weights.jsonl",
        "codegen_instruct.json",
        "dolly_hhrlhf_small.jsonl",
        "dummy_conversation.json",
        "gsm8k_train.jsonl",
        "instructions_1100.json",
        "kto_messages_300.json",
        "toolcall_300.json",
    ] {
        let Some(path) = crate::data::testing::corpora(&format!("sft/{name}")) else { return };
        let section = format!("path = {path:?}\ntemplate = \"plain\"");
        let config: Config = toml::from_str(&section).unwrap();
        let chat = config.open(&TokenizerConfig::File(model.clone()), Path::new(".")).unwrap();
        let documents = chat.documents(&Tokenizer::load(&model).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(documents.len() >= 250 && documents.iter().all(|document| document.weights.contains(&1.0)), "{name}");
    }
}

#[test]
fn a_report_shows_the_mask() {
    let double = r#"{"prompt": "<|endoftext|>a", "completion": "b"}"#;
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"b\"}}", "a ".repeat(200));
    let cut = format!("{{\"prompt\": \"a\", \"completion\": \"{}\"}}", "b ".repeat(200).trim());
    let turns = r#"{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}], "completion": "See you"}"#;
    let dataset = open(&[double, &long, &cut, turns].join("\n"), "template = \"raw\"").unwrap();
    let report = crate::data::report(&dataset, 2, 128, 0, 2).unwrap();
    let found = report.train[0].conversations.clone().unwrap();
    assert_eq!((found.answers, found.truncated_answers, found.left_out, found.double_bos, found.missing_bos), (5, 2, 1, 1, 0));
    assert_eq!((found.stop_tokens[0].answers, found.stop_tokens[0].is_eos, found.answers_without_stop), (5, true, 0));
    // Two rows of 128: the long answer alone, and the two short conversations of 4 and 16 pairs.
    assert!((found.padding_share - 108.0 / 256.0).abs() < 1e-9, "{}", found.padding_share);
    assert_eq!((report.batch.documents, report.batch.padding_tokens, report.batch.trained_tokens), (3, 108, 127 + 2 + 3 + 8));
    let text = report.to_string();
    assert!(text.contains("Hi⟦Yo<|endoftext|>⟧Bye⟦See you<|endoftext|>⟧\n"), "{text}");
    assert!(
        text.contains("warning: 1 conversations begin") && text.contains("stop token <|endoftext|> is trained after 5 answers"),
        "{text}"
    );
    assert!(report.render(true).contains("\x1b[32mYo<|endoftext|>\x1b[0m"));
    assert_eq!(serde_json::to_value(&report).unwrap()["train"][0]["conversations"]["truncated_answers"], 2);
}
