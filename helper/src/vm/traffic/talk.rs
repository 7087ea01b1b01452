//! Requests and answers: `ask` and `answer`.
//!
//! By TCP: a length (4 bytes, big endian) and as many bytes, in a connection of its own.
//! By UDP: a datagram. The same bytes come back. A request of none is answered with a
//! line that says who serves: a tag, the CPU that received (SO_INCOMING_CPU), the CPU
//! that serves, and by TCP the address that was asked for.

use super::{bound_socket, pin, tell};
use crate::cpulist::CpuSet;
use anyhow::{Context, Result, anyhow, bail};
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};
use rustix::thread::sched_getcpu;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Nothing here takes long, but the host may be busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// No request of ours is longer.
const LONGEST: usize = 1 << 24;
/// Room for the line that says who serves.
const LINE: usize = 256;
const BACKLOG: i32 = 1024;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
}

/// Send requests, and count what becomes of them; judging is for who reads that.
#[derive(clap::Args)]
pub struct Ask {
    /// By what
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: Protocol,
    /// Addresses to ask from, each by a thread of its own
    #[arg(long, value_name = "ADDR", value_delimiter = ',', required = true)]
    from: Vec<IpAddr>,
    /// Where `answer` is; each in turn
    #[arg(long, value_name = "ADDR:PORT", value_delimiter = ',', required = true)]
    to: Vec<SocketAddr>,
    /// How many in all, as many from each address
    #[arg(long, required_unless_present = "seconds")]
    count: Option<usize>,
    /// For how long
    #[arg(long)]
    seconds: Option<u64>,
    /// Bytes of a request, and of its answer; 0 asks who serves
    #[arg(long, default_value_t = 128)]
    size: usize,
    /// By UDP: all from one port of each address (default: each a flow of its own)
    #[arg(long)]
    one_flow: bool,
    /// Milliseconds to wait for a connection, and for an answer
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    timeout: u64,
}

/// What `ask` prints.
#[derive(Default, Serialize)]
struct Asked {
    asked: usize,
    answered: usize,
    /// With `--size 0`: by what they say.
    answers: BTreeMap<String, usize>,
    /// The connection, or the datagram, was refused.
    refused: usize,
    /// The connection was made, and broken before its answer, or that was a wrong one.
    broken: usize,
    /// No connection, or no answer, in time.
    silent: usize,
    longest_ms: u128,
    /// When the last of those that were not answered was given up, since the start.
    unanswered_until_ms: u128,
}

/// What became of a request.
enum Outcome {
    Answer(Vec<u8>),
    Refused,
    Broken,
    Silent,
}

impl Ask {
    /// Ask all.
    pub fn run(&self) -> Result<ExitCode> {
        if self.size > LONGEST {
            bail!("--size {}: want at most {LONGEST}", self.size);
        }
        let begin = Instant::now();
        let asked = Mutex::new(Asked::default());
        // One that cannot ask at all stops the others.
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.from.len())
                .map(|first| {
                    let (asked, failed) = (&asked, &failed);
                    scope.spawn(move || {
                        self.ask_from(first, begin, asked, failed)
                            .inspect_err(|_| failed.store(true, Ordering::Relaxed))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
            })
        })?;
        tell(asked.into_inner().unwrap_or_else(PoisonError::into_inner))?;
        Ok(ExitCode::SUCCESS)
    }

    /// All from one address.
    fn ask_from(
        &self,
        first: usize,
        begin: Instant,
        asked: &Mutex<Asked>,
        failed: &AtomicBool,
    ) -> Result<()> {
        let from = self.from[first];
        let end = self
            .seconds
            .map(|seconds| begin + Duration::from_secs(seconds));
        let mut socket = None;
        for number in (first..self.count.unwrap_or(usize::MAX)).step_by(self.from.len()) {
            let start = Instant::now();
            if failed.load(Ordering::Relaxed) || end.is_some_and(|end| end <= start) {
                break;
            }
            let to = self.to[number / self.from.len() % self.to.len()];
            let request = request(number, self.size);
            let outcome = match self.protocol {
                Protocol::Tcp => self.ask_tcp(from, to, &request),
                Protocol::Udp => {
                    let socket = match &mut socket {
                        Some(socket) if self.one_flow => socket,
                        socket => socket.insert(UdpSocket::from(bound_socket(
                            SocketType::DGRAM,
                            ipproto::UDP,
                            from,
                        )?)),
                    };
                    self.ask_udp(socket, to, &request)
                }
            }
            .with_context(|| format!("request {number}, {from} to {to}"))?;
            asked.lock().unwrap_or_else(PoisonError::into_inner).add(
                outcome,
                &request,
                start.elapsed(),
                begin.elapsed(),
            );
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.timeout))
    }

    fn ask_tcp(&self, from: IpAddr, to: SocketAddr, request: &[u8]) -> Result<Outcome> {
        let socket = bound_socket(SocketType::STREAM, ipproto::TCP, from)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(self.timeout())?;
        // Of connecting too.
        stream.set_write_timeout(self.timeout())?;
        if let Err(error) = rustix::net::connect(&stream, &to) {
            return match io::Error::from(error).kind() {
                ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
                // Its SYN was answered, what came next was not.
                ErrorKind::ConnectionReset => Ok(Outcome::Broken),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(Outcome::Silent),
                _ if error == rustix::io::Errno::INPROGRESS => Ok(Outcome::Silent),
                _ => Err(io::Error::from(error)).context("cannot connect"),
            };
        }
        let length = u32::try_from(request.len())?;
        let mut answer = Vec::new();
        let talked = stream
            .write_all(&length.to_be_bytes())
            .and_then(|()| stream.write_all(request))
            .and_then(|()| stream.read_to_end(&mut answer));
        Ok(match talked {
            Ok(_) => Outcome::Answer(answer),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Outcome::Silent,
            Err(_) => Outcome::Broken,
        })
    }

    fn ask_udp(&self, socket: &UdpSocket, to: SocketAddr, request: &[u8]) -> Result<Outcome> {
        socket.set_read_timeout(self.timeout())?;
        socket.connect(to).context("cannot connect")?;
        let mut answer = vec![0; request.len() + LINE];
        match socket.send(request).and_then(|_| socket.recv(&mut answer)) {
            Ok(length) => {
                answer.truncate(length);
                Ok(Outcome::Answer(answer))
            }
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(Outcome::Silent),
                _ => Err(error).context("datagram"),
            },
        }
    }
}

