//! Reading checkpoints: every byte is verified before any is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use rayon::prelude::*;
use serde::de::DeserializeOwned;

use super::digest::{self, CHUNK_BYTES};
use super::manifest::{Entry, Manifest};
use super::{TensorFile, list};
use crate::error::{Error, Result};

/// A verified checkpoint, its files mapped into memory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    files: BTreeMap<String, Mapped>,
}

/// Shape and elements of a tensor.
pub type Shaped = (Vec<usize>, Vec<f32>);

/// What [`latest`] found.
#[derive(Debug)]
pub struct Found {
    /// The newest checkpoint that is whole.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are not, newest first, with the reason.
    pub rejected: Vec<(PathBuf, Error)>,
}

/// The newest whole checkpoint of a run.
///
/// # Errors
/// The run's folder cannot be listed. A damaged checkpoint is no error here, it is passed over and returned among the rejected.
pub fn latest(run_dir: &Path) -> Result<Found> {
    let mut rejected = Vec::new();
    for (step, dir) in list(run_dir)?.into_iter().rev() {
        match open(&dir).and_then(|checkpoint| checkpoint.of_step(step)) {
            Ok(checkpoint) => return Ok(Found { checkpoint: Some(checkpoint), rejected }),
            Err(reason) => rejected.push((dir, reason)),
        }
    }
    Ok(Found { checkpoint: None, rejected })
}

/// Opens the checkpoint in the folder `dir` and verifies every file.
///
/// # Errors
/// The manifest or a file is missing, of another length, or damaged; the error names it.
pub fn open(dir: &Path) -> Result<Checkpoint> {
    let manifest = Manifest::read(dir)?;
    let mut files = BTreeMap::new();
    for entry in &manifest.files {
        files.insert(entry.name.clone(), map(&dir.join(&entry.name), entry)?);
    }
    let checkpoint = Checkpoint { dir: dir.to_owned(), manifest, files };
    checkpoint.verify()?;
    Ok(checkpoint)
}

impl Checkpoint {
    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Content of the file called `name`.
    ///
    /// # Errors
    /// The checkpoint has no such file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let file = self.files.get(name).ok_or_else(|| Error::file(&self.dir, format!("holds no file `{name}`")))?;
        Ok(file.bytes())
    }

    /// The JSON file called `name`.
    ///
    /// # Errors
    /// The checkpoint has no such file, or it does not hold a `T`.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        serde_json::from_slice(self.bytes(name)?).map_err(|error| Error::file(&self.dir.join(name), error))
    }

    /// The safetensors file called `name`, to be read tensor by tensor.
    ///
    /// # Errors
    /// The checkpoint has no such file, or it is no safetensors file of f32 tensors.
    pub fn tensor_file(&self, name: &str) -> Result<TensorFile<'_>> {
        TensorFile::parse(self.dir.join(name).display().to_string(), self.bytes(name)?)
    }

    /// Shapes and elements of all tensors in the file called `name`.
    ///
    /// # Errors
    /// As [`Self::tensor_file`].
    pub fn tensors(&self, name: &str) -> Result<BTreeMap<String, Shaped>> {
        let file = self.tensor_file(name)?;
        file.names().into_par_iter().map(|tensor| Ok((tensor.to_owned(), file.read(tensor)?))).collect()
    }

    /// Why a run on `threads` threads and `instruction_path` may not repeat this one's bits; empty when it will.
    pub fn differences(&self, threads: usize, instruction_path: &str) -> Vec<String> {
        let manifest = &self.manifest;
        let mut all = Vec::new();
        if manifest.threads != threads {
            all.push(format!(
                "the checkpoint was written with {} threads, this run has {threads}: results may differ in the last bits",
                manifest.threads
            ));
        }
        if manifest.instruction_path != instruction_path {
            let was = &manifest.instruction_path;
            all.push(format!(
                "the checkpoint was written on the {was} path, this run is on {instruction_path}: results may differ in the last bits"
            ));
        }
        all
    }

    fn of_step(self, step: u64) -> Result<Self> {
        if self.step() == step {
            return Ok(self);
        }
        Err(Error::file(&self.dir, format!("holds step {}, not the one it is named after", self.step())))
    }

    /// Compares every chunk of every file with its hash, on all threads.
    fn verify(&self) -> Result<()> {
        let chunks: Vec<(&Entry, usize, &[u8])> = self.manifest.files.iter().flat_map(|entry| self.chunks(entry)).collect();
        let damaged = chunks.par_iter().find_first(|(entry, index, chunk)| digest::hex(digest::of_chunk(chunk)) != entry.xxh3[*index]);
        let Some((entry, index, chunk)) = damaged else { return Ok(()) };
        let start = index * CHUNK_BYTES;
        let cause = format!("is damaged: bytes {start} to {} do not fit their hash", start + chunk.len());
        Err(Error::file(&self.dir.join(&entry.name), cause).fix("use an earlier checkpoint"))
    }

    fn chunks<'a>(&'a self, entry: &'a Entry) -> impl Iterator<Item = (&'a Entry, usize, &'a [u8])> {
        let bytes = self.files[&entry.name].bytes();
        bytes.chunks(CHUNK_BYTES).enumerate().map(move |(index, chunk)| (entry, index, chunk))
    }
}

/// A file's bytes; an empty one cannot be mapped.
#[derive(Debug)]
struct Mapped(Option<Mmap>);

impl Mapped {
    fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

/// Maps the file of `entry` after its length and number of hashes are checked.
fn map(path: &Path, entry: &Entry) -> Result<Mapped> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::file(path, "is missing from its checkpoint").fix("use an earlier checkpoint"),
        _ => Error::io("read", path)(error),
    })?;
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    if !metadata.is_file() || metadata.len() != entry.bytes {
        let cause = format!("has {} bytes, the manifest says {}: it is truncated or damaged", metadata.len(), entry.bytes);
        return Err(Error::file(path, cause).fix("use an earlier checkpoint"));
    }
    if entry.xxh3.len() as u64 != entry.bytes.div_ceil(CHUNK_BYTES as u64) {
        return Err(Error::file(
            path,
            format!("has {} hashes in the manifest, which do not cover its {} bytes", entry.xxh3.len(), entry.bytes),
        ));
    }
    if entry.bytes == 0 {
        return Ok(Mapped(None));
    }
    // SAFETY: the mapping is read-only and stays within the file's length. Published checkpoints are never written again by this program (they
    // are replaced by renaming, which keeps the mapped inode alive); a user who truncates one under a running program gets a bus error.
    let mapping = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    // Only a hint, which some file systems refuse.
    let _ = mapping.advise(Advice::WillNeed);
    Ok(Mapped(Some(mapping)))
}
