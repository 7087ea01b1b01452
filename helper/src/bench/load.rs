//! What sends: one pinned sender a CPU, all at once, a known number of packets each.
//!
//! | generator | a packet is |
//! |---|---|
//! | `pktgen` | made by the kernel and given to the device: no socket, no route |
//! | `udp` | a datagram of one of 16 connected sockets of the CPU |
//! | `tcp` | a request that is answered, over a connection whose packets come in on the CPU where such a one can be had |

use super::peer::{self, Peer, Site};
use crate::host::{self, Host};
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use rustix::net::sockopt;
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

/// Discarded at the far end, unseen by any socket.
const DISCARD: u16 = 9;
/// Answered at the far end.
const ANSWER: u16 = 7;
/// Sockets of a CPU's UDP sender, each a flow, in turn.
const FLOWS: usize = 16;
/// Packets that a CPU sends before it counts: what is done once is done then, and the memory that
/// it takes next was its own before.
const WARM_UP: usize = 64;
/// Payload of a datagram, a request and an answer.
const SIZE: usize = 64;
/// Bytes of a pktgen packet, headers included and checksum not.
const PACKET: u32 = 60;
/// No NIC's: the other end drops it at its door.
const NOBODY: &str = "52:54:00:00:02:ff";
const PATIENCE: Duration = Duration::from_secs(60);

/// Who makes the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Generator {
    /// The kernel's packet generator
    Pktgen,
    /// Connected UDP sockets
    Udp,
    /// TCP requests and answers
    Tcp,
}

impl fmt::Display for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::options::name(*self))
    }
}

impl Generator {
    /// The function whose every call is a packet's beginning.
    pub fn packet_function(self) -> &'static str {
        match self {
            // Its own functions are inlined, but for a few.
            Self::Pktgen => "pktgen:mod_cur_headers",
            Self::Udp => "udp_sendmsg",
            Self::Tcp => "tcp_sendmsg",
        }
    }
}

/// In the lab's server: set a peer up, send a little until it has settled.
#[derive(clap::Args)]
pub struct SetUp {
    #[command(flatten)]
    place: Place,
}

/// In the lab's server: send.
#[derive(clap::Args)]
pub struct Send {
    #[command(flatten)]
    place: Place,
    /// Who sends
    #[arg(long, value_enum)]
    generator: Generator,
    /// Packets of each CPU
    #[arg(long)]
    count: u64,
    /// Made when all is ready
    #[arg(long, requires = "go", value_name = "FILE")]
    ready: Option<PathBuf>,
    /// A FIFO: send when it can be read
    #[arg(long, requires = "ready", value_name = "FILE")]
    go: Option<PathBuf>,
}

/// A peer, and where it is.
#[derive(clap::Args, Clone)]
pub struct Place {
    /// What is set up
    #[arg(long, value_enum)]
    peer: Peer,
    /// CPUs that send
    #[arg(long)]
    cpus: u32,
    /// NICs, from eth0
    #[arg(long)]
    nics: u32,
    /// Transmit queues of a NIC
    #[arg(long)]
    queues: u32,
}

/// What `send` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sent {
    /// By all CPUs.
    pub packets: u64,
    /// By each NIC, as it counts.
    pub by_nic: Vec<u64>,
    /// CPUs whose connection's packets come in on another.
    pub astray: u32,
}

impl Place {
    /// The peer on the lab's server.
    pub fn new(peer: Peer, cpus: u32, nics: u32, queues: u32) -> Self {
        Self {
            peer,
            cpus,
            nics,
            queues,
        }
    }

    /// As arguments.
    pub fn words(&self) -> String {
        let Self {
            peer,
            cpus,
            nics,
            queues,
        } = self;
        format!("--peer {peer} --cpus {cpus} --nics {nics} --queues {queues}")
    }

    fn site(&self) -> Site {
        Site {
            nics: (0..self.nics).map(|nic| format!("eth{nic}")).collect(),
            cpus: self.cpus,
            queues: self.queues,
        }
    }
}

