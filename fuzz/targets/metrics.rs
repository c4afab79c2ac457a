//! A run's `metrics.jsonl`: read whole, and taken up again after a step.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::train::metrics::{FILE, Sinks, read};

fuzz_target!(|bytes: &[u8]| {
    osprey_fuzz::file(FILE, bytes);
    let folder = osprey_fuzz::folder();
    if let Ok(records) = read(&folder) {
        for record in &records {
            record.to_json();
        }
    }
    let _ = Sinks::open(&folder, 1);
    for entry in std::fs::read_dir(&folder).expect("lists").flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
});
