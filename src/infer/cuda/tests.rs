use crate::export::Target;
use crate::export::import::load_any;
use crate::infer::attention::{Attention, Quest, TopK, Window};
use crate::infer::cache::{Certificate, Counters, Options};
use crate::infer::kv::Format;
use crate::infer::testing::{Artifact, dense, ids, ternary, weights};
use crate::infer::{Engine, Session};
use crate::model::{Activation, Norm, Spec};
use crate::ops::cuda::{Emulated, Order};

/// A page and a few tokens.
const LENGTH: usize = 70;

const CODED: Format = Format::Coded("int8-int4");

/// Whole models run in one thread order; the kernels' own tests try the others.
fn device() -> Option<Emulated> {
    Some(Emulated::new()?.in_order(Order::Random))
}

fn engines(artifact: &Artifact) -> Option<(Engine, Engine)> {
    let loaded = load_any(&artifact.path).unwrap();
    let cuda = Engine::on_device(device()?, loaded.spec, &loaded.parameters, loaded.tokenizer).unwrap();
    Some((artifact.engine(), cuda))
}

fn small(face: Spec) -> Option<(Engine, Engine)> {
    engines(&Artifact::checkpoint(&face, &weights(&face, 1)))
}

fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    square(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b))) / square(&mut expected.iter().map(|b| f64::from(*b)))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What the head reads after each token, every one decoded alone.
fn stepwise(engine: &Engine, options: Options, ids: &[u32]) -> Vec<u32> {
    let mut session = Session::new(engine, options, ids.len()).unwrap();
    bits(&ids.iter().flat_map(|&id| session.hidden(&[id]).unwrap()).collect::<Vec<_>>())
}

/// Dense weights become f16, and prompts are multiplied in f16: up to 2^-11 of each product and of each attention, amplified by the random
/// weights of these models. In ternary layers such a difference moves some activations to the next of their 255 codes, each worth more than
/// the difference itself; decoding one by one, where only sums are ordered differently, hardly any.
#[test]
fn logits_are_near_those_of_the_cpu() {
    let osp = Spec { norm: Norm::SingleScale, embedding_projection: true, ..dense() };
    let bitnet = Spec { sub_norm: true, tied: true, activation: Activation::Relu2Glu, qk_norm: true, ..ternary() };
    let faces = [
        (Spec { qk_norm: true, tied: true, ..dense() }, Some(Target::GgufF16), [5e-3, 5e-4]),
        (osp, Some(Target::GgufQ8_0), [1e-2, 5e-3]),
        (Spec { head_dim: 24, ..dense() }, Some(Target::Hf), [1e-2, 5e-3]),
        (ternary(), Some(Target::GgufTq2_0), [1e-1, 1e-2]),
        // A checkpoint's embedding is f32 and is rounded.
        (bitnet, None, [1e-1, 5e-2]),
    ];
    for (spec, target, tolerances) in faces {
        let masters = weights(&spec, 1);
        let artifact = match target {
            Some(target) => Artifact::exported(&spec, &masters, target),
            None => Artifact::checkpoint(&spec, &masters),
        };
        let Some((cpu, cuda)) = engines(&artifact) else { return };
        let ids = ids(LENGTH, spec.vocab, 2);
        let [found, expected] = [&cuda, &cpu].map(|engine| whole_and_stepwise(engine, &ids));
        for ((found, expected), tolerance) in found.iter().zip(&expected).zip(tolerances) {
            let error = distance(found, expected);
            assert!(error < tolerance, "{target:?}: {error} where {tolerance} is allowed");
        }
        let last = &expected[0][expected[0].len() - 2 * spec.dim..];
        assert!(distance(&cuda.logits(last).unwrap(), &cpu.logits(last).unwrap()) < 2e-3);
    }
}

/// What the head reads after each token of a prompt; and the logits after each of its first 12, decoded one by one.
fn whole_and_stepwise(engine: &Engine, ids: &[u32]) -> [Vec<f32>; 2] {
    let whole = Session::new(engine, Format::F16, ids.len()).unwrap().hidden(ids).unwrap();
    let mut session = Session::new(engine, Format::F16, 12).unwrap();
    [whole, ids[..12].iter().flat_map(|&id| session.step(id).unwrap()).collect()]
}

