//! Chat templates: Jinja2 as transformers runs it (`apply_chat_template`), through minijinja.
//!
//! Blocks are trimmed, loop controls work, `{% generation %}` is read and changes nothing, values print as Python prints them, and
//! `tojson`, `raise_exception` and `strftime_now` are there. Special tokens are variables (`bos_token`, `eos_token`, ...).

use super::python::{self, Date};
use crate::data::config::find;
use crate::error::{Error, Result};
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the template comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateConfig {
    /// The one beside the tokenizer: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.
    #[default]
    Tokenizer,
    /// `<|im_start|>role`, the content, `<|im_end|>`: for vocabularies that have these tokens.
    Chatml,
    /// `User: ...`, `Assistant: ...` and the end-of-sequence token: for any vocabulary.
    Plain,
    /// `### Instruction:`, `### Response:` and the end-of-sequence token.
    Alpaca,
    /// The contents alone, and the end-of-sequence token after an answer: for prompts that are formatted already.
    Raw,
    /// A Jinja file, a `tokenizer_config.json`, or a model folder.
    File(PathBuf),
    /// One of the templates a `tokenizer_config.json` lists by name.
    Named(NamedTemplate),
}

/// A template among several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedTemplate {
    /// A `tokenizer_config.json`, or the folder that holds one.
    pub file: PathBuf,
    pub name: String,
}

const BUILT_IN: [(TemplateConfig, &str, &str); 4] = [
    (TemplateConfig::Chatml, "chatml", include_str!("templates/chatml.jinja")),
    (TemplateConfig::Plain, "plain", include_str!("templates/plain.jinja")),
    (TemplateConfig::Alpaca, "alpaca", include_str!("templates/alpaca.jinja")),
    (TemplateConfig::Raw, "raw", include_str!("templates/raw.jinja")),
];

/// Name of a template's text, for errors, and the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) name: String,
    pub(super) text: String,
}

impl TemplateConfig {
    /// Finds the text. `tokenizer` is the folder or file that the tokenizer was read from.
    pub(super) fn load(&self, tokenizer: Option<&Path>, recipe_folder: &Path) -> Result<Text> {
        if let Some((_, name, text)) = BUILT_IN.iter().find(|(config, ..)| config == self) {
            return Ok(Text { name: format!("the built-in template {name}"), text: (*text).to_owned() });
        }
        match self {
            Self::File(path) => from_path(&find(path, recipe_folder)?, None),
            Self::Named(named) => from_path(&find(&named.file, recipe_folder)?, Some(&named.name)),
            _ => {
                let advice =
                    "choose one: template = \"chatml\", \"plain\", \"alpaca\" or \"raw\", or template.file = \"chat_template.jinja\"";
                let Some(path) = tokenizer else {
                    return Err(Error::input("data.sources chat.template", "this tokenizer has no chat template").fix(advice));
                };
                let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
                from_path(folder, None).map_err(|error| error.fix(advice))
            }
        }
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(Error::io("read", path))
}

/// The template of a folder, a `tokenizer_config.json` or a Jinja file.
fn from_path(path: &Path, name: Option<&str>) -> Result<Text> {
    if path.is_dir() {
        let (jinja, config) = (path.join("chat_template.jinja"), path.join("tokenizer_config.json"));
        return match name {
            None if jinja.is_file() => from_path(&jinja, None),
            _ if config.is_file() => from_path(&config, name),
            _ => Err(Error::file(path, "holds neither chat_template.jinja nor tokenizer_config.json")),
        };
    }
    if path.extension().is_none_or(|ending| ending != "json") {
        return Ok(Text { name: path.display().to_string(), text: read(path)? });
    }
    let json: Value = serde_json::from_str(&read(path)?).map_err(|error| Error::file(path, format!("not JSON: {error}")))?;
    let text = match (&json["chat_template"], name) {
        (Value::String(text), None) => Some(text.as_str()),
        (Value::Array(list), name) => {
            let wanted = name.unwrap_or("default");
            let found = list.iter().find(|entry| entry["name"] == wanted).and_then(|entry| entry["template"].as_str());
            if found.is_none() {
                let names: Vec<&str> = list.iter().filter_map(|entry| entry["name"].as_str()).collect();
                return Err(Error::file(path, format!("has no chat template called {wanted:?}"))
                    .fix(format!("choose one with template.named: {}", names.join(", "))));
            }
            found
        }
        (Value::String(_), Some(name)) => {
            return Err(Error::file(path, format!("has one chat template and none called {name:?}")).fix("use template.file"));
        }
        _ => None,
    };
    let text = text.ok_or_else(|| Error::file(path, "has no chat_template"))?;
    Ok(Text { name: format!("chat_template of {}", path.display()), text: text.to_owned() })
}

/// A template that is ready to render.
pub(super) struct Template {
    name: String,
    environment: Environment<'static>,
    specials: BTreeMap<String, String>,
}

impl Template {
    /// Compiles `text`. `specials` are the special tokens by the names templates know them by.
    pub(super) fn new(text: &Text, specials: BTreeMap<String, String>, date: Option<Date>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| Ok(write!(out, "{}", python::text(value))?));
        environment.add_filter("tojson", |value: &minijinja::Value, options| python::to_json(value, options));
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| match date {
            Some(date) => date.format(&format),
            None => Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "it asks for today's date; set `date` in the recipe, so that every run renders the same",
            )),
        });
        let name = text.name.clone();
        let broken = |error: minijinja::Error| Error::input(&name, describe(&error)).fix("correct the template, or choose another one");
        environment.add_template_owned("template", without_generation_tags(&text.text)).map_err(broken)?;
        Ok(Self { name, environment, specials })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The special token called `name`, `""` where there is none.
    pub(super) fn special(&self, name: &str) -> &str {
        self.specials.get(name).map_or("", String::as_str)
    }

    /// The text of `messages`; with `generation` also what invites the next answer. Fails with what the template says, and where in it.
    pub(super) fn render(&self, messages: &[Value], tools: &Value, generation: bool) -> Result<String, String> {
        let template = self.environment.get_template("template").expect("added when made");
        let mut context: BTreeMap<&str, minijinja::Value> =
            self.specials.iter().map(|(name, token)| (name.as_str(), minijinja::Value::from(token.as_str()))).collect();
        context.insert("messages", minijinja::Value::from_serialize(messages));
        context.insert("tools", minijinja::Value::from_serialize(tools));
        context.insert("documents", minijinja::Value::from(()));
        context.insert("add_generation_prompt", generation.into());
        template.render(context).map_err(|error| describe(&error))
    }
}

