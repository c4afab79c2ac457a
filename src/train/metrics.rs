//! One record per step, two sinks: `metrics.jsonl` and TensorBoard events under the same names.
//!
//! A resumed run drops what was recorded after its checkpoint, so its files read like those of a run that was never interrupted.

mod events;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Number};

use crate::error::{Error, Result};

/// Name of the file in a run's folder.
pub const FILE: &str = "metrics.jsonl";

/// A recorded value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Integer(i64),
    /// `null` in JSON when not finite.
    Real(f64),
    /// In JSON only.
    Text(String),
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::Real(f64::from(value))
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        i64::try_from(value).map_or(Self::Real(value as f64), Self::Integer)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::from(value as u64)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

/// What is known about one step, in the order it was put in. Its first key is `step`.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    step: u64,
    values: Vec<(String, Value)>,
}

impl Record {
    /// A record of `step` and nothing else.
    pub fn new(step: u64) -> Self {
        Self { step, values: Vec::new() }
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Puts `value` under `name`, replacing an earlier one in its place.
    pub fn put(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        let (name, value) = (name.into(), value.into());
        match self.values.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.values.push((name, value)),
        }
    }

    /// As [`Self::put`], for building in one expression.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.put(name, value);
        self
    }

    /// The number under `name`.
    pub fn number(&self, name: &str) -> Option<f64> {
        match self.values.iter().find(|(known, _)| known == name)?.1 {
            Value::Integer(value) => Some(value as f64),
            Value::Real(value) => Some(value),
            Value::Text(_) => None,
        }
    }

    /// Names and values after the step.
    pub fn values(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// One line of JSON, without the line's end.
    pub fn to_json(&self) -> String {
        let mut map = Map::new();
        map.insert("step".to_owned(), self.step.into());
        for (name, value) in &self.values {
            let json = match value {
                Value::Integer(value) => (*value).into(),
                Value::Real(value) => Number::from_f64(*value).map_or(serde_json::Value::Null, serde_json::Value::Number),
                Value::Text(value) => value.as_str().into(),
            };
            map.insert(name.clone(), json);
        }
        serde_json::Value::Object(map).to_string()
    }

    /// Reads what [`Self::to_json`] wrote; `null` is NaN, nested values are left out.
    fn from_json(line: &str) -> Result<Self, String> {
        let map: Map<String, serde_json::Value> = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let step = map.get("step").and_then(serde_json::Value::as_u64).ok_or("has no whole number `step`")?;
        let mut record = Self::new(step);
        for (name, value) in map.into_iter().filter(|(name, _)| name != "step") {
            match value {
                serde_json::Value::Null => record.put(name, f64::NAN),
                serde_json::Value::Number(number) => match number.as_i64() {
                    Some(whole) => record.put(name, Value::Integer(whole)),
                    None => record.put(name, number.as_f64().unwrap_or(f64::NAN)),
                },
                serde_json::Value::String(text) => record.put(name, text.as_str()),
                _ => {}
            }
        }
        Ok(record)
    }
}

/// Both files of a run, open for appending.
pub struct Sinks {
    path: PathBuf,
    lines: File,
    events: events::Writer,
}

impl Sinks {
    /// Opens the files in `run_dir` for a run that continues after step `resumed`: 0 starts afresh. Records of later steps are dropped.
    ///
    /// # Errors
    /// The system refuses, or `metrics.jsonl` holds something else.
    pub fn open(run_dir: &Path, resumed: u64) -> Result<Self> {
        fs::create_dir_all(run_dir).map_err(Error::io("create", run_dir))?;
        let path = run_dir.join(FILE);
        rewind(&path, resumed)?;
        events::rewind(run_dir, resumed)?;
        let lines = File::options().create(true).append(true).open(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path, lines, events: events::Writer::create(run_dir)? })
    }

    /// Appends `record` to both and hands it to the system, so that a killed process loses nothing.
    ///
    /// # Errors
    /// The system refuses, as when the disk is full.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = record.to_json() + "\n";
        self.lines.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.events.write(record)
    }
}

