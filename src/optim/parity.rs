//! Against `tests/fixtures/optim/make.py`: torch's own AdamW and Muon, and the papers' algorithms in float64.

use safetensors::SafeTensors;

use super::testing::{norm, relative_error};
use super::*;

const STEPS: u64 = 20;

struct File(&'static [u8]);

const PROBLEM: File = File(include_bytes!("../../tests/fixtures/optim/problem.safetensors"));
const EXPECTED: File = File(include_bytes!("../../tests/fixtures/optim/expected.safetensors"));
const STOCK_BF16: File = File(include_bytes!("../../tests/fixtures/optim/stock_bf16.safetensors"));

impl File {
    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = SafeTensors::deserialize(self.0).unwrap();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}; run tests/fixtures/optim/make.py"));
        let values = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        (view.shape().to_vec(), values)
    }
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Follows the fixture's problem; the error is relative to the way from the start, which is shorter than the weights are long.
fn follow(case: &str, rule: &dyn Rule, tolerance: f64) {
    for problem in ["tall", "wide", "square"] {
        let (shape, start) = PROBLEM.tensor(&format!("{problem}.start"));
        let (_, gradients) = PROBLEM.tensor(&format!("{problem}.gradients"));
        let (mut weight, mut state) = (start.clone(), vec![0.0; rule.state_len(&shape)]);
        for (step, gradient) in (0..STEPS).zip(gradients.chunks(start.len())) {
            let schedule = 1.0 - 0.5 * step as f64 / STEPS as f64;
            let at = StepInfo { step, total_steps: STEPS, learning_rate: 2e-3 * schedule, schedule, weight_decay: 0.1 };
            rule.step(&at, &shape, &mut weight, gradient, &mut state).unwrap();
            if step == 0 || step + 1 == STEPS {
                let (_, expected) = EXPECTED.tensor(&format!("{case}.{problem}.{}", step + 1));
                let way = norm(&difference(&expected, &start));
                let error = norm(&difference(&weight, &expected));
                println!("{case} {problem} after {} steps: {:.1e} of the way", step + 1, error / way);
                // The way may be so short that the weights' own rounding is a part of it.
                assert!(error < tolerance * way + 1e-7 * norm(&expected), "{case} {problem} after {} steps", step + 1);
            }
        }
    }
}

#[test]
fn adamw_is_torch() {
    follow("adamw", &Adamw::default(), 1e-5);
}

#[test]
fn muon_is_torch_with_float32_newton_schulz() {
    follow("muon", &Muon::default(), 1e-5);
}

#[test]
fn muon_with_torchs_other_settings() {
    let original = Spectral { scale: Scale::Original, ..Spectral::default() };
    follow("muon-original", &Muon { spectral: original, ..Muon::default() }, 1e-5);
    let plain = Momentum { nesterov: false, ..Momentum::default() };
    follow("muon-plain-momentum", &Muon { momentum: plain, ..Muon::default() }, 1e-5);
}

#[test]
fn muon_is_near_stock_torch_in_bfloat16() {
    let (shape, gradient) = STOCK_BF16.tensor("gradient");
    let (_, expected) = STOCK_BF16.tensor("stepped");
    let (mut weight, mut state) = (vec![0.0; gradient.len()], vec![0.0; gradient.len()]);
    let at = StepInfo { weight_decay: 0.1, ..super::testing::at(0, 2e-3) };
    Muon::default().step(&at, &shape, &mut weight, &gradient, &mut state).unwrap();
    let error = relative_error(&weight, &expected);
    assert!(error < 0.02, "{error}");
}

#[test]
fn lion_is_its_paper() {
    follow("lion", &Lion::default(), 1e-5);
}

#[test]
fn lion_muon_is_its_paper() {
    follow("lion-muon", &LionMuon::default(), 1e-5);
}

#[test]
fn nor_muon_is_its_paper() {
    follow("nor-muon", &NorMuon::default(), 1e-5);
}

#[test]
fn distance_aware_muon_is_its_reconstruction() {
    follow("distance-aware-muon", &DistanceAwareMuon::default(), 1e-5);
}
