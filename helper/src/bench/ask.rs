//! `cpubond bench ask`: clients, each with an address of its own, that make a known number of
//! requests, each over a new connection. In the lab's peer, or on the client machine of
//! `cpubond bench native`.
//!
//! `ab` binds to a port of the kernel's choice, which is random where the address is given.
//! Given a first port, these go through the ports in order, as a client does that gives no
//! address, so a switch that spreads by ports spreads them evenly, however few there are.
//!
//! Nor does `ab` account for each connection once servers die under it: it may wait at the end
//! for one that it has not got any more. These tell what became of each.

use anyhow::{Context, Result, anyhow, bail};
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Make HTTP requests, each over a new connection: the client of 'bench native'
#[derive(clap::Args)]
#[command(after_help = "\
Example, for a file of 128 bytes:
  cpubond bench ask --to 192.0.2.1:80 --from 192.0.2.11,192.0.2.12 --requests 100000 \\
      --at-once 16 --bytes 128 --give-up

Prints JSON: requests that were answered in full, those that were not, of these the refused and
the silent, why the first was not, and the nanoseconds from the first request to the last answer. The exit code is 0
whatever the answers.")]
pub struct Ask {
    /// The server
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
    /// Own addresses
    #[arg(long, value_name = "ADDR", value_delimiter = ',', required = true)]
    from: Vec<IpAddr>,
    /// Requests from each address
    #[arg(long)]
    requests: u32,
    /// Of these, so many at once
    #[arg(long, default_value_t = 2)]
    at_once: u16,
    /// Source port of the first from each address; the next has the next port but one (default:
    /// the kernel's choice)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    first_port: Option<u16>,
    /// Bytes that an answer has, without its head
    #[arg(long)]
    bytes: usize,
    /// Make no more once a request has failed
    #[arg(long)]
    give_up: bool,
    /// Seconds to wait for a connection, and for its answer: long, for the server may be emulated
    /// and counted
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
}

/// How they fared; what `ask` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Answered in full.
    pub complete: u64,
    /// Not so.
    pub failed: u64,
    /// Of these: nobody listened.
    pub refused: u64,
    /// Of these: nothing was heard for the time they had.
    pub silent: u64,
    /// Why the first of these failed.
    pub why: Option<String>,
    /// Wall time, from before the first to after the last.
    pub nanoseconds: u64,
}

impl Ask {
    /// As arguments.
    pub fn words(
        to: SocketAddrV4,
        from: &[Ipv4Addr],
        requests: u16,
        first_port: u16,
        bytes: u32,
    ) -> String {
        let from: Vec<String> = from.iter().map(Ipv4Addr::to_string).collect();
        format!(
            "--to {to} --from {} --requests {requests} --first-port {first_port} --bytes {bytes}",
            from.join(",")
        )
    }

    /// 0 whatever the answers: judging is for who asked.
    pub fn run(&self) -> Result<ExitCode> {
        if let Some(first) = self.first_port
            && u64::from(first) + 2 * u64::from(self.requests) > u64::from(u16::MAX)
        {
            bail!(
                "{} requests from port {first} on: there are no ports beyond 65535",
                self.requests
            );
        }
        let asked = Mutex::new(Asked::default());
        let clients: Vec<_> = self
            .from
            .iter()
            .map(|&from| (from, AtomicU32::new(0)))
            .collect();
        let start = Instant::now();
        thread::scope(|scope| {
            for (from, next) in &clients {
                for _ in 0..self.at_once {
                    let asked = &asked;
                    scope.spawn(move || self.client(*from, next, asked));
                }
            }
        });
        let mut asked = asked.into_inner().unwrap_or_else(PoisonError::into_inner);
        asked.nanoseconds = u64::try_from(start.elapsed().as_nanos())?;
        println!("{}", serde_json::to_string(&asked)?);
        Ok(ExitCode::SUCCESS)
    }

    /// One request after the other, until all of the address are made.
    fn client(&self, from: IpAddr, next: &AtomicU32, asked: &Mutex<Asked>) {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= self.requests {
                return;
            }
            let port = match self.first_port {
                // No more than there are, see run().
                Some(first) => u16::try_from(u32::from(first) + 2 * number).unwrap_or(u16::MAX),
                None => 0,
            };
            let from = SocketAddr::new(from, port);
            let outcome = self.request(from);
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(()) => asked.complete += 1,
                Err(error) => {
                    asked.failed += 1;
                    match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                        Some(ErrorKind::ConnectionRefused) => asked.refused += 1,
                        Some(ErrorKind::WouldBlock | ErrorKind::TimedOut) => asked.silent += 1,
                        _ => {}
                    }
                    asked
                        .why
                        .get_or_insert_with(|| format!("{from}: {error:#}"));
                }
            }
            if self.give_up && asked.failed > 0 {
                return;
            }
        }
    }

    fn request(&self, from: SocketAddr) -> Result<()> {
        let family = match from {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &from).context("bind")?;
        let mut stream = TcpStream::from(socket);
        // Of connect(), too.
        let patience = Some(Duration::from_secs(self.patience));
        stream.set_write_timeout(patience)?;
        stream.set_read_timeout(patience)?;
        rustix::net::connect(&stream, &self.to)
            .map_err(|error| match error {
                // The time of a blocking connect() is over.
                rustix::io::Errno::INPROGRESS => ErrorKind::TimedOut.into(),
                error => io::Error::from(error),
            })
            .context("connect")?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: server\r\nAccept: */*\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).context("answer")?;
        check(&answer, self.bytes)
    }
}

/// Whether an answer is all of what was asked for.
fn check(answer: &[u8], bytes: usize) -> Result<()> {
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or_else(|| {
            anyhow!(
                "no answer, or its head is cut short: {} bytes",
                answer.len()
            )
        })?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if status != "200" {
        bail!("status {status}");
    }
    let found = answer.len() - end - 4;
    if found != bytes {
        bail!("{found} bytes, want {bytes}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_answer_is_whole_or_it_failed() {
        assert!(check(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nxxx", 3).is_ok());
        for (answer, complaint) in [
            (&b""[..], "no answer"),
            (b"HTTP/1.0 200 OK\r\n", "cut short"),
            (b"HTTP/1.0 404 Not Found\r\n\r\nxxx", "status 404"),
            (b"HTTP/1.0 200 OK\r\n\r\nxx", "2 bytes, want 3"),
        ] {
            let error = check(answer, 3).expect_err(complaint).to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn each_request_has_a_connection_and_a_port_of_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let to = listener.local_addr().expect("has an address");
        let server = thread::spawn(move || {
            let mut ports = Vec::new();
            for _ in 0..6 {
                let (mut stream, from) = listener.accept().expect("a client");
                let mut request = [0; 512];
                let _ = stream.read(&mut request).expect("a request");
                stream
                    .write_all(b"HTTP/1.0 200 OK\r\n\r\nx")
                    .expect("answers");
                ports.push(from.port());
            }
            ports.sort_unstable();
            ports
        });
        let ask = Ask {
            to,
            from: vec![Ipv4Addr::LOCALHOST.into()],
            requests: 6,
            at_once: 2,
            first_port: Some(23457),
            bytes: 1,
            give_up: false,
            patience: 60,
        };
        ask.run().expect("asks");
        assert_eq!(
            server.join().expect("ends"),
            [23457, 23459, 23461, 23463, 23465, 23467]
        );
    }
}
