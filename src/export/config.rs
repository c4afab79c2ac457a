//! `config.json`: Hugging Face's description of a decoder, to and from [`Spec`].
//!
//! What is written is a true Llama, Qwen3 or BitNet configuration whenever those classes compute the same function, with an extra `osprey`
//! object holding the exact [`Spec`]; faces that need SSNorm, EmbProj or ternary arithmetic say `model_type: "osprey"`, which no other
//! program will mistake for something it can run.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::model::{Activation, LinearKind, Norm, RopeScaling, Spec};

/// Ids that generation needs, where the tokenizer has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// Bounds on what a configuration may ask for, so that sizes derived from it cannot overflow or exhaust memory unnoticed.
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 14;
const MAX_CONTEXT: usize = 1 << 28;

/// The Hugging Face class that computes what `spec` describes, with weights stored in full.
///
/// # Errors
/// When no class does; the message says which key is in the way.
pub fn transformers_class(spec: &Spec) -> Result<&'static str> {
    let refuse = |cause: &str, fix: &str| Err(Error::input("transformers", cause).fix(fix));
    if spec.embedding_projection || spec.norm == Norm::SingleScale || spec.linear == LinearKind::Ternary {
        return refuse("no class has EmbProj, SSNorm or ternary arithmetic", "export the checkpoint, which folds them");
    }
    if matches!(spec.rope_scaling, Some(RopeScaling::Divisors(_))) {
        return refuse("its configurations name rotary scaling by rule, this model lists divisors", "export as GGUF, which lists them too");
    }
    if !spec.sub_norm {
        return Ok(if spec.qk_norm { "Qwen3ForCausalLM" } else { "LlamaForCausalLM" });
    }
    if spec.qk_norm {
        return refuse("no class has both SubLN and QK-norm", "set model.sub_norm or model.qk_norm to false");
    }
    if spec.heads * spec.head_dim != spec.dim {
        return refuse("BitNet's heads together are as wide as the model", "set model.head_dim to model.dim / model.heads");
    }
    Ok("BitNetForCausalLM")
}

/// The `config.json` of `spec`.
pub fn config_json(spec: &Spec, ids: SpecialIds) -> Value {
    let class = transformers_class(spec).ok();
    let model_type = match class {
        Some("LlamaForCausalLM") => "llama",
        Some("Qwen3ForCausalLM") => "qwen3",
        Some(_) => "bitnet",
        None => "osprey",
    };
    let mut config = json!({
        "architectures": [class.unwrap_or("OspreyForCausalLM")],
        "model_type": model_type,
        "hidden_size": spec.dim,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope_parameters(spec),
        "tie_word_embeddings": spec.tied,
        "hidden_act": match spec.activation { Activation::SwiGlu => "silu", Activation::Relu2Glu => "relu2" },
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "use_cache": true,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "torch_dtype": "float32",
    });
    if let Some(RopeScaling::Llama3 { .. }) = spec.rope_scaling {
        // Where transformers 4 looks for it.
        config["rope_scaling"] = config["rope_parameters"].clone();
    }
    config["osprey"] = json!({ "spec": spec });
    config
}

fn rope_parameters(spec: &Spec) -> Value {
    match &spec.rope_scaling {
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => json!({
            "rope_theta": spec.rope_theta,
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
        _ => json!({ "rope_theta": spec.rope_theta, "rope_type": "default" }),
    }
}

/// Reads `config.json` text; `path` is only named in errors.
///
/// # Errors
/// When the text is not a configuration, or describes something that [`Spec`] cannot.
pub fn read_config(text: &str, path: &Path) -> Result<(Spec, SpecialIds)> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| Error::file(path, format!("is not JSON: {error}")).fix("copy or download it again"))?;
    let Value::Object(map) = value else {
        return Err(Error::file(path, "is not a JSON object").fix("copy or download it again"));
    };
    let config = Config { map: &map, path };
    let spec = match map.get("osprey") {
        Some(own) => {
            // Refuses packed weights, which the exact spec says nothing of.
            config.linear("")?;
            config.own_spec(own)?
        }
        None => config.foreign_spec()?,
    };
    check_spec(&spec, &path.display().to_string())?;
    Ok((spec, SpecialIds { bos: config.token_id("bos_token_id"), eos: config.token_id("eos_token_id") }))
}

