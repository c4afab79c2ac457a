//! `--set a.b=c`: one value put into the parsed recipe before it is typed.
//!
//! An override's spans lie after the end of the file's text, so that the span of any later error tells which flag caused it.

use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::{Error, Result};

/// The place named in errors about the flag `flag`.
pub(super) fn place(flag: &str) -> String {
    format!("--set {flag}")
}

/// Puts the value of `flag` (`a.b=c`) into `root`; everything it adds carries `span`.
///
/// # Errors
/// The flag has no `=`, its key is no dotted key, or the key runs through something that is not a table or list.
pub(super) fn apply<'i>(root: &mut DeTable<'i>, flag: &'i str, span: Range<usize>) -> Result<()> {
    let (key, value) = flag.split_once('=').ok_or_else(|| bad(flag, "has no `=`"))?;
    let path = split_key(key.trim()).ok_or_else(|| bad(flag, format!("`{}` is not a dotted key", key.trim())))?;
    let value = read_value(value.trim(), &span);
    put(root, &path, value, &span).map_err(|cause| bad(flag, cause))
}

fn bad(flag: &str, cause: impl ToString) -> Error {
    Error::input(place(flag), cause).fix("write it as `--set table.key=value`, such as `--set train.steps=200`")
}

/// The segments of a dotted key, quoted ones included; none when it is no key.
fn split_key(key: &str) -> Option<Vec<String>> {
    let document = format!("{key} = 0");
    let mut table = DeTable::parse(&document).ok()?.into_inner();
    let mut path = Vec::new();
    loop {
        let mut entries = table.into_iter();
        let (name, value) = entries.next()?;
        if entries.next().is_some() {
            return None;
        }
        path.push(name.into_inner().into_owned());
        match value.into_inner() {
            DeValue::Table(inner) => table = inner,
            DeValue::Integer(_) => return Some(path),
            _ => return None,
        }
    }
}

/// A TOML value, or the text itself: `--set run.dir=out/first` needs no quotes. Dates are text, no key holds one.
fn read_value<'i>(text: &'i str, span: &Range<usize>) -> Spanned<DeValue<'i>> {
    match DeValue::parse(text).map(Spanned::into_inner) {
        Ok(DeValue::Datetime(_)) | Err(_) => Spanned::new(span.clone(), DeValue::String(Cow::Borrowed(text))),
        Ok(value) => Spanned::new(span.clone(), respan(value, span)),
    }
}

fn respan<'i>(value: DeValue<'i>, span: &Range<usize>) -> DeValue<'i> {
    let moved = |value: Spanned<DeValue<'i>>| Spanned::new(span.clone(), respan(value.into_inner(), span));
    match value {
        DeValue::Array(items) => DeValue::Array(items.into_iter().map(moved).collect()),
        DeValue::Table(entries) => {
            DeValue::Table(entries.into_iter().map(|(key, value)| (Spanned::new(span.clone(), key.into_inner()), moved(value))).collect())
        }
        other => other,
    }
}

fn put<'i>(table: &mut DeTable<'i>, path: &[String], value: Spanned<DeValue<'i>>, span: &Range<usize>) -> Result<(), String> {
    let [first, rest @ ..] = path else { return Ok(()) };
    if rest.is_empty() {
        table.insert(Spanned::new(span.clone(), Cow::Owned(first.clone())), value);
        return Ok(());
    }
    let key = Spanned::new(span.clone(), Cow::Owned(first.clone()));
    let inner = table.entry(key).or_insert_with(|| Spanned::new(span.clone(), DeValue::Table(DeTable::new())));
    put_into(inner, first, rest, value, span)
}

