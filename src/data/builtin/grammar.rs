//! The context-free grammar behind the stories, with variables that hold for a whole story (see `data/grammar.toml`).

use crate::data::random::Random;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::OnceLock;

pub(super) const SOURCE: &str = include_str!("../../../data/grammar.toml");

type Entry = BTreeMap<String, String>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Grammar {
    variables: BTreeMap<String, String>,
    forms: BTreeMap<String, Entry>,
    lexicon: BTreeMap<String, Vec<Entry>>,
    rules: BTreeMap<String, Vec<String>>,
    pub(super) words: Words,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Words {
    pub(super) nouns: Vec<String>,
}

/// The grammar compiled into the program.
pub(super) fn grammar() -> &'static Grammar {
    static GRAMMAR: OnceLock<Grammar> = OnceLock::new();
    GRAMMAR.get_or_init(|| toml::from_str(SOURCE).expect("data/grammar.toml is read by a test"))
}

impl Grammar {
    /// One story.
    pub(super) fn story(&self, random: &mut Random) -> String {
        self.line("{story}", random)
    }

    /// `template` with its slots filled.
    pub(super) fn line(&self, template: &str, random: &mut Random) -> String {
        Story { grammar: self, random, chosen: BTreeMap::new() }.expand(template)
    }

    /// The field `field` of the lexicon entry `entry`, unexpanded.
    fn field(&self, entry: &Entry, field: &str) -> Option<String> {
        let lent = || self.forms.get(entry.get("like")?)?.get(field).cloned();
        let article = || (field == "a").then(|| with_article(&entry["name"]));
        entry.get(field).cloned().or_else(lent).or_else(article)
    }
}

struct Story<'a> {
    grammar: &'a Grammar,
    random: &'a mut Random,
    /// Variable to the index of its entry.
    chosen: BTreeMap<&'a str, usize>,
}

impl<'a> Story<'a> {
    fn expand(&mut self, template: &str) -> String {
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, tail) = after.split_once('}').expect("every slot of the grammar is closed");
            text += before;
            text += &self.fill(slot);
            rest = tail;
        }
        text + rest
    }

    fn fill(&mut self, slot: &str) -> String {
        let grammar = self.grammar;
        let name = slot.to_lowercase();
        let filled = if let Some(lines) = grammar.rules.get(&name) {
            let line = self.random.pick(lines);
            self.expand(line)
        } else {
            let (variable, field) = name.split_once('.').unwrap_or((&name, "name"));
            let value = grammar.field(self.entry(variable), field).expect("every slot of the grammar names a rule or a field");
            self.expand(&value)
        };
        if slot.starts_with(char::is_uppercase) { capital(&filled) } else { filled }
    }

    fn entry(&mut self, variable: &str) -> &'a Entry {
        let (variable, lexicon) = self.grammar.variables.get_key_value(variable).expect("every slot of the grammar names a variable");
        let entries = &self.grammar.lexicon[lexicon];
        if let Some(&index) = self.chosen.get(variable.as_str()) {
            return &entries[index];
        }
        let taken = |index: &usize| self.chosen.iter().any(|(other, chosen)| self.grammar.variables[*other] == *lexicon && chosen == index);
        let free: Vec<usize> = (0..entries.len()).filter(|index| !taken(index)).collect();
        let index = *self.random.pick(&free);
        self.chosen.insert(variable, index);
        &entries[index]
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

fn with_article(name: &str) -> String {
    let article = if name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_resolves_for_every_entry() {
        let grammar = grammar();
        let fields = grammar.lexicon.values().flatten().flat_map(BTreeMap::values);
        for template in grammar.rules.values().flatten().chain(fields) {
            assert_eq!(template.matches('{').count(), template.matches('}').count(), "{template}");
            for slot in template.split('{').skip(1).map(|part| part.split_once('}').unwrap().0.to_lowercase()) {
                if grammar.rules.contains_key(&slot) {
                    continue;
                }
                let (variable, field) = slot.split_once('.').unwrap_or((&slot, "name"));
                let lexicon = grammar.variables.get(variable).unwrap_or_else(|| panic!("{slot} in {template}"));
                assert!(grammar.lexicon[lexicon].iter().all(|entry| grammar.field(entry, field).is_some()), "{slot} in {template}");
            }
        }
    }

    #[test]
    fn stories_agree_with_themselves() {
        for index in 0..500 {
            let story = grammar().story(&mut Random::new(0, "test", index));
            assert!(!story.contains(['{', '}', '_']), "{story}");
            assert!(story.len() > 200 && story.len() < 2500, "{story}");
            assert!(story.split('\n').count() == 3, "{story}");
            let people = grammar().lexicon["person"]
                .iter()
                .filter(|person| story.split(|letter: char| !letter.is_alphabetic()).any(|word| word == person["name"]))
                .count();
            assert!((1..=2).contains(&people), "{people} people: {story}");
        }
    }

    #[test]
    fn articles() {
        assert_eq!((with_article("owl"), with_article("fox")), ("an owl".into(), "a fox".into()));
    }
}
