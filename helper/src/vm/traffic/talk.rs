//! Requests and answers: `ask` and `answer`.
//!
//! By TCP: a length (4 bytes, big endian) and as many bytes, which come back, in a
//! connection of its own. By UDP: a datagram, which comes back.

use super::{bound_socket, pin};
use crate::cpulist::CpuSet;
use anyhow::{Context, Result, anyhow, bail};
use rustix::net::{SocketType, ipproto};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// Nothing here takes long, but the host may be busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// No request of ours is longer.
const LONGEST: usize = 1 << 24;

#[derive(Clone, Copy, clap::ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
}

/// Send requests, and check each answer.
#[derive(clap::Args)]
pub struct Ask {
    /// By what
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: Protocol,
    /// Addresses to ask from, each in turn and by a thread of its own
    #[arg(long, value_name = "ADDR", value_delimiter = ',', required = true)]
    from: Vec<IpAddr>,
    /// Where `answer` is; each in turn
    #[arg(long, value_name = "ADDR:PORT", value_delimiter = ',', required = true)]
    to: Vec<SocketAddr>,
    /// How many in all, each a flow of its own
    #[arg(long)]
    count: usize,
    /// Bytes of a request, and of its answer
    #[arg(long, default_value_t = 128)]
    size: usize,
}

/// What `ask` prints.
#[derive(Serialize)]
struct Asked {
    asked: usize,
    answered: usize,
}

impl Ask {
    /// Ask all; fails if one was not answered.
    pub fn run(&self) -> Result<ExitCode> {
        if self.size > LONGEST {
            bail!("--size {}: want at most {LONGEST}", self.size);
        }
        let failures: Vec<anyhow::Error> = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.from.len())
                .map(|first| scope.spawn(move || self.ask_from(first)))
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| vec![anyhow!("a thread panicked")])
                })
                .collect()
        });
        super::tell(Asked {
            asked: self.count,
            answered: self.count.saturating_sub(failures.len()),
        })?;
        match failures.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(ExitCode::SUCCESS),
        }
    }

    /// All from one address; what went wrong.
    fn ask_from(&self, first: usize) -> Vec<anyhow::Error> {
        let turns = (first..self.count).step_by(self.from.len());
        turns
            .filter_map(|number| {
                let from = self.from[first];
                let to = self.to[number / self.from.len() % self.to.len()];
                let ask = match self.protocol {
                    Protocol::Tcp => ask_tcp,
                    Protocol::Udp => ask_udp,
                };
                ask(from, to, &request(number, self.size))
                    .with_context(|| format!("request {number}, {from} to {to}"))
                    .err()
            })
            .collect()
    }
}

/// Like no other request.
fn request(number: usize, size: usize) -> Vec<u8> {
    let number = number.to_be_bytes();
    number.into_iter().cycle().take(size).collect()
}

fn ask_tcp(from: IpAddr, to: SocketAddr, request: &[u8]) -> Result<()> {
    let socket = bound_socket(SocketType::STREAM, ipproto::TCP, from)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    // Of connecting too.
    stream.set_write_timeout(Some(PATIENCE))?;
    rustix::net::connect(&stream, &to).context("cannot connect")?;
    stream.write_all(&u32::try_from(request.len())?.to_be_bytes())?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("no answer")?;
    if answer != request {
        bail!("a wrong answer, of {} bytes", answer.len());
    }
    Ok(())
}

fn ask_udp(from: IpAddr, to: SocketAddr, request: &[u8]) -> Result<()> {
    let socket = UdpSocket::from(bound_socket(SocketType::DGRAM, ipproto::UDP, from)?);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(request)?;
    let mut answer = vec![0; request.len() + 1];
    let length = socket.recv(&mut answer).context("no answer")?;
    if &answer[..length] != request {
        bail!("a wrong answer, of {length} bytes");
    }
    Ok(())
}

/// Answer requests until killed.
#[derive(clap::Args)]
pub struct Answer {
    /// Where, by TCP and by UDP
    #[arg(long, value_name = "ADDR:PORT", value_delimiter = ',', required = true)]
    at: Vec<SocketAddr>,
    /// A thread pinned on each of these takes what comes (default: one, unpinned)
    #[arg(long, value_name = "CPULIST")]
    cpus: Option<CpuSet>,
}

impl Answer {
    /// Answer for ever.
    pub fn run(&self) -> Result<ExitCode> {
        let cpus: Vec<Option<u32>> = match &self.cpus {
            Some(cpus) => cpus.iter().map(Some).collect(),
            None => vec![None],
        };
        // All are there before the first answers.
        let sockets = self
            .at
            .iter()
            .map(|at| {
                let what = || format!("{at}: cannot listen");
                Ok((
                    TcpListener::bind(at).with_context(what)?,
                    UdpSocket::bind(at).with_context(what)?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for (tcp, udp) in &sockets {
                for &cpu in &cpus {
                    scope.spawn(move || complain(serve(cpu, || answer_tcp(tcp))));
                    scope.spawn(move || complain(serve(cpu, || answer_udp(udp))));
                }
            }
        });
        bail!("no thread is left")
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

/// Who asked in vain tells it too, and fails.
fn complain(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("cpubond: vm traffic answer: {error:#}");
    }
}

fn answer_tcp(listener: &TcpListener) -> Result<()> {
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
        stream.write_all(&request)?;
        Ok(())
    };
    talk().with_context(|| from.to_string())
}

fn answer_udp(socket: &UdpSocket) -> Result<()> {
    let mut request = [0; 1 << 16];
    let (length, from) = socket.recv_from(&mut request)?;
    socket
        .send_to(&request[..length], from)
        .with_context(|| from.to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn what_is_asked_is_answered() {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let (tcp_at, udp_at) = (
            tcp.local_addr().expect("address"),
            udp.local_addr().expect("address"),
        );
        thread::spawn(move || complain(serve(None, || answer_tcp(&tcp))));
        thread::spawn(move || complain(serve(None, || answer_udp(&udp))));
        let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for size in [0, 1, 128, 1 << 20] {
            ask_tcp(from, tcp_at, &request(7, size)).expect("answered");
        }
        ask_udp(from, udp_at, &request(7, 1000)).expect("answered");
    }

    #[test]
    fn a_wrong_answer_is_none() {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let at = udp.local_addr().expect("address");
        thread::spawn(move || {
            let mut request = [0; 100];
            let (_, from) = udp.recv_from(&mut request).expect("a request");
            udp.send_to(&request[..99], from).expect("sent");
        });
        let error = ask_udp(IpAddr::V4(Ipv4Addr::LOCALHOST), at, &request(1, 100))
            .expect_err("a byte is missing");
        assert!(error.to_string().contains("99 bytes"), "{error}");
    }
}
