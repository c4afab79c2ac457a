//! GGUF, the container of ggml engines (ggml `docs/gguf.md`): typed key-values, a tensor table, aligned tensor data. Little-endian.
//!
//! magic "GGUF", u32 version, u64 tensor count, u64 key count; key-values; tensor table (name, u32 rank, u64 sizes fastest first, u32 type,
//! u64 offset from the data start); padding; data. Everything here uses row-major shapes, `[out, in]` for a matrix, and reverses at the edge.

mod read;
mod value;
mod write;

pub use read::{GgufFile, TensorInfo};
pub use value::{Array, Kind, Metadata, Value};
pub use write::{TensorEntry, write};

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml allows four sizes per tensor.
const MAX_RANK: usize = 4;
