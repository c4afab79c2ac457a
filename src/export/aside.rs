//! Nothing half-written: files and directories are made beside their final place, synced, and renamed into it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes the file at `path` through `fill` and renames it into place once `check` has accepted it; on failure the previous file, if any, is
/// untouched and nothing is left behind.
///
/// # Errors
/// When the system refuses, or `fill` or `check` fails.
pub fn write_file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>, check: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = make_parent(path)?;
    let temporary = beside(path)?;
    let result = fill_and_sync(&temporary, fill)
        .and_then(|()| check(&temporary))
        .and_then(|()| fs::rename(&temporary, path).map_err(Error::io("rename into place", path)))
        .and_then(|()| sync_directory(&parent));
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Makes the directory at `path` through `fill`, which writes into the temporary directory it is given. A directory that is already there is
/// replaced when `replaceable` says that it is one of ours, and is an error otherwise.
///
/// # Errors
/// When the system refuses, `fill` fails, or something else is in the way.
pub fn write_directory(path: &Path, replaceable: impl FnOnce(&Path) -> bool, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() && !(path.is_dir() && (is_empty(path)? || replaceable(path))) {
        return Err(Error::file(path, "already exists and was not written by an export").fix("choose another --out, or remove it first"));
    }
    let parent = make_parent(path)?;
    let temporary = beside(path)?;
    let result = fs::create_dir(&temporary)
        .map_err(Error::io("create", &temporary))
        .and_then(|()| fill(&temporary))
        .and_then(|()| sync_directory(&temporary))
        .and_then(|()| swap_in(&temporary, path))
        .and_then(|()| sync_directory(&parent));
    if result.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    result
}

fn fill_and_sync(temporary: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let file = File::create(temporary).map_err(Error::io("create", temporary))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|error| error.into_error()).map_err(Error::io("write", temporary))?;
    file.sync_all().map_err(Error::io("sync", temporary))
}

fn swap_in(temporary: &Path, path: &Path) -> Result<()> {
    if !path.exists() {
        return fs::rename(temporary, path).map_err(Error::io("rename into place", path));
    }
    let previous = temporary.with_extension("previous");
    fs::rename(path, &previous).map_err(Error::io("move aside", path))?;
    if let Err(error) = fs::rename(temporary, path) {
        let _ = fs::rename(&previous, path);
        return Err(Error::io("rename into place", path)(error));
    }
    fs::remove_dir_all(&previous).map_err(Error::io("remove", previous))
}

fn is_empty(path: &Path) -> Result<bool> {
    Ok(fs::read_dir(path).map_err(Error::io("list", path))?.next().is_none())
}

fn make_parent(path: &Path) -> Result<PathBuf> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(Error::io("create", &parent))?;
    Ok(parent)
}

/// A hidden name in the same directory, so that the rename stays within one file system.
fn beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::file(path, "is not a name that a file can have"))?;
    Ok(path.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id())))
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn failure_leaves_the_previous_file_and_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let write = |text: &'static [u8]| move |out: &mut dyn Write| out.write_all(text).map_err(Error::io("write", "x"));
        write_file(&path, write(b"first"), |_| Ok(())).unwrap();
        let failed = |out: &mut dyn Write| write(b"half")(out).and(Err(Error::input("tensor", "broken")));
        assert!(write_file(&path, failed, |_| Ok(())).is_err());
        let seen = |at: &Path| Err(Error::file(at, fs::read_to_string(at).unwrap()));
        assert!(write_file(&path, write(b"second"), seen).unwrap_err().to_string().ends_with("second"));
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }

    #[test]
    fn directories_are_replaced_only_when_they_are_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let fill = |content: &'static str| move |at: &Path| fs::write(at.join("a"), content).map_err(Error::io("write", "a"));
        write_directory(&path, |_| false, fill("one")).unwrap();
        assert!(write_directory(&path, |_| false, fill("two")).is_err());
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one");
        write_directory(&path, |at| at.join("a").exists(), fill("two")).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "two");
        assert_eq!(names(folder.path()), ["out"]);
    }
}
