//! irqbalance, which moves interrupts to where it thinks best, and how to have it leave ours
//! alone.
//!
//! It listens on a stream socket for one command a connection, from root only. `setup` is
//! answered by `SLEEP n`, then `IRQ n LOAD n DIFF n CLASS n` for each interrupt it leaves alone,
//! then `BANNED mask` (of CPUs). `settings ban irqs n n …` replaces that list, `NONE` empties it;
//! there is no answer. What comes with `--banirq` is in the list too, what `--banmod` and policy
//! scripts exclude is not. A ban is obeyed from the next round on, and no round starts between
//! the command and its obedience; it is lost when irqbalance ends. So a change to the list is to
//! read it, to merge, to write it and to read it back.

use crate::error::{Error, Result};
use crate::host::Host;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg};
use std::collections::BTreeSet;
use std::io::{self, IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// Interrupt numbers.
pub type Irqs = BTreeSet<u32>;

/// Up to 1.9.4 it reads no more than this of a command, and takes the rest for not there.
const SHORT: usize = 500;

/// It answers between two rounds, and a round is short.
const PATIENCE: Duration = Duration::from_secs(10);

/// Its socket is there a moment after the process.
const START: Duration = Duration::from_secs(5);

/// A running irqbalance.
#[derive(Debug, PartialEq, Eq)]
pub struct Irqbalance {
    pub pid: u32,
    socket: PathBuf,
}

/// The irqbalance that runs, if one does.
pub fn running(host: &Host) -> Option<Irqbalance> {
    let pid = *super::pids(host, super::IRQBALANCE).first()?;
    Some(Irqbalance {
        pid,
        socket: host
            .root
            .join(format!("run/irqbalance/irqbalance{pid}.sock")),
    })
}

impl Irqbalance {
    /// The interrupts it leaves alone by command line or by command. Asked as root only.
    pub fn banned(&self) -> Result<Irqs> {
        self.ask(Duration::ZERO)
    }

    /// The same of one that may have started just now and have no socket yet.
    pub fn banned_soon(&self) -> Result<Irqs> {
        self.ask(START)
    }

    fn ask(&self, wait: Duration) -> Result<Irqs> {
        let answer = self.command("setup", wait)?;
        parse(&answer).ok_or_else(|| match answer.is_empty() {
            true => self.error("does not answer").fix("run as root"),
            false => self.error(format_args!("answers '{}'", answer.trim())),
        })
    }

    /// Have it leave these interrupts alone and no others. Read back.
    pub fn set_banned(&self, irqs: &Irqs) -> Result<()> {
        let command = match irqs.is_empty() {
            true => "settings ban irqs NONE".to_string(),
            // Where 0 is not the first, it ends the list; a set has it first.
            false => format!("settings ban irqs {}", list(irqs, " ")),
        };
        if command.len() > SHORT && !self.reads(command.len())? {
            return Err(self
                .error(format_args!(
                    "takes no command as long as one for {} interrupts",
                    irqs.len()
                ))
                .fix(format_args!(
                    "stop it, or use 1.9.5 or newer, or start it with --banirq for each of {}",
                    list(irqs, ",")
                )));
        }
        self.command(&command, Duration::ZERO)?;
        let found = self.banned()?;
        match found == *irqs {
            true => Ok(()),
            false => Err(self.error(format_args!(
                "was told to leave interrupts {} alone, but leaves {} alone",
                list(irqs, ","),
                list(&found, ",")
            ))),
        }
    }

    /// Whether it reads commands of this length: if not, it leaves the rest unread, which the
    /// kernel tells us as a connection that is reset rather than closed.
    fn reads(&self, length: usize) -> Result<bool> {
        let probe = format!("{:length$}", "setup");
        let mut stream = self.send(&probe, Duration::ZERO)?;
        let mut answer = String::new();
        match stream.read_to_string(&mut answer) {
            Ok(_) => Ok(parse(&answer).is_some()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(self.silent(&error)),
        }
    }

    /// Send a command, read the answer up to the end of the connection: when that comes, the
    /// command has been obeyed.
    fn command(&self, command: &str, wait: Duration) -> Result<String> {
        let mut answer = String::new();
        self.send(command, wait)?
            .read_to_string(&mut answer)
            .map_err(|error| self.silent(&error))?;
        Ok(answer)
    }

    /// `wait`: how long it may take until it listens.
    fn send(&self, command: &str, wait: Duration) -> Result<UnixStream> {
        let start = Instant::now();
        let stream = loop {
            use io::ErrorKind::{ConnectionRefused, NotFound};
            match self.connect() {
                Ok(stream) => break stream,
                Err(error)
                    if [NotFound, ConnectionRefused].contains(&error.kind())
                        && start.elapsed() < wait =>
                {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(error) => return Err(self.refused(&error)),
            }
        };
        let timeout = |result: io::Result<()>| result.map_err(|error| self.silent(&error));
        timeout(stream.set_read_timeout(Some(PATIENCE)))?;
        timeout(stream.set_write_timeout(Some(PATIENCE)))?;
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(command.as_bytes())],
            &[ControlMessage::ScmCredentials(&UnixCredentials::new())],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|error| self.silent(&error.into()))?;
        Ok(stream)
    }

    /// By its file; where it could make none, it binds the abstract name of all zeros.
    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.socket).or_else(|error| {
            // Another's may be there if it is denied us.
            if error.raw_os_error() == Some(Errno::EACCES as i32) || self.socket.exists() {
                return Err(error);
            }
            let zeros = SocketAddr::from_abstract_name([0; 107])?;
            UnixStream::connect_addr(&zeros).map_err(|_| error)
        })
    }

    fn refused(&self, error: &io::Error) -> Error {
        let refused = Error::new(
            self.socket.display(),
            format_args!("irqbalance (process {}) cannot be asked: {error}", self.pid),
        );
        match error.kind() {
            io::ErrorKind::PermissionDenied => refused.fix("run as root"),
            _ => refused.fix("\"systemctl restart irqbalance\", or stop it"),
        }
    }

    fn silent(&self, error: &io::Error) -> Error {
        self.error(format_args!("does not answer: {error}"))
            .fix("\"systemctl restart irqbalance\", or stop it")
    }

    fn error(&self, found: impl std::fmt::Display) -> Error {
        Error::new(format_args!("irqbalance (process {})", self.pid), found)
    }
}

