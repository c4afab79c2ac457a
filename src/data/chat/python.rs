//! What Python prints: chat templates are written for Jinja2, whose output carries Python's spelling of values, JSON and dates.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use std::fmt::Write as _;

/// `str(value)`: what `{{ value }}` writes.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => format!("[{}]", list(value, repr).join(", ")),
        ValueKind::Map => {
            let pairs: Vec<String> = pairs(value).iter().map(|(key, value)| format!("{}: {}", repr(key), repr(value))).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        _ => value.to_string(),
    }
}

fn list(value: &Value, print: impl Fn(&Value) -> String) -> Vec<String> {
    value.try_iter().map(|items| items.map(|item| print(&item)).collect()).unwrap_or_default()
}

fn pairs(value: &Value) -> Vec<(Value, Value)> {
    let keys: Vec<Value> = value.try_iter().map(Iterator::collect).unwrap_or_default();
    keys.into_iter().map(|key| (key.clone(), value.get_item(&key).unwrap_or_default())).collect()
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for letter in text.chars() {
        match letter {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            letter if letter == quote => out.extend(['\\', letter]),
            letter => out.push(letter),
        }
    }
    out.push(quote);
    out
}

/// Integers as they are; floats as `repr` prints them: the shortest digits that read back, with an exponent from 1e16 on and below 1e-4.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float_repr(float),
        _ => value.to_string(),
    }
}

fn float_repr(float: f64) -> String {
    if float.is_nan() {
        return "nan".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.into();
    }
    let size = float.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{float:?}")
}

/// The filter `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=..., separators=..., sort_keys=...)`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(String::from);
    let [item, key] = match separators {
        None => default,
        Some(given) => given.try_into().map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings"))?,
    };
    let style = Style { indent, item, key, ascii: ascii.unwrap_or(false), sort: sort.unwrap_or(false) };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

struct Style {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block(('[', ']'), items.len(), depth, out, |at, out| self.write(&items[at], depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut items = pairs(value);
                if self.sort {
                    items.sort_by(|one, two| one.0.cmp(&two.0));
                }
                self.block(('{', '}'), items.len(), depth, out, |at, out| {
                    self.string(&text(&items[at].0), out);
                    out.push_str(&self.key);
                    self.write(&items[at].1, depth + 1, out)
                })?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a value of kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn block(
        &self,
        (open, close): (char, char),
        items: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for at in 0..items {
            if at > 0 {
                out.push_str(&self.item);
            }
            self.line(depth + 1, out);
            item(at, out)?;
        }
        if items > 0 {
            self.line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let spelled = serde_json::Value::from(text).to_string();
        if !self.ascii {
            return out.push_str(&spelled);
        }
        for letter in spelled.chars() {
            if letter.is_ascii() {
                out.push(letter);
            } else {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("writing to a string cannot fail");
                }
            }
        }
    }
}

/// A day of the Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Date {
    year: u32,
    month: u32,
    day: u32,
}

const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// From `2026-07-26`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut part = |digits: usize| {
            let part = parts.next()?;
            (part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit())).then(|| part.parse::<u32>().ok()).flatten()
        };
        let date = Self { year: part(4)?, month: part(2)?, day: part(2)? };
        let valid = parts.next().is_none()
            && date.year > 0
            && (1..=12).contains(&date.month)
            && (1..=date.month_days(date.month)).contains(&date.day);
        valid.then_some(date)
    }

    /// The day that is `days` after 1970-01-01.
    pub(super) fn of_day(days: u64) -> Self {
        let mut date = Self { year: 1970, month: 1, day: 1 };
        // Whole cycles of the calendar first, so that the rest is short.
        let cycles = u32::try_from(days / 146_097).unwrap_or(0);
        let mut rest = (days % 146_097) as u32;
        date.year += 400 * cycles;
        loop {
            let year = date.month_days(2) + 337;
            if rest < year {
                break;
            }
            rest -= year;
            date.year += 1;
        }
        while rest >= date.month_days(date.month) {
            rest -= date.month_days(date.month);
            date.month += 1;
        }
        date.day += rest;
        date
    }

    fn month_days(self, month: u32) -> u32 {
        let leap = self.year.is_multiple_of(4) && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        match month {
            2 => 28 + u32::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    fn day_of_year(self) -> u32 {
        (1..self.month).map(|month| self.month_days(month)).sum::<u32>() + self.day
    }

    /// 0 is Sunday (Sakamoto's method).
    fn weekday(self) -> usize {
        const SHIFT: [u32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        ((year + year / 4 - year / 100 + year / 400 + SHIFT[self.month as usize - 1] + self.day) % 7) as usize
    }

    /// `strftime` at midnight of this day.
    pub(super) fn format(self, format: &str) -> Result<String, Error> {
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                out.push(letter);
                continue;
            }
            let (month, day) = (MONTHS[self.month as usize - 1], DAYS[self.weekday()]);
            match letters.next() {
                Some('Y') => write!(out, "{:04}", self.year),
                Some('y') => write!(out, "{:02}", self.year % 100),
                Some('m') => write!(out, "{:02}", self.month),
                Some('d') => write!(out, "{:02}", self.day),
                Some('e') => write!(out, "{:2}", self.day),
                Some('-') => match letters.next() {
                    Some('d') => write!(out, "{}", self.day),
                    Some('m') => write!(out, "{}", self.month),
                    other => return Err(unknown(format!("%-{}", other.map_or(String::new(), String::from)))),
                },
                Some('B') => write!(out, "{month}"),
                Some('b') => write!(out, "{}", &month[..3]),
                Some('A') => write!(out, "{day}"),
                Some('a') => write!(out, "{}", &day[..3]),
                Some('j') => write!(out, "{:03}", self.day_of_year()),
                Some('H' | 'M' | 'S') => write!(out, "00"),
                Some('%') => write!(out, "%"),
                other => return Err(unknown(format!("%{}", other.map_or(String::new(), String::from)))),
            }
            .expect("writing to a string cannot fail");
        }
        Ok(out)
    }
}

