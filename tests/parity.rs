//! The whole model against PyTorch: loss and every gradient of step 1, then 20 steps of AdamW, on packed documents.
//! `fixtures/parity/make.py` made the files and says what is in them.

use candle_core::{DType, Device, Tensor};
use osprey::model::{Decoder, GradientBuffers, Inputs, Parameters, Role, Spec};
use osprey::ops::cross_entropy::Targets;
use osprey::optim::{self, Config, Constant, Optimizer, ParameterInfo, ParameterSlice, RuleName, Schedule, Span};
use osprey::tape::Tape;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Norm of the difference over norm of each expected gradient, and relative difference of the first loss.
const FIRST_STEP: f64 = 1e-5;
/// Relative difference of every later loss and of the gradient norms.
const TRAINING: f64 = 1e-4;

#[test]
fn dense() {
    Fixture::open("dense").check();
}

#[test]
fn dense_with_normalized_queries_tied_head_and_z_loss() {
    Fixture::open("qk_norm_tied").check();
}

#[test]
fn single_scale_norm_and_embedding_projections() {
    Fixture::open("osp").check();
}

#[test]
fn ternary() {
    Fixture::open("ternary").check();
}

#[test]
fn ternary_with_sub_norms_tied_head_and_squared_relu() {
    Fixture::open("ternary_sub_norm").check();
}

#[test]
fn recomputing_blocks_changes_no_bit() {
    for name in ["dense", "ternary_sub_norm"] {
        let fixture = Fixture::open(name);
        let [kept, recomputed] = [false, true].map(|checkpointing| {
            let mut run = Run::new(&fixture, Tape::new, checkpointing);
            let loss = run.pass();
            (loss.to_bits(), floats(run.gradients.flat()).iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        });
        assert!(kept == recomputed, "{name}");
    }
}

struct Fixture {
    spec: Spec,
    metadata: HashMap<String, String>,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/parity/{name}.safetensors"));
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let spec = serde_json::from_str(&metadata["spec"]).unwrap();
        Self { spec, metadata, tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap() }
    }

    fn number(&self, key: &str) -> f64 {
        self.metadata[key].parse().unwrap()
    }

    fn doubles(&self, key: &str) -> Vec<f64> {
        self.tensors[key].to_vec1().unwrap()
    }

    fn integers(&self, key: &str) -> Vec<u32> {
        self.tensors[key].to_vec1().unwrap()
    }

    fn parameters(&self) -> Parameters {
        let named = |(key, tensor): (&String, &Tensor)| Some((key.strip_prefix("parameter/")?.to_owned(), tensor.clone()));
        Parameters::from_tensors(&self.spec, &self.tensors.iter().filter_map(named).collect(), &Device::Cpu).unwrap()
    }

    fn check(&self) {
        self.check_path("fused", Tape::new);
        self.check_path("reference", || Tape::new().reference());
    }

    fn check_path(&self, path: &str, tape: fn() -> Tape<'static>) {
        let mut run = Run::new(self, tape, false);
        let (losses, norms) = (self.doubles("losses"), self.doubles("gradient_norms"));
        let first = run.pass();
        assert!(relative(first, losses[0]) < FIRST_STEP, "{path}: loss {first} where {} is expected", losses[0]);
        self.check_gradients(path, &run);
        for (step, norm) in norms.iter().enumerate() {
            let found = run.update(step as u64);
            assert!(relative(found, *norm) < TRAINING, "{path}: gradient norm {found} where {norm} is expected at step {step}");
            let loss = run.pass();
            let expected = losses[step + 1];
            assert!(relative(loss, expected) < TRAINING, "{path}: loss {loss} where {expected} is expected after {} steps", step + 1);
        }
    }

    fn check_gradients(&self, path: &str, run: &Run) {
        for (index, parameter) in run.parameters.list().iter().enumerate() {
            let expected = floats(&self.tensors[&format!("gradient/{}", parameter.name)]);
            let found = floats(run.gradients.view(index));
            let difference = norm(expected.iter().zip(&found).map(|(a, b)| a - b));
            let error = difference / norm(expected.iter().copied());
            assert!(error < FIRST_STEP, "{path}: gradient of {} is off by {error:.1e}", parameter.name);
        }
    }
}

