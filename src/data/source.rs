//! Where documents come from. A further kind of source (Parquet, the hub) is one more implementation of [`Source`].

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// Called with each document in order.
pub type Visitor<'a> = dyn FnMut(&str) -> Result<()> + 'a;

/// An ordered collection of documents that can be walked again and again.
pub trait Source: Send + Sync {
    /// For people: reports and shard files carry it.
    fn name(&self) -> String;
    /// Identifies the documents: equal fingerprints mean equal documents.
    fn fingerprint(&self) -> Result<u64>;
    /// Files that were found and are not read.
    fn left_out(&self) -> &[PathBuf] {
        &[]
    }
    /// Hands every document to `visit` in order and returns how many were left out because they hold nothing but white space.
    fn visit(&self, visit: &mut Visitor<'_>) -> Result<u64>;
}

/// How the documents of a file are laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// The whole file is one document, exactly as it stands.
    Whole,
    /// Documents lie between occurrences of this text; white space around them does not count.
    Separated(String),
    /// One JSON object per line, whose field of this name is a document.
    Lines(String),
}

/// Text files on disk.
#[derive(Debug, Clone)]
pub struct Files {
    name: String,
    files: Vec<(PathBuf, Layout)>,
    left_out: Vec<PathBuf>,
}

impl Files {
    /// `path` is a file, or a folder whose files with one of the endings `layouts` names are read, each in its layout, in the
    /// order of their paths. A file is read in the layout of its ending, or else in the first.
    pub fn new(path: &Path, layouts: &[(&str, Layout)]) -> Result<Self> {
        let layout = |file: &Path| {
            layouts.iter().find(|(ending, _)| file.extension().is_some_and(|other| other == *ending)).map(|(_, layout)| layout.clone())
        };
        let name = path.file_stem().map_or_else(|| "text".into(), |name| name.to_string_lossy().into_owned());
        let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
        if metadata.is_file() {
            let layout = layout(path).unwrap_or_else(|| layouts[0].1.clone());
            return Ok(Self { name, files: vec![(path.to_path_buf(), layout)], left_out: Vec::new() });
        }
        let mut found = Vec::new();
        list_files(path, &mut found)?;
        let files: Vec<_> = found.into_iter().filter_map(|file| layout(&file).map(|layout| (file, layout))).collect();
        if files.is_empty() {
            let endings: Vec<String> = layouts.iter().map(|(ending, _)| format!("*.{ending}")).collect();
            return Err(Error::file(path, format!("no {} in this folder", endings.join(" or "))).fix("name a folder that holds text"));
        }
        Ok(Self { name, files, left_out: Vec::new() })
    }

    /// Leaves out the files of JSON lines whose first line has not the field they are to be read by, unless no others are there:
    /// for a folder that somebody named as a whole.
    #[must_use]
    pub fn only_with_field(mut self) -> Self {
        let fits = |(path, layout): &(PathBuf, Layout)| match layout {
            Layout::Lines(field) => first_line(path).is_none_or(|line| text_field(path, 1, &line, field).is_ok()),
            Layout::Whole | Layout::Separated(_) => true,
        };
        let (files, others): (Vec<_>, Vec<_>) = self.files.iter().cloned().partition(fits);
        if !files.is_empty() {
            self.files = files;
            self.left_out = others.into_iter().map(|(path, _)| path).collect();
        }
        self
    }

    /// The files that are read, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }
}

impl Source for Files {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn fingerprint(&self) -> Result<u64> {
        let mut hash = Xxh3::new();
        for (path, layout) in &self.files {
            hash.update(format!("{layout:?}\0").as_bytes());
            with_bytes(path, |bytes| {
                hash.update(&(bytes.len() as u64).to_le_bytes());
                hash.update(bytes);
                Ok(())
            })?;
        }
        Ok(hash.digest())
    }

    fn left_out(&self) -> &[PathBuf] {
        &self.left_out
    }

    fn visit(&self, visit: &mut Visitor<'_>) -> Result<u64> {
        let mut empty = 0;
        for (path, layout) in &self.files {
            with_bytes(path, |bytes| {
                let text = decode(path, bytes)?;
                empty += visit_file(path, text, layout, visit)?;
                Ok(())
            })?;
        }
        Ok(empty)
    }
}

/// The documents of `text` between occurrences of `separator`, trimmed; empty ones are included.
pub fn split_documents<'a>(text: &'a str, separator: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(separator).map(str::trim)
}

fn visit_file(path: &Path, text: &str, layout: &Layout, visit: &mut Visitor<'_>) -> Result<u64> {
    let mut empty = 0;
    let mut give = |document: &str| {
        if document.trim().is_empty() {
            empty += 1;
            return Ok(());
        }
        visit(document)
    };
    match layout {
        Layout::Whole => give(text)?,
        Layout::Separated(separator) => {
            // What follows a closing separator is the end of the file and no document.
            let body = text.trim_end();
            let body = body.strip_suffix(separator.as_str()).unwrap_or(body);
            split_documents(body, separator).try_for_each(give)?;
        }
        Layout::Lines(field) => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            lines.into_iter().try_for_each(|(at, line)| give(&text_field(path, at + 1, line, field)?))?;
        }
    }
    Ok(empty)
}

