//! The tiered key-value cache on a device: pages, append and encode, decode attention with its certificate, prefill attention, page
//! bounds and selection. Calver 2026, arXiv:2605.20868; split contexts: Dao et al. 2023 (Flash-Decoding).
//!
//! A page holds 64 tokens of ONE key-value head. Pages live in two pools, plain byte buffers: the exact pool (f16 originals: the page
//! under way, promoted pages) and the near pool (one format). Page `slot` of a pool starts at byte `slot * bytes of a page`. Page lists
//! and tables name pages by `u32` entries: the slot in the near pool, or the slot in the exact pool with [`EXACT`] set. What bytes a page
//! has is told in `kernels/page.cuh`; they are in the order the tensor cores take them, the same in device and host memory, so promotion
//! is a copy of [`exact_page_bytes`].

mod append;
mod decode;
mod layout;
mod prefill;
#[cfg(test)]
mod reference;
mod rotate;
mod select;
#[cfg(test)]
mod testing;

pub use append::{Rows, append, encode};
pub use decode::{DecodeBuffers, DecodeInputs, PageFacts, Summary, decode, num_splits};
pub use layout::{EXACT, Near, PAGE, Shape, exact_page, exact_page_bytes, exact_rows};
pub use prefill::{Masks, PrefillInputs, prefill};
pub use rotate::{Turn, rotate};
pub use select::{
    Bounds, BoundsInputs, Boxes, Choices, Lists, Pages, Ranking, Selection, box_bytes, page_bounds, page_boxes, page_estimates, rank_pages,
    select_pages, unite_rows, unread_bound,
};
