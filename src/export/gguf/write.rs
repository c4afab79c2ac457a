//! Writes GGUF version 3, one tensor in memory at a time.

use std::io::Write;
use std::path::Path;

use super::{DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, Metadata, Value};
use crate::error::{Error, Result};
use crate::export::aside;
use crate::quant::Format;

/// What the tensor table says of one tensor.
#[derive(Clone)]
pub struct TensorEntry {
    pub name: String,
    /// Row-major: `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    pub format: &'static dyn Format,
}

impl TensorEntry {
    /// Bytes of the tensor's data.
    ///
    /// # Errors
    /// When the format cannot hold rows of this width, or the shape is not one a file can have.
    pub fn bytes(&self) -> Result<usize> {
        let layout = self.format.layout();
        let width = *self.shape.last().ok_or_else(|| Error::input(&self.name, "has no dimensions"))?;
        if self.shape.len() > MAX_RANK {
            return Err(Error::input(&self.name, format!("has {} dimensions, GGUF holds {MAX_RANK}", self.shape.len())));
        }
        let row = layout.row_bytes(width).ok_or_else(|| {
            Error::input(&self.name, format!("rows of {width} weights do not fit {}, whose blocks hold {}", layout.name, layout.block))
        })?;
        let rows = self.shape[..self.shape.len() - 1].iter().try_fold(1usize, |rows, &size| rows.checked_mul(size));
        rows.and_then(|rows| rows.checked_mul(row)).ok_or_else(|| Error::input(&self.name, "is larger than memory can address"))
    }
}

/// Writes a file at `path`: `fill(i, &mut bytes)` appends the data of tensor `i`, in table order; `check` sees the finished file before it
/// gets its name.
/// `general.alignment` must not be among the metadata; the default of 32 is used.
///
/// # Errors
/// When the system refuses, `fill` or `check` fails, or `fill` gives another number of bytes than the table says.
pub fn write(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorEntry],
    mut fill: impl FnMut(usize, &mut Vec<u8>) -> Result<()>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let header = header(metadata, tensors)?;
    let write_all = |out: &mut dyn Write| {
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io("write", path));
        put(&header)?;
        put(&padding(header.len()))?;
        let mut bytes = Vec::new();
        for (index, tensor) in tensors.iter().enumerate() {
            bytes.clear();
            fill(index, &mut bytes)?;
            if bytes.len() != tensor.bytes()? {
                return Err(Error::input(&tensor.name, format!("{} bytes of data where the table has {}", bytes.len(), tensor.bytes()?)));
            }
            put(&bytes)?;
            put(&padding(bytes.len()))?;
        }
        Ok(())
    };
    aside::write_file(path, write_all, check)
}

/// Zeros up to the next multiple of the alignment; offsets are multiples of it already.
fn padding(length: usize) -> Vec<u8> {
    vec![0; length.next_multiple_of(DEFAULT_ALIGNMENT as usize) - length]
}

fn header(metadata: &Metadata, tensors: &[TensorEntry]) -> Result<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.entries().len() as u64).to_le_bytes());
    for (key, value) in metadata.entries() {
        put_string(key, &mut out);
        out.extend((value.kind() as u32).to_le_bytes());
        put_value(value, &mut out);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_string(&tensor.name, &mut out);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
        out.extend(tensor.format.layout().id.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + tensor.bytes()? as u64).next_multiple_of(DEFAULT_ALIGNMENT);
    }
    Ok(out)
}

fn put_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(v, out),
        Value::Array(array) => {
            out.extend((array.kind as u32).to_le_bytes());
            out.extend((array.items.len() as u64).to_le_bytes());
            array.items.iter().for_each(|item| put_value(item, out));
        }
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}