/// Refuses shapes that no decoder has, before anything is allocated for them.
///
/// # Errors
/// Names the first impossible size.
pub fn check_spec(spec: &Spec, place: &str) -> Result<()> {
    let sizes = [
        ("vocab_size", spec.vocab, MAX_VOCAB),
        ("hidden_size", spec.dim, MAX_WIDTH),
        ("intermediate_size", spec.ffn, MAX_WIDTH),
        ("num_hidden_layers", spec.layers, MAX_LAYERS),
        ("num_attention_heads", spec.heads, MAX_WIDTH),
        ("num_key_value_heads", spec.kv_heads, MAX_WIDTH),
        ("head_dim", spec.head_dim, MAX_WIDTH),
        ("max_position_embeddings", spec.context, MAX_CONTEXT),
    ];
    for (key, value, most) in sizes {
        if value == 0 || value > most {
            return Err(Error::input(place, format!("{key} is {value}; 1 to {most} are possible")).fix("give sizes of a real model"));
        }
    }
    let refuse = |cause: String| Err(Error::input(place, cause).fix("give sizes of a real model"));
    if !spec.heads.is_multiple_of(spec.kv_heads) {
        return refuse(format!("{} attention heads cannot share {} key-value heads", spec.heads, spec.kv_heads));
    }
    if !spec.head_dim.is_multiple_of(2) {
        return refuse(format!("head_dim is {}; rotary positions need an even width", spec.head_dim));
    }
    if spec.heads * spec.head_dim > MAX_WIDTH {
        return refuse(format!("{} heads of {} are wider than {MAX_WIDTH}", spec.heads, spec.head_dim));
    }
    let in_range = |value: f64, least: f64| value.is_finite() && value >= least;
    if !in_range(spec.norm_eps, 0.0) || !in_range(spec.rope_theta, f64::MIN_POSITIVE) {
        return refuse(format!("rms_norm_eps {} or rope_theta {} is out of range", spec.norm_eps, spec.rope_theta));
    }
    if let Some(fault) = spec.rope_scaling.as_ref().and_then(|scaling| scaling.fault(spec.head_dim)) {
        return refuse(fault);
    }
    if spec.tied && spec.embedding_projection {
        return Err(Error::input(place, "EmbProj cannot be folded into a tied head").fix("untie the head (model.tied = false)"));
    }
    Ok(())
}

/// The keys of a file.
struct Config<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
}