/// What went wrong and on which line of the template.
fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    error.line().map_or_else(|| what.clone(), |line| format!("line {line}: {what}"))
}

/// transformers marks what the assistant says with `{% generation %}`, which prints nothing of its own.
fn without_generation_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}") else { break };
        let tag = &rest[at + 2..at + length];
        let trimmed = tag.trim_matches(['-', '+']).trim();
        let other = match trimmed {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => trimmed,
        };
        out += &rest[..at + 2];
        out += &if other == trimmed { tag.to_owned() } else { tag.replacen(trimmed, &format!(" {other} "), 1) };
        rest = &rest[at + length..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(text: &str) -> Result<Template> {
        let specials = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.to_owned()));
        Template::new(&Text { name: "test.jinja".into(), text: text.into() }, specials.into(), None)
    }

    fn render(text: &str, messages: Value) -> Result<String, String> {
        template(text).unwrap().render(messages.as_array().unwrap(), &Value::Null, true)
    }

    #[test]
    fn failures_name_the_line() {
        assert_eq!(template("a\n{% if %}").err().unwrap().to_string().split(':').next(), Some("test.jinja"));
        let failing = "{{ bos_token }}\n{% if messages[0].role != 'user' %}\n{{ raise_exception('user first!') }}\n{% endif %}";
        assert_eq!(render(failing, json!([{"role": "system"}])).unwrap_err(), "line 3: user first!");
        assert_eq!(render(failing, json!([{"role": "user"}])).unwrap(), "<s>\n");
        assert!(render("{{ strftime_now('%Y') }}", json!([])).unwrap_err().contains("set `date`"));
        assert!(render("{{ messages.nothing.deeper }}", json!([])).is_err());
    }

    #[test]
    fn generation_tags_change_nothing() {
        let text = "{%- for m in messages %}{{ '\n' }}{% generation %}{{ m.c }}\n{%- endgeneration -%} \n{% endfor %}";
        assert_eq!(render(text, json!([{"c": 1}, {"c": true}])).unwrap(), "\n1\nTrue");
    }

    #[test]
    fn templates_are_found_where_models_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let load = |config: TemplateConfig| config.load(Some(folder.path()), Path::new("."));
        assert!(load(TemplateConfig::Tokenizer).unwrap_err().to_string().contains("holds neither"));
        assert!(TemplateConfig::Tokenizer.load(None, Path::new(".")).unwrap_err().hint().unwrap().contains("chatml"));
        let config = folder.path().join("tokenizer_config.json");
        std::fs::write(&config, "{}").unwrap();
        assert!(load(TemplateConfig::Tokenizer).unwrap_err().to_string().contains("has no chat_template"));
        std::fs::write(&config, r#"{"chat_template": "one"}"#).unwrap();
        assert_eq!(load(TemplateConfig::Tokenizer).unwrap().text, "one");
        std::fs::write(&config, r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#)
            .unwrap();
        assert_eq!(load(TemplateConfig::Tokenizer).unwrap().text, "d");
        let named = |name: &str| TemplateConfig::Named(NamedTemplate { file: folder.path().into(), name: name.into() });
        assert_eq!(load(named("tool_use")).unwrap().text, "t");
        assert!(load(named("rag")).unwrap_err().hint().unwrap().contains("default, tool_use"));
        std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(load(TemplateConfig::Tokenizer).unwrap().text, "file");
        assert_eq!(load(TemplateConfig::File(folder.path().into())).unwrap().text, "file");
        assert!(load(TemplateConfig::Plain).unwrap().text.contains("Assistant: "));
    }
}
