//! `osprey bench`: speed, measured as medians of whole steps.

use super::arguments::{Bench, BenchTarget};
use super::printer::Printer;
use super::{Status, memory, start_threads, write_json};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::infer::kv::codec::bench as codec;
use crate::model::{Decoder, GradientBuffers, Parameters, Spec, flops, init::initialize};
use crate::ops::cpu::bench::{Measurement, Shape, dense, median, ternary};
use crate::ops::rng::Stream;
use crate::optim::{Optimizer, RuleName};
use crate::recipe::{Origin, Recipe, assemble, load};
use crate::train::{Finetune, step};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Measures what was asked for.
pub(super) fn run(command: &Bench, printer: &Printer) -> Result<Status> {
    match command.what {
        BenchTarget::Train => train(command, printer),
        BenchTarget::Optim => optim(command, printer),
        BenchTarget::Kernels => kernels(command, printer),
        BenchTarget::Decode => super::decode::run(command, printer),
        BenchTarget::Finetune => super::forgetting::run(command, printer),
    }
}

fn recipe(command: &Bench) -> Result<Recipe> {
    let Some(path) = &command.input else {
        return Err(Error::input("osprey bench", "no recipe was given").fix("for example: osprey bench train recipes/bench.toml"));
    };
    let recipe: Recipe = load(path, &command.overrides)?;
    recipe.check()?;
    start_threads(recipe.run.threads)?;
    Ok(recipe)
}

/// A model of the recipe's shape with batches of random tokens: nothing but computation.
struct Rig {
    decoder: Decoder,
    parameters: Parameters,
    gradients: GradientBuffers,
    recipe: Recipe,
    /// Tokens per row.
    row_tokens: usize,
    stream: Stream,
}

impl Rig {
    fn new(recipe: Recipe) -> Result<Self> {
        let (decoder, parameters, row_tokens) = Self::model(&recipe)?;
        let gradients = GradientBuffers::new(&parameters)?;
        Ok(Self { decoder, parameters, gradients, row_tokens, recipe, stream: Stream::new(1, "bench") })
    }

    /// The recipe's model, or its base with what is trained on it, and the tokens per row.
    fn model(recipe: &Recipe) -> Result<(Decoder, Parameters, usize)> {
        let (seed, device) = (recipe.run.seed, candle_core::Device::Cpu);
        match recipe.origin()? {
            Origin::Fresh(model) => {
                let spec = model.resolve(0)?;
                if spec.vocab == 0 {
                    return Err(Error::input("model.vocab", "is needed: a benchmark opens no tokenizer").fix("add --set model.vocab=8192"));
                }
                let (parameters, context) = (initialize(&spec, seed, &device)?, spec.context);
                Ok((Decoder::new(spec, model.activation_checkpointing), parameters, context))
            }
            Origin::Base(config) => {
                let finetune = Finetune::open(config, Path::new("."))?;
                let rows = finetune.row_tokens();
                let decoder = Decoder::with_positions(finetune.spec.clone(), rows, config.activation_checkpointing);
                Ok((decoder, finetune.parameters(seed, &device)?, rows))
            }
        }
    }

    fn batches(&mut self) -> Vec<Arc<Batch>> {
        let (rows, context, vocab) = (self.recipe.train.batch, self.row_tokens, self.decoder.spec().vocab as u64);
        let mut batch = || {
            let mut batch = Batch::padding(rows, context);
            let mut token = || self.stream.below(vocab) as u32;
            batch.inputs.iter_mut().chain(&mut batch.targets).for_each(|id| *id = token());
            batch.weights.fill(1.0);
            batch.document_starts.fill(0);
            batch.positions.iter_mut().enumerate().for_each(|(at, position)| *position = (at % context) as u32);
            Arc::new(batch)
        };
        (0..self.recipe.train.accumulate).map(|_| batch()).collect()
    }

    fn gradients(&mut self) -> Result<f64> {
        let batches = self.batches();
        step::gradients(&self.decoder, &self.parameters, &batches, self.recipe.train.z_loss, false, &mut self.gradients)
    }

    fn optimizer(&self, rule: RuleName) -> Result<Optimizer> {
        let spec = self.decoder.spec();
        let config = crate::optim::Config { rule, ..self.recipe.optim.clone() };
        Optimizer::new(&config, &step::parameter_infos(&self.parameters, spec.heads, spec.kv_heads), self.recipe.train.steps.max(1000))
    }

    /// Floating-point operations of a step.
    fn operations(&self) -> f64 {
        let rows = Spec { context: self.row_tokens, ..self.decoder.spec().clone() };
        if self.parameters.adapter().is_some() {
            flops::adapter_training(&rows, self.tokens())
        } else {
            flops::training(&rows, self.tokens())
        }
    }

    fn tokens(&self) -> usize {
        self.recipe.train.batch * self.recipe.train.accumulate * self.row_tokens
    }
}

