//! A Hugging Face directory: `config.json`, `model.safetensors` (or shards with an index), tokenizer files.
//! Reading is strict: every parameter of the configuration is there with its shape, and nothing else is.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::config::{SpecialIds, read_config};
use super::parameter::Parameter;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::quant::{self, Format};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
/// Text files of a model directory are never larger; the largest tokenizers have 35 MB.
const MAX_TEXT: u64 = 256 << 20;
const HEAD: &str = "lm_head.weight";
const EMBED: &str = "model.embed_tokens.weight";

/// A directory's contents; the weights stay mapped until they are asked for.
#[derive(Debug)]
pub struct Directory {
    pub spec: Spec,
    pub ids: SpecialIds,
    /// By name, exactly those of `spec.parameters()`.
    pub parameters: BTreeMap<String, Parameter>,
}

/// Reads a directory.
///
/// # Errors
/// When a file is missing or malformed, the model is one that cannot be run, or names and shapes differ from the configuration's.
pub fn read(folder: &Path) -> Result<Directory> {
    let config = folder.join(CONFIG);
    let (spec, ids) = read_config(&read_text(&config)?, &config)?;
    let parameters = strict(&spec, stored_tensors(folder)?, folder)?;
    Ok(Directory { spec, ids, parameters })
}

/// Fills an existing, empty directory: configuration, weights in one file, tokenizer.
///
/// # Errors
/// When the system refuses.
pub fn write(folder: &Path, config: &Value, weights: &BTreeMap<String, Tensor>, tokenizer: Option<&Tokenizer>) -> Result<()> {
    let text = serde_json::to_string_pretty(config).expect("a JSON value has a text") + "\n";
    let config = folder.join(CONFIG);
    fs::write(&config, text).map_err(Error::io("write", &config))?;
    let path = folder.join(WEIGHTS);
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(weights.iter(), Some(about), &path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => Error::Io { action: "write", path: path.clone(), source },
        other => Error::file(&path, other),
    })?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(folder)?;
    }
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let file = entry.map_err(Error::io("list", folder))?.path();
        File::open(&file).and_then(|file| file.sync_all()).map_err(Error::io("sync", &file))?;
    }
    Ok(())
}

/// Reads a text file of bounded size.
///
/// # Errors
/// When it is missing, too large or not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let length = fs::metadata(path).map_err(Error::io("read", path))?.len();
    if length > MAX_TEXT {
        return Err(Error::file(path, format!("is {length} bytes long; at most {MAX_TEXT} are read")));
    }
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8"))
}

fn stored_tensors(folder: &Path) -> Result<BTreeMap<String, Parameter>> {
    let index = folder.join(INDEX);
    if folder.join(WEIGHTS).exists() || !index.exists() {
        return read_file(&folder.join(WEIGHTS));
    }
    let mut all = BTreeMap::new();
    for (file, names) in shards(&index)? {
        let mut tensors = read_file(&folder.join(&file))?;
        for name in names {
            let parameter =
                tensors.remove(&name).ok_or_else(|| Error::file(&folder.join(&file), format!("has no {name}, which {INDEX} promises")))?;
            all.insert(name, parameter);
        }
    }
    Ok(all)
}

/// The index's files, each with the tensors it should hold.
fn shards(index: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let value: Value = serde_json::from_str(&read_text(index)?).map_err(|error| Error::file(index, format!("is not JSON: {error}")))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| Error::file(index, "has no weight_map"))?;
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().filter(|file| !file.contains(['/', '\\']) && !file.starts_with('.'));
        let file = file.ok_or_else(|| Error::file(index, format!("{name} is not in a file of this directory")))?;
        files.entry(file.to_owned()).or_default().push(name.clone());
    }
    Ok(files)
}

