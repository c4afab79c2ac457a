//! Text and overrides to a typed recipe, and back.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::de::{DeTable, Deserializer};

use super::{explain, overrides};
use crate::error::{Error, Result};

/// No recipe is larger; a model or data file given by mistake is refused before it is read.
const MAX_RECIPE_BYTES: u64 = 4 << 20;

/// Reads the recipe at `path` and applies `overrides` (`a.b=c` each, later ones win).
///
/// # Errors
/// The file cannot be read or is no TOML; a key is unknown, missing, or has a value of the wrong type. The place is `file:line:column`, or
/// `--set a.b=c` when the flag is at fault; the hint names the nearest valid key.
pub fn load<T: DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T> {
    let size = fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > MAX_RECIPE_BYTES {
        return Err(
            Error::file(path, format!("is {size} bytes, too large for a recipe")).fix("give a TOML recipe such as recipes/quickstart.toml")
        );
    }
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::file(path, format!("is not UTF-8 text (byte {at})")).fix("give a TOML recipe saved as UTF-8")
    })?;
    parse(&path.display().to_string(), &text, overrides)
}

/// As [`load`], for a text that is called `name` in errors.
pub fn parse<T: DeserializeOwned>(name: &str, text: &str, overrides: &[String]) -> Result<T> {
    let origin = Origin { name, text, overrides };
    // An editor's byte order mark is blanked so that spans still count bytes of `text`.
    let unmarked = text.strip_prefix('\u{feff}').map(|rest| format!("   {rest}"));
    let source = unmarked.as_deref().unwrap_or(text);
    let mut root = DeTable::parse(source).map_err(|error| origin.syntax(&error))?;
    for (index, flag) in overrides.iter().enumerate() {
        overrides::apply(root.get_mut(), flag, origin.flag_span(index))?;
    }
    T::deserialize(Deserializer::from(root)).map_err(|error| origin.typed::<T>(&error))
}

/// The recipe as TOML, every key resolved.
///
/// # Errors
/// A value TOML cannot hold: an integer above 2^63 - 1.
pub fn to_toml<T: Serialize>(recipe: &T) -> Result<String> {
    toml::to_string(recipe).map_err(|error| Error::input("recipe", error).fix("TOML integers end at 9223372036854775807"))
}

/// Where spans come from: the file's text, then one position per override.
struct Origin<'a> {
    name: &'a str,
    text: &'a str,
    overrides: &'a [String],
}

impl Origin<'_> {
    /// Position of the override numbered `index`: beyond the text and beyond the empty span at its end.
    fn flag_span(&self, index: usize) -> Range<usize> {
        let start = self.text.len() + 1 + index;
        start..start + 1
    }

    fn place(&self, span: Option<Range<usize>>) -> String {
        let Some(span) = span else { return self.name.to_owned() };
        if let Some(flag) = span.start.checked_sub(self.text.len() + 1).and_then(|index| self.overrides.get(index)) {
            return overrides::place(flag);
        }
        let (line, column) = line_and_column(self.text, span.start);
        format!("{}:{line}:{column}", self.name)
    }

    fn syntax(&self, error: &toml::de::Error) -> Error {
        Error::input(self.place(error.span()), error.message().replace('\n', ", ")).fix("see https://toml.io for the syntax of recipes")
    }

    fn typed<T: DeserializeOwned>(&self, error: &toml::de::Error) -> Error {
        let explained = explain::explain::<T>(error);
        let place = Error::input(self.place(error.span()), explained.cause);
        match explained.fix {
            Some(fix) => place.fix(fix),
            None => place,
        }
    }
}

