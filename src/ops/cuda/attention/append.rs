//! New tokens enter exact pages; full pages are encoded for the near tier. Kernels: `kernels/kv_append.cu`.

use super::layout::{Near, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// Keys (after RoPE) and values of consecutive tokens, `[count, kv_heads * head_dim]` each.
pub struct Rows<'a, D: Device> {
    pub keys: &'a Buffer<D, f32>,
    pub values: &'a Buffer<D, f32>,
    pub count: usize,
    /// Position of the first row.
    pub first_position: usize,
}

/// Writes rows into exact pages, rounded to f16 (finite numbers stay finite).
///
/// `slots`: `[kv_heads, slots_stride]`, the exact slots (without [`super::EXACT`]) of pages `first_page`, `first_page + 1`, ...
pub fn append<D: Device>(
    device: &D,
    shape: &Shape,
    rows: &Rows<'_, D>,
    exact_pages: &Buffer<D, u8>,
    slots: &Buffer<D, u32>,
    slots_stride: usize,
    first_page: usize,
) -> Result<()> {
    let width = fits(shape.width()?, "head_dim")?;
    let grid = [fits(rows.count, "tokens")?, fits(shape.kv_heads, "kv_heads")?, 1];
    let first_position = fits(rows.first_position, "position")?;
    let (stride, first_page) = (fits(slots_stride, "pages")?, fits(first_page, "pages")?);
    let head_dim = fits(shape.head_dim, "head_dim")?;
    let block = [width.next_multiple_of(32).min(128), 1, 1];
    let args = arguments![rows.keys, rows.values, exact_pages, slots, stride, first_page, first_position, head_dim, width];
    device.launch("kv_append_f16", grid, block, 0, args)
}

/// Encodes full exact pages for the near tier: job i reads exact slot `sources[i]` and writes near slot `targets[i]`.
/// [`Near::F16`] has nothing to encode.
#[expect(clippy::too_many_arguments, reason = "one per buffer")]
pub fn encode<D: Device>(
    device: &D,
    shape: &Shape,
    near: Near,
    exact_pages: &Buffer<D, u8>,
    near_pages: &Buffer<D, u8>,
    sources: &Buffer<D, u32>,
    targets: &Buffer<D, u32>,
    jobs: usize,
) -> Result<()> {
    let kernel = match near {
        Near::F16 => return Ok(()),
        Near::Fp8 => "kv_encode_fp8",
        Near::Int8Int4 => "kv_encode_int8_int4",
    };
    let (head_dim, width) = (fits(shape.head_dim, "head_dim")?, fits(shape.width()?, "head_dim")?);
    let args = arguments![exact_pages, near_pages, sources, targets, head_dim, width];
    device.launch(kernel, [fits(jobs, "pages")?, 1, 1], [256, 1, 1], 0, args)
}

#[cfg(test)]
mod tests {
    use super::super::reference::{coded, decode_near};
    use super::super::testing::{Cache, Draw, Tokens};
    use super::super::{PAGE, exact_page, exact_page_bytes, exact_rows};
    use super::*;
    use crate::ops::cuda::Emulated;
    use half::f16;

    fn caches(near: Near) -> Option<Vec<(Emulated, Cache)>> {
        let mut draw = Draw::new(5);
        let mut all = vec![];
        for (kv_heads, head_dim, count) in [(2, 128, 130), (1, 80, 64), (3, 24, 129), (1, 256, 70), (2, 16, 64)] {
            let device = Emulated::new()?;
            let shape = Shape { kv_heads, group: 1, head_dim };
            let tokens = Tokens::draw(&mut draw, &shape, count);
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            all.push((device, cache));
        }
        Some(all)
    }

    fn page_of(device: &Emulated, pages: &Buffer<Emulated, u8>, slot: u32, bytes: usize) -> Vec<u8> {
        let mut page = vec![0; bytes];
        device.read(pages, slot as usize * bytes, &mut page).unwrap();
        page
    }