/// As [`put`], into the value called `name`: a table, or a list whose element is named by its number.
fn put_into<'i>(
    target: &mut Spanned<DeValue<'i>>,
    name: &str,
    path: &[String],
    value: Spanned<DeValue<'i>>,
    span: &Range<usize>,
) -> Result<(), String> {
    match target.get_mut() {
        DeValue::Table(inner) => put(inner, path, value, span),
        DeValue::Array(items) => {
            let [index, rest @ ..] = path else { return Ok(()) };
            let count = items.len();
            let item = index.parse().ok().and_then(|index: usize| items.get_mut(index));
            let item =
                item.ok_or_else(|| format!("`{name}` is a list of {count}, `{index}` is not the number of an element (the first is 0)"))?;
            if rest.is_empty() {
                *item = value;
                return Ok(());
            }
            put_into(item, index, rest, value, span)
        }
        other => {
            Err(format!("`{name}` is a single {} in the recipe, it has no keys of its own; set all of `{name}` at once", other.type_str()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(document: &str, flags: &[&str]) -> Result<String> {
        let mut root = DeTable::parse(document).expect("valid").into_inner();
        for flag in flags {
            apply(&mut root, flag, 1000..1000 + flag.len())?;
        }
        Ok(format!("{}", toml::Table::try_from(plain(&root)).expect("a table")))
    }

    fn plain(table: &DeTable<'_>) -> toml::Table {
        table.iter().map(|(key, value)| (key.get_ref().to_string(), plain_value(value.get_ref()))).collect()
    }

    fn plain_value(value: &DeValue<'_>) -> toml::Value {
        match value {
            DeValue::Table(table) => toml::Value::Table(plain(table)),
            DeValue::Array(items) => toml::Value::Array(items.iter().map(|item| plain_value(item.get_ref())).collect()),
            DeValue::Integer(number) => toml::Value::Integer(number.as_str().parse().expect("small")),
            DeValue::Float(number) => toml::Value::Float(number.as_str().parse().expect("a float")),
            DeValue::Boolean(truth) => toml::Value::Boolean(*truth),
            other => toml::Value::String(other.as_str().expect("a string").to_owned()),
        }
    }

    #[test]
    fn values_replace_add_and_fall_back_to_text() {
        let got = set(
            "[a]\nb = 1\n",
            &["a.b=2", "a.c=out/x y", "d.e.f=[1, {g=true}]", "s=\"quoted\"", "a.\"x.y\"=1.5", "day=2020-01-01", "a.none="],
        );
        let expected: toml::Table =
            toml::from_str("s='quoted'\nday='2020-01-01'\n[a]\nb=2\nc='out/x y'\n'x.y'=1.5\nnone=''\n[d.e]\nf=[1,{g=true}]")
                .expect("valid");
        let got: toml::Table = toml::from_str(&got.expect("applies")).expect("valid");
        assert_eq!(got, expected);
    }

    #[test]
    fn list_elements_are_named_by_number() {
        let got = set("[[source]]\nweight = 1\n[[source]]\nweight = 2\n", &["source.1.weight=5", "source.0.path=p"]).expect("applies");
        let got: toml::Table = toml::from_str(&got).expect("valid");
        assert_eq!(got, toml::from_str("[[source]]\nweight=1\npath='p'\n[[source]]\nweight=5").expect("valid"));
    }

    #[test]
    fn bad_flags_are_named() {
        for (flag, cause) in [
            ("train.steps", "has no `=`"),
            ("a..b=1", "not a dotted key"),
            ("=1", "not a dotted key"),
            ("a=1\nb=2", ""),
            ("a\nb=1", "not a dotted key"),
            ("a.b.c=1", "`b` is a single integer"),
            ("l.9=1", "`l` is a list of 2"),
            ("l.x=1", "`l` is a list of 2"),
        ] {
            let result = set("l = [1, 2]\n[a]\nb = 1\n", &[flag]);
            if cause.is_empty() {
                assert!(result.is_ok(), "a value that is no TOML is text: {result:?}");
                continue;
            }
            let message = result.expect_err(flag).to_string();
            assert!(message.starts_with(&format!("--set {flag}: ")) && message.contains(cause), "{message}");
        }
    }
}
