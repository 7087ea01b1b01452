//! The way to a running `cpubond run`: a socket beside the state file, one JSON line each way.

use super::State;
use crate::error::{Error, Result};
use crate::host::Host;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

/// A request and its answer are short.
const MAX_LINE: u64 = 4096;
/// The one who asks is not waited for longer: daemons may need looking after.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// No new flows to the daemon of this CPU.
    Drain(u32),
    Undrain(u32),
    /// Stop the daemons, remove the steering, end. Answered when that is done.
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done,
    Refused(String),
}

fn path(host: &Host, name: &str) -> PathBuf {
    State::path(host, name, "sock")
}

/// Ask the supervisor of a service and wait for its answer.
pub fn ask(host: &Host, name: &str, request: Request) -> Result<()> {
    let path = path(host, name);
    let place = |error: io::Error| Error::new(path.display(), error).fix("run as root");
    let talk = || -> io::Result<Answer> {
        let mut stream = UnixStream::connect(&path)?;
        send(&mut stream, &request)?;
        receive(&stream)
    };
    match talk().map_err(place)? {
        Answer::Done => Ok(()),
        Answer::Refused(found) => Err(Error::new(name, found)),
    }
}

/// One that waits for its answer.
pub struct Asker(UnixStream);

impl Asker {
    pub fn answer(mut self, result: std::result::Result<(), String>) {
        let answer = match result {
            Ok(()) => Answer::Done,
            Err(found) => Answer::Refused(found),
        };
        // Whoever has gone away needs none.
        let _ = send(&mut self.0, &answer);
    }
}

/// The supervisor's end. The file goes when it is dropped.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// The caller holds the service's lock, so a socket that is there has nobody behind it.
    pub fn open(host: &Host, name: &str) -> Result<Self> {
        let path = path(host, name);
        let open = || -> io::Result<UnixListener> {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = open().map_err(|error| Error::new(path.display(), error))?;
        Ok(Self { listener, path })
    }

    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The next request, if there is one. One that makes no sense is answered here.
    pub fn next(&self) -> Option<(Request, Asker)> {
        loop {
            let (stream, _) = self.listener.accept().ok()?;
            let read = || -> io::Result<Request> {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                receive(&stream)
            };
            match read() {
                Ok(request) => return Some((request, Asker(stream))),
                Err(error) => Asker(stream).answer(Err(format!("not understood: {error}"))),
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

fn send(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn receive<T: for<'de> Deserialize<'de>>(stream: &UnixStream) -> io::Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