/// A model in training on the fixture's batch.
struct Run {
    decoder: Decoder,
    parameters: Parameters,
    gradients: GradientBuffers,
    optimizer: Optimizer,
    inputs: Inputs,
    targets: Vec<u32>,
    weights: Vec<f32>,
    z_loss: f32,
    tape: fn() -> Tape<'static>,
}

impl Run {
    fn new(fixture: &Fixture, tape: fn() -> Tape<'static>, checkpointing: bool) -> Self {
        let parameters = fixture.parameters();
        let inputs = Inputs {
            batch: fixture.number("batch") as usize,
            tokens: fixture.number("tokens") as usize,
            ids: Arc::new(fixture.integers("ids")),
            positions: Arc::new(fixture.integers("positions")),
            document_starts: Some(Arc::new(fixture.integers("document_starts"))),
        };
        Self {
            decoder: Decoder::new(fixture.spec.clone(), checkpointing),
            gradients: GradientBuffers::new(&parameters).unwrap(),
            optimizer: adamw(&parameters, fixture.number("learning_rate"), fixture.number("steps") as u64),
            parameters,
            inputs,
            targets: fixture.integers("targets"),
            weights: fixture.tensors["weights"].to_vec1().unwrap(),
            z_loss: fixture.number("z_loss") as f32,
            tape,
        }
    }

    /// Forward and backward; the mean negative log-likelihood.
    fn pass(&mut self) -> f64 {
        let scale = 1.0 / self.weights.iter().sum::<f32>();
        let targets = Targets { ids: &self.targets, weights: &self.weights, scale, z_loss: self.z_loss };
        let tape = (self.tape)();
        let loss = self.decoder.loss(&tape, &self.parameters, &self.inputs, targets).unwrap();
        self.gradients.reset();
        tape.backward(&loss.root, Tensor::new(1.0f32, &Device::Cpu).unwrap(), &mut self.gradients).unwrap();
        self.gradients.settle().unwrap();
        loss.weighted_nll * f64::from(scale)
    }

    /// One step of the optimizer; the norm of the gradients before clipping.
    fn update(&mut self, step: u64) -> f64 {
        let list = self.parameters.list();
        let mut values: Vec<_> = list.iter().enumerate().map(|(i, p)| (floats(p.value()), floats(self.gradients.view(i)))).collect();
        let pairs = list.iter().zip(&mut values);
        let mut slices: Vec<_> = pairs.map(|(p, (data, gradient))| ParameterSlice { name: &p.name, data, gradient }).collect();
        let report = self.optimizer.step(step, &mut slices).unwrap();
        for (parameter, (data, _)) in list.iter().zip(values) {
            let updated = Tensor::from_vec(data, parameter.shape.clone(), &Device::Cpu).unwrap();
            parameter.value().slice_set(&updated, 0, 0).unwrap();
        }
        report.gradient_norm
    }
}

/// `make.py`'s settings: decay on matrices but not on the embedding table.
fn adamw(parameters: &Parameters, learning_rate: f64, steps: u64) -> Optimizer {
    let role = |role| match role {
        Role::Hidden | Role::Adapter => optim::Role::HiddenMatrix,
        Role::Embedding => optim::Role::Embedding,
        Role::Head => optim::Role::Head,
        Role::Gain => optim::Role::Gain,
    };
    let list: Vec<_> = parameters.list().iter().map(|p| ParameterInfo::new(&p.name, p.shape.clone(), role(p.role))).collect();
    let config = Config {
        rule: RuleName::Adamw,
        learning_rate,
        weight_decay: 0.1,
        embedding_weight_decay: 0.0,
        clip: 1.0,
        schedule: Schedule::Constant(Constant { warmup: Span::Steps(0) }),
        adamw: optim::Adamw { beta1: 0.9, beta2: 0.95, eps: 1e-8 },
        ..Config::default()
    };
    Optimizer::new(&config, &list, steps).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

fn relative(found: f64, expected: f64) -> f64 {
    (found / expected - 1.0).abs()
}
