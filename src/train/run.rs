//! The training run: resume or prove, then step, look, save, until done or told to stop.

use super::dist::{Buckets, Phase};
use super::evaluate::{Evaluation, evaluate};
use super::metrics::Record;
use super::probe::prove_gradients;
use super::state::State;
use super::{Config, Setup, failure, step};
use crate::data::{Batch, Cursor};
use crate::error::{Error, Result};
use crate::model::{Decoder, GradientBuffers, Parameters};
use crate::ops::frozen::Frozen;
use crate::optim::{Decision, StepReport};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Supplies the micro-batches of a step; the same step always gets the same ones.
pub trait Feed {
    /// The micro-batches of optimizer step `step`.
    fn next(&mut self, step: u64) -> Result<Vec<Arc<Batch>>>;
    /// Time spent waiting for data so far.
    fn waited(&self) -> Duration;
    /// Where the data stands, for the checkpoint.
    fn cursor(&self) -> Cursor;
}

/// Hears what happens.
pub trait Monitor {
    /// A line of metrics.
    fn record(&mut self, record: &Record);
    /// One finished step.
    fn stepped(&mut self, step: u64, loss: f64);
    /// Something worth telling.
    fn note(&mut self, text: &str);
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Optimizer steps taken in all.
    pub step: u64,
    /// The newest checkpoint.
    pub checkpoint: std::path::PathBuf,
    /// The last evaluation, when this process made one.
    pub evaluation: Option<Evaluation>,
    /// Told to stop before the last step.
    pub interrupted: bool,
    /// Share of the time in which training waited for data.
    pub data_wait_fraction: f64,
}

/// Trains from `state` to the last step, or until `stop` is set; always leaves a checkpoint of where it ended.
pub fn run(
    setup: &Setup,
    mut state: State,
    feed: &mut dyn Feed,
    validation: &[Arc<Batch>],
    stop: &AtomicBool,
    monitor: &mut dyn Monitor,
) -> Result<Outcome> {
    let decoder = setup.decoder();
    let saved = state.saved.take().map(|path| (state.step, path));
    let buckets = Buckets::new(&state.parameters);
    let mut run =
        Run { setup, decoder: &decoder, buckets, validation, window: Window::new(), evaluation: None, saved, told_to_stop: false };
    let mut gradients = GradientBuffers::new(&state.parameters)?;
    let started = Instant::now();
    let already_waited = feed.waited();
    while state.step < setup.train.steps && !run.stops(stop) {
        setup.ranks.phase(Phase::Step);
        let batches = feed.next(state.step)?;
        if state.step == 0 {
            prove_gradients(&decoder, &state.parameters, &batches, setup.reference)?;
            monitor.note(&format!("gradient proof: all {} parameters receive a finite, non-zero gradient", state.parameters.list().len()));
            note_frozen(&state.parameters, monitor);
        }
        run.step(&mut state, &batches, &mut gradients, stop, monitor)?;
        run.look_and_save(&mut state, &feed.cursor(), stop, monitor)?;
    }
    let checkpoint = match run.saved.take() {
        Some((step, path)) if step == state.step => path,
        _ => run.save(&state, &feed.cursor(), None)?,
    };
    let waited = feed.waited() - already_waited;
    Ok(Outcome {
        step: state.step,
        checkpoint,
        evaluation: run.evaluation,
        interrupted: state.step < setup.train.steps,
        data_wait_fraction: waited.as_secs_f64() / started.elapsed().as_secs_f64().max(1e-9),
    })
}

struct Run<'r> {
    setup: &'r Setup,
    decoder: &'r Decoder,
    buckets: Buckets,
    validation: &'r [Arc<Batch>],
    window: Window,
    evaluation: Option<Evaluation>,
    saved: Option<(u64, std::path::PathBuf)>,
    /// Some rank was, which all learned in the last step.
    told_to_stop: bool,
}

/// What has happened since the last line of the log.
struct Window {
    since: Instant,
    tokens: usize,
}

impl Window {
    fn new() -> Self {
        Self { since: Instant::now(), tokens: 0 }
    }

    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }
}

