//! Codes of 1 to 4 bits of the 64 tokens of a channel, without gaps: bits / 2 planes of two bits, the low bits first, then a plane of one
//! bit when the number is odd. Every plane is laid out so that whole vectors unpack at once:
//! two bits, 16 bytes: token t at bits 2 (t / 16) of byte t mod 16;   one bit, 8 bytes: token t at bit t / 8 of byte t mod 8

use crate::ops::cpu::attention::TILE;

/// Bytes of a channel's codes.
pub(super) const fn packed_len(bits: usize) -> usize {
    TILE / 8 * bits
}

/// Packs codes below 2^bits into [`packed_len`] bytes.
pub(super) fn pack(codes: &[u8; TILE], bits: usize, packed: &mut [u8]) {
    packed.fill(0);
    let (pairs, single) = packed.split_at_mut(bits / 2 * 16);
    for (plane, bytes) in pairs.chunks_exact_mut(16).enumerate() {
        codes.iter().enumerate().for_each(|(token, code)| bytes[token % 16] |= (code >> (2 * plane) & 3) << (token / 16 * 2));
    }
    if !single.is_empty() {
        codes.iter().enumerate().for_each(|(token, code)| single[token % 8] |= (code >> (bits - 1) & 1) << (token / 8));
    }
}

/// The reverse of [`pack`].
#[inline(always)]
pub(super) fn unpack<const BITS: usize>(packed: &[u8]) -> [u8; TILE] {
    let mut codes = [0; TILE];
    let (pairs, single) = packed.split_at(BITS / 2 * 16);
    for (plane, bytes) in pairs.as_chunks::<16>().0.iter().enumerate() {
        for (quarter, codes) in codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code |= (byte >> (2 * quarter) & 3) << (2 * plane));
        }
    }
    if let Some(bytes) = single.first_chunk::<8>() {
        for (eighth, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code |= (byte >> eighth & 1) << (BITS - 1));
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    fn round_trip<const BITS: usize>() {
        let mut stream = Stream::new(BITS as u64, "bits");
        for _ in 0..20 {
            let codes: [u8; TILE] = std::array::from_fn(|_| stream.below(1 << BITS) as u8);
            let mut packed = vec![0xFF; packed_len(BITS)];
            pack(&codes, BITS, &mut packed);
            assert_eq!(unpack::<BITS>(&packed), codes);
            let bytes: Vec<u8> = (0..packed.len()).map(|_| stream.bits() as u8).collect();
            pack(&unpack::<BITS>(&bytes), BITS, &mut packed);
            assert_eq!(packed, bytes);
        }
    }

    #[test]
    fn packing_is_a_bijection() {
        round_trip::<1>();
        round_trip::<2>();
        round_trip::<3>();
        round_trip::<4>();
    }

    #[test]
    fn order_is_pinned() {
        let packed = |bits: usize, codes: &dyn Fn(usize) -> u8| {
            let mut packed = vec![0; packed_len(bits)];
            pack(&std::array::from_fn(codes), bits, &mut packed);
            packed
        };
        // Two bits: quarters of the page hold 0, 1, 2, 3.
        assert_eq!(packed(2, &|token| (token / 16) as u8), [0b11_10_01_00; 16]);
        // Three bits: 4 for the second eighth, 3 for the last token.
        let mut three = [0; 24];
        three[15] = 0b11 << 6;
        three[16..].fill(0b10);
        assert_eq!(
            packed(3, &|token| if token / 8 == 1 {
                4
            } else if token == 63 {
                3
            } else {
                0
            }),
            three
        );
        // Four bits: the low pair of bits first.
        let mut four = [0; 32];
        four[1] = 0b01;
        four[17] = 0b10;
        assert_eq!(packed(4, &|token| if token == 1 { 0b1001 } else { 0 }), four);
    }
}
