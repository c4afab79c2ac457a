//! What a run carries from step to step, and how it becomes a checkpoint and comes back.

use super::Setup;
use super::evaluate::host_tensors;
use super::metrics::Sinks;
use super::step::parameter_infos;
use crate::checkpoint::{self, Checkpoint, Meta, Payload};
use crate::data::Cursor;
use crate::error::{Error, Result};
use crate::export::config::config_json;
use crate::export::peft;
use crate::model::Parameters;
use crate::ops::cpu::isa::isa;
use crate::ops::host::host;
use crate::optim::Optimizer;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const OPTIMIZER: &str = "optimizer.safetensors";
const CURSOR: &str = "data_cursor.json";

/// Where the data stood when `saved` was written.
pub fn cursor(saved: &Checkpoint) -> Result<Cursor> {
    saved.json(CURSOR)
}

/// Weights, optimizer state and the number of steps taken; the order of the data is a pure function of the step.
pub struct State {
    pub step: u64,
    pub parameters: Parameters,
    pub optimizer: Optimizer,
    /// On rank 0.
    pub metrics: Option<Sinks>,
    /// The run's own checkpoint that holds exactly this state, until a step is taken.
    pub saved: Option<PathBuf>,
}

impl State {
    /// The start of a run.
    pub fn fresh(setup: &Setup) -> Result<Self> {
        let parameters = setup.parameters()?;
        Self::with(setup, 0, parameters, |_| Ok(()))
    }

    /// The metrics are opened, which cuts them to `step`, only when nothing else can be refused.
    fn with(setup: &Setup, step: u64, parameters: Parameters, load: impl FnOnce(&mut Optimizer) -> Result<()>) -> Result<Self> {
        let infos = parameter_infos(&parameters, setup.spec.heads, setup.spec.kv_heads);
        let ranks = &setup.ranks;
        let mut optimizer = Optimizer::for_rank(&setup.optim, &infos, setup.train.steps, ranks.rank(), ranks.size())?;
        load(&mut optimizer)?;
        let metrics = ranks.is_first().then(|| Sinks::open(&setup.run_dir, step)).transpose()?;
        Ok(Self { step, parameters, optimizer, metrics, saved: None })
    }

    /// The state that `saved` holds, for the run that `setup` describes.
    pub fn resume(setup: &Setup, saved: &Checkpoint) -> Result<Self> {
        if saved.step() > setup.train.steps {
            let cause = format!("is at step {}, past the recipe's {}", saved.step(), setup.train.steps);
            return Err(Error::file(saved.dir(), cause).fix("raise train.steps, or choose another run.dir"));
        }
        let parameters = read_weights(setup, saved)?;
        let held = saved.tensors(OPTIMIZER)?;
        let mut state = Self::with(setup, saved.step(), parameters, |optimizer| {
            optimizer.load_state(held.iter().map(|(name, (_, values))| (name.as_str(), values.as_slice())))
        })?;
        state.saved = (saved.dir().parent() == Some(setup.run_dir.as_path())).then(|| saved.dir().to_owned());
        Ok(state)
    }

    /// Writes `RUN/step-NNNNNN/` and returns it.
    pub fn save(&self, setup: &Setup, cursor: &Cursor, val_loss_quantized: Option<f64>) -> Result<PathBuf> {
        let cursor = serde_json::to_value(cursor).map_err(|error| Error::input(CURSOR, error))?;
        self.write(setup, &setup.run_dir, val_loss_quantized, vec![(CURSOR.to_owned(), Payload::json(&cursor))])
    }

