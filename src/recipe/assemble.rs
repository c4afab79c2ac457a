//! From a recipe to a run: opens the data, resolves the model, and gathers what the training loop needs.

use super::{Recipe, to_toml};
use crate::data::loader::Shape;
use crate::data::{Batch, Cursor, Dataset, Loader};
use crate::error::{Error, Result};
use crate::export::config::SpecialIds;
use crate::model::{Spec, flops};
use crate::train::{Feed, Setup};
use candle_core::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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
        Ok(())
    }
}

/// Opens the data (building shards on the first use), resolves the model and checks that every export the recipe asks for is possible.
/// `notes` hears what takes time.
pub fn assemble(recipe: Recipe, recipe_path: &Path, device: Device, notes: &mut dyn FnMut(&str)) -> Result<Assembled> {
    recipe.check()?;
    let folder = recipe_path.parent().unwrap_or(Path::new("."));
    let dataset = Dataset::open(&recipe.data, folder, notes)?;
    let spec = recipe.model.resolve(dataset.tokenizer.vocabulary())?;
    if device.is_cpu() {
        check_memory(&spec, &recipe)?;
    }
    for target in recipe.export.targets()? {
        crate::export::plan::plan(&spec, target)?;
    }
    let setup = Setup {
        activation_checkpointing: recipe.model.activation_checkpointing,
        train: recipe.train.clone(),
        eval: recipe.eval.clone(),
        optim: recipe.optim.clone(),
        checkpoint: recipe.checkpoint.clone(),
        run_dir: PathBuf::from(&recipe.run.dir),
        seed: recipe.run.seed,
        threads: rayon::current_num_threads(),
        reference: !device.is_cpu(),
        device,
        recipe: to_toml(&recipe)?,
        special_ids: SpecialIds { bos: dataset.tokenizer.bos(), eos: dataset.tokenizer.eos() },
        tokenizer_files: dataset.tokenizer_files(),
        spec,
    };
    Ok(Assembled { recipe, dataset, setup })
}

/// Refuses a run that cannot fit into this machine: what would end in the middle of the first step is said before it.
fn check_memory(spec: &Spec, recipe: &Recipe) -> Result<()> {
    let Some(total) = machine_memory() else { return Ok(()) };
    let needed = flops::training_bytes(spec, recipe.train.batch, 0, recipe.model.activation_checkpointing);
    // The estimate is not exact; only what is certain is refused.
    if (needed as f64) * 0.8 <= total as f64 {
        return Ok(());
    }
    let cause = format!("weights, gradients and activations need about {} GB, this machine has {} GB", needed >> 30, total >> 30);
    Err(Error::input("train.batch", cause)
        .fix("lower train.batch and raise train.accumulate, set model.activation_checkpointing = true, or choose a smaller model"))
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
        let shape = Shape { rows: self.recipe.train.batch, context: self.setup.spec.context, rank: 0, ranks: 1 };
        let loader = Loader::start(&self.dataset, shape, self.recipe.run.seed, cursor)?;
        Ok(Batches { loader, accumulate: self.recipe.train.accumulate })
    }

    /// Held-out batches, the same at every evaluation.
    pub fn validation(&self) -> Vec<Arc<Batch>> {
        let most = (self.recipe.eval.rows > 0).then_some(self.recipe.eval.rows);
        self.dataset.validation_batches(self.recipe.train.batch, self.setup.spec.context, most)
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
