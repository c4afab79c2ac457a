//! Which part of a rendered conversation is trained.
//!
//! Turns are found in the text, not assumed: a mark set after a turn's first character, or before its last one, must come out at one
//! place and change nothing else; that place is the turn's start or end. What `add_generation_prompt` adds tells where an answer begins
//! even when the template rewrites its beginning (hidden reasoning). A turn without a content (a tool call) ends where the conversation
//! up to it ends, or at the stop token that follows other answers. An answer is trained up to and with the special token that follows it, which is where generation will stop.

use super::records::{Conversation, Fault, Message, Speaker, fault};
use super::template::Template;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Range;

/// What is trained where turns say nothing themselves (`weight`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Train {
    /// What the assistant says, with the token that ends it.
    #[default]
    Answers,
    /// The same, of the last turn only.
    LastAnswer,
    /// Every token.
    Everything,
}

/// A stretch of text that counts in the loss.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    pub(super) range: Range<usize>,
    pub(super) weight: f32,
    /// The special token at its end.
    pub(super) stop: Option<String>,
}

/// A conversation as text; where spans overlap, the later one counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rendered {
    pub(super) text: String,
    pub(super) spans: Vec<Span>,
}

/// Renders conversations and finds their turns.
pub(super) struct Renderer<'t> {
    template: &'t Template,
    /// Special tokens at which generation may stop.
    stops: Vec<String>,
    /// What `add_generation_prompt` adds.
    invitation: String,
    train: Train,
}

/// Where a turn's content lies.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    start: Option<usize>,
    end: Option<usize>,
}

impl<'t> Renderer<'t> {
    pub(super) fn new(template: &'t Template, stops: Vec<String>, train: Train) -> Self {
        let probe = [json!({"role": "user", "content": "a"})];
        let render = |generation| template.render(&probe, &Value::Null, generation).unwrap_or_default();
        let invitation = render(true).strip_prefix(&render(false)).unwrap_or_default().to_owned();
        Self { template, stops, invitation, train }
    }

    /// The text of `conversation` and what of it is trained.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<Rendered, Fault> {
        let values: Vec<Value> = conversation.messages.iter().map(Message::value).collect();
        let failed = |what: String| {
            fault(format!("{} fails: {what}", self.template.name()), "correct the record, or choose a template that takes it")
        };
        let text = self.template.render(&values, &conversation.tools, false).map_err(failed)?;
        let turns = Turns { renderer: self, conversation, values: &values, text: &text };
        let spans = turns.spans()?;
        Ok(Rendered { text, spans })
    }

    /// The weight of a turn that says nothing itself; nothing where its text is trained with all the rest.
    fn default_weight(&self, speaker: Speaker, is_last: bool) -> Option<f32> {
        match self.train {
            Train::Everything => None,
            Train::Answers => Some(f32::from(u8::from(speaker == Speaker::Assistant))),
            Train::LastAnswer => Some(f32::from(u8::from(speaker == Speaker::Assistant && is_last))),
        }
    }

    /// The first stop token of `text`, with its place.
    fn first_stop(&self, text: &str) -> Option<(usize, &str)> {
        let found = self.stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at, stop.as_str())));
        found.min_by_key(|&(at, stop)| (at, usize::MAX - stop.len()))
    }

    fn last_stop(&self, text: &str) -> Option<(usize, &str)> {
        let found = self.stops.iter().filter_map(|stop| text.rfind(stop.as_str()).map(|at| (at, stop.as_str())));
        found.max_by_key(|&(at, stop)| (at + stop.len(), stop.len()))
    }

    fn untrained_stop(&self, turn: &str) -> Fault {
        fault(
            format!("after {turn} {} prints no special token: the model would never learn to stop", self.template.name()),
            "end answers with {{ eos_token }} in the template, choose another template, or give the tokenizer an end-of-sequence token",
        )
    }
}

/// The turns of one rendered conversation.
struct Turns<'a> {
    renderer: &'a Renderer<'a>,
    conversation: &'a Conversation,
    values: &'a [Value],
    text: &'a str,
}

