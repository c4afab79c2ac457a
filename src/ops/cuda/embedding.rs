//! Rows of an f16 table, widened to f32, on a device.
//! x_t = table_{ids_t}
//! table: `[vocab, width]` f16   ids: `[rows]`   x: `[rows, width]` f32
//! Exact. CUDA: kernels/embedding.cu, one block per row.

use super::check::{Agreement, noise};
use super::dense::HalfMatrix;
use super::device::defect;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use half::f16;

const BLOCK: u32 = 128;

/// Writes the rows of `table` that the first `rows` of `ids` name. The ids must be below the table's rows: nobody checks them here.
///
/// # Errors
/// When a buffer is too small, or the launch fails.
pub fn embedding_rows<D: Device>(device: &D, table: &HalfMatrix<D>, ids: &Buffer<D, u32>, x: &Buffer<D, f32>, rows: usize) -> Result<()> {
    if ids.len() < rows || x.len() < rows * table.inputs() {
        return Err(defect(format!("buffers of {rows} rows of an embedding")));
    }
    let (width, stride) = (fits(table.inputs(), "width")?, fits(table.stride(), "width")?);
    device.launch("embedding_rows_f16", [fits(rows, "rows")?, 1, 1], [BLOCK, 1, 1], 0, arguments![table.values(), ids, x, width, stride])
}

/// The kernel against plain indexing.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let mut agreement = Agreement::new("embedding_rows_f16", 0.0);
    for (vocab, width, ids) in [(1, 1, vec![0]), (7, 33, vec![6, 0, 3, 3]), (20, 300, vec![19, 1])] {
        let values: Vec<f16> = noise("table", vocab * width).into_iter().map(f16::from_f32).collect();
        let table = HalfMatrix::new(device, vocab, width, &values)?;
        let (device_ids, x) = (device.upload(&ids)?, device.alloc(ids.len() * width)?);
        embedding_rows(device, &table, &device_ids, &x, ids.len())?;
        let expected: Vec<f32> = ids.iter().flat_map(|&id| &values[id as usize * width..][..width]).map(|value| value.to_f32()).collect();
        agreement.add(&device.download(&x)?, &expected);
    }
    Ok(vec![agreement])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::ops::cuda::check::assert_sound;

    #[test]
    fn rows_are_the_tables() {
        let Some(device) = Emulated::new() else { return };
        assert_sound(&agreements(&device).unwrap());
    }
}
