//! Text, token by token.

use super::sampler::{Config, Sampler};
use super::session::Session;
use crate::data::tokenizer::{TextStream, Tokenizer};
use crate::error::Result;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended the document.
    EndOfText,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
}

/// An iterator over pieces of text. A piece ends where a character does; pieces may be empty.
pub struct Generation<'s, 'e> {
    session: &'s mut Session<'e>,
    sampler: Sampler,
    text: Option<TextStream<'e>>,
    ends: Vec<u32>,
    logits: Vec<f32>,
    ids: Vec<u32>,
    most: usize,
    stop: Option<Stop>,
}

impl<'s, 'e> Generation<'s, 'e> {
    /// Appends `prompt` (ids, at least one) to the session and gets ready to continue it by at most `most` tokens.
    pub fn new(session: &'s mut Session<'e>, prompt: &[u32], config: Config, most: usize) -> Result<Self> {
        let tokenizer = session.engine().tokenizer()?;
        let sampler = Sampler::new(config)?;
        let logits = session.prefill(prompt)?;
        let ends = tokenizer.ends().collect();
        Ok(Self { session, sampler, text: Some(tokenizer.stream()), ends, logits, ids: vec![], most, stop: None })
    }

    /// The same, which ends at these tokens too.
    #[must_use]
    pub fn ending_at(mut self, ends: &[u32]) -> Self {
        self.ends.extend(ends);
        self
    }

    /// Tokens generated so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Why it ended; `None` while it has not.
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    /// The next token, or why there is none. The session is stepped only when its logits are needed.
    fn advance(&mut self) -> Result<Result<u32, Stop>> {
        if self.ids.len() >= self.most {
            return Ok(Err(Stop::Length));
        }
        if let Some(&last) = self.ids.last() {
            if self.session.len() >= self.session.capacity() {
                return Ok(Err(Stop::Context));
            }
            self.logits = self.session.step(last)?;
        }
        let id = self.sampler.sample(&self.logits)?;
        if self.ends.contains(&id) {
            return Ok(Err(Stop::EndOfText));
        }
        self.ids.push(id);
        Ok(Ok(id))
    }
}

impl Iterator for Generation<'_, '_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.text.as_ref()?;
        match self.advance() {
            Ok(Ok(id)) => self.text.as_mut().map(|text| text.push(id)),
            Ok(Err(stop)) => {
                self.stop = Some(stop);
                self.text.take().map(TextStream::finish)
            }
            Err(error) => {
                self.text = None;
                Some(Err(error))
            }
        }
    }
}

/// Ids of `text` as a sequence starts: after BOS, where the tokenizer has one.
pub fn prompt_ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(tokenizer.encode(text)?);
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::kv::Format;
    use crate::infer::sampler::argmax;
    use crate::infer::testing::{Artifact, dense, weights};

    #[test]
    fn greedy_text_is_that_of_the_likeliest_tokens() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 1)).engine();
        let tokenizer = engine.tokenizer().unwrap();
        let prompt = prompt_ids(tokenizer, "ab").unwrap();
        let mut session = Session::new(&engine, Format::F32, 40).unwrap();
        let mut generation = Generation::new(&mut session, &prompt, Config::greedy(), 20).unwrap();
        let text: String = generation.by_ref().map(Result::unwrap).collect();
        let (ids, stop) = (generation.ids().to_vec(), generation.stop().unwrap());
        assert_eq!(text, tokenizer.decode(&ids).unwrap());
        assert_eq!(stop, if ids.len() == 20 { Stop::Length } else { Stop::EndOfText });

        let mut session = Session::new(&engine, Format::F32, 40).unwrap();
        let mut logits = session.prefill(&prompt).unwrap();
        for id in ids {
            assert_eq!(argmax(&logits), id);
            logits = session.step(id).unwrap();
        }
    }

    #[test]
    fn an_answer_ends_at_the_tokens_it_is_told() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 1)).engine();
        let run = |ends: &[u32]| {
            let mut session = Session::new(&engine, Format::F32, 40).unwrap();
            let mut generation = Generation::new(&mut session, &[1, 2, 3], Config::greedy(), 8).unwrap().ending_at(ends);
            generation.by_ref().for_each(|piece| drop(piece.unwrap()));
            (generation.ids().to_vec(), generation.stop().unwrap())
        };
        let (ids, _) = run(&[]);
        let first = ids.iter().position(|id| *id == ids[3]).unwrap();
        assert_eq!(run(&[ids[3]]), (ids[..first].to_vec(), Stop::EndOfText));
    }

    #[test]
    fn seeds_repeat_and_a_full_context_ends() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 2)).engine();
        let run = |seed, capacity, most| {
            let mut session = Session::new(&engine, Format::F32, capacity).unwrap();
            let config = Config { seed, temperature: 1.0, ..Config::default() };
            let mut generation = Generation::new(&mut session, &[1, 2, 3], config, most).unwrap();
            generation.by_ref().for_each(|piece| drop(piece.unwrap()));
            (generation.ids().to_vec(), generation.stop().unwrap())
        };
        assert_eq!(run(1, 30, 10), run(1, 30, 10));
        assert_ne!(run(1, 30, 10).0, run(2, 30, 10).0);
        let (ids, stop) = run(1, 6, 50);
        // Three places are left after the prompt; the token after the last of them needs none.
        assert!(stop == Stop::Context && ids.len() == 4 || stop == Stop::EndOfText, "{stop:?} {ids:?}");
        assert_eq!(run(1, 30, 0), (vec![], Stop::Length));
    }
}
