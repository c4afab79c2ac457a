use super::*;
use crate::ops::cpu::isa::testing::on_every_isa;
use crate::ops::rng::Stream;
use crate::quant;

fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, "dense");
    (0..len).map(|_| stream.normal() as f32).collect()
}

/// A matrix of every storage format, with the values its format decodes to.
fn matrices(outputs: usize, inputs: usize) -> Vec<(&'static str, DenseMatrix, Vec<f32>)> {
    let weights = normal(1, outputs * inputs);
    let build = |format: &&'static dyn quant::Format| {
        let layout = format.layout();
        layout.row_bytes(inputs)?;
        let mut bytes = Vec::new();
        format.encode_row(&weights, &mut bytes).unwrap();
        let mut decoded = vec![0.0; weights.len()];
        format.decode_row(&bytes, &mut decoded).unwrap();
        Some((layout.name, DenseMatrix::new(outputs, inputs, *format, &bytes).unwrap(), decoded))
    };
    quant::ALL.iter().filter_map(build).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn products_have_the_bits_of_the_decoded_matrix() {
    for (outputs, inputs) in [(1, 32), (33, 256), (160, 512), (300, 1024), (5, 7)] {
        for (name, matrix, decoded) in matrices(outputs, inputs) {
            for rows in [1, 2, 13] {
                let x = normal(2, rows * inputs);
                let mut expected = vec![0.0; rows * outputs];
                gemm(
                    Matrix::row_major(&x, rows, inputs),
                    &Matrix::row_major(&decoded, outputs, inputs).transposed(),
                    &mut expected,
                    outputs,
                    false,
                );
                for (isa, y) in on_every_isa(|| {
                    let mut y = vec![f32::NAN; rows * outputs];
                    matrix.multiply(&x, &mut y);
                    y
                }) {
                    assert_eq!(bits(&y), bits(&expected), "{name} {outputs}x{inputs} rows {rows} {isa}");
                }
            }
        }
    }
}

#[test]
fn sizes_that_do_not_belong_together_are_refused() {
    assert!(DenseMatrix::new(2, 3, &quant::F32, &[0; 23]).is_err());
    assert!(DenseMatrix::new(2, 33, &quant::Q8_0, &[0; 68]).is_err());
    assert!(DenseMatrix::new(usize::MAX, 4, &quant::F32, &[0; 16]).is_err());
    assert!(DenseMatrix::new(0, 4, &quant::F32, &[]).is_err());
}
