//! Records to conversations. Four layouts are read, each told by its fields:
//!
//! | layout | fields |
//! | --- | --- |
//! | messages | `messages`: list of `role`, `content`, and optionally `weight`, `tool_calls`, ... |
//! | ShareGPT | `conversations`: list of `from`, `value`; optionally `system`, `tools` |
//! | Alpaca | `instruction`, `output` (or `response`); optionally `input`, `system`, `history` |
//! | prompt and completion | `prompt` and `completion` (or `response`), or `question` and `answer` |

use super::files::Record;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How records are laid out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Records {
    Messages,
    ShareGpt,
    Alpaca,
    Prompt,
    /// Prompt and completion in fields of other names.
    Fields(Fields),
}

/// Names of the fields of a prompt and its completion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fields {
    pub prompt: String,
    pub completion: String,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaker {
    System,
    User,
    Assistant,
    Tool,
}

/// One turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Message {
    pub(super) speaker: Speaker,
    pub(super) role: String,
    pub(super) content: String,
    /// Further fields that templates read: `tool_calls`, `name`, `reasoning_content`, ...
    pub(super) further: Record,
    /// How much its tokens count in the loss, where the record says so.
    pub(super) weight: Option<f32>,
}

impl Message {
    pub(super) fn user(content: &str) -> Result<Self, Fault> {
        Self::new("user", content)
    }

    pub(super) fn assistant(content: &str) -> Result<Self, Fault> {
        Self::new("assistant", content)
    }

    fn new(role: &str, content: impl Into<String>) -> Result<Self, Fault> {
        Ok(Self { speaker: speaker(role)?, role: role.into(), content: content.into(), further: Record::new(), weight: None })
    }

    pub(super) fn calls_tools(&self) -> bool {
        self.further.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty())
    }

    /// What a template sees.
    pub(super) fn value(&self) -> Value {
        let mut value = json!({"role": self.role, "content": self.content});
        let object = value.as_object_mut().expect("made above");
        object.extend(self.further.iter().map(|(key, value)| (key.clone(), value.clone())));
        value
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) tools: Value,
}

/// What is wrong with a record, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) cause: String,
    pub(super) fix: String,
}

pub(super) fn fault(cause: impl Into<String>, fix: impl Into<String>) -> Fault {
    Fault { cause: cause.into(), fix: fix.into() }
}

const COMPLETIONS: [(&str, &str); 3] = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")];

impl Records {
    /// The layout whose fields `record` has.
    pub(super) fn detect(record: &Record) -> Result<Self, Fault> {
        let has = |field: &str| record.contains_key(field);
        if has("messages") {
            Ok(Self::Messages)
        } else if has("conversations") {
            Ok(Self::ShareGpt)
        } else if has("instruction") {
            Ok(Self::Alpaca)
        } else if COMPLETIONS.iter().any(|(prompt, completion)| has(prompt) && has(completion)) {
            Ok(Self::Prompt)
        } else {
            let fields: Vec<&str> = record.keys().map(String::as_str).collect();
            Err(fault(
                format!("no layout is known for a record with the fields {}", fields.join(", ")),
                "set records.fields = { prompt = \"...\", completion = \"...\" } to the two that hold the text",
            ))
        }
    }

    /// The conversation in `record`, which ends with an answer.
    pub(super) fn read(&self, record: &Record) -> Result<Conversation, Fault> {
        let conversation = self.turns(record)?;
        check_turns(&conversation.messages)?;
        check_answered(&conversation.messages)?;
        Ok(conversation)
    }

    /// The turns of a list of messages.
    pub(super) fn messages_of(list: Vec<Value>) -> Result<Vec<Message>, Fault> {
        turns(&Record::from_iter([("messages".to_owned(), Value::Array(list))]), "messages", message)
    }

    /// The turns in `record`, in whatever order they come.
    pub(super) fn turns(&self, record: &Record) -> Result<Conversation, Fault> {
        let messages = match self {
            Self::Messages => with_system(record, turns(record, "messages", message)?)?,
            Self::ShareGpt => with_system(record, turns(record, "conversations", share_gpt)?)?,
            Self::Alpaca => with_system(record, alpaca(record)?)?,
            Self::Prompt => {
                let known =
                    COMPLETIONS.iter().find(|(prompt, completion)| record.contains_key(*prompt) && record.contains_key(*completion));
                let missing = || {
                    fault(
                        "there is no prompt with its completion: the fields `prompt` and `completion` (or `response`), or `question` and `answer`",
                        "add them, or name others with records.fields",
                    )
                };
                let (prompt, completion) = known.ok_or_else(missing)?;
                with_system(record, prompt_completion(record, prompt, completion)?)?
            }
            Self::Fields(fields) => prompt_completion(record, &fields.prompt, &fields.completion)?,
        };
        Ok(Conversation { messages, tools: tools(record)? })
    }
}

