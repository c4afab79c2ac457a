//! `manifest.json`: what a checkpoint holds, guarded by a hash of its own text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::digest;
use crate::error::{Error, Result};

/// Name of the manifest inside a checkpoint.
pub const MANIFEST: &str = "manifest.json";

/// Format written and read here.
const VERSION: u32 = 1;

/// A larger one is damaged: a file of 1 TB needs 1.3 MB of hashes.
const MAX_BYTES: u64 = 64 << 20;

/// The text before the manifest's own hash, which is computed with zeros in its place.
const HEAD: &str = "{\n  \"manifest_xxh3\": \"";
const NO_HASH: &str = "0000000000000000";

/// What a checkpoint holds and what its run depended on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    manifest_xxh3: String,
    version: u32,
    /// Optimizer steps taken.
    pub step: u64,
    /// Version of the program that wrote it.
    pub osprey: String,
    /// Compute threads of the run; with another number a resumed run may differ in its last bits.
    pub threads: usize,
    /// Instruction set of the kernels; as `threads`.
    pub instruction_path: String,
    /// Quantized validation loss, nats per token. Text, because a JSON reader may round a number's last bit and the best checkpoint would change.
    #[serde(with = "exact")]
    pub val_loss_quantized: Option<f64>,
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// Every file beside the manifest.
    pub files: Vec<Entry>,
    /// Further facts of the caller.
    pub extra: Map<String, Value>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Plain file name.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// XXH3-64 of each 16 MiB, in hexadecimal.
    pub xxh3: Vec<String>,
}

impl Manifest {
    /// A manifest of the current version, not yet hashed.
    pub(super) fn new(step: u64, meta: super::Meta, files: Vec<Entry>) -> Self {
        Self {
            manifest_xxh3: NO_HASH.to_owned(),
            version: VERSION,
            step,
            osprey: env!("CARGO_PKG_VERSION").to_owned(),
            threads: meta.threads,
            instruction_path: meta.instruction_path,
            val_loss_quantized: meta.val_loss_quantized,
            recipe: meta.recipe,
            files,
            extra: meta.extra,
        }
    }

    /// The file's bytes, hash filled in.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let blank = Self { manifest_xxh3: NO_HASH.to_owned(), ..self.clone() };
        let mut text = serde_json::to_vec_pretty(&blank).expect("strings, numbers and maps with text keys are JSON");
        text.push(b'\n');
        let hash = digest::hex(digest::of_chunk(&text));
        text[HEAD.len()..HEAD.len() + hash.len()].copy_from_slice(hash.as_bytes());
        text
    }

    /// Reads and checks the manifest in the folder `dir`; the files it names are not touched.
    ///
    /// # Errors
    /// It is missing, damaged, of a newer version, or names a file outside the folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let file = File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::file(&path, "is missing, so this is no complete Osprey checkpoint").fix("name a step-NNNNNN folder of a run")
            }
            _ => Error::io("read", &path)(error),
        })?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
        Self::parse(&bytes).map_err(|cause| Error::file(&path, cause).fix("use an earlier checkpoint"))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err("is too large for a manifest".to_owned());
        }
        let end = HEAD.len() + NO_HASH.len();
        if bytes.len() < end || !bytes.starts_with(HEAD.as_bytes()) {
            return Err("is truncated or damaged: it does not begin like a manifest".to_owned());
        }
        let mut blank = bytes.to_vec();
        blank[HEAD.len()..end].copy_from_slice(NO_HASH.as_bytes());
        if digest::hex(digest::of_chunk(&blank)).as_bytes() != &bytes[HEAD.len()..end] {
            return Err("is truncated or damaged: its hash does not fit its text".to_owned());
        }
        Self::checked(bytes)
    }

    fn checked(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let versioned: Versioned = serde_json::from_slice(bytes).map_err(|error| format!("is no manifest: {error}"))?;
        if versioned.version != VERSION {
            return Err(format!("has version {}, this program reads version {VERSION}", versioned.version));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| format!("is no manifest: {error}"))?;
        let mut names: Vec<&str> = manifest.files.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        if let Some(name) = names.iter().find(|name| !is_plain(name)) {
            return Err(format!("names the file `{name}`, which is not a plain name"));
        }
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("names the file `{}` twice", pair[0])),
            None => Ok(manifest),
        }
    }
}

/// A name that stays inside the checkpoint's folder and is not the manifest.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && name != MANIFEST && !name.contains(['/', '\\', '\0'])
}

/// An optional f64 as its shortest exact decimal text.
mod exact {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::ref_option, reason = "the signature serde calls")]
    pub(super) fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(|value| format!("{value:?}")).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(|_| D::Error::custom(format!("`{text}` is no number")))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Meta;

    fn example() -> Manifest {
        let extra = serde_json::from_str(r#"{"dataset": "abc", "order": [1, 2]}"#).expect("valid");
        let meta = Meta {
            threads: 2,
            instruction_path: "avx2".into(),
            recipe: "[run]\ndir = 'x'\n".into(),
            val_loss_quantized: Some(0.1 + 0.2),
            extra,
        };
        Manifest::new(7, meta, vec![Entry { name: "a.bin".into(), bytes: 3, xxh3: vec![digest::hex(9)] }])
    }

    #[test]
    fn reads_back_exactly() {
        let written = example().to_bytes();
        let read = Manifest::parse(&written).expect("reads");
        assert_eq!(read.val_loss_quantized.map(f64::to_bits), Some((0.1f64 + 0.2).to_bits()));
        assert_eq!(Manifest { manifest_xxh3: NO_HASH.into(), ..read.clone() }, example());
        assert_eq!(read.to_bytes(), written);
    }

    #[test]
    fn any_flipped_or_missing_byte_is_found() {
        let good = example().to_bytes();
        for at in 0..good.len() {
            for mask in [1, 0x20, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= mask;
                assert!(Manifest::parse(&bad).is_err(), "byte {at} flipped by {mask}");
            }
            assert!(Manifest::parse(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn names_outside_the_folder_twice_or_newer_versions_are_refused() {
        for name in ["../x", "/etc/passwd", "", "..", "a/b", MANIFEST] {
            let mut manifest = example();
            manifest.files[0].name = name.into();
            assert!(Manifest::parse(&manifest.to_bytes()).expect_err("refused").contains("not a plain name"), "{name}");
        }
        let mut manifest = example();
        manifest.files.push(manifest.files[0].clone());
        assert!(Manifest::parse(&manifest.to_bytes()).expect_err("refused").contains("twice"));
        let manifest = Manifest { version: 2, ..example() };
        assert!(Manifest::parse(&manifest.to_bytes()).expect_err("refused").contains("has version 2"));
    }
}
