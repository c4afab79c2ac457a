//! A GGUF file: its tables, every tensor it can decode, and the model it claims to be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::export::gguf::GgufFile;
use osprey::export::import::load_any;

fuzz_target!(|bytes: &[u8]| {
    let path = osprey_fuzz::file("model.gguf", bytes);
    if let Ok(file) = GgufFile::open(&path) {
        for info in &file.tensors {
            let _ = file.decode(info);
        }
    }
    if let Ok(model) = load_any(&path) {
        let _ = model.weights();
    }
});
