//! Models by their names on the Hugging Face hub, `organization/name` or `organization/name@revision`: from the cache that other programs
//! share (`HF_HOME`, `HF_HUB_CACHE`), else downloaded into it from `HF_ENDPOINT`, with the token in `HF_TOKEN` or that of `hf auth login`.
//! A cached model is taken as it is; `HF_HUB_OFFLINE=1` never asks.

use crate::error::{Error, Result};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::env;
use std::io::IsTerminal;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PUBLIC: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const ADAPTER: &str = "adapter_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// What else a model is made of, where its repository has it.
pub const COMPANIONS: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
/// Endings of files: `corpora/text.jsonl` is a path that does not exist.
const FILE_ENDINGS: [&str; 7] = [".gguf", ".json", ".jsonl", ".jinja", ".safetensors", ".toml", ".txt"];
/// A machine without a network says so within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where models come from.
struct Hub {
    cache: Cache,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

/// The place of a model: `path` itself, or the folder of the cache that holds the model it names.
///
/// # Errors
/// When nothing lies at `path` and it is the name of a model that cannot be had; the message says why.
pub fn resolve(path: &Path) -> Result<Cow<'_, Path>> {
    match name(path).filter(|_| is_name(path)) {
        Some(name) => Hub::from_env()?.folder(name).map(Cow::Owned),
        None => Ok(Cow::Borrowed(path)),
    }
}

/// Whether `path` can only be the name of a model on the hub.
pub fn is_name(path: &Path) -> bool {
    name(path).is_some() && !path.exists() && !first_folder_exists(path)
}

/// `path` as a name: two words, maybe with a revision.
fn name(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let (name, revision) = text.split_once('@').map_or((text, None), |(name, revision)| (name, Some(revision)));
    let (organization, model) = name.split_once('/')?;
    let is_word = |word: &str| {
        let plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        plain && !word.is_empty() && word.len() <= 96 && !word.starts_with('.') && !word.contains("..")
    };
    let is_revision = |word: &str| word.split('/').all(is_word);
    let is_file = FILE_ENDINGS.iter().any(|ending| model.to_ascii_lowercase().ends_with(ending));
    (is_word(organization) && is_word(model) && revision.is_none_or(is_revision) && !is_file).then_some(text)
}

/// `run/step-000100` beside a folder `run` is a path that does not exist.
fn first_folder_exists(path: &Path) -> bool {
    path.components().next().is_some_and(|first| Path::new(first.as_os_str()).exists())
}

impl Hub {
    fn from_env() -> Result<Self> {
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let cache = match (set("HF_HUB_CACHE"), set("HF_HOME"), env::home_dir()) {
            (Some(folder), ..) => Cache::new(folder.into()),
            (None, Some(home), _) => Cache::new(Path::new(&home).join("hub")),
            (None, None, Some(home)) => Cache::new(home.join(".cache/huggingface/hub")),
            (None, None, None) => {
                return Err(
                    Error::input("HF_HOME", "is not set, and there is no home folder to keep models in").fix("set HF_HOME to a folder")
                );
            }
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| PUBLIC.to_owned()).trim_end_matches('/').to_owned();
        let offline = set("HF_HUB_OFFLINE").is_some_and(|value| value != "0");
        Ok(Self { token: set("HF_TOKEN").or_else(|| cache.token()), cache, endpoint, offline })
    }