/// Every record of the run in `run_dir`, in file order. A last line cut short by a crash is left out.
///
/// # Errors
/// The file cannot be read, or a line before the last is no record; the error names the line.
pub fn read(run_dir: &Path) -> Result<Vec<Record>> {
    let path = run_dir.join(FILE);
    let mut records = Vec::new();
    for (number, line) in whole_lines(&path)? {
        records.push(record_at(&path, number, &line)?);
    }
    Ok(records)
}

/// Lines that end in a newline, with their numbers from 1.
fn whole_lines(path: &Path) -> Result<Vec<(usize, String)>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut reader = BufReader::new(file);
    let mut lines = Vec::new();
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))? > 0 {
        if line.last() == Some(&b'\n') {
            let text = String::from_utf8_lossy(&line[..line.len() - 1]).into_owned();
            lines.push((lines.len() + 1, text));
        }
        line.clear();
    }
    Ok(lines)
}

fn record_at(path: &Path, number: usize, line: &str) -> Result<Record> {
    Record::from_json(line).map_err(|cause| {
        Error::input(format!("{}:{number}", path.display()), format!("is no metrics record: {cause}"))
            .fix("remove the line or start the run in another folder")
    })
}

/// Drops lines of steps after `last`; the others keep their bytes. The file changes in one rename or not at all.
fn rewind(path: &Path, last: u64) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let mut kept = String::new();
    for (number, line) in whole_lines(path)? {
        if last > 0 && record_at(path, number, &line)?.step <= last {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    replace(path, kept.as_bytes())
}

/// Replaces a file's content by a synced rename.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let aside = path.with_file_name(name);
    let written = File::create(&aside).and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&aside, path)).map_err(|error| {
        // The original is untouched; what was written aside is of no use.
        let _ = fs::remove_file(&aside);
        Error::io("write", path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record::new(step).with("loss", 1.0 / step as f64).with("tokens", 7usize).with("phase", "warm-up").with("grad_norm", f64::NAN)
    }

    fn text(run: &Path) -> String {
        fs::read_to_string(run.join(FILE)).expect("reads")
    }

    #[test]
    fn a_record_is_one_ordered_line() {
        let mut one = record(4);
        one.put("loss", 0.5f32);
        assert_eq!(one.to_json(), r#"{"step":4,"loss":0.5,"tokens":7,"phase":"warm-up","grad_norm":null}"#);
        assert_eq!((one.number("loss"), one.number("tokens"), one.number("phase"), one.number("none")), (Some(0.5), Some(7.0), None, None));
    }

    #[test]
    fn a_resumed_run_writes_the_file_of_an_undisturbed_one() {
        let (whole, resumed) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let mut sinks = Sinks::open(whole.path(), 0).expect("opens");
        (1..=8).for_each(|step| sinks.write(&record(step)).expect("writes"));
        let mut sinks = Sinks::open(resumed.path(), 0).expect("opens");
        (1..=6).for_each(|step| sinks.write(&record(step)).expect("writes"));
        drop(sinks);
        // The crash also cut a line.
        let mut file = File::options().append(true).open(resumed.path().join(FILE)).expect("opens");
        file.write_all(b"{\"step\":7,\"lo").expect("writes");
        let mut sinks = Sinks::open(resumed.path(), 4).expect("opens");
        (5..=8).for_each(|step| sinks.write(&record(step)).expect("writes"));
        assert_eq!(text(resumed.path()), text(whole.path()));
        assert_eq!(events::steps(resumed.path()), events::steps(whole.path()));
        let read = read(resumed.path()).expect("reads");
        assert_eq!(read.iter().map(Record::step).collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
        assert!(read[0].number("grad_norm").expect("is there").is_nan());
    }

    #[test]
    fn a_fresh_run_keeps_nothing_and_a_foreign_file_is_refused_unchanged() {
        let run = tempfile::tempdir().expect("a folder");
        Sinks::open(run.path(), 0).expect("opens").write(&record(1)).expect("writes");
        Sinks::open(run.path(), 0).expect("opens");
        assert_eq!(text(run.path()), "");
        fs::write(run.path().join(FILE), "{\"step\":1}\nhello\n").expect("writes");
        let error = Sinks::open(run.path(), 1).err().expect("refused").to_string();
        assert!(error.contains("metrics.jsonl:2: is no metrics record"), "{error}");
        assert_eq!(text(run.path()), "{\"step\":1}\nhello\n");
        assert!(read(run.path()).is_err());
    }
}
