//! From a recipe to a run: opens the data, resolves the model, and gathers what the training loop needs.

use super::{CacheConfig, Recipe, to_toml};
use crate::data::chat::Open;
use crate::data::config::TokenizerConfig;
use crate::data::loader::Shape;
use crate::data::{Batch, Cursor, Dataset, Loader};
use crate::error::{Error, Result};
use crate::export::Target;
use crate::export::config::SpecialIds;
use crate::model::{LinearKind, Spec, flops};
use crate::train::dist::Ranks;
use crate::train::finetune::{self, Finetune};
use crate::train::{Feed, Setup};
use candle_core::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64;

/// A recipe whose data is open and whose model is resolved.
pub struct Assembled {
    pub recipe: Recipe,
    pub dataset: Dataset,
    pub setup: Setup,
}

impl Recipe {
    /// Refuses values that no stage can use; what depends on data or on other stages is checked by [`assemble`].
    pub fn check(&self) -> Result<()> {
        self.run.check()?;
        self.train.check()?;
        self.optim.check(self.train.steps)?;
        self.export.targets()?;
        self.validate.cache.as_ref().map(CacheConfig::options).transpose()?;
        if let Some(finetune) = &self.finetune {
            finetune.check()?;
        }
        self.origin().map(drop)
    }

    /// Where the model comes from.
    pub fn origin(&self) -> Result<Origin<'_>> {
        match (&self.model, &self.finetune) {
            (Some(model), None) => Ok(Origin::Fresh(model)),
            (None, Some(finetune)) => Ok(Origin::Base(finetune)),
            (None, None) => Err(Error::input("recipe", "neither `model` nor `finetune` is there")
                .fix("add a table `[model]` to train from the start, or `[finetune]` with a base")),
            (Some(_), Some(_)) => Err(Error::input("model", "a fine-tuning run has the model of its base")
                .fix("remove [model]; finetune.context and finetune.activation_checkpointing say what else there is to say")),
        }
    }
}

