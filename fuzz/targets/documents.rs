//! A text to train or evaluate on: plain, separated, and as JSON lines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::data::source::{Files, Layout, Source};

fuzz_target!(|bytes: &[u8]| {
    let path = osprey_fuzz::file("text", bytes);
    for layout in [Layout::Whole, Layout::Separated("<|endoftext|>".into()), Layout::Lines("text".into())] {
        let files = Files::new(&path, &[("txt", layout)]).expect("the file is there");
        let _ = files.visit(&mut |document| {
            assert!(!document.is_empty());
            Ok(())
        });
    }
});