    /// The folder that holds the model called `name`.
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        let cached = self.cache.repo(repo.clone());
        let config = || cached.get(CONFIG).or_else(|| cached.get(ADAPTER));
        if let Some(folder) = config().as_deref().and_then(Path::parent).filter(|folder| is_whole(folder)) {
            return Ok(folder.to_owned());
        }
        if self.offline {
            let cause =
                format!("is neither on this disk nor whole in the cache {}, and HF_HUB_OFFLINE is set", self.cache.path().display());
            return Err(Error::input(name, cause).fix("check the path, or unset HF_HUB_OFFLINE to download the model of this name"));
        }
        self.reach(name)?;
        let builder = ApiBuilder::from_cache(self.cache.clone()).with_endpoint(self.endpoint.clone());
        let builder = builder.with_token(self.token.clone()).with_retries(2).with_progress(std::io::stderr().is_terminal());
        let api: Api = builder.build().map_err(|error| self.explain(name, &error))?;
        self.download(name, &api.repo(repo))?;
        let folder = config().and_then(|config| config.parent().map(Path::to_owned)).filter(|folder| is_whole(folder));
        folder.ok_or_else(|| Error::input(name, "changed on the hub while it was downloaded").fix("run the command again"))
    }

    /// Everything a model is made of into the cache, the weights last.
    fn download(&self, name: &str, repo: &ApiRepo) -> Result<()> {
        let explain = |error: ApiError| self.explain(name, &error);
        let info = repo.info().map_err(explain)?;
        let names: BTreeSet<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let small = [CONFIG, ADAPTER].into_iter().chain(COMPANIONS);
        let weights: Vec<String> = if names.contains(WEIGHTS) {
            vec![WEIGHTS.to_owned()]
        } else if names.contains(INDEX) {
            let index = repo.get(INDEX).map_err(explain)?;
            shards(&index).ok_or_else(|| Error::file(&index, "is no index of shards").fix("delete the file and download it again"))?
        } else if names.contains(ADAPTER_WEIGHTS) && names.contains(ADAPTER) {
            vec![ADAPTER_WEIGHTS.to_owned()]
        } else {
            let gguf = names.iter().find(|name| name.ends_with(".gguf"));
            let fix = match gguf {
                Some(file) => format!("download one of its GGUF files, such as {file}, and name that file"),
                None => "choose a model whose weights are saved as safetensors".to_owned(),
            };
            return Err(Error::input(name, format!("has no {WEIGHTS} on {}", self.host())).fix(fix));
        };
        let wanted = small.filter(|file| names.contains(file)).map(str::to_owned).chain(weights);
        wanted.into_iter().try_for_each(|file| repo.get(&file).map(drop).map_err(explain))
    }

    /// Refuses within seconds where there is no network; behind a proxy the proxy says it.
    fn reach(&self, name: &str) -> Result<()> {
        let proxies = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
        if proxies.iter().any(|variable| env::var_os(variable).is_some_and(|value| !value.is_empty())) {
            return Ok(());
        }
        let (port, rest) = match self.endpoint.strip_prefix("http://") {
            Some(rest) => (80, rest),
            None => (443, self.endpoint.strip_prefix("https://").unwrap_or(&self.endpoint)),
        };
        let host = rest.split('/').next().unwrap_or_default();
        let place = if host.rsplit(':').next().is_some_and(|port| port.parse::<u16>().is_ok()) {
            host.to_owned()
        } else {
            format!("{host}:{port}")
        };
        let reached = place.to_socket_addrs().and_then(|mut found| {
            found
                .next()
                .ok_or_else(|| std::io::Error::other("no address"))
                .and_then(|address| TcpStream::connect_timeout(&address, PATIENCE))
        });
        reached.map(drop).map_err(|error| self.unreachable(name, &error))
    }

    fn unreachable(&self, name: &str, cause: &dyn std::fmt::Display) -> Error {
        let cause = format!("is neither on this disk nor whole in the cache, and {} cannot be reached: {cause}", self.host());
        Error::input(name, cause).fix("check the path; for a model of the hub check the network, or HF_ENDPOINT")
    }

    fn host(&self) -> &str {
        self.endpoint.split_once("://").map_or(&self.endpoint, |(_, host)| host)
    }

    fn explain(&self, name: &str, error: &ApiError) -> Error {
        let host = self.host();
        match error {
            ApiError::RequestError(request) => match **request {
                ureq::Error::StatusCode(404) => Error::input(name, format!("is neither on this disk nor on {host}"))
                    .fix("check the path or the name (organization/name, or organization/name@revision)"),
                ureq::Error::StatusCode(code @ (401 | 403)) => {
                    let cause = match self.token {
                        Some(_) => format!("{host} refuses it to your token (HTTP {code}): it is gated or private"),
                        None => format!("{host} refuses it (HTTP {code}): it does not exist, or is gated or private"),
                    };
                    Error::input(name, cause)
                        .fix(format!("check the name, accept its terms on {}/{name}, and set HF_TOKEN to a token of yours", self.endpoint))
                }
                ureq::Error::StatusCode(code) => {
                    Error::input(name, format!("{host} answers with HTTP {code}")).fix("try again later, or give a folder on this disk")
                }
                ref other => self.unreachable(name, other),
            },
            ApiError::TooManyRetries(last) => self.explain(name, last),
            ApiError::LockAcquisition(path) => Error::input(name, "is being downloaded by another program")
                .fix(format!("wait for it, or delete {} when there is none", path.display())),
            ApiError::IoError(source) => Error::input(name, format!("cannot be saved in {}: {source}", self.cache.path().display()))
                .fix("free space, or set HF_HOME to a folder on another disk"),
            other => Error::input(name, format!("{host} answers with something that is no model: {other}")).fix("check HF_ENDPOINT"),
        }
    }
}

