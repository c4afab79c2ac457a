//! What PyTorch's attention needs for the same work, where there is a Python with PyTorch and its GPU: a child process, given only so long.

use crate::ops::cuda::bench::Sizes;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SCRIPT: &str = include_str!("baseline.py");
const PATIENCE: Duration = Duration::from_secs(150);

/// The times, or why there are none.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Baseline {
    Measured(Measured),
    Absent { absent: String },
}

/// Times of `scaled_dot_product_attention`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) torch: String,
    pub(super) device: String,
    pub(super) rows: Vec<Row>,
}

/// One token's attention over an FP16 cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) context: usize,
    /// The fastest of the ways tried.
    pub(super) how: String,
    pub(super) microseconds: f64,
}

#[derive(Deserialize)]
struct Failure {
    error: String,
}

impl Baseline {
    /// The row for `context` tokens.
    pub(super) fn row(&self, context: usize) -> Option<&Row> {
        match self {
            Self::Measured(measured) => measured.rows.iter().find(|row| row.context == context),
            Self::Absent { .. } => None,
        }
    }
}

/// Times PyTorch over the same heads and contexts with `python`.
pub(super) fn measure(python: &str, sizes: &Sizes) -> Baseline {
    let arguments = serde_json::json!({
        "contexts": sizes.contexts,
        "kv_heads": sizes.shape.kv_heads,
        "group": sizes.shape.group,
        "head_dim": sizes.shape.head_dim,
        "cold_bytes": sizes.cold_bytes,
        "seconds": sizes.seconds,
    });
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT, &arguments.to_string()]);
    match answer(command, PATIENCE) {
        Ok(text) => read(&text),
        Err(reason) => Baseline::Absent { absent: format!("{python}: {reason}") },
    }
}

fn read(text: &str) -> Baseline {
    let last = text.lines().last().unwrap_or_default();
    if let Ok(measured) = serde_json::from_str(last) {
        return Baseline::Measured(measured);
    }
    let reason =
        serde_json::from_str::<Failure>(last).map_or_else(|_| "said nothing that is understood".to_owned(), |failure| failure.error);
    Baseline::Absent { absent: format!("PyTorch: {reason}") }
}

/// What the command prints, which has to be little, within `patience`.
fn answer(mut command: Command, patience: Duration) -> Result<String, String> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = child.map_err(|error| error.to_string())?;
    let ended = wait(&mut child, patience);
    if ended.is_err() {
        // It may have ended meanwhile.
        let _ = child.kill();
        let _ = child.wait();
    }
    ended?;
    let mut text = String::new();
    let out = child.stdout.as_mut().ok_or("has no output")?;
    out.read_to_string(&mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

fn wait(child: &mut Child, patience: Duration) -> Result<(), String> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(status.to_string()),
            Ok(None) if start.elapsed() >= patience => return Err(format!("took longer than {} s", patience.as_secs())),
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let text = "a warning\n{\"torch\": \"2.9\", \"device\": \"G\", \"rows\": [{\"context\": 8192, \"how\": \"flash\", \"microseconds\": 9.5}]}\n";
        let found = read(text);
        assert_eq!(found.row(8192).map(|row| row.microseconds), Some(9.5));
        assert!(found.row(1).is_none());
        assert_eq!(read("{\"error\": \"no GPU\"}"), Baseline::Absent { absent: "PyTorch: no GPU".to_owned() });
        assert!(matches!(read(""), Baseline::Absent { .. }));
    }

    #[cfg(unix)]
    #[test]
    fn a_child_gets_only_so_long() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(answer(shell("echo here"), PATIENCE), Ok("here\n".to_owned()));
        assert!(answer(shell("exec sleep 20"), Duration::from_millis(50)).unwrap_err().contains("longer"));
        assert!(answer(shell("exit 3"), PATIENCE).is_err());
        assert!(answer(Command::new("no-such-program-at-all"), PATIENCE).is_err());
    }
}