/// Every tensor of one safetensors file, left where it is.
///
/// # Errors
/// When the file is malformed or holds something other than f32, f16 or bf16.
pub fn read_file(path: &Path) -> Result<BTreeMap<String, Parameter>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is read-only; as with every memory map, the file must not be truncated meanwhile, and Osprey's own writers rename
    // whole files into place. Ranges are checked against the length at this moment.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    let map = Arc::new(map);
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|error| Error::file(path, format!("is not a whole safetensors file: {error}")).fix("copy or download it again"))?;
    let mut tensors = BTreeMap::new();
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).expect("the name comes from the same table");
        let format = float_format(info.dtype).ok_or_else(|| {
            Error::file(path, format!("{name} is stored as {:?}; F32, F16 and BF16 can be read", info.dtype))
                .fix("convert it to one of them")
        })?;
        let start = 8 + header;
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        // A scalar counts as one row of one weight.
        let shape = if info.shape.is_empty() { vec![1] } else { info.shape.clone() };
        let parameter = Parameter::mapped(&name, shape, format, Arc::clone(&map), range)?;
        tensors.insert(name, parameter);
    }
    Ok(tensors)
}

fn float_format(dtype: Dtype) -> Option<&'static dyn Format> {
    match dtype {
        Dtype::F32 => Some(&quant::F32),
        Dtype::F16 => Some(&quant::F16),
        Dtype::BF16 => Some(&quant::Bf16),
        _ => None,
    }
}

/// Exactly the parameters of `spec`, or an error that names the differences.
pub(super) fn strict(spec: &Spec, mut found: BTreeMap<String, Parameter>, place: &Path) -> Result<BTreeMap<String, Parameter>> {
    let expected = spec.parameters();
    let missing: Vec<_> = expected.iter().map(|(name, _)| name.as_str()).filter(|name| !found.contains_key(*name)).collect();
    if !missing.is_empty() {
        return Err(Error::file(place, format!("lacks {}", some_of(&missing))).fix("check that the configuration belongs to these weights"));
    }
    let mut parameters = BTreeMap::new();
    for (name, shape) in expected {
        let parameter = found.remove(&name).expect("presence was checked above");
        if parameter.shape != shape {
            return Err(Error::file(place, format!("{name} has the shape {:?}, its configuration says {shape:?}", parameter.shape))
                .fix("check that the configuration belongs to these weights"));
        }
        parameters.insert(name, parameter);
    }
    found.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
    if spec.tied
        && let Some(head) = found.remove(HEAD)
        && head.bytes() != parameters[EMBED].bytes()
    {
        return Err(Error::file(place, "lm_head.weight differs from the embedding, yet tie_word_embeddings is true")
            .fix("set tie_word_embeddings to false"));
    }
    let extra: Vec<_> = found.keys().map(String::as_str).collect();
    if !extra.is_empty() {
        return Err(Error::file(place, format!("holds {}, which the configuration has no place for", some_of(&extra)))
            .fix("check that the configuration belongs to these weights"));
    }
    Ok(parameters)
}

