//! What the targets share: a folder in which each input becomes the file that a reader opens.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// A file called `name` that holds `bytes`, in a folder of this process (in memory where the system has such a place).
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("the folder can be written");
    path
}

/// The folder.
pub fn folder() -> PathBuf {
    FOLDER.with_borrow_mut(|folder| {
        let memory = Path::new("/dev/shm");
        let made = || if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        folder.get_or_insert_with(|| made().expect("a folder can be made")).path().to_owned()
    })
}

/// Puts the hexadecimal XXH3 of `text`, taken with zeros in its place, into the 16 bytes at `at`, as a checkpoint's manifest has it.
pub fn seal_text(text: &mut [u8], at: usize) {
    let Some(slot) = text.get_mut(at..at + 16) else { return };
    slot.fill(b'0');
    let hash = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text));
    text[at..at + 16].copy_from_slice(hash.as_bytes());
}

/// Puts the hashes of payload and header where a token shard has them, so that the checks behind them are reached.
pub fn seal_shard(bytes: &mut [u8]) {
    if bytes.len() < 96 {
        return;
    }
    let payload = xxhash_rust::xxh3::xxh3_64(&bytes[96..]);
    bytes[72..80].copy_from_slice(&payload.to_le_bytes());
    let header = xxhash_rust::xxh3::xxh3_64(&bytes[..88]);
    bytes[88..96].copy_from_slice(&header.to_le_bytes());
}
