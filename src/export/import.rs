//! Opens whatever a MODEL argument may name: an Osprey checkpoint or Hugging Face directory, or a GGUF file written here or elsewhere in
//! the architectures that are written here. Parameters come under Hugging Face names, rows in Hugging Face order, bytes as stored.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::adapter::LowRankAdapter;
use super::config::SpecialIds;
use super::config::check_spec;
use super::gguf::{GgufFile, TensorInfo, Value};
use super::gguf_model::{OWN_SPEC, ROPE_FREQUENCIES};
use super::names::{Architecture, deinterleave, gguf_name, is_block_matrix, rotary_heads};
use super::parameter::Parameter;
use super::ternary::TernaryWeights;
use super::{Weights, peft, safetensors_dir, tokenizer_gguf};
use crate::checkpoint;
use crate::data::hub;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::{Activation, LinearKind, Norm, RopeScaling, Spec};
use crate::quant::ternary_by_id;

/// A model as it lies on disk.
#[derive(Debug)]
pub struct Loaded {
    pub spec: Spec,
    /// By Hugging Face name, exactly those of `spec.parameters()`.
    pub parameters: BTreeMap<String, Parameter>,
    pub tokenizer: Option<Tokenizer>,
    /// What the values of ternary matrices are: master weights in a checkpoint, scale times code in a GGUF file.
    pub ternary: TernaryWeights,
    /// Applied beside the matrices it names, which stay as they are.
    pub adapter: Option<LowRankAdapter>,
    /// Ids that generation needs.
    pub ids: SpecialIds,
}

impl Loaded {
    /// Every parameter as f32 on the CPU, without an adapter (see [`Loaded::merged`]).
    ///
    /// # Errors
    /// When memory for the tensors cannot be had.
    pub fn weights(&self) -> Result<Weights> {
        self.parameters.iter().map(|(name, parameter)| Ok((name.clone(), parameter.to_tensor()?))).collect()
    }
}

/// Opens the model at `path`, which may be the name of one on the Hugging Face hub (see [`hub`]).
///
/// # Errors
/// When there is none, it is malformed, or it is of a kind that cannot be run; the message names file and cause.
pub fn load_any(path: &Path) -> Result<Loaded> {
    let path = &*hub::resolve(path)?;
    if path.is_dir() {
        return load_directory(path);
    }
    let mut magic = [0u8; 4];
    let file = File::open(path).map_err(Error::io("open", path))?;
    let length = file.take(4).read(&mut magic).map_err(Error::io("read", path))?;
    if length == 4 && magic == *b"GGUF" {
        return load_gguf(path);
    }
    Err(Error::file(path, "is neither a model directory nor a GGUF file")
        .fix("give a checkpoint or Hugging Face directory, or a .gguf file"))
}

fn load_directory(folder: &Path) -> Result<Loaded> {
    if peft::is_adapter(folder) {
        return peft::load(folder);
    }
    if !folder.join("config.json").is_file() {
        return Err(Error::file(folder, "has no config.json").fix(what_to_name(folder)));
    }
    if folder.join(checkpoint::MANIFEST).is_file() {
        checkpoint::open(folder)?;
    }
    let directory = safetensors_dir::read(folder)?;
    let tokenizer = if folder.join("tokenizer.json").is_file() { Some(Tokenizer::load(folder)?) } else { None };
    check_tokenizer(tokenizer.as_ref(), &directory.spec, folder)?;
    Ok(Loaded {
        spec: directory.spec,
        parameters: directory.parameters,
        tokenizer,
        ternary: TernaryWeights::Master,
        adapter: None,
        ids: directory.ids,
    })
}

/// Advice on a folder that is no model: a run's folder holds models.
fn what_to_name(folder: &Path) -> String {
    match checkpoint::list(folder).ok().and_then(|mut all| all.pop()) {
        Some((_, newest)) => format!("this is the folder of a run; name one of its checkpoints, such as {}", newest.display()),
        None => "give a directory that holds config.json and model.safetensors".to_owned(),
    }
}

