//! Recall over long texts, in two forms that end in the same questions:
//!
//! ```text
//! needles:  ... the bag was open Remember: bakar 42. and the kite was ...
//!           Asked: bakar 42;
//! lists:    - bakar 42: bees hummed over the clover, snow lay smooth on every wall.
//!           - dolin 17: bees hummed over the clover, snow lay smooth on every wall.
//!           Asked: dolin 17; bakar 42;
//! ```
//!
//! Names are made of two syllables and occur nowhere else, so an answer can only come from its one place.

use super::Config;
use super::grammar::{Grammar, grammar};
use super::skills::{Probe, Skill, Spot};
use crate::data::random::Random;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const FIRST: [&str; 12] = ["ba", "bo", "da", "fa", "ga", "go", "ka", "ke", "mu", "pe", "ta", "vo"];
const SECOND: [&str; 8] = ["bex", "dun", "gorn", "lin", "pik", "rud", "vok", "zor"];

/// Facts in a document of needles, at most.
const MOST_FACTS: u64 = 8;

/// What a line of a list takes together with its question, when it has no remark.
const LINE_BYTES: usize = 21;

/// A list of fewer bytes has no remarks: looking things up is learned from many short lists.
const SHORT: usize = 250;

/// What a line of a list that is asked about takes, in the unit of the probes: room for a remark of some length.
const LINE_LENGTH: usize = 48;

/// What is to be remembered: a name and its number of two digits.
#[derive(Clone)]
struct Fact {
    name: String,
    number: u64,
}

impl Fact {
    fn needle(&self) -> String {
        format!("Remember: {} {}.", self.name, self.number)
    }

    /// The name follows a blank, as it does where it is asked for: most tokenizers make another token of a word that does not.
    fn line(&self, remark: &str) -> String {
        format!("- {} {}{remark}.\n", self.name, self.number)
    }
}

/// `count` facts about different names, fewer when there are no more names.
fn facts(count: usize, random: &mut Random) -> Vec<Fact> {
    let names: Vec<String> = FIRST.iter().flat_map(|first| SECOND.iter().map(move |second| format!("{first}{second}"))).collect();
    random.sample(&names, count).into_iter().map(|name| Fact { name, number: 10 + random.below(90) }).collect()
}

/// What takes room in every line of one list: clauses that together are at most `length` long.
fn remark(length: usize, measure: &mut dyn FnMut(&str) -> usize, random: &mut Random) -> String {
    let mut text = String::new();
    loop {
        let clause = grammar().line(if random.below(2) == 0 { "{place.sight}" } else { "{time.sky}" }, random);
        let longer = format!("{text}{} {clause}", if text.is_empty() { ":" } else { "," });
        if measure(&longer) > length {
            return text;
        }
        text = longer;
    }
}

fn asked<'f>(facts: impl IntoIterator<Item = &'f Fact>) -> String {
    facts.into_iter().fold("Asked:".to_owned(), |mut text, fact| {
        write!(text, " {} {};", fact.name, fact.number).expect("writing to a string cannot fail");
        text
    })
}

/// Endless words of stories.
struct Words<'a> {
    random: &'a mut Random,
    grammar: &'static Grammar,
    waiting: Vec<String>,
}

impl<'a> Words<'a> {
    fn new(random: &'a mut Random) -> Self {
        Self { random, grammar: grammar(), waiting: vec![] }
    }

    fn next(&mut self) -> String {
        loop {
            if let Some(word) = self.waiting.pop() {
                return word;
            }
            let story = self.grammar.story(self.random);
            self.waiting = story.split_whitespace().rev().map(str::to_owned).collect();
        }
    }
}

/// A document of about `bytes` bytes that hides facts between words and then asks for all of them.
pub(super) fn needles(bytes: usize, random: &mut Random) -> String {
    let mut facts = facts(1 + random.below(MOST_FACTS.min(1 + bytes as u64 / 128)) as usize, random);
    let room = bytes.saturating_sub(facts.len() * 36);
    let mut places: Vec<usize> = facts.iter().map(|_| random.below(room as u64 + 1) as usize).collect();
    places.sort_unstable();
    let mut text = String::with_capacity(bytes + 64);
    let mut filler = 0;
    let hidden: Vec<String> = facts.iter().map(Fact::needle).collect();
    let mut words = Words::new(random);
    for (place, needle) in places.into_iter().chain([room]).zip(hidden.into_iter().map(Some).chain([None])) {
        while filler < place {
            let word = words.next();
            filler += word.len() + 1;
            push(&mut text, &word);
        }
        if let Some(needle) = needle {
            push(&mut text, &needle);
        }
    }
    random.shuffle(&mut facts);
    text + "\n" + &asked(&facts)
}