fn text_field(path: &Path, line_number: usize, line: &str, field: &str) -> Result<String> {
    let wrong = |cause: String| Error::input(format!("{}:{line_number}", path.display()), cause);
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|error| wrong(format!("not JSON: {error}")).fix("give one JSON object per line"))?;
    match value {
        serde_json::Value::Object(mut object) => match object.remove(field) {
            Some(serde_json::Value::String(text)) => Ok(text),
            Some(_) => Err(wrong(format!("the field {field:?} is not a string")).fix("set `field` to the one that holds the text")),
            None => {
                let others: Vec<&str> = object.keys().map(String::as_str).collect();
                Err(wrong(format!("there is no field {field:?}")).fix(format!("set `field` to one of: {}", others.join(", "))))
            }
        },
        _ => Err(wrong("not a JSON object".into()).fix("give one JSON object per line")),
    }
}

/// The first line, where the file can be read and the line is no longer than a mebibyte.
fn first_line(path: &Path) -> Option<String> {
    let mut line = String::new();
    BufReader::new(File::open(path).ok()?).take(1 << 20).read_line(&mut line).ok()?;
    line.ends_with('\n').then_some(line)
}

/// UTF-8 without a byte order mark.
pub(super) fn decode<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let offset = error.valid_up_to();
        let line = bytes[..offset].iter().filter(|&&byte| byte == b'\n').count() + 1;
        Error::input(format!("{}:{line}", path.display()), format!("not UTF-8: byte {:#04x} at offset {offset}", bytes[offset]))
            .fix("convert the file to UTF-8, for example with iconv")
    })?;
    Ok(text.strip_prefix('\u{FEFF}').unwrap_or(text))
}

pub(super) fn with_bytes<T>(path: &Path, use_bytes: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    if file.metadata().map_err(Error::io("read", path))?.len() == 0 {
        return use_bytes(&[]);
    }
    // SAFETY: the map is read-only and dropped before this returns. Another program that cuts the file meanwhile ends us with
    // SIGBUS; one that overwrites it may give us text that is no longer UTF-8, which only `decode`d bytes could turn into a
    // wrong `&str`: source files are not to be changed while they are read.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    use_bytes(&map)
}

fn list_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>().map_err(Error::io("list", folder))?;
    paths.sort();
    for path in paths {
        // A link to a folder may lead back up: only links to files are followed.
        if path.is_dir() && !path.is_symlink() {
            list_files(&path, found)?;
        } else if path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(path: &Path, layouts: &[(&str, Layout)]) -> Result<(Vec<String>, u64)> {
        let mut all = Vec::new();
        let empty = Files::new(path, layouts)?.visit(&mut |text| {
            all.push(text.to_string());
            Ok(())
        })?;
        Ok((all, empty))
    }

    fn file(content: impl AsRef<[u8]>, name: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[test]
    fn separated_documents_are_trimmed_and_empty_ones_counted() {
        let (_folder, path) = file("\u{FEFF}one\n<|>\n\n<|>two \n<|>\n", "a.txt");
        assert_eq!(documents(&path, &[("txt", Layout::Separated("<|>".into()))]).unwrap(), (vec!["one".into(), "two".into()], 1));
        let (whole, empty) = documents(&path, &[("txt", Layout::Whole)]).unwrap();
        assert_eq!((whole.len(), empty), (1, 0));
        assert!(whole[0].ends_with(">\n"));
    }

    #[test]
    fn folders_are_read_in_the_order_of_names() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        for (name, text) in
            [("c.txt", "3"), ("b/x.txt", "2"), ("a.txt", "1"), ("z.jsonl", "{\"text\": \"4\"}\n"), ("n.md", "no"), ("e.txt", " ")]
        {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let layouts = [("txt", Layout::Whole), ("jsonl", Layout::Lines("text".into()))];
        assert_eq!(documents(folder.path(), &layouts).unwrap(), (["1", "2", "3", "4"].map(String::from).to_vec(), 1));
        std::fs::write(folder.path().join("y.jsonl"), "{\"body\": \"5\"}\n").unwrap();
        assert!(documents(folder.path(), &layouts).is_err());
        let chosen = Files::new(folder.path(), &layouts).unwrap().only_with_field();
        assert_eq!((chosen.paths().count(), chosen.left_out()), (5, &[folder.path().join("y.jsonl")][..]));
        let before = Files::new(folder.path(), &layouts).unwrap().fingerprint().unwrap();
        std::fs::write(folder.path().join("a.txt"), "5").unwrap();
        assert_ne!(before, Files::new(folder.path(), &layouts).unwrap().fingerprint().unwrap());
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(Files::new(&folder.path().join("empty"), &layouts).unwrap_err().to_string().contains("*.txt or *.jsonl"));
    }

    #[test]
    fn mistakes_name_file_and_line() {
        let (_folder, path) = file(b"fine\nbad \xff\n", "a.txt");
        let error = documents(&path, &[("txt", Layout::Whole)]).unwrap_err();
        assert!(error.to_string().contains("a.txt:2") && error.to_string().contains("0xff at offset 9"), "{error}");
        let lines = [("jsonl", Layout::Lines("text".into()))];
        for (content, cause) in [
            ("{\"text\": \"a\"}\n\n{\"body\": 1}", "a.jsonl:3: there is no field \"text\""),
            ("{\"text\": 3}", "a.jsonl:1: the field \"text\" is not a string"),
            ("{\"text\": ", "a.jsonl:1: not JSON"),
            ("[1]", "a.jsonl:1: not a JSON object"),
        ] {
            let (_folder, path) = file(content, "a.jsonl");
            let error = documents(&path, &lines).unwrap_err();
            assert!(error.to_string().contains(cause), "{error}");
        }
        assert!(documents(Path::new("/nonexistent/x.txt"), &lines).unwrap_err().to_string().contains("/nonexistent/x.txt: cannot read"));
    }
}
