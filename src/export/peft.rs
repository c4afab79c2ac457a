//! Adapters in the layout of Hugging Face PEFT: `adapter_config.json` beside `adapter_model.safetensors`, whose tensors are called
//! `base_model.model.MODULE.lora_A.weight` (`[rank, in]`) and `....lora_B.weight` (`[out, rank]`).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::adapter::{LowRank, LowRankAdapter};
use super::import::{Loaded, check_tokenizer, load_any};
use super::safetensors_dir::{read_file, read_text};
use super::{aside, parameter::Parameter};
use crate::checkpoint;
use crate::data::hub;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::model::adapt::Lora;

/// Name of the configuration.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What stands before the names of modules.
pub const PREFIX: &str = "base_model.model.";
/// Key of the manifest under which a checkpoint keeps [`fingerprint`] of its base.
pub const BASE_FINGERPRINT: &str = "base_fingerprint";
/// An adapter of an adapter ends somewhere.
const MAX_DEPTH: usize = 4;

/// Whether the directory holds an adapter and no model of its own.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG).is_file() && !folder.join("config.json").is_file()
}

/// Opens the adapter in `folder` together with its base.
///
/// # Errors
/// When the base cannot be found, the adapter does not belong to it, or is of a kind that cannot be run.
pub fn load(folder: &Path) -> Result<Loaded> {
    load_nested(folder, MAX_DEPTH)
}

fn load_nested(folder: &Path, depth: usize) -> Result<Loaded> {
    let config = Config::read(folder)?;
    let base = config.base()?;
    if is_adapter(&base) && depth == 0 {
        return Err(config.refuse("its base is an adapter of an adapter of an adapter", "merge some of them first"));
    }
    let mut loaded = if is_adapter(&base) { load_nested(&base, depth - 1)? } else { load_any(&base)? };
    if loaded.adapter.is_some() {
        loaded = loaded.merged(super::adapter::Merge::Dense)?;
    }
    check_fingerprint(folder, &loaded)?;
    let adapter = config.adapter()?;
    adapter.check(&loaded.spec, folder)?;
    loaded.adapter = Some(adapter);
    if let Some(tokenizer) = own_tokenizer(folder, loaded.tokenizer.as_ref())? {
        check_tokenizer(Some(&tokenizer), &loaded.spec, folder)?;
        loaded.tokenizer = Some(tokenizer);
    }
    Ok(loaded)
}

/// The tokenizer that lies beside an adapter, or the base's with the chat template that does: what the adapter was trained with.
fn own_tokenizer(folder: &Path, base: Option<&Tokenizer>) -> Result<Option<Tokenizer>> {
    if folder.join("tokenizer.json").is_file() {
        return Tokenizer::load(folder).map(Some);
    }
    let template = folder.join("chat_template.jinja");
    match base.filter(|_| template.is_file()) {
        Some(base) => Ok(Some(base.clone().with_chat_template(read_text(&template)?))),
        None => Ok(None),
    }
}

/// Identifies a base: names, formats and shapes of its parameters with the first and last bytes of each, so that opening stays quick.
pub fn fingerprint(loaded: &Loaded) -> String {
    const SAMPLE: usize = 4096;
    let mut text = Vec::new();
    for (name, parameter) in &loaded.parameters {
        text.extend(format!("{name} {parameter:?} ").into_bytes());
        let bytes = parameter.bytes();
        text.extend_from_slice(&bytes[..bytes.len().min(SAMPLE)]);
        text.extend_from_slice(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
    }
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&text))
}

/// A checkpoint remembers the base it was trained on.
fn check_fingerprint(folder: &Path, base: &Loaded) -> Result<()> {
    if !folder.join(checkpoint::MANIFEST).is_file() {
        return Ok(());
    }
    let saved = checkpoint::open(folder)?;
    match saved.manifest().extra.get(BASE_FINGERPRINT).and_then(Value::as_str) {
        Some(expected) if expected != fingerprint(base) => {
            Err(Error::file(folder, "was trained on another base than the one its configuration names now")
                .fix("put the base back, or correct base_model_name_or_path in adapter_config.json"))
        }
        _ => Ok(()),
    }
}

/// `adapter_config.json`.
struct Config<'f> {
    folder: &'f Path,
    map: Map<String, Value>,
}

