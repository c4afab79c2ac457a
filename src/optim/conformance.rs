//! What every rule must do, run over [`RuleName::ALL`].

use super::testing::{at, norm, random, relative_error};
use super::*;

const SHAPE: [usize; 2] = [12, 20];
const COUNT: usize = 240;

fn config(rule: RuleName) -> Config {
    // Lion's steps have the size of the rate in every entry.
    let learning_rate = if rule == RuleName::Lion { 5e-3 } else { 2e-2 };
    Config { rule, learning_rate, weight_decay: 0.0, ..Config::default() }
}

/// One hidden matrix, stepped along the gradient of |W - target|^2 / 2.
struct Problem {
    optimizer: Optimizer,
    weight: Vec<f32>,
    target: Vec<f32>,
}

impl Problem {
    fn new(rule: RuleName, total_steps: u64) -> Self {
        let parameters = [ParameterInfo::new("w", SHAPE, Role::HiddenMatrix)];
        let optimizer = Optimizer::new(&config(rule), &parameters, total_steps).unwrap();
        Self { optimizer, weight: random(1, COUNT), target: random(2, COUNT) }
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) {
        for step in steps {
            let mut gradient: Vec<f32> = self.weight.iter().zip(&self.target).map(|(w, t)| w - t).collect();
            let mut slices = [ParameterSlice { name: "w", data: &mut self.weight, gradient: &mut gradient }];
            self.optimizer.step(step, &mut slices).unwrap();
        }
    }

    fn loss(&self) -> f64 {
        let gap: Vec<f32> = self.weight.iter().zip(&self.target).map(|(w, t)| w - t).collect();
        norm(&gap).powi(2) / 2.0
    }
}

#[test]
fn a_quadratic_converges() {
    for rule in RuleName::ALL {
        let mut problem = Problem::new(rule, 1500);
        let before = problem.loss();
        problem.steps(0..1500);
        assert!(problem.loss() < 1e-3 * before, "{}: {before} to {}", rule.name(), problem.loss());
    }
}

#[test]
fn a_loaded_state_continues_to_the_bit() {
    for rule in RuleName::ALL {
        for stop in [1, 6, 7] {
            let mut whole = Problem::new(rule, 20);
            whole.steps(0..20);

            let mut first = Problem::new(rule, 20);
            first.steps(0..stop);
            let saved: Vec<(String, Vec<f32>)> = first.optimizer.state_tensors().map(|(name, values)| (name, values.to_vec())).collect();
            let mut second = Problem::new(rule, 20);
            second.weight = first.weight;
            second.optimizer.load_state(saved.iter().rev().map(|(name, values)| (name.as_str(), values.as_slice()))).unwrap();
            second.steps(stop..20);
            assert_eq!(second.weight, whole.weight, "{} stopped after {stop}", rule.name());
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let with = |rule, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut problem = Problem::new(rule, 5);
        pool.install(|| problem.steps(0..5));
        problem.weight
    };
    for rule in RuleName::ALL {
        assert_eq!(with(rule, 1), with(rule, 3), "{}", rule.name());
    }
}

#[test]
fn the_state_has_the_length_its_segments_say() {
    for rule in RuleName::ALL {
        let built = rule.build(&config(rule));
        for shape in [vec![12, 20], vec![3, 4, 20], vec![1, 1]] {
            let segments = built.state_segments(&shape);
            assert_eq!(built.state_len(&shape), segments.iter().map(|(_, length)| length).sum::<usize>());
            let names: std::collections::BTreeSet<&str> = segments.iter().map(|(name, _)| *name).collect();
            assert_eq!(names.len(), segments.len());
        }
    }
}

#[test]
fn without_gradient_weights_only_decay() {
    for rule in RuleName::ALL {
        let built = rule.build(&config(rule));
        let (start, mut state) = (random(1, COUNT), vec![0.0; built.state_len(&SHAPE)]);
        for decay in [0.0, 0.1] {
            let mut weight = start.clone();
            let at = StepInfo { weight_decay: decay, ..at(0, 1e-2) };
            built.step(&at, &SHAPE, &mut weight, &[0.0; COUNT], &mut state).unwrap();
            let shrunk = f64::from(weight[0]) / f64::from(start[0]);
            let uniform: Vec<f32> = start.iter().map(|w| (shrunk * f64::from(*w)) as f32).collect();
            assert!(relative_error(&weight, &uniform) < 1e-6, "{}", rule.name());
            assert!(if decay == 0.0 { weight == start } else { shrunk < 1.0 && shrunk > 0.99 }, "{} {shrunk}", rule.name());
        }
    }
}

#[test]
fn steps_go_downhill() {
    for rule in RuleName::ALL {
        let built = rule.build(&config(rule));
        let gradient = random(7, COUNT);
        let (mut weight, mut state) = (vec![0.0; COUNT], vec![0.0; built.state_len(&SHAPE)]);
        for step in 0..4 {
            built.step(&at(step, 1e-3), &SHAPE, &mut weight, &gradient, &mut state).unwrap();
            let along: f64 = weight.iter().zip(&gradient).map(|(w, g)| f64::from(w * g)).sum();
            assert!(along < 0.0, "{}", rule.name());
        }
    }
}

#[test]
fn blocks_step_as_separate_parameters_do() {
    for rule in RuleName::ALL {
        let built = rule.build(&config(rule));
        let mut together = random(1, COUNT);
        let mut apart = together.clone();
        let mut state = vec![0.0; built.state_len(&[3, 4, 20])];
        let mut states = vec![vec![0.0; built.state_len(&[4, 20])]; 3];
        for step in 0..4 {
            let gradient = random(30 + step, COUNT);
            let at = StepInfo { weight_decay: 0.1, ..at(step, 1e-2) };
            built.step(&at, &[3, 4, 20], &mut together, &gradient, &mut state).unwrap();
            for ((weight, gradient), state) in apart.chunks_mut(80).zip(gradient.chunks(80)).zip(&mut states) {
                built.step(&at, &[4, 20], weight, gradient, state).unwrap();
            }
        }
        assert_eq!(together, apart, "{}", rule.name());
    }
}
