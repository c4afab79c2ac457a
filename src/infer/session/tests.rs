use super::*;
use crate::export::Target;
use crate::infer::kv::Format;
use crate::infer::testing::{Artifact, dense, ids, ternary, training_logits, weights};
use crate::model::{Norm, Spec};
use crate::ops::cpu::isa::testing::on_every_isa;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Logits after every token, the sequence cut into calls of the given lengths.
fn in_pieces(engine: &Engine, ids: &[u32], lengths: &[usize]) -> Vec<f32> {
    let mut session = Session::new(engine, Format::F32, ids.len()).unwrap();
    let mut rest = ids;
    let mut logits = vec![];
    for length in lengths {
        let (now, later) = rest.split_at(*length);
        logits.extend(session.prefill_all(now).unwrap());
        rest = later;
    }
    assert!(rest.is_empty());
    logits
}

/// Longer than two tiles of keys.
const LENGTH: usize = 140;

#[track_caller]
fn check_bits(engine: &Engine, expected: &[f32], ids: &[u32], what: &str) {
    let spread = expected.iter().fold(0f32, |most, logit| most.max(logit.abs()));
    assert!(spread > 0.1 && spread.is_finite(), "{what}: logits of at most {spread} show nothing");
    for lengths in [vec![LENGTH], vec![63, 1, 1, 70, 5], vec![1; LENGTH]] {
        assert!(bits(&in_pieces(engine, ids, &lengths)) == bits(expected), "{what} in {} pieces", lengths.len());
    }
}

#[test]
fn an_export_has_the_bits_of_the_training_forward() {
    let osp = Spec { norm: Norm::SingleScale, embedding_projection: true, ..dense() };
    let bitnet = Spec { sub_norm: true, tied: true, ..ternary() };
    let faces = [
        (dense(), Target::Hf),
        (dense(), Target::GgufF16),
        (Spec { tied: true, ..dense() }, Target::GgufQ4_0),
        (Spec { qk_norm: true, ..dense() }, Target::GgufBf16),
        (osp.clone(), Target::GgufQ8_0),
        (ternary(), Target::GgufTq2_0),
        (Spec { norm: Norm::SingleScale, embedding_projection: true, ..ternary() }, Target::GgufTq2_0),
        (bitnet, Target::GgufTq1_0),
    ];
    for (spec, target) in faces {
        let masters = weights(&spec, 1);
        let artifact = Artifact::exported(&spec, &masters, target);
        let (stored_spec, stored) = artifact.imported(&masters);
        let ids = ids(LENGTH, spec.vocab, 2);
        let expected = training_logits(&stored_spec, &stored, &ids);
        check_bits(&artifact.engine(), &expected, &ids, target.name());
    }
}

#[test]
fn a_checkpoint_runs_as_it_was_trained() {
    let osp = Spec { norm: Norm::SingleScale, embedding_projection: true, ..ternary() };
    let relu = Spec { activation: crate::model::Activation::Relu2Glu, sub_norm: true, qk_norm: true, ..ternary() };
    for spec in [osp, relu] {
        let masters = weights(&spec, 3);
        let ids = ids(LENGTH, spec.vocab, 4);
        let expected = training_logits(&spec, &masters, &ids);
        check_bits(&Artifact::checkpoint(&spec, &masters).engine(), &expected, &ids, "checkpoint");
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let spec = ternary();
    let engine = Artifact::exported(&spec, &weights(&spec, 5), Target::GgufTq2_0).engine();
    let ids = ids(20, spec.vocab, 6);
    let runs = on_every_isa(|| bits(&in_pieces(&engine, &ids, &[18, 1, 1])));
    assert!(runs.iter().all(|(_, run)| *run == runs[0].1));
}

#[test]
fn going_back_forgets() {
    let spec = dense();
    let engine = Artifact::checkpoint(&spec, &weights(&spec, 7)).engine();
    let (first, second) = (ids(100, spec.vocab, 8), ids(30, spec.vocab, 9));
    for format in Format::all() {
        let mut session = Session::new(&engine, format, 130).unwrap();
        session.prefill(&first).unwrap();
        session.truncate(70);
        let again = session.prefill(&second).unwrap();
        let mut fresh = Session::new(&engine, format, 130).unwrap();
        fresh.prefill(&first[..70]).unwrap();
        assert_eq!(bits(&again), bits(&fresh.prefill(&second).unwrap()), "{format}");
        assert_eq!(session.len(), 100);
    }
}

#[test]
fn half_precision_cache_stays_close() {
    let spec = dense();
    let engine = Artifact::checkpoint(&spec, &weights(&spec, 10)).engine();
    let ids = ids(120, spec.vocab, 11);
    let [exact, rounded] = [Format::F32, Format::F16].map(|format| Session::new(&engine, format, 120).unwrap().prefill_all(&ids).unwrap());
    let error = exact.iter().zip(&rounded).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    let size = exact.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
    assert!(error > 0.0 && error < 1e-4 * size, "{error} {size}");
}

#[test]
fn limits_are_named_and_leave_the_sequence_alone() {
    let spec = dense();
    let engine = Artifact::checkpoint(&spec, &weights(&spec, 12)).engine();
    assert!(Session::new(&engine, Format::F32, 201).err().unwrap().to_string().contains("201"));
    let mut session = Session::new(&engine, Format::F32, 10).unwrap();
    session.prefill(&[1, 2, 3]).unwrap();
    assert!(session.prefill(&[0; 8]).unwrap_err().to_string().contains("8 tokens after 3"));
    assert!(session.prefill(&[1, 300]).unwrap_err().to_string().contains("300"));
    assert!(session.prefill(&[]).is_err());
    assert_eq!(session.len(), 3);
    session.prefill(&[0; 7]).unwrap();
    assert!(session.step(0).is_err());
}
