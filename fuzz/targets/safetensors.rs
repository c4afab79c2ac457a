//! A safetensors file, every tensor of it decoded; and as the tensors of a checkpoint.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::checkpoint::TensorFile;
use osprey::export::safetensors_dir::read_file;

fuzz_target!(|bytes: &[u8]| {
    let path = osprey_fuzz::file("model.safetensors", bytes);
    if let Ok(parameters) = read_file(&path) {
        for parameter in parameters.values() {
            let _ = parameter.to_vec();
        }
    }
    if let Ok(file) = TensorFile::parse("fuzzed".to_owned(), bytes) {
        for name in file.names() {
            let _ = file.read(name);
        }
    }
});