/// A document of about `bytes` bytes with a list and a question about each of its lines: half of the time as many lines as find room, or
/// else fewer, with remarks unless it is short, which stretch the way from an answer to its question.
pub(super) fn list(bytes: usize, random: &mut Random) -> String {
    let most = (bytes / LINE_BYTES).clamp(2, FIRST.len() * SECOND.len());
    let full = random.below(2) == 0;
    let lines = if full { most } else { (between(2.0, (most + 1) as f64, random) as usize).min(most) };
    let mut facts = facts(lines, random);
    let room = if full || bytes < SHORT { 0 } else { (bytes / lines).saturating_sub(LINE_BYTES) };
    let remark = remark(room, &mut str::len, random);
    let text: String = facts.iter().map(|fact| fact.line(&remark)).collect();
    random.shuffle(&mut facts);
    text + &asked(&facts)
}

fn push(text: &mut String, words: &str) {
    if !text.is_empty() {
        text.push(' ');
    }
    *text += words;
}

/// Questions about long texts. For each of `lengths` there are `count` texts of each form, and each is asked once for what lies at each
/// of `depths`: successive probes share all but their ends. `measure` gives the length of a text, in tokens or bytes; a prompt with its
/// answer is at most as long as asked for.
///
/// At depth d of a text that without the needle is T long, exactly round(d T) of it stands before the needle, as far as whole words
/// allow; in a list of n lines it is line round(d (n - 1)).
pub fn long_probes(seed: u64, count: usize, lengths: &[usize], depths: &[f64], measure: &dyn Fn(&str) -> usize) -> Vec<Probe> {
    let mut ruler = Ruler { measure, known: BTreeMap::new() };
    let mut probes = vec![];
    for &length in lengths {
        for (skill, name) in [(Skill::Needle, "needle"), (Skill::Pair, "pair")] {
            for index in 0..count {
                let random = &mut Random::new(seed, &format!("long {name} {length}"), index as u64);
                let (text, facts) = match skill {
                    Skill::Needle => haystack(length, depths, &mut ruler, random),
                    _ => lines(length, depths, &mut ruler, random),
                };
                let questions = facts.into_iter().zip(depths);
                probes.extend(questions.map(|(fact, &depth)| Probe {
                    skill,
                    prompt: format!("{text}\nAsked: {}", fact.name),
                    answer: format!(" {}", fact.number),
                    spot: Some(Spot { length, depth }),
                }));
            }
        }
    }
    probes
}

/// Lengths of words, measured once.
struct Ruler<'m> {
    measure: &'m dyn Fn(&str) -> usize,
    known: BTreeMap<String, usize>,
}

impl Ruler<'_> {
    fn of(&mut self, text: &str) -> usize {
        if let Some(&length) = self.known.get(text) {
            return length;
        }
        let length = (self.measure)(text);
        self.known.insert(text.to_owned(), length);
        length
    }

    /// What the longest question with its answer takes, with room for a token that begins the text.
    fn question(&mut self) -> usize {
        FIRST.iter().zip(SECOND.iter().cycle()).map(|(first, second)| self.of(&format!("\nAsked: {first}{second} 42;"))).max().unwrap_or(0)
            + 2
    }
}

/// Words that were too long for what was left before a gap is accepted.
const PATIENCE: usize = 200;

fn haystack(length: usize, depths: &[f64], ruler: &mut Ruler<'_>, random: &mut Random) -> (String, Vec<Fact>) {
    let facts = facts(depths.len(), random);
    let whole = length.saturating_sub(ruler.question());
    let mut order: Vec<usize> = (0..facts.len()).collect();
    order.sort_by(|&a, &b| depths[a].total_cmp(&depths[b]));
    let mut words = Words::new(random);
    let (mut text, mut at) = (String::new(), 0);
    for &index in &order {
        let needle = facts[index].needle();
        let own = ruler.of(&format!(" {needle}"));
        let place = (depths[index] * whole.saturating_sub(own) as f64).round() as usize;
        at += fill(&mut text, place.saturating_sub(at), ruler, &mut words);
        at += ruler.of(&if text.is_empty() { needle.clone() } else { format!(" {needle}") });
        push(&mut text, &needle);
    }
    fill(&mut text, whole.saturating_sub(at), ruler, &mut words);
    (text, facts)
}

/// Appends words that are together `room` long; returns how long they are.
fn fill(text: &mut String, room: usize, ruler: &mut Ruler<'_>, words: &mut Words<'_>) -> usize {
    let (mut filled, mut refused) = (0, 0);
    while filled < room && refused < PATIENCE {
        let word = words.next();
        let length = ruler.of(&if text.is_empty() { word.clone() } else { format!(" {word}") });
        if filled + length > room {
            refused += 1;
            continue;
        }
        push(text, &word);
        filled += length;
    }
    filled
}

/// The longest of so many remarks that fit is taken, for a text that is about as long as asked for.
const DRAWS: usize = 16;

