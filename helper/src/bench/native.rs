//! `cpubond bench native`: the same peers on this machine's own NICs, by the clock.
//!
//! In the lab, where time means nothing, it is tested for function only.

use super::load::{Pktgen, Sender};
use super::peer::{self, Peer, Site};
use crate::host::Host;
use crate::link::{self, Mac};
use crate::netlink::Rtnetlink;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// pktgen over the same peers on real NICs, by the clock
#[derive(clap::Args)]
#[command(after_help = "\
Example, with a sink or a switch at the other end of both cables:
  cpubond bench native --nics eth2,eth3 --to 192.0.2.9 --to-mac 02:00:00:00:00:01 \\
      --output native.json

The NICs must be idle: no address, no master. Each peer is set up on them in turn, round
by round; their interrupts and XPS are put back at the end. 802.3ad needs a partner that
speaks LACP and is left out without one. Packets a second are those of all CPUs together,
over the time of the slowest. Where 'perf' is installed, its counters are shown beside;
--c2c has 'perf c2c record' write a file for each peer instead.
Exit code 1 when a peer could not be measured.")]
pub struct Native {
    /// NICs, in the order of the CPUs
    #[arg(long, value_delimiter = ',', required = true)]
    nics: Vec<String>,
    /// CPUs that send, from 0 (default: as many as queues)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpus: Option<u32>,
    /// Where the packets go
    #[arg(long, value_name = "ADDR")]
    to: Ipv4Addr,
    /// And at which hardware address
    #[arg(long, value_name = "MAC")]
    to_mac: Mac,
    /// Packets of each CPU
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    packets: u64,
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
    packets: u64,
    nanoseconds: u64,
    packets_per_second: f64,
    /// A packet, of all CPUs.
    counters: BTreeMap<String, f64>,
}

impl Native {
    /// Measure, put back, show.
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let site = self.site(&host)?;
        let peers: Vec<Peer> = match &self.peer[..] {
            [] => Peer::ALL.to_vec(),
            given => given.to_vec(),
        };
        let mut outcome = Outcome {
            schema: 1,
            kernel: crate::host::read(&host.proc.join("sys/kernel/osrelease"))?,
            cpus: site.cpus,
            nics: site.nics.clone(),
            rounds: Vec::new(),
            left_out: BTreeMap::new(),
        };
        let before = peer::bindings(&host, &site)?;
        for round in 0..self.rounds {
            for &peer in peers.iter().filter(|&&peer| site.suits(peer)) {
                if outcome.left_out.contains_key(&peer.to_string()) {
                    continue;
                }
                eprintln!("cpubond: round {} of {}: {peer}", round + 1, self.rounds);
                match self.one(&host, &site, round, peer) {
                    Ok(one) => outcome.rounds.push(one),
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
        Ok(ExitCode::from(u8::from(!outcome.left_out.is_empty())))
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

    fn one(&self, host: &Host, site: &Site, round: u32, peer: Peer) -> Result<Round> {
        peer::set_up(host, peer, site)?;
        let prepare = |count| {
            let senders = (0..site.cpus)
                .map(|cpu| Sender {
                    cpu,
                    device: site.device(peer, cpu).to_owned(),
                    address: self.to,
                    mac: self.to_mac.to_string(),
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
        let counters = self.perf(peer, &pktgen)?;
        let packets = self.packets * u64::from(site.cpus);
        let nanoseconds = pktgen.nanoseconds()?.max(1);
        Ok(Round {
            round,
            peer,
            packets,
            nanoseconds,
            packets_per_second: packets as f64 * 1e9 / nanoseconds as f64,
            counters: counters
                .into_iter()
                .map(|(event, count)| (event, count / packets as f64))
                .collect(),
        })
    }

    /// Start pktgen, under perf where there is one; what perf counted.
    fn perf(&self, peer: Peer, pktgen: &Pktgen) -> Result<BTreeMap<String, f64>> {
        let there = Command::new("perf")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success());
        let mut words: Vec<String> = Vec::new();
        match (&self.c2c, there) {
            (Some(_), false) => bail!("--c2c: 'perf' is not installed"),
            (Some(dir), true) => {
                std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
                let file = dir.join(format!("{peer}.data"));
                words.extend(["perf", "c2c", "record", "-q", "-a", "-o"].map(String::from));
                words.extend([file.display().to_string(), "--".to_owned()]);
            }
            (None, true) => {
                words.extend(["perf", "stat", "-a", "-x", ";", "-e"].map(String::from));
                words.extend([EVENTS.join(","), "--".to_owned()]);
            }
            (None, false) => {
                pktgen.start()?;
                return Ok(BTreeMap::new());
            }
        }
        words.extend(["sh", "-c", START].map(String::from));
        let output = Command::new(&words[0])
            .args(&words[1..])
            .output()
            .with_context(|| words.join(" "))?;
        let text = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("{}: {}", words.join(" "), text.trim());
        }
        pktgen.finish()?;
        Ok(parse_perf(&text))
    }
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
    println!("| peer | packets/s | lowest | highest | counters a packet |\n|---|---|---|---|---|");
    for peer in Peer::ALL {
        let rounds: Vec<&Round> = outcome
            .rounds
            .iter()
            .filter(|round| round.peer == peer)
            .collect();
        let Some(last) = rounds.last() else {
            continue;
        };
        let all = || rounds.iter().map(|round| round.packets_per_second);
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
    fn reads_what_perf_says() {
        let text = "1000;;instructions;1;100.00;;\n<not supported>;;cycles;0;100.00;;\n\nnoise\n";
        let counters = parse_perf(text);
        assert_eq!(counters.len(), 1);
        assert_eq!(counters["instructions"], 1000.0);
    }
}
