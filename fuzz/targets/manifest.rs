//! A checkpoint's manifest with the hash of its own text put right, in a folder with one file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::checkpoint::{MANIFEST, open};

const HEAD: &[u8] = b"{\n  \"manifest_xxh3\": \"0000000000000000\"";

fuzz_target!(|bytes: &[u8]| {
    let mut text = HEAD.to_vec();
    text.extend_from_slice(bytes);
    osprey_fuzz::seal_text(&mut text, HEAD.len() - 17);
    osprey_fuzz::file("a.json", b"{}");
    osprey_fuzz::file(MANIFEST, &text);
    if let Ok(checkpoint) = open(&osprey_fuzz::folder()) {
        let _ = checkpoint.json::<serde_json::Value>("a.json");
        let _ = checkpoint.tensors("a.json");
    }
});
