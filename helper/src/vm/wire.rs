//! What the host and a guest's agent say to each other: one JSON object a line.
//!
//! Text that is not UTF-8 is replaced, not refused: what a test prints is shown to
//! a person, and a test run must not end because of one odd byte.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, BufRead, Write};

/// Which stream a piece of output belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Host to guest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ToGuest {
    /// Run a bash command line.
    Exec { id: u64, cmd: String },
    /// Kill what `Exec` with this id started.
    Kill { id: u64 },
    /// An answer to [`ToHost::Call`].
    Answer { id: u64, reply: Reply },
}

/// Guest to host.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ToHost {
    /// The agent is up.
    Hello { kernel: String },
    /// Something came out of, or happened to, the command with this id.
    Exec { id: u64, reply: Reply },
    /// `cpubond vm call …` in the guest.
    Call { id: u64, args: Vec<String> },
}

/// What comes back from a command, in either direction.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// Output.
    Text { stream: Stream, text: String },
    /// The end: its exit code, 128 + N for signal N.
    Exit(i32),
}

/// Write one message as one line.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Read one message; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_newlines_is_one_line() {
        let message = ToHost::Exec {
            id: 3,
            reply: Reply::Text {
                stream: Stream::Err,
                text: "two\nlines \u{fffd}\n".to_owned(),
            },
        };
        let mut wire = Vec::new();
        send(&mut wire, &message).expect("write to memory");
        assert_eq!(wire.iter().filter(|&&byte| byte == b'\n').count(), 1);
        let mut reader = wire.as_slice();
        assert_eq!(receive(&mut reader).expect("read back"), Some(message));
        assert_eq!(receive::<ToHost>(&mut reader).expect("read end"), None);
    }

    #[test]
    fn a_broken_line_is_an_error_not_the_end() {
        assert!(receive::<ToHost>(&mut &b"{\"exec\":\n"[..]).is_err());
    }
}
