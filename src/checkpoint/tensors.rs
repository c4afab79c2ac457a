//! f32 tensors in safetensors files (huggingface/safetensors format: length, JSON header, data), written as a stream and read from a mapping.

use std::borrow::Cow;
use std::io::{self, Write};

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, json};

use crate::error::{Error, Result};

/// Bytes converted and written at a time: small enough for the second-level cache.
pub(super) const BUFFER_BYTES: usize = 256 << 10;

/// A named tensor to be written.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Name in the file.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Cow<'a, [f32]>,
}

impl<'a> Tensor<'a> {
    /// A tensor borrowing its elements.
    pub fn new(name: impl Into<String>, shape: &[usize], data: &'a [f32]) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), data: Cow::Borrowed(data) }
    }
}

/// Length and header of the file that holds `tensors`, which must be in name order.
///
/// # Errors
/// Names out of order or repeated, or a shape that does not fit its data.
pub(super) fn header(tensors: &[Tensor<'_>]) -> Result<Vec<u8>, String> {
    let mut entries = Map::new();
    // Hugging Face loaders refuse a file without this entry.
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0usize;
    for (index, tensor) in tensors.iter().enumerate() {
        if index > 0 && tensors[index - 1].name >= tensor.name {
            return Err(format!("tensor `{}` comes twice", tensor.name));
        }
        if tensor.shape.iter().product::<usize>() != tensor.data.len() {
            return Err(format!("tensor `{}` has shape {:?} but {} elements", tensor.name, tensor.shape, tensor.data.len()));
        }
        let end = offset + tensor.data.len() * 4;
        entries.insert(tensor.name.clone(), json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = serde_json::to_vec(&entries).expect("strings and numbers are JSON");
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

/// Writes the elements of `tensors`, little-endian, in order.
pub(super) fn write_data(out: &mut impl Write, tensors: &[Tensor<'_>]) -> io::Result<()> {
    let mut buffer = vec![0u8; BUFFER_BYTES];
    for tensor in tensors {
        for piece in tensor.data.chunks(BUFFER_BYTES / 4) {
            let bytes = &mut buffer[..piece.len() * 4];
            for (to, from) in bytes.chunks_exact_mut(4).zip(piece) {
                to.copy_from_slice(&from.to_le_bytes());
            }
            out.write_all(bytes)?;
        }
    }
    Ok(())
}

/// The f32 tensors of a safetensors file.
pub struct TensorFile<'a> {
    place: String,
    inner: SafeTensors<'a>,
}

impl<'a> TensorFile<'a> {
    /// Reads the header in `bytes`, the whole file; `place` names it in errors.
    ///
    /// # Errors
    /// The header is damaged or some tensor is not f32.
    pub fn parse(place: impl Into<String>, bytes: &'a [u8]) -> Result<Self> {
        let place = place.into();
        let inner = SafeTensors::deserialize(bytes).map_err(|error| Error::input(&place, format!("is no safetensors file: {error}")))?;
        match inner.iter().filter(|(_, view)| view.dtype() != Dtype::F32).map(|(name, view)| (name, view.dtype())).min() {
            Some((name, dtype)) => Err(Error::input(format!("{place}: {name}"), format!("is {dtype:?}, expected F32"))),
            None => Ok(Self { place, inner }),
        }
    }

    /// Names in order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.inner.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        names
    }

    /// Extents of the tensor called `name`.
    ///
    /// # Errors
    /// The file has no such tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.view(name).map(|(shape, _)| shape)
    }

    /// Copies the tensor called `name` into `to`, with all threads when it is large.
    ///
    /// # Errors
    /// The file has no such tensor, or its length is not that of `to`.
    pub fn read_into(&self, name: &str, to: &mut [f32]) -> Result<()> {
        let (shape, bytes) = self.view(name)?;
        if bytes.len() != to.len() * 4 {
            let cause = format!("has shape {shape:?}, expected {} elements", to.len());
            return Err(Error::input(format!("{}: {name}", self.place), cause).fix("use the recipe this file was written with"));
        }
        const PIECE: usize = 1 << 18;
        to.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * 4)).for_each(|(to, from)| {
            for (to, from) in to.iter_mut().zip(from.chunks_exact(4)) {
                *to = f32::from_le_bytes(from.try_into().expect("chunks of four"));
            }
        });
        Ok(())
    }

    /// Shape and elements of the tensor called `name`.
    ///
    /// # Errors
    /// The file has no such tensor.
    pub fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let (shape, bytes) = self.view(name)?;
        let mut data = vec![0f32; bytes.len() / 4];
        self.read_into(name, &mut data)?;
        Ok((shape, data))
    }

    fn view(&self, name: &str) -> Result<(Vec<usize>, &'a [u8])> {
        let view = self.inner.tensor(name).map_err(|_| {
            let known = self.inner.len();
            Error::input(&self.place, format!("has no tensor `{name}` among its {known}")).fix("use the recipe this file was written with")
        })?;
        Ok((view.shape().to_vec(), view.data()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(tensors: &[Tensor<'_>]) -> Vec<u8> {
        let mut bytes = header(tensors).expect("fits");
        write_data(&mut bytes, tensors).expect("writes");
        bytes
    }

    #[test]
    fn what_is_written_reads_back_bit_for_bit() {
        let many: Vec<f32> = (0..200_003).map(|i| f32::from_bits(i * 20_000 + 1)).collect();
        let tensors = [Tensor::new("a", &[200_003], &many), Tensor::new("b.weight", &[2, 3], &many[..6]), Tensor::new("c", &[0, 4], &[])];
        let bytes = written(&tensors);
        let file = TensorFile::parse("x", &bytes).expect("reads");
        assert_eq!(file.names(), ["a", "b.weight", "c"]);
        for tensor in &tensors {
            let (shape, data) = file.read(&tensor.name).expect("is there");
            assert_eq!(shape, tensor.shape);
            assert!(data.iter().map(|v| v.to_bits()).eq(tensor.data.iter().map(|v| v.to_bits())), "{}", tensor.name);
        }
    }

    #[test]
    fn the_data_starts_on_eight_bytes() {
        let bytes = written(&[Tensor::new("odd", &[1], &[1.0])]);
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight"));
        assert_eq!((length % 8, bytes.len() as u64), (0, 8 + length + 4));
    }

    #[test]
    fn wrong_tensors_are_named() {
        assert!(header(&[Tensor::new("a", &[2], &[1.0])]).expect_err("shape").contains("`a`"));
        assert!(header(&[Tensor::new("a", &[1], &[1.0]), Tensor::new("a", &[1], &[1.0])]).expect_err("twice").contains("`a`"));
        let bytes = written(&[Tensor::new("a", &[2], &[1.0, 2.0])]);
        let file = TensorFile::parse("f.safetensors", &bytes).expect("reads");
        assert!(file.read("z").expect_err("absent").to_string().contains("f.safetensors: has no tensor `z`"));
        let error = file.read_into("a", &mut [0.0]).expect_err("too short").to_string();
        assert_eq!(error, "f.safetensors: a: has shape [2], expected 1 elements");
    }

    #[test]
    fn other_types_are_refused() {
        let text = r#"{"h":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#;
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.extend_from_slice(&[0, 0]);
        let error = TensorFile::parse("f", &bytes).err().expect("refused").to_string();
        assert_eq!(error, "f: h: is F16, expected F32");
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), cut in 0usize..200) {
            let _ = TensorFile::parse("x", &bytes);
            let mut good = written(&[Tensor::new("a", &[4], &[1.0, 2.0, 3.0, 4.0])]);
            for (to, from) in good.iter_mut().skip(cut).zip(bytes.drain(..).take(2)) {
                *to ^= from;
            }
            if let Ok(file) = TensorFile::parse("x", &good) {
                for name in file.names() {
                    let _ = file.read(name);
                }
            }
            let _ = TensorFile::parse("x", &good[..cut.min(good.len())]);
        }
    }
}
