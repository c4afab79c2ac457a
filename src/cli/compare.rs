//! `osprey bench optim --compare RECIPE`: the rules against each other on real text, at equal tokens and at equal wall time.
//!
//! Every arm's learning rate is tuned over the same number of tries with the first seed; the best rate then runs with every seed for the
//! recipe's number of steps. Then the arms' steps are timed, alternating, and each runs again for as many steps as fit into the time that
//! the first arm takes. `--osp` compares the switches of outlier-safe pre-training instead.

use super::arguments::Bench;
use super::bench::costs;
use super::printer::Printer;
use super::sweep::{Finding, Sweep, Trial, interval};
use super::{Status, write_json};
use crate::error::{Error, Result};
use crate::model::{Face, Norm};
use crate::optim::RuleName;
use crate::recipe::Recipe;
use serde::Serialize;
use std::path::Path;

/// Seeds of every figure.
const SEEDS: u64 = 3;
/// Factors on an arm's usual rate that are tried.
const TRIES: [f64; 4] = [0.35, 0.7, 1.4, 2.8];

/// Something to compare.
struct Arm {
    name: &'static str,
    /// Usual rate of the hidden matrices, around which it is tuned.
    rate: f64,
    change: fn(&mut Recipe),
}

fn arm(name: &'static str, rate: f64, change: fn(&mut Recipe)) -> Arm {
    Arm { name, rate, change }
}

fn lion_muon(recipe: &mut Recipe, period: u64) {
    recipe.optim.rule = RuleName::LionMuon;
    recipe.optim.lion_muon.period = period;
}

fn rules() -> Vec<Arm> {
    vec![
        arm("AdamW", 3e-3, |recipe| recipe.optim.rule = RuleName::Adamw),
        arm("Lion", 5e-5, |recipe| recipe.optim.rule = RuleName::Lion),
        arm("Muon", 4e-3, |recipe| recipe.optim.rule = RuleName::Muon),
        arm("LionMuon P=1", 8e-3, |recipe| lion_muon(recipe, 1)),
        arm("LionMuon P=2", 8e-3, |recipe| lion_muon(recipe, 2)),
        arm("LionMuon P=5", 3e-3, |recipe| lion_muon(recipe, 5)),
        arm("NorMuon", 8e-3, |recipe| recipe.optim.rule = RuleName::NorMuon),
        arm("Distance-Aware Muon", 8e-3, |recipe| recipe.optim.rule = RuleName::DistanceAwareMuon),
    ]
}

fn switches() -> Vec<Arm> {
    vec![
        arm("Adam", 3e-3, |recipe| switch(recipe, RuleName::Adamw, false, false)),
        arm("Muon", 8e-3, |recipe| switch(recipe, RuleName::Muon, false, false)),
        arm("Muon + SSNorm", 8e-3, |recipe| switch(recipe, RuleName::Muon, true, false)),
        arm("Muon + EmbProj", 8e-3, |recipe| switch(recipe, RuleName::Muon, false, true)),
        arm("Muon + SSNorm + EmbProj", 8e-3, |recipe| switch(recipe, RuleName::Muon, true, true)),
    ]
}

fn switch(recipe: &mut Recipe, rule: RuleName, single_scale: bool, projection: bool) {
    recipe.optim.rule = rule;
    if let Some(model) = &mut recipe.model {
        model.face = Face::Dense;
        model.norm = Some(if single_scale { Norm::SingleScale } else { Norm::Rms });
        model.embedding_projection = Some(projection);
    }
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    arm: &'static str,
    learning_rate: f64,
    /// The best rate was the smallest or the largest tried.
    at_edge: bool,
    equal_tokens: Vec<Finding>,
    step_milliseconds: f64,
    steps_at_equal_time: u64,
    equal_time: Vec<Finding>,
}

pub(super) fn run(command: &Bench, recipe: &Recipe, printer: &Printer) -> Result<Status> {
    if recipe.model.is_none() {
        return Err(
            Error::input("model", "is needed: the rules are compared from random weights").fix("give a recipe with a table [model]")
        );
    }
    let arms = if command.osp { switches() } else { rules() };
    let mut sweep = Sweep::open(Path::new(&recipe.run.dir), printer)?;
    let mut rows = arms.iter().map(|arm| tune(arm, recipe, &mut sweep)).collect::<Result<Vec<_>>>()?;
    if !command.osp {
        let recipes: Vec<Recipe> = arms.iter().map(|arm| with(recipe, arm, arm.rate, 1)).collect();
        let costs = sweep.costs(&recipes, costs)?;
        for ((arm, row), cost) in arms.iter().zip(&mut rows).zip(&costs) {
            row.step_milliseconds = cost * 1e3;
            row.steps_at_equal_time = (recipe.train.steps as f64 * costs[0] / cost).round().max(1.0) as u64;
            row.equal_time = (1..=SEEDS).map(|seed| equal_time(arm, row, recipe, seed, &mut sweep)).collect::<Result<_>>()?;
        }
    }
    write_json(command.report.json.as_deref(), &rows)?;
    if command.osp {
        show_outliers(&rows, printer)?
    } else {
        show(&rows, recipe, printer)?
    }
    Ok(Status::Done)
}