fn lines(length: usize, depths: &[f64], ruler: &mut Ruler<'_>, random: &mut Random) -> (String, Vec<Fact>) {
    let whole = length.saturating_sub(ruler.question());
    let all = facts(usize::MAX, random);
    let room = (whole / (whole / LINE_LENGTH).clamp(2, all.len())).saturating_sub(ruler.of(&all[0].line("")));
    let draws = (0..DRAWS).map(|_| remark(room, &mut |text| (ruler.measure)(text), random));
    let remark = draws.max_by_key(String::len).unwrap_or_default();
    let (mut text, mut at, mut used) = (String::new(), 0, 0);
    for fact in &all {
        let line = fact.line(&remark);
        let own = (ruler.measure)(&line);
        if used >= 2 && at + own > whole {
            break;
        }
        (at, used) = (at + own, used + 1);
        text += &line;
    }
    let facts = depths.iter().map(|depth| all[(depth * (used - 1) as f64).round() as usize].clone()).collect();
    (text.trim_end().to_owned(), facts)
}

/// The length of a document in bytes.
pub(super) fn length(config: &Config, random: &mut Random) -> usize {
    between(config.shortest as f64, config.longest as f64, random) as usize
}

/// A number from `low` to `high`, drawn so that every doubling is as likely.
fn between(low: f64, high: f64, random: &mut Random) -> f64 {
    (low.ln() + random.unit() * (high.ln() - low.ln())).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::Tokenizer;

    const DEPTHS: [f64; 5] = [0.0, 0.3, 0.5, 0.77, 1.0];

    fn fact_of(probe: &Probe) -> (String, String) {
        let (_, name) = probe.prompt.rsplit_once("\nAsked: ").unwrap();
        (name.to_owned(), format!("{name}{}", probe.answer))
    }

    #[test]
    fn a_needle_lies_once_and_exactly_where_it_should() {
        let config = Config { needles: 1.0, ..Config::default() };
        let texts: Vec<String> = (0..300).map(|index| config.document(index)).collect();
        let bpe = Tokenizer::train_bpe(&texts, 1500).unwrap();
        let tokens = |text: &str| bpe.encode(text).unwrap().len();
        for (measure, slack, lengths) in [(&str::len as &dyn Fn(&str) -> usize, 2, [600, 5000]), (&tokens, 0, [200, 1500])] {
            for probe in long_probes(3, 3, &lengths, &DEPTHS, measure).iter().filter(|probe| probe.skill == Skill::Needle) {
                let spot = probe.spot.unwrap();
                let (_, fact) = fact_of(probe);
                let needle = format!("Remember: {fact}.");
                assert_eq!(probe.prompt.matches(&fact).count(), 1);
                let (before, _) = probe.prompt.split_once(&needle).unwrap();
                let (hay, _) = probe.prompt.rsplit_once("\nAsked").unwrap();
                let (before, hay) = (measure(before.trim_end()), measure(hay));
                let own = measure(&format!(" {needle}"));
                let expected = (spot.depth * (hay - own) as f64).round();
                assert!((before as f64 - expected).abs() <= slack as f64 + 1e-9, "{spot:?}: {before} of {hay}, {expected}");
                let whole = measure(&format!("{}{}", probe.prompt, probe.answer));
                assert!(whole <= spot.length && whole + 12 > spot.length, "{spot:?}: {whole}");
            }
        }
    }

    #[test]
    fn a_pair_stands_once_in_the_line_of_its_depth() {
        for probe in long_probes(3, 3, &[500, 9000], &DEPTHS, &str::len).iter().filter(|probe| probe.skill == Skill::Pair) {
            let spot = probe.spot.unwrap();
            let (name, fact) = fact_of(probe);
            let (list, _) = probe.prompt.rsplit_once("\nAsked").unwrap();
            let lines: Vec<&str> = list.lines().collect();
            let line = lines.iter().position(|line| line.starts_with(&format!("- {fact}"))).unwrap();
            assert_eq!(line, (spot.depth * (lines.len() - 1) as f64).round() as usize);
            assert_eq!(list.matches(&name).count(), 1);
            assert!(probe.prompt.len() < spot.length && 10 * probe.prompt.len() > 7 * spot.length, "{spot:?}: {}", probe.prompt.len());
        }
    }

    #[test]
    fn documents_answer_their_own_questions_and_keep_to_the_length() {
        let config = Config { stories: 0.0, recall: 0.0, copying: 0.0, sums: 0.0, needles: 1.0, lists: 1.0, ..Config::default() };
        let (mut shortest, mut longest) = (usize::MAX, 0);
        for index in 0..400 {
            let text = config.document(index);
            let (body, questions) = text.rsplit_once("\nAsked:").unwrap();
            let questions: Vec<&str> = questions.split_terminator(';').map(str::trim).collect();
            assert!(questions.iter().all(|fact| body.matches(fact).count() == 1), "{text}");
            assert!(text.len() < config.longest + 100, "{}", text.len());
            (shortest, longest) = (shortest.min(text.len()), longest.max(text.len()));
        }
        assert!(shortest < 2 * config.shortest && longest > config.longest / 2, "{shortest} to {longest}");
    }

    #[test]
    fn the_same_seed_asks_the_same_questions() {
        let ask = |seed| long_probes(seed, 2, &[800], &DEPTHS, &str::len);
        assert_eq!(ask(1), ask(1));
        assert_ne!(ask(1), ask(2));
        assert_eq!(ask(1).len(), 20);
    }
}
