use super::{Gradients, Tape, Var};
use crate::ops::host::host;
use crate::ops::linear::linear;
use candle_core::{Device, Result, Tensor};

struct Buffers {
    views: Vec<Tensor>,
    holds: Vec<bool>,
    order: Vec<usize>,
}

impl Gradients for Buffers {
    fn slot(&mut self, index: usize) -> (Tensor, bool) {
        (self.views[index].clone(), std::mem::replace(&mut self.holds[index], true))
    }

    fn finished(&mut self, index: usize) -> Result<()> {
        self.order.push(index);
        Ok(())
    }
}

fn buffers(parameters: &[Tensor]) -> Buffers {
    Buffers { views: parameters.iter().map(|p| p.ones_like().unwrap()).collect(), holds: vec![false; parameters.len()], order: vec![] }
}

fn tensor(rows: usize, columns: usize, salt: usize) -> Tensor {
    let values = (0..rows * columns).map(|i| (((i * 7 + salt * 13) % 11) as f32 - 5.0) / 8.0).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    host(tensor).unwrap().to_vec()
}

/// y = (x A^T) B^T + ... with A used twice, so that gradients accumulate both at a parameter and at a value.
fn twice<'a>(tape: &Tape<'a>, x: &Var, a: &Var, b: &Var) -> Result<Var> {
    let first = linear(tape, x, a)?;
    let second = linear(tape, &first, a)?;
    let sum = crate::ops::norm::add_norm(tape, &second, &first, &Var::constant(Tensor::ones(4, candle_core::DType::F32, &Device::Cpu)?), 1e-5)?;
    linear(tape, &sum.1, b)
}

#[test]
fn checkpointing_gives_the_same_gradients_and_finishes_each_parameter_once() {
    let parameters = [tensor(4, 4, 1), tensor(3, 4, 2)];
    let x = tensor(5, 4, 3);
    let seed = tensor(5, 3, 4);
    let run = |checkpoint: bool| {
        let tape = Tape::new();
        let vars: Vec<Var> = parameters.iter().enumerate().map(|(i, p)| Var::parameter(i, p.clone())).collect();
        let (a, b) = (vars[0].clone(), vars[1].clone());
        let lifted = linear(&tape, &Var::constant(x.clone()), &a).unwrap();
        let y = if checkpoint {
            let [y] = tape.checkpoint(&[&lifted], move |tape, inputs| Ok([twice(tape, &inputs[0], &a, &b)?])).unwrap();
            y
        } else {
            twice(&tape, &lifted, &a, &b).unwrap()
        };
        let mut gradients = buffers(&parameters);
        tape.backward(&y, seed.clone(), &mut gradients).unwrap();
        (values(y.tensor()), gradients.views.iter().map(values).collect::<Vec<_>>(), gradients.order)
    };
    let (plain, remembered) = (run(false), run(true));
    assert_eq!(plain.0, remembered.0);
    assert_eq!(plain.1, remembered.1);
    assert_eq!(plain.2, vec![1, 0], "the last layer's gradient is final first");
    assert_eq!(remembered.2, vec![1, 0]);
}

#[test]
fn gradients_overwrite_first_and_add_afterwards() {
    let parameters = [tensor(3, 4, 1)];
    let x = tensor(5, 4, 2);
    let mut gradients = buffers(&parameters);
    let mut pass = || {
        let tape = Tape::new();
        let y = linear(&tape, &Var::constant(x.clone()), &Var::parameter(0, parameters[0].clone())).unwrap();
        tape.backward(&y, tensor(5, 3, 3), &mut gradients).unwrap();
        values(&gradients.views[0])
    };
    let once = pass();
    let doubled = pass();
    for (a, b) in once.iter().zip(&doubled) {
        assert!((2.0 * a - b).abs() < 1e-5, "{a} then {b}");
    }
}

#[test]
fn evaluation_records_nothing() {
    let tape = Tape::evaluate();
    let weight = Var::parameter(0, tensor(3, 4, 1));
    let y = linear(&tape, &Var::constant(tensor(5, 4, 2)), &weight).unwrap();
    assert!(tape.steps.borrow().is_empty());
    assert_eq!(y.tensor().dims(), [5, 3]);
}
