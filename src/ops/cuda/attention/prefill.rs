//! Attention of many query tokens in tiles, each over the pages its mask lets through. Kernel: `kernels/attention_prefill.cuh`.

use super::layout::{Near, PAGE, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// What prefill reads. A tile holds the rows of one page of positions: tile i those of page `first_position / 64 + i`.
pub struct PrefillInputs<'a, D: Device> {
    /// `[rows, heads, head_dim]`, after RoPE, of consecutive positions.
    pub queries: &'a Buffer<D, f32>,
    pub rows: usize,
    pub first_position: usize,
    pub exact_pages: &'a Buffer<D, u8>,
    /// Not read with [`Near::F16`]; any buffer will do.
    pub near_pages: &'a Buffer<D, u8>,
    /// `[kv_heads, table_stride]` entries of pages 0, 1, ... up to the one before the last row's. What an entry says of a row's own page is
    /// not read.
    pub table: &'a Buffer<D, u32>,
    pub table_stride: usize,
    /// `[kv_heads, own_stride]` exact slots of the pages of the rows, `first_position / 64` first.
    pub own: &'a Buffer<D, u32>,
    pub own_stride: usize,
    /// None: all pages.
    pub masks: Option<Masks<'a, D>>,
}

/// Which pages are read. Bit p of `words` words says that page p is; a row's own page always is.
pub struct Masks<'a, D: Device> {
    /// `[kv_heads, tiles, words]`
    pub of_tiles: &'a Buffer<D, u32>,
    /// `[rows, kv_heads, words]`, nothing that its tile does not read. None: what the tile reads.
    pub of_rows: Option<&'a Buffer<D, u32>>,
    pub words: usize,
}

/// Writes `output` (`[rows, heads, head_dim]`).
pub fn prefill<D: Device>(device: &D, shape: &Shape, near: Near, inputs: &PrefillInputs<'_, D>, output: &Buffer<D, f32>) -> Result<()> {
    let width = shape.width()?;
    let tiles = (inputs.first_position % PAGE + inputs.rows).div_ceil(PAGE);
    let mask_words = inputs.masks.as_ref().map_or(0, |masks| masks.words);
    let [rows, first_position] = [fits(inputs.rows, "tokens")?, fits(inputs.first_position, "position")?];
    let [table_stride, own_stride, mask_words] =
        [fits(inputs.table_stride, "pages")?, fits(inputs.own_stride, "pages")?, fits(mask_words, "pages")?];
    let (group, head_dim) = (fits(shape.group, "group")?, fits(shape.head_dim, "head_dim")?);
    let args = arguments![
        inputs.queries,
        inputs.exact_pages,
        inputs.near_pages,
        inputs.table,
        inputs.own,
        inputs.masks.as_ref().map(|masks| masks.of_tiles),
        inputs.masks.as_ref().and_then(|masks| masks.of_rows),
        output,
        rows,
        first_position,
        table_stride,
        own_stride,
        mask_words,
        group,
        head_dim
    ];
    let grid = [fits(if inputs.rows == 0 { 0 } else { tiles }, "tokens")?, fits(shape.heads(), "heads")?, 1];
    // Queries, keys and values of 64 tokens in halves, and what a page says of itself.
    let shared_bytes = fits(3 * 128 * width + 144, "shared memory")?;
    device.launch(&format!("prefill_attention_{}_{width}", near.name()), grid, [128, 1, 1], shared_bytes, args)
}

#[cfg(test)]
mod tests {
    use super::super::reference::attend;
    use super::super::testing::{Cache, Draw, Tokens, distance, norm};
    use super::*;
    use crate::ops::cuda::Emulated;

    /// Who chooses pages.
    #[derive(Clone, Copy, PartialEq)]
    enum By {
        Nobody,
        Tiles,
        Rows,
    }

    fn run(near: Near, cases: &[(usize, usize, usize, usize, By)]) {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(31);
        for &(group, head_dim, first, count, by) in cases {
            let shape = Shape { kv_heads: 2, group, head_dim };
            let tokens = Tokens::draw(&mut draw, &shape, count);
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            check(&device, &mut draw, &cache, first, by);
        }
    }

