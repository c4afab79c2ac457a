//! A conversation that waits for an answer, as a chat-tuned model is asked: through the template that its tokenizer carries.

use super::files::{self, Record};
use super::mask::Renderer;
use super::python::Date;
use super::records::{Conversation, Fault, Message, Records};
use super::template::{Template, Text};
use super::{Train, stops};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Turns that end where the assistant is to speak.
#[derive(Debug, Clone)]
pub struct Open {
    conversation: Conversation,
    /// What an error about them names.
    place: String,
}

/// What a model reads before it answers, and where the answer ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
    /// The token that the template puts after an answer, and those of the tokenizer.
    pub stops: Vec<u32>,
}

impl Open {
    /// One turn of a user.
    ///
    /// # Errors
    /// When it says nothing.
    pub fn user(text: &str) -> Result<Self> {
        let place = "--chat".to_owned();
        let message = Message::user(text).map_err(|fault| at(&place, fault))?;
        Self { conversation: Conversation { messages: vec![message], tools: serde_json::Value::Null }, place }.checked()
    }

    /// A file that holds one conversation: a list of messages (`role`, `content`), or a record with `messages` or `conversations`, which
    /// ends with a turn of the user or of a tool.
    ///
    /// # Errors
    /// When the file holds something else; names the line of the record.
    pub fn file(path: &Path) -> Result<Self> {
        let mut records: Vec<(usize, Record)> = Vec::new();
        files::visit(path, &mut |line, record| {
            records.push((line, record));
            Ok(())
        })?;
        let Some((line, first)) = records.first() else {
            return Err(Error::file(path, "holds no messages").fix("give a JSON list of objects with role and content"));
        };
        let place = format!("{}:{line}", path.display());
        let wrong = |fault| at(&place, fault);
        let conversation = if first.contains_key("role") {
            let list = records.iter().map(|(_, record)| record.clone().into()).collect();
            Conversation { messages: Records::messages_of(list).map_err(wrong)?, tools: serde_json::Value::Null }
        } else if records.len() > 1 {
            let cause = format!("holds {} records, and one conversation can be answered", records.len());
            return Err(Error::file(path, cause).fix("give a file with one of them"));
        } else {
            Records::detect(first).and_then(|layout| layout.turns(first)).map_err(wrong)?
        };
        Self { conversation, place }.checked()
    }

    fn checked(self) -> Result<Self> {
        self.conversation.check_open().map_err(|fault| at(&self.place, fault))?;
        Ok(self)
    }

    /// The conversation as `tokenizer`'s template spells it, up to where the answer begins. A template that asks for the date is told today's.
    ///
    /// # Errors
    /// When there is no template, it cannot be compiled, or it refuses the conversation.
    pub fn prompt(&self, tokenizer: &Tokenizer) -> Result<Prompt> {
        let template = template(tokenizer)?;
        let values: Vec<serde_json::Value> = self.conversation.messages.iter().map(Message::value).collect();
        let failed = |what: String| {
            Error::input(&self.place, format!("{} fails: {what}", template.name())).fix("give turns that the model's template takes")
        };
        let text = template.render(&values, &self.conversation.tools, true).map_err(failed)?;
        let ids = tokenizer.encode(&text)?;
        if ids.is_empty() {
            return Err(failed("it prints nothing".to_owned()));
        }
        let mut stops: Vec<u32> = tokenizer.ends().collect();
        stops.extend(answer_end(tokenizer, &template, &self.conversation).filter(|end| !stops.contains(end)));
        Ok(Prompt { text, ids, stops })
    }
}

/// The token that ends an answer in the template of `tokenizer`: what generation has to stop at. Nothing without a template, and where
/// the template ends answers with text alone.
pub fn end_of_turn(tokenizer: &Tokenizer) -> Option<u32> {
    let question = Open::user("a").expect("a turn that says something");
    answer_end(tokenizer, &template(tokenizer).ok()?, &question.conversation)
}

