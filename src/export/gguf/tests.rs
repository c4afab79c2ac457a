use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::export::gguf::{TensorEntry, write};

fn sample_metadata() -> Metadata {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    metadata.set("u8", Value::U8(200));
    metadata.set("i8", Value::I8(-3));
    metadata.set("u16", Value::U16(60000));
    metadata.set("i16", Value::I16(-30000));
    metadata.set("u32", 7u32);
    metadata.set("i32", -7i32);
    metadata.set("f32", 0.5f32);
    metadata.set("bool", true);
    metadata.set("u64", u64::MAX);
    metadata.set("i64", Value::I64(i64::MIN));
    metadata.set("f64", Value::F64(1e300));
    metadata.set("tokens", Value::strings(["a", "", "\u{2581}b"]));
    metadata.set("types", Value::i32s([1, 2, 3]));
    metadata.set("none", Value::strings::<String>([]));
    metadata
}

fn sample_tensors() -> Vec<(TensorEntry, Vec<f32>)> {
    let formats = quant::ALL.iter().enumerate();
    let entries = formats.map(|(index, format)| {
        let shape = if index == 0 { vec![3] } else { vec![index, 256] };
        TensorEntry { name: format!("blk.{index}.weight"), shape, format: *format }
    });
    entries.map(|entry| (entry.clone(), (0..entry.shape.iter().product()).map(|k: usize| (k % 3) as f32 - 1.0).collect())).collect()
}

fn write_sample(path: &Path) {
    let (entries, weights): (Vec<_>, Vec<_>) = sample_tensors().into_iter().unzip();
    write(path, &sample_metadata(), &entries, |index, bytes| entries[index].format.encode_row(&weights[index], bytes), |_| Ok(())).unwrap();
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.gguf");
    write_sample(&path);
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.version, 3);
    assert_eq!(file.metadata, sample_metadata());
    for ((entry, weights), info) in sample_tensors().iter().zip(&file.tensors) {
        assert_eq!((&info.name, &info.shape), (&entry.name, &entry.shape));
        assert_eq!(info.offset % 32, 0);
        let back = file.decode(info).unwrap();
        // The values are -1, 0 and 1, which not every format holds exactly.
        let limit = match entry.format.layout().name {
            "q8_0" => 1e-3,
            "q4_0" | "q4_k" => 0.126,
            "q6_k" => 0.04,
            _ => 0.0,
        };
        assert!(weights.iter().zip(&back).all(|(a, b)| (a - b).abs() <= limit), "{}", info.name);
    }
    assert!(file.tensors.windows(2).all(|pair| pair[0].offset < pair[1].offset));
}

#[test]
fn unknown_types_are_listed_and_refused_only_when_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.gguf");
    write_sample(&path);
    let mut bytes = fs::read(&path).unwrap();
    // The table's first entry: name, rank 1, size 3, type.
    let name = b"blk.0.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 8;
    bytes[at..at + 4].copy_from_slice(&16u32.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.tensors[0].bytes, None);
    assert!(file.data(&file.tensors[0]).unwrap_err().to_string().contains("ggml type 16"));
    assert!(file.data(&file.tensors[1]).is_ok());
}

#[test]
fn fill_must_give_as_many_bytes_as_the_table_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short.gguf");
    let entries = [TensorEntry { name: "x".into(), shape: vec![4], format: &quant::F32 }];
    assert!(
        write(
            &path,
            &Metadata::default(),
            &entries,
            |_, bytes| {
                bytes.push(1);
                Ok(())
            },
            |_| Ok(())
        )
        .is_err()
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Files that must be refused, each with the words its message must have: `tests/hostile/gguf.txt`, made by the script beside it.
#[test]
fn hostile_files_are_named_and_refused() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
    let list = fs::read_to_string(folder.join("gguf.txt")).unwrap();
    let mut seen = 0;
    for line in list.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, words) = line.split_once(": ").unwrap();
        let message = GgufFile::open(&folder.join(name)).expect_err(name).to_string();
        assert!(message.contains(name) && message.contains(words), "{message}");
        seen += 1;
    }
    assert!(seen >= 20, "{seen}");
}

/// Opens `bytes` as a file and touches all it lists.
fn exercise(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    if let Ok(opened) = GgufFile::open(file.path()) {
        for info in &opened.tensors {
            let _ = opened.decode(info);
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        let mut all = if magic { b"GGUF\x03\0\0\0".to_vec() } else { Vec::new() };
        all.extend(bytes);
        exercise(&all);
    }

    #[test]
    fn mutated_files_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>(), truncate in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sample.gguf");
        write_sample(&path);
        let mut bytes = fs::read(&path).unwrap();
        // The tables are at the front; that is where edits matter.
        let tables = 1200.min(bytes.len());
        for (at, value) in edits {
            let at = at.index(tables);
            bytes[at] = value;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }
}
