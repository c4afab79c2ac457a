//! Imports go leftwards in the order below, which follows the data. `ops` and `tape` are one layer: operations record themselves on the
//! tape, and the tape adds gradients with the operations' kernels.

use std::fs;
use std::path::{Path, PathBuf};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");

const ORDER: [&str; 14] =
    ["error", "ops", "tape", "data", "model", "optim", "checkpoint", "quant", "export", "train", "infer", "validate", "recipe", "cli"];

#[test]
fn modules_import_leftwards_only() {
    let mut files = rust_files(Path::new(SOURCE));
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let Some(own) = top_module(&file).and_then(|name| layer(&name)) else { continue };
        for (line, name) in imports(&fs::read_to_string(&file).unwrap()) {
            if layer(&name).is_some_and(|other| other > own) {
                found.push(format!("{}:{line}: {} imports {name}", file.display(), ORDER[own]));
            }
        }
    }
    assert!(found.is_empty(), "imports to the right:\n{}", found.join("\n"));
}

#[test]
fn every_module_has_a_place() {
    let text = fs::read_to_string(Path::new(SOURCE).join("lib.rs")).unwrap();
    let mut declared: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let mut placed = ORDER;
    declared.sort_unstable();
    placed.sort_unstable();
    assert_eq!(declared, placed);
}

#[test]
fn imports_are_recognized() {
    let of = |text| imports(text).into_iter().map(|(line, name)| format!("{line} {name}")).collect::<Vec<_>>();
    assert_eq!(of("use crate::ops::host::host;"), ["1 ops"]);
    assert_eq!(of("use crate::{error::Result,\n    model::{Spec, Norm}, tape\n};"), ["1 error", "1 model", "1 tape"]);
    assert_eq!(of("fn f() {\n    crate::train::run(crate::data::open()?)\n}"), ["2 train", "2 data"]);
    assert_eq!(of("/// See [`crate::validate::Report`].\nuse crate::tape; // not crate::cli"), ["2 tape"]);
}

/// Place in the order; `tape` shares that of `ops`.
fn layer(name: &str) -> Option<usize> {
    let name = if name == "tape" { "ops" } else { name };
    ORDER.iter().position(|&module| module == name)
}

/// The top-level module a file belongs to; none for `lib.rs` and `main.rs`, which see everything.
fn top_module(file: &Path) -> Option<String> {
    let first = file.strip_prefix(SOURCE).unwrap().iter().next()?.to_str()?;
    Some(first.strip_suffix(".rs").unwrap_or(first).to_owned())
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] })
        .filter(|p| p.extension().is_some_and(|e| e == "rs"))
        .collect()
}

/// Line and name of every top-level module that code (not comments) reaches through `crate::`, one by one or in a brace group.
fn imports(text: &str) -> Vec<(usize, String)> {
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (at, found_text) in code.match_indices("crate::") {
        let (line, rest) = (1 + code[..at].matches('\n').count(), &code[at + found_text.len()..]);
        let names = rest.strip_prefix('{').map_or_else(|| vec![identifier(rest)], heads);
        found.extend(names.into_iter().map(|name| (line, name.to_owned())));
    }
    found
}

/// The first identifier of each member of a brace group that has been opened.
fn heads(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => {
                found.push(identifier(group[start..at].trim_start()));
                return found;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(identifier(group[start..at].trim_start()));
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(identifier(group[start..].trim_start()));
    found
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}
