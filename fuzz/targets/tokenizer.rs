//! A `tokenizer.json`; what loads must encode and decode.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::data::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::load(&osprey_fuzz::file("tokenizer.json", bytes)) {
        if let Ok(ids) = tokenizer.encode("Once upon a time, caf\u{e9} \u{1f426}\n") {
            let _ = tokenizer.decode(&ids);
        }
        let _ = tokenizer.decode(&[0, 1, u32::MAX]);
        let _ = tokenizer.files();
    }
});
