//! Reads GGUF versions 2 and 3 over a memory map. Nothing in the file is believed: every count and length is checked against the bytes that
//! are left before anything is allocated, every product and sum is checked for overflow.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::{Array, DEFAULT_ALIGNMENT, Kind, MAGIC, MAX_RANK, Metadata, Value};
use crate::error::{Error, Result};
use crate::quant;

/// Keys and tensors a file may have; real ones have dozens and thousands.
const MAX_COUNT: u64 = 1 << 20;
/// Longest key or tensor name in bytes (the specification's limit for keys).
const MAX_NAME: u64 = (1 << 16) - 1;
/// Most items of one array; the largest known vocabularies have a quarter of a million tokens.
const MAX_ITEMS: u64 = 1 << 24;
/// Fewest bytes of one entry: name length, rank, one size, type, offset; key length, type, one byte.
const LEAST_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;
const LEAST_KEY: u64 = 8 + 4 + 1;

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Row-major: `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    /// ggml's type id; `quant::by_id` knows those that can be read.
    pub format_id: u32,
    /// From the start of the file, in bytes.
    pub offset: usize,
    /// Size of the data; `None` for a type this crate does not know.
    pub bytes: Option<usize>,
}

impl TensorInfo {
    /// The format of the data.
    ///
    /// # Errors
    /// When it is not one this crate reads.
    pub fn format(&self) -> Result<&'static dyn quant::Format> {
        quant::by_id(self.format_id).ok_or_else(|| {
            let known: Vec<_> = quant::ALL.iter().map(|format| format.layout().name).collect();
            Error::input(&self.name, format!("stored as ggml type {}, which is not supported", self.format_id))
                .fix(format!("convert the file to one of {}", known.join(", ")))
        })
    }

    /// Number of weights.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open file: its tables in memory, its data mapped.
#[derive(Debug)]
pub struct GgufFile {
    pub path: PathBuf,
    pub version: u32,
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
    map: Arc<Mmap>,
}

impl GgufFile {
    /// Opens and checks the file's tables. Tensors of unknown types are listed; only using them fails.
    ///
    /// # Errors
    /// When the file cannot be read or is malformed; the message says where.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        if file.metadata().map_err(Error::io("inspect", path))?.is_dir() {
            return Err(Error::file(path, "is a directory, not a GGUF file"));
        }
        // SAFETY: the map is read-only and private to this process; like every user of memory maps we rely on nobody truncating the file
        // meanwhile, and all reads go through slices bounded by the length at this moment.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (version, metadata, tensors) =
            Reader { bytes: &map, at: 0 }.tables().map_err(|cause| Error::file(path, cause).fix("copy, download or export it again"))?;
        Ok(Self { path: path.to_owned(), version, metadata, tensors, map: Arc::new(map) })
    }

    /// The data of a tensor from this file's table.
    ///
    /// # Errors
    /// When its type is unknown.
    pub fn data(&self, info: &TensorInfo) -> Result<&[u8]> {
        info.format()?;
        let end = info.bytes.and_then(|bytes| info.offset.checked_add(bytes));
        end.and_then(|end| self.map.get(info.offset..end)).ok_or_else(|| Error::file(&self.path, format!("no data for {}", info.name)))
    }

    /// The mapped file, for parameters that outlive this value.
    pub fn map(&self) -> Arc<Mmap> {
        Arc::clone(&self.map)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|info| info.name == name)
    }

    /// Decodes a whole tensor to f32, row-major.
    ///
    /// # Errors
    /// When its type is unknown.
    pub fn decode(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let data = self.data(info)?;
        let mut weights = vec![0.0; info.count()];
        info.format()?.decode_row(data, &mut weights)?;
        Ok(weights)
    }
}

/// A position in the bytes; errors are causes, the caller knows the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    fn tables(&mut self) -> Parsed<(u32, Metadata, Vec<TensorInfo>)> {
        if self.take(4, "the magic number")? != MAGIC {
            return Err("is not a GGUF file (it does not begin with \"GGUF\")".to_owned());
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(format!("has GGUF version {version}; versions 2 and 3 are supported"));
        }
        let num_tensors = self.count("the tensor count", MAX_COUNT, LEAST_TENSOR)?;
        let num_keys = self.count("the key count", MAX_COUNT, LEAST_KEY)?;
        let metadata = self.metadata(num_keys)?;
        let mut tensors = Vec::with_capacity(num_tensors);
        for index in 0..num_tensors {
            tensors.push(self.tensor(index)?);
        }
        let alignment = alignment(&metadata)?;
        self.place(&mut tensors, alignment)?;
        Ok((version, metadata, tensors))
    }

    fn metadata(&mut self, num_keys: usize) -> Parsed<Metadata> {
        let mut metadata = Metadata::default();
        let mut seen = BTreeSet::new();
        for index in 0..num_keys {
            let key = self.string(&format!("key {index}"), MAX_NAME)?;
            if !seen.insert(key.clone()) {
                return Err(format!("has the key {key} twice"));
            }
            let kind = self.kind(&key)?;
            let value = if kind == Kind::Array { self.array(&key)? } else { self.scalar(kind, &key)? };
            metadata.push_new(key, value);
        }
        Ok(metadata)
    }

    fn kind(&mut self, key: &str) -> Parsed<Kind> {
        let number = self.u32(key)?;
        Kind::from_number(number).ok_or_else(|| format!("key {key} has the unknown type {number}"))
    }

    fn array(&mut self, key: &str) -> Parsed<Value> {
        let kind = self.kind(key)?;
        if kind == Kind::Array {
            return Err(format!("key {key} is an array of arrays, which is not supported"));
        }
        let length = self.count(key, MAX_ITEMS, kind.least_bytes())?;
        let mut items = Vec::with_capacity(length);
        for _ in 0..length {
            items.push(self.scalar(kind, key)?);
        }
        Ok(Value::Array(Array { kind, items }))
    }

    fn scalar(&mut self, kind: Kind, key: &str) -> Parsed<Value> {
        Ok(match kind {
            Kind::U8 => Value::U8(u8::from_le_bytes(self.fixed(key)?)),
            Kind::I8 => Value::I8(i8::from_le_bytes(self.fixed(key)?)),
            Kind::U16 => Value::U16(u16::from_le_bytes(self.fixed(key)?)),
            Kind::I16 => Value::I16(i16::from_le_bytes(self.fixed(key)?)),
            Kind::U32 => Value::U32(self.u32(key)?),
            Kind::I32 => Value::I32(i32::from_le_bytes(self.fixed(key)?)),
            Kind::F32 => Value::F32(f32::from_le_bytes(self.fixed(key)?)),
            Kind::Bool => match self.fixed::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("key {key} is a boolean with the value {other}")),
            },
            Kind::String => Value::String(self.string(key, self.left())?),
            Kind::U64 => Value::U64(self.u64(key)?),
            Kind::I64 => Value::I64(i64::from_le_bytes(self.fixed(key)?)),
            Kind::F64 => Value::F64(f64::from_le_bytes(self.fixed(key)?)),
            Kind::Array => return Err(format!("key {key} is an array of arrays, which is not supported")),
        })
    }

    /// One entry of the tensor table; its offset is still relative to the data.
    fn tensor(&mut self, index: usize) -> Parsed<TensorInfo> {
        let name = self.string(&format!("the name of tensor {index}"), MAX_NAME)?;
        let rank = self.u32(&name)? as usize;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("tensor {name} has {rank} dimensions; 1 to {MAX_RANK} are possible"));
        }
        let mut shape = Vec::with_capacity(rank);
        for _ in 0..rank {
            shape.push(usize::try_from(self.u64(&name)?).map_err(|_| format!("tensor {name} has a size beyond memory"))?);
        }
        shape.reverse();
        let format_id = self.u32(&name)?;
        let offset = usize::try_from(self.u64(&name)?).map_err(|_| format!("tensor {name} lies beyond the end of the file"))?;
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        let count = count.filter(|&count| count > 0).ok_or_else(|| format!("tensor {name} has the impossible shape {shape:?}"))?;
        let bytes = match quant::by_id(format_id) {
            None => None,
            Some(format) => Some(data_bytes(&name, format.layout(), &shape, count)?),
        };
        Ok(TensorInfo { name, shape, format_id, offset, bytes })
    }

    /// Makes offsets absolute and checks that every tensor lies in the file, aligned, named once, and apart from the others.
    fn place(&self, tensors: &mut [TensorInfo], alignment: u64) -> Parsed<()> {
        let start = (self.at as u64).checked_next_multiple_of(alignment).and_then(|start| usize::try_from(start).ok());
        let start = start.ok_or("has an impossible alignment")?;
        let mut names = BTreeSet::new();
        let mut spans = Vec::with_capacity(tensors.len());
        for tensor in tensors.iter_mut() {
            let name = &tensor.name;
            if !names.insert(name.clone()) {
                return Err(format!("has the tensor {name} twice"));
            }
            if !(tensor.offset as u64).is_multiple_of(alignment) {
                return Err(format!("tensor {name} is not aligned to {alignment} bytes"));
            }
            let begin = start.checked_add(tensor.offset);
            let end = begin.and_then(|begin| begin.checked_add(tensor.bytes.unwrap_or(0)));
            let (Some(begin), Some(end)) = (begin, end.filter(|&end| end <= self.bytes.len())) else {
                return Err(format!("is truncated: the data of tensor {name} lies beyond the end of the file"));
            };
            tensor.offset = begin;
            spans.push((begin, end, name.clone()));
        }
        spans.sort();
        match spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(format!("tensors {} and {} overlap", pair[0].2, pair[1].2)),
            None => Ok(()),
        }
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, count: usize, what: &str) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("is truncated: it ends within {what}"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    /// A count of things that take at least `least` bytes each, of which the rest of the file can hold so many.
    fn count(&mut self, what: &str, most: u64, least: u64) -> Parsed<usize> {
        let count = self.u64(what)?;
        if count > most || count > self.left() / least {
            return Err(format!("{what} of {count} is more than the file can hold"));
        }
        Ok(count as usize)
    }

    fn string(&mut self, what: &str, most: u64) -> Parsed<String> {
        let length = self.count(what, most, 1)?;
        let bytes = self.take(length, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }
}

fn alignment(metadata: &Metadata) -> Parsed<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => match value.as_u64() {
            Some(alignment @ 1..=0x10_0000) if alignment.is_power_of_two() => Ok(alignment),
            _ => Err("general.alignment is not a power of two".to_owned()),
        },
    }
}

fn data_bytes(name: &str, layout: quant::Layout, shape: &[usize], count: usize) -> Parsed<usize> {
    let width = *shape.last().expect("rank is at least 1");
    if !layout.holds(width) {
        return Err(format!("tensor {name}: rows of {width} weights do not fit {}, whose blocks hold {}", layout.name, layout.block));
    }
    (count / layout.block).checked_mul(layout.block_bytes).ok_or_else(|| format!("tensor {name} has the impossible shape {shape:?}"))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
