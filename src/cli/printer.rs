//! The only place that decides what is shown: results go to stdout, everything meant for a person to stderr.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::{Error, Result};
use crate::train::metrics::Record;

/// Writes to the two streams of the process.
pub struct Printer {
    quiet: bool,
    hushed: bool,
    bar_allowed: bool,
    progress: Option<Progress>,
}

struct Progress {
    total: u64,
    first: u64,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Printer {
    /// `quiet` silences everything but results, warnings and errors. A bar is drawn only on a terminal that can redraw a line, and not under CI.
    pub fn new(quiet: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        let bar_allowed = io::stderr().is_terminal() && !dumb && std::env::var_os("CI").is_none();
        Self { quiet, hushed: false, bar_allowed, progress: None }
    }

    /// From here on shows errors only: another rank shows the rest.
    pub fn hush(&mut self) {
        (self.quiet, self.hushed) = (true, true);
    }

    /// Starts the progress of a run that has taken `first` of `total` steps.
    pub fn start(&mut self, first: u64, total: u64) {
        let bar = (self.bar_allowed && !self.quiet).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            let template = "{elapsed_precise} [{bar:32}] {pos}/{len} {msg} eta {eta}";
            bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "));
            bar.with_position(first)
        });
        if let Some(bar) = &bar {
            bar.reset_eta();
        }
        self.progress = Some(Progress { total, first, started: Instant::now(), bar });
    }

    /// Shows that `step` is done without a line of its own.
    pub fn tick(&self, step: u64) {
        if let Some(bar) = self.progress.as_ref().and_then(|progress| progress.bar.as_ref()) {
            bar.set_position(step);
        }
    }

    /// Shows a record: in the bar, or as one line.
    pub fn step(&self, record: &Record) {
        let Some(progress) = &self.progress else { return };
        match &progress.bar {
            Some(bar) => {
                bar.set_position(record.step());
                bar.set_message(fields(record));
            }
            None if self.quiet => {}
            None => self.people(&line(record, progress.total, progress.remaining(record.step()))),
        }
    }

    /// Ends the progress; the bar's last state stays on the screen.
    pub fn finish(&mut self) {
        if let Some(bar) = self.progress.take().and_then(|progress| progress.bar) {
            bar.abandon();
        }
    }

    /// A line for a person; not shown when quiet.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.people(text.as_ref());
        }
    }

    /// Something that is not as it should be but does not stop the run.
    pub fn warn(&self, text: impl AsRef<str>) {
        if !self.hushed {
            self.people(&format!("warning: {}", text.as_ref()));
        }
    }

    /// The error with its causes and its hint.
    pub fn error(&self, error: &Error) {
        self.people(&describe(error));
    }

    /// A line of results.
    ///
    /// # Errors
    /// stdout cannot be written. A reader that has gone (`| head`) is no error: the rest is not wanted.
    pub fn data(&self, line: impl AsRef<str>) -> Result<()> {
        self.stream(&format!("{}\n", line.as_ref()))
    }

    /// A piece of results, shown at once: generated text.
    ///
    /// # Errors
    /// As [`Self::data`].
    pub fn stream(&self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        accept(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
    }

    /// Rows of results in aligned columns.
    ///
    /// # Errors
    /// As [`Self::data`].
    pub fn table(&self, headers: &[&str], rows: &[Vec<String>]) -> Result<()> {
        self.stream(&table(headers, rows))
    }

    fn people(&self, text: &str) {
        // stderr that has gone away leaves nobody to tell.
        let show = || drop(writeln!(io::stderr().lock(), "{text}"));
        match self.progress.as_ref().and_then(|progress| progress.bar.as_ref()) {
            Some(bar) => bar.suspend(show),
            None => show(),
        }
    }
}

impl Progress {
    fn remaining(&self, step: u64) -> Option<Duration> {
        let done = step.checked_sub(self.first).filter(|&done| done > 0)?;
        let left = self.total.saturating_sub(step);
        Some(self.started.elapsed().mul_f64(left as f64 / done as f64))
    }
}

fn accept(written: io::Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("write", "stdout")(error)),
        _ => Ok(()),
    }
}

/// The line of one record; columns keep their places over a run.
fn line(record: &Record, total: u64, remaining: Option<Duration>) -> String {
    let width = total.to_string().len();
    let eta = remaining.map_or_else(|| "-".to_owned(), clock);
    format!("step {:>width$}/{total}  {}  eta {eta:>8}", record.step(), fields(record))
}

