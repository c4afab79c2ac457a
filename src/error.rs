//! The one error type. A user's mistake carries its place, its cause and the fix, and ends the program with exit code 2;
//! a failed tensor operation is a bug of ours.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result with Osprey's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something the user gave is wrong: `place` is a file, a file and line, a tensor or a recipe key.
    #[error("{place}: {cause}")]
    Input { place: String, cause: String, fix: Option<String> },
    /// The operating system refused: `action` is an infinitive such as "read".
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A tensor operation failed, which no input should be able to cause.
    #[error("internal: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// A mistake at `place`, described by `cause`.
    pub fn input(place: impl ToString, cause: impl ToString) -> Self {
        Self::Input { place: place.to_string(), cause: cause.to_string(), fix: None }
    }

    /// A mistake in the file at `path`.
    pub fn file(path: &Path, cause: impl ToString) -> Self {
        Self::input(path.display(), cause)
    }

    /// Adds what to do about it (one sentence, no full stop).
    #[must_use]
    pub fn fix(self, advice: impl ToString) -> Self {
        match self {
            Self::Input { place, cause, .. } => Self::Input { place, cause, fix: Some(advice.to_string()) },
            other => other,
        }
    }

    /// Wraps an operating-system error: `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The advice printed after the message as `hint: ...`.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Input { fix, .. } => fix.as_deref(),
            Self::Io { source, .. } => advice(source.kind()),
            Self::Tensor(_) => Some("this is a defect of Osprey: please report it with the command that caused it"),
        }
    }

    /// 2 for the user's mistakes and the system's refusals, 101 for our own bugs.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input { .. } | Self::Io { .. } => 2,
            Self::Tensor(_) => 101,
        }
    }
}

/// What to do about a refusal of the operating system.
fn advice(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory => Some("check the path"),
        ErrorKind::AlreadyExists => Some("choose another path, or move away what is there"),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Some("change its permissions, or choose a path you may use"),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Some("free space, or choose a path on another disk"),
        _ => None,
    }
}
