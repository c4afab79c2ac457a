//! Gradient checks: an operation's reference in f64 against central differences, then its fused f32 path against that reference.

use super::rng::Stream;
use crate::tape::{Gradients, Tape, Var};
use candle_core::{DType, Device, Result, Tensor};

struct Buffers {
    views: Vec<Tensor>,
    holds: Vec<bool>,
}

impl Gradients for Buffers {
    fn slot(&mut self, index: usize) -> (Tensor, bool) {
        (self.views[index].clone(), std::mem::replace(&mut self.holds[index], true))
    }

    fn finished(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}

/// Standard normal f64 values in a tensor of `shape`.
pub(crate) fn gaussian(name: &str, shape: &[usize]) -> Tensor {
    let mut stream = Stream::new(11, name);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// An operation from leaves to the one value that is checked.
pub(crate) trait Operation: for<'a> Fn(&Tape<'a>, &[Var]) -> Result<Var> {}
impl<F: for<'a> Fn(&Tape<'a>, &[Var]) -> Result<Var>> Operation for F {}

struct Evaluated {
    /// Weighted sum of the outputs.
    objective: f64,
    output: Vec<f64>,
    gradients: Vec<Vec<f64>>,
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn evaluate(operation: &impl Operation, tape: Tape<'_>, inputs: &[Tensor]) -> Evaluated {
    let leaves: Vec<Var> = inputs.iter().enumerate().map(|(i, t)| Var::parameter(i, t.clone())).collect();
    let output = operation(&tape, &leaves).unwrap();
    let seed = gaussian("seed", output.tensor().dims()).to_dtype(output.tensor().dtype()).unwrap();
    let objective = wide(output.tensor()).iter().zip(wide(&seed)).map(|(y, c)| y * c).sum();
    let views = inputs.iter().map(|t| t.zeros_like().unwrap()).collect();
    let mut gradients = Buffers { views, holds: vec![false; inputs.len()] };
    tape.backward(&output, seed, &mut gradients).unwrap();
    Evaluated { objective, output: wide(output.tensor()), gradients: gradients.views.iter().map(wide).collect() }
}

/// Norm of the difference over the norm of the expected value.
pub(crate) fn distance(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied()).max(1e-12)
}

/// Compares the reference's gradients of every input with central differences, both in f64.
pub(crate) fn check_reference(operation: impl Operation, inputs: &[Tensor]) {
    let analytic = evaluate(&operation, Tape::new().reference(), inputs);
    for (index, input) in inputs.iter().enumerate() {
        let values = wide(input);
        let slope = |element: usize| {
            let step = 1e-5;
            let at = |delta: f64| {
                let mut moved = values.clone();
                moved[element] += delta;
                let mut inputs = inputs.to_vec();
                inputs[index] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                evaluate(&operation, Tape::new().reference(), &inputs).objective
            };
            (at(step) - at(-step)) / (2.0 * step)
        };
        // Every element of small inputs, an even sample of large ones.
        let sample: Vec<usize> = (0..values.len()).step_by(values.len().div_ceil(40)).collect();
        let numeric: Vec<f64> = sample.iter().map(|&element| slope(element)).collect();
        let found: Vec<f64> = sample.iter().map(|&element| analytic.gradients[index][element]).collect();
        let error = distance(&found, &numeric);
        assert!(error < 1e-6, "input {index}: the reference's gradient is {error:.1e} from central differences");
    }
}

/// Compares the fused f32 path with the f64 reference on the same numbers (rounded to f32 first).
pub(crate) fn check_fused(operation: impl Operation, inputs: &[Tensor], tolerance: f64) {
    let narrow: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    let rounded: Vec<Tensor> = narrow.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
    let expected = evaluate(&operation, Tape::new().reference(), &rounded);
    let found = evaluate(&operation, Tape::new(), &narrow);
    let error = distance(&found.output, &expected.output);
    assert!(error < tolerance, "output: {error:.1e} from the reference");
    for (index, (found, expected)) in found.gradients.iter().zip(&expected.gradients).enumerate() {
        let error = distance(found, expected);
        assert!(error < tolerance, "gradient of input {index}: {error:.1e} from the reference");
    }
}

/// Both checks.
pub(crate) fn check(operation: impl Operation, inputs: &[Tensor]) {
    check_reference(&operation, inputs);
    check_fused(&operation, inputs, 2e-6);
}
