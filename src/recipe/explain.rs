//! serde's refusals in a user's words.

use serde::de::DeserializeOwned;
use toml::de::Error;

use super::{schema, suggest};

/// What is wrong and what to do about it.
pub(super) struct Explained {
    pub(super) cause: String,
    pub(super) fix: Option<String>,
}

/// Rewords `error`, met while reading a `T`. A message of unknown form is passed on behind its key.
pub(super) fn explain<T: DeserializeOwned>(error: &Error) -> Explained {
    let path = path_of(error);
    let message = error.message();
    if let Some(rest) = message.strip_prefix("unknown field ") {
        unknown_key::<T>(&path, rest)
    } else if let Some(rest) = message.strip_prefix("unknown variant ") {
        unknown_choice(&path, rest)
    } else if let Some(key) = message.strip_prefix("missing field ").and_then(|rest| quoted(rest).next()) {
        missing_key(&path, key)
    } else if message.starts_with("wanted exactly 1 element, more than 1") {
        two_choices(&path)
    } else if let Some((found, expected)) = message.strip_prefix("invalid ").and_then(wrong_type) {
        Explained { cause: format!("{} is {found}, expected {expected}", subject(&path)), fix: Some(format!("give {expected}")) }
    } else {
        Explained { cause: format!("{}: {message}", subject(&path)), fix: None }
    }
}

fn unknown_key<T: DeserializeOwned>(path: &str, message: &str) -> Explained {
    let mut words = quoted(message);
    let key = words.next().unwrap_or_default();
    let valid: Vec<&str> = words.collect();
    let cause = format!("unknown key `{}`", joined(path, key));
    let elsewhere = schema::keys::<T>();
    let same_name = elsewhere.iter().find(|full| full.rsplit('.').next() == Some(key)).map(String::as_str);
    let fix = match suggest::nearest(key, valid.iter().copied()).or(same_name) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None if valid.is_empty() => "no key is valid here".to_owned(),
        None => format!("valid keys here: {}", valid.join(", ")),
    };
    Explained { cause, fix: Some(fix) }
}

fn unknown_choice(path: &str, message: &str) -> Explained {
    let mut words = quoted(message);
    let choice = words.next().unwrap_or_default();
    let valid: Vec<&str> = words.collect();
    let fix = match suggest::nearest(choice, valid.iter().copied()) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("choices: {}", valid.join(", ")),
    };
    Explained { cause: format!("{} has no choice `{choice}`", subject(path)), fix: Some(fix) }
}

fn two_choices(path: &str) -> Explained {
    let key = path.rsplit('.').next().unwrap_or_default();
    let fix =
        format!("keep one of its keys; to replace the recipe's choice, write `--set '{path}={{ choice = ... }}'`, all of `{key}` at once");
    Explained { cause: format!("{} makes two choices at once", subject(path)), fix: Some(fix) }
}

fn missing_key(path: &str, key: &str) -> Explained {
    let fix = if path.is_empty() {
        format!("add a table `[{key}]`, or a line `{key} = ...` at the top")
    } else {
        format!("add `{key} = ...` under `[{path}]`")
    };
    Explained { cause: format!("the key `{}` is missing", joined(path, key)), fix: Some(fix) }
}

/// `type: string "x", expected usize` -> (`the string "x"`, `a whole number that is not negative`).
fn wrong_type(message: &str) -> Option<(String, String)> {
    let (_, rest) = message.split_once(": ")?;
    let (found, expected) = rest.rsplit_once(", expected ")?;
    Some((found_words(found), expected_words(expected)))
}

fn found_words(found: &str) -> String {
    for (prefix, name) in [("integer ", "the integer "), ("floating point ", "the number "), ("boolean ", "the boolean ")] {
        if let Some(value) = found.strip_prefix(prefix) {
            return format!("{name}{}", value.trim_matches('`'));
        }
    }
    match found {
        "map" => "a table".to_owned(),
        "sequence" => "a list".to_owned(),
        other if other.starts_with("string") => format!("the {other}"),
        other => other.to_owned(),
    }
}

fn expected_words(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number that is not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a table".to_owned(),
        other if other.starts_with("struct ") => "a table".to_owned(),
        other if other.starts_with("a tuple of size ") => format!("a list of {}", &other["a tuple of size ".len()..]),
        other => other.to_owned(),
    }
}

/// The words between backquotes.
fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn subject(path: &str) -> String {
    if path.is_empty() { "the recipe".to_owned() } else { format!("`{path}`") }
}

/// The dotted key the error happened under. The toml crate shows it only through `Display`, and only while no source text is attached.
fn path_of(error: &Error) -> String {
    let mut bare = error.clone();
    bare.set_input(None);
    let shown = bare.to_string();
    let context = shown.strip_prefix(error.message()).and_then(|rest| rest.trim().strip_prefix("in `"));
    context.and_then(|rest| rest.strip_suffix('`')).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_named_for_people() {
        let (found, expected) = wrong_type("type: floating point `1.5`, expected u32").expect("reads");
        assert_eq!((found.as_str(), expected.as_str()), ("the number 1.5", "a whole number that is not negative"));
        let (found, expected) = wrong_type("length: sequence, expected a tuple of size 2").expect("reads");
        assert_eq!((found.as_str(), expected.as_str()), ("a list", "a list of 2"));
        let (found, _) = wrong_type("type: string \"a, expected b\", expected f64").expect("reads");
        assert_eq!(found, "the string \"a, expected b\"");
    }
}
