//! `cpubond bench native`: the same peers on this machine's own NICs, by the clock.
//!
//! In the lab, where time means nothing, it is tested for function only.

use super::ask::Asked;
use super::load::{Pktgen, Sender};
use super::peer::{self, Before, Peer, Site};
use crate::host::{self, Host};
use crate::link::{self, Mac};
use crate::netlink::Rtnetlink;
use crate::signals;
use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// pktgen or HTTP over the same peers on real NICs, by the clock
#[derive(clap::Args)]
#[command(after_help = "\
Example, with a sink or a switch at the other end of both cables:
  cpubond bench native --nics eth2,eth3 --to 192.0.2.9 --to-mac 02:00:00:00:00:01 \\
      --output native.json

The NICs must be idle: no address, no master. Each peer is set up on them in turn, round
by round; all is put back at the end. 802.3ad needs a partner that speaks LACP and is left
out without one. Packets a second are those of all CPUs together, over the time of the
slowest. Where 'perf' is installed, its counters are shown beside; --c2c has
'perf c2c record' write a file for each peer instead.

Example for HTTP, between two machines, both with cpubond:
  1. On the client, behind the switch, addresses to ask from, and files of 128 bytes to get:
       ip addr add 192.0.2.11/24 dev eth0; ip addr add 192.0.2.12/24 dev eth0
  2. On the server, a web server on all addresses, whose / has 128 bytes:
       cpubond run --port 80 --cpus 0-1 --steer reuseport -- nginx -c /etc/nginx/{cpu}.conf
  3. On the server:
       cpubond bench native --nics eth2,eth3 --peer balance-rr,balance-xor,cpu_bound \\
           --address 192.0.2.1/24 --output http.json --client \\
           'ssh client cpubond bench ask --to 192.0.2.1:80 --from 192.0.2.11,192.0.2.12 \\
                --requests 100000 --at-once 16 --bytes 128 --give-up'

Each peer has the address while it is measured: its bond or team, or the first NIC of
raw-shared and multiqueue, with the others down. The other end must suit the peers: a static
LAG, LACP for 802.3ad, neither for active-backup. The client is run twice for each peer and
round; the first time is for warming up. The time is the client's, perf's counters are this
machine's, the start and end of the command included.

Exit code 1 when a peer could not be measured; one failed request is enough.")]
pub struct Native {
    /// NICs, in the order of the CPUs
    #[arg(long, value_delimiter = ',', required = true)]
    nics: Vec<String>,
    /// CPUs that send, from 0 (default: as many as queues)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpus: Option<u32>,
    /// Where pktgen's packets go
    #[arg(
        long,
        value_name = "ADDR",
        requires = "to_mac",
        required_unless_present = "client"
    )]
    to: Option<Ipv4Addr>,
    /// And at which hardware address
    #[arg(long, value_name = "MAC", requires = "to")]
    to_mac: Option<Mac>,
    /// Packets of each CPU
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    packets: u64,
    /// HTTP instead of pktgen: a shell command that runs 'cpubond bench ask' on the client
    #[arg(long, value_name = "COMMAND", requires = "address", conflicts_with_all = ["to", "to_mac", "packets"])]
    client: Option<String>,
    /// The address that the client asks, in a network of its own
    #[arg(long, value_name = "ADDR/PREFIX", requires = "client")]
    address: Option<Ipv4Net>,
    /// How often each peer is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only these peers
    #[arg(long, value_enum, value_delimiter = ',')]
    peer: Vec<Peer>,
    /// Have 'perf c2c record' write DIR/PEER.data
    #[arg(long, value_name = "DIR")]
    c2c: Option<PathBuf>,
    /// Write JSON to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What `perf stat` is asked for.
const EVENTS: [&str; 4] = ["instructions", "cycles", "cache-misses", "LLC-load-misses"];
const START: &str = "echo start >/proc/net/pktgen/pgctrl";

