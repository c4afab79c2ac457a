//! `osprey plan`.

use super::arguments::RecipeOnly;
use super::printer::Printer;
use super::{Status, memory, start_threads, write_json};
use crate::error::Result;
use crate::export::plan::engines;
use crate::model::{GradientBuffers, Spec, flops};
use crate::ops::frozen::Frozen;
use crate::optim::{Optimizer, Table};
use crate::recipe::{Assembled, Recipe, assemble, load};
use crate::train::{Feed, step};
use serde::Serialize;
use std::time::Instant;

/// Steps that are run to measure speed and memory; the first one warms up.
const MEASURED_STEPS: u64 = 3;

#[derive(Serialize)]
struct Plan {
    parameters: usize,
    transformers: String,
    llama_cpp: String,
    tokens_per_step: usize,
    gflop_per_step: f64,
    step_seconds: f64,
    run_seconds: f64,
    optimizer_state_bytes: usize,
    estimated_training_bytes: usize,
    measured_peak_bytes: Option<u64>,
}

/// Builds what the recipe describes, runs a few steps of it without saving anything, and says what the whole run will be.
pub(super) fn run(command: &RecipeOnly, printer: &Printer) -> Result<Status> {
    let recipe: Recipe = load(&command.recipe.recipe, &command.recipe.overrides)?;
    recipe.check()?;
    start_threads(recipe.run.threads)?;
    let assembled = assemble(recipe, &command.recipe.recipe, candle_core::Device::Cpu, &mut |text| printer.note(text))?;
    let parameters = assembled.setup.parameters()?;
    let infos = step::parameter_infos(&parameters, assembled.setup.spec.heads, assembled.setup.spec.kv_heads);
    let table = Table::new(&assembled.setup.optim, &infos)?;
    printer.data(table.to_string().trim_end())?;
    let plan = measure(&assembled, &table)?;
    write_json(command.report.json.as_deref(), &plan)?;
    show(&plan, printer)?;
    Ok(Status::Done)
}

fn measure(assembled: &Assembled, table: &Table) -> Result<Plan> {
    let setup = &assembled.setup;
    let decoder = setup.decoder();
    let parameters = setup.parameters()?;
    let infos = step::parameter_infos(&parameters, setup.spec.heads, setup.spec.kv_heads);
    let mut optimizer = Optimizer::new(&setup.optim, &infos, setup.train.steps)?;
    let mut gradients = GradientBuffers::new(&parameters)?;
    let mut feed = assembled.feed(None)?;
    let mut times = vec![];
    for number in 0..=MEASURED_STEPS {
        let start = Instant::now();
        let batches = feed.next(number)?;
        step::gradients(&decoder, &parameters, &batches, setup.train.z_loss, setup.reference, &mut gradients)?;
        step::update(&mut optimizer, number, &parameters, &gradients, false)?;
        times.push(start.elapsed().as_secs_f64());
    }
    let mut warm = times.split_off(1);
    warm.sort_by(f64::total_cmp);
    let step_seconds = warm[warm.len() / 2];
    let tokens = setup.train.batch * setup.train.accumulate * setup.row_tokens;
    let state = table.rows.iter().map(|row| row.state_bytes).sum();
    let names = engines(&setup.spec);
    let rows = Spec { context: setup.row_tokens, ..setup.spec.clone() };
    Ok(Plan {
        parameters: parameters.total(),
        transformers: names.transformers.map_or_else(|error| format!("none: {error}"), str::to_owned),
        llama_cpp: names.llama_cpp.map_or_else(|error| format!("none: {error}"), |found| found.name().to_owned()),
        tokens_per_step: tokens,
        gflop_per_step: if setup.trains_adapter() { flops::adapter_training(&rows, tokens) } else { flops::training(&rows, tokens) } / 1e9,
        step_seconds,
        run_seconds: step_seconds * setup.train.steps as f64,
        optimizer_state_bytes: state,
        estimated_training_bytes: 8 * parameters.total()
            + parameters.frozen().values().map(Frozen::bytes).sum::<usize>()
            + state
            + flops::activation_bytes(&rows, setup.train.batch, setup.activation_checkpointing),
        measured_peak_bytes: memory::resident().map(|(_, peak)| peak),
    })
}

fn show(plan: &Plan, printer: &Printer) -> Result<()> {
    let megabytes = |bytes: f64| format!("{:.0} MB", bytes / 1e6);
    printer.data(format!("parameters           {}", plan.parameters))?;
    printer.data(format!("transformers         {}", plan.transformers))?;
    printer.data(format!("llama.cpp            {}", plan.llama_cpp))?;
    printer.data(format!("tokens per step      {}", plan.tokens_per_step))?;
    printer.data(format!("operations per step  {:.1} GFLOP", plan.gflop_per_step))?;
    printer.data(format!("optimizer state      {}", megabytes(plan.optimizer_state_bytes as f64)))?;
    let measured = plan.measured_peak_bytes.map_or_else(String::new, |bytes| format!(", peak of this process {}", megabytes(bytes as f64)));
    printer.data(format!("training memory      {} estimated{measured}", megabytes(plan.estimated_training_bytes as f64)))?;
    let minutes = plan.run_seconds / 60.0;
    printer
        .data(format!("time                 {:.3} s per step measured, {minutes:.1} min for the run without evaluation", plan.step_seconds))
}
