//! From a path to an engine.

use super::Engine;
use crate::error::{Error, Result};
use crate::export::import::load_any;
use std::fs;
use std::path::Path;

impl Engine {
    /// Opens a GGUF file, a Hugging Face directory or an Osprey checkpoint. Weights keep the bits of the file; the embedding stays mapped,
    /// matrices are rearranged for the kernels.
    ///
    /// # Errors
    /// When there is no model at `path`, it is malformed, or it is of a kind that cannot be run; the message names file and cause.
    pub fn load(path: &Path) -> Result<Self> {
        let mut loaded = load_any(path)?;
        let adapter = loaded.adapter.take();
        let mut engine = Self::new(loaded.spec, &loaded.parameters, loaded.tokenizer)?;
        if let Some(adapter) = adapter {
            engine.adapt(adapter);
        }
        engine.size.artifact_bytes = artifact_bytes(path)?;
        Ok(engine)
    }
}

/// What one would have to send to someone: the trainer's state in a checkpoint does not count.
fn artifact_bytes(path: &Path) -> Result<u64> {
    if !path.is_dir() {
        return Ok(fs::metadata(path).map_err(Error::io("inspect", path))?.len());
    }
    let mut total = 0;
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let counts = name.ends_with(".safetensors") && (name.starts_with("model") || name.starts_with("adapter_model"))
            || name.starts_with("tokenizer")
            || name.starts_with("model.safetensors.index")
            || name == "config.json";
        if counts {
            total += entry.metadata().map_err(Error::io("inspect", entry.path()))?.len();
        }
    }
    Ok(total)
}