impl<'f> Config<'f> {
    fn read(folder: &'f Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let value = serde_json::from_str(&read_text(&path)?)
            .map_err(|error| Error::file(&path, format!("is not JSON: {error}")).fix("save the adapter again"))?;
        let Value::Object(map) = value else { return Err(Error::file(&path, "is not a JSON object").fix("save the adapter again")) };
        let config = Self { folder, map };
        config.check()?;
        Ok(config)
    }

    fn refuse(&self, cause: impl ToString, fix: &str) -> Error {
        Error::file(&self.folder.join(CONFIG), cause).fix(fix)
    }

    /// Refuses what would be computed wrongly.
    fn check(&self) -> Result<()> {
        const MERGE: &str = "merge it with PEFT and give the merged model";
        let kind = self.map.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
        if kind != "LORA" {
            return Err(self.refuse(format!("peft_type is {kind}; LORA can be read"), MERGE));
        }
        for key in ["use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "use_bdlora"] {
            if self.map.get(key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false))) {
                return Err(self.refuse(format!("{key} is set, which is not supported"), MERGE));
            }
        }
        for key in ["modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"] {
            let is_empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            if self.map.get(key).is_some_and(|value| !is_empty(value)) {
                return Err(self.refuse(format!("{key} is set, which is not supported"), MERGE));
            }
        }
        if let Some(bias) = self.map.get("bias").and_then(Value::as_str).filter(|bias| *bias != "none") {
            return Err(self.refuse(format!("bias is \"{bias}\"; models here have none"), MERGE));
        }
        if let Some(start) = self.map.get("init_lora_weights").and_then(Value::as_str)
            && ["pissa", "olora", "corda", "loftq"].iter().any(|name| start.starts_with(name))
        {
            return Err(self.refuse(format!("init_lora_weights is \"{start}\", which changed the base"), MERGE));
        }
        Ok(())
    }

    /// The base's place: as written, or beside the adapter.
    fn base(&self) -> Result<PathBuf> {
        let name = self.map.get("base_model_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| self.refuse("has no base_model_name_or_path", "write the base's directory there"))?;
        let places = [PathBuf::from(name), self.folder.join(name)];
        let found = places.into_iter().find(|place| place.exists() && !same_place(place, self.folder));
        match found {
            Some(place) => Ok(place),
            None if hub::is_name(Path::new(name)) => hub::resolve(Path::new(name)).map(Cow::into_owned),
            None => Err(self.refuse(
                format!("its base {name} is not on this machine"),
                "write the directory of the base, or its name on the hub, into base_model_name_or_path",
            )),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.map.get(key).filter(|value| !value.is_null()) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.refuse(format!("{key} is {value}, not a number"), "save the adapter again")),
        }
    }

    /// alpha of one module: the first pattern that names it, or the one of all.
    fn alpha(&self, module: &str) -> Result<f64> {
        for (pattern, value) in self.map.get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            if pattern.contains(|letter: char| "*+?()[]{}|^$\\".contains(letter)) {
                return Err(self.refuse(format!("alpha_pattern \"{pattern}\" is a regular expression"), "write plain module names there"));
            }
            if module == pattern || module.ends_with(&format!(".{pattern}")) {
                return value
                    .as_f64()
                    .ok_or_else(|| self.refuse(format!("alpha_pattern {pattern} is no number"), "save the adapter again"));
            }
        }
        self.number("lora_alpha", 8.0)
    }

    fn adapter(&self) -> Result<LowRankAdapter> {
        let path = self.folder.join(WEIGHTS);
        if !path.is_file() && self.folder.join("adapter_model.bin").is_file() {
            return Err(Error::file(self.folder, "holds adapter_model.bin, a pickle, which may run code when it is opened")
                .fix("save the adapter with safe_serialization=True"));
        }
        let stabilized = self.map.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        let mut modules = BTreeMap::new();
        for (module, [a, b]) in pairs(&path, read_file(&path)?)? {
            let rank = a.shape[0];
            if a.shape.len() != 2 || b.shape.len() != 2 || rank == 0 || b.shape[1] != rank {
                return Err(Error::file(&path, format!("{module}: lora_A {:?} and lora_B {:?} do not belong together", a.shape, b.shape))
                    .fix("save the adapter again"));
            }
            let divisor = if stabilized { (rank as f64).sqrt() } else { rank as f64 };
            let scale = self.alpha(&module)? / divisor;
            modules.insert(module, LowRank { rank, a: a.to_vec()?, b: b.to_vec()?, scale });
        }
        if modules.is_empty() {
            return Err(Error::file(&path, "holds no adapter").fix("save the adapter again"));
        }
        Ok(LowRankAdapter { modules })
    }
}

