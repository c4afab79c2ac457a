//! Writing a checkpoint: aside, synced, manifest last, renamed. A crash at any moment leaves the earlier checkpoints and at most a hidden folder.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::digest::{self, Digest};
use super::manifest::{self, Entry, MANIFEST, Manifest};
use super::tensors::{self, BUFFER_BYTES, Tensor};
use super::{claim, folder_name};
use crate::error::{Error, Result};

/// The content of one file.
pub enum Payload<'a> {
    /// As it is.
    Bytes(Cow<'a, [u8]>),
    /// A safetensors file of f32 tensors, written in name order without a second copy in memory.
    Tensors(Vec<Tensor<'a>>),
}

impl<'a> Payload<'a> {
    /// A text file.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Bytes(Cow::Owned(text.into().into_bytes()))
    }

    /// An indented JSON file.
    pub fn json(value: &Value) -> Self {
        Self::text(format!("{value:#}\n"))
    }

    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Tensors(tensors) => tensors.iter().map(|tensor| tensor.data.len() as u64 * 4).sum(),
        }
    }
}

/// What a run depends on beside its files; see [`Manifest`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    /// Compute threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub instruction_path: String,
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// Quantized validation loss, nats per token; decides which checkpoint is best.
    pub val_loss_quantized: Option<f64>,
    /// Further facts.
    pub extra: Map<String, Value>,
}

/// Writes the checkpoint of `step` into `run_dir` and returns its folder. One of the same step is replaced.
///
/// # Errors
/// The system refuses, above all when the disk is full: then nothing of the new checkpoint stays and earlier ones are as they were.
pub fn save(run_dir: &Path, step: u64, files: Vec<(String, Payload<'_>)>, meta: Meta) -> Result<PathBuf> {
    fs::create_dir_all(run_dir).map_err(Error::io("create", run_dir))?;
    let aside = run_dir.join(claim::aside_name(step));
    let needed: u64 = files.iter().map(|(_, payload)| payload.len()).sum();
    let written = write_aside(&aside, step, files, meta).and_then(|()| publish(run_dir, step, &aside));
    written.map_err(|error| {
        // The folder is hidden and swept at the next start if even removing fails.
        let _ = fs::remove_dir_all(&aside);
        explain_full(error, run_dir, needed)
    })
}

fn write_aside(aside: &Path, step: u64, files: Vec<(String, Payload<'_>)>, meta: Meta) -> Result<()> {
    if aside.exists() {
        fs::remove_dir_all(aside).map_err(Error::io("remove", aside))?;
    }
    fs::create_dir(aside).map_err(Error::io("create", aside))?;
    let entries = files.into_par_iter().map(|(name, payload)| write_file(aside, name, payload)).collect::<Result<Vec<_>>>()?;
    let manifest = Manifest::new(step, meta, entries);
    write_file(aside, MANIFEST.to_owned(), Payload::Bytes(Cow::Owned(manifest.to_bytes())))?;
    sync_dir(aside)
}

/// Moves the finished folder to its name. An older checkpoint of the same step is set aside first; [`claim()`] puts it back after a crash in between.
fn publish(run_dir: &Path, step: u64, aside: &Path) -> Result<PathBuf> {
    let target = run_dir.join(folder_name(step));
    let old = run_dir.join(claim::old_name(step));
    let replaced = target.exists();
    if replaced {
        fs::rename(&target, &old).map_err(Error::io("move aside", &target))?;
    }
    if let Err(error) = fs::rename(aside, &target) {
        if replaced {
            fs::rename(&old, &target).map_err(Error::io("restore", &target))?;
        }
        return Err(Error::io("create", &target)(error));
    }
    sync_dir(run_dir)?;
    if replaced {
        fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
    }
    Ok(target)
}

fn write_file(dir: &Path, name: String, payload: Payload<'_>) -> Result<Entry> {
    let path = dir.join(&name);
    if name != MANIFEST && !manifest::is_plain(&name) {
        return Err(Error::file(&path, "is not a plain file name"));
    }
    let file = File::create_new(&path).map_err(Error::io("create", &path))?;
    let mut out = Hashed { file, digest: Digest::default() };
    match payload {
        Payload::Bytes(bytes) => {
            bytes.chunks(BUFFER_BYTES).try_for_each(|piece| out.write_all(piece)).map_err(Error::io("write", &path))?
        }
        Payload::Tensors(mut list) => {
            list.sort_by(|a, b| a.name.cmp(&b.name));
            let header = tensors::header(&list).map_err(|cause| Error::file(&path, cause))?;
            out.write_all(&header).and_then(|()| tensors::write_data(&mut out, &list)).map_err(Error::io("write", &path))?;
        }
    }
    out.file.sync_all().map_err(Error::io("sync", &path))?;
    let (bytes, chunks) = out.digest.finish();
    Ok(Entry { name, bytes, xxh3: chunks.into_iter().map(digest::hex).collect() })
}

/// A file whose bytes are hashed on their way.
struct Hashed {
    file: File,
    digest: Digest,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.digest.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Makes names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

fn explain_full(error: Error, run_dir: &Path, needed: u64) -> Error {
    match error {
        Error::Io { path, source, .. }
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge) =>
        {
            let cause = format!("cannot be written: {source}; a checkpoint of this run needs {} MiB", needed.div_ceil(1 << 20));
            let file = path.file_name().map_or_else(String::new, |name| format!("/{}", name.display()));
            Error::input(format!("{}{file}", run_dir.display()), cause)
                .fix("free space or set `run.dir` to another disk, then start again: earlier checkpoints are untouched and the run resumes from them")
        }
        other => other,
    }
}
