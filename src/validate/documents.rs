//! The documents of an evaluation: trimmed, begun with BOS where the tokenizer has one, cut to the context (BOS included). Every token but
//! a document's first is predicted; the end of a document is not.

use crate::data::source::{Files, Layout, Source};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use std::path::Path;

/// How a text becomes documents: the options that `eval` and `validate` share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Protocol {
    /// What stands between documents of a plain text; without it a file is one document. JSONL files have one per line, field `text`.
    pub separator: Option<String>,
    /// Only so many documents, the first ones.
    pub max_documents: Option<usize>,
}

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Token ids, at least two.
    pub ids: Vec<u32>,
    /// Which of the predicted tokens are scored; all where it is absent.
    pub scored: Option<Vec<bool>>,
    /// Bytes of the text that the scored tokens spell.
    pub predicted_bytes: usize,
    /// Whether the context cut something off.
    pub is_cut: bool,
}

impl Document {
    /// A document of token ids (BOS included, where the tokenizer has one), cut to `context`; nothing when no token would be predicted.
    pub fn from_ids(mut ids: Vec<u32>, context: usize, tokenizer: &Tokenizer) -> Option<Self> {
        let is_cut = ids.len() > context;
        ids.truncate(context);
        let predicted_bytes = tokenizer.decode(ids.get(1..)?).ok()?.len();
        (ids.len() >= 2).then_some(Self { ids, scored: None, predicted_bytes, is_cut })
    }

    /// A conversation of which only what was trained is scored: `weights` as of training, one per id. What a model would say in place of
    /// the user was never learned and decides nothing.
    pub fn of_answers(ids: Vec<u32>, weights: &[f32], context: usize, tokenizer: &Tokenizer) -> Option<Self> {
        let mut document = Self::from_ids(ids, context, tokenizer)?;
        let scored: Vec<bool> = weights[1..document.ids.len()].iter().map(|&weight| weight > 0.0).collect();
        let said: Vec<u32> = document.ids[1..].iter().zip(&scored).filter(|(_, scored)| **scored).map(|(&id, _)| id).collect();
        document.predicted_bytes = tokenizer.decode(&said).ok()?.len();
        document.scored = Some(scored);
        (!said.is_empty()).then_some(document)
    }

    /// Number of tokens that are predicted.
    pub fn predicted(&self) -> usize {
        self.ids.len() - 1
    }

    /// Whether the prediction of the token at `position` counts (the first one predicted is at 1).
    pub fn scores(&self, position: usize) -> bool {
        self.scored.as_ref().is_none_or(|scored| scored[position - 1])
    }

    /// Number of tokens whose prediction counts.
    pub fn scored(&self) -> usize {
        self.scored.as_ref().map_or(self.predicted(), |scored| scored.iter().filter(|&&scored| scored).count())
    }
}

/// Reads the documents of `path`, a file or a folder, and cuts them to `context` tokens.
///
/// # Errors
/// When nothing is there, it is not UTF-8 or not JSONL, the separator is empty, or no document has anything to predict.
pub fn read(path: &Path, protocol: &Protocol, tokenizer: &Tokenizer, context: usize) -> Result<Vec<Document>> {
    let texts = texts(path, protocol)?;
    if context < 2 {
        return Err(Error::input("context", format!("{context} tokens leave nothing to predict")).fix("give at least 2"));
    }
    let encoded = tokenizer.encode_all(&texts)?;
    let documents: Vec<Document> = texts
        .iter()
        .zip(encoded)
        .map(|(text, ids)| document(text, ids, tokenizer, context))
        .filter(|document| document.as_ref().map_or(true, |document| document.ids.len() >= 2))
        .collect::<Result<_>>()?;
    if documents.is_empty() {
        return Err(Error::file(path, "holds no document with a token to predict").fix("give a longer text"));
    }
    Ok(documents)
}

/// The trimmed texts that are not empty.
pub fn texts(path: &Path, protocol: &Protocol) -> Result<Vec<String>> {
    let plain = match protocol.separator.as_deref() {
        Some("") => return Err(Error::input("document-separator", "is empty").fix("leave the option out for one document per file")),
        Some(separator) => Layout::Separated(separator.to_owned()),
        None => Layout::Whole,
    };
    if protocol.max_documents == Some(0) {
        return Err(Error::input("max-documents", "is 0").fix("give at least 1, or leave the option out"));
    }
    let most = protocol.max_documents.unwrap_or(usize::MAX);
    let files = Files::new(path, &[("txt", plain), ("jsonl", Layout::Lines("text".to_owned()))])?;
    let mut texts = Vec::new();
    files.visit(&mut |text| {
        if texts.len() < most {
            texts.push(text.trim().to_owned());
        }
        Ok(())
    })?;
    if texts.is_empty() {
        return Err(Error::file(path, "holds no documents").fix("give a text that is not empty"));
    }
    Ok(texts)
}