    #[test]
    fn appended_pages_hold_their_rows() {
        for (device, cache) in caches(Near::F16).into_iter().flatten() {
            let bytes = exact_page_bytes(cache.shape.width().unwrap());
            for (kv_head, slots) in cache.exact_slots.iter().enumerate() {
                for (page, slot) in slots.iter().enumerate() {
                    let stored = page_of(&device, &cache.exact, *slot, bytes);
                    let end = (page * PAGE + PAGE).min(cache.count);
                    let head = cache.tokens.head(&cache.shape, kv_head, page * PAGE, end);
                    let halves = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
                    let (keys, values) = (halves(&head.keys), halves(&head.values));
                    assert_eq!(exact_rows(&cache.shape, &stored, end - page * PAGE).unwrap(), (keys.clone(), values.clone()));
                    if end % PAGE == 0 {
                        let expected = exact_page(&cache.shape, &keys, &values).unwrap();
                        assert_eq!(stored[2 * PAGE..], expected[2 * PAGE..]);
                        check_norms(&stored, &expected);
                    }
                }
            }
        }
    }

    /// Norms are rounded up from sums in other orders: one unit apart at most.
    fn check_norms(stored: &[u8], expected: &[u8]) {
        for (stored, expected) in stored.chunks_exact(2).zip(expected.chunks_exact(2)).take(PAGE) {
            let bits = |bytes: &[u8]| i32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
            assert!((bits(stored) - bits(expected)).abs() <= 1, "{stored:?} {expected:?}");
        }
    }

    #[test]
    fn encoded_pages_decode_as_the_formulas_say() {
        for near in [Near::Fp8, Near::Int8Int4] {
            for (device, cache) in caches(near).into_iter().flatten() {
                let bytes = near.page_bytes(&cache.shape).unwrap();
                for (kv_head, slots) in cache.near_slots.iter().enumerate() {
                    for (page, slot) in slots.iter().enumerate().take(cache.count / PAGE) {
                        let stored = page_of(&device, &cache.near_pages, *slot, bytes);
                        let head = cache.tokens.head(&cache.shape, kv_head, page * PAGE, page * PAGE + PAGE);
                        let expected = coded(near, &cache.shape, &head);
                        let (decoded, [key_radius, value_error, _, mean_square], norms) = decode_near(near, &cache.shape, &stored);
                        assert_eq!(decoded.keys, expected.head.keys, "{near:?} {:?}", cache.shape);
                        assert_eq!(decoded.values, expected.head.values, "{near:?} {:?}", cache.shape);
                        let above = |stored: f32, true_value: f64, slack: f64| {
                            let stored = f64::from(stored);
                            stored >= true_value && stored <= true_value * (1.0 + slack) + 1e-7
                        };
                        assert!(above(key_radius, expected.key_radius, 2e-4) && above(value_error, expected.value_error, 2e-4));
                        assert!(norms.iter().zip(&expected.value_norms).all(|(stored, norm)| above(*stored, *norm, 2.2e-3)));
                        assert!(f64::from(mean_square) <= expected.value_error.powi(2) * 1.001);
                    }
                }
            }
        }
    }

    #[test]
    fn a_page_at_the_stated_size() {
        let shape = Shape { kv_heads: 1, group: 1, head_dim: 128 };
        assert!(Near::Int8Int4.page_bytes(&shape).unwrap() <= 219 * PAGE);
        assert!(Shape { head_dim: 257, ..shape }.width().is_err());
    }

    #[test]
    fn numbers_that_are_not_finite_are_never_certified() {
        let Some(device) = Emulated::new() else { return };
        let (mut draw, shape) = (Draw::new(6), Shape { kv_heads: 1, group: 1, head_dim: 32 });
        for near in [Near::Fp8, Near::Int8Int4] {
            let mut tokens = Tokens::draw(&mut draw, &shape, 64);
            tokens.keys[77] = f32::NAN;
            tokens.values[78] = f32::NAN;
            tokens.values[79] = f32::INFINITY;
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            let page = page_of(&device, &cache.near_pages, cache.near_slots[0][0], near.page_bytes(&shape).unwrap());
            let (decoded, [key_radius, value_error, ..], _) = decode_near(near, &shape, &page);
            assert!(decoded.keys.iter().chain(&decoded.values).all(|x| x.is_finite()));
            assert_eq!((key_radius, value_error), (f32::INFINITY, f32::INFINITY));
        }
    }
}
