//! TensorBoard event files: tensorboard-rs frames and checksums the records. Its own file writer panics in a thread when the disk is full and cannot
//! say so, hence the few fields of an event (tensorflow/core/util/event.proto, summary.proto) are encoded here.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tensorboard_rs::record_writer::RecordWriter;

use super::{Record, Value, replace};
use crate::error::{Error, Result};

const PREFIX: &str = "events.out.tfevents.";

/// Stands where other programs put the host's name.
const WRITER: &str = ".osprey.";

/// Appends events to a file of its own.
pub(super) struct Writer {
    path: PathBuf,
    file: File,
}

impl Writer {
    /// A new event file in `run_dir`; TensorBoard reads all of a folder as one run, in name order.
    pub(super) fn create(run_dir: &Path) -> Result<Self> {
        let path = (0u32..).map(|attempt| run_dir.join(file_name(attempt))).find(|path| !path.exists()).expect("a free number");
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { path, file };
        let mut event = opening(None);
        bytes_field(&mut event, 3, b"brain.Event:2");
        writer.append(&event)?;
        Ok(writer)
    }

    /// Appends the numbers of `record` as scalars.
    pub(super) fn write(&mut self, record: &Record) -> Result<()> {
        let mut summary = Vec::new();
        for (name, value) in record.values() {
            let number = match value {
                Value::Integer(value) => *value as f32,
                Value::Real(value) => *value as f32,
                Value::Text(_) => continue,
            };
            bytes_field(&mut summary, 1, &scalar(name, number));
        }
        let mut event = opening(Some(record.step()));
        bytes_field(&mut event, 5, &summary);
        self.append(&event)
    }

    /// One write per event, so that a full disk cannot leave half of two.
    fn append(&mut self, event: &[u8]) -> Result<()> {
        let mut framed = Vec::with_capacity(event.len() + 16);
        RecordWriter::new(&mut framed).write(event).expect("memory takes every byte");
        self.file.write_all(&framed).map_err(Error::io("write", &self.path))
    }
}

fn file_name(attempt: u32) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    format!("{PREFIX}{seconds:010}{WRITER}{}.{attempt}", std::process::id())
}

/// wall_time = 1 (double), step = 2 (int64).
fn opening(step: Option<u64>) -> Vec<u8> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let mut event = vec![1 << 3 | 1];
    event.extend_from_slice(&seconds.to_le_bytes());
    if let Some(step) = step {
        event.push(2 << 3);
        varint(&mut event, step);
    }
    event
}

/// Summary.Value: tag = 1 (string), simple_value = 2 (float).
fn scalar(name: &str, value: f32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes_field(&mut bytes, 1, name.as_bytes());
    bytes.push(2 << 3 | 5);
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes
}

fn bytes_field(out: &mut Vec<u8>, field: u8, content: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend_from_slice(content);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Removes events after step `last` from every event file of a run, and files that held nothing else; with 0, all of them.
pub(super) fn rewind(run_dir: &Path, last: u64) -> Result<()> {
    for path in files(run_dir)? {
        let content = fs::read(&path).map_err(Error::io("read", &path))?;
        let kept: Vec<&[u8]> = frames(&content).filter(|frame| step_of(frame).is_none_or(|step| step <= last)).collect();
        let holds_steps = kept.iter().any(|frame| step_of(frame).is_some());
        if !holds_steps || last == 0 {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        } else if kept.iter().map(|frame| frame.len()).sum::<usize>() < content.len() {
            replace(&path, &kept.concat())?;
        }
    }
    Ok(())
}

fn files(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(run_dir).map_err(Error::io("list", run_dir))? {
        let entry = entry.map_err(Error::io("list", run_dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // Another program's events may lie here too; they are not ours to cut.
        if name.starts_with(PREFIX) && name.contains(WRITER) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// Whole frames (length, checksum, event, checksum); a torn tail is left out.
fn frames(mut content: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u64::from_le_bytes(content.get(..8)?.try_into().ok()?);
        let whole = usize::try_from(length).ok()?.checked_add(16)?;
        let frame = content.get(..whole)?;
        content = &content[whole..];
        Some(frame)
    })
}

/// The step of a frame written here: its second field. Events without one are the file's version.
fn step_of(frame: &[u8]) -> Option<u64> {
    let event = frame.get(12..frame.len().checked_sub(4)?)?;
    if *event.get(9)? != 2 << 3 {
        return None;
    }
    let mut step = 0u64;
    for (index, byte) in event.get(10..)?.iter().take(10).enumerate() {
        step |= u64::from(byte & 0x7f).checked_shl(7 * index as u32)?;
        if byte & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

/// Steps of all events of a run, in file order.
#[cfg(test)]
pub(super) fn steps(run_dir: &Path) -> Vec<u64> {
    let contents: Vec<Vec<u8>> = files(run_dir).expect("lists").iter().map(|path| fs::read(path).expect("reads")).collect();
    contents.iter().flat_map(|content| frames(content).filter_map(step_of).collect::<Vec<_>>()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_encoded_as_protobuf_says() {
        assert_eq!(scalar("lr", 1.0), [0x0a, 2, b'l', b'r', 0x15, 0, 0, 0x80, 0x3f]);
        let event = opening(Some(300));
        assert_eq!((event[0], &event[9..]), (0x09, &[0x10, 0xac, 0x02][..]));
    }

    #[test]
    fn frames_carry_valid_checksums() {
        let run = tempfile::tempdir().expect("a folder");
        Writer::create(run.path()).expect("creates").write(&Record::new(u64::MAX).with("loss", 2.5)).expect("writes");
        let content = fs::read(&files(run.path()).expect("lists")[0]).expect("reads");
        let found: Vec<&[u8]> = frames(&content).collect();
        assert_eq!(found.iter().map(|frame| step_of(frame)).collect::<Vec<_>>(), [None, Some(u64::MAX)]);
        for frame in found {
            let (event, sum) = frame[12..].split_at(frame.len() - 16);
            assert_eq!(tensorboard_rs::masked_crc32c::masked_crc32c(event).to_le_bytes(), sum);
        }
    }

    proptest::proptest! {
        #[test]
        fn damaged_event_files_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..120)) {
            let found: Vec<&[u8]> = frames(&bytes).collect();
            proptest::prop_assert!(found.iter().map(|frame| frame.len()).sum::<usize>() <= bytes.len());
            let _ = step_of(&bytes);
            for frame in found {
                let _ = step_of(frame);
            }
        }
    }
}