/// The prefill kernel works in half precision where the decode kernel splits numbers in two.
#[test]
fn prompts_are_near_their_tokens_one_by_one() {
    let Some((_, cuda)) = small(ternary()) else { return };
    let ids = ids(LENGTH, 300, 3);
    for format in [Format::F16, Format::Coded("fp8"), CODED] {
        let whole = Session::new(&cuda, format, LENGTH).unwrap().hidden(&ids).unwrap();
        let mut session = Session::new(&cuda, format, LENGTH).unwrap();
        let (mut pieces, rest) = (session.hidden(&ids[..62]).unwrap(), &ids[62..]);
        pieces.extend(rest.iter().flat_map(|&id| session.hidden(&[id]).unwrap()));
        let error = distance(&pieces, &whole);
        assert!(error < 1e-2, "{format}: {error}");
    }
}

/// Rows of a prompt choose for themselves, as tokens that come alone do.
#[test]
fn sparse_prompts_are_near_their_tokens_one_by_one() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let ids = ids(198, 300, 13);
    let top_k = TopK { budget: "1".parse().unwrap(), first: 0, local: 0 };
    for (format, attention) in [
        (Format::F16, Attention::Window(Window { tokens: 1, sinks: 0 })),
        (Format::F16, Attention::Quest(Quest { pages: 2, dense_layers: 0 })),
        (CODED, Attention::TopK(top_k)),
    ] {
        let options = Options { format, attention, ..Options::default() };
        let run = |options| {
            let mut session = Session::new(&cuda, options, 198).unwrap();
            (session.hidden(&ids).unwrap(), session.counters())
        };
        let (whole, counters) = run(options);
        let mut session = Session::new(&cuda, options, 198).unwrap();
        let pieces: Vec<f32> = ids.iter().flat_map(|&id| session.hidden(&[id]).unwrap()).collect();
        assert!(distance(&whole, &pieces) < 2e-2, "{attention}: {}", distance(&whole, &pieces));
        assert_eq!(counters, session.counters());
        // Something is left out.
        assert!(distance(&whole, &run(format.into()).0) > 2e-2 && counters.pages_read < counters.pages_seen, "{attention}");
    }
}

/// Bounds differ a little: by parts of the list here, by pages there. Pages are promoted whole here, keys and values alone there.
#[test]
fn certificates_are_those_of_the_cpu() {
    let Some((cpu, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let ids = ids(140, 300, 14);
    let window = Attention::Window(Window { tokens: 1, sinks: 0 });
    for (attention, epsilon, certificate) in [
        (Attention::Dense, f32::INFINITY, Certificate::Metered),
        (Attention::Dense, 0.005, Certificate::Metered),
        (window, 0.2, Certificate::Metered),
    ] {
        let options = Options { format: CODED, attention, epsilon: Some(epsilon), certificate, check: true };
        let [cpu, cuda] = [&cpu, &cuda].map(|engine| {
            let mut session = Session::new(engine, options, ids.len()).unwrap();
            session.hidden(&ids).unwrap();
            session.counters()
        });
        let classes = |counters: &Counters| [counters.hard, counters.metered, counters.recovered, counters.dense];
        let steps = cpu.head_steps();
        let other: u64 = classes(&cpu).iter().zip(classes(&cuda)).map(|(a, b)| a.abs_diff(b)).sum();
        assert!(cuda.head_steps() == steps && other <= steps / 10, "{epsilon}: {:?} {:?}", classes(&cpu), classes(&cuda));
        assert_eq!((cuda.checked, cuda.violations), (steps, 0));
        assert_eq!((cuda.pages_read, cuda.pages_seen), (cpu.pages_read, cpu.pages_seen));
        assert!(cuda.meter_exceeded <= steps / 20, "{cuda:?}");
        if epsilon == f32::INFINITY {
            assert!((cuda.meter_sum / cpu.meter_sum - 1.0).abs() < 0.05, "{} {}", cuda.meter_sum, cpu.meter_sum);
        } else {
            assert!(cuda.metered > 0 && cuda.metered < steps, "{:?}", classes(&cuda));
        }
    }
}

#[test]
fn originals_of_every_page_are_the_exact_cache() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let ids = ids(134, 300, 4);
    let options = Options { format: CODED, epsilon: Some(0.0), ..Options::default() };
    assert!(stepwise(&cuda, Format::F16.into(), &ids) == stepwise(&cuda, options, &ids));
    let mut promoted = Session::new(&cuda, options, 134).unwrap();
    promoted.hidden(&ids).unwrap();
    let counters = promoted.counters();
    // 64 tokens have no page before their own.
    assert_eq!((counters.hard, counters.dense), (64 * 4, 70 * 4));
    assert_eq!(counters.pages_promoted, (64 + 6 * 2) * 2);
    let [exact, near] = [Format::F16, CODED].map(|format| Session::new(&cuda, format, 134).unwrap().hidden(&ids).unwrap());
    let error = distance(&near, &exact);
    assert!(error > 1e-5 && error < 0.2, "{error}");
}

#[test]
fn bounds_hold_and_recovery_keeps_them_within_epsilon() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let ids = ids(131, 300, 5);
    let window = Attention::Window(Window { tokens: 1, sinks: 0 });
    for (format, attention, epsilon) in [
        (CODED, Attention::Dense, 0.02),
        (Format::Coded("fp8"), Attention::Dense, 0.1),
        (Format::F16, window, 0.3),
        (CODED, Attention::TopK(TopK { budget: "1".parse().unwrap(), ..TopK::default() }), 0.3),
    ] {
        let options = Options { format, attention, epsilon: Some(epsilon), check: true, ..Options::default() };
        let mut session = Session::new(&cuda, options, 131).unwrap();
        session.hidden(&ids).unwrap();
        let counters = session.counters();
        assert_eq!(counters.head_steps(), 131 * 4, "{format} {attention}");
        assert_eq!((counters.checked, counters.violations), (131 * 4, 0), "{format} {attention}");
        assert!(counters.bound_max <= f64::from(epsilon) * 1.000_001 && counters.error_max <= counters.bound_max, "{counters:?}");
    }
}