impl Conversation {
    /// Refuses turns in another order than templates know, and those that leave the assistant nothing to answer.
    pub(super) fn check_open(&self) -> Result<(), Fault> {
        check_turns(&self.messages)?;
        match self.messages.last() {
            Some(last) if matches!(last.speaker, Speaker::User | Speaker::Tool) => Ok(()),
            last => Err(fault(
                format!(
                    "the conversation ends with {} turn: there is nothing to answer",
                    last.map_or("no", |last| match last.speaker {
                        Speaker::Assistant => "an assistant",
                        _ => "a system",
                    })
                ),
                "end it with a user turn",
            )),
        }
    }
}

fn speaker(role: &str) -> Result<Speaker, Fault> {
    match role {
        "system" | "developer" => Ok(Speaker::System),
        "user" => Ok(Speaker::User),
        "assistant" => Ok(Speaker::Assistant),
        "tool" | "ipython" => Ok(Speaker::Tool),
        _ => Err(fault(format!("there is no role {role:?}"), "use system, user, assistant or tool")),
    }
}

fn field<'r>(record: &'r Record, name: &str) -> Result<&'r Value, Fault> {
    record.get(name).filter(|value| !value.is_null()).ok_or_else(|| {
        let others: Vec<&str> = record.keys().map(String::as_str).collect();
        fault(format!("there is no field `{name}`"), format!("add it; the record has: {}", others.join(", ")))
    })
}

fn text(record: &Record, name: &str) -> Result<String, Fault> {
    field(record, name)?.as_str().map(str::to_owned).ok_or_else(|| fault(format!("the field `{name}` is not a string"), "give a string"))
}

fn optional_text(record: &Record, name: &str) -> Result<String, Fault> {
    if record.get(name).is_none_or(Value::is_null) { Ok(String::new()) } else { text(record, name) }
}

/// The list `name` of `record`, each entry read by `read`; mistakes say in which turn they are.
fn turns(record: &Record, name: &str, read: impl Fn(&Record) -> Result<Message, Fault>) -> Result<Vec<Message>, Fault> {
    let list = field(record, name)?.as_array().ok_or_else(|| fault(format!("the field `{name}` is not a list"), "give a list of turns"))?;
    let turn = |(at, entry): (usize, &Value)| {
        let object = entry.as_object().ok_or_else(|| fault("not an object", "give an object with a role and a content"));
        object.and_then(&read).map_err(|Fault { cause, fix }| fault(format!("turn {}: {cause}", at + 1), fix))
    };
    list.iter().enumerate().map(turn).collect()
}

fn message(entry: &Record) -> Result<Message, Fault> {
    let calls = entry.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match entry.get("content") {
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<String, Fault>>()?,
        None | Some(Value::Null) if calls => String::new(),
        _ => text(entry, "content")?,
    };
    let mut message = Message::new(&text(entry, "role")?, content)?;
    message.weight = weight(entry)?;
    let further =
        entry.iter().filter(|(key, value)| !matches!(key.as_str(), "role" | "content" | "weight" | "loss_weight") && !value.is_null());
    message.further = further.map(|(key, value)| (key.clone(), value.clone())).collect();
    Ok(message)
}

/// A part of a content given as a list: only text is read.
fn part(part: &Value) -> Result<String, Fault> {
    let text = ["text", "value"].iter().find_map(|key| part[*key].as_str());
    let is_text = part["type"].as_str().is_none_or(|kind| kind == "text");
    let unknown = || fault(format!("a content part of type {} cannot be read", part["type"]), "give text parts only");
    text.filter(|_| is_text).map(str::to_owned).ok_or_else(unknown)
}

fn weight(entry: &Record) -> Result<Option<f32>, Fault> {
    let Some(value) = ["weight", "loss_weight"].iter().find_map(|key| entry.get(*key).filter(|value| !value.is_null())) else {
        return Ok(None);
    };
    let weight = value.as_f64().or_else(|| value.as_bool().map(|flag| f64::from(u8::from(flag))));
    let valid = weight.filter(|weight| (0.0..=1e6).contains(weight)).map(|weight| Some(weight as f32));
    valid.ok_or_else(|| {
        fault(format!("the weight {value} is not a number from 0 on"), "0 leaves the turn out of the loss, 1 counts it in full")
    })
}

fn share_gpt(entry: &Record) -> Result<Message, Fault> {
    let (from, value) = (text(entry, "from")?, text(entry, "value")?);
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bard" | "bing" => "assistant",
        "function_call" => return tool_call(&value),
        "observation" | "tool" | "function_response" => "tool",
        "system" => "system",
        other => {
            return Err(fault(format!("nobody is called {other:?}"), "`from` is one of system, human, gpt, function_call, observation"));
        }
    };
    let mut message = Message::new(role, value)?;
    message.weight = weight(entry)?;
    Ok(message)
}

