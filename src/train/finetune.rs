//! `[finetune]` of a recipe: a trained model to start from, and how much of it is trained.

use crate::data::hub;
use crate::error::{Error, Result};
use crate::export::config::SpecialIds;
use crate::export::import::{Loaded, load_any};
use crate::export::names::is_block_matrix;
use crate::export::parameter::Parameter;
use crate::export::{adapter::Merge, peft};
use crate::model::adapt::{Adapted, Lora, targeted};
use crate::model::{LinearKind, Parameters, Spec};
use crate::ops::cpu::ternary::PackedTernary;
use crate::ops::frozen::Frozen;
use crate::optim::Span;
use crate::quant::nf4::Nf4Matrix;
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Keys of `[finetune]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Checkpoint, Hugging Face directory or name on its hub, adapter, or (with `lora`) GGUF file.
    pub base: PathBuf,
    /// Train low-rank matrices beside a frozen base; without it every weight is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// How the frozen base is held; in the bits of its file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
    /// Turn a dense base into a ternary model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ternary: Option<Continuation>,
    /// Tokens per row; the base's context, at most 2048, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// As in `[model]`.
    #[serde(default)]
    pub activation_checkpointing: bool,
}

/// Storage of a frozen base in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantize {
    /// NF4 with double quantization: QLoRA.
    Nf4,
}

/// From floats to ternary codes. Rounding is blended in over the first steps: at once it would forget what the base knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Continuation {
    /// Steps until weights and activations are rounded in full.
    pub warmup: Span,
}

/// A fifth of the run.
impl Default for Continuation {
    fn default() -> Self {
        Self { warmup: Span::Fraction(0.2) }
    }
}

/// Rows of a base with a long context are no longer than this unless the recipe says so.
const DEFAULT_ROW: usize = 2048;

impl Config {
    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// The recipe's mistake, with its key.
    pub fn check(&self) -> Result<()> {
        if let Some(lora) = &self.lora {
            lora.check()?;
        }
        if self.quantize.is_some() && self.lora.is_none() {
            return Err(Error::input("finetune.quantize", "every weight of a quantized base would have to be trained")
                .fix("add finetune.lora, or leave finetune.quantize out"));
        }
        if self.ternary.is_some() && self.lora.is_some() {
            return Err(Error::input("finetune.ternary", "a frozen base cannot become ternary").fix("leave finetune.lora out"));
        }
        match self.ternary.as_ref().map(|continuation| continuation.warmup) {
            Some(Span::Fraction(fraction)) if !(0.0..=1.0).contains(&fraction) => {
                Err(Error::input("finetune.ternary.warmup", format!("{fraction} is not a fraction")).fix("give a number from 0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

/// A base that is open, and what will be trained on it.
#[derive(Clone, Debug)]
pub struct Finetune {
    pub config: Config,
    /// Where the base lies, absolute.
    pub base: PathBuf,
    /// What an adapter calls it: its name on the hub where it has one, else `base`.
    pub base_name: PathBuf,
    pub loaded: Arc<Loaded>,
    /// The modules that get an adapter, with their shapes.
    pub targets: BTreeMap<String, [usize; 2]>,
    /// The shape that is trained.
    pub spec: Spec,
}

impl Finetune {
    /// Opens the base; relative paths start at the working directory or, where nothing is there, at the recipe's folder.
    ///
    /// # Errors
    /// The base is missing, malformed, or not one that can be trained as the recipe asks.
    pub fn open(config: &Config, recipe_folder: &Path) -> Result<Self> {
        config.check()?;
        let place = place(&config.base, recipe_folder)?;
        let mut loaded = load_any(&place)?;
        if loaded.adapter.is_some() {
            loaded = loaded.merged(Merge::Dense)?;
        }
        let mut spec = loaded.spec.clone();
        if config.lora.is_none() {
            check_trainable(&loaded, &place)?;
        }
        if config.ternary.is_some() {
            if spec.linear == LinearKind::Ternary {
                return Err(Error::input("finetune.ternary", "the base is ternary already").fix("leave the key out"));
            }
            spec.linear = LinearKind::Ternary;
        }
        if let Some(asked) = config.context.filter(|asked| !(1..=spec.context).contains(asked)) {
            return Err(Error::input("finetune.context", format!("{asked} is outside 1 to {}, the base's context", spec.context))
                .fix("give fewer tokens"));
        }
        let targets = match &config.lora {
            Some(lora) => targeted(&spec, &lora.targets, "finetune.lora.targets")?,
            None => BTreeMap::new(),
        };
        let base = place.canonicalize().map_err(Error::io("resolve", &place))?;
        let base_name = if hub::is_name(&config.base) && !beside(&config.base, recipe_folder) { config.base.clone() } else { base.clone() };
        Ok(Self { config: config.clone(), base, base_name, loaded: Arc::new(loaded), targets, spec })
    }

    /// Tokens per row.
    pub fn row_tokens(&self) -> usize {
        self.config.context.unwrap_or(self.spec.context.min(DEFAULT_ROW))
    }

    /// Ids that generation needs, as the base has them.
    pub fn ids(&self) -> SpecialIds {
        self.loaded.ids
    }

    /// The parameters before the first step: the base's, or the base frozen with fresh adapters.
    ///
    /// # Errors
    /// When a tensor of the base cannot be decoded.
    pub fn parameters(&self, seed: u64, device: &Device) -> Result<Parameters> {
        let Some(lora) = &self.config.lora else {
            let parameters = Parameters::from_tensors(&self.spec, &self.loaded.weights()?, device);
            self.loaded.parameters.values().for_each(Parameter::release);
            return parameters;
        };
        let adapted = Adapted { adapter: Arc::new(lora.clone()), modules: self.targets.clone() };
        Parameters::adapted(Arc::new(self.frozen(device)?), adapted, seed, device)
    }

    /// How much of the rounding is done at `step` of a run of `total`.
    pub fn blend(&self, step: u64, total: u64) -> f32 {
        let Some(continuation) = &self.config.ternary else { return 1.0 };
        let warmup = continuation.warmup.steps(total);
        if step >= warmup { 1.0 } else { (step as f64 / warmup as f64) as f32 }
    }

    /// `adapter_config.json` of what is trained; nothing when every weight is.
    pub fn adapter_config(&self) -> Option<serde_json::Value> {
        let lora = self.config.lora.as_ref()?;
        let modules: BTreeSet<String> = self.targets.keys().cloned().collect();
        Some(peft::config_json(lora, &modules, &self.spec, &self.base_name))
    }

    fn frozen(&self, device: &Device) -> Result<BTreeMap<String, Frozen>> {
        let freeze = |(name, parameter): (&String, &Parameter)| {
            let frozen = self.freeze(name, parameter, device)?;
            // What was copied is not to be held twice; what is read in place comes back with the first step.
            parameter.release();
            Ok((name.clone(), frozen))
        };
        self.loaded.parameters.iter().map(freeze).collect()
    }

    /// One weight of the base as training holds it: ternary codes packed, quantized as asked, and otherwise in the bits of its file.
    fn freeze(&self, name: &str, parameter: &Parameter, device: &Device) -> Result<Frozen> {
        let dense = || Ok(Frozen::Dense(parameter.to_tensor()?.to_dtype(DType::F32)?.to_device(device)?));
        let [rows, columns] = parameter.shape[..] else { return dense() };
        let in_block = is_block_matrix(name);
        if in_block && self.spec.linear == LinearKind::Ternary {
            return Ok(match parameter.ternary(name) {
                Ok((codes, scale)) => Frozen::Ternary(Arc::new(PackedTernary::from_codes(&codes, rows, columns, scale))),
                Err(_) if is_stored_ternary(parameter) => Frozen::Stored(Arc::new(parameter.clone())),
                Err(_) => Frozen::Ternary(Arc::new(PackedTernary::from_weights(&parameter.to_vec()?, rows, columns))),
            });
        }
        // The head is read whole at every step.
        let is_head = name == "lm_head.weight" || self.spec.tied && name == "model.embed_tokens.weight";
        match self.config.quantize {
            Some(Quantize::Nf4) if in_block => Ok(Frozen::Stored(Arc::new(Nf4Matrix::new(&parameter.to_vec()?, rows, columns)))),
            _ if is_head && parameter.format.layout().name == "f32" => dense(),
            _ => Ok(Frozen::Stored(Arc::new(parameter.clone()))),
        }
    }
}

fn is_stored_ternary(parameter: &Parameter) -> bool {
    crate::quant::ternary_by_id(parameter.format.layout().id).is_some()
}

/// All weights of a base that is trained in full must be floats: what was lost to quantization cannot be found again.
fn check_trainable(loaded: &Loaded, place: &Path) -> Result<()> {
    let quantized = loaded.parameters.iter().find(|(_, parameter)| parameter.format.layout().block > 1);
    match quantized {
        Some((name, parameter)) => {
            Err(Error::file(place, format!("stores {name} as {}, which cannot be trained in full", parameter.format.layout().name))
                .fix("add finetune.lora, which keeps the base as it is, or start from the unquantized model"))
        }
        None => Ok(()),
    }
}

/// Whether `base` lies in the recipe's folder.
fn beside(base: &Path, recipe_folder: &Path) -> bool {
    recipe_folder.join(base).exists()
}

fn place(base: &Path, recipe_folder: &Path) -> Result<PathBuf> {
    if base.exists() {
        return Ok(base.to_owned());
    }
    if beside(base, recipe_folder) {
        return Ok(recipe_folder.join(base));
    }
    if hub::is_name(base) {
        return hub::resolve(base).map(Cow::into_owned);
    }
    let cause = format!("{} does not exist, neither in the working directory nor beside the recipe", base.display());
    Err(Error::input("finetune.base", cause)
        .fix("give a checkpoint, a Hugging Face directory, a GGUF file, or the name of a model on the hub (organization/name)"))
}