#[derive(Serialize)]
struct TrainFigures {
    parameters: usize,
    tokens_per_step: usize,
    tokens_per_second: f64,
    step_milliseconds: f64,
    forward_backward_milliseconds: f64,
    gflops: f64,
    /// Peak of the process less what it held before the model was made.
    training_memory_bytes: Option<u64>,
    loss: f64,
}

fn train(command: &Bench, printer: &Printer) -> Result<Status> {
    let recipe = recipe(command)?;
    let before = memory::resident();
    let rule = recipe.optim.rule;
    let mut rig = Rig::new(recipe)?;
    let mut optimizer = rig.optimizer(rule)?;
    let (mut whole, mut passes, mut loss) = (vec![], vec![], 0.0);
    for number in 0..command.steps + 2 {
        let start = Instant::now();
        loss = rig.gradients()?;
        let pass = start.elapsed();
        step::update(&mut optimizer, number as u64, &rig.parameters, &rig.gradients, false)?;
        if number >= 2 {
            passes.push(pass);
            whole.push(start.elapsed());
        }
    }
    let (step_time, pass_time) = (median(whole), median(passes));
    let tokens = rig.tokens();
    let figures = TrainFigures {
        parameters: rig.parameters.total(),
        tokens_per_step: tokens,
        tokens_per_second: tokens as f64 / step_time.as_secs_f64(),
        step_milliseconds: step_time.as_secs_f64() * 1e3,
        forward_backward_milliseconds: pass_time.as_secs_f64() * 1e3,
        gflops: rig.operations() / step_time.as_secs_f64() / 1e9,
        training_memory_bytes: before.zip(memory::resident()).map(|((before, _), (_, peak))| peak.saturating_sub(before)),
        loss,
    };
    write_json(command.report.json.as_deref(), &figures)?;
    let memory = figures.training_memory_bytes.map_or_else(|| "unknown".to_owned(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6));
    printer.data(format!(
        "osprey {} {:?} params={:.1}M tok/s={:.0} ms/step={:.0} (forward+backward {:.0}) GFLOP/s={:.0} training memory {memory}",
        rule.name(),
        rig.decoder.spec().linear,
        figures.parameters as f64 / 1e6,
        figures.tokens_per_second,
        figures.step_milliseconds,
        figures.forward_backward_milliseconds,
        figures.gflops,
    ))?;
    Ok(Status::Done)
}

/// How often the recipe's batch is accumulated in the steps that an update is compared with.
const BATCHES: [usize; 4] = [1, 2, 4, 8];

#[derive(Serialize)]
struct RuleFigures {
    rule: &'static str,
    step_milliseconds: f64,
    /// Of the update's matrix products, after the FLOP model of `optim::orthogonalize`.
    gflop: f64,
    shares: Vec<Share>,
}

/// The update's share of a step of so many tokens.
#[derive(Serialize)]
struct Share {
    tokens: usize,
    share_of_time: f64,
    share_of_operations: f64,
}

impl RuleFigures {
    fn new(rule: RuleName, seconds: f64, operations: f64, pass: f64, rig: &Rig) -> Self {
        let share = |times: usize| Share {
            tokens: times * rig.tokens(),
            share_of_time: seconds / (seconds + times as f64 * pass),
            share_of_operations: operations / (operations + times as f64 * rig.operations()),
        };
        Self { rule: rule.name(), step_milliseconds: seconds * 1e3, gflop: operations / 1e9, shares: BATCHES.map(share).into() }
    }

    fn row(&self) -> Vec<String> {
        let share = |share: &Share| format!("{:.1} ({:.1})", share.share_of_time * 100.0, share.share_of_operations * 100.0);
        let figures = [self.rule.to_owned(), format!("{:.1}", self.step_milliseconds), format!("{:.2}", self.gflop)];
        figures.into_iter().chain(self.shares.iter().map(share)).collect()
    }
}

