//! `osprey train`.

use super::arguments::Train;
use super::printer::Printer;
use super::{Status, finish, start_threads, write_json};
use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::recipe::{Assembled, Recipe, assemble, device, load, to_toml};
use crate::train::dist::{Phase, Ranks, World};
use crate::train::metrics::Record;
use crate::train::{Monitor, Outcome, State, cursor, replay, run as train};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains, then exports and validates as the recipe asks. Of several ranks one speaks: rank 0, or the first that met an error.
pub(super) fn run(command: Train, printer: &mut Printer) -> Result<Status> {
    let world = World::from_environment()?;
    if world.rank > 0 {
        printer.hush();
    }
    // What goes wrong before the ranks have met goes wrong on all of them; rank 0 says it.
    let joined = device_of(&command.device, world).and_then(|device| Ok((Ranks::join(world, &device)?, device)));
    let (ranks, device) = match joined {
        Err(error) if world.rank > 0 => silence(&error),
        other => other?,
    };
    let result = train_as(&command, world, &ranks, device, printer);
    match result {
        Err(error) if !ranks.fail(&error) => silence(&error),
        other => other,
    }
}

/// Ends this rank without a word: another one has said why.
fn silence(error: &Error) -> ! {
    std::process::exit(i32::from(error.exit_code()))
}

/// `cuda` without a number is the GPU of this rank.
fn device_of(name: &str, world: World) -> Result<candle_core::Device> {
    if name == "cuda" { device(&format!("cuda:{}", world.local_rank)) } else { device(name) }
}

fn train_as(command: &Train, world: World, ranks: &Ranks, on: candle_core::Device, printer: &mut Printer) -> Result<Status> {
    let recipe: Recipe = load(&command.recipe.recipe, &command.recipe.overrides)?;
    recipe.check()?;
    start_threads(recipe.run.threads.or(world.threads()))?;
    if !ranks.is_alone() {
        check_ranks(command, &recipe, ranks)?;
    }
    let mut assembled = assemble_in_turn(recipe, command, ranks, on, printer)?;
    assembled.setup.ranks = ranks.clone();
    if let Some(path) = &command.replay {
        return show_replay(&assembled, path, command, printer);
    }
    if command.verify_resume {
        return super::verify_resume::run(assembled, printer);
    }
    let outcome = session(&assembled, &command.resume, None, printer)?;
    ranks.part()?;
    if !ranks.is_first() {
        return Ok(Status::Done);
    }
    if outcome.interrupted {
        printer.note(format!("stopped at step {}; the same command continues from {}", outcome.step, outcome.checkpoint.display()));
        return Ok(Status::Done);
    }
    finish::run(&assembled, &outcome, command.report.json.as_deref(), printer)
}

/// What cannot be shared out among ranks.
fn check_ranks(command: &Train, recipe: &Recipe, ranks: &Ranks) -> Result<()> {
    if command.replay.is_some() || command.verify_resume {
        return Err(Error::input("ranks", "--replay and --verify-resume run in one process").fix("start it without mpirun"));
    }
    if !recipe.train.batch.is_multiple_of(ranks.size()) {
        let cause = format!("{} rows do not divide among {} ranks", recipe.train.batch, ranks.size());
        return Err(Error::input("train.batch", cause).fix("give a multiple of the number of ranks, or start another number"));
    }
    ranks.agree("recipe", &format!("{}\n{}", to_toml(recipe)?, command.resume));
    Ok(())
}

/// Rank 0 first, which may have to build shards; the others then find them.
fn assemble_in_turn(recipe: Recipe, command: &Train, ranks: &Ranks, device: candle_core::Device, printer: &Printer) -> Result<Assembled> {
    ranks.phase(Phase::Preparing);
    if !ranks.is_first() {
        ranks.meet("data of rank 0")?;
    }
    let assembled = assemble(recipe, &command.recipe.recipe, device, &mut |text| printer.note(text))?;
    if ranks.is_first() {
        ranks.meet("data of rank 0")?;
    }
    Ok(assembled)
}

