use super::*;
use crate::data::builtin;
use crate::export::Target;
use crate::infer::testing::{Artifact, dense, ids, ternary, training_logits, weights};

fn documents(vocab: usize) -> Vec<Document> {
    let document = |count: usize, seed| Document { ids: ids(count, vocab, seed), scored: None, predicted_bytes: count, is_cut: false };
    vec![document(100, 1), document(3, 2)]
}

fn options() -> Options {
    Options { worst: 4, ..Options::default() }
}

#[test]
fn a_model_agrees_with_itself() {
    let spec = ternary();
    let masters = weights(&spec, 1);
    let (artifact, reference) = (Artifact::checkpoint(&spec, &masters).engine(), Artifact::checkpoint(&spec, &masters).engine());
    let report = compare(&artifact, &reference, &documents(spec.vocab), &options(), |_| {}).unwrap();
    assert_eq!((report.kl_mean, report.kl_max, report.top1_agreement, report.verdict), (0.0, 0.0, 1.0, Verdict::Pass));
    assert_eq!(report.reference_nll_per_token, report.evaluation.nll_per_token);
    assert_eq!((report.evaluation.tokens, report.worst_tokens.len()), (101, 4));
    assert!(report.artifact_bytes as usize > artifact.size().weight_bytes);
    assert!(report.speed.decode_tokens_per_second > 0.0 && report.speed.prompt_tokens_per_second > 0.0);
}

#[test]
fn figures_match_the_logits_of_both() {
    let spec = dense();
    let masters = weights(&spec, 2);
    let exported = Artifact::exported(&spec, &masters, Target::GgufQ8_0);
    let (stored_spec, stored) = exported.imported(&masters);
    let documents = documents(spec.vocab);
    let report = compare(&exported.engine(), &Artifact::checkpoint(&spec, &masters).engine(), &documents, &options(), |_| {}).unwrap();
    let (mut kl, mut agreed, mut worst) = (0.0, 0.0, 0.0);
    for document in &documents {
        let [before, after] =
            [(&spec, &masters), (&stored_spec, &stored)].map(|(spec, weights)| training_logits(spec, weights, &document.ids));
        for (before, after) in before.chunks(spec.vocab).zip(after.chunks(spec.vocab)).take(document.predicted()) {
            let [p, q] = [before, after].map(|row| {
                let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
                row.iter().map(|z| f64::from(*z).exp() / sum).collect::<Vec<_>>()
            });
            let here: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            kl += here;
            worst = f64::max(worst, here);
            agreed += f64::from(u8::from(argmax(before) == argmax(after)));
        }
    }
    assert!(kl > 0.0 && (report.kl_mean * 101.0 - kl).abs() < 1e-4 * kl + 1e-6, "{} {kl}", report.kl_mean * 101.0);
    assert!((report.top1_agreement * 101.0 - agreed).abs() < 1e-9);
    assert!((report.worst_tokens[0].kl - worst).abs() < 1e-4 * worst && report.worst_tokens[0].kl == report.kl_max);
    assert!(report.worst_tokens.windows(2).all(|pair| pair[0].kl >= pair[1].kl));
    assert_eq!(report.format, "q8_0");
    assert!((8.5..9.0).contains(&report.bits_per_weight), "{}", report.bits_per_weight);
}

#[test]
fn what_is_not_scored_changes_no_figure() {
    let spec = dense();
    let masters = weights(&spec, 2);
    let exported = Artifact::exported(&spec, &masters, Target::GgufQ8_0);
    let (artifact, reference) = (exported.engine(), Artifact::checkpoint(&spec, &masters).engine());
    let all = documents(spec.vocab);
    // The first ninety predictions of the first document, and those by themselves.
    let short = vec![Document { ids: all[0].ids[..91].to_vec(), ..all[0].clone() }];
    let masked = vec![Document { scored: Some((0..99).map(|at| at < 90).collect()), ..all[0].clone() }];
    let [whole, part] = [short, masked].map(|documents| compare(&artifact, &reference, &documents, &options(), |_| {}).unwrap());
    assert_eq!((whole.evaluation.tokens, part.evaluation.tokens), (90, 90));
    assert_eq!((whole.evaluation.nll_per_token, whole.kl_mean, whole.kl_max), (part.evaluation.nll_per_token, part.kl_mean, part.kl_max));
    assert_eq!((whole.top1_agreement, whole.worst_tokens), (part.top1_agreement, part.worst_tokens));
}

#[test]
fn limits_decide_and_say_what_fell_short() {
    let spec = dense();
    let (artifact, reference) =
        (Artifact::checkpoint(&spec, &weights(&spec, 3)).engine(), Artifact::checkpoint(&spec, &weights(&spec, 4)).engine());
    let report = compare(&artifact, &reference, &documents(spec.vocab), &options(), |_| {}).unwrap();
    assert_eq!(report.verdict, Verdict::Fail);
    assert!(
        report.failures.iter().any(|failure| failure.contains("divergence"))
            && report.failures.iter().any(|failure| failure.contains("likeliest"))
    );
    let lenient = Limits { nll_gap: 100.0, kl_mean: 100.0, top1_agreement: 0.0, skill_loss: 1.0 };
    let report = compare(&artifact, &reference, &documents(spec.vocab), &Options { limits: Some(lenient), ..options() }, |_| {}).unwrap();
    assert_eq!(report.verdict, Verdict::Pass);
    let json = serde_json::to_value(&report).unwrap();
    for key in [
        "reference_nll_per_token",
        "nll_per_token",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "kl_mean",
        "top1_agreement",
        "bits_per_weight",
    ] {
        assert!(json[key].is_number(), "{key}");
    }
    assert_eq!(json["verdict"], "pass");
}

#[test]
fn skills_are_put_to_both() {
    let spec = dense();
    let engine = Artifact::checkpoint(&spec, &weights(&spec, 5)).engine();
    let probes = builtin::skill_probes(&builtin::Config::default(), 1, 2);
    let options = Options { probes, ..options() };
    let report = compare(&engine, &engine, &documents(spec.vocab), &options, |_| {}).unwrap();
    assert_eq!(report.skills.len(), 3);
    assert!(report.skills.iter().all(|pair| pair.probes == 2 && pair.reference == pair.artifact));
    assert_eq!(report.recall, report.reference_recall);
}

#[test]
fn other_vocabularies_are_refused() {
    let engine = |vocab| {
        let spec = crate::model::Spec { vocab, ..dense() };
        Artifact::checkpoint(&spec, &weights(&spec, 6)).engine()
    };
    assert!(compare(&engine(300), &engine(301), &documents(300), &options(), |_| {}).unwrap_err().to_string().contains("301"));
}
