//! The `[data]` section of a recipe.
//!
//! ```toml
//! [data]
//! path = "books"                          # one file or folder: the short form of a single source
//! tokenizer.bpe = { vocab = 4096 }        # "byte", "character", bpe, or file = "tokenizer.json"
//! validation.every = 20                   # or tail = 0.1, path = "held-out.txt", "none"
//!
//! [[data.sources]]                        # instead of path
//! text = { path = "stories.txt", separator = "<|endoftext|>", weight = 3.0 }
//! [[data.sources]]
//! jsonl = { path = "web.jsonl", field = "text", weight = 1.0 }
//! [[data.sources]]
//! chat = { path = "support.jsonl", template = "chatml", train = "answers", weight = 1.0 }
//! ```
//!
//! Relative paths start at the working directory or, where nothing is there, at the recipe's folder.

use super::source::{Files, Layout, Source};
use super::{builtin, chat};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where the text comes from and how it becomes batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A file, or a folder whose `*.txt` (documents separated by `<|endoftext|>`) and `*.jsonl` (field `text`) files are read, all
    /// levels down, in the order of their names; `*.jsonl` files without that field are left out. Takes the place of `sources`.
    pub path: Option<PathBuf>,
    /// What is mixed.
    pub sources: Vec<SourceConfig>,
    /// Text to tokens.
    pub tokenizer: TokenizerConfig,
    /// The special token that ends documents and answers, where it is to be another one than the tokenizer says: what a base never saw in
    /// training is hard to teach it, to an adapter most of all.
    pub end_of_text: Option<String>,
    /// What is held out of training.
    pub validation: Validation,
    /// How rows are cut from documents.
    pub order: Order,
    /// Rows that come from the first source alone before all are mixed: what is learned there makes the rest learnable.
    pub first_rows: u64,
    /// Whether a token may attend to the documents before its own in the row.
    pub attend_across_documents: bool,
    /// Where shards and trained tokenizers are kept.
    pub cache: PathBuf,
    /// Batches prepared ahead of the one in use (1 to 1024).
    pub prefetch: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: None,
            sources: Vec::new(),
            tokenizer: TokenizerConfig::Byte,
            end_of_text: None,
            validation: Validation::Every(20),
            order: Order::Packed,
            first_rows: 0,
            attend_across_documents: false,
            cache: "data/cache".into(),
            prefetch: 4,
        }
    }
}

/// One source. `weight` is its share of the training tokens relative to the others; without any weights sources are mixed in
/// proportion to their sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceConfig {
    Builtin(builtin::Config),
    Text(TextConfig),
    Jsonl(JsonlConfig),
    Chat(chat::Config),
}

/// Plain text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// A file, or a folder whose `*.txt` files are read.
    pub path: PathBuf,
    /// Separates documents; without it each file is one document.
    #[serde(default)]
    pub separator: Option<String>,
    #[serde(default)]
    pub weight: Option<f64>,
}

/// One JSON object per line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// A file, or a folder whose `*.jsonl` files are read.
    pub path: PathBuf,
    /// The field that holds the document.
    #[serde(default = "text_field")]
    pub field: String,
    #[serde(default)]
    pub weight: Option<f64>,
}

fn text_field() -> String {
    "text".into()
}

/// Text to tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerConfig {
    /// 256 bytes and an end-of-text token.
    Byte,
    /// One token per character that occurs (held-out text included) and an end-of-text token.
    Character,
    /// Byte-level BPE trained on the training documents.
    Bpe(BpeConfig),
    /// A `tokenizer.json`, or a folder that holds one.
    File(PathBuf),
}

/// What BPE is trained with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BpeConfig {
    /// Tokens, the 256 bytes and the end-of-text token included.
    pub vocab: usize,
    /// Where the training documents have more text than this, evenly spaced ones are used.
    #[serde(default = "sample_bytes")]
    pub sample_bytes: u64,
}

fn sample_bytes() -> u64 {
    64 << 20
}

/// What is held out of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Validation {
    None,
    /// Documents N-1, 2N-1, ... of each source.
    Every(u64),
    /// This fraction of each source's characters, at its end; the document on the cut is divided.
    Tail(f64),
    /// Another file or folder, read like [`Config::path`].
    Path(PathBuf),
}