impl Config<'_> {
    /// The model is one that [`Spec`] cannot express.
    fn unsupported<T>(&self, cause: impl ToString) -> Result<T> {
        Err(Error::file(self.path, cause).fix("choose a model without it: this one would be run wrongly"))
    }

    fn refuse<T>(&self, cause: impl ToString) -> Result<T> {
        Err(Error::file(self.path, cause).fix("use the config.json that came with the weights"))
    }

    /// The exact spec Osprey wrote, provided nobody changed the file's other keys since.
    fn own_spec(&self, own: &Value) -> Result<Spec> {
        let spec = own.get("spec").cloned().unwrap_or(Value::Null);
        let spec: Spec = serde_json::from_value(spec).or_else(|error| self.refuse(format!("osprey.spec: {error}")))?;
        let expected =
            [("hidden_size", spec.dim), ("num_hidden_layers", spec.layers), ("vocab_size", spec.vocab), ("intermediate_size", spec.ffn)];
        for (key, value) in expected {
            if let Some(found) = self.map.get(key)
                && found.as_u64() != Some(value as u64)
            {
                return Err(Error::file(self.path, format!("{key} is {found} but osprey.spec has {value}"))
                    .fix("undo the edit, or remove the osprey object"));
            }
        }
        Ok(spec)
    }

    fn foreign_spec(&self) -> Result<Spec> {
        let model_type = self.model_type()?;
        self.refuse_unsupported()?;
        let (dim, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let head_dim = match self.optional_size("head_dim")? {
            Some(width) => width,
            None if heads > 0 && dim.is_multiple_of(heads) => dim / heads,
            None => return self.refuse(format!("hidden_size {dim} is no multiple of num_attention_heads {heads}")),
        };
        Ok(Spec {
            vocab: self.size("vocab_size")?,
            dim,
            layers: self.size("num_hidden_layers")?,
            heads,
            kv_heads: self.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            ffn: self.size("intermediate_size")?,
            context: self.optional_size("max_position_embeddings")?.unwrap_or(2048),
            norm: Norm::Rms,
            norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
            embedding_projection: false,
            linear: self.linear(model_type)?,
            sub_norm: model_type == "bitnet",
            activation: self.activation(model_type)?,
            qk_norm: model_type == "qwen3",
            tied: self.flag("tie_word_embeddings")?.unwrap_or(false),
            rope_theta: self.rope_theta(model_type)?,
            rope_scaling: self.rope_scaling()?,
        })
    }

    fn model_type(&self) -> Result<&'static str> {
        let class = self.map.get("architectures").and_then(|classes| classes.get(0)).and_then(Value::as_str);
        let model_type = self.map.get("model_type").and_then(Value::as_str);
        let found = class.or(model_type).unwrap_or("no architectures and no model_type");
        match found.to_ascii_lowercase().trim_end_matches("forcausallm") {
            "llama" => Ok("llama"),
            "qwen3" => Ok("qwen3"),
            "bitnet" => Ok("bitnet"),
            _ => Err(Error::file(self.path, format!("has the unsupported architecture {found}"))
                .fix("LlamaForCausalLM, Qwen3ForCausalLM and BitNetForCausalLM can be read")),
        }
    }

    /// Keys which change what the model computes and which [`Spec`] cannot express.
    fn refuse_unsupported(&self) -> Result<()> {
        for key in ["attention_bias", "mlp_bias", "use_sliding_window"] {
            if self.flag(key)? == Some(true) {
                return self.unsupported(format!("{key} is true, which is not supported"));
            }
        }
        if let Some(factor) = self.number("partial_rotary_factor")?
            && factor != 1.0
        {
            return self.unsupported(format!("partial_rotary_factor is {factor}, only 1 is supported"));
        }
        Ok(())
    }

    /// `rope_parameters` (transformers 5) or `rope_scaling`.
    fn rope_scaling(&self) -> Result<Option<RopeScaling>> {
        let mut found = None;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.present(key) else { continue };
            match rope.get("rope_type").or_else(|| rope.get("type")).map(|kind| (kind, kind.as_str())) {
                None | Some((_, Some("default"))) => {}
                Some((_, Some("llama3"))) => found = Some(self.llama3(key, rope)?),
                Some((kind, _)) => {
                    return self.unsupported(format!("{key} is of the type {kind}; default and llama3 are supported"));
                }
            }
        }
        Ok(found)
    }

    fn llama3(&self, key: &str, rope: &Value) -> Result<RopeScaling> {
        let number = |name: &str| match rope.get(name).and_then(Value::as_f64) {
            Some(value) => Ok(value),
            None => self.refuse(format!("{key}.{name} is missing or no number")),
        };
        let original = rope.get("original_max_position_embeddings").and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
        Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: match original {
                Some(size) => size,
                None => return self.refuse(format!("{key}.original_max_position_embeddings is missing or no size")),
            },
        })
    }

    fn linear(&self, model_type: &str) -> Result<LinearKind> {
        let Some(quantization) = self.map.get("quantization_config").filter(|value| !value.is_null()) else {
            return Ok(if model_type == "bitnet" { LinearKind::Ternary } else { LinearKind::Dense });
        };
        let text = |key: &str| quantization.get(key).and_then(Value::as_str).unwrap_or("");
        match (text("quant_method"), text("quantization_mode")) {
            ("bitnet", "online") => Ok(LinearKind::Ternary),
            (method, _) => Err(Error::file(self.path, format!("is quantized already (quant_method \"{method}\")"))
                .fix("use the unquantized checkpoint, or a GGUF file")),
        }
    }

    fn activation(&self, model_type: &str) -> Result<Activation> {
        match self.map.get("hidden_act").and_then(Value::as_str) {
            None if model_type == "bitnet" => Ok(Activation::Relu2Glu),
            None | Some("silu" | "swish") => Ok(Activation::SwiGlu),
            Some("relu2") => Ok(Activation::Relu2Glu),
            Some(other) => self.unsupported(format!("hidden_act is \"{other}\"; silu and relu2 are supported")),
        }
    }

    /// `rope_parameters.rope_theta` (transformers 5) or `rope_theta`.
    fn rope_theta(&self, model_type: &str) -> Result<f64> {
        let nested = self.map.get("rope_parameters").and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        let default = if model_type == "bitnet" { 500_000.0 } else { 10_000.0 };
        Ok(nested.or(self.number("rope_theta")?).unwrap_or(default))
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) => Ok(Some(size)),
            None => self.refuse(format!("{key} is {value}, not a size")),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        match self.optional_size(key)? {
            Some(size) => Ok(size),
            None => self.refuse(format!("{key} is missing")),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_f64().map(Some).map_or_else(|| self.refuse(format!("{key} is {value}, not a number")), Ok)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_bool().map(Some).map_or_else(|| self.refuse(format!("{key} is {value}, not true or false")), Ok)
    }

    /// A token id; of a list (Llama 3 has several ends) the first.
    fn token_id(&self, key: &str) -> Option<u32> {
        let value = self.map.get(key)?;
        value.as_u64().or_else(|| value.get(0)?.as_u64()).and_then(|id| u32::try_from(id).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::spec;

    fn read(config: &Value) -> Result<(Spec, SpecialIds)> {
        read_config(&config.to_string(), Path::new("config.json"))
    }

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
            "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1,
            "eos_token_id": [2, 3],
        })
    }

    #[test]
    fn every_face_reads_back_exactly() {
        for norm in [Norm::Rms, Norm::SingleScale] {
            for (linear, sub_norm, qk_norm) in [(LinearKind::Dense, false, true), (LinearKind::Ternary, true, false)] {
                let spec = Spec { norm, linear, sub_norm, qk_norm, norm_eps: 1.1e-5, ..spec() };
                let ids = SpecialIds { bos: Some(1), eos: None };
                assert_eq!(read(&config_json(&spec, ids)).unwrap(), (spec, ids));
            }
        }
    }

    #[test]
    fn plain_faces_are_true_llama_or_qwen_configurations() {
        for (qk_norm, model_type) in [(false, "llama"), (true, "qwen3")] {
            let spec = Spec { qk_norm, ..spec() };
            let mut config = config_json(&spec, SpecialIds::default());
            assert_eq!(config["model_type"], model_type);
            // What another program sees, without our own object, says the same.
            config.as_object_mut().unwrap().remove("osprey");
            assert_eq!(read(&config).unwrap().0, spec);
        }
        let ternary = config_json(&Spec { linear: LinearKind::Ternary, ..spec() }, SpecialIds::default());
        assert_eq!(ternary["model_type"], "osprey");
    }

    #[test]
    fn optional_keys_have_their_defaults() {
        let (spec, ids) = read(&llama()).unwrap();
        assert_eq!((spec.kv_heads, spec.head_dim, spec.rope_theta, spec.tied), (8, 8, 10_000.0, false));
        assert_eq!(ids, SpecialIds { bos: Some(1), eos: Some(2) });
        let mut new_style = llama();
        new_style["rope_parameters"] = json!({ "rope_theta": 500_000.0, "rope_type": "default" });
        new_style["head_dim"] = json!(16);
        let (spec, _) = read(&new_style).unwrap();
        assert_eq!((spec.head_dim, spec.rope_theta), (16, 500_000.0));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        let cases = [
            ("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
            ("attention_bias", json!(true), "attention_bias"),
            ("rope_scaling", json!({ "rope_type": "yarn", "factor": 8.0 }), "yarn"),
            ("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 }), "rope_scaling.low_freq_factor"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("hidden_size", json!("wide"), "hidden_size"),
            ("hidden_size", json!(65), "no multiple"),
            ("hidden_size", json!(0), "hidden_size is 0"),
            ("num_hidden_layers", json!(u64::MAX), "num_hidden_layers"),
            ("num_key_value_heads", json!(3), "share 3"),
            ("vocab_size", Value::Null, "vocab_size is missing"),
            ("quantization_config", json!({ "quant_method": "gptq" }), "gptq"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("osprey", json!({ "spec": { "vocab": 1 } }), "osprey.spec"),
        ];
        for (key, value, word) in cases {
            let mut config = llama();
            config[key] = value;
            let message = read(&config).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("config.json"), "{message}");
        }
        assert!(read_config("{", Path::new("c")).is_err());
        assert!(read_config("[]", Path::new("c")).is_err());
    }

    #[test]
    fn rotary_scaling_is_read_where_either_version_puts_it() {
        let rope = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        });
        let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
        for key in ["rope_scaling", "rope_parameters"] {
            let mut config = llama();
            config[key] = rope.clone();
            let (spec, ids) = read(&config).unwrap();
            assert_eq!(spec.rope_scaling, Some(expected.clone()));
            let mut written = config_json(&spec, ids);
            written.as_object_mut().unwrap().remove("osprey");
            assert_eq!(read(&written).unwrap().0, spec);
        }
        let mut config = llama();
        config["rope_scaling"] = rope;
        config["rope_scaling"]["factor"] = json!(0.0);
        assert!(read(&config).unwrap_err().to_string().contains("impossible rotary scaling"));
    }

    #[test]
    fn an_edited_file_is_noticed() {
        let mut config = config_json(&spec(), SpecialIds::default());
        config["hidden_size"] = json!(128);
        assert!(read(&config).unwrap_err().to_string().contains("osprey.spec has"));
    }
}