impl SetUp {
    /// Set up, and have interrupts move to where they were sent: they do when they next fire.
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let (peer, site) = (self.place.peer, self.place.site());
        // Small writes are packets of their own.
        fs::write("/proc/sys/net/ipv4/tcp_autocorking", "0")?;
        peer::set_up(&host, peer, &site)?;
        peer::give_addresses(peer, &site)?;
        let senders = Senders {
            host: &host,
            peer,
            site: &site,
        };
        senders.pktgen(50)?.start()?;
        if peer.is_ours() {
            peer::wait("the policy's map is not what the interrupts say", || {
                if peer::map_settled(&host, &site)? {
                    return Ok(true);
                }
                senders.pktgen(20)?.start()?;
                thread::sleep(Duration::from_millis(200));
                Ok(false)
            })?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Send {
    /// Get ready, wait, send, count.
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let site = self.place.site();
        let senders = Senders {
            host: &host,
            peer: self.place.peer,
            site: &site,
        };
        let sent = match self.generator {
            Generator::Pktgen => {
                senders.pktgen(WARM_UP as u64)?.start()?;
                let pktgen = senders.pktgen(self.count)?;
                senders.counted(self.count, || {
                    self.wait_for_go()?;
                    pktgen.start().map(|()| 0)
                })?
            }
            Generator::Udp => {
                let sockets = senders.each_cpu(|cpu| senders.udp_sockets(cpu))?;
                senders.counted(self.count, || {
                    self.wait_for_go()?;
                    senders.all_at_once(sockets, |sockets| {
                        for (socket, _) in sockets.iter().cycle().zip(0..self.count) {
                            socket.send(&[0; SIZE])?;
                        }
                        Ok(())
                    })?;
                    Ok(0)
                })?
            }
            Generator::Tcp => {
                let streams = senders.each_cpu(|cpu| senders.connection(cpu))?;
                let astray = streams.iter().filter(|(_, local)| !local).count();
                senders.counted(self.count, || {
                    self.wait_for_go()?;
                    senders.all_at_once(streams, |(mut stream, _)| {
                        (0..self.count).try_for_each(|_| ask(&mut stream))
                    })?;
                    Ok(u32::try_from(astray)?)
                })?
            }
        };
        println!("{}", serde_json::to_string(&sent)?);
        Ok(ExitCode::SUCCESS)
    }

    fn wait_for_go(&self) -> Result<()> {
        if let (Some(ready), Some(go)) = (&self.ready, &self.go) {
            fs::write(ready, "").with_context(|| ready.display().to_string())?;
            fs::read(go).with_context(|| go.display().to_string())?;
        }
        Ok(())
    }
}

struct Senders<'a> {
    host: &'a Host,
    peer: Peer,
    site: &'a Site,
}