/// The interrupts in an answer to `setup`; `None` if it is none.
fn parse(answer: &str) -> Option<Irqs> {
    let mut words = answer.split_whitespace();
    let number = |name: &str, words: &mut dyn Iterator<Item = &str>| {
        (words.next()? == name).then(|| words.next()?.parse::<u64>().ok())?
    };
    number("SLEEP", &mut words)?;
    let mut irqs = Irqs::new();
    loop {
        match words.next()? {
            "IRQ" => {
                irqs.insert(words.next()?.parse().ok()?);
                for name in ["LOAD", "DIFF", "CLASS"] {
                    number(name, &mut words)?;
                }
            }
            "BANNED" => return Some(irqs),
            _ => return None,
        }
    }
}

/// `24,25,31`, or `none`.
pub fn list(irqs: &Irqs, separator: &str) -> String {
    match irqs.is_empty() {
        true => "none".to_string(),
        false => irqs
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(separator),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeIrqbalance};

    fn irqs<const N: usize>(irqs: [u32; N]) -> Irqs {
        irqs.into()
    }

    #[test]
    fn reads_the_answer_to_setup() {
        assert_eq!(parse("SLEEP 10 BANNED 00000000"), Some(irqs([])));
        assert_eq!(
            parse(
                "SLEEP 1 IRQ 24 LOAD 0 DIFF 0 CLASS 0 IRQ 0 LOAD 18446744073709551615 DIFF 5 \
                 CLASS 4 BANNED 0000000f,00000000"
            ),
            Some(irqs([0, 24]))
        );
        for bad in [
            "",
            "SLEEP",
            "SLEEP 10",
            "SLEEP 10 IRQ 24",
            "SLEEP 10 IRQ x LOAD 0 DIFF 0 CLASS 0 BANNED 0",
            "SLEEP 10 IRQ 24 DIFF 0 LOAD 0 CLASS 0 BANNED 0",
            "TYPE 0 NUMBER 0 LOAD 0 SAVE_MODE 0",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn sets_the_list_and_reads_it_back() {
        let fake = Fake::new();
        let stub = FakeIrqbalance::start(&fake, SHORT, [7].into());
        let irqbalance = running(&fake.host()).unwrap();
        assert_eq!(irqbalance.banned_soon().unwrap(), irqs([7]));
        for list in [irqs([0, 7, 24]), irqs([]), irqs([25])] {
            irqbalance.set_banned(&list).unwrap();
            assert_eq!(stub.banned(), list);
        }
    }

    #[test]
    fn a_list_that_is_too_long_changes_nothing() {
        let fake = Fake::new();
        let many: Irqs = (1000..1200).collect();
        let stub = FakeIrqbalance::start(&fake, SHORT, [7].into());
        let error = running(&fake.host())
            .unwrap()
            .set_banned(&many)
            .unwrap_err();
        assert!(error.to_string().contains("1.9.5 or newer"), "{error}");
        assert_eq!(stub.banned(), irqs([7]));

        let fake = Fake::new();
        let stub = FakeIrqbalance::start(&fake, 16384, [7].into());
        running(&fake.host()).unwrap().set_banned(&many).unwrap();
        assert_eq!(stub.banned(), many);
    }

    #[test]
    fn a_list_that_reads_back_otherwise_is_an_error() {
        let fake = Fake::new();
        let stub = FakeIrqbalance::start(&fake, SHORT, [7].into());
        stub.be_deaf();
        let error = running(&fake.host())
            .unwrap()
            .set_banned(&irqs([8]))
            .unwrap_err();
        assert!(error.to_string().contains("but leaves 7 alone"), "{error}");
    }

    #[test]
    fn no_socket_is_an_error_and_no_process_is_none() {
        let fake = Fake::new();
        assert_eq!(running(&fake.host()), None);
        fake.file("proc/17/comm", "irqbalance\n");
        let error = running(&fake.host()).unwrap().banned().unwrap_err();
        assert!(error.to_string().contains("process 17"), "{error}");
    }
}