impl Asked {
    /// `at` is since the start.
    fn add(&mut self, outcome: Outcome, request: &[u8], took: Duration, at: Duration) {
        let answered = self.answered;
        self.asked += 1;
        self.longest_ms = self.longest_ms.max(took.as_millis());
        match outcome {
            Outcome::Answer(answer) if request.is_empty() && answer.ends_with(b"\n") => {
                let line = String::from_utf8_lossy(&answer).trim_end().to_owned();
                *self.answers.entry(line).or_default() += 1;
                self.answered += 1;
            }
            Outcome::Answer(answer) if !request.is_empty() && answer == request => {
                self.answered += 1;
            }
            Outcome::Answer(_) | Outcome::Broken => self.broken += 1,
            Outcome::Refused => self.refused += 1,
            Outcome::Silent => self.silent += 1,
        }
        if self.answered == answered {
            self.unanswered_until_ms = at.as_millis();
        }
    }
}

/// Like no other request.
fn request(number: usize, size: usize) -> Vec<u8> {
    let number = number.to_be_bytes();
    number.into_iter().cycle().take(size).collect()
}

/// Answer requests until killed.
#[derive(clap::Args)]
pub struct Answer {
    /// Where; [::] is of both families
    #[arg(long, value_name = "ADDR:PORT", value_delimiter = ',', required = true)]
    at: Vec<SocketAddr>,
    /// By what (default: both)
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// A thread pinned on each of these takes what comes (default: one, unpinned)
    #[arg(long, value_name = "CPULIST")]
    cpus: Option<CpuSet>,
    /// What this server is called in answers to who serves
    #[arg(long, default_value = "-")]
    tag: String,
    /// With SO_REUSEPORT
    #[arg(long)]
    reuseport: bool,
}

/// Where requests come in.
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Answer {
    /// Answer for ever.
    pub fn run(&self) -> Result<ExitCode> {
        let cpus: Vec<Option<u32>> = match &self.cpus {
            Some(cpus) => cpus.iter().map(Some).collect(),
            None => vec![None],
        };
        // All are there before the first answers.
        let mut sockets = Vec::new();
        for &at in &self.at {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                if self.protocol.is_none_or(|only| only == protocol) {
                    let socket = self
                        .listen(protocol, at)
                        .with_context(|| format!("{at}: cannot listen"))?;
                    sockets.push(socket);
                }
            }
        }
        thread::scope(|scope| {
            for socket in &sockets {
                for &cpu in &cpus {
                    scope.spawn(move || {
                        complain(serve(cpu, || match socket {
                            Socket::Tcp(listener) => answer_tcp(listener, &self.tag),
                            Socket::Udp(socket) => answer_udp(socket, &self.tag),
                        }));
                    });
                }
            }
        });
        bail!("no thread is left")
    }

    fn listen(&self, protocol: Protocol, at: SocketAddr) -> io::Result<Socket> {
        let family = match at {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let open = |kind| -> io::Result<OwnedFd> {
            let socket = rustix::net::socket(family, kind, None)?;
            sockopt::set_socket_reuseaddr(&socket, kind == SocketType::STREAM)?;
            sockopt::set_socket_reuseport(&socket, self.reuseport)?;
            rustix::net::bind(&socket, &at)?;
            Ok(socket)
        };
        Ok(match protocol {
            Protocol::Tcp => {
                let socket = open(SocketType::STREAM)?;
                rustix::net::listen(&socket, BACKLOG)?;
                Socket::Tcp(socket.into())
            }
            Protocol::Udp => Socket::Udp(open(SocketType::DGRAM)?.into()),
        })
    }
}