/// How rows are cut from documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Documents in an order shuffled anew for every pass, end to end: every token is trained once per pass.
    Packed,
    /// Documents stay whole: each is put into the fullest row that has room for it, and what is left of a row is not trained. Only a
    /// document longer than the context goes on in further rows.
    Whole,
    /// Each row starts anywhere, as in nanoGPT.
    Crops,
}

/// A source with what the mixture calls it.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) weight: Option<f64>,
    pub(super) source: Box<dyn Source>,
    /// The same source where it holds conversations, which have weights.
    pub(super) chat: Option<chat::Chat>,
}

impl Config {
    /// Opens what `path` or `sources` name.
    pub(super) fn open_sources(&self, recipe_folder: &Path) -> Result<Vec<Named>> {
        let mut named = match (&self.path, self.sources.as_slice()) {
            (Some(path), []) => vec![named(None, open_path(path, recipe_folder)?)],
            (None, []) => {
                return Err(Error::input("data", "there is no data: neither `path` nor `sources` is set")
                    .fix("set data.path to a file or folder of text"));
            }
            (Some(_), _) => return Err(Error::input("data", "both `path` and `sources` are set").fix("keep one of them")),
            (None, sources) => sources.iter().map(|source| source.open(&self.tokenizer, recipe_folder)).collect::<Result<_>>()?,
        };
        let weighted = named.iter().filter(|source| source.weight.is_some()).count();
        if weighted != 0 && weighted != named.len() {
            return Err(
                Error::input("data.sources", "some sources have a weight and some have none").fix("give every source a weight, or none")
            );
        }
        if let Some(bad) = named.iter().find(|source| source.weight.is_some_and(|weight| !weight.is_finite() || weight <= 0.0)) {
            return Err(
                Error::input("data.sources", format!("the weight of {} is not a number above 0", bad.name)).fix("give a positive number")
            );
        }
        for at in 1..named.len() {
            if named[..at].iter().any(|other| other.name == named[at].name) {
                named[at].name = format!("{}-{at}", named[at].name);
            }
        }
        Ok(named)
    }

    /// The separate source of held-out documents, where there is one.
    pub(super) fn open_validation(&self, recipe_folder: &Path) -> Result<Option<Named>> {
        match &self.validation {
            Validation::Path(path) => Ok(Some(named(None, open_path(path, recipe_folder)?))),
            Validation::None | Validation::Every(_) | Validation::Tail(_) => Ok(None),
        }
    }

    /// Refuses values out of range.
    pub fn check(&self) -> Result<()> {
        match self.validation {
            Validation::Every(every) if every < 2 => {
                Err(Error::input("data.validation.every", format!("{every} would hold out everything"))
                    .fix("hold out every 20th document or so"))
            }
            Validation::Tail(tail) if !(tail > 0.0 && tail < 1.0) => {
                Err(Error::input("data.validation.tail", format!("{tail} is not between 0 and 1")).fix("0.05 holds out the last twentieth"))
            }
            _ if !(1..=1024).contains(&self.prefetch) => {
                Err(Error::input("data.prefetch", format!("{} is outside 1 to 1024", self.prefetch)).fix("4 is enough for most machines"))
            }
            _ => Ok(()),
        }
    }
}

impl SourceConfig {
    /// Its share of the training tokens relative to the others, where it has one.
    pub fn weight(&self) -> Option<f64> {
        match self {
            Self::Builtin(config) => config.weight,
            Self::Text(config) => config.weight,
            Self::Jsonl(config) => config.weight,
            Self::Chat(config) => config.weight,
        }
    }

    /// Gives it another share.
    pub fn set_weight(&mut self, weight: f64) {
        let own = match self {
            Self::Builtin(config) => &mut config.weight,
            Self::Text(config) => &mut config.weight,
            Self::Jsonl(config) => &mut config.weight,
            Self::Chat(config) => &mut config.weight,
        };
        *own = Some(weight);
    }

    fn open(&self, tokenizer: &TokenizerConfig, recipe_folder: &Path) -> Result<Named> {
        match self {
            Self::Builtin(config) => {
                config.check()?;
                Ok(named(config.weight, Box::new(config.clone())))
            }
            Self::Text(config) => {
                let layout = match config.separator.as_deref() {
                    Some("") => {
                        return Err(Error::input("data.sources text.separator", "an empty separator separates nothing")
                            .fix("leave it out: each file is then one document"));
                    }
                    Some(separator) => Layout::Separated(separator.into()),
                    None => Layout::Whole,
                };
                Ok(named(config.weight, Box::new(Files::new(&find(&config.path, recipe_folder)?, &[("txt", layout)])?)))
            }
            Self::Jsonl(config) => {
                let layout = Layout::Lines(config.field.clone());
                Ok(named(config.weight, Box::new(Files::new(&find(&config.path, recipe_folder)?, &[("jsonl", layout)])?)))
            }
            Self::Chat(config) => {
                let chat = config.open(tokenizer, recipe_folder)?;
                Ok(Named { chat: Some(chat.clone()), ..named(config.weight, Box::new(chat)) })
            }
        }
    }
}

