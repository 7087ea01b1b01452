//! `cpubond vm echo` and `cpubond vm ask`: a server that tells which CPU received and which
//! served, and a client that counts what it is told, for the tests of steering.

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::thread::sched_getcpu;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const ANSWER: usize = 256;

/// Answer each TCP connection, and each datagram, with a line: TAG, the CPU that received, the
/// CPU that serves, the address that was asked for (TCP).
#[derive(clap::Args)]
pub struct Echo {
    /// Port, of both protocols and both families
    #[arg(long)]
    port: u16,
    /// What to call this server
    #[arg(long)]
    tag: String,
    /// Answer datagrams only, with SO_REUSEPORT
    #[arg(long)]
    udp_reuseport: bool,
}

impl Echo {
    /// Until killed.
    pub fn run(&self) -> Result<ExitCode> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port));
        let tag = self.tag.clone();
        let datagrams = move |udp: UdpSocket| -> io::Result<()> {
            let mut bytes = [0; ANSWER];
            loop {
                let (_, from) = udp.recv_from(&mut bytes)?;
                let line = format!("{tag} {} {} -\n", received(&udp)?, sched_getcpu());
                // Whoever asked may be gone.
                let _ = udp.send_to(line.as_bytes(), from);
            }
        };
        if self.udp_reuseport {
            let udp = rustix::net::socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
            sockopt::set_socket_reuseport(&udp, true)?;
            rustix::net::bind(&udp, &any).with_context(|| format!("UDP port {}", self.port))?;
            datagrams(udp.into())?;
            return Ok(ExitCode::FAILURE);
        }
        let tcp = TcpListener::bind(any).with_context(|| format!("TCP port {}", self.port))?;
        let udp = UdpSocket::bind(any).with_context(|| format!("UDP port {}", self.port))?;
        thread::spawn(move || datagrams(udp));
        loop {
            let (mut stream, _) = tcp.accept()?;
            let line = format!(
                "{} {} {} {}\n",
                self.tag,
                received(&stream)?,
                sched_getcpu(),
                stream.local_addr()?.ip().to_canonical()
            );
            let _ = stream.write_all(line.as_bytes());
        }
    }
}

fn received(socket: impl std::os::fd::AsFd) -> io::Result<u32> {
    Ok(sockopt::socket_incoming_cpu(socket)?)
}

/// Ask a server of `vm echo` again and again, and count the answers.
#[derive(clap::Args)]
pub struct Ask {
    /// The server
    to: SocketAddr,
    /// Own addresses, taken in turn; their number asks at a time
    #[arg(long, value_delimiter = ',', required = true)]
    from: Vec<IpAddr>,
    /// How often to ask in all
    #[arg(long, conflicts_with = "seconds")]
    count: Option<u32>,
    /// How long to ask
    #[arg(long)]
    seconds: Option<u32>,
    /// By datagrams, each address from one port
    #[arg(long)]
    udp: bool,
    /// Each datagram from a port of its own
    #[arg(long, requires = "udp")]
    new_flows: bool,
    /// Milliseconds to wait for an answer, or for a connection
    #[arg(long, default_value_t = 10_000)]
    timeout: u64,
}

/// One line of JSON.
#[derive(Debug, Default, Serialize)]
struct Report {
    schema: u32,
    asked: u32,
    /// By "TAG RECEIVED SERVED ADDRESS".
    answers: BTreeMap<String, u32>,
    /// The connection, or the datagram, was refused.
    refused: u32,
    /// The connection was made, and broken before the answer.
    broken: u32,
    /// No connection, or no answer, in time.
    silent: u32,
    longest_ms: u64,
    /// When the last of those that were not answered was given up, since the start.
    unanswered_until_ms: u64,
}

/// What the askers share.
struct Tally {
    report: Mutex<Report>,
    start: Instant,
    asked: AtomicU32,
    failed: AtomicBool,
}

enum Outcome {
    Answer(String),
    Refused,
    Broken,
    Silent,
}

