//! One TCP stream: `bulk` and `drain`.

use super::pin;
use crate::cpulist::CpuSet;
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::getsockopt;
use nix::{getsockopt_impl, sockopt_impl};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

sockopt_impl!(
    /// What the kernel knows of a connection.
    TcpInfo, GetOnly, libc::IPPROTO_TCP, libc::TCP_INFO, libc::tcp_info);

/// Send one TCP stream, from one CPU after the other.
#[derive(clap::Args)]
pub struct Bulk {
    /// Where `drain` is
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
    /// For how long
    #[arg(long)]
    seconds: u64,
    /// CPUs to send from, each in turn
    #[arg(long, value_name = "CPULIST")]
    cpus: CpuSet,
    /// Time on each
    #[arg(long, default_value_t = 10, value_name = "MS")]
    hop_ms: u64,
    /// Bytes of a write
    #[arg(long, default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: u32,
    /// Writes a second: few enough, and the thread that writes is the one that transmits; else
    /// it is whatever CPU takes the acknowledgements (default: all that the connection takes)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: Option<u32>,
}

/// What `bulk` prints.
#[derive(Serialize)]
struct Sent {
    bytes: u64,
    segments: u32,
    retransmitted: u32,
    /// How often the sender found out that its segments had been reordered.
    reordering_seen: u32,
    /// Changes of CPU.
    hops: u64,
}

impl Bulk {
    /// Send for the time given, and until all is acknowledged.
    pub fn run(&self) -> Result<ExitCode> {
        let mut stream =
            TcpStream::connect(self.to).with_context(|| format!("{}: cannot connect", self.to))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(self.rate.is_some())?;
        let sender = rustix::thread::gettid();
        let done = AtomicBool::new(false);
        let (bytes, hops) = thread::scope(|scope| {
            // A thread of its own: the sender hops in the midst of a write too.
            let hopper = scope.spawn(|| self.hop(sender, &done));
            let bytes = self.send(&mut stream);
            done.store(true, Ordering::Relaxed);
            let hops = hopper
                .join()
                .map_err(|_| anyhow!("the thread that hops panicked"))??;
            Ok::<_, anyhow::Error>((bytes?, hops))
        })?;
        stream.shutdown(Shutdown::Write)?;
        // The other end hangs up when it has read all.
        if stream.read(&mut [0])? != 0 {
            bail!("{}: it talks back; is it `vm traffic drain`?", self.to);
        }
        let info = getsockopt(&stream, TcpInfo)?;
        super::tell(Sent {
            bytes,
            segments: info.tcpi_data_segs_out,
            retransmitted: info.tcpi_total_retrans,
            reordering_seen: info.tcpi_reord_seen,
            hops,
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn send(&self, stream: &mut TcpStream) -> Result<u64> {
        let piece = vec![0; usize::try_from(self.size)?];
        let pause = self.rate.map(|rate| Duration::from_secs(1) / rate);
        let mut due = Instant::now();
        let end = due + Duration::from_secs(self.seconds);
        let mut bytes = 0;
        while Instant::now() < end {
            stream.write_all(&piece)?;
            bytes += piece.len() as u64;
            if let Some(pause) = pause {
                // Time that the host took from us is not made up for with a burst.
                due = (due + pause).max(Instant::now());
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }
        Ok(bytes)
    }

    fn hop(&self, thread: rustix::thread::Pid, done: &AtomicBool) -> Result<u64> {
        let cpus: Vec<u32> = self.cpus.iter().collect();
        let mut hops = 0;
        for &cpu in cpus.iter().cycle() {
            pin(Some(thread), cpu)?;
            if done.load(Ordering::Relaxed) {
                break;
            }
            hops += 1;
            thread::sleep(Duration::from_millis(self.hop_ms));
        }
        Ok(hops)
    }
}

/// Take one TCP stream to its end.
#[derive(clap::Args)]
pub struct Drain {
    /// Where `bulk` connects to
    #[arg(long, value_name = "ADDR:PORT")]
    at: SocketAddr,
}

/// What `drain` prints.
#[derive(Serialize)]
struct Drained {
    bytes: u64,
    segments: u32,
    /// Segments that came after a later one.
    out_of_order: u32,
}

impl Drain {
    /// Drain one stream.
    pub fn run(&self) -> Result<ExitCode> {
        let listener =
            TcpListener::bind(self.at).with_context(|| format!("{}: cannot listen", self.at))?;
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = vec![0; 1 << 16];
        let mut bytes = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                length => bytes += length as u64,
            }
        }
        let info = getsockopt(&stream, TcpInfo)?;
        super::tell(Drained {
            bytes,
            segments: info.tcpi_data_segs_in,
            out_of_order: info.tcpi_rcv_ooopack,
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