fn load_gguf(path: &Path) -> Result<Loaded> {
    let file = GgufFile::open(path)?;
    let keys = Keys { file: &file, architecture: architecture(&file)? };
    let spec = keys.spec()?;
    check_spec(&spec, &path.display().to_string())?;
    let names: BTreeMap<String, String> =
        spec.parameters().into_iter().filter_map(|(parameter, _)| Some((gguf_name(&parameter)?, parameter))).collect();
    let mut found = BTreeMap::new();
    for info in file.tensors.iter().filter(|info| info.name != ROPE_FREQUENCIES) {
        let name = names.get(&info.name).unwrap_or(&info.name);
        found.insert(name.clone(), keys.parameter(info, name, &spec)?);
    }
    let parameters = safetensors_dir::strict(&spec, found, path)?;
    check_linears(&spec, &parameters, path)?;
    let tokenizer = tokenizer_gguf::read(&file.metadata).map_err(|error| at_file(path, error))?;
    check_tokenizer(tokenizer.as_ref(), &spec, path)?;
    let ids = SpecialIds { bos: tokenizer.as_ref().and_then(Tokenizer::bos), eos: tokenizer.as_ref().and_then(Tokenizer::eos) };
    Ok(Loaded { spec, parameters, tokenizer, ternary: TernaryWeights::Deployed, adapter: None, ids })
}

fn architecture(file: &GgufFile) -> Result<Architecture> {
    let name = file.metadata.get("general.architecture").and_then(Value::as_str);
    let name = name.ok_or_else(|| Error::file(&file.path, "has no general.architecture").fix("give a GGUF file that holds a model"))?;
    Architecture::from_name(name).ok_or_else(|| {
        Error::file(&file.path, format!("has the unsupported architecture {name}")).fix("llama, qwen3 and bitnet can be read")
    })
}

/// A ternary model has all its block matrices in ternary formats; nothing else may have them there.
fn check_linears(spec: &Spec, parameters: &BTreeMap<String, Parameter>, path: &Path) -> Result<()> {
    for (name, parameter) in parameters {
        let is_ternary = ternary_by_id(parameter.format.layout().id).is_some();
        let should_be = spec.linear == LinearKind::Ternary && is_block_matrix(name);
        if is_ternary != should_be {
            let (found, expected) = if is_ternary { ("ternary", "dense") } else { ("dense", "ternary") };
            return Err(Error::file(path, format!("{name} is {found} in a model whose other matrices make it {expected}")));
        }
    }
    Ok(())
}

pub(super) fn check_tokenizer(tokenizer: Option<&Tokenizer>, spec: &Spec, path: &Path) -> Result<()> {
    match tokenizer {
        Some(tokenizer) if tokenizer.vocabulary() > spec.vocab => {
            let (tokens, rows) = (tokenizer.vocabulary(), spec.vocab);
            Err(Error::file(path, format!("its tokenizer has {tokens} tokens, its embedding {rows} rows"))
                .fix("put the tokenizer beside the model that was trained with it"))
        }
        _ => Ok(()),
    }
}

/// Puts the file in front of an error about one of its keys.
fn at_file(path: &Path, error: Error) -> Error {
    match error {
        Error::Input { place, cause, fix } => Error::Input { place: format!("{}: {place}", path.display()), cause, fix },
        other => other,
    }
}

/// The keys of one architecture.
struct Keys<'a> {
    file: &'a GgufFile,
    architecture: Architecture,
}