/// Claims the run folder, resumes or starts, and trains; with `pause_at`, stops after that step as if told to.
pub(super) fn session(assembled: &Assembled, resume: &str, pause_at: Option<u64>, printer: &mut Printer) -> Result<Outcome> {
    let setup = &assembled.setup;
    let ranks = &setup.ranks;
    let _claim = ranks.is_first().then(|| checkpoint::claim(&setup.run_dir)).transpose()?;
    let saved = find(assembled, resume, printer)?;
    ranks.agree("newest checkpoint", &saved.as_ref().map_or_else(String::new, |saved| saved.step().to_string()));
    // What may refuse comes before what writes: a run that cannot go on leaves its folder as it was.
    let position = saved.as_ref().map(cursor).transpose()?;
    let mut feed = assembled.feed(position.as_ref())?;
    let state = match &saved {
        Some(saved) => {
            saved
                .differences(setup.threads, &crate::ops::cpu::isa::isa().to_string())
                .iter()
                .for_each(|difference| printer.warn(difference));
            printer.note(format!("resuming from {}", saved.dir().display()));
            State::resume(setup, saved)?
        }
        None => State::fresh(setup)?,
    };
    let path = setup.run_dir.join("recipe.toml");
    if ranks.is_first() {
        std::fs::write(&path, &setup.recipe).map_err(Error::io("write", &path))?;
    }
    if saved.is_none() {
        printer.note(format!("resolved recipe, saved as {}:\n{}", path.display(), setup.recipe));
    }
    let stop = stop_flag()?;
    let validation = if ranks.is_first() { assembled.validation() } else { vec![] };
    printer.start(state.step, setup.train.steps);
    let mut monitor = Screen { printer, stop: stop.clone(), pause_at };
    let outcome = train(setup, state, &mut feed, &validation, &stop, &mut monitor);
    printer.finish();
    outcome
}

fn find(assembled: &Assembled, resume: &str, printer: &Printer) -> Result<Option<Checkpoint>> {
    match resume {
        "never" => {
            if let Some((_, existing)) = checkpoint::list(&assembled.setup.run_dir)?.pop() {
                let cause = "already holds checkpoints, which `--resume never` would mix with new ones";
                return Err(Error::file(&existing, cause).fix("choose another run.dir, or move the old run away"));
            }
            Ok(None)
        }
        "auto" => {
            let found = checkpoint::latest(&assembled.setup.run_dir)?;
            for (_, reason) in &found.rejected {
                printer.warn(format!("skipping a damaged checkpoint: {reason}"));
            }
            Ok(found.checkpoint)
        }
        folder => checkpoint::open(Path::new(folder)).map(Some),
    }
}

/// Set by Ctrl-C or SIGTERM: the step in progress is finished and saved. A second signal ends the program at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(Error::io("watch for signals in", "this process"))?;
    }
    Ok(stop)
}

struct Screen<'p> {
    printer: &'p mut Printer,
    stop: Arc<AtomicBool>,
    pause_at: Option<u64>,
}

impl Monitor for Screen<'_> {
    fn record(&mut self, record: &Record) {
        self.printer.step(record);
    }

    fn stepped(&mut self, step: u64, _loss: f64) {
        self.printer.tick(step);
        if self.pause_at == Some(step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn note(&mut self, text: &str) {
        self.printer.note(text);
    }
}

fn show_replay(assembled: &Assembled, path: &Path, command: &Train, printer: &Printer) -> Result<Status> {
    let found = replay(&assembled.setup, path)?;
    write_json(command.report.json.as_deref(), &found)?;
    printer.data(format!("step {} failed with: {}", found.step, found.cause))?;
    printer.data(format!("loss now: {}", found.loss))?;
    let rows: Vec<Vec<String>> = found.gradient_norms.iter().map(|(name, norm)| vec![name.clone(), format!("{norm:.4e}")]).collect();
    printer.table(&["parameter", "gradient norm"], &rows)?;
    let broken = !found.loss.is_finite() || found.gradient_norms.iter().any(|(_, norm)| !norm.is_finite());
    Ok(if broken { Status::FellShort } else { Status::Done })
}
