//! Numbered datagrams: `send` and `receive`.
//!
//! A datagram is a kind (a byte) and a number (8 bytes, big endian). The receiver
//! sends a hello back, so that the sender knows that it is there, and ends at an end,
//! whose number tells how many there were.

use super::super::agent;
use super::count::{Counter, Schedule};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use serde::Serialize;
use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const HELLO: u8 = b'h';
const DATA: u8 = b'd';
const END: u8 = b'e';

/// For the receiver to be there, and for it to hear anything at all: emulated, on a
/// busy host.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is still on its way when the last one is sent.
const SETTLE: Duration = Duration::from_millis(500);
/// Two of the bonds' miimon, for them to see that a cable is back.
const CALM: Duration = Duration::from_millis(100);
/// Ends, for one may be lost.
const ENDS: u32 = 5;
/// Seconds of datagrams, for a receiver that does not get to run.
const BUFFER: usize = 4 << 20;

/// Send numbered datagrams at a steady pace, pulling a cable now and then.
#[derive(clap::Args)]
pub struct Send {
    /// Where `receive` is
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
    /// The flow: address and port to send from
    #[arg(long, value_name = "ADDR:PORT")]
    from: SocketAddr,
    /// Datagrams a second
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// How many trials
    #[arg(long, default_value_t = 1)]
    trials: u64,
    #[command(flatten)]
    schedule: Schedule,
    /// The cable to pull and put back in each trial
    #[arg(long, value_name = "ethK", requires = "pull")]
    cable: Option<String>,
}

/// What `send` prints.
#[derive(Serialize)]
struct Sent {
    sent: u64,
    /// Cables pulled and put back.
    cables: usize,
    /// The longest that the host took for one.
    cable_ms: u128,
}

impl Send {
    /// Send all trials.
    pub fn run(&self) -> Result<ExitCode> {
        self.schedule.check().map_err(|error| anyhow!(error))?;
        let socket = UdpSocket::bind(self.from)
            .with_context(|| format!("{}: cannot send from there", self.from))?;
        socket.connect(self.to)?;
        self.greet(&socket)?;

        let (at_mark, marks) = mpsc::channel();
        let (worked, done) = mpsc::channel();
        let cables = self
            .cable
            .clone()
            .map(|cable| thread::spawn(move || work_cable(&cable, &marks, &worked)));
        let mut working = 0;
        let pause = Duration::from_secs(1) / self.rate;
        let count = self.trials * self.schedule.trial;
        let mut due = Instant::now();
        for number in 0..count {
            let within = Some(number % self.schedule.trial);
            if within == Some(0) && working > 0 {
                // What the host is slow to do must not reach into the next trial. It is no
                // use to wait for a thread that failed: told below.
                while working > 0 && done.recv().is_ok() {
                    working -= 1;
                }
                thread::sleep(CALM);
                due = Instant::now();
            }
            if cables.is_some() && (within == self.schedule.pull || within == self.schedule.restore)
            {
                let _ = at_mark.send(within == self.schedule.restore);
                working += 1;
            }
            // A moment without carrier may be refused. That is a loss like any other.
            let _ = socket.send(&datagram(DATA, number));
            // Time that the host took from us is not made up for with a burst.
            due = (due + pause).max(Instant::now());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        drop(at_mark);
        let times = match cables {
            Some(cables) => cables
                .join()
                .map_err(|_| anyhow!("the cables' thread panicked"))??,
            None => Vec::new(),
        };
        thread::sleep(SETTLE);
        for _ in 0..ENDS {
            // The first may have ended the receiver: the next are refused.
            let _ = socket.send(&datagram(END, count));
            thread::sleep(SETTLE / ENDS);
        }
        super::tell(Sent {
            sent: count,
            cables: times.len(),
            cable_ms: times.iter().map(Duration::as_millis).max().unwrap_or(0),
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn greet(&self, socket: &UdpSocket) -> Result<()> {
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let end = Instant::now() + PATIENCE;
        let mut answer = [0; 9];
        while Instant::now() < end {
            // Refused while there is nobody.
            let _ = socket.send(&datagram(HELLO, 0));
            if socket.recv(&mut answer).is_ok() && answer[0] == HELLO {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("{}: no answer; is `vm traffic receive` there?", self.to)
    }
}

/// Pull the cable (false) or put it back (true) as told, in a thread of its own so
/// that the datagrams keep their pace. How long each took.
fn work_cable(
    cable: &str,
    marks: &mpsc::Receiver<bool>,
    worked: &mpsc::Sender<()>,
) -> Result<Vec<Duration>> {
    marks
        .iter()
        .map(|back| {
            let start = Instant::now();
            let state = if back { "on" } else { "off" };
            let args = ["link", cable, state].map(str::to_owned);
            match agent::call(&args)? {
                ExitCode::SUCCESS => {
                    // The sender may be through.
                    let _ = worked.send(());
                    Ok(start.elapsed())
                }
                _ => bail!("{cable}: the host does not put the cable {state}"),
            }
        })
        .collect()
}

fn datagram(kind: u8, number: u64) -> [u8; 9] {
    let mut bytes = [kind; 9];
    bytes[1..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// Count what arrives of `send`'s datagrams.
#[derive(clap::Args)]
pub struct Receive {
    /// Where `send` sends to
    #[arg(long, value_name = "ADDR:PORT")]
    at: SocketAddr,
    #[command(flatten)]
    schedule: Schedule,
}

impl Receive {
    /// Count to the end.
    pub fn run(&self) -> Result<ExitCode> {
        self.schedule.check().map_err(|error| anyhow!(error))?;
        let socket =
            UdpSocket::bind(self.at).with_context(|| format!("{}: cannot bind", self.at))?;
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
        // When the kernel had it, not when this process got to run.
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        socket.set_read_timeout(Some(PATIENCE))?;

        let mut counter = Counter::new(self.schedule);
        loop {
            let (kind, number, from, time) = take(&socket)
                .with_context(|| format!("{}: the datagrams stopped with no end", self.at))?;
            match kind {
                HELLO => {
                    socket.send_to(&datagram(HELLO, 0), from)?;
                }
                DATA if u32::try_from(number).is_ok() => counter.arrived(number, time),
                END => {
                    super::tell(counter.report(number))?;
                    return Ok(ExitCode::SUCCESS);
                }
                _ => bail!("{}: {from} sent what is no datagram of ours", self.at),
            }
        }
    }
}

/// The next datagram: kind, number, sender, ns.
fn take(socket: &UdpSocket) -> Result<(u8, u64, SocketAddr, u64)> {
    let mut bytes = [0; 16];
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(nix::sys::time::TimeSpec);
    let message = recvmsg::<nix::sys::socket::SockaddrStorage>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let time = message
        .cmsgs()?
        .find_map(|part| match part {
            ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
            _ => None,
        })
        .context("the kernel gave no time of arrival")?;
    let address = message.address.context("a datagram from nowhere")?;
    let from = if let Some(v4) = address.as_sockaddr_in() {
        SocketAddr::new(IpAddr::V4(v4.ip()), v4.port())
    } else if let Some(v6) = address.as_sockaddr_in6() {
        SocketAddr::new(IpAddr::V6(v6.ip()), v6.port())
    } else {
        bail!("{address}: not an IP address")
    };
    let length = message.bytes;
    let number = bytes[1..9].try_into().map(u64::from_be_bytes)?;
    if length != 9 {
        bail!("{from} sent {length} bytes, not 9");
    }
    Ok((bytes[0], number, from, u64::try_from(time.as_nanos())?))
}