fn answer_end(tokenizer: &Tokenizer, template: &Template, conversation: &Conversation) -> Option<u32> {
    let mut whole = conversation.clone();
    whole.messages.push(Message::assistant("a").ok()?);
    let rendered = Renderer::new(template, stops(tokenizer, template), Train::LastAnswer).render(&whole).ok()?;
    tokenizer.id(rendered.spans.last()?.stop.as_deref()?)
}

fn template(tokenizer: &Tokenizer) -> Result<Template> {
    let text = tokenizer.chat_template().ok_or_else(|| {
        Error::input("--chat", "the model has no chat template").fix("put chat_template.jinja beside its tokenizer.json, or use --prompt")
    })?;
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
    let text = Text { name: "the model's chat template".to_owned(), text: text.to_owned() };
    Template::new(&text, tokenizer.named_specials(), Some(Date::of_day(days)))
}

fn at(place: &str, fault: Fault) -> Error {
    Error::input(place, fault.cause).fix(fault.fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = include_str!("templates/plain.jinja");
    const CHATML: &str = include_str!("templates/chatml.jinja");

    fn file(content: &str) -> Result<Open> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns.json");
        std::fs::write(&path, content).unwrap();
        Open::file(&path)
    }

    #[test]
    fn a_question_is_spelled_as_training_spelled_it() {
        let tokenizer = Tokenizer::byte().with_chat_template(PLAIN);
        let prompt = Open::user("Hi").unwrap().prompt(&tokenizer).unwrap();
        assert_eq!(prompt.text, "<|endoftext|>User: Hi\nAssistant: ");
        assert_eq!((prompt.ids[0], prompt.ids.len(), prompt.stops.as_slice()), (256, 21, &[256][..]));
        assert_eq!(end_of_turn(&tokenizer), Some(256));
        let error = Open::user("Hi").unwrap().prompt(&Tokenizer::byte()).unwrap_err();
        assert!(error.to_string().contains("no chat template") && error.hint().is_some());
        assert!(Open::user(" \n").unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn answers_stop_where_the_template_ends_them() {
        let mut json = Tokenizer::byte().definition().clone();
        for (id, content) in [(257, "<|im_start|>"), (258, "<|im_end|>")] {
            let token = serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
            json["added_tokens"].as_array_mut().unwrap().push(token);
        }
        let tokenizer = Tokenizer::from_json(json, &serde_json::Value::Null, &serde_json::Value::Null).unwrap();
        let tokenizer = tokenizer.with_chat_template(CHATML);
        assert_eq!(end_of_turn(&tokenizer), Some(258));
        let prompt = Open::user("Hi").unwrap().prompt(&tokenizer).unwrap();
        assert_eq!(prompt.stops, [256, 258]);
        assert_eq!(end_of_turn(&tokenizer.with_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")), None);
    }

    #[test]
    fn conversations_come_from_files_in_every_layout() {
        let tokenizer = Tokenizer::byte().with_chat_template(PLAIN);
        let text = |content: &str| file(content).unwrap().prompt(&tokenizer).unwrap().text;
        let expected = "<|endoftext|>System: Be kind\nUser: Hi\nAssistant: ";
        let turns = r#"[{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]"#;
        assert_eq!(text(turns), expected);
        assert_eq!(text(&format!("{{\"messages\": {turns}}}")), expected);
        assert_eq!(text(r#"{"system": "Be kind", "conversations": [{"from": "human", "value": "Hi"}]}"#), expected);
        for (content, cause) in [
            ("[]", "holds no messages"),
            (r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#, "ends with an assistant turn"),
            (r#"[{"role": "assistant", "content": "a"}]"#, "roles out of order"),
            (r#"[{"role": "user"}]"#, "turns.json:1: turn 1: there is no field `content`"),
            ("{\"messages\": []}\n{\"messages\": []}", "holds 2 records"),
        ] {
            let error = file(content).unwrap_err();
            assert!(error.to_string().contains(cause) && error.hint().is_some(), "{error}");
        }
    }
}
