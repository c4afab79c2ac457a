//! Conversations as training data: records of four layouts, through a chat template, to tokens that each have a weight in the loss.
//!
//! ```toml
//! [[data.sources]]
//! chat = { path = "support.jsonl", template = "chatml" }   # records, template and train have defaults
//! ```

mod files;
mod mask;
mod prompt;
mod python;
mod records;
mod template;

#[cfg(test)]
mod tests;

use super::config::{TokenizerConfig, find};
use super::source::{Files, Layout, Source, Visitor};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use mask::{Rendered, Renderer};
use python::Date;
use rayon::prelude::*;
use records::{Conversation, Fault};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use template::{Template, Text};
use xxhash_rust::xxh3::xxh3_64;

pub use mask::Train;
pub use prompt::{Open, Prompt, end_of_turn};
pub use records::{Fields, Records};
pub use template::{NamedTemplate, TemplateConfig};

/// Raised when equal records become other tokens or weights than before, so that old shards are not reused.
const VERSION: u32 = 1;

/// One source of conversations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A file of JSON lines or with one JSON array, or a folder whose `*.jsonl` and `*.json` files are read.
    pub path: PathBuf,
    /// How records are laid out; told from the first record of each file where it is absent.
    #[serde(default)]
    pub records: Option<Records>,
    /// What turns messages into text.
    #[serde(default)]
    pub template: TemplateConfig,
    /// What is trained where a turn has no `weight` of its own.
    #[serde(default)]
    pub train: Train,
    /// The day that templates are told when they ask for today's, as `2026-01-31`.
    #[serde(default)]
    pub date: Option<String>,
    #[serde(default)]
    pub weight: Option<f64>,
}

/// Conversation files with the template they go through.
#[derive(Debug, Clone)]
pub(super) struct Chat {
    files: Files,
    records: Option<Records>,
    template: Text,
    train: Train,
    date: Option<Date>,
    specials: BTreeMap<String, String>,
}

/// A conversation as it is trained.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Document {
    pub(super) tokens: Vec<u32>,
    /// For each token, how much it counts as a target.
    pub(super) weights: Vec<f32>,
    pub(super) text_bytes: usize,
}

impl Config {
    pub(super) fn open(&self, tokenizer: &TokenizerConfig, recipe_folder: &Path) -> Result<Chat> {
        let date =
            match self.date.as_deref() {
                None => None,
                Some(text) => Some(Date::parse(text).ok_or_else(|| {
                    Error::input("data.sources chat.date", format!("{text:?} is not a day")).fix("write it as 2026-01-31")
                })?),
            };
        let tokenizer = match tokenizer {
            TokenizerConfig::File(path) => Some(find(path, recipe_folder)?),
            TokenizerConfig::Byte | TokenizerConfig::Character | TokenizerConfig::Bpe(_) => None,
        };
        Ok(Chat {
            files: Files::new(&find(&self.path, recipe_folder)?, &[("jsonl", Layout::Whole), ("json", Layout::Whole)])?,
            records: self.records.clone(),
            template: self.template.load(tokenizer.as_deref(), recipe_folder)?,
            train: self.train,
            date,
            specials: tokenizer.map_or(Ok(BTreeMap::new()), |path| named_specials(&path))?,
        })
    }
}

/// The special tokens that the `tokenizer_config.json` beside a tokenizer names.
fn named_specials(tokenizer: &Path) -> Result<BTreeMap<String, String>> {
    let folder = if tokenizer.is_dir() { tokenizer } else { tokenizer.parent().unwrap_or(Path::new(".")) };
    let path = folder.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("not JSON: {error}")))?;
    Ok(crate::data::tokenizer::named_specials(&json))
}

impl Chat {
    /// The text of the chat template, to be saved beside the model.
    pub(super) fn template(&self) -> &str {
        &self.template.text
    }

    /// Every record, with the place to name when something about it is wrong.
    fn visit_conversations(&self, visit: &mut dyn FnMut(&Path, usize, Conversation) -> Result<()>) -> Result<()> {
        for path in self.files.paths() {
            let mut records = self.records.clone();
            files::visit(path, &mut |line, record| {
                let wrong = |fault: Fault| files::mistake(path, line, fault.cause).fix(fault.fix);
                if records.is_none() {
                    records = Some(Records::detect(&record).map_err(wrong)?);
                }
                let layout = records.as_ref().expect("told above");
                visit(path, line, layout.read(&record).map_err(wrong)?)
            })?;
        }
        Ok(())
    }

