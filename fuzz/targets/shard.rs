//! A token shard with whatever hashes it has, and again with the right ones.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::data::shard::Shard;

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let mut sealed = bytes.to_vec();
    osprey_fuzz::seal_shard(&mut sealed);
    read(&sealed);
});

fn read(bytes: &[u8]) {
    if let Ok(shard) = Shard::open(&osprey_fuzz::file("a.tokens", bytes)) {
        let mut tokens = vec![];
        shard.read(0, shard.tokens(), &mut tokens);
        for document in 0..shard.documents() {
            shard.document(document);
        }
    }
}