fn named(weight: Option<f64>, source: Box<dyn Source>) -> Named {
    let letters = source
        .name()
        .chars()
        .map(|letter| if letter.is_alphanumeric() || "-_.".contains(letter) { letter } else { '-' })
        .take(60)
        .collect();
    Named { name: letters, weight, source, chat: None }
}

fn open_path(path: &Path, recipe_folder: &Path) -> Result<Box<dyn Source>> {
    let layouts = [("txt", Layout::Separated(super::tokenizer::END_OF_TEXT.into())), ("jsonl", Layout::Lines(text_field()))];
    Ok(Box::new(Files::new(&find(path, recipe_folder)?, &layouts)?.only_with_field()))
}

/// `path` from the working directory or, where nothing is there, from the recipe's folder.
pub(crate) fn find(path: &Path, recipe_folder: &Path) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let beside = recipe_folder.join(path);
    if beside.exists() {
        return Ok(beside);
    }
    let place = match path.is_absolute() {
        true => String::new(),
        false if recipe_folder.as_os_str().is_empty() => " in the working directory".to_owned(),
        false => format!(" in the working directory or in {}", recipe_folder.display()),
    };
    Err(Error::file(path, format!("no such file or folder{place}"))
        .fix("correct the path in the recipe, or give another with --set data.path=..."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_read_well() {
        let config: Config = toml::from_str(
            r#"
            tokenizer.bpe = { vocab = 4096 }
            validation.tail = 0.1
            order = "crops"
            sources = [
              { builtin = { documents = 100, weight = 1.0 } },
              { text = { path = "a.txt", weight = 2.0 } },
              { jsonl = { path = "b.jsonl", weight = 0.5 } },
            ]
            "#,
        )
        .unwrap();
        assert_eq!(config.tokenizer, TokenizerConfig::Bpe(BpeConfig { vocab: 4096, sample_bytes: 64 << 20 }));
        assert_eq!((config.validation.clone(), config.order, config.sources.len()), (Validation::Tail(0.1), Order::Crops, 3));
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
        let character: Config = toml::from_str("tokenizer = \"character\"\nvalidation = \"none\"\npath = \"x\"").unwrap();
        assert_eq!((character.tokenizer, character.validation), (TokenizerConfig::Character, Validation::None));
        for wrong in ["pth = 1", "sources = [{ text = { path = \"a\", wieght = 1 } }]", "tokenizer = \"words\"", "validation.every = -1"] {
            assert!(toml::from_str::<Config>(wrong).is_err(), "{wrong}");
        }
    }

    fn refusal(text: &str) -> String {
        let config: Config = toml::from_str(text).unwrap();
        config.check().and_then(|()| config.open_sources(Path::new("/nonexistent")).map(|_| ())).unwrap_err().to_string()
    }

    #[test]
    fn mistakes_are_named() {
        assert!(refusal("").contains("there is no data"));
        assert!(refusal("path = \"x\"\nsources = [{ builtin = {} }]").contains("both `path` and `sources`"));
        assert!(refusal("path = \"x\"").contains("x: no such file"));
        assert!(refusal("sources = [{ builtin = { weight = 1.0 } }, { builtin = {} }]").contains("some have none"));
        assert!(refusal("sources = [{ builtin = { weight = -1.0 } }]").contains("above 0"));
        assert!(refusal("validation.tail = 1.5\nsources = [{ builtin = {} }]").contains("between 0 and 1"));
        assert!(refusal("validation.every = 1\nsources = [{ builtin = {} }]").contains("hold out everything"));
    }

    #[test]
    fn equal_names_are_told_apart() {
        let config: Config = toml::from_str("sources = [{ builtin = {} }, { builtin = { seed = 1 } }]").unwrap();
        let names: Vec<String> = config.open_sources(Path::new(".")).unwrap().into_iter().map(|source| source.name).collect();
        assert_eq!(names, ["builtin", "builtin-1"]);
    }
}
