//! What tests that run the program share: a folder of their own, a tiny recipe, and what a run said.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Seconds of training on the built-in corpus: bytes, two layers, a checkpoint in the middle.
pub const TINY: &str = r#"
[run]
dir = "run"
threads = 2

[model]
dim = 64
layers = 2
heads = 2
context = 64

[data]
sources = [{ builtin = { documents = 200 } }]
validation.every = 20

[train]
steps = 8
batch = 4
log_every = 1

[eval]
every = 4
rows = 4

[checkpoint]
every = 4
keep_last = 0

[optim]
rule = "muon"
learning_rate = 3e-3
schedule.wsd = { warmup = { fraction = 0.1 }, decay = { fraction = 0.5 }, final_fraction = 0.0 }
"#;

/// Overrides that make [`TINY`] the ternary face, in widths that every format holds.
pub const TERNARY: [&str; 6] =
    ["model.face=bitnet", "model.dim=256", "model.heads=4", "model.ffn=256", "model.layers=1", "optim.learning_rate=6e-3"];

/// A working directory with `tiny.toml` in it, removed at the end.
pub struct Sandbox {
    folder: tempfile::TempDir,
}

/// How a run of the program ended and what it said.
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Sandbox {
    pub fn new() -> Self {
        let sandbox = Self { folder: tempfile::tempdir().unwrap() };
        sandbox.write("tiny.toml", TINY);
        sandbox
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Copies a file or a folder of files.
    pub fn copy(&self, from: impl AsRef<Path>, to: &str) {
        copy(&self.folder.path().join(from), &self.path(to));
    }

    /// Every path below the folder but the data cache's.
    pub fn listing(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        list(self.folder.path(), &mut found);
        found.retain(|path| !path.starts_with(self.path("data")));
        found
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_osprey"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        // A test has no network, and no models but its own.
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hf-home")).env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN");
        command
    }

    pub fn osprey(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command(arguments))
    }

    /// `osprey train tiny.toml` with overrides.
    pub fn train(&self, overrides: &[&str]) -> Ran {
        Ran::of(self.train_command(overrides))
    }

    /// The same, still running, its output thrown away.
    pub fn start(&self, overrides: &[&str]) -> Child {
        self.train_command(overrides).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn train_command(&self, overrides: &[&str]) -> Command {
        let mut command = self.command(&["train", "tiny.toml"]);
        overrides.iter().for_each(|one| {
            command.args(["--set", one]);
        });
        command
    }

    /// `metrics.jsonl` of a run without what depends on the clock.
    pub fn metrics(&self, run: &str) -> Vec<serde_json::Map<String, serde_json::Value>> {
        let text = self.text(&format!("{run}/metrics.jsonl"));
        let mut records: Vec<serde_json::Map<_, _>> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        records.iter_mut().for_each(|record| {
            record.remove("tokens_per_second");
        });
        records
    }

    /// Training loss of each logged step.
    pub fn losses(&self, run: &str) -> Vec<f64> {
        self.metrics(run).iter().filter_map(|record| record.get("loss")?.as_f64()).collect()
    }
}

impl Ran {
    pub fn of(mut command: Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self
    }

    /// A user's mistake: exit code 2 and one message that holds `words` and says what to do.
    #[track_caller]
    pub fn refused(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(2), "{words:?}\n{}{}", self.out, self.err);
        let messages = self.err.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(messages, 1, "one message, {words:?}\n{}", self.err);
        let message = &self.err[self.err.find("error: ").unwrap()..];
        for word in words {
            assert!(message.contains(word), "{word:?} is not in\n{message}");
        }
        assert!(message.contains("\n  hint: "), "no hint:\n{message}");
        assert!(message.lines().count() <= 3, "more than a message and its hint:\n{message}");
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }
}

fn copy(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        return;
    }
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

fn list(folder: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(&path, found);
        }
        found.insert(path);
    }
}