/// Line and column, both from 1, columns in characters, of byte `at`.
fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..at.min(text.len())];
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    (line, String::from_utf8_lossy(&before[start..]).chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        run: super::super::run::Config,
        #[serde(default)]
        optim: Optim,
        #[serde(default)]
        source: Vec<Source>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Optim {
        rule: Rule,
        learning_rate: f64,
        steps: usize,
        betas: (f64, f64),
        fused: bool,
    }

    impl Default for Optim {
        fn default() -> Self {
            Self { rule: Rule::AdamW, learning_rate: 1e-3, steps: 10, betas: (0.9, 0.95), fused: true }
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Rule {
        AdamW,
        Muon { momentum: f64 },
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Source {
        path: String,
        weight: f64,
    }

    fn read(text: &str, flags: &[&str]) -> Result<Recipe> {
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        parse("r.toml", text, &flags)
    }

    /// The error's message and hint on one line.
    fn refusal(text: &str, flags: &[&str]) -> String {
        let error = read(text, flags).expect_err("must be refused");
        format!("{error} | {}", error.hint().unwrap_or_default())
    }

    const GOOD: &str = "[run]\ndir = 'out'\n";

    #[test]
    fn overrides_change_the_typed_recipe() {
        let recipe =
            read(GOOD, &["optim.steps=3", "run.dir=a/b", "optim.rule.muon.momentum=0.9", "optim.betas=[0.8, 0.9]"]).expect("valid");
        assert_eq!(recipe.run.dir, "a/b");
        assert_eq!(recipe.optim, Optim { steps: 3, rule: Rule::Muon { momentum: 0.9 }, betas: (0.8, 0.9), ..Optim::default() });
    }

    #[test]
    fn the_resolved_recipe_reads_back_the_same() {
        let recipe =
            read(&format!("{GOOD}[[source]]\npath='p'\nweight=2\n"), &["optim.rule.muon.momentum=0.1", "run.seed=9"]).expect("valid");
        let printed = to_toml(&recipe).expect("prints");
        assert_eq!(read(&printed, &[]).expect("reads back"), recipe, "{printed}");
        assert_eq!(to_toml(&read(&printed, &[]).expect("reads back")).expect("prints"), printed);
    }

    #[test]
    fn unknown_keys_name_line_and_nearest_key() {
        let message = refusal(&format!("{GOOD}[optim]\n  lerning_rate = 1\n"), &[]);
        assert_eq!(message, "r.toml:4:3: unknown key `optim.lerning_rate` | did you mean `learning_rate`?");
        let message = refusal(&format!("{GOOD}[optimm]\nsteps = 1\n"), &[]);
        assert_eq!(message, "r.toml:3:2: unknown key `optimm` | did you mean `optim`?");
        let message = refusal(&format!("{GOOD}zzzz = 1\n"), &[]);
        assert_eq!(message, "r.toml:3:1: unknown key `run.zzzz` | valid keys here: dir, seed, threads");
        let message = refusal(&format!("{GOOD}[[source]]\npath='x'\nwieght=1\n"), &[]);
        assert_eq!(message, "r.toml:5:1: unknown key `source.wieght` | did you mean `weight`?");
    }

    #[test]
    fn a_key_in_the_wrong_table_is_told_its_table() {
        assert_eq!(refusal(&format!("{GOOD}steps = 5\n"), &[]), "r.toml:3:1: unknown key `run.steps` | did you mean `optim.steps`?");
        assert_eq!(refusal(GOOD, &["betas=[1, 1]"]), "--set betas=[1, 1]: unknown key `betas` | did you mean `optim.betas`?");
    }

    #[test]
    fn wrong_types_say_what_was_expected_and_found() {
        let message = refusal(&format!("{GOOD}[optim]\nsteps = 'ten'\n"), &[]);
        assert_eq!(
            message,
            "r.toml:4:9: `optim.steps` is the string \"ten\", expected a whole number that is not negative | give a whole number that is not negative"
        );
        let message = refusal(&format!("{GOOD}[optim]\nsteps = -1\n"), &[]);
        assert_eq!(
            message,
            "r.toml:4:9: `optim.steps` is the integer -1, expected a whole number that is not negative | give a whole number that is not negative"
        );
        let message = refusal(GOOD, &["optim.fused=1"]);
        assert_eq!(message, "--set optim.fused=1: `optim.fused` is the integer 1, expected true or false | give true or false");
        let message = refusal(GOOD, &["optim=3"]);
        assert_eq!(message, "--set optim=3: `optim` is the integer 3, expected a table | give a table");
    }

    #[test]
    fn choices_and_missing_keys_are_explained() {
        let message = refusal(GOOD, &["optim.rule=adam"]);
        assert_eq!(message, "--set optim.rule=adam: `optim.rule` has no choice `adam` | did you mean `adamw`?");
        let message = refusal(GOOD, &["optim.rule=lion9"]);
        assert_eq!(message, "--set optim.rule=lion9: `optim.rule` has no choice `lion9` | choices: adamw, muon");
        let message = refusal("[optim]\nsteps = 1\n", &[]);
        assert_eq!(message, "r.toml:1:1: the key `run` is missing | add a table `[run]`, or a line `run = ...` at the top");
        let message = refusal("[run]\nseed = 1\n", &[]);
        assert_eq!(message, "r.toml:1:1: the key `run.dir` is missing | add `dir = ...` under `[run]`");
    }

    #[test]
    fn syntax_errors_and_bad_files_are_refused_without_a_panic() {
        assert!(refusal("[run\ndir = 1", &[]).starts_with("r.toml:1:5: "), "{}", refusal("[run\ndir = 1", &[]));
        assert!(refusal("[run]\ndir = 'a'\ndir = 'b'\n", &[]).starts_with("r.toml:3:1: duplicate key"));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("r.toml");
        let missing = load::<Recipe>(&path, &[]).expect_err("missing").to_string();
        assert!(missing.contains("r.toml: cannot read"), "{missing}");
        fs::write(&path, [b'a', 0xff]).expect("writes");
        assert!(load::<Recipe>(&path, &[]).expect_err("not text").to_string().contains("not UTF-8 text (byte 1)"));
        fs::write(&path, "\u{feff}[run]\ndir = 'x'\nbad = 1\n").expect("writes");
        let message = load::<Recipe>(&path, &[]).expect_err("unknown key").to_string();
        assert!(message.contains("r.toml:3:1: unknown key `run.bad`"), "{message}");
        assert!(load::<Recipe>(folder.path(), &[]).is_err());
    }

    #[test]
    fn absurd_nesting_is_refused_without_overflowing_the_stack() {
        let deep = "a.".repeat(300_000) + "a";
        assert!(read(&format!("{deep} = 1"), &[]).is_err());
        assert!(read(&format!("[{deep}]"), &[]).is_err());
        assert!(read(GOOD, &[&format!("{deep}=1")]).is_err());
        let brackets = format!("run = {}", "[".repeat(300_000));
        assert!(read(&brackets, &[]).is_err());
        assert!(read(GOOD, &[&brackets.replace(" = ", "=")]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_and_no_flag_panics(text in "[\\[\\]a-c.=\"'\n{}, 0-9é#-]{0,40}", flag in "[a-c.=\"\n{}\\[\\], 0-9-]{0,20}") {
            let _ = read(&text, &[&flag]);
            let _ = read(&format!("{GOOD}{text}"), &[&flag, "optim.steps=1"]);
        }
    }
}