fn unknown(code: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {code} is not known"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str, options: &[(&str, Value)]) -> String {
        let value = Value::from_serialize(serde_json::from_str::<serde_json::Value>(text).unwrap());
        to_json(&value, options.iter().map(|(key, value)| (*key, value.clone())).collect()).unwrap()
    }

    #[test]
    fn json_is_spelled_as_python_spells_it() {
        let text = r#"{"b": [1, 2.5, 1e20, true, null], "a": "<é\n\"&>", "c": {}, "d": []}"#;
        assert_eq!(json(text, &[]), r#"{"b": [1, 2.5, 1e+20, true, null], "a": "<é\n\"&>", "c": {}, "d": []}"#);
        assert_eq!(
            json(r#"{"b": [1, {"x": 2}], "a": []}"#, &[("indent", Value::from(2))]),
            "{\n  \"b\": [\n    1,\n    {\n      \"x\": 2\n    }\n  ],\n  \"a\": []\n}"
        );
        let compact = [("separators", Value::from(vec![",", ":"])), ("sort_keys", true.into()), ("ensure_ascii", true.into())];
        assert_eq!(json(r#"{"b": "é😀", "a": 1}"#, &compact), r#"{"a":1,"b":"\u00e9\ud83d\ude00"}"#);
    }

    #[test]
    fn values_are_spelled_as_python_spells_them() {
        let value = |text: &str| Value::from_serialize(serde_json::from_str::<serde_json::Value>(text).unwrap());
        for (json, python) in [
            ("true", "True"),
            ("null", "None"),
            ("1.0", "1.0"),
            ("0.00001", "1e-05"),
            ("\"it's\"", "it's"),
            (r#"["it's", "a\nb", {"k": false}]"#, r#"["it's", 'a\nb', {'k': False}]"#),
        ] {
            assert_eq!(text(&value(json)), python);
        }
        assert_eq!(text(&Value::UNDEFINED), "");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |text: &str, format: &str| Date::parse(text).unwrap().format(format).unwrap();
        assert_eq!(date("2024-07-26", "%d %b %Y, %A %j %-d/%-m %H:%M %%"), "26 Jul 2024, Friday 208 26/7 00:00 %");
        assert_eq!(date("2000-02-29", "%a %B %y %e"), "Tue February 00 29");
        assert_eq!(date("2026-01-01", "%A %j"), "Thursday 001");
        for wrong in ["2023-02-29", "2024-13-01", "24-01-01", "2024-1-1", "2024-01-01-01", "today", ""] {
            assert!(Date::parse(wrong).is_none(), "{wrong}");
        }
        for (days, text) in [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_454, "2026-01-01"), (146_097, "2370-01-01")]
        {
            assert_eq!(Date::parse(text), Some(Date::of_day(days)));
        }
        assert!(Date::parse("2024-01-01").unwrap().format("%Q").is_err());
    }
}