#[derive(Serialize)]
struct Outcome {
    schema: u32,
    kernel: String,
    cpus: u32,
    nics: Vec<String>,
    rounds: Vec<Round>,
    /// Peers that could not be measured, and why.
    left_out: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Round {
    round: u32,
    peer: Peer,
    #[serde(flatten)]
    load: Load,
    /// Wall time: of the slowest CPU, or of the client.
    nanoseconds: u64,
    /// perf's, of all CPUs, for a packet or a request.
    counters: BTreeMap<String, f64>,
}

/// What was sent, and how fast.
#[derive(Clone, Copy, Serialize)]
#[serde(tag = "generator", rename_all = "lowercase")]
enum Load {
    Pktgen {
        /// Of all CPUs.
        packets: u64,
        packets_per_second: f64,
    },
    Http {
        /// All answered in full.
        requests: u64,
        requests_per_second: f64,
    },
}

/// What is to be sent.
enum Generator<'a> {
    Pktgen { to: Ipv4Addr, mac: Mac },
    Http { client: &'a str, address: Ipv4Net },
}

/// Packets or requests, and what they took.
struct Measured {
    count: u64,
    nanoseconds: u64,
    /// Of all.
    counters: BTreeMap<String, f64>,
}

impl Generator<'_> {
    fn round(&self, round: u32, peer: Peer, measured: Measured) -> Round {
        let count = measured.count;
        let nanoseconds = measured.nanoseconds.max(1);
        let per_second = count as f64 * 1e9 / nanoseconds as f64;
        let load = match self {
            Self::Pktgen { .. } => Load::Pktgen {
                packets: count,
                packets_per_second: per_second,
            },
            Self::Http { .. } => Load::Http {
                requests: count,
                requests_per_second: per_second,
            },
        };
        let counters = measured.counters.into_iter();
        Round {
            round,
            peer,
            load,
            nanoseconds,
            counters: counters
                .map(|(event, all)| (event, all / count as f64))
                .collect(),
        }
    }
}