fn with(recipe: &Recipe, arm: &Arm, rate: f64, seed: u64) -> Recipe {
    let mut recipe = recipe.clone();
    (arm.change)(&mut recipe);
    // Embedding, head and gains keep the recipe's own rate in every arm, which only AdamW's arm shares with its matrices.
    let auxiliary = recipe.optim.adamw_learning_rate.unwrap_or(3e-3);
    recipe.optim.adamw_learning_rate = Some(if recipe.optim.rule == RuleName::Adamw { rate } else { auxiliary });
    recipe.optim.learning_rate = rate;
    // Without a rate of its own, Distance-Aware Muon is tuned by the coefficient on its estimate.
    if recipe.optim.rule == RuleName::DistanceAwareMuon {
        recipe.optim.learning_rate = arm.rate;
        recipe.optim.distance_aware_muon.coefficient = rate / arm.rate;
    }
    recipe.run.seed = seed;
    recipe
}

/// Every try, then the other seeds of the best.
fn tune(arm: &Arm, base: &Recipe, sweep: &mut Sweep<'_>) -> Result<Row> {
    let mut tried = vec![];
    for factor in TRIES {
        let rate = arm.rate * factor;
        let label = format!("{} rate {rate:.2e} seed 1", arm.name);
        let found = sweep.find(Trial { label, recipe: with(base, arm, rate, 1) })?;
        tried.push((rate, found));
    }
    let loss = |found: &Finding| found.loss.unwrap_or(f64::INFINITY);
    let best = (0..tried.len()).min_by(|&a, &b| loss(&tried[a].1).total_cmp(&loss(&tried[b].1))).expect("there are tries");
    let learning_rate = tried[best].0;
    let mut equal_tokens = vec![tried[best].1.clone()];
    for seed in 2..=SEEDS {
        let label = format!("{} rate {learning_rate:.2e} seed {seed}", arm.name);
        equal_tokens.push(sweep.find(Trial { label, recipe: with(base, arm, learning_rate, seed) })?);
    }
    let at_edge = best == 0 || best + 1 == tried.len();
    Ok(Row { arm: arm.name, learning_rate, at_edge, equal_tokens, step_milliseconds: 0.0, steps_at_equal_time: 0, equal_time: vec![] })
}

fn equal_time(arm: &Arm, row: &Row, base: &Recipe, seed: u64, sweep: &mut Sweep<'_>) -> Result<Finding> {
    let mut recipe = with(base, arm, row.learning_rate, seed);
    recipe.train.steps = row.steps_at_equal_time;
    let label = format!("{} rate {:.2e} seed {seed}, equal time", arm.name, row.learning_rate);
    sweep.find(Trial { label, recipe })
}

fn losses(found: &[Finding]) -> String {
    let values: Vec<Option<f64>> = found.iter().map(|one| one.loss).collect();
    interval(&values).map_or_else(|| "diverged".to_owned(), |(mean, half)| format!("{mean:.4} ± {half:.4}"))
}

fn show(rows: &[Row], recipe: &Recipe, printer: &Printer) -> Result<()> {
    let context = recipe.model.as_ref().map_or(0, |model| model.context);
    let tokens = recipe.train.steps as usize * recipe.train.batch * recipe.train.accumulate * context;
    printer.data(format!("{} steps, {tokens} tokens; {SEEDS} seeds, mean and 95% interval of the held-out loss\n", recipe.train.steps))?;
    printer.data("| rule | best rate | loss at equal tokens | ms per step | steps at equal time | loss at equal time |")?;
    printer.data("| --- | ---: | ---: | ---: | ---: | ---: |")?;
    for row in rows {
        let edge = if row.at_edge { "*" } else { "" };
        printer.data(format!(
            "| {} | {:.2e}{edge} | {} | {:.1} | {} | {} |",
            row.arm,
            row.learning_rate,
            losses(&row.equal_tokens),
            row.step_milliseconds,
            row.steps_at_equal_time,
            losses(&row.equal_time)
        ))?;
    }
    let edges = rows.iter().any(|row| row.at_edge);
    if edges { printer.data("\n\\* the best of the rates tried is the smallest or the largest") } else { Ok(()) }
}

fn show_outliers(rows: &[Row], printer: &Printer) -> Result<()> {
    printer.data("| arm | best rate | loss | W4A4KV4 loss | lost to W4A4KV4 | excess kurtosis |")?;
    printer.data("| --- | ---: | ---: | ---: | ---: | ---: |")?;
    for row in rows {
        let mean = |value: fn(&Finding) -> Option<f64>| interval(&row.equal_tokens.iter().map(value).collect::<Vec<_>>());
        let cell = |found: Option<(f64, f64)>| found.map_or_else(|| "diverged".to_owned(), |(mean, half)| format!("{mean:.4} ± {half:.4}"));
        printer.data(format!(
            "| {} | {:.2e} | {} | {} | {} | {} |",
            row.arm,
            row.learning_rate,
            cell(mean(|found| found.loss)),
            cell(mean(|found| found.loss_quantized)),
            cell(mean(|found| Some(found.loss_quantized? - found.loss?))),
            cell(mean(|found| found.kurtosis)),
        ))?;
    }
    Ok(())
}
