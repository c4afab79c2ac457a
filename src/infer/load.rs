//! From a path to an engine.

use super::Engine;
use crate::error::Result;
use crate::export::import::load_any;
use std::path::Path;

impl Engine {
    /// Opens a GGUF file, a Hugging Face directory or an Osprey checkpoint. Weights keep the bits of the file; the embedding stays mapped,
    /// matrices are rearranged for the kernels.
    ///
    /// # Errors
    /// When there is no model at `path`, it is malformed, or it is of a kind that cannot be run; the message names file and cause.
    pub fn load(path: &Path) -> Result<Self> {
        let loaded = load_any(path)?;
        Self::new(loaded.spec, &loaded.parameters, loaded.tokenizer)
    }
}