impl Turns<'_> {
    fn spans(&self) -> Result<Vec<Span>, Fault> {
        let messages = &self.conversation.messages;
        let last = messages.len() - 1;
        let weights: Vec<Option<f32>> = messages
            .iter()
            .enumerate()
            .map(|(at, message)| message.weight.or_else(|| self.renderer.default_weight(message.speaker, at == last)))
            .collect();
        let mut spans = Vec::new();
        if self.renderer.train == Train::Everything {
            spans.push(self.everything()?);
        }
        if weights.iter().flatten().any(|&weight| weight > 0.0) || !spans.is_empty() && weights.iter().any(Option::is_some) {
            let places = self.places();
            for (at, weight) in weights.iter().enumerate() {
                // A weight of 0 says nothing new unless the rest is trained.
                if let Some(weight) = weight.filter(|&weight| weight > 0.0 || self.renderer.train == Train::Everything) {
                    spans.push(self.span(at, &places, weight)?);
                }
            }
        }
        if spans.iter().all(|span| span.weight == 0.0) {
            return Err(fault("no token of this record is trained", "give an assistant turn a weight above 0, or remove the record"));
        }
        Ok(spans)
    }

    fn everything(&self) -> Result<Span, Fault> {
        let body = self.text.trim_end();
        let stop = self.renderer.stops.iter().find(|stop| body.ends_with(stop.as_str()));
        match stop {
            Some(stop) => Ok(Span { range: 0..body.len(), weight: 1.0, stop: Some(stop.clone()) }),
            None => Err(self.renderer.untrained_stop("the last turn")),
        }
    }

    fn name(&self, at: usize) -> String {
        format!("turn {} ({})", at + 1, self.conversation.messages[at].role)
    }

    fn span(&self, at: usize, places: &[Place], weight: f32) -> Result<Span, Fault> {
        let is_answer = self.conversation.messages[at].speaker == Speaker::Assistant;
        let lost = || {
            fault(
                format!("{} cannot be split into turns: {} is not found in what it prints", self.renderer.template.name(), self.name(at)),
                "choose a template that prints every turn as it is, or train = \"everything\"",
            )
        };
        let before = places[..at].iter().rev().find_map(|place| place.end).unwrap_or(0);
        let start = self.start(at, before, &places[at], is_answer).ok_or_else(lost)?;
        let Some(end) = places[at].end else {
            let (end, stop) = match self.end_by_prefix(at, start, is_answer) {
                Some(found) => found?,
                None => self.end_by_neighbours(at, start, places).ok_or_else(lost)?,
            };
            if is_answer && self.text[start..end - stop.as_ref().map_or(0, String::len)].trim().is_empty() {
                let cause = format!("{} prints nothing of {}, which calls a tool", self.renderer.template.name(), self.name(at));
                return Err(fault(cause, "choose a template that prints tool calls, or remove the record"));
            }
            return Ok(Span { range: start..end, weight, stop });
        };
        let next = places[at + 1..].iter().find_map(|place| place.start).unwrap_or(self.text.len()).max(end);
        match self.renderer.first_stop(&self.text[end..next]) {
            Some((place, stop)) => Ok(Span { range: start..end + place + stop.len(), weight, stop: Some(stop.to_owned()) }),
            None if is_answer && weight > 0.0 => Err(self.renderer.untrained_stop(&self.name(at))),
            None => Ok(Span { range: start..end, weight, stop: None }),
        }
    }

    /// Where what `at` says begins: after the invitation, where the text has one between the turn before and this one.
    fn start(&self, at: usize, before: usize, place: &Place, is_answer: bool) -> Option<usize> {
        let limit = place.start.or(place.end).unwrap_or(self.text.len());
        let between = self.text.get(before..limit).filter(|_| is_answer).unwrap_or_default();
        let after = |invitation: &str| {
            let found = between.find(invitation).filter(|_| !invitation.is_empty());
            found.map(|found| before + found + invitation.len())
        };
        let invitation = self.renderer.invitation.as_str();
        // A template may print more white space where it invites an answer than where it shows one.
        let blanks = invitation[invitation.trim_end().len()..].char_indices().rev();
        let shorter = || blanks.map(|(at, _)| &invitation[..invitation.trim_end().len() + at]).find_map(after);
        // Without an invitation an answer begins where the prompt ends: a blank before it is the model's to say.
        let prompt = || {
            let prompt = self.rendered(&self.values[..at], is_answer)?;
            (self.text.starts_with(&prompt) && (before..=limit).contains(&prompt.len())).then_some(prompt.len())
        };
        match is_answer {
            true => after(invitation).or_else(prompt).or(place.start).or_else(shorter),
            false => place.start.or_else(prompt),
        }
    }

    /// The end of turn `at` from the conversation that ends with it, where the whole text begins with that: up to its last stop token.
    fn end_by_prefix(&self, at: usize, start: usize, is_answer: bool) -> Option<Result<(usize, Option<String>), Fault>> {
        let prefix = self.rendered(&self.values[..=at], false)?;
        let turn = prefix.get(start..).filter(|_| self.text.starts_with(&prefix))?;
        Some(match self.renderer.last_stop(turn) {
            Some((place, stop)) => Ok((start + place + stop.len(), Some(stop.to_owned()))),
            None if is_answer => Err(self.renderer.untrained_stop(&self.name(at))),
            None => Ok((prefix.len(), None)),
        })
    }

    /// The end of turn `at` where the text goes on otherwise than the conversation that ends with it: the stop token that follows other
    /// answers, before the next turn begins.
    fn end_by_neighbours(&self, at: usize, start: usize, places: &[Place]) -> Option<(usize, Option<String>)> {
        let next = places[at + 1..].iter().find_map(|place| place.start)?;
        let answers = self.conversation.messages.iter().zip(places).filter(|(message, _)| message.speaker == Speaker::Assistant);
        let end = answers.into_iter().find_map(|(_, place)| place.end)?;
        let (_, stop) = self.renderer.first_stop(&self.text[end..])?;
        let place = self.text.get(start..next)?.find(stop)?;
        Some((start + place + stop.len(), Some(stop.to_owned())))
    }

    fn rendered(&self, values: &[Value], generation: bool) -> Option<String> {
        self.renderer.template.render(values, &self.conversation.tools, generation).ok()
    }

    fn places(&self) -> Vec<Place> {
        let mark = ('\u{E100}'..'\u{F000}').find(|&mark| !self.text.contains(mark));
        let Some(mark) = mark else { return vec![Place::default(); self.values.len()] };
        let place = |at: usize| {
            let content = self.conversation.messages[at].content.as_str();
            let (head, tail) = (content.len() - content.trim_start().len(), content.trim_end().len());
            let first = content[head..].chars().next();
            let last = content[..tail].chars().next_back();
            let (Some(first), Some(last)) = (first, last) else { return Place::default() };
            let (inner_head, inner_tail) = (head + first.len_utf8(), tail - last.len_utf8());
            let start = self.place_of(at, inner_head, mark).map(|place| place - first.len_utf8());
            let end = self.place_of(at, inner_tail, mark).map(|place| place + last.len_utf8());
            // White space around the content, where the template keeps it.
            let outer = |is_kept: bool, within: usize| is_kept.then(|| self.place_of(at, within, mark)).flatten();
            Place { start: outer(head > 0, 0).or(start), end: outer(tail < content.len(), content.len()).or(end) }
        };
        (0..self.values.len()).map(place).collect()
    }

    /// Where byte `within` of the content of turn `at` lies in the text, if a mark put there comes out once and changes nothing else.
    fn place_of(&self, at: usize, within: usize, mark: char) -> Option<usize> {
        let mut content = self.conversation.messages[at].content.clone();
        content.insert(within, mark);
        let mut values = self.values.to_vec();
        values[at]["content"] = content.into();
        let marked = self.rendered(&values, false)?;
        let place = marked.find(mark)?;
        let (before, after) = (&marked[..place], &marked[place + mark.len_utf8()..]);
        let same = self.text.len() == before.len() + after.len() && self.text.starts_with(before) && self.text.ends_with(after);
        same.then_some(place)
    }
}
