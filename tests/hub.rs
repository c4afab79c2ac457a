//! Models by name: from a cache, and from a server on this machine that answers as the hub does.

use crate::support::{Ran, Sandbox};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model; refuses another one, and knows no more.
struct Server {
    endpoint: String,
    /// The paths that were asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Serves the files of `folder` as `org/model`.
    fn start(folder: &Path) -> Self {
        let files: BTreeMap<String, Vec<u8>> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(vec![]));
        let (files, log) = (Arc::new(files), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (Arc::clone(&files), Arc::clone(&log));
                std::thread::spawn(move || serve(&stream, &files, &log));
            }
        });
        Self { endpoint, asked }
    }
}

/// Answers the requests of one connection.
fn serve(stream: &TcpStream, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut lines = vec![];
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_owned());
        }
        let path = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
        let header = |name: &str| {
            let found = lines.iter().find_map(|line| line.split_once(": ").filter(|(key, _)| key.eq_ignore_ascii_case(name)));
            found.map(|(_, value)| value.to_owned())
        };
        let answer = answer(&path, header("range"), header("authorization"), files);
        log.lock().unwrap().push(path);
        let mut stream = stream;
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

fn answer(path: &str, range: Option<String>, token: Option<String>, files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let plain = |status: &str, body: &str| format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
    if path.contains("/gated") && token.as_deref() != Some("Bearer secret") {
        return plain("401 Unauthorized", "");
    }
    if path.contains("/broken") {
        return plain("503 Service Unavailable", "");
    }
    if path == "/api/models/org/model/revision/main" {
        let names: Vec<String> = files.keys().map(|name| format!("{{\"rfilename\": \"{name}\"}}")).collect();
        return plain("200 OK", &format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(", ")));
    }
    if path == "/api/models/org/pickled/revision/main" {
        return plain("200 OK", &format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"pytorch_model.bin\"}}]}}"));
    }
    let found = path.strip_prefix("/org/model/resolve/main/").and_then(|name| Some((name, files.get(name)?)));
    let Some((name, bytes)) = found else { return plain("404 Not Found", "") };
    let range = range.unwrap_or("bytes=0-".to_owned());
    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let last = last.parse().unwrap_or(bytes.len() - 1);
    let body = &bytes[first..=last];
    let mut answer = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\nETag: \"{name}-1\"\r\nX-Repo-Commit: {COMMIT}\r\n\r\n",
        body.len(),
        bytes.len()
    )
    .into_bytes();
    answer.extend_from_slice(body);
    answer
}

/// A command that may ask `server`.
fn online(sandbox: &Sandbox, server: &Server, token: Option<&str>, arguments: &[&str]) -> Ran {
    let mut command = sandbox.command(arguments);
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.endpoint).env("NO_PROXY", "127.0.0.1");
    for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(proxy);
    }
    if let Some(token) = token {
        command.env("HF_TOKEN", token);
    }
    Ran::of(command)
}

#[test]
fn a_base_is_downloaded_once_trained_on_and_named_in_the_adapter() {
    let sandbox = Sandbox::new();
    sandbox.train(&["run.dir=base"]).done();
    let server = Server::start(&sandbox.path("base/step-000008"));
    let generate = ["generate", "org/model", "--prompt", "Once", "--max-tokens", "4", "--temperature", "0"];
    sandbox.osprey(&generate).refused(&["org/model", "HF_HUB_OFFLINE"]);
    let first = online(&sandbox, &server, None, &generate).done();
    let requests = server.asked.lock().unwrap().len();
    assert!(requests > 3);
    let local = sandbox.osprey(&["generate", "base/step-000008", "--prompt", "Once", "--max-tokens", "4", "--temperature", "0"]).done();
    assert_eq!(first.out, local.out);
    // Only what a model is made of was fetched; from now on nothing is asked.
    let asked = server.asked.lock().unwrap().join(" ");
    assert!(asked.contains("model.safetensors") && !asked.contains("optimizer"), "{asked}");
    assert_eq!(sandbox.osprey(&generate).done().out, first.out);

    let tiny = sandbox.text("tiny.toml");
    let (start, end, schedule) = (tiny.find("[model]").unwrap(), tiny.find("[data]").unwrap(), tiny.find("schedule.wsd").unwrap());
    let finetune = "[finetune]\nbase = \"org/model\"\nlora = { rank = 4 }\n\n";
    sandbox.write("tune.toml", format!("{}{finetune}{}", &tiny[..start], &tiny[end..schedule]));
    sandbox.osprey(&["train", "tune.toml", "--set", "train.steps=4", "--set", "export.formats=[\"peft\",\"gguf-q8_0\"]"]).done();
    for adapter in ["run/step-000004", "run/export/peft"] {
        let config: serde_json::Value = serde_json::from_str(&sandbox.text(&format!("{adapter}/adapter_config.json"))).unwrap();
        assert_eq!(config["base_model_name_or_path"], "org/model");
        sandbox.osprey(&["generate", adapter, "--prompt", "Once", "--max-tokens", "4"]).done();
    }
    assert_eq!(server.asked.lock().unwrap().len(), requests);
}

#[test]
fn models_that_cannot_be_had_are_refused_with_the_reason() {
    let sandbox = Sandbox::new();
    let server = Server::start(&sandbox.path(""));
    let model = |name: &str, token: Option<&str>| online(&sandbox, &server, token, &["generate", name, "--prompt", "a"]);
    model("org/absent", None).refused(&["org/absent", "neither on this disk nor on 127.0.0.1"]);
    model("org/gated", None).refused(&["does not exist, or is gated or private", "HF_TOKEN"]);
    model("org/gated", Some("other")).refused(&["refuses it to your token"]);
    model("org/gated", Some("secret")).refused(&["neither on this disk nor on"]);
    model("org/broken", None).refused(&["HTTP 503"]);
    model("org/pickled", None).refused(&["has no model.safetensors", "safetensors"]);
    model("no/such/path", None).refused(&["no/such/path"]);
    let nobody = Server { endpoint: "http://127.0.0.1:1".to_owned(), asked: Arc::default() };
    online(&sandbox, &nobody, None, &["generate", "org/absent", "--prompt", "a"]).refused(&["127.0.0.1:1 cannot be reached"]);
    assert!(!sandbox.path("hf-home").exists());
}