/// Whether the weights of a model or adapter are all there.
fn is_whole(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    let sharded = || shards(&folder.join(INDEX)).is_some_and(|files| files.iter().all(|file| has(file)));
    has(WEIGHTS) || sharded() || has(ADAPTER) && has(ADAPTER_WEIGHTS)
}

/// The files of an index; nothing where it names files outside its folder.
fn shards(index: &Path) -> Option<Vec<String>> {
    let value: Value = serde_json::from_slice(&std::fs::read(index).ok()?).ok()?;
    let files: Option<BTreeSet<String>> = value["weight_map"].as_object()?.values().map(|file| file.as_str().map(str::to_owned)).collect();
    let files =
        files.filter(|files| !files.is_empty() && files.iter().all(|file| !file.contains(['/', '\\']) && !file.starts_with('.')))?;
    Some(files.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for text in ["meta-llama/Llama-3.2-1B", "org/model.v2@main", "org/m@refs/pr/1"] {
            assert_eq!(name(Path::new(text)), Some(text));
        }
        for text in ["model", "/org/model", "./org/model", "../org", "a/b/c", "a/", "models/x.gguf", "a/b@", "a b/c", "a/..", "a/b@../c"] {
            assert_eq!(name(Path::new(text)), None, "{text}");
        }
        // `src` is a folder here.
        assert!(!is_name(Path::new("src/absent")) && is_name(Path::new("no-such-folder/absent")));
        assert_eq!(resolve(Path::new("src/absent")).unwrap(), Path::new("src/absent"));
    }

    #[test]
    fn a_model_in_the_cache_is_found_and_half_a_model_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let hub = |offline| Hub { cache: Cache::new(folder.path().into()), endpoint: "http://127.0.0.1:1".into(), token: None, offline };
        let absent = hub(true).folder("org/model").unwrap_err();
        assert!(absent.to_string().contains("HF_HUB_OFFLINE") && absent.hint().is_some());
        let repo = folder.path().join("models--org--model");
        let snapshot = repo.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        std::fs::write(snapshot.join(CONFIG), "{}").unwrap();
        std::fs::write(snapshot.join(INDEX), r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#).unwrap();
        std::fs::write(snapshot.join("1.safetensors"), "").unwrap();
        assert!(hub(true).folder("org/model").is_err());
        let unreachable = hub(false).folder("org/model").unwrap_err().to_string();
        assert!(unreachable.contains("127.0.0.1:1 cannot be reached"), "{unreachable}");
        std::fs::write(snapshot.join("2.safetensors"), "").unwrap();
        assert_eq!(hub(true).folder("org/model").unwrap(), snapshot);
        assert!(hub(true).folder("org/model@other").is_err());
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        for text in ["{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": "../x"}}"#, r#"{"weight_map": {"a": 1}}"#, "x"] {
            std::fs::write(&index, text).unwrap();
            assert_eq!(shards(&index), None, "{text}");
        }
    }
}