    fn check(device: &Emulated, draw: &mut Draw, cache: &Cache, first: usize, by: By) {
        let (shape, width, rows) = (&cache.shape, cache.shape.head_dim, cache.count - first);
        let queries: Vec<f32> = (0..rows * shape.heads() * width).map(|_| draw.normal()).collect();
        let (pages, first_page) = (cache.pages(), first / PAGE);
        // Every fifth earlier page is exact.
        let entries: Vec<u32> = (0..2 * pages).map(|at| cache.entry(at / pages, at % pages, at % pages % 5 == 4)).collect();
        let own: Vec<u32> = cache.exact_slots.iter().flat_map(|slots| slots[first_page..].to_vec()).collect();
        let (tiles, words) = (pages - first_page, pages.div_ceil(32));
        let mut masks: Vec<u32> = (0..2 * tiles * words).map(|_| draw.below(1 << 16) as u32 * 0x10001).collect();
        let tile_word = |row: usize, kv_head: usize, word: usize| (kv_head * tiles + (first + row) / PAGE - first_page) * words + word;
        let row_masks: Vec<u32> = (0..rows * 2 * words).map(|_| 1 << draw.below(4) | 1 << draw.below(32)).collect();
        let all_words = || (0..rows).flat_map(|row| (0..2 * words).map(move |at| (row, at / words, at % words)));
        if by == By::Rows {
            masks.fill(0);
            all_words().zip(&row_masks).for_each(|((row, kv_head, word), mask)| masks[tile_word(row, kv_head, word)] |= mask);
        }
        let (of_tiles, of_rows) = (device.upload(&masks).unwrap(), device.upload(&row_masks).unwrap());
        let inputs = PrefillInputs {
            queries: &device.upload(&queries).unwrap(),
            rows,
            first_position: first,
            exact_pages: &cache.exact,
            near_pages: &cache.near_pages,
            table: &device.upload(&entries).unwrap(),
            table_stride: pages,
            own: &device.upload(&own).unwrap(),
            own_stride: tiles,
            masks: (by != By::Nobody).then_some(Masks { of_tiles: &of_tiles, of_rows: (by == By::Rows).then_some(&of_rows), words }),
        };
        let output = device.alloc(queries.len()).unwrap();
        prefill(device, shape, cache.near, &inputs, &output).unwrap();
        let output = device.download(&output).unwrap();
        for (row, head) in (0..rows).step_by(7).flat_map(|row| (0..shape.heads()).map(move |head| (row, head))) {
            let (position, kv_head) = (first + row, head / shape.group);
            let page = position / PAGE;
            let reads = |other: usize| match by {
                By::Nobody => true,
                By::Tiles => masks[tile_word(row, kv_head, other / 32)] >> (other % 32) & 1 == 1,
                By::Rows => row_masks[(row * 2 + kv_head) * words + other / 32] >> (other % 32) & 1 == 1,
            };
            let mut list: Vec<(usize, bool)> = (0..page).filter(|other| reads(*other)).map(|other| (other, other % 5 == 4)).collect();
            list.push((page, true));
            let seen = cache.seen(kv_head, &list).0;
            let visible = (list.len() - 1) * PAGE + position % PAGE;
            let at = (row * shape.heads() + head) * width;
            let (expected, _) = attend(&queries[at..at + width], &seen, |token| token <= visible);
            let error = distance(&output[at..at + width], &expected);
            assert!(error <= 3e-3 * (norm(&expected) + 1.0), "{:?} {shape:?} position {position} head {head}: {error}", cache.near);
        }
    }

    const CASES: [(usize, usize, usize, usize, By); 7] = [
        (1, 64, 0, 1, By::Nobody),
        (2, 128, 0, 150, By::Nobody),
        (1, 80, 100, 230, By::Tiles),
        (3, 24, 64, 129, By::Nobody),
        (1, 256, 130, 200, By::Nobody),
        (4, 64, 300, 520, By::Tiles),
        (2, 64, 230, 330, By::Rows),
    ];

    #[test]
    fn exact_pages() {
        run(Near::F16, &CASES);
    }

    #[test]
    fn fp8_pages() {
        run(Near::Fp8, &CASES);
    }

    #[test]
    fn int8_int4_pages() {
        run(Near::Int8Int4, &CASES);
    }
}
