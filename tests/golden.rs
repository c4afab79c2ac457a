//! Losses of tiny runs, to the last bit: a change of arithmetic, data order or initialization cannot pass unnoticed.
//!
//! `OSPREY_UPDATE_GOLDEN=1 cargo test --release golden` writes the files anew after a change that is meant.

use crate::support::{Ran, Sandbox, TERNARY};
use osprey::ops::cpu::isa::isa;
use std::path::Path;

#[test]
fn dense_with_muon() {
    check("dense", &[]);
}

#[test]
fn outlier_safe_with_adamw() {
    check("osp", &["model.face=osp", "optim.rule=adamw"]);
}

#[test]
fn ternary_with_muon() {
    check("ternary", &TERNARY);
}

/// The first line is the instruction path, the others are losses as the metrics print them.
fn check(name: &str, overrides: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    let found = losses(overrides, &isa().to_string());
    if std::env::var_os("OSPREY_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, format!("{}\n{}\n", isa(), found.join("\n"))).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap();
    let (written_on, expected) = stored.split_once('\n').unwrap();
    let expected: Vec<&str> = expected.lines().collect();
    if written_on == isa().to_string() {
        assert_eq!(found, expected, "{name}");
    } else {
        assert_close(name, &found, &expected);
    }
    assert_close(name, &losses(overrides, "portable"), &expected);
}

fn losses(overrides: &[&str], path: &str) -> Vec<String> {
    let sandbox = Sandbox::new();
    let mut arguments = vec!["train", "tiny.toml"];
    overrides.iter().for_each(|one| arguments.extend(["--set", *one]));
    let mut command = sandbox.command(&arguments);
    command.env("OSPREY_ISA", path);
    Ran::of(command).done();
    // The text of the number: reading it could round.
    let text = sandbox.text("run/metrics.jsonl");
    let values = text.lines().filter_map(|line| line.split_once("\"loss\":")?.1.split([',', '}']).next());
    values.map(str::to_owned).collect()
}

fn assert_close(name: &str, found: &[String], expected: &[&str]) {
    assert_eq!(found.len(), expected.len());
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        let [one, other] = [found.as_str(), expected].map(|text| text.parse::<f64>().unwrap());
        assert!((one - other).abs() <= 1e-5 * other, "{name}, step {}: {one} where {other} was", step + 1);
    }
}