impl Run<'_> {
    fn config(&self) -> &Config {
        &self.setup.train
    }

    /// Ranks must agree on the last step, so they stop after one in which all heard of it.
    fn stops(&self, stop: &AtomicBool) -> bool {
        if self.setup.ranks.is_alone() { stop.load(Ordering::Relaxed) } else { self.told_to_stop }
    }

    fn step(
        &mut self,
        state: &mut State,
        batches: &[Arc<Batch>],
        gradients: &mut GradientBuffers,
        stop: &AtomicBool,
        monitor: &mut dyn Monitor,
    ) -> Result<()> {
        let Setup { reference, ref ranks, .. } = *self.setup;
        let decoder = self.decoder.blended(self.setup.blend(state.step));
        let pass = step::Pass {
            decoder: &decoder,
            parameters: &state.parameters,
            z_loss: self.config().z_loss,
            reference,
            ranks,
            buckets: &self.buckets,
        };
        let step::Learned { loss, stop } = pass.run(batches, stop.load(Ordering::Relaxed), gradients)?;
        self.told_to_stop = stop;
        let number = state.step + 1;
        let logged = number.is_multiple_of(self.config().log_every) || number == self.config().steps || number == 1;
        state.optimizer.observe(loss);
        let updated = if loss.is_finite() {
            step::update_on(ranks, &mut state.optimizer, state.step, &state.parameters, gradients, logged)
        } else {
            Err(Error::input("the loss", format!("is {loss}")))
        };
        let report = updated.or_else(|error| Err(failure::keep(self.setup, state, batches, error)?))?;
        state.step = number;
        self.window.tokens += batches.iter().map(|b| b.inputs.len()).sum::<usize>() * ranks.size();
        monitor.stepped(number, loss);
        if logged {
            self.log(state, loss, &report, monitor)?;
        } else if let Some(decision) = report.decision {
            // Every decision of a rate that follows the loss is on record, but not on the screen.
            let record = Record::new(number).with("loss", loss).with("lr", report.learning_rate);
            if let Some(metrics) = &mut state.metrics {
                metrics.write(&with_decision(record, decision))?;
            }
        }
        Ok(())
    }

    fn log(&mut self, state: &mut State, loss: f64, report: &StepReport, monitor: &mut dyn Monitor) -> Result<()> {
        let ratios: Vec<f64> = report.movements.iter().map(|movement| movement.ratio()).collect();
        let mut record = Record::new(state.step);
        record.put("loss", loss);
        record.put("lr", report.learning_rate);
        record.put("tokens_per_second", self.window.tokens_per_second());
        record.put("grad_norm", report.gradient_norm);
        record.put("update_ratio_mean", ratios.iter().sum::<f64>() / ratios.len().max(1) as f64);
        record.put("update_ratio_max", ratios.iter().copied().fold(0.0, f64::max));
        if !self.setup.ranks.is_alone() {
            let share = self.setup.ranks.take_waited().as_secs_f64() / self.window.since.elapsed().as_secs_f64().max(1e-9);
            record.put("exposed_communication", share);
        }
        if let Some(decision) = report.decision {
            record = with_decision(record, decision);
        }
        if self.setup.blend(state.step - 1) < 1.0 {
            record.put("ternary_blend", self.setup.blend(state.step - 1));
        }
        self.write(state, &record, monitor)?;
        self.window = Window::new();
        Ok(())
    }

    fn write(&self, state: &mut State, record: &Record, monitor: &mut dyn Monitor) -> Result<()> {
        let Some(metrics) = &mut state.metrics else { return Ok(()) };
        metrics.write(record)?;
        monitor.record(record);
        Ok(())
    }

    fn look_and_save(&mut self, state: &mut State, cursor: &Cursor, stop: &AtomicBool, monitor: &mut dyn Monitor) -> Result<()> {
        let (step, last) = (state.step, state.step == self.config().steps);
        let ranks = self.setup.ranks.clone();
        let due = |every: u64| last || (every > 0 && step.is_multiple_of(every));
        let mut quantized = None;
        // Rank 0 only, which alone is given rows: the others wait in the next collective; they could only repeat the same sums.
        if due(self.setup.eval.every) && !self.validation.is_empty() {
            let paused = Instant::now();
            ranks.phase(Phase::Looking);
            let evaluation = evaluate(self.decoder, &state.parameters, self.validation)?;
            quantized = Some(evaluation.loss_quantized);
            self.write(state, &evaluation_record(step, &evaluation), monitor)?;
            self.evaluation = Some(evaluation);
            self.window.since += paused.elapsed();
        }
        self.save_when(due(self.setup.checkpoint.every) || self.stops(stop), state, cursor, quantized)
    }

    fn save_when(&mut self, due: bool, state: &State, cursor: &Cursor, quantized: Option<f64>) -> Result<()> {
        if due {
            let paused = Instant::now();
            self.setup.ranks.phase(Phase::Looking);
            self.saved = Some((state.step, self.save(state, cursor, quantized)?));
            self.window.since += paused.elapsed();
        }
        Ok(())
    }

    fn save(&self, state: &State, cursor: &Cursor, quantized: Option<f64>) -> Result<std::path::PathBuf> {
        let path = state.save(self.setup, cursor, quantized)?;
        if self.setup.ranks.is_first() {
            crate::checkpoint::prune(&self.setup.run_dir, self.setup.checkpoint.keep_last)?;
        }
        Ok(path)
    }
}

fn with_decision(record: Record, decision: Decision) -> Record {
    record
        .with("finch_smoothed_loss", decision.smoothed_loss)
        .with("finch_factor", decision.factor)
        .with("finch_limited", u64::from(decision.limited))
}

/// What a frozen base takes beside what is trained.
fn note_frozen(parameters: &Parameters, monitor: &mut dyn Monitor) {
    if parameters.frozen().is_empty() {
        return;
    }
    let frozen: usize = parameters.frozen().values().map(Frozen::bytes).sum();
    let (trained, megabytes) = (parameters.total(), frozen as f64 / 1e6);
    monitor.note(&format!("{trained} weights are trained; the frozen base takes {megabytes:.1} MB and nothing else"));
}

fn evaluation_record(step: u64, evaluation: &Evaluation) -> Record {
    let statistics = &evaluation.statistics;
    let mut record = Record::new(step);
    record.put("val_loss", evaluation.loss);
    record.put("val_loss_quantized", evaluation.loss_quantized);
    if let Some(loss) = evaluation.loss_w4a4 {
        record.put("val_loss_w4a4", loss);
    }
    record.put("kurtosis_mean", statistics.kurtosis_mean());
    for (layer, kurtosis) in statistics.stream_kurtosis().into_iter().enumerate() {
        record.put(format!("kurtosis_{layer:02}"), kurtosis);
    }
    record.put("largest_activation", f64::from(statistics.largest_in_stream()));
    record.put("largest_ratio_inside", f64::from(statistics.largest_ratio_inside()));
    if let Some(fraction) = evaluation.zero_fraction {
        record.put("zero_fraction", fraction);
    }
    record
}