#[test]
fn reading_every_page_is_dense_attention() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let ids = ids(134, 300, 6);
    let run = |attention| stepwise(&cuda, Options { format: CODED, attention, ..Options::default() }, &ids);
    let expected = run(Attention::Dense);
    let dense_layers = TopK::default();
    for attention in
        [Attention::Window(Window { tokens: 1000, sinks: 1 }), Attention::TopK(TopK { budget: "9".parse().unwrap(), ..dense_layers })]
    {
        assert!(run(attention) == expected, "{attention}");
    }
}

#[test]
fn going_back_forgets() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..ternary() }) else { return };
    let (first, second) = (ids(135, 300, 8), ids(10, 300, 9));
    let options = Options { format: CODED, epsilon: Some(0.01), ..Options::default() };
    let mut session = Session::new(&cuda, options, 150).unwrap();
    session.hidden(&first).unwrap();
    for length in [128, 64, 30] {
        session.truncate(length);
        let again = session.hidden(&second).unwrap();
        let mut fresh = Session::new(&cuda, options, 150).unwrap();
        fresh.hidden(&first[..length]).unwrap();
        assert!(bits(&again) == bits(&fresh.hidden(&second).unwrap()), "{length}");
        session.truncate(length);
    }
}

#[test]
fn what_the_kernels_do_not_have_is_named() {
    let Some((_, cuda)) = small(Spec { layers: 1, ..dense() }) else { return };
    let refusal = |options: Options, capacity| Session::new(&cuda, options, capacity).err().unwrap().to_string();
    assert!(refusal(Format::F32.into(), 10).contains("f32"));
    assert!(refusal(Format::Coded("oscar-2").into(), 10).contains("oscar-2"));
    assert!(refusal(Format::F16.into(), 201).contains("201"));
    let mut session = Session::new(&cuda, Format::F16, 10).unwrap();
    assert!(session.prefill(&[]).is_err());
    assert!(session.prefill(&[1, 300]).unwrap_err().to_string().contains("300"));
    assert!(session.prefill(&[0; 11]).is_err());
    assert!(session.is_empty());
    let wide = Spec { head_dim: 258, ..dense() };
    let artifact = Artifact::checkpoint(&wide, &weights(&wide, 1));
    let loaded = load_any(&artifact.path).unwrap();
    let Some(device) = device() else { return };
    assert!(Engine::on_device(device, loaded.spec, &loaded.parameters, None).err().unwrap().to_string().contains("258"));
}
