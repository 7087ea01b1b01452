//! What has been measured, point by point, so that a run that was ended goes on where it was.
//!
//! One JSON value a line: first the key of what was measured, then the points. A point is
//! written when it is there; another kernel, module, helper or profiler starts anew.

use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::marker::PhantomData;
use std::path::Path;

/// A file of points.
pub struct State<P> {
    file: File,
    points: Vec<P>,
    _point: PhantomData<P>,
}

impl<P: Serialize + DeserializeOwned> State<P> {
    /// Open it, with what is in it if that is of the same key.
    pub fn open(path: &Path, key: &str) -> Result<Self> {
        let what = || path.display().to_string();
        let key = serde_json::to_string(key)?;
        let points = match File::open(path) {
            Ok(file) => {
                let mut lines = BufReader::new(file).lines();
                if lines.next().transpose().with_context(what)?.as_ref() == Some(&key) {
                    // A line that was cut short is a point that is not there.
                    lines
                        .map_while(|line| serde_json::from_str(&line.ok()?).ok())
                        .collect()
                } else {
                    Vec::new()
                }
            }
            Err(_) => Vec::new(),
        };
        // Written anew: what comes next must not go behind half a line.
        let mut text = key + "\n";
        for point in &points {
            text += &serde_json::to_string(point)?;
            text.push('\n');
        }
        super::write_whole(path, text.as_bytes())?;
        let file = File::options().append(true).open(path).with_context(what)?;
        Ok(Self {
            file,
            points,
            _point: PhantomData,
        })
    }

    /// All there are.
    pub fn points(&self) -> &[P] {
        &self.points
    }

    /// One more.
    pub fn add(&mut self, point: P) -> Result<()> {
        let mut line = serde_json::to_string(&point)?;
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .context("the state file")?;
        self.points.push(point);
        Ok(())
    }
}

/// One short word for the contents of files, in their order.
pub fn hash(files: &[&Path]) -> Result<String> {
    // FNV-1a: nobody tries to fool it.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for file in files {
        for byte in fs::read(file).with_context(|| file.display().to_string())? {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("{hash:016x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_where_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state");
        let mut state = State::open(&path, "one").expect("opens");
        state.add(1).expect("is written");
        state.add(2).expect("is written");
        drop(state);
        // Killed in the middle of a line.
        let mut file = File::options().append(true).open(&path).expect("is there");
        file.write_all(b"[3").expect("is written");
        let mut state = State::<i32>::open(&path, "one").expect("opens");
        assert_eq!(state.points(), [1, 2]);
        state.add(3).expect("is written");
        drop(state);
        assert_eq!(
            State::<i32>::open(&path, "one").expect("opens").points(),
            [1, 2, 3]
        );
        // Another kernel.
        assert_eq!(
            State::<i32>::open(&path, "two").expect("opens").points(),
            [0; 0]
        );
        assert_eq!(
            State::<i32>::open(&path, "one").expect("opens").points(),
            [0; 0]
        );
    }

    #[test]
    fn other_contents_have_another_hash() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "1").expect("written");
        fs::write(&b, "2").expect("written");
        let of = |files: &[&Path]| hash(files).expect("read");
        assert_ne!(of(&[&a]), of(&[&b]));
        assert_ne!(of(&[&a, &b]), of(&[&b, &a]));
        assert_eq!(of(&[&a]), of(&[&a]));
    }
}