/// Where a run's model comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'r> {
    /// Drawn at random.
    Fresh(&'r crate::model::Config),
    /// Trained before.
    Base(&'r finetune::Config),
}

/// What the rest of a run needs to know of its model.
struct Start {
    spec: Spec,
    row_tokens: usize,
    activation_checkpointing: bool,
    finetune: Option<Finetune>,
}

/// Opens the data (building shards on the first use), resolves the model and checks that every export the recipe asks for is possible.
/// `notes` hears what takes time.
pub fn assemble(mut recipe: Recipe, recipe_path: &Path, device: Device, notes: &mut dyn FnMut(&str)) -> Result<Assembled> {
    recipe.check()?;
    let folder = recipe_path.parent().unwrap_or(Path::new("."));
    let finetune = recipe.finetune.as_ref().map(|config| Finetune::open(config, folder)).transpose()?;
    if let Some(finetune) = &finetune {
        recipe.data.tokenizer = base_tokenizer(&recipe, finetune)?;
    }
    let dataset = Dataset::open(&recipe.data, folder, notes)?;
    let start = start(&recipe, finetune, &dataset)?;
    let spec = start.spec;
    if device.is_cpu() {
        check_memory(&spec, start.row_tokens, start.finetune.as_ref(), &recipe)?;
    }
    for question in &recipe.validate.chat {
        Open::user(question).and_then(|open| open.prompt(&dataset.tokenizer)).map_err(at_chat)?;
    }
    for target in recipe.export.targets()? {
        check_target(&spec, start.finetune.as_ref(), target)?;
    }
    let own_ids = SpecialIds { bos: dataset.tokenizer.bos(), eos: dataset.tokenizer.eos() };
    let setup = Setup {
        row_tokens: start.row_tokens,
        activation_checkpointing: start.activation_checkpointing,
        train: recipe.train.clone(),
        eval: recipe.eval.clone(),
        optim: recipe.optim.clone(),
        checkpoint: recipe.checkpoint.clone(),
        run_dir: PathBuf::from(&recipe.run.dir),
        seed: recipe.run.seed,
        threads: rayon::current_num_threads(),
        ranks: Ranks::alone(),
        reference: !device.is_cpu(),
        device,
        recipe: to_toml(&recipe)?,
        special_ids: special_ids(&recipe, own_ids, start.finetune.as_ref()),
        tokenizer_files: dataset.tokenizer.files(),
        finetune: start.finetune,
        spec,
    };
    Ok(Assembled { recipe, dataset, setup })
}

fn start(recipe: &Recipe, finetune: Option<Finetune>, dataset: &Dataset) -> Result<Start> {
    match (recipe.origin()?, finetune) {
        (Origin::Fresh(model), _) => {
            let spec = model.resolve(dataset.tokenizer.vocabulary())?;
            Ok(Start { row_tokens: spec.context, activation_checkpointing: model.activation_checkpointing, finetune: None, spec })
        }
        (Origin::Base(config), Some(finetune)) => {
            let (tokens, rows) = (dataset.tokenizer.vocabulary(), finetune.spec.vocab);
            if tokens > rows {
                return Err(Error::input("data.tokenizer", format!("has {tokens} tokens, the base's embedding {rows} rows"))
                    .fix("leave data.tokenizer out, which takes the base's own"));
            }
            Ok(Start {
                row_tokens: finetune.row_tokens(),
                activation_checkpointing: config.activation_checkpointing,
                spec: finetune.spec.clone(),
                finetune: Some(finetune),
            })
        }
        (Origin::Base(_), None) => unreachable!("a recipe with a base was opened with it"),
    }
}

/// The base's own tokenizer, as a folder; a recipe may name another one that fits, by file.
fn base_tokenizer(recipe: &Recipe, finetune: &Finetune) -> Result<TokenizerConfig> {
    let asked = &recipe.data.tokenizer;
    if *asked != TokenizerConfig::Byte {
        return match asked {
            TokenizerConfig::File(_) => Ok(asked.clone()),
            _ => Err(Error::input("data.tokenizer", "would make a new tokenizer, which the base was not trained with")
                .fix("leave data.tokenizer out, which takes the base's own")),
        };
    }
    if finetune.base.join("tokenizer.json").is_file() {
        return Ok(TokenizerConfig::File(finetune.base.clone()));
    }
    let Some(tokenizer) = &finetune.loaded.tokenizer else {
        return Err(Error::file(&finetune.base, "has no tokenizer").fix("name one with data.tokenizer.file"));
    };
    // A GGUF file holds its tokenizer inside.
    let template = xxh3_64(tokenizer.chat_template().unwrap_or_default().as_bytes());
    let folder = recipe.data.cache.join(format!("tokenizer-{}-{template:016x}", tokenizer.fingerprint()));
    if !folder.join("tokenizer.json").is_file() {
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        tokenizer.save(&folder)?;
    }
    Ok(TokenizerConfig::File(folder))
}

/// The base's ids; the end of text is the recipe's, where it names one.
fn special_ids(recipe: &Recipe, own: SpecialIds, finetune: Option<&Finetune>) -> SpecialIds {
    let ids = finetune.map_or(own, Finetune::ids);
    if recipe.data.end_of_text.is_some() { SpecialIds { eos: own.eos, ..ids } } else { ids }
}

/// Names the recipe's key instead of the option.
fn at_chat(error: Error) -> Error {
    match error {
        Error::Input { cause, .. } => {
            Error::input("validate.chat", cause).fix("ask what the template of the data takes, or leave the key out")
        }
        other => other,
    }
}

/// Refuses an artifact that cannot be made, before training.
fn check_target(spec: &Spec, finetune: Option<&Finetune>, target: Target) -> Result<()> {
    let adapts = finetune.is_some_and(|finetune| finetune.config.lora.is_some());
    if target == Target::Peft && adapts {
        return Ok(());
    }
    // An adapter leaves a ternary base only as a dense model, unless the format packs codes.
    let dense = adapts && spec.linear == LinearKind::Ternary && !target.packs_ternary();
    let spec = if dense { &Spec { linear: LinearKind::Dense, ..spec.clone() } } else { spec };
    crate::export::plan::plan(spec, target).map(drop)
}

/// Refuses a run that cannot fit into this machine: what would end in the middle of the first step is said before it.
fn check_memory(spec: &Spec, row_tokens: usize, finetune: Option<&Finetune>, recipe: &Recipe) -> Result<()> {
    let Some(total) = machine_memory() else { return Ok(()) };
    let checkpointing = recipe.finetune.as_ref().map_or_else(
        || recipe.model.as_ref().is_some_and(|model| model.activation_checkpointing),
        |finetune| finetune.activation_checkpointing,
    );
    let rows = Spec { context: row_tokens, ..spec.clone() };
    // A frozen weight has no gradient, and may lie in a file.
    let needed = match finetune.is_some_and(|finetune| finetune.config.lora.is_some()) {
        true => flops::activation_bytes(&rows, recipe.train.batch, checkpointing),
        false => flops::training_bytes(&rows, recipe.train.batch, 0, checkpointing),
    };
    // The estimate is not exact; only what is certain is refused.
    if (needed as f64) * 0.8 <= total as f64 {
        return Ok(());
    }
    let cause = format!("weights, gradients and activations need about {} GB, this machine has {} GB", needed >> 30, total >> 30);
    Err(Error::input("train.batch", cause)
        .fix("lower train.batch and raise train.accumulate, set activation_checkpointing = true, or choose a smaller model"))
}

/// Bytes of main memory; nothing where the system does not tell.
fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

impl Assembled {
    /// Training batches from the start, or from where a checkpoint stopped.
    pub fn feed(&self, cursor: Option<&Cursor>) -> Result<Batches> {
        let (rank, ranks) = (self.setup.ranks.rank(), self.setup.ranks.size());
        let shape = Shape { rows: self.recipe.train.batch / ranks, context: self.setup.row_tokens, rank, ranks };
        let loader = Loader::start(&self.dataset, shape, self.recipe.run.seed, cursor)?;
        Ok(Batches { loader, accumulate: self.recipe.train.accumulate })
    }

    /// Held-out batches, the same at every evaluation.
    pub fn validation(&self) -> Vec<Arc<Batch>> {
        let most = (self.recipe.eval.rows > 0).then_some(self.recipe.eval.rows);
        self.dataset.validation_batches(self.recipe.train.batch, self.setup.row_tokens, most)
    }
}

/// The loader as the training loop sees it.
pub struct Batches {
    loader: Loader,
    accumulate: usize,
}

impl Feed for Batches {
    fn next(&mut self, _step: u64) -> Result<Vec<Arc<Batch>>> {
        (0..self.accumulate).map(|_| self.loader.next_batch()).collect()
    }

    fn waited(&self) -> Duration {
        self.loader.waited()
    }

    fn cursor(&self) -> Cursor {
        self.loader.cursor().clone()
    }
}

/// The device called `name`: `cpu` or `cuda:N`.
pub fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let Some(ordinal) = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) else {
        return Err(Error::input("--device", format!("there is no device `{name}`")).fix("give cpu or cuda:N"));
    };
    if !cfg!(feature = "cuda") {
        return Err(
            Error::input("--device", "this osprey was built without CUDA").fix("build with `cargo build --release --features cuda`")
        );
    }
    Device::new_cuda(ordinal).map_err(|error| Error::input("--device", format!("{name} cannot be opened: {error}")))
}