fn same_place(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// The two tensors of each module.
fn pairs(path: &Path, tensors: BTreeMap<String, Parameter>) -> Result<BTreeMap<String, [Parameter; 2]>> {
    let mut halves: BTreeMap<String, [Option<Parameter>; 2]> = BTreeMap::new();
    for (name, parameter) in tensors {
        let rest = name.strip_prefix(PREFIX).unwrap_or(&name);
        let (module, half) = match (rest.strip_suffix(".lora_A.weight"), rest.strip_suffix(".lora_B.weight")) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => {
                return Err(Error::file(path, format!("{name} is neither lora_A nor lora_B of a linear map, which is not supported"))
                    .fix("merge the adapter with PEFT and give the merged model"));
            }
        };
        halves.entry(module.to_owned()).or_default()[half] = Some(parameter);
    }
    let whole = |(module, halves): (String, [Option<Parameter>; 2])| match halves {
        [Some(a), Some(b)] => Ok((module, [a, b])),
        _ => Err(Error::file(path, format!("{module} has only one of lora_A and lora_B")).fix("save the adapter again")),
    };
    halves.into_iter().map(whole).collect()
}

/// The configuration of an adapter that was trained by `lora` on `modules` of a base at `base`.
pub fn config_json(lora: &Lora, modules: &BTreeSet<String>, spec: &Spec, base: &Path) -> Value {
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    written_config(lora.rank, alpha, lora.rank_stabilized, target_modules(modules, spec), base)
}

/// The keys that every PEFT release since 0.9 knows, in name order.
fn written_config(rank: usize, alpha: Value, stabilized: bool, targets: Vec<String>, base: &Path) -> Value {
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base.display().to_string(),
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": stabilized,
    })
}

/// Last parts of the names where those say exactly the modules that are meant, whole names otherwise.
fn target_modules(modules: &BTreeSet<String>, spec: &Spec) -> Vec<String> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let short: BTreeSet<String> = modules.iter().map(|module| last(module)).collect();
    let meant = spec.parameters().into_iter().filter_map(|(name, _)| Some(name.strip_suffix(".weight")?.to_owned()));
    let meant: BTreeSet<String> = meant.filter(|module| short.contains(&last(module))).collect();
    if meant == *modules { short.into_iter().collect() } else { modules.iter().cloned().collect() }
}

/// Copies the adapter of `folder` to the directory `out`, as PEFT would save it; its configuration names the base by a whole path, or by
/// its name on the hub.
///
/// # Errors
/// When `folder` holds no adapter, or the system refuses.
pub fn export(folder: &Path, out: &Path) -> Result<u64> {
    if !is_adapter(folder) {
        return Err(
            Error::file(folder, "is no adapter").fix("peft is the format of adapters; choose hf or a GGUF format for a whole model")
        );
    }
    let mut config = Config::read(folder)?;
    let base = config.base()?;
    let base = base.canonicalize().map_err(Error::io("resolve", &base))?;
    const BASE: &str = "base_model_name_or_path";
    let on_hub = config.map[BASE].as_str().is_some_and(|name| hub::is_name(Path::new(name)) && !folder.join(name).exists());
    if !on_hub {
        config.map.insert(BASE.to_owned(), base.display().to_string().into());
    }
    let text = serde_json::to_string_pretty(&config.map).expect("a JSON value has a text") + "\n";
    let weights = std::fs::read(folder.join(WEIGHTS)).map_err(Error::io("read", folder.join(WEIGHTS)))?;
    let is_ours = |at: &Path| is_adapter(at) && !at.join(checkpoint::MANIFEST).is_file();
    aside::write_directory(out, is_ours, |at| {
        let put = |name: &str, bytes: &[u8]| std::fs::write(at.join(name), bytes).map_err(Error::io("write", at.join(name)));
        put(CONFIG, text.as_bytes())?;
        put(WEIGHTS, &weights)?;
        for name in hub::COMPANIONS {
            if let Ok(bytes) = std::fs::read(folder.join(name)) {
                put(name, &bytes)?;
            }
        }
        let read_back = Config::read(at)?;
        pairs(&at.join(WEIGHTS), read_file(&at.join(WEIGHTS))?)?;
        read_back.base().map(drop)
    })?;
    Ok(weights.len() as u64)
}
