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