/// The first few names and how many more there are.
fn some_of(names: &[&str]) -> String {
    let shown = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
    if names.len() > 3 { format!("{shown} and {} more", names.len() - 3) } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::config_json;
    use crate::export::testing::{flat, spec, weights};

    fn written(spec: &Spec) -> (tempfile::TempDir, BTreeMap<String, Tensor>) {
        let (folder, weights) = (tempfile::tempdir().unwrap(), weights(spec));
        write(folder.path(), &config_json(spec, SpecialIds::default()), &weights, None).unwrap();
        (folder, weights)
    }

    #[test]
    fn what_is_written_is_read_back_bit_for_bit() {
        for spec in [spec(), Spec { tied: true, qk_norm: true, ..spec() }] {
            let (folder, weights) = written(&spec);
            let back = read(folder.path()).unwrap();
            assert_eq!(back.spec, spec);
            for (name, parameter) in &back.parameters {
                assert_eq!(parameter.to_vec().unwrap(), flat(&weights[name]), "{name}");
            }
        }
    }

    #[test]
    fn half_precision_and_shards_are_read() {
        let (folder, weights) = written(&spec());
        let names: Vec<_> = weights.keys().cloned().collect();
        let (left, right) = names.split_at(5);
        let mut map = serde_json::Map::new();
        for (file, names, dtype) in [("a.safetensors", left, candle_core::DType::BF16), ("b.safetensors", right, candle_core::DType::F16)] {
            let part: BTreeMap<_, _> = names.iter().map(|name| (name, weights[name].to_dtype(dtype).unwrap())).collect();
            safetensors::serialize_to_file(part.iter(), None, &folder.path().join(file)).unwrap();
            names.iter().for_each(|name| {
                map.insert(name.clone(), file.into());
            });
        }
        fs::remove_file(folder.path().join(WEIGHTS)).unwrap();
        fs::write(folder.path().join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        let back = read(folder.path()).unwrap();
        for (name, parameter) in back.parameters {
            let close = parameter.to_vec().unwrap().iter().zip(flat(&weights[&name])).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0);
            assert!(close, "{name}");
        }
        map.insert(names[0].clone(), "../elsewhere.safetensors".into());
        fs::write(folder.path().join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("not in a file of this directory"));
    }

    #[test]
    fn names_and_shapes_are_strict() {
        let (folder, mut weights) = written(&spec());
        let rewrite = |weights: &BTreeMap<String, Tensor>| {
            safetensors::serialize_to_file(weights.iter(), None, &folder.path().join(WEIGHTS)).unwrap();
            read(folder.path()).unwrap_err().to_string()
        };
        let norm = weights.remove("model.norm.weight").unwrap();
        assert!(rewrite(&weights).contains("lacks model.norm.weight"));
        weights.insert("model.norm.weight".into(), norm.narrow(0, 0, 8).unwrap());
        assert!(rewrite(&weights).contains("model.norm.weight has the shape [8]"));
        weights.insert("model.norm.weight".into(), norm);
        weights.insert("model.layers.0.mlp.bias".into(), weights["model.norm.weight"].clone());
        assert!(rewrite(&weights).contains("holds model.layers.0.mlp.bias"));
    }

    #[test]
    fn a_tied_file_may_repeat_its_table_but_not_contradict_it() {
        let spec = Spec { tied: true, ..spec() };
        let (folder, mut weights) = written(&spec);
        weights.insert(HEAD.into(), weights[EMBED].clone());
        safetensors::serialize_to_file(weights.iter(), None, &folder.path().join(WEIGHTS)).unwrap();
        assert!(read(folder.path()).is_ok());
        weights.insert(HEAD.into(), (&weights[EMBED] * 2.0).unwrap());
        safetensors::serialize_to_file(weights.iter(), None, &folder.path().join(WEIGHTS)).unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("lm_head.weight differs"));
    }

    #[test]
    fn broken_files_are_named() {
        let (folder, _) = written(&spec());
        let path = folder.path().join(WEIGHTS);
        let whole = fs::read(&path).unwrap();
        for bytes in [&whole[..whole.len() - 1], &whole[..20], &whole[..0], b"random bytes that are no header at all"] {
            fs::write(&path, bytes).unwrap();
            assert!(read(folder.path()).unwrap_err().to_string().contains("model.safetensors"));
        }
        fs::remove_file(&path).unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("model.safetensors"));
        fs::remove_file(folder.path().join(CONFIG)).unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("config.json"));
    }

    /// `tests/hostile/safetensors.txt`, made by the script beside it.
    #[test]
    fn hostile_files_are_named_and_refused() {
        let folder = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
        let list = read_text(&folder.join("safetensors.txt")).unwrap();
        let cases: Vec<_> = list.lines().filter(|line| !line.starts_with('#')).map(|line| line.split_once(": ").unwrap()).collect();
        assert!(cases.len() >= 18);
        for (name, words) in cases {
            let message = read_file(&folder.join(name)).expect_err(name).to_string();
            assert!(message.contains(name) && message.contains(words), "{message}");
        }
    }

    proptest::proptest! {
        #[test]
        fn mutated_files_never_panic(edits in proptest::collection::vec((0usize..2000, proptest::num::u8::ANY), 1..6)) {
            let (folder, _) = written(&spec());
            let path = folder.path().join(WEIGHTS);
            let mut bytes = fs::read(&path).unwrap();
            for (at, value) in edits {
                bytes[at] = value;
            }
            fs::write(&path, bytes).unwrap();
            if let Ok(directory) = read(folder.path()) {
                directory.parameters.values().for_each(|parameter| { parameter.to_vec().unwrap(); });
            }
        }
    }
}
