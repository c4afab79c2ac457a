//! Questions with the answers a model may give, from files of several layouts, told by their fields:
//!
//! | fields | scored |
//! | --- | --- |
//! | `query`, `choices`, `gold` | each choice after the query |
//! | `question`, `choices`, `answer` (place, letter or text); or `choices.text`, `choices.label`, `answerKey` | each choice after the question |
//! | `ctx`, `endings`, `label` | each ending after the context |
//! | `context_options`, `continuation`, `gold` | the continuation after each context |
//! | `context`, `continuation` | whether the continuation is what the model would say |
//!
//! A `.txt` file has six lines for each question: the context, the place of the right ending, four endings. A question that begins with
//! `Question:` is followed by a line `Answer:`, as lm-evaluation-harness puts it for ARC and PIQA; otherwise a blank joins the two.

use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// One thing a model may say, and after what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub context: String,
    pub continuation: String,
    /// Characters of the choice as the file spells it: what its log-likelihood is divided by.
    pub length: usize,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub choices: Vec<Choice>,
    /// The place of the right choice. With a single choice the model is right when it would say it.
    pub gold: usize,
    /// Where it is in its file.
    pub line: usize,
}

/// Reads the first `most` questions of `path`.
///
/// # Errors
/// When the file cannot be read or a record lacks a field; the message names the line.
pub fn read(path: &Path, most: usize) -> Result<Vec<Question>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8").fix("convert the file to UTF-8"))?;
    let is_lines_of_six = path.extension().is_some_and(|ending| ending == "txt");
    let questions = if is_lines_of_six { lines_of_six(path, &text, most)? } else { records(path, &text, most)? };
    if questions.is_empty() {
        return Err(Error::file(path, "holds no questions").fix("give a JSONL file with one question per line"));
    }
    Ok(questions)
}

fn records(path: &Path, text: &str, most: usize) -> Result<Vec<Question>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(most);
    let question = |(at, line): (usize, &str)| {
        let wrong = |cause: String| {
            Error::input(format!("{}:{}", path.display(), at + 1), cause)
                .fix("give query, choices and gold, or another of the layouts in the documentation")
        };
        let value: Value = serde_json::from_str(line).map_err(|error| wrong(format!("not JSON: {error}")))?;
        question(&value, at + 1).map_err(wrong)
    };
    lines.map(question).collect()
}

fn lines_of_six(path: &Path, text: &str, most: usize) -> Result<Vec<Question>> {
    let lines: Vec<&str> = text.lines().collect();
    let question = |(at, six): (usize, &[&str])| {
        let line = 6 * at + 1;
        let wrong = |cause: &str| {
            Error::input(format!("{}:{line}", path.display()), cause)
                .fix("six lines make a question: context, place of the right ending, four endings")
        };
        let [context, gold, endings @ ..] = six else { return Err(wrong("a question is not whole")) };
        if endings.len() != 4 {
            return Err(wrong("a question is not whole"));
        }
        let gold = gold.trim().parse().ok().filter(|&gold: &usize| gold < endings.len());
        let choices = endings.iter().map(|ending| after(context, ending)).collect();
        Ok(Question { choices, gold: gold.ok_or_else(|| wrong("the second line is not the place of an ending"))?, line })
    };
    lines.chunks(6).enumerate().take(most).map(question).collect()
}

/// `choice` after `context`, joined as the harness joins them.
fn after(context: &str, choice: &str) -> Choice {
    let context = context.trim_end();
    let context = match context.starts_with("Question:") && !context.ends_with("Answer:") {
        true => format!("{context}\nAnswer:"),
        false => context.to_owned(),
    };
    Choice { context, continuation: format!(" {}", choice.trim_start()), length: choice.chars().count() }
}

fn question(value: &Value, line: usize) -> Result<Question, String> {
    let has = |field: &str| value.get(field).is_some();
    if has("context_options") {
        let continuation = text(value, "continuation")?;
        let choices: Vec<Choice> = texts(value, "context_options")?.iter().map(|context| after(context, continuation)).collect();
        return Ok(Question { gold: place(value, "gold", &choices)?, choices, line });
    }
    if has("continuation") {
        let (context, continuation) = (text(value, "context")?, text(value, "continuation")?);
        return Ok(Question { choices: vec![after(context, continuation)], gold: 0, line });
    }
    let (context, listed, answer) = if has("query") {
        ("query", "choices", "gold")
    } else if has("endings") {
        ("ctx", "endings", "label")
    } else {
        ("question", "choices", if has("answerKey") { "answerKey" } else { "answer" })
    };
    let context = text(value, context)?;
    let labels = value[listed].get("label").and_then(Value::as_array);
    let texts = if labels.is_some() { texts(&value[listed], "text")? } else { texts(value, listed)? };
    let choices: Vec<Choice> = texts.iter().map(|choice| after(context, choice)).collect();
    let labelled = labels.and_then(|labels| labels.iter().position(|label| label == &value[answer]));
    let spelled = value[answer].as_str().and_then(|answer| texts.iter().position(|text| text.trim() == answer.trim()));
    let gold = match labelled.filter(|&at| at < choices.len()).or(spelled) {
        Some(gold) => gold,
        None => place(value, answer, &choices)?,
    };
    Ok(Question { choices, gold, line })
}