fn document(text: &str, encoded: Vec<u32>, tokenizer: &Tokenizer, context: usize) -> Result<Document> {
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.extend(encoded);
    let is_cut = ids.len() > context;
    ids.truncate(context);
    // Without BOS the first token of the text is given, not predicted.
    let whole = !is_cut && tokenizer.bos().is_some();
    let predicted_bytes = if whole { text.len() } else { tokenizer.decode(ids.get(1..).unwrap_or(&[]))?.len() };
    Ok(Document { ids, scored: None, predicted_bytes, is_cut })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn separated(separator: &str) -> Protocol {
        Protocol { separator: Some(separator.to_owned()), max_documents: None }
    }

    #[test]
    fn documents_are_trimmed_and_cut() {
        let (_folder, path) = file("a.txt", b"  one\n<e> <e>\ntwo three <e>");
        let documents = read(&path, &separated("<e>"), &Tokenizer::byte(), 5).unwrap();
        let text = |document: &Document| Tokenizer::byte().decode(&document.ids).unwrap();
        assert_eq!(documents.iter().map(text).collect::<Vec<_>>(), ["one", "two "]);
        assert_eq!(
            documents.iter().map(|d| (d.predicted(), d.predicted_bytes, d.is_cut)).collect::<Vec<_>>(),
            [(3, 3, false), (4, 4, true)]
        );
        let one = Protocol { max_documents: Some(1), ..separated("<e>") };
        assert_eq!(read(&path, &one, &Tokenizer::byte(), 5).unwrap().len(), 1);
        assert_eq!(texts(&path, &Protocol::default()).unwrap().len(), 1);
    }

    #[test]
    fn of_a_conversation_only_answers_count() {
        let ids = vec![256, 65, 66, 67, 68];
        let answers = |weights: &[f32], context| Document::of_answers(ids.clone(), weights, context, &Tokenizer::byte());
        let document = answers(&[0.0, 0.0, 1.0, 0.0, 0.5], 9).unwrap();
        assert_eq!((document.predicted(), document.scored(), document.predicted_bytes), (4, 2, 2));
        assert_eq!((1..5).map(|position| document.scores(position)).collect::<Vec<_>>(), [false, true, false, true]);
        assert_eq!(answers(&[0.0, 0.0, 1.0, 0.0, 0.5], 4).unwrap().scored(), 1);
        assert!(answers(&[0.0, 0.0, 0.0, 0.0, 1.0], 4).is_none());
    }

    #[test]
    fn lines_of_json_are_documents() {
        let (_folder, path) = file("a.jsonl", b"{\"text\": \" first \"}\n{\"text\": \"second\"}\n");
        assert_eq!(texts(&path, &Protocol::default()).unwrap(), ["first", "second"]);
    }

    #[test]
    fn what_cannot_be_evaluated_is_named() {
        let message = |name: &str, content: &[u8], protocol: &Protocol| {
            let (_folder, path) = file(name, content);
            read(&path, protocol, &Tokenizer::byte(), 8).unwrap_err().to_string()
        };
        let plain = Protocol::default();
        assert!(message("empty.txt", b"", &plain).contains("empty.txt: holds no documents"));
        assert!(message("blank.txt", b" <e> \n<e>", &separated("<e>")).contains("holds no documents"));
        assert!(message("latin.txt", b"caf\xe9", &plain).contains("not UTF-8"));
        assert!(message("bad.jsonl", b"{\"text\": \"a\"}\n[]\n", &plain).contains("bad.jsonl:2"));
        assert!(message("a.txt", b"abc", &separated("")).contains("document-separator"));
        assert!(message("a.txt", b"abc", &Protocol { max_documents: Some(0), ..plain.clone() }).contains("max-documents"));
        let missing = read(Path::new("/no/such/text"), &plain, &Tokenizer::byte(), 8).unwrap_err().to_string();
        assert!(missing.contains("/no/such/text"));
        let (_folder, path) = file("a.txt", b"abc");
        assert!(read(&path, &plain, &Tokenizer::byte(), 1).unwrap_err().to_string().contains("context"));
    }
}
