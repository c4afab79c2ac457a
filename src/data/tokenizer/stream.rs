//! Decoding one token at a time, for printing while generating.

use super::Tokenizer;
use crate::error::Result;

/// A character has at most four bytes, so text that is still broken after this many tokens stays broken.
const LONGEST_PENDING: usize = 8;

/// Gives the text each further token adds. Tokens that end inside a character are held back until it is complete.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is out already, kept because the first token of a text may decode differently (`▁` to nothing), and the
    /// tokens held back.
    window: Vec<u32>,
    printed: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), printed: 0 }
    }

    /// The text that `id` completes, which is often empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let before = self.tokenizer.decode(&self.window[..self.printed])?;
        let now = self.tokenizer.decode(&self.window)?;
        let held = self.window.len() - self.printed;
        if now.ends_with('\u{FFFD}') && held < LONGEST_PENDING {
            return Ok(String::new());
        }
        let text = now.get(before.len()..).unwrap_or("").to_string();
        self.window.drain(..self.printed);
        self.printed = self.window.len();
        Ok(text)
    }

    /// Whatever was held back, broken characters as U+FFFD.
    pub fn finish(self) -> Result<String> {
        let before = self.tokenizer.decode(&self.window[..self.printed])?;
        let now = self.tokenizer.decode(&self.window)?;
        Ok(now.get(before.len()..).unwrap_or("").to_string())
    }
}