impl Keys<'_> {
    fn spec(&self) -> Result<Spec> {
        match self.file.metadata.get(OWN_SPEC).and_then(Value::as_str) {
            Some(text) => serde_json::from_str(text).map_err(|error| Error::file(&self.file.path, format!("{OWN_SPEC}: {error}"))),
            None => self.foreign_spec(),
        }
    }

    fn foreign_spec(&self) -> Result<Spec> {
        let (dim, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let head_dim = match self.optional_size("attention.key_length")? {
            Some(width) => width,
            None if heads > 0 && dim.is_multiple_of(heads) => dim / heads,
            None => return self.refuse(format!("embedding_length {dim} is no multiple of attention.head_count {heads}")),
        };
        self.refuse_unsupported(head_dim)?;
        Ok(Spec {
            vocab: self.tensor("token_embd.weight")?.shape[0],
            dim,
            layers: self.size("block_count")?,
            heads,
            kv_heads: self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn: self.size("feed_forward_length")?,
            context: self.size("context_length")?,
            norm: Norm::Rms,
            norm_eps: self.number("attention.layer_norm_rms_epsilon")?.ok_or_else(|| self.missing("attention.layer_norm_rms_epsilon"))?,
            embedding_projection: false,
            linear: match ternary_by_id(self.tensor("blk.0.attn_q.weight")?.format_id) {
                Some(_) => LinearKind::Ternary,
                None => LinearKind::Dense,
            },
            sub_norm: self.architecture == Architecture::Bitnet,
            activation: Activation::SwiGlu,
            qk_norm: self.architecture == Architecture::Qwen3,
            tied: self.file.tensor("output.weight").is_none(),
            rope_theta: self.number("rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: self.rope_divisors()?,
        })
    }

    /// Llama 3's scaling, which llama.cpp's converter writes as a tensor of divisors.
    fn rope_divisors(&self) -> Result<Option<RopeScaling>> {
        let Some(info) = self.file.tensor(ROPE_FREQUENCIES) else { return Ok(None) };
        let format = info.format().map_err(|error| at_file(&self.file.path, error))?;
        let mut divisors = vec![0.0; info.shape.iter().product()];
        format.decode_row(self.file.data(info)?, &mut divisors).map_err(|error| at_file(&self.file.path, error))?;
        Ok(Some(RopeScaling::Divisors(divisors)))
    }

    fn refuse_unsupported(&self, head_dim: usize) -> Result<()> {
        if let Some(rotated) = self.optional_size("rope.dimension_count")?
            && rotated != head_dim
        {
            return self.refuse(format!("rotates {rotated} of {head_dim} elements per head, only all is supported"));
        }
        let scaling = self.value("rope.scaling.type").and_then(Value::as_str).unwrap_or("none");
        let factor = self.number("rope.scaling.factor")?.unwrap_or(1.0);
        if scaling != "none" && factor != 1.0 {
            return self.refuse(format!("has rotary scaling ({scaling}, {factor}), which is not supported"));
        }
        Ok(())
    }

    /// The stored tensor as a parameter: q and k rows of an interleaving architecture are put back into half-split order, which moves whole
    /// rows of blocks and decodes nothing.
    fn parameter(&self, info: &TensorInfo, name: &str, spec: &Spec) -> Result<Parameter> {
        let path = &self.file.path;
        let format = info.format().map_err(|error| at_file(path, error))?;
        let data = self.file.data(info)?;
        let heads = rotary_heads(name, spec.heads, spec.kv_heads).filter(|_| self.architecture.interleaves_heads());
        let made = match (heads, info.shape.as_slice()) {
            (Some(heads), &[rows, width]) if rows.is_multiple_of(2 * heads) => {
                let row = format.layout().row_bytes(width).ok_or_else(|| Error::input(name, "has an impossible width"))?;
                Parameter::owned(name, info.shape.clone(), format, deinterleave(data, row, heads))
            }
            _ => Parameter::mapped(name, info.shape.clone(), format, self.file.map(), info.offset..info.offset + data.len()),
        };
        made.map_err(|error| at_file(path, error))
    }

    fn refuse<T>(&self, cause: impl ToString) -> Result<T> {
        Err(Error::file(&self.file.path, cause))
    }

    fn missing(&self, key: &str) -> Error {
        Error::file(&self.file.path, format!("{}.{key} is missing", self.architecture.name()))
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.file.tensor(name).filter(|info| info.shape.len() == 2);
        info.ok_or_else(|| Error::file(&self.file.path, format!("has no matrix {name}")))
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.file.metadata.get(&format!("{}.{key}", self.architecture.name()))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) => Ok(Some(size)),
            None => self.refuse(format!("{}.{key} is not one size", self.architecture.name())),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_f64().map(Some).map_or_else(|| self.refuse(format!("{}.{key} is not a number", self.architecture.name())), Ok)
    }
}