impl Native {
    /// Measure, put back, show.
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let generator = self.generator()?;
        let peers = self.peers()?;
        let site = self.site(&host)?;
        let mut outcome = Outcome {
            schema: 1,
            kernel: host::read(&host.proc.join("sys/kernel/osrelease"))?,
            cpus: site.cpus,
            nics: site.nics.clone(),
            rounds: Vec::new(),
            left_out: BTreeMap::new(),
        };
        let go_on = signals::go_on()?;
        let before = Before::read(&host, &site)?;
        let mut going = Ok(());
        'all: for round in 0..self.rounds {
            for &peer in peers.iter().filter(|&&peer| site.suits(peer)) {
                if outcome.left_out.contains_key(&peer.to_string()) {
                    continue;
                }
                eprintln!("cpubond: round {} of {}: {peer}", round + 1, self.rounds);
                let one = peer::set_up(&host, peer, &site).and_then(|()| match &generator {
                    Generator::Pktgen { to, mac } => self.pktgen(&host, &site, peer, *to, *mac),
                    Generator::Http { client, address } => {
                        self.http(&host, &site, peer, client, *address)
                    }
                });
                // Who interrupts it need not be told what failed by that.
                going = go_on();
                if going.is_err() {
                    break 'all;
                }
                match one {
                    Ok(measured) => outcome.rounds.push(generator.round(round, peer, measured)),
                    Err(error) => {
                        eprintln!("cpubond: error: {peer}: {error:#}");
                        outcome
                            .left_out
                            .insert(peer.to_string(), format!("{error:#}"));
                    }
                }
            }
        }
        // All of it, whatever fails.
        let torn_down = peer::tear_down(&host, &site);
        let put_back = before.put_back();
        show(&outcome);
        if let Some(file) = &self.output {
            let mut json = serde_json::to_string_pretty(&outcome)?;
            json.push('\n');
            super::write_whole(file, json.as_bytes())?;
        }
        torn_down.and(put_back)?;
        going?;
        Ok(ExitCode::from(u8::from(!outcome.left_out.is_empty())))
    }

    fn generator(&self) -> Result<Generator<'_>> {
        match (&self.client, self.address, self.to, self.to_mac) {
            (Some(client), Some(address), ..) => Ok(Generator::Http { client, address }),
            (None, _, Some(to), Some(mac)) => Ok(Generator::Pktgen { to, mac }),
            _ => bail!("want --to and --to-mac for pktgen, or --client and --address for HTTP"),
        }
    }

    fn peers(&self) -> Result<Vec<Peer>> {
        // One address, so one device.
        let fits = |peer: &Peer| self.client.is_none() || *peer != Peer::RawPrivate;
        if !self.peer.iter().all(fits) {
            bail!(
                "{}: has an address on each NIC, HTTP is asked for at one; leave it out",
                Peer::RawPrivate
            );
        }
        Ok(match &self.peer[..] {
            [] => Peer::ALL.into_iter().filter(fits).collect(),
            given => given.to_vec(),
        })
    }

    /// What there is, if it is ours to use.
    fn site(&self, host: &Host) -> Result<Site> {
        let mut netlink = Rtnetlink::open()?;
        let mut queues = Vec::new();
        for nic in &self.nics {
            if !link::exists(host, nic) {
                bail!("{nic}: no such device; 'ip link' lists them");
            }
            if let Some(master) = link::master(host, nic) {
                bail!("{nic}: belongs to {master}; take it out first");
            }
            if !netlink.addresses(nic)?.is_empty() {
                bail!("{nic}: has addresses, so it is in use; remove them, or give other NICs");
            }
            queues.push(link::xps(host, nic).len().max(1));
        }
        if let Some(address) = self.address {
            for link in host::names(&host.sys.join("class/net")) {
                // Bonding has a file among them.
                if link::index(host, &link).is_none() {
                    continue;
                }
                for other in netlink.addresses(&link)? {
                    if overlap(address.into(), other) {
                        bail!(
                            "--address {address}: {link} has {other}, so answers could leave by \
                             it; give an address in a network of its own"
                        );
                    }
                }
            }
        }
        let few = queues.iter().copied().min().unwrap_or(1);
        let queues = u32::try_from(few)?;
        let nics = u32::try_from(self.nics.len())?;
        let here = u32::try_from(std::thread::available_parallelism()?.get())?;
        Ok(Site {
            nics: self.nics.clone(),
            cpus: self.cpus.unwrap_or(here.min(nics * queues)),
            queues,
        })
    }

    fn pktgen(
        &self,
        host: &Host,
        site: &Site,
        peer: Peer,
        to: Ipv4Addr,
        mac: Mac,
    ) -> Result<Measured> {
        let prepare = |count| {
            let senders = (0..site.cpus)
                .map(|cpu| Sender {
                    cpu,
                    device: site.device(peer, cpu).to_owned(),
                    address: to,
                    mac: mac.to_string(),
                })
                .collect();
            Pktgen::prepare(senders, count)
        };
        prepare(self.packets.div_ceil(10))?.start()?;
        if peer.is_ours() {
            peer::wait("the policy's map is not what the interrupts say", || {
                prepare(1000)?.start()?;
                peer::map_settled(host, site)
            })?;
        }
        let pktgen = prepare(self.packets)?;
        let (_, counters) = self.perf(peer, START)?;
        pktgen.finish()?;
        Ok(Measured {
            count: self.packets * u64::from(site.cpus),
            nanoseconds: pktgen.nanoseconds()?,
            counters,
        })
    }

    fn http(
        &self,
        host: &Host,
        site: &Site,
        peer: Peer,
        client: &str,
        address: Ipv4Net,
    ) -> Result<Measured> {
        let mut netlink = Rtnetlink::open()?;
        let device = site.device(peer, 0);
        if peer.is_raw() {
            // What a switch gave to those without the address would be lost.
            for nic in site.nics.iter().filter(|nic| *nic != device) {
                netlink.set_up(nic, false)?;
            }
        }
        netlink.add_address(device, address.into())?;
        asked(&run(&["sh", "-c", client])?)?;
        if peer.is_ours() {
            peer::wait("the policy's map is not what the interrupts say", || {
                let settled = peer::map_settled(host, site)?;
                if !settled {
                    asked(&run(&["sh", "-c", client])?)?;
                }
                Ok(settled)
            })?;
        }
        let before = received(host, site)?;
        let (answer, counters) = self.perf(peer, client)?;
        let asked = asked(&answer)?;
        // Of each request at least the SYN; a card may count with a delay.
        let mut packets = 0;
        let all = peer::wait_until(|| {
            packets = received(host, site)?.saturating_sub(before);
            Ok(packets >= asked.complete)
        })?;
        if !all {
            bail!(
                "{} requests, but the NICs received {packets} packets: does the client ask {}?",
                asked.complete,
                address.addr()
            );
        }
        Ok(Measured {
            count: asked.complete,
            nanoseconds: asked.nanoseconds,
            counters,
        })
    }

    /// Run a shell command, under perf where there is one; what it printed, and what perf
    /// counted.
    fn perf(&self, peer: Peer, command: &str) -> Result<(String, BTreeMap<String, f64>)> {
        let there = Command::new("perf")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success());
        let shell = ["sh", "-c", command];
        match (&self.c2c, there) {
            (Some(_), false) => bail!("--c2c: 'perf' is not installed"),
            (Some(dir), true) => {
                std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
                let file = dir.join(format!("{peer}.data")).display().to_string();
                let perf = ["perf", "c2c", "record", "-q", "-a", "-o", &file, "--"];
                Ok((run(&[&perf[..], &shell].concat())?, BTreeMap::new()))
            }
            (None, true) => {
                let counted = tempfile::NamedTempFile::new()?;
                let file = counted.path().display().to_string();
                let events = EVENTS.join(",");
                let perf = [
                    "perf", "stat", "-a", "-x", ";", "-o", &file, "-e", &events, "--",
                ];
                let printed = run(&[&perf[..], &shell].concat())?;
                Ok((printed, parse_perf(&host::read(counted.path())?)))
            }
            (None, false) => Ok((run(&shell)?, BTreeMap::new())),
        }
    }
}