impl Ask {
    /// 0 whatever the answers: judging is for who asked.
    pub fn run(&self) -> Result<ExitCode> {
        let tally = Tally {
            report: Mutex::new(Report {
                schema: 1,
                ..Report::default()
            }),
            start: Instant::now(),
            asked: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        };
        let end = self
            .seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
        thread::scope(|scope| {
            for from in &self.from {
                let (from, tally) = (*from, &tally);
                scope.spawn(move || self.ask(from, end, tally));
            }
        });
        let report = tally
            .report
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        println!("{}", serde_json::to_string(&report)?);
        Ok(ExitCode::from(u8::from(tally.failed.into_inner())))
    }

    /// From one address until it is enough.
    fn ask(&self, from: IpAddr, end: Option<Instant>, tally: &Tally) {
        let mut socket = None;
        while !tally.failed.load(Ordering::Relaxed)
            && end.is_none_or(|end| Instant::now() < end)
            && self
                .count
                .is_none_or(|count| tally.asked.fetch_add(1, Ordering::Relaxed) < count)
        {
            let start = Instant::now();
            let outcome = match self.udp {
                true => self.datagram(from, &mut socket),
                false => self.connection(from),
            };
            match outcome {
                Ok(outcome) => tally.count(outcome, start.elapsed()),
                Err(error) => {
                    eprintln!("cpubond: {from}: {error:#}");
                    tally.failed.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.timeout))
    }

    fn connection(&self, from: IpAddr) -> Result<Outcome> {
        let mut stream = TcpStream::from(bound(SocketType::STREAM, from)?);
        // Of connect(), too.
        stream.set_write_timeout(self.timeout())?;
        stream.set_read_timeout(self.timeout())?;
        if let Err(error) = rustix::net::connect(&stream, &self.to) {
            return match io::Error::from(error).kind() {
                io::ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(Outcome::Silent),
                // Its SYN was answered, what came next was not.
                io::ErrorKind::ConnectionReset => Ok(Outcome::Broken),
                _ if error == rustix::io::Errno::INPROGRESS => Ok(Outcome::Silent),
                _ => Err(io::Error::from(error)).context("connect"),
            };
        }
        let mut line = String::new();
        Ok(match stream.read_to_string(&mut line) {
            Ok(_) if line.ends_with('\n') => Outcome::Answer(line.trim_end().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Outcome::Silent,
            _ => Outcome::Broken,
        })
    }

    fn datagram(&self, from: IpAddr, socket: &mut Option<UdpSocket>) -> Result<Outcome> {
        if socket.is_none() || self.new_flows {
            let new = UdpSocket::from(bound(SocketType::DGRAM, from)?);
            new.connect(self.to).context("connect")?;
            new.set_read_timeout(self.timeout())?;
            *socket = Some(new);
        }
        let socket = socket.as_ref().context("no socket")?;
        let mut bytes = [0; ANSWER];
        let answer = socket.send(b"?").and_then(|_| socket.recv(&mut bytes));
        match answer {
            Ok(length) => Ok(Outcome::Answer(
                String::from_utf8_lossy(&bytes[..length])
                    .trim_end()
                    .to_owned(),
            )),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(Outcome::Silent),
                _ => Err(error).context("datagram"),
            },
        }
    }
}

impl Tally {
    fn count(&self, outcome: Outcome, took: Duration) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        report.asked += 1;
        report.longest_ms = report.longest_ms.max(ms(took));
        if !matches!(outcome, Outcome::Answer(_)) {
            report.unanswered_until_ms = ms(self.start.elapsed());
        }
        match outcome {
            Outcome::Answer(line) => *report.answers.entry(line).or_default() += 1,
            Outcome::Refused => report.refused += 1,
            Outcome::Broken => report.broken += 1,
            Outcome::Silent => report.silent += 1,
        }
    }
}

/// A socket bound to an own address, on a port of the kernel's choice.
fn bound(kind: SocketType, from: IpAddr) -> Result<OwnedFd> {
    let family = match from {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket(family, kind, None).context("socket")?;
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))
        .with_context(|| format!("{from}: not an address of this machine"))?;
    Ok(socket)
}