/// A call as ShareGPT data writes it, the JSON text of `name` and `arguments`, in the layout that templates read.
fn tool_call(value: &str) -> Result<Message, Fault> {
    let call: Value =
        serde_json::from_str(value).map_err(|error| fault(format!("the function call is not JSON: {error}"), "give name and arguments"))?;
    if !call["name"].is_string() {
        return Err(fault("the function call has no name", "give an object with name and arguments"));
    }
    let mut message = Message::new("assistant", "")?;
    message
        .further
        .insert("tool_calls".into(), json!([{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}]));
    Ok(message)
}

fn alpaca(record: &Record) -> Result<Vec<Message>, Fault> {
    let mut messages = Vec::new();
    for (at, pair) in record.get("history").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let (Some(user), Some(assistant)) = (pair[0].as_str(), pair[1].as_str()) else {
            return Err(fault(format!("entry {} of the history is not a pair of texts", at + 1), "give pairs of instruction and answer"));
        };
        messages.extend([Message::new("user", user)?, Message::new("assistant", assistant)?]);
    }
    let (instruction, input) = (text(record, "instruction")?, optional_text(record, "input")?);
    let asked = if input.trim().is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
    let answer = if record.contains_key("output") || !record.contains_key("response") { "output" } else { "response" };
    messages.extend([Message::new("user", asked)?, Message::new("assistant", text(record, answer)?)?]);
    Ok(messages)
}

fn prompt_completion(record: &Record, prompt: &str, completion: &str) -> Result<Vec<Message>, Fault> {
    let side = |name: &str, role: &str| match field(record, name)? {
        Value::Array(_) => turns(record, name, message),
        _ => Ok(vec![Message::new(role, text(record, name)?)?]),
    };
    Ok([side(prompt, "user")?, side(completion, "assistant")?].concat())
}

/// A `system` field beside the turns comes first.
fn with_system(record: &Record, mut messages: Vec<Message>) -> Result<Vec<Message>, Fault> {
    let system = optional_text(record, "system")?;
    if !system.trim().is_empty() {
        messages.insert(0, Message::new("system", system)?);
    }
    Ok(messages)
}

/// The `tools` field: a list, or the JSON text of one.
fn tools(record: &Record) -> Result<Value, Fault> {
    let tools = match record.get("tools") {
        None | Some(Value::Null) => return Ok(Value::Null),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Value::Null),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|error| fault(format!("the field `tools` is not JSON: {error}"), "give a list of tools"))?
        }
        Some(value) => value.clone(),
    };
    match &tools {
        Value::Array(list) if list.is_empty() => Ok(Value::Null),
        Value::Array(_) => Ok(tools),
        _ => Err(fault("the field `tools` is not a list", "give a list of tools")),
    }
}

/// An optional system turn, then user and assistant in turn, tools only after a turn that calls them.
fn check_turns(messages: &[Message]) -> Result<(), Fault> {
    let order = "a conversation is an optional system turn, then user and assistant in turn, with tool turns after a call";
    let mut before: Option<&Message> = None;
    for (at, message) in messages.iter().enumerate() {
        let place = format!("turn {} ({})", at + 1, message.role);
        if message.content.trim().is_empty() && !message.calls_tools() {
            return Err(fault(format!("{place} is empty"), "give the turn a content, or remove the record"));
        }
        let calls = before.is_some_and(Message::calls_tools);
        let fits = match (before.map(|message| message.speaker), message.speaker) {
            (None, speaker) => matches!(speaker, Speaker::System | Speaker::User),
            (Some(Speaker::System), speaker) => speaker == Speaker::User,
            (Some(Speaker::User), speaker) => speaker == Speaker::Assistant,
            (Some(Speaker::Assistant), Speaker::Tool) => calls,
            (Some(Speaker::Assistant), speaker) => speaker == Speaker::User && !calls,
            (Some(Speaker::Tool), speaker) => matches!(speaker, Speaker::Tool | Speaker::Assistant),
        };
        if !fits {
            let after = before.map_or("at the start".to_owned(), |message| format!("after {}", message.role));
            return Err(fault(format!("roles out of order: {place} comes {after}"), order));
        }
        before = Some(message);
    }
    Ok(())
}

