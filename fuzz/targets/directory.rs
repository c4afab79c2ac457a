//! A Hugging Face directory: a configuration, up to the first zero byte, and weights.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::export::import::load_any;

fuzz_target!(|bytes: &[u8]| {
    let cut = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    osprey_fuzz::file("config.json", &bytes[..cut]);
    osprey_fuzz::file("model.safetensors", bytes.get(cut + 1..).unwrap_or_default());
    if let Ok(model) = load_any(&osprey_fuzz::folder()) {
        let _ = model.weights();
    }
});