fn fields(record: &Record) -> String {
    let held_out = [("val_loss", "val"), ("val_loss_quantized", "quantized")];
    let held_out = held_out.into_iter().filter_map(|(name, label)| Some(format!("{label} {:>7}", fixed(Some(record.number(name)?), 4))));
    let held_out = held_out.collect::<Vec<_>>().join("  ");
    // An evaluation between two lines of training has nothing else to say.
    let Some(loss) = record.number("loss") else { return held_out };
    let mut text = format!("loss {:>7}", fixed(Some(loss), 4));
    if !held_out.is_empty() {
        text += &format!("  {held_out}");
    }
    let rate = record.number("lr").map_or_else(|| "-".to_owned(), |lr| format!("{lr:.2e}"));
    text + &format!(
        "  lr {rate:>8}  grad {:>7}  {:>7} tok/s",
        fixed(record.number("grad_norm"), 3),
        fixed(record.number("tokens_per_second"), 0)
    )
}

fn fixed(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

/// `1:02:03` or `02:03`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes:02}:{seconds:02}") }
}

/// `error: ...`, each cause that says something new, and the hint.
fn describe(error: &Error) -> String {
    let mut text = format!("error: {error}");
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let shown = inner.to_string();
        if !text.contains(&shown) {
            text += &format!("\n  caused by: {shown}");
        }
        cause = inner.source();
    }
    if let Some(hint) = error.hint() {
        text += &format!("\n  hint: {hint}");
    }
    text
}

/// Columns two spaces apart, as wide as their widest cell; a column of numbers is aligned to the right.
fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let numeric = |text: &str| text.is_empty() || text == "-" || text.trim_end_matches('%').replace(',', "").parse::<f64>().is_ok();
    let columns: Vec<(usize, bool)> = (0..headers.len())
        .map(|column| {
            let cells = || rows.iter().map(|row| cell(row, column));
            let widest = cells().map(|text| text.chars().count()).max().unwrap_or(0).max(headers[column].chars().count());
            (widest, !rows.is_empty() && cells().all(|text| numeric(&text)))
        })
        .collect();
    let head: Vec<String> = headers.iter().map(|&header| header.to_owned()).collect();
    let lines = std::iter::once(&head).chain(rows).map(|row| {
        let cells = columns.iter().enumerate().map(|(column, &(width, right))| {
            let text = cell(row, column);
            if right { format!("{text:>width$}") } else { format!("{text:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_run_have_one_width() {
        let record = |step, loss: f64, rate: f64| {
            Record::new(step).with("loss", loss).with("lr", rate).with("grad_norm", 0.1234).with("tokens_per_second", 12345.6)
        };
        let first = line(&record(1, 10.5, 3e-4), 2000, None);
        let later = line(&record(2000, 2.0, 1e-10), 2000, Some(Duration::from_secs(3723)));
        assert_eq!(first, "step    1/2000  loss 10.5000  lr  3.00e-4  grad   0.123    12346 tok/s  eta        -");
        assert_eq!(later, "step 2000/2000  loss  2.0000  lr 1.00e-10  grad   0.123    12346 tok/s  eta  1:02:03");
    }

    #[test]
    fn an_evaluated_step_shows_both_losses() {
        let text = fields(&Record::new(1).with("loss", 2.0).with("val_loss", 2.1).with("val_loss_quantized", f64::NAN));
        assert_eq!(text, "loss  2.0000  val  2.1000  quantized     NaN  lr        -  grad       -        - tok/s");
        assert_eq!(fields(&Record::new(1).with("val_loss", 2.1)), "val  2.1000");
    }

    #[test]
    fn tables_align_numbers_right_and_words_left() {
        let rows = [vec!["a".to_owned(), "1.5".to_owned()], vec!["longer".to_owned(), "100".to_owned()], vec!["b".to_owned()]];
        assert_eq!(table(&["name", "n"], &rows), "name      n\na       1.5\nlonger  100\nb\n");
        assert_eq!(table(&["only", "heads"], &[]), "only  heads\n");
    }

    #[test]
    fn errors_show_cause_and_hint_once() {
        let error = Error::input("r.toml:3:1", "unknown key `stesp`").fix("did you mean `steps`?");
        assert_eq!(describe(&error), "error: r.toml:3:1: unknown key `stesp`\n  hint: did you mean `steps`?");
        let error = Error::io("read", "x")(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(describe(&error), "error: x: cannot read: entity not found\n  hint: check the path");
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        assert!(accept(Err(io::Error::from(io::ErrorKind::BrokenPipe))).is_ok());
        assert!(accept(Err(io::Error::from(io::ErrorKind::StorageFull))).is_err());
    }

    #[test]
    fn the_rest_is_estimated_from_this_process() {
        let started = Instant::now().checked_sub(Duration::from_secs(10)).expect("the machine is up longer");
        let progress = Progress { total: 300, first: 100, started, bar: None };
        let left = progress.remaining(200).expect("known").as_secs_f64();
        assert!((10.0..10.5).contains(&left), "{left}");
        assert!(progress.remaining(100).is_none());
    }
}