impl Senders<'_> {
    /// Send, and hold it against what the NICs count.
    fn counted(&self, count: u64, send: impl FnOnce() -> Result<u32>) -> Result<Sent> {
        let packets = count * u64::from(self.site.cpus);
        // NICs count what they have sent: of what came before, all.
        let before = self.when_at_rest()?;
        let astray = send()?;
        let mut by_nic = self.when_at_rest()?;
        by_nic
            .iter_mut()
            .zip(&before)
            .for_each(|(now, before)| *now -= before);
        // The queueing discipline drops what has waited too long, as it should: on a machine as
        // slow as this, now and then where all send by one NIC.
        let sent: u64 = by_nic.iter().sum();
        if sent < packets - packets / 5 {
            bail!("the NICs have sent {sent} of {packets} packets");
        }
        Ok(Sent {
            packets,
            by_nic,
            astray,
        })
    }

    /// What each NIC has sent, when it sends no more.
    fn when_at_rest(&self) -> Result<Vec<u64>> {
        let mut now = self.by_nic()?;
        peer::wait("the NICs never rest", || {
            thread::sleep(Duration::from_millis(150));
            let last = std::mem::replace(&mut now, self.by_nic()?);
            Ok(last == now)
        })?;
        Ok(now)
    }

    fn by_nic(&self) -> Result<Vec<u64>> {
        self.site
            .nics
            .iter()
            .map(|nic| {
                let path = self.host.link(nic).join("statistics/tx_packets");
                host::read(&path)?
                    .parse()
                    .with_context(|| path.display().to_string())
            })
            .collect()
    }

    fn pktgen(&self, count: u64) -> Result<Pktgen> {
        let senders = (0..self.site.cpus)
            .map(|cpu| Sender {
                cpu,
                device: self.site.device(self.peer, cpu).to_owned(),
                address: self.site.target(self.peer, cpu).0,
                mac: NOBODY.to_owned(),
            })
            .collect();
        Pktgen::prepare(senders, count)
    }

    fn udp_sockets(&self, cpu: u32) -> Result<Vec<UdpSocket>> {
        let (address, _) = self.site.target(self.peer, cpu);
        (0..FLOWS)
            .map(|_| {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect((address, DISCARD))?;
                for _ in 0..WARM_UP.div_ceil(FLOWS) {
                    socket.send(&[0; SIZE])?;
                }
                Ok(socket)
            })
            .collect::<Result<_>>()
            .with_context(|| format!("UDP to {address}"))
    }

    /// One whose packets come in on this CPU, as those of a flow do that the switch has sent
    /// here; and whether there was one.
    fn connection(&self, cpu: u32) -> Result<(TcpStream, bool)> {
        let connect = |address: Ipv4Addr| -> Result<TcpStream> {
            let mut stream = TcpStream::connect((address, ANSWER))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            ask(&mut stream)?;
            ask(&mut stream)?;
            Ok(stream)
        };
        // Where all come in by one NIC, and by one queue, there is no choice.
        let choice = !matches!(
            self.peer,
            Peer::RawPrivate | Peer::RawShared | Peer::ActiveBackup
        );
        let tries = if choice { 8 * self.site.cpus } else { 1 };
        let addresses = self.site.addresses(self.peer, cpu);
        let mut tried = addresses.iter().cycle().zip(1..=tries);
        loop {
            let (&address, number) = tried.next().context("no address to connect to")?;
            let mut stream = connect(address).with_context(|| format!("TCP to {address}"))?;
            let local = sockopt::socket_incoming_cpu(&stream)? == cpu;
            if local || number == tries {
                (0..WARM_UP).try_for_each(|_| ask(&mut stream))?;
                return Ok((stream, local));
            }
        }
    }

    /// On each CPU in turn.
    fn each_cpu<T: std::marker::Send>(
        &self,
        make: impl Fn(u32) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        (0..self.site.cpus)
            .map(|cpu| {
                thread::scope(|scope| {
                    scope
                        .spawn(|| {
                            pin(cpu)?;
                            make(cpu)
                        })
                        .join()
                        .unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
                })
                .with_context(|| format!("CPU {cpu}"))
            })
            .collect()
    }

    /// On all CPUs, with what was made on each.
    fn all_at_once<T: std::marker::Send>(
        &self,
        made: Vec<T>,
        send: impl Fn(T) -> Result<()> + Sync,
    ) -> Result<()> {
        let start = Barrier::new(made.len());
        thread::scope(|scope| {
            let threads: Vec<_> = made
                .into_iter()
                .zip(0..)
                .map(|(made, cpu)| {
                    let (start, send) = (&start, &send);
                    scope.spawn(move || {
                        let pinned = pin(cpu);
                        // Whatever happens, the others wait for this one.
                        start.wait();
                        pinned?;
                        send(made).with_context(|| format!("CPU {cpu}"))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a sender panicked")))
            })
        })
    }
}

fn pin(cpu: u32) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(usize::try_from(cpu)?);
    rustix::thread::sched_setaffinity(None, &set).context("cannot run there")
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    let mut answer = [0; SIZE];
    stream.write_all(&[0; SIZE])?;
    stream.read_exact(&mut answer).context("no answer")
}

/// One pktgen thread's part.
pub struct Sender {
    /// Its CPU.
    pub cpu: u32,
    /// By which device.
    pub device: String,
    /// To whom.
    pub address: Ipv4Addr,
    /// And at which hardware address.
    pub mac: String,
}

/// The kernel's packet generator, with a thread a CPU.
pub struct Pktgen {
    devices: Vec<PathBuf>,
    count: u64,
}

impl Pktgen {
    const DIR: &str = "/proc/net/pktgen";

    /// Set up all but start.
    pub fn prepare(senders: Vec<Sender>, count: u64) -> Result<Self> {
        peer::modprobe(&["pktgen"])?;
        let dir = Path::new(Self::DIR);
        let tell = |file: &Path, command: &str| {
            fs::write(file, command)
                .with_context(|| format!("{}: '{command}' refused", file.display()))
        };
        let threads: Vec<PathBuf> = host::numbered(dir, "kpktgend_")
            .into_iter()
            .map(|thread| dir.join(format!("kpktgend_{thread}")))
            .collect();
        for thread in &threads {
            tell(thread, "rem_device_all")?;
        }
        // The threads do it, when they run.
        for thread in &threads {
            peer::wait("pktgen does not let go of its devices", || {
                Ok(has_no_device(&host::read(thread)?))
            })?;
        }
        let mut devices = Vec::new();
        for sender in senders {
            let cpu = sender.cpu;
            // The same device by several threads: each has a name of its own for it.
            let name = format!("{}@{cpu}", sender.device);
            tell(
                &dir.join(format!("kpktgend_{cpu}")),
                &format!("add_device {name}"),
            )?;
            let file = dir.join(name);
            // A thousand flows a CPU, one after the other. The packet is handed over for good,
            // by the way that packets of sockets go: queueing included.
            let ports = 1024 + 1000 * (cpu % 64);
            for command in [
                format!("count {count}"),
                "clone_skb 0".to_owned(),
                "flag !SHARED".to_owned(),
                "xmit_mode queue_xmit".to_owned(),
                format!("pkt_size {PACKET}"),
                "delay 0".to_owned(),
                format!("dst_min {}", sender.address),
                format!("dst_max {}", sender.address),
                format!("dst_mac {}", sender.mac),
                format!("udp_src_min {ports}"),
                format!("udp_src_max {}", ports + 999),
                format!("udp_dst_min {DISCARD}"),
                format!("udp_dst_max {DISCARD}"),
            ] {
                tell(&file, &command)?;
            }
            devices.push(file);
        }
        Ok(Self { devices, count })
    }

