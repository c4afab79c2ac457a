//! From a path to an engine.

use super::Engine;
use crate::data::hub;
use crate::error::{Error, Result};
use crate::export::import::load_any;
use crate::ops::cuda::Cuda;
use std::fs;
use std::path::Path;
use std::str::FromStr;

/// What a model runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processor {
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Processor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, number) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(number)) => Ok(Self::Cuda(number)),
            _ => Err(Error::input("--device", format!("there is no device {text:?}")).fix("give cpu, or cuda:N with the number of a GPU")),
        }
    }
}

impl Engine {
    /// Opens a GGUF file, a Hugging Face directory, an Osprey checkpoint, or the model of that name on the hub. Weights keep the bits of the file; the embedding stays mapped,
    /// matrices are rearranged for the kernels.
    ///
    /// # Errors
    /// When there is no model at `path`, it is malformed, or it is of a kind that cannot be run; the message names file and cause.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_on(path, Processor::Cpu)
    }

    /// The same, to run on `processor`. A GPU keeps dense weights in half precision.
    ///
    /// # Errors
    /// As [`Engine::load`], and when there is no such device, it has no room for the model or no kernels for it.
    pub fn load_on(path: &Path, processor: Processor) -> Result<Self> {
        // A device that is not there is said before a large file is read.
        let device = match processor {
            Processor::Cpu => None,
            Processor::Cuda(number) => Some(Cuda::new(number)?),
        };
        let path = &*hub::resolve(path)?;
        let mut loaded = load_any(path)?;
        let adapter = loaded.adapter.take();
        let mut engine = match (device, adapter) {
            (None, None) => Self::new(loaded.spec, &loaded.parameters, loaded.tokenizer)?,
            (None, Some(adapter)) => Self::adapted(loaded.spec, &loaded.parameters, loaded.tokenizer, adapter)?,
            (Some(device), None) => Self::on_device(device, loaded.spec, &loaded.parameters, loaded.tokenizer)?,
            (Some(_), Some(_)) => {
                return Err(Error::file(path, "is an adapter beside its base, which only the CPU runs")
                    .fix("export it merged, for example with --format hf, and run that"));
            }
        };
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
            total += fs::metadata(entry.path()).map_err(Error::io("inspect", entry.path()))?.len();
        }
    }
    Ok(total)
}