    fn template_with(&self, specials: BTreeMap<String, String>) -> Result<Template> {
        Template::new(&self.template, specials, self.date)
    }

    /// Every record as tokens and weights, in order. One mistake anywhere refuses them all.
    pub(super) fn documents(&self, tokenizer: &Tokenizer) -> Result<Vec<Document>> {
        let specials = self.specials.clone().into_iter().chain(tokenizer.named_specials()).collect();
        let template = self.template_with(specials)?;
        let renderer = Renderer::new(&template, stops(tokenizer, &template), self.train);
        let mut conversations = Vec::new();
        self.visit_conversations(&mut |path, line, conversation| {
            conversations.push((path.to_path_buf(), line, conversation));
            Ok(())
        })?;
        let encode = |(path, line, conversation): &(PathBuf, usize, Conversation)| {
            let wrong = |fault: Fault| files::mistake(path, *line, fault.cause).fix(fault.fix);
            let rendered = renderer.render(conversation).map_err(wrong)?;
            document(tokenizer, &rendered).map_err(|error| match error {
                Error::Input { cause, fix, .. } => Error::Input { place: format!("{}:{line}", path.display()), cause, fix },
                other => other,
            })
        };
        conversations.par_iter().map(encode).collect()
    }
}

/// The special tokens at which generation may stop when text comes from `template`: all but the one that begins a sequence.
fn stops(tokenizer: &Tokenizer, template: &Template) -> Vec<String> {
    let (bos, eos) = (template.special("bos_token"), template.special("eos_token"));
    let mut stops: Vec<String> = tokenizer.special_pieces().into_iter().filter(|piece| piece != bos || bos == eos).collect();
    if !eos.is_empty() && !stops.iter().any(|stop| stop == eos) {
        stops.push(eos.to_owned());
    }
    stops
}

/// Tokens of a rendered conversation. A token counts when any of its text does: the first word of an answer carries the blank before it.
fn document(tokenizer: &Tokenizer, rendered: &Rendered) -> Result<Document> {
    let encoded = tokenizer.encode_with_places(&rendered.text)?;
    let mut tokens = Vec::with_capacity(encoded.len());
    let mut weights = Vec::with_capacity(encoded.len());
    for (id, range) in &encoded {
        let touching = rendered.spans.iter().rev().find(|span| range.start < span.range.end && range.end > span.range.start);
        tokens.push(*id);
        weights.push(touching.map_or(0.0, |span| span.weight));
    }
    for span in rendered.spans.iter().filter(|span| span.weight > 0.0) {
        let Some(stop) = &span.stop else { continue };
        let last = encoded.iter().rev().find(|(_, range)| range.start < span.range.end && range.end > span.range.start);
        if last.is_none_or(|&(id, _)| tokenizer.id(stop) != Some(id)) {
            let cause = format!("{stop:?} is spelled in the text but is no token of its own: the model would never learn to stop");
            return Err(Error::input("tokenizer", cause).fix("choose a template whose stop token is in the vocabulary, such as \"plain\""));
        }
    }
    Ok(Document { tokens, weights, text_bytes: rendered.text.len() })
}

impl Source for Chat {
    fn name(&self) -> String {
        self.files.name()
    }

    fn fingerprint(&self) -> Result<u64> {
        let settings = (VERSION, &self.records, &self.template.text, self.train, self.date, &self.specials);
        Ok(xxh3_64(format!("{:016x} {settings:?}", self.files.fingerprint()?).as_bytes()))
    }

    /// The rendered text without special tokens: what a tokenizer may be trained on.
    fn visit(&self, visit: &mut Visitor<'_>) -> Result<u64> {
        let silent = ["bos_token", "eos_token"].map(|name| (name.to_owned(), String::new()));
        let template = self.template_with(silent.into())?;
        self.visit_conversations(&mut |path, line, conversation| {
            let values: Vec<serde_json::Value> = conversation.messages.iter().map(records::Message::value).collect();
            let failed = |what: String| {
                files::mistake(path, line, format!("{} fails: {what}", template.name())).fix("correct the record or the template")
            };
            visit(&template.render(&values, &conversation.tools, false).map_err(failed)?)
        })?;
        Ok(0)
    }
}
