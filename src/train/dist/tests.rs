use super::testing::as_ranks;
use super::*;
use crate::data::Batch;
use crate::model::{Config, Decoder, Face, GradientBuffers, Parameters, init::initialize};
use crate::ops::host::host;
use crate::optim::{self, Optimizer, RuleName};
use crate::train::step::{self, Pass};

const ROWS: usize = 4;
const CONTEXT: usize = 24;

fn decoder() -> Decoder {
    let config = Config { face: Face::Dense, dim: 32, layers: 2, heads: 2, context: CONTEXT, ..Config::default() };
    Decoder::new(config.resolve(64).unwrap(), false)
}

/// Rows `rows` of micro-batch `number`. Weights differ, so that a mean of means would be wrong.
fn batch(number: usize, rows: std::ops::Range<usize>) -> Arc<Batch> {
    let mut batch = Batch::padding(rows.len(), CONTEXT);
    for (at, global) in (rows.start * CONTEXT..rows.end * CONTEXT).enumerate() {
        let token = (number * ROWS * CONTEXT + global) * 7919 % 61;
        batch.inputs[at] = token as u32;
        batch.targets[at] = (token * 5 % 64) as u32;
        batch.weights[at] = if global % (3 + global / CONTEXT) == 0 { 0.0 } else { 1.0 };
        batch.positions[at] = (at % CONTEXT) as u32;
    }
    Arc::new(batch)
}

fn batches(step: usize, ranks: &Ranks) -> Vec<Arc<Batch>> {
    let rows = ROWS / ranks.size();
    (0..2).map(|micro| batch(step * 2 + micro, ranks.rank() * rows..(ranks.rank() + 1) * rows)).collect()
}

fn config(rule: RuleName) -> optim::Config {
    optim::Config { rule, ..optim::Config::default() }
}

/// The first step's gradients, the losses, the weights in the end and the whole state.
type Trained = (Vec<f32>, Vec<f64>, Vec<f32>, Vec<(String, Vec<f32>)>);

fn train(ranks: &Ranks, rule: RuleName, steps: usize) -> Trained {
    let decoder = decoder();
    let parameters: Parameters = initialize(decoder.spec(), 1, &Device::Cpu).unwrap();
    let infos = step::parameter_infos(&parameters, 2, 2);
    let mut optimizer = Optimizer::for_rank(&config(rule), &infos, 200, ranks.rank(), ranks.size()).unwrap();
    let buckets = Buckets::new(&parameters);
    let mut gradients = GradientBuffers::new(&parameters).unwrap();
    let (mut first, mut losses) = (vec![], vec![]);
    for number in 0..steps {
        let pass = Pass { decoder: &decoder, parameters: &parameters, z_loss: 1e-4, reference: false, ranks, buckets: &buckets };
        let learned = pass.run(&batches(number, ranks), ranks.rank() == 1 && number == 2, &mut gradients).unwrap();
        assert_eq!(learned.stop, ranks.size() > 1 && number == 2);
        if number == 0 {
            first = host(gradients.flat()).unwrap().to_vec();
        }
        losses.push(learned.loss);
        let report = step::update_on(ranks, &mut optimizer, number as u64, &parameters, &gradients, true).unwrap();
        assert!(report.movements.iter().all(|movement| movement.ratio() > 0.0));
    }
    let state = optimizer
        .whole_state(|owner, mut values| {
            ranks.broadcast("state", owner, &mut values)?;
            Ok(values)
        })
        .unwrap();
    let weights = host(parameters.flat()).unwrap().to_vec();
    (first, losses, weights, state)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut b.iter().map(|&b| f64::from(b)))
}

#[test]
fn any_number_of_ranks_trains_the_same_model() {
    for (rule, steps, tolerance) in [(RuleName::Muon, 20, 1e-4), (RuleName::Adamw, 20, 1e-4), (RuleName::Lion, 5, 1e-4)] {
        let (gradients, losses, weights, state) = train(&Ranks::alone(), rule, steps);
        for size in [2, 4] {
            let all = as_ranks(size, |ranks| train(&ranks, rule, steps));
            for one in &all {
                assert!(distance(&one.0, &gradients) < 1e-6, "{rule:?} over {size}: gradients differ by {}", distance(&one.0, &gradients));
                let worst = one.1.iter().zip(&losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst < tolerance, "{rule:?} over {size}: losses differ by {worst}");
                assert_eq!((&one.2, &one.1, &one.3), (&all[0].2, &all[0].1, &all[0].3), "ranks differ among themselves");
            }
            // The first steps of AdamW and all of Lion's are signs, which a last bit can turn; losses hardly notice.
            assert!(distance(&all[0].2, &weights) < 0.02, "{rule:?} over {size}: weights differ by {}", distance(&all[0].2, &weights));
            assert!(all[0].3.iter().zip(&state).all(|(a, b)| a.0 == b.0 && a.1.len() == b.1.len()));
        }
    }
}

#[test]
fn buckets_cover_the_buffer_once() {
    let parameters: Parameters = initialize(decoder().spec(), 1, &Device::Cpu).unwrap();
    let results = as_ranks(2, |ranks| {
        let mut gradients = GradientBuffers::new(&parameters).unwrap();
        // Nothing is finished by a tape: `finish` sends zeros for all.
        buckets::Reducing::new(&ranks, &Buckets::new(&parameters), &mut gradients).finish().unwrap();
        host(gradients.flat()).unwrap().iter().all(|&x| x == 0.0)
    });
    assert_eq!(results, [true, true]);
}

#[test]
fn one_process_needs_no_engine() {
    let ranks = Ranks::alone();
    let mut numbers = [3.0];
    ranks.sum("x", &mut numbers).unwrap();
    assert_eq!((numbers[0], ranks.rank(), ranks.size(), ranks.is_first(), ranks.is_alone()), (3.0, 0, 1, true, true));
    assert!(Ranks::join(World::ALONE, &Device::Cpu).unwrap().is_alone());
}

#[cfg(not(feature = "mpi"))]
#[test]
fn an_engine_that_is_not_built_in_is_named() {
    let world = World { rank: 1, size: 2, local_rank: 1, local_size: 2 };
    let error = Ranks::join(world, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("without MPI") && error.hint().unwrap().contains("--features mpi"));
}