/// There is an answer, and it comes last.
fn check_answered(messages: &[Message]) -> Result<(), Fault> {
    match messages.last() {
        None => Err(fault("the conversation has no turns", "remove the record")),
        Some(last) if last.speaker != Speaker::Assistant => Err(fault(
            format!("the conversation ends with a {} turn: there is no answer to learn", last.role),
            "end it with an assistant turn",
        )),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Conversation, Fault> {
        let record: Record = serde_json::from_str(text).unwrap();
        Records::detect(&record)?.read(&record)
    }

    fn turns_of(text: &str) -> Vec<(String, String)> {
        read(text).unwrap().messages.into_iter().map(|message| (message.role, message.content)).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(role, content)| ((*role).to_owned(), (*content).to_owned())).collect()
    }

    #[test]
    fn every_layout_becomes_turns() {
        let expected = pairs(&[("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]);
        for text in [
            r#"{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]}, {"role": "assistant", "content": "Hello"}]}"#,
            r#"{"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}"#,
            r#"{"system": "Be kind.", "instruction": "Hi", "input": "", "output": "Hello"}"#,
            r#"{"system": "Be kind.", "instruction": "Hi", "response": "Hello"}"#,
            r#"{"system": "Be kind.", "prompt": "Hi", "completion": "Hello"}"#,
            r#"{"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}"#,
        ] {
            assert_eq!(turns_of(text), expected, "{text}");
        }
        assert_eq!(turns_of(r#"{"question": "1+1?", "answer": "2"}"#), pairs(&[("user", "1+1?"), ("assistant", "2")]));
        let alpaca = r#"{"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Hello"]]}"#;
        assert_eq!(turns_of(alpaca), pairs(&[("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n1 1"), ("assistant", "2")]));
        let record: Record = serde_json::from_str(r#"{"text": "a", "code": "b"}"#).unwrap();
        let fields = Records::Fields(Fields { prompt: "text".into(), completion: "code".into() });
        assert_eq!(fields.read(&record).unwrap().messages.len(), 2);
    }

    #[test]
    fn tools_and_weights_are_kept() {
        let found = read(
            r#"{"tools": "[{\"name\": \"add\"}]", "conversations": [{"from": "human", "value": "1+1?"},
               {"from": "function_call", "value": "{\"name\": \"add\", \"arguments\": {\"a\": 1}}"},
               {"from": "observation", "value": "2"}, {"from": "gpt", "value": "It is 2.", "weight": 0.5}]}"#,
        )
        .unwrap();
        assert_eq!(found.tools, json!([{"name": "add"}]));
        assert_eq!(found.messages[1].value()["tool_calls"][0]["function"]["arguments"]["a"], 1);
        assert_eq!(found.messages.iter().map(|message| message.weight).collect::<Vec<_>>(), [None, None, None, Some(0.5)]);
        let found = read(
            r#"{"messages": [{"role": "user", "content": "a", "loss_weight": 0}, {"role": "assistant", "content": "b", "weight": true, "name": "x"}]}"#,
        );
        let messages = found.unwrap().messages;
        assert_eq!((messages[0].weight, messages[1].weight, messages[1].value()["name"].as_str()), (Some(0.0), Some(1.0), Some("x")));
    }

    #[test]
    fn mistakes_are_named() {
        let user = r#"{"role": "user", "content": "a"}"#;
        let assistant = r#"{"role": "assistant", "content": "b"}"#;
        let messages = |turns: &[&str]| format!("{{\"messages\": [{}]}}", turns.join(", "));
        for (text, cause) in [
            (r#"{"text": "a"}"#.to_owned(), "no layout is known for a record with the fields text"),
            (r#"{"instruction": "a"}"#.to_owned(), "there is no field `output`"),
            (r#"{"instruction": "a", "output": 3}"#.to_owned(), "the field `output` is not a string"),
            (r#"{"messages": 3}"#.to_owned(), "the field `messages` is not a list"),
            (messages(&[]), "has no turns"),
            (messages(&[user]), "ends with a user turn"),
            (messages(&[user, user, assistant]), "roles out of order: turn 2 (user) comes after user"),
            (messages(&[assistant, user]), "turn 1 (assistant) comes at the start"),
            (messages(&[user, r#"{"role": "tool", "content": "x"}"#]), "turn 2 (tool) comes after user"),
            (messages(&[user, assistant, r#"{"role": "system", "content": "x"}"#]), "turn 3 (system) comes after assistant"),
            (messages(&[user, r#"{"role": "assistant", "content": "  "}"#]), "turn 2 (assistant) is empty"),
            (messages(&[user, r#"{"role": "assistant"}"#]), "turn 2: there is no field `content`"),
            (messages(&[user, r#"{"role": "bot", "content": "x"}"#]), "turn 2: there is no role \"bot\""),
            (messages(&[user, r#"{"role": "assistant", "content": "x", "weight": -1}"#]), "the weight -1"),
            (messages(&[user, r#"{"role": "assistant", "content": [{"type": "image"}]}"#]), "of type \"image\""),
            (r#"{"conversations": [{"from": "robot", "value": "x"}]}"#.to_owned(), "turn 1: nobody is called \"robot\""),
        ] {
            let fault = read(&text).unwrap_err();
            assert!(fault.cause.contains(cause) && !fault.fix.is_empty(), "{text}: {fault:?}");
        }
    }
}