    /// Writes a checkpoint with `extra` files into `folder`: rank 0 does, with the state of all. All ranks must come here.
    pub(super) fn write(
        &self,
        setup: &Setup,
        folder: &Path,
        val_loss_quantized: Option<f64>,
        extra: Vec<(String, Payload<'_>)>,
    ) -> Result<PathBuf> {
        let whole = if setup.ranks.is_alone() { vec![] } else { self.gather(setup)? };
        if !setup.ranks.is_first() {
            return Ok(folder.join(checkpoint::folder_name(self.step)));
        }
        let weights = host_tensors(&self.parameters)?;
        let prefix = prefix(setup);
        let borrowed = weights.iter().map(|(name, tensor)| Ok((name, tensor.dims(), host(tensor)?))).collect::<Result<Vec<_>>>()?;
        let weights = borrowed.iter().map(|(name, shape, data)| checkpoint::Tensor::new(format!("{prefix}{name}"), shape, data)).collect();
        let state: Vec<(String, &[f32])> = if setup.ranks.is_alone() {
            self.optimizer.state_tensors().collect()
        } else {
            whole.iter().map(|(name, values)| (name.clone(), values.as_slice())).collect()
        };
        let mut state: Vec<_> = state.iter().map(|(name, values)| checkpoint::Tensor::new(name, &[values.len()], values)).collect();
        state.sort_by(|a, b| a.name.cmp(&b.name));
        let adapter = setup.finetune.as_ref().and_then(|finetune| finetune.adapter_config());
        let config = match &adapter {
            Some(adapter) => (peft::CONFIG.to_owned(), Payload::json(adapter)),
            None => ("config.json".to_owned(), Payload::json(&config_json(&setup.spec, setup.special_ids))),
        };
        let mut files =
            vec![config, (setup.weights_file().to_owned(), Payload::Tensors(weights)), (OPTIMIZER.to_owned(), Payload::Tensors(state))];
        files.extend(setup.tokenizer_files.iter().map(|(name, text)| (name.clone(), Payload::text(text.clone()))));
        files.extend(extra);
        let meta = Meta {
            threads: setup.threads,
            instruction_path: isa().to_string(),
            recipe: setup.recipe.clone(),
            val_loss_quantized,
            extra: base_of(setup),
        };
        checkpoint::save(folder, self.step, files, meta)
    }
}

impl State {
    /// The optimizer's state of all ranks, on rank 0.
    fn gather(&self, setup: &Setup) -> Result<Vec<(String, Vec<f32>)>> {
        let first = setup.ranks.is_first();
        self.optimizer.whole_state(|owner, mut values| {
            setup.ranks.broadcast("optimizer state", owner, &mut values)?;
            Ok(if first { values } else { vec![] })
        })
    }
}

/// The weights in a checkpoint of a model of shape `spec`.
pub(super) fn read_weights(setup: &Setup, saved: &Checkpoint) -> Result<Parameters> {
    check_base(setup, saved)?;
    let prefix = prefix(setup);
    let tensors: BTreeMap<String, Tensor> = saved
        .tensors(setup.weights_file())?
        .into_iter()
        .map(|(name, (shape, values))| {
            Ok((name.strip_prefix(prefix).unwrap_or(&name).to_owned(), Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?))
        })
        .collect::<Result<_>>()?;
    let parameters = match setup.trains_adapter() {
        true => setup.parameters()?,
        false => Parameters::zeros(&setup.spec, &setup.device)?,
    };
    parameters.fill(&tensors).map(|()| parameters).map_err(|error| {
        Error::file(saved.dir(), error).fix("use the recipe that wrote the checkpoint, or --resume never with another run.dir")
    })
}

/// PEFT names modules from the wrapped model down.
fn prefix(setup: &Setup) -> &'static str {
    if setup.trains_adapter() { peft::PREFIX } else { "" }
}

/// What an adapter's checkpoint says of its base.
fn base_of(setup: &Setup) -> serde_json::Map<String, serde_json::Value> {
    let finetune = setup.finetune.as_ref().filter(|_| setup.trains_adapter());
    finetune.map(|finetune| (peft::BASE_FINGERPRINT.to_owned(), peft::fingerprint(&finetune.loaded).into())).into_iter().collect()
}

fn check_base(setup: &Setup, saved: &Checkpoint) -> Result<()> {
    let now = base_of(setup);
    match (now.get(peft::BASE_FINGERPRINT), saved.manifest().extra.get(peft::BASE_FINGERPRINT)) {
        (Some(now), Some(then)) if now != then => Err(Error::file(saved.dir(), "was trained on another base than finetune.base names now")
            .fix("put the base back, or choose another run.dir")),
        _ => Ok(()),
    }
}