/// Answer on a CPU; what goes wrong with one request is no concern of the next.
fn serve(cpu: Option<u32>, mut answer: impl FnMut() -> Result<()>) -> Result<()> {
    if let Some(cpu) = cpu {
        pin(None, cpu)?;
    }
    loop {
        complain(answer());
    }
}

/// Who asked in vain counts it too.
fn complain(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("cpubond: vm traffic answer: {error:#}");
    }
}

fn answer_tcp(listener: &TcpListener, tag: &str) -> Result<()> {
    let (mut stream, from) = listener.accept()?;
    let mut talk = || -> Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        if length > LONGEST {
            bail!("a request of {length} bytes; want at most {LONGEST}");
        }
        let mut request = vec![0; length];
        stream.read_exact(&mut request)?;
        if request.is_empty() {
            let address = stream.local_addr()?.ip().to_canonical();
            request = who(tag, &stream, &address.to_string())?;
        }
        stream.write_all(&request)?;
        Ok(())
    };
    talk().with_context(|| from.to_string())
}

fn answer_udp(socket: &UdpSocket, tag: &str) -> Result<()> {
    let mut request = [0; 1 << 16];
    let (length, from) = socket.recv_from(&mut request)?;
    let line = match length {
        0 => who(tag, socket, "-")?,
        _ => Vec::new(),
    };
    let answer = if length == 0 {
        &line
    } else {
        &request[..length]
    };
    socket
        .send_to(answer, from)
        .with_context(|| from.to_string())?;
    Ok(())
}

/// The line that says who serves.
fn who(tag: &str, socket: impl AsFd, address: &str) -> io::Result<Vec<u8>> {
    let received = sockopt::socket_incoming_cpu(socket)?;
    let line = format!("{tag} {received} {} {address}\n", sched_getcpu());
    Ok(line.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn ask() -> Ask {
        Ask {
            protocol: Protocol::Tcp,
            from: Vec::new(),
            to: Vec::new(),
            count: None,
            seconds: None,
            size: 0,
            one_flow: false,
            timeout: 10_000,
        }
    }

    fn answer(protocol: Protocol) -> (Socket, SocketAddr) {
        let answer = Answer {
            at: Vec::new(),
            protocol: None,
            cpus: None,
            tag: String::new(),
            reuseport: false,
        };
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let socket = answer.listen(protocol, any).expect("listens");
        let at = match &socket {
            Socket::Tcp(socket) => socket.local_addr(),
            Socket::Udp(socket) => socket.local_addr(),
        };
        (socket, at.expect("address"))
    }

    fn added(outcome: Outcome, request: &[u8]) -> Asked {
        let mut asked = Asked::default();
        asked.add(outcome, request, Duration::ZERO, Duration::ZERO);
        asked
    }

    #[test]
    fn what_is_asked_is_answered() {
        let (Socket::Tcp(tcp), tcp_at) = answer(Protocol::Tcp) else {
            panic!("not TCP");
        };
        let (Socket::Udp(udp), udp_at) = answer(Protocol::Udp) else {
            panic!("not UDP");
        };
        thread::spawn(move || complain(serve(None, || answer_tcp(&tcp, "tag"))));
        thread::spawn(move || complain(serve(None, || answer_udp(&udp, "tag"))));
        let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for size in [1, 128, 1 << 20] {
            let request = request(7, size);
            let outcome = ask().ask_tcp(from, tcp_at, &request).expect("asked");
            assert_eq!(added(outcome, &request).answered, 1, "{size}");
        }
        let outcome = ask().ask_tcp(from, tcp_at, &[]).expect("asked");
        let asked = added(outcome, &[]);
        let line = asked.answers.keys().next().expect("a line");
        assert!(line.starts_with("tag "), "{line}");
        assert!(line.ends_with(" 127.0.0.1"), "{line}");

        let socket =
            UdpSocket::from(bound_socket(SocketType::DGRAM, ipproto::UDP, from).expect("bound"));
        let request = request(7, 1000);
        let outcome = ask().ask_udp(&socket, udp_at, &request).expect("asked");
        assert_eq!(added(outcome, &request).answered, 1);
        let outcome = ask().ask_udp(&socket, udp_at, &[]).expect("asked");
        let asked = added(outcome, &[]);
        assert!(asked.answers.keys().all(|line| line.ends_with(" -")));
        assert_eq!(asked.answered, 1);
    }

    #[test]
    fn a_wrong_answer_is_none() {
        for (answer, request) in [
            (&b"xx"[..], &b"xxx"[..]),
            (b"", b"x"),
            (b"", b""),
            (b"no end", b""),
        ] {
            let asked = added(Outcome::Answer(answer.to_vec()), request);
            assert_eq!((asked.answered, asked.broken), (0, 1));
        }
    }

    #[test]
    fn who_does_not_listen_refuses() {
        let (socket, at) = answer(Protocol::Tcp);
        drop(socket);
        let outcome = ask()
            .ask_tcp(IpAddr::V4(Ipv4Addr::LOCALHOST), at, &[])
            .expect("asked");
        assert_eq!(added(outcome, &[]).refused, 1);
    }
}