fn text<'v>(value: &'v Value, field: &str) -> Result<&'v str, String> {
    match value.get(field) {
        None => Err(format!("there is no field `{field}`")),
        Some(found) => found.as_str().ok_or_else(|| format!("the field `{field}` is not a string")),
    }
}

fn texts<'v>(value: &'v Value, field: &str) -> Result<Vec<&'v str>, String> {
    let list = value.get(field).ok_or_else(|| format!("there is no field `{field}`"))?;
    let texts: Option<Vec<&str>> = list.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
    texts.filter(|texts| texts.len() >= 2).ok_or_else(|| format!("the field `{field}` is not a list of two or more strings"))
}

/// The place of the right choice: a number from 0, as a number or text, or a letter from A.
fn place(value: &Value, field: &str, choices: &[Choice]) -> Result<usize, String> {
    let found = value.get(field).ok_or_else(|| format!("there is no field `{field}`"))?;
    let letter = |text: &str| match text.as_bytes() {
        [letter] if letter.is_ascii_uppercase() => Some(u64::from(letter - b'A')),
        _ => text.parse().ok(),
    };
    let place = found.as_u64().or_else(|| found.as_str().map(str::trim).and_then(letter));
    let place = place.and_then(|place| usize::try_from(place).ok()).filter(|&place| place < choices.len());
    place.ok_or_else(|| format!("`{field}` is {found}, which is none of the {} choices", choices.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, content: &str) -> Result<Vec<Question>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read(&path, usize::MAX)
    }

    fn one(content: &str) -> Question {
        read_text("a.jsonl", content).unwrap().remove(0)
    }

    #[test]
    fn every_layout_is_a_question() {
        let expected = one(r#"{"query": "It is", "choices": ["red.", "blue"], "gold": 1}"#);
        assert_eq!(expected.choices[0], Choice { context: "It is".into(), continuation: " red.".into(), length: 4 });
        for content in [
            r#"{"question": "It is", "choices": ["red.", "blue"], "answer": "B"}"#,
            r#"{"question": "It is", "choices": ["red.", "blue"], "answer": "blue"}"#,
            r#"{"question": "It is ", "choices": {"text": ["red.", "blue"], "label": ["1", "2"]}, "answerKey": "2"}"#,
            r#"{"ctx": "It is", "endings": ["red.", "blue"], "label": "1"}"#,
        ] {
            assert_eq!(one(content), expected, "{content}");
        }
        let six = read_text("a.txt", "It is\n2\na\nb\nc\nd\nHe\n0\nw\nx\ny\nz\n").unwrap();
        assert_eq!((six.len(), six[0].gold, six[1].line, six[1].choices[3].continuation.as_str()), (2, 2, 7, " z"));
        let pair = one(r#"{"context_options": ["Ann", "Bob"], "continuation": "left.", "gold": 1}"#);
        assert_eq!((pair.choices[1].context.as_str(), pair.choices[1].continuation.as_str()), ("Bob", " left."));
        let single = one(r#"{"context": "1 + 1 =", "continuation": " 2"}"#);
        assert_eq!((single.choices.len(), single.choices[0].continuation.as_str()), (1, " 2"));
        let asked = one(r#"{"query": "Question: Why?\n", "choices": ["é", "b"], "gold": 0}"#);
        assert_eq!((asked.choices[0].context.as_str(), asked.choices[0].length), ("Question: Why?\nAnswer:", 1));
    }

    #[test]
    fn mistakes_name_the_line() {
        for (name, content, cause) in [
            ("a.jsonl", "", "holds no questions"),
            ("a.jsonl", "{\"query\": \"a\"}", "a.jsonl:1: there is no field `choices`"),
            ("a.jsonl", "\n{\"query\": \"a\", \"choices\": [\"b\"], \"gold\": 0}", "a.jsonl:2: the field `choices` is not a list of two"),
            ("a.jsonl", "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 2}", "`gold` is 2, which is none of the 2"),
            ("a.jsonl", "{\"text\": \"a\"}", "there is no field `question`"),
            ("a.jsonl", "{", "a.jsonl:1: not JSON"),
            ("a.txt", "a\n1\nb\n", "a.txt:1: a question is not whole"),
            ("a.txt", "a\n4\nb\nc\nd\ne\n", "a.txt:1: the second line"),
        ] {
            let error = read_text(name, content).unwrap_err();
            assert!(error.to_string().contains(cause) && error.hint().is_some(), "{error}");
        }
    }

    #[test]
    fn the_sets_of_the_corpora_are_read() {
        for (name, count) in [
            ("arc_easy.jsonl", 2376),
            ("copa.jsonl", 100),
            ("hellaswag_val.txt", 10042),
            ("lambada_openai.jsonl", 5153),
            ("openbook_qa.jsonl", 500),
            ("piqa.jsonl", 1838),
            ("simple_arithmetic_withspaces.jsonl", 1000),
            ("winogrande.jsonl", 1267),
        ] {
            let Some(path) = crate::data::testing::corpora(&format!("eval/{name}")) else { return };
            assert_eq!(read(&path, usize::MAX).unwrap().len(), count, "{name}");
        }
    }
}