    /// Start all threads, wait for their end, and see that all was sent.
    pub fn start(&self) -> Result<()> {
        fs::write(Path::new(Self::DIR).join("pgctrl"), "start").context("pktgen")?;
        self.finish()
    }

    /// Wait until all is sent: pktgen gives its threads an eighth of a second to begin, and
    /// does not wait for those that a busy machine has not run by then.
    pub fn finish(&self) -> Result<()> {
        for device in &self.devices {
            let mut text = String::new();
            peer::wait_until(|| {
                text = host::read(device)?;
                Ok(pkts_sofar(&text) == Some(self.count) && elapsed(&text).is_some())
            })?
            .then_some(())
            .ok_or_else(|| {
                let result = text.lines().find(|line| line.starts_with("Result:"));
                anyhow!(
                    "{}: {} of {} packets sent: {}",
                    device.display(),
                    pkts_sofar(&text).unwrap_or(0),
                    self.count,
                    result.unwrap_or("no result")
                )
            })?;
        }
        Ok(())
    }

    /// Nanoseconds from start to end, of the slowest thread.
    pub fn nanoseconds(&self) -> Result<u64> {
        self.devices
            .iter()
            .map(|device| {
                elapsed(&host::read(device)?)
                    .ok_or_else(|| anyhow!("{}: no result", device.display()))
            })
            .try_fold(0, |most, each: Result<u64>| Ok(most.max(each?)))
    }
}

/// `Running: eth0@0 ` and `Stopped: `, each on a line.
fn has_no_device(text: &str) -> bool {
    text.lines()
        .filter_map(|line| {
            line.strip_prefix("Running:")
                .or(line.strip_prefix("Stopped:"))
        })
        .all(|devices| devices.trim().is_empty())
}

/// `     pkts-sofar: 1000  errors: 0`
fn pkts_sofar(text: &str) -> Option<u64> {
    let mut words = text.split_whitespace();
    words.find(|word| *word == "pkts-sofar:")?;
    words.next()?.parse().ok()
}

/// `Result: OK: 12345(c12300+d45) usec, …`
fn elapsed(text: &str) -> Option<u64> {
    let (_, result) = text.split_once("Result: OK: ")?;
    let (microseconds, _) = result.split_once('(')?;
    microseconds.parse::<u64>().ok()?.checked_mul(1000)
}

/// At the far end: answer requests until killed.
#[derive(clap::Args)]
pub struct Answer {}

impl Answer {
    /// A thread a connection.
    pub fn run(&self) -> Result<ExitCode> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ANSWER))
            .with_context(|| format!("port {ANSWER}"))?;
        loop {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            thread::spawn(move || {
                let mut request = [0; SIZE];
                // Until the other side closes.
                while stream.read_exact(&mut request).is_ok() && stream.write_all(&request).is_ok()
                {
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_pktgen_shows() {
        let text = "Params: count 100  min_pkt_size: 60\nCurrent:\n     pkts-sofar: 100  errors: 0\n\
                    Result: OK: 5003(c4990+d13) usec, 100 (60byte,0frags)\n  19988pps 9Mb/sec\n";
        assert_eq!(pkts_sofar(text), Some(100));
        assert_eq!(elapsed(text), Some(5_003_000));
        assert!(has_no_device(
            "Running: \nStopped: \nResult: OK: rem_device_all\n"
        ));
        assert!(!has_no_device("Running: \nStopped: eth0@1 \nResult: NA\n"));
        assert_eq!(pkts_sofar("Params:"), None);
        assert_eq!(elapsed("Result: Idle"), None);
    }
}
