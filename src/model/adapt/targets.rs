//! Which modules a list of patterns means.

use crate::error::{Error, Result};
use crate::model::Spec;
use std::collections::{BTreeMap, BTreeSet};

/// The block matrices of `spec` that `patterns` name, by module, with their shapes `[out, in]`. `key` is the recipe's key.
///
/// # Errors
/// No pattern at all, or one that matches nothing.
pub fn targeted(spec: &Spec, patterns: &[String], key: &str) -> Result<BTreeMap<String, [usize; 2]>> {
    let modules = modules(spec);
    if patterns.is_empty() {
        return Err(Error::input(key, "names no module").fix(choices(&modules)));
    }
    let mut chosen = BTreeMap::new();
    for pattern in patterns {
        let before = modules.iter().filter(|(module, _)| matches(pattern, module));
        let found: Vec<_> = before.map(|(module, shape)| (module.clone(), *shape)).collect();
        if found.is_empty() {
            return Err(Error::input(key, format!("\"{pattern}\" matches no module")).fix(choices(&modules)));
        }
        chosen.extend(found);
    }
    Ok(chosen)
}

/// Every matrix of the blocks.
fn modules(spec: &Spec) -> BTreeMap<String, [usize; 2]> {
    let of = |(name, shape): (String, Vec<usize>)| match shape[..] {
        [out, width] if name.ends_with("_proj.weight") => Some((name.trim_end_matches(".weight").to_owned(), [out, width])),
        _ => None,
    };
    spec.parameters().into_iter().filter_map(of).collect()
}

fn choices(modules: &BTreeMap<String, [usize; 2]>) -> String {
    let last: BTreeSet<&str> = modules.keys().filter_map(|module| module.rsplit('.').next()).collect();
    format!("the modules that can be adapted are {}", last.into_iter().collect::<Vec<_>>().join(", "))
}

/// Whether `pattern` is the name, or the last parts of it.
fn matches(pattern: &str, module: &str) -> bool {
    let ends = std::iter::once(0).chain(module.match_indices('.').map(|(at, _)| at + 1));
    ends.into_iter().any(|start| glob(pattern.as_bytes(), &module.as_bytes()[start..]))
}

/// `*` stands for any run of characters.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut star) = ((0, 0), None);
    while at.1 < text.len() {
        match pattern.get(at.0) {
            Some(b'*') => {
                star = Some(at);
                at.0 += 1;
            }
            Some(letter) if *letter == text[at.1] => at = (at.0 + 1, at.1 + 1),
            _ => match star {
                // The last star takes one more character.
                Some((in_pattern, in_text)) => {
                    star = Some((in_pattern, in_text + 1));
                    at = (in_pattern + 1, in_text + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at.0..].iter().all(|&letter| letter == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let config = crate::model::Config { layers: 11, ..crate::model::Config::default() };
        config.resolve(16).unwrap()
    }

    fn count(patterns: &[&str]) -> usize {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        targeted(&spec(), &patterns, "k").map_or(0, |found| found.len())
    }

    #[test]
    fn names_end_at_parts() {
        assert_eq!(count(&["q_proj"]), 11);
        assert_eq!(count(&["_proj"]), 0);
        assert_eq!(count(&["*_proj"]), 77);
        assert_eq!(count(&["mlp.*", "q_proj", "up_proj"]), 44);
        assert_eq!(count(&["layers.1.*"]), 7);
        assert_eq!(count(&["model.layers.10.mlp.down_proj"]), 1);
        assert_eq!(count(&["layers.1*.self_attn.v_proj"]), 2);
        assert_eq!((count(&["*"]), count(&["**_pro*"])), (77, 77));
    }

    #[test]
    fn what_matches_nothing_is_an_error_that_names_the_choices() {
        let error = targeted(&spec(), &["q_proj".to_owned(), "query".to_owned()], "finetune.lora.targets").unwrap_err();
        assert_eq!(error.to_string(), "finetune.lora.targets: \"query\" matches no module");
        assert!(error.hint().unwrap().contains("down_proj, gate_proj"));
        assert!(targeted(&spec(), &[], "k").is_err());
    }
}
