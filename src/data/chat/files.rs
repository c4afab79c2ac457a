//! Records of conversation files with the lines they begin on: one JSON object per line, or one JSON array of objects.

use crate::data::source::{decode, with_bytes};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// A record's object.
pub(super) type Record = Map<String, Value>;

/// Hands every record of the file to `visit` with the line it begins on, from 1.
pub(super) fn visit(path: &Path, visit: &mut dyn FnMut(usize, Record) -> Result<()>) -> Result<()> {
    with_bytes(path, |bytes| {
        let text = decode(path, bytes)?;
        match text.trim_start().starts_with('[') {
            true => visit_array(path, text, visit),
            false => visit_lines(path, text, visit),
        }
    })
}

/// A mistake on one line of `path`.
pub(super) fn mistake(path: &Path, line: usize, cause: impl ToString) -> Error {
    Error::input(format!("{}:{line}", path.display()), cause)
}

fn visit_lines(path: &Path, text: &str, visit: &mut dyn FnMut(usize, Record) -> Result<()>) -> Result<()> {
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str(line)
            .map_err(|error| mistake(path, at + 1, format!("not JSON: {error}")).fix("give one JSON object per line"))?;
        visit(at + 1, object(path, at + 1, value)?)?;
    }
    Ok(())
}

fn visit_array(path: &Path, text: &str, visit: &mut dyn FnMut(usize, Record) -> Result<()>) -> Result<()> {
    let mut place = Place { text, at: text.find('[').map_or(text.len(), |at| at + 1), line: 1, counted: 0 };
    let broken = |line: usize, cause: String| mistake(path, line, cause).fix("give one JSON array of objects, or one JSON object per line");
    loop {
        place.skip_blank();
        match place.rest().chars().next() {
            Some(']') => break,
            Some(_) => {}
            None => return Err(broken(place.line(), "the JSON array does not end".into())),
        }
        let line = place.line();
        let mut values = serde_json::Deserializer::from_str(place.rest()).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                let cause = error.to_string();
                let cause = cause.split(" at line ").next().unwrap_or_default().to_owned();
                return Err(broken(line + error.line().saturating_sub(1), format!("not JSON: {cause}")));
            }
            None => return Err(broken(line, "the JSON array does not end".into())),
        };
        place.at += values.byte_offset();
        visit(line, object(path, line, value)?)?;
        place.skip_blank();
        match place.rest().chars().next() {
            Some(',') => place.at += 1,
            Some(']') => break,
            _ => return Err(broken(place.line(), "a comma or the end of the JSON array is missing".into())),
        }
    }
    place.at += 1;
    place.skip_blank();
    if place.rest().is_empty() { Ok(()) } else { Err(broken(place.line(), "there is text after the JSON array".into())) }
}

fn object(path: &Path, line: usize, value: Value) -> Result<Record> {
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(mistake(path, line, "not a JSON object").fix("give one JSON object per record")),
    }
}

/// A place in a text that knows its line.
struct Place<'t> {
    text: &'t str,
    at: usize,
    line: usize,
    counted: usize,
}

impl<'t> Place<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn skip_blank(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn line(&mut self) -> usize {
        self.line += self.text[self.counted..self.at].matches('\n').count();
        self.counted = self.at;
        self.line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &str) -> Result<Vec<(usize, String)>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        std::fs::write(&path, content).unwrap();
        let mut found = Vec::new();
        visit(&path, &mut |line, record| {
            found.push((line, record["a"].to_string()));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn records_know_their_lines() {
        let expected = vec![(1, "1".to_owned()), (3, "2".to_owned())];
        assert_eq!(lines("{\"a\": 1}\n\n{\"a\": 2}\n").unwrap(), expected);
        assert_eq!(lines("[{\"a\": 1},\n\n {\"a\":\n 2}\n]\n").unwrap(), expected);
        assert!(lines("[]").unwrap().is_empty() && lines("").unwrap().is_empty());
    }

    #[test]
    fn mistakes_name_the_line() {
        for (content, cause) in [
            ("{\"a\": 1}\n{\"a\": ", "a.json:2: not JSON"),
            ("{\"a\": 1}\n3", "a.json:2: not a JSON object"),
            ("[{\"a\": 1},\n{\"a\"\n 2}]", "a.json:3: not JSON: expected `:`"),
            ("[{\"a\": 1}\n{\"a\": 2}]", "a.json:2: a comma"),
            ("[{\"a\": 1},\n", "a.json:2: the JSON array does not end"),
            ("[{\"a\": 1}]\nx", "a.json:2: there is text after"),
            ("[1]", "a.json:1: not a JSON object"),
        ] {
            let error = lines(content).unwrap_err();
            assert!(error.to_string().contains(cause) && error.hint().is_some(), "{error}");
        }
    }
}
