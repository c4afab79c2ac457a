//! `osprey data`.

use super::arguments::RecipeOnly;
use super::printer::Printer;
use super::{Status, start_threads, write_json};
use crate::data::report;
use crate::error::Result;
use crate::recipe::{Recipe, assemble, load};
use std::io::IsTerminal;

/// Builds the shards and shows what the first batch contains.
pub(super) fn run(command: &RecipeOnly, printer: &Printer) -> Result<Status> {
    let recipe: Recipe = load(&command.recipe.recipe, &command.recipe.overrides)?;
    recipe.check()?;
    start_threads(recipe.run.threads)?;
    let assembled = assemble(recipe, &command.recipe.recipe, candle_core::Device::Cpu, &mut |text| printer.note(text))?;
    let (rows, context) = (assembled.recipe.train.batch, assembled.setup.row_tokens);
    let found = report(&assembled.dataset, rows, context, assembled.setup.seed, 4)?;
    write_json(command.report.json.as_deref(), &found)?;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    printer.data(found.render(colour))?;
    Ok(Status::Done)
}
