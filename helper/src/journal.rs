//! The journal of one bond: every change, on disk before it is made.

use crate::change::{Change, Kernel, Undone};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::link;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const SCHEMA: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub struct Journal {
    schema: u32,
    bond: String,
    /// Tells our bond from one that somebody made under the same name later.
    bond_index: Option<u32>,
    changes: Vec<Change>,
}

/// What undoing found.
#[derive(Debug, Default)]
pub struct Undoing {
    pub restored: usize,
    /// Lines about what was left as it is.
    pub left: Vec<String>,
    pub errors: Vec<Error>,
}

impl Journal {
    pub fn new(bond: &str) -> Self {
        Self {
            schema: SCHEMA,
            bond: bond.to_string(),
            bond_index: None,
            changes: Vec::new(),
        }
    }

    pub fn path(host: &Host, bond: &str) -> PathBuf {
        host.run.join(format!("{bond}.json"))
    }

    /// `None` if there is none.
    pub fn load(host: &Host, bond: &str) -> Result<Option<Self>> {
        let path = Self::path(host, bond);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::new(path.display(), error)),
        };
        let journal: Self = serde_json::from_slice(&text).map_err(|error| {
            Error::new(path.display(), format_args!("not a journal: {error}"))
                .fix("undo by hand and delete the file")
        })?;
        match journal.schema == SCHEMA && journal.bond == bond {
            true => Ok(Some(journal)),
            false => Err(Error::new(
                path.display(),
                format_args!(
                    "journal of bond {}, schema {}; this is schema {SCHEMA}",
                    journal.bond, journal.schema
                ),
            )
            .fix("use the cpubond that wrote it")),
        }
    }

    /// Write down, then make, each change. `go_on` is asked before each whether to carry on.
    pub fn make(
        &mut self,
        host: &Host,
        kernel: &mut dyn Kernel,
        changes: Vec<Change>,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let first = self.changes.len();
        self.changes.extend(changes);
        self.save(host)?;
        for index in first..self.changes.len() {
            go_on()?;
            self.changes[index].apply(host, kernel)?;
            if let Change::Create { bond, .. } = &self.changes[index] {
                self.bond_index = link::index(host, bond);
                self.save(host)?;
            }
        }
        Ok(())
    }

    /// Take all changes back, the last one first, past errors. The journal is deleted unless
    /// there were errors, so that undoing can be tried again.
    pub fn undo(&self, host: &Host, kernel: &mut dyn Kernel) -> Undoing {
        let mut undoing = Undoing::default();
        for change in self.changes.iter().rev() {
            match change.undo(host, kernel, self.bond_index) {
                Ok(Undone::Restored) => undoing.restored += 1,
                Ok(Undone::Nothing) => {}
                Ok(Undone::Left(line)) => undoing.left.push(line),
                Err(error) => undoing.errors.push(error),
            }
        }
        if undoing.errors.is_empty() {
            let path = Self::path(host, &self.bond);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => undoing.errors.push(
                    Error::new(path.display(), format_args!("cannot be deleted: {error}")),
                ),
                _ => {}
            }
        }
        undoing
    }

    /// Replace the file as a whole, so that a crash leaves the old journal or the new one.
    fn save(&self, host: &Host) -> Result<()> {
        let path = Self::path(host, &self.bond);
        let new = path.with_extension("json.new");
        let save = || -> io::Result<()> {
            fs::create_dir_all(&host.run)?;
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&host.run)?.sync_all()
        };
        save().map_err(|error| unwritable(&path, &error))
    }
}

/// Held while this process changes things; two at once would journal each other's changes as the
/// state before. The kernel drops it when the process ends, however it ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    pub fn take(host: &Host) -> Result<Self> {
        let path = host.run.join("lock");
        let file = fs::create_dir_all(&host.run)
            .and_then(|()| File::create(&path))
            .map_err(|error| unwritable(&path, &error))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => {
                Error::new(path.display(), "another cpubond is changing things")
                    .fix("wait for it to end")
            }
            error => Error::new(path.display(), error),
        })?;
        Ok(Self { _file: file })
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = Error::new(path.display(), format_args!("cannot be written: {error}"));
    if denied {
        error.fix("run as root")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn one_at_a_time() {
        let fake = Fake::new();
        let lock = Lock::take(&fake.host()).unwrap();
        assert!(Lock::take(&fake.host()).is_err());
        drop(lock);
        Lock::take(&fake.host()).unwrap();
    }

    #[test]
    fn refuses_foreign_journals() {
        let fake = Fake::new();
        assert!(Journal::load(&fake.host(), "bond0").unwrap().is_none());
        for text in [
            "",
            "{}",
            r#"{"schema":99,"bond":"bond0","bond_index":null,"changes":[]}"#,
        ] {
            fake.file("run/bond0.json", text);
            assert!(Journal::load(&fake.host(), "bond0").is_err(), "{text}");
        }
    }
}
