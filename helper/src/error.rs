//! Errors are values with a place: where, what was found, what to do about it, in one line.

use std::fmt;

/// What the process exits with; `Ok` is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It could not be done; nothing was changed, or what was is reported.
    Failed = 1,
    /// The command line makes no sense (clap's own errors use the same code).
    Usage = 2,
    /// What is there is not what should be.
    Drift = 3,
    /// The kernel, or the module it has loaded, cannot do this.
    Unsupported = 4,
    /// Some of it was done, and was taken back.
    RolledBack = 5,
}

/// One line: `place: what was found; the fix`.
#[derive(Debug)]
pub struct Error {
    pub exit: Exit,
    place: String,
    found: String,
    fix: Option<String>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(place: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Failed,
            place: place.to_string(),
            found: found.to_string(),
            fix: None,
        }
    }

    /// Say what the reader can do about it.
    pub fn fix(mut self, fix: impl fmt::Display) -> Self {
        self.fix = Some(fix.to_string());
        self
    }

    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.found)?;
        match &self.fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}