/// Run a command; what it printed. Why it failed is the last that it said.
fn run(words: &[&str]) -> Result<String> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .output()
        .with_context(|| words.join(" "))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        bail!(
            "'{}': {}: {}",
            words.last().unwrap_or(&""),
            output.status,
            last.unwrap_or("it does not say why").trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What `cpubond bench ask` printed, if there were requests and all were answered.
fn asked(answer: &str) -> Result<Asked> {
    let answer = answer.trim();
    let asked: Asked = serde_json::from_str(answer).with_context(|| {
        let start: String = answer.chars().take(80).collect();
        format!("--client: want what 'cpubond bench ask' prints, found {start:?}")
    })?;
    if asked.failed > 0 {
        bail!(
            "{} of {} requests failed, the first: {}",
            asked.failed,
            asked.failed + asked.complete,
            asked
                .why
                .as_deref()
                .unwrap_or("the client does not say why")
        );
    }
    if asked.complete == 0 {
        bail!("--client: made no request");
    }
    Ok(asked)
}

/// Packets that the NICs have received.
fn received(host: &Host, site: &Site) -> Result<u64> {
    let of_one = |nic: &String| {
        let path = host.link(nic).join("statistics/rx_packets");
        host::read(&path)?
            .parse::<u64>()
            .with_context(|| path.display().to_string())
    };
    site.nics.iter().map(of_one).sum()
}

/// Whether one network is in the other.
fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other.addr()) || other.contains(&one.addr())
}

/// `123456;;instructions;…`; what is not supported or not counted is left out.
fn parse_perf(text: &str) -> BTreeMap<String, f64> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(';');
            let count = fields.next()?.parse().ok()?;
            let event = fields.nth(1)?;
            Some((event.to_owned(), count))
        })
        .collect()
}

fn show(outcome: &Outcome) {
    let Some(first) = outcome.rounds.first() else {
        println!("No peer could be measured.");
        return;
    };
    let of = match first.load {
        Load::Pktgen { .. } => "packet",
        Load::Http { .. } => "request",
    };
    println!("| peer | {of}s/s | lowest | highest | counters a {of} |\n|---|---|---|---|---|");
    for peer in Peer::ALL {
        let rounds: Vec<&Round> = outcome
            .rounds
            .iter()
            .filter(|round| round.peer == peer)
            .collect();
        let Some(last) = rounds.last() else {
            continue;
        };
        let all = || {
            rounds.iter().map(|round| match round.load {
                Load::Pktgen {
                    packets_per_second: per_second,
                    ..
                }
                | Load::Http {
                    requests_per_second: per_second,
                    ..
                } => per_second,
            })
        };
        let counters: Vec<String> = last
            .counters
            .iter()
            .map(|(event, count)| format!("{event} {count:.2}"))
            .collect();
        println!(
            "| {peer} | {:.0} | {:.0} | {:.0} | {} |",
            all().sum::<f64>() / rounds.len() as f64,
            all().fold(f64::INFINITY, f64::min),
            all().fold(0.0, f64::max),
            counters.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_requests_are_answered_or_it_is_no_measurement() {
        let answer = |complete, failed, why: Option<&str>| {
            serde_json::to_string(&Asked {
                complete,
                failed,
                why: why.map(str::to_owned),
                nanoseconds: 5,
                ..Asked::default()
            })
            .expect("JSON")
        };
        assert_eq!(asked(&answer(7, 0, None)).expect("all").complete, 7);
        for (text, complaint) in [
            (answer(6, 1, Some("192.0.2.11:5: status 404")), "1 of 7"),
            (answer(6, 1, Some("192.0.2.11:5: status 404")), "status 404"),
            (answer(0, 0, None), "no request"),
            ("Welcome\n".to_owned(), "found \"Welcome\""),
            (
                r#"{"complete":1,"failed":0,"refused":0,"silent":0,"why":null}"#.to_owned(),
                "nanoseconds",
            ),
        ] {
            let error = format!("{:#}", asked(&text).expect_err(complaint));
            assert!(error.contains(complaint), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn the_address_has_a_network_of_its_own() {
        let net = |text: &str| text.parse().expect("a network");
        assert!(overlap(net("192.0.2.1/24"), net("192.0.2.9/25")));
        assert!(overlap(net("192.0.2.1/32"), net("192.0.2.9/24")));
        assert!(!overlap(net("192.0.2.1/24"), net("192.0.3.1/24")));
        assert!(!overlap(net("192.0.2.1/24"), net("2001:db8::1/64")));
    }

    #[test]
    fn reads_what_perf_says() {
        let text = "1000;;instructions;1;100.00;;\n<not supported>;;cycles;0;100.00;;\n\nnoise\n";
        let counters = parse_perf(text);
        assert_eq!(counters.len(), 1);
        assert_eq!(counters["instructions"], 1000.0);
    }
}