/// One update of each rule beside the forward and backward passes of the recipe's step, and of that step with larger batches.
fn optim(command: &Bench, printer: &Printer) -> Result<Status> {
    if command.compare {
        return super::compare::run(command, &recipe(command)?, printer);
    }
    let mut rig = Rig::new(recipe(command)?)?;
    rig.gradients()?;
    let mut passes = vec![];
    for _ in 0..command.steps.clamp(1, 3) {
        let start = Instant::now();
        rig.gradients()?;
        passes.push(start.elapsed());
    }
    let pass = median(passes).as_secs_f64();
    let mut figures = vec![];
    for rule in RuleName::ALL {
        let mut optimizer = rig.optimizer(rule)?;
        let mut times = vec![];
        for number in 0..=command.steps as u64 {
            let start = Instant::now();
            step::update(&mut optimizer, number, &rig.parameters, &rig.gradients, false)?;
            times.push(start.elapsed().as_secs_f64());
        }
        // The mean, not the median: LionMuon's steps alternate between two costs. The first one also touches fresh memory.
        let mean = times[1..].iter().sum::<f64>() / command.steps.max(1) as f64;
        figures.push(RuleFigures::new(rule, mean, optimizer.operations(), pass, &rig));
    }
    write_json(command.report.json.as_deref(), &figures)?;
    printer.data(format!("forward and backward: {:.0} ms for {} tokens", pass * 1e3, rig.tokens()))?;
    printer.data("an update's share of a step's time in % (of its floating-point operations)")?;
    let shares = BATCHES.map(|times| format!("{} tokens", times * rig.tokens()));
    let heads: Vec<&str> = ["rule", "ms per update", "GFLOP"].into_iter().chain(shares.iter().map(String::as_str)).collect();
    printer.table(&heads, &figures.iter().map(RuleFigures::row).collect::<Vec<_>>())?;
    Ok(Status::Done)
}

/// Seconds of a whole step of each recipe. The arms take turns, so that what the machine does beside them falls on all: the pass is the same
/// for all of them and its median is taken over all turns, the update is each arm's mean (its steps may alternate between two costs).
pub(super) fn costs(recipes: &[Recipe]) -> Result<Vec<f64>> {
    let mut rigs = vec![];
    for recipe in recipes {
        let assembled = assemble(recipe.clone(), std::path::Path::new("recipe.toml"), candle_core::Device::Cpu, &mut |_| ())?;
        let mut recipe = recipe.clone();
        if let Some(model) = &mut recipe.model {
            model.vocab = Some(assembled.setup.spec.vocab);
        }
        let rule = recipe.optim.rule;
        let rig = Rig::new(recipe)?;
        let optimizer = rig.optimizer(rule)?;
        rigs.push((rig, optimizer, 0.0));
    }
    let mut passes = vec![];
    for number in 0..=COST_STEPS {
        for (rig, optimizer, updates) in &mut rigs {
            let start = Instant::now();
            rig.gradients()?;
            let pass = start.elapsed();
            step::update(optimizer, number, &rig.parameters, &rig.gradients, false)?;
            if number > 0 {
                passes.push(pass);
                *updates += (start.elapsed() - pass).as_secs_f64();
            }
        }
    }
    let pass = median(passes).as_secs_f64();
    Ok(rigs.into_iter().map(|(.., updates)| pass + updates / COST_STEPS as f64).collect())
}

/// Steps timed by [`costs`]: a multiple of every period that is compared.
const COST_STEPS: u64 = 20;

#[derive(Serialize)]
struct KernelFigures {
    products: Vec<Measurement>,
    codecs: Vec<codec::Figures>,
}

/// Matrix products of the bench model and of decoding, dense and ternary; then what the cache's codecs cost and lose.
fn kernels(command: &Bench, printer: &Printer) -> Result<Status> {
    start_threads(None)?;
    let shapes = [(4096, 384, 384), (4096, 384, 1024), (4096, 1024, 384), (256, 384, 8192), (1, 768, 2048), (1, 2048, 8192)];
    let budget = Duration::from_millis(300);
    let mut all: Vec<Measurement> = vec![];
    rayon::scope(|_| {
        for (m, k, n) in shapes {
            all.extend(dense(Shape { m, k, n }, budget));
            all.extend(ternary(Shape { m, k, n }, budget));
        }
    });
    let figures = KernelFigures { products: all, codecs: codec::figures(&[64, 128], Duration::from_millis(20))? };
    write_json(command.report.json.as_deref(), &figures)?;
    let row = |one: &Measurement| {
        let Shape { m, k, n } = one.shape;
        let numbers = [one.seconds * 1e6, one.gflops, one.gbytes_per_second];
        let mut row = vec![one.name.to_owned(), format!("{m} x {k} x {n}")];
        row.extend(numbers.map(|value| format!("{value:.1}")));
        row
    };
    printer.table(&["kernel", "m x k x n", "us", "GFLOP/s", "GB/s"], &figures.products.iter().map(row).collect::<Vec<_>>())?;
    let row = |one: &codec::Figures| {
        let losses = [one.keys, one.keys_with_outliers, one.values].map(|loss| format!("{loss:.6}"));
        let times = [one.encode_microseconds, one.decode_microseconds].map(|time| format!("{time:.1}"));
        let mut row = vec![one.name.to_owned(), one.head_dim.to_string(), format!("{:.2}", one.bytes_per_token)];
        row.extend(losses.into_iter().chain(times));
        row
    };
    let head = ["cache", "width", "bytes/token", "keys", "keys with outliers", "values", "encode us/page", "decode us/page"];
    printer.table(&head, &figures.codecs.iter().map(row).collect::<Vec<_>>())?;
    Ok(Status::Done)
}
