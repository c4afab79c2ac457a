//! XXH3 (xxHash specification 0.8) of a file, one 64-bit hash per chunk: chunks are verified in parallel, and damage is located.

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// Bytes per hash; the last chunk is shorter.
pub(super) const CHUNK_BYTES: usize = 16 << 20;

/// A hash as the manifest writes it.
pub(super) fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// Hash of one chunk.
pub(super) fn of_chunk(chunk: &[u8]) -> u64 {
    xxh3_64(chunk)
}

/// Hashes bytes as they pass.
#[derive(Default)]
pub(super) struct Digest {
    current: Xxh3Default,
    filled: usize,
    bytes: u64,
    chunks: Vec<u64>,
}

impl Digest {
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.filled));
            self.current.update(now);
            self.filled += now.len();
            if self.filled == CHUNK_BYTES {
                self.close();
            }
            bytes = later;
        }
    }

    fn close(&mut self) {
        self.chunks.push(self.current.digest());
        self.current.reset();
        self.filled = 0;
    }

    /// Number of bytes and the hash of each chunk.
    pub(super) fn finish(mut self) -> (u64, Vec<u64>) {
        if self.filled > 0 {
            self.close();
        }
        (self.bytes, self.chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streaming_equals_hashing_each_chunk() {
        let bytes: Vec<u8> = (0..2 * CHUNK_BYTES + 77).map(|i| ((i * 31) >> 3) as u8).collect();
        for pieces in [1 << 20, CHUNK_BYTES, CHUNK_BYTES + 3, bytes.len()] {
            let mut digest = Digest::default();
            bytes.chunks(pieces).for_each(|piece| digest.update(piece));
            let expected: Vec<u64> = bytes.chunks(CHUNK_BYTES).map(of_chunk).collect();
            assert_eq!(digest.finish(), (bytes.len() as u64, expected));
        }
        assert_eq!(Digest::default().finish(), (0, vec![]));
    }

    #[test]
    fn the_hash_is_xxh3() {
        // XXH3_64bits of the empty input, from the reference implementation.
        assert_eq!(hex(of_chunk(b"")), "2d06800538d394c2");
    }
}
