//! When what happened, for a look at how collectives and computation overlap: `OSPREY_TRACE=FILE` makes every rank write
//! `FILE.rank-N.json` in the trace event format, which chrome://tracing and Perfetto show.

use crate::error::{Error, Result};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Most spans kept, about a hundred steps of a small model.
const MOST: usize = 100_000;

pub(super) struct Trace {
    path: Option<PathBuf>,
    rank: usize,
    started: Instant,
    spans: Mutex<Vec<serde_json::Value>>,
}

impl Trace {
    pub(super) fn from_environment(rank: usize) -> Self {
        let path = std::env::var_os("OSPREY_TRACE").map(|base| {
            let mut name = base;
            name.push(format!(".rank-{rank}.json"));
            PathBuf::from(name)
        });
        Self { path, rank, started: Instant::now(), spans: Mutex::default() }
    }

    /// Something that `line` ("compute" or "collectives") did.
    pub(super) fn span(&self, line: &str, name: &str, began: Instant, ended: Instant) {
        if self.path.is_none() {
            return;
        }
        let microseconds = |moment: Instant| moment.saturating_duration_since(self.started).as_micros() as u64;
        let (start, end) = (microseconds(began), microseconds(ended));
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.len() < MOST {
            spans.push(serde_json::json!({
                "name": name, "ph": "X", "ts": start, "dur": end - start, "pid": self.rank, "tid": line,
            }));
        }
    }

    pub(super) fn write(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let spans = std::mem::take(&mut *self.spans.lock().unwrap_or_else(PoisonError::into_inner));
        let text = serde_json::json!({ "traceEvents": spans }).to_string();
        std::fs::write(path, text).map_err(Error::io("write", path))
    }
}
