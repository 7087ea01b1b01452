//! `cpubond bench tx`: what sending costs by each peer, at each number of CPUs.
//!
//! One boot for each number of CPUs and kind of slave; in it all peers, round by round. The
//! points go to a state file one by one, then all of them to `bench.json`.

use super::load::{Generator, Place, Sent};
use super::peer::{FarEnd, Peer};
use super::profile::{Class, Function, Profile, Profiler, Region};
use super::progress::Progress;
use super::results::{Results, Slaves, Tx};
use super::state::State;
use super::{gate, report};
use crate::vm::guest::Guest;
use crate::vm::image::Host;
use crate::vm::lab::Lab;
use crate::vm::machine;
use crate::vm::topology::Topology;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::process::ExitCode;
use std::time::Duration;

/// For anything in a guest that ends by itself.
const STEP: Duration = Duration::from_secs(300);

/// What sending costs, by each peer and number of CPUs
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cpubond bench tx                                  # the whole table
  cpubond bench tx --quick                          # 4 CPUs, pktgen, one round
  cpubond bench tx --cpus 8 --peer cpu_bound,team-cpu --generator udp

Each peer sends by pktgen, UDP and TCP in the lab's server, whose instructions and
memory accesses the profiler counts. A run that was ended goes on where it was, as
long as kernel, modules and helper are the same. The results are in
target/results/bench.json; `cpubond bench report` draws them.
Exit code 1 when something could not be measured or a --check failed.")]
pub struct Args {
    /// Few packets of few peers on 4 CPUs, in one round: for ratios, not for figures
    #[arg(long)]
    pub quick: bool,
    /// Judge the ratios that must hold, as KTAP
    #[arg(long, requires = "quick")]
    pub check: bool,
    /// Numbers of CPUs, each with as many NICs
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub cpus: Vec<u32>,
    /// Only these peers
    #[arg(long, value_enum, value_delimiter = ',')]
    pub peer: Vec<Peer>,
    /// Only these generators
    #[arg(long, value_enum, value_delimiter = ',')]
    pub generator: Vec<Generator>,
    /// Only NICs of one queue, only of more, or only the case of too few
    #[arg(long, value_enum, value_delimiter = ',')]
    pub slaves: Vec<Kind>,
    /// How often each point is measured
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Packets of each CPU at each point
    #[arg(long, value_parser = clap::value_parser!(u64).range(10..=1_000_000))]
    pub packets: Option<u64>,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR")]
    pub modules: Option<std::path::PathBuf>,
}

/// How many queues the NICs have.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A NIC a CPU, of one queue
    SingleQueue,
    /// A NIC a CPU, of a queue a CPU
    Multiqueue,
    /// 4 NICs of 2 queues for 8 CPUs
    FewQueues,
}

impl Kind {
    const ALL: [Self; 3] = [Self::SingleQueue, Self::Multiqueue, Self::FewQueues];

    /// As in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleQueue => "single-queue",
            Self::Multiqueue => "multiqueue",
            Self::FewQueues => "4 NICs of 2 queues",
        }
    }
}

/// What a lab is booted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Site {
    /// Of the NICs.
    pub kind: Kind,
    /// Of the server.
    pub cpus: u32,
}

impl Site {
    fn nics(self) -> u32 {
        match self.kind {
            Kind::FewQueues => self.cpus / 2,
            _ => self.cpus,
        }
    }

    fn queues(self) -> u32 {
        match self.kind {
            Kind::SingleQueue => 1,
            Kind::Multiqueue => self.cpus,
            Kind::FewQueues => 2,
        }
    }

    /// Of a point: what is done whatever the CPUs, and what each adds.
    fn weight(self) -> f64 {
        8.0 + f64::from(self.cpus)
    }

    fn place(self, peer: Peer) -> Place {
        Place::new(peer, self.cpus, self.nics(), self.queues())
    }

    fn topology(self) -> Topology {
        Topology {
            cpus: self.cpus,
            nics: self.nics(),
            queues: self.queues(),
            offload: false,
            profiler: true,
            ..Topology::default()
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Where.
    pub site: Site,
    /// From 0.
    pub round: u32,
    /// What sent.
    pub peer: Peer,
    /// By what.
    pub generator: Generator,
    /// As many as were counted, of all CPUs.
    pub packets: u64,
    /// As in [`Tx`].
    pub insns: f64,
    /// As in [`Tx`].
    pub select: f64,
    /// From the bond's transmit function to the driver's.
    pub to_driver: f64,
    /// As in [`Tx`]: mean, lowest, highest.
    pub conflicts: f64,
    /// As in [`Tx`]: mean, lowest, highest.
    pub transfers: [f64; 3],
    /// As the host happened to run the CPUs.
    pub transfers_as_run: f64,
    /// The generator's own, kept apart.
    pub generator_transfers: f64,
    /// CPUs whose TCP packets come in on another.
    pub astray: u32,
    /// Functions of the packet's way, those that matter.
    pub functions: Vec<Function>,
}

/// Where and what to measure, and how much of it.
struct Plan {
    sites: Vec<Site>,
    peers: Vec<Peer>,
    generators: Vec<Generator>,
    rounds: u32,
    packets: Option<u64>,
    quick: bool,
}

impl Plan {
    fn of(args: &Args) -> Self {
        let or = |given: &[u32], usual: &[u32]| -> Vec<u32> {
            if given.is_empty() { usual } else { given }.to_vec()
        };
        let kinds = match (&args.slaves[..], args.quick) {
            ([], true) => vec![Kind::SingleQueue],
            ([], false) => Kind::ALL.to_vec(),
            (given, _) => given.to_vec(),
        };
        let mut sites = Vec::new();
        for kind in kinds {
            let usual: &[u32] = match kind {
                _ if args.quick => &[4],
                Kind::SingleQueue => &[1, 2, 4, 8, 16, 32],
                Kind::Multiqueue => &[2, 4, 8],
                Kind::FewQueues => &[8],
            };
            let wanted = match kind {
                // There is but one such case.
                Kind::FewQueues => usual.to_vec(),
                _ => or(&args.cpus, usual),
            };
            sites.extend(wanted.into_iter().map(|cpus| Site { kind, cpus }));
        }
        let peers = match (&args.peer[..], args.quick) {
            ([], true) => gate::PEERS.to_vec(),
            ([], false) => Peer::ALL.to_vec(),
            (given, _) => given.to_vec(),
        };
        let generators = match (&args.generator[..], args.quick) {
            ([], true) => vec![Generator::Pktgen],
            ([], false) => vec![Generator::Pktgen, Generator::Udp, Generator::Tcp],
            (given, _) => given.to_vec(),
        };
        Self {
            sites,
            peers,
            generators,
            rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 3 }),
            packets: args.packets,
            quick: args.quick,
        }
    }

    /// In the order of a round: peers that need the same far end come together.
    fn peers_at(&self, site: Site) -> Vec<Peer> {
        let mut peers: Vec<Peer> = self
            .peers
            .iter()
            .copied()
            .filter(|&peer| peer != Peer::Multiqueue || site.kind == Kind::Multiqueue)
            // 16 NICs and more are for how it goes on, not for every peer.
            .filter(|&peer| site.cpus <= 8 || Self::BIG.contains(&peer))
            .collect();
        peers.sort_by_key(|peer| match peer.far_end() {
            FarEnd::Bare => 0,
            FarEnd::Bond("balance-xor") => 1,
            FarEnd::Bond("802.3ad") => 2,
            FarEnd::Bond(_) => 3,
        });
        peers
    }

    const BIG: [Peer; 6] = [
        Peer::RawPrivate,
        Peer::BalanceRr,
        Peer::BalanceXor,
        Peer::TeamCpu,
        Peer::QueueId,
        Peer::CpuBound,
    ];

    fn generators_at(&self, site: Site) -> Vec<Generator> {
        self.generators
            .iter()
            .copied()
            .filter(|&generator| site.cpus <= 8 || generator == Generator::Pktgen)
            .collect()
    }

    fn rounds_at(&self, site: Site) -> u32 {
        if site.cpus <= 8 {
            self.rounds
        } else {
            self.rounds.min(1)
        }
    }

    fn packets_at(&self, site: Site, generator: Generator) -> u64 {
        self.packets.unwrap_or(match generator {
            _ if site.cpus > 8 => 100,
            _ if self.quick => 200,
            Generator::Tcp => 150,
            _ => 300,
        })
    }

    /// All there is to do in one boot.
    fn work(&self, site: Site) -> Vec<(u32, Peer, Vec<Generator>)> {
        (0..self.rounds_at(site))
            .flat_map(|round| {
                self.peers_at(site)
                    .into_iter()
                    .map(move |peer| (round, peer, self.generators_at(site)))
            })
            .collect()
    }
}

/// Run it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let host = Host::prepare(args.modules.clone(), false)?;
    let plan = Plan::of(args);
    let name = if args.quick { "quick" } else { "bench" };
    let at = |file: &str| host.checkout.join("target/results").join(file);
    let mut state = State::<Point>::open(&at(&format!("{name}.tx.state")), &super::key(&host)?)?;
    if args.check {
        // It is about what is there now.
        state = State::open(&at(&format!("{name}.tx.state")), "")?;
    }
    let problems = measure(&host, &plan, &mut state)?;

    let results = Results::update(
        &at(&format!("{name}.json")),
        [&host.kernel, &super::commit(&host)],
        |results| {
            (results.tx, results.tx_few_queues) = sum_up(state.points());
        },
    )?;
    super::write_whole(
        &at(&format!("{name}.points.json")),
        serde_json::to_string(state.points())?.as_bytes(),
    )?;
    for problem in &problems {
        eprintln!("cpubond: error: {problem}");
    }
    if args.check {
        return Ok(gate::judge(&results, &problems));
    }
    print!("{}", report::tables(&results));
    println!("\nwritten to target/results/{name}.json");
    Ok(ExitCode::from(u8::from(!problems.is_empty())))
}

/// Measure what is not there yet; what could not be measured.
fn measure(host: &Host, plan: &Plan, state: &mut State<Point>) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let missing = |state: &State<Point>, site, round, peer, generator| {
        !state.points().iter().any(|point| {
            (point.site, point.round, point.peer, point.generator) == (site, round, peer, generator)
        })
    };
    let mut progress = Progress::new("tx");
    for &site in &plan.sites {
        for (round, peer, generators) in plan.work(site) {
            for generator in generators {
                if missing(state, site, round, peer, generator) {
                    progress.plan(site.weight());
                }
            }
        }
    }
    for &site in &plan.sites {
        let mut todo: Vec<_> = plan
            .work(site)
            .into_iter()
            .filter_map(|(round, peer, mut generators)| {
                generators.retain(|&generator| missing(state, site, round, peer, generator));
                (!generators.is_empty()).then_some((round, peer, generators))
            })
            .collect();
        if todo.is_empty() {
            continue;
        }
        let what = format!("{} CPUs, {}", site.cpus, site.kind.name());
        let mut failures = 0;
        while !todo.is_empty() {
            progress.say(&format!("{what}: boot"));
            let outcome = measure_site(host, plan, site, &mut todo, state, &mut progress);
            if let Err(error) = outcome {
                failures += 1;
                let (round, peer, _) = &todo[0];
                let line = format!("{what}, round {round}, {peer}: {error:#}");
                progress.say(&line);
                // A machine that died is booted again; what fails twice is left out.
                if failures >= 2 {
                    problems.push(line);
                    let (_, peer, generators) = todo.remove(0);
                    let _ = peer;
                    for _ in generators {
                        progress.done(site.weight());
                    }
                    failures = 0;
                }
                if problems.len() > 6 {
                    bail!("too much fails; the last: {}", problems.join("; "));
                }
            }
        }
    }
    Ok(problems)
}

/// One boot; what is done is taken from `todo`.
fn measure_site(
    host: &Host,
    plan: &Plan,
    site: Site,
    todo: &mut Vec<(u32, Peer, Vec<Generator>)>,
    state: &mut State<Point>,
    progress: &mut Progress,
) -> Result<()> {
    let topology = site.topology();
    let lab = Lab::boot(host, &topology, machine::Accel::Tcg, false)?;
    lab.peer().output(
        "setsid cpubond bench answer </dev/null >/tmp/answer 2>&1 &",
        STEP,
    )?;
    let mut profiler = Profiler::of(&lab)?;
    let mut far = None;
    while let Some((round, peer, generators)) = todo.first_mut() {
        let (round, peer) = (*round, *peer);
        if far != Some(peer.far_end()) {
            set_up_far_end(lab.peer(), peer.far_end())?;
            far = Some(peer.far_end());
        }
        let place = site.place(peer);
        lab.server()
            .output(&format!("cpubond bench set-up {}", place.words()), STEP)?;
        while let Some(&generator) = generators.first() {
            let count = plan.packets_at(site, generator);
            let point = one(&lab, &mut profiler, site, round, peer, generator, count)
                .with_context(|| generator.to_string())?;
            progress.done(site.weight());
            progress.say(&format!(
                "{} CPUs, {}, round {}: {peer} by {generator}: {:.0} insns, select {:.0}, {:.2} conflicts, {:.2} transfers a packet",
                site.cpus,
                site.kind.name(),
                round + 1,
                point.insns,
                point.select,
                point.conflicts,
                point.transfers[0],
            ));
            state.add(point)?;
            generators.remove(0);
        }
        todo.remove(0);
    }
    Ok(())
}

/// The peer's end of the cables.
fn set_up_far_end(far: &Guest, end: FarEnd) -> Result<()> {
    let command = match end {
        FarEnd::Bare => "[ ! -e /sys/class/net/bond0 ] || ip link del bond0
            /cpubond/guest/peer.sh none
            for dev in /sys/class/net/eth*; do
                dev=${dev##*/}
                ip addr flush dev \"$dev\"
                ip addr add \"10.1.${dev#eth}.2/24\" dev \"$dev\"
            done"
            .to_owned(),
        // Not by the hash that the server's bonds have: a reply would leave by the NIC that the
        // request came in by, which is what a switch does by chance only.
        FarEnd::Bond(mode) => format!(
            "for dev in /sys/class/net/eth*; do ip addr flush dev \"${{dev##*/}}\"; done
            /cpubond/guest/peer.sh {mode} layer2+3
            [ {mode} != active-backup ] || echo eth0 >/sys/class/net/bond0/bonding/primary"
        ),
    };
    far.output(&format!("set -e\n{command}"), STEP)
        .context("the far end")?;
    Ok(())
}

/// Send, and count what it takes.
fn one(
    lab: &Lab,
    profiler: &mut Profiler<'_>,
    site: Site,
    round: u32,
    peer: Peer,
    generator: Generator,
    count: u64,
) -> Result<Point> {
    let server = lab.server();
    server.output(
        &format!(
            "cd /run; rm -f bench.ready bench.go; mkfifo bench.go
            setsid cpubond bench send {} --generator {generator} --count {count} \
                --ready bench.ready --go bench.go </dev/null >bench.out 2>bench.err &
            echo $! >bench.pid
            until [ -e bench.ready ]; do
                kill -0 $! 2>/dev/null || {{ cat bench.err >&2; exit 1; }}
                sleep 0.1
            done",
            site.place(peer).words()
        ),
        STEP,
    )?;
    let entry = peer.entry();
    profiler.open(&region(peer, generator, entry))?;
    // What waits for the end is there before the beginning, and makes no processes meanwhile:
    // their work would be counted.
    let sent = server.output(
        "cd /run; tail --pid=$(<bench.pid) -s 0.3 -f /dev/null &
        sleep 0.3; echo >bench.go; wait
        cat bench.err >&2; cat bench.out; [ -s bench.out ]",
        STEP,
    );
    // Closed whatever came of it, so that the next one can be opened.
    let profile = profiler.close()?;
    let sent: Sent = serde_json::from_str(&sent?).context("what was sent")?;
    point(site, round, peer, generator, &sent, &profile)
}

fn region(peer: Peer, generator: Generator, entry: Option<&str>) -> Region {
    let module = match peer {
        Peer::TeamHash | Peer::TeamCpu => "team",
        _ => "bonding",
    };
    let ranges = entry
        .map(|entry| {
            let entry = format!("{module}:{entry}");
            ["__dev_queue_xmit", "virtio_net:start_xmit"].map(|to| (entry.clone(), to.to_owned()))
        })
        .into_iter()
        .flatten()
        .collect();
    Region {
        ranges,
        ..Region::packets(&format!("{peer}-{generator}"), generator.packet_function())
    }
}

fn point(
    site: Site,
    round: u32,
    peer: Peer,
    generator: Generator,
    sent: &Sent,
    profile: &Profile,
) -> Result<Point> {
    // Whole packets: of each CPU's, those between its first mark and its last.
    let packets = profile.total_packets();
    let expected = sent.packets - u64::from(site.cpus);
    if packets < expected || packets > sent.packets + u64::from(site.cpus) {
        bail!(
            "{packets} packets counted of {} sent; the profiler and the generator disagree",
            sent.packets
        );
    }
    let range = |to: &str| -> Result<f64> {
        if peer.entry().is_none() {
            return Ok(0.0);
        }
        profile
            .ranges
            .iter()
            .find(|range| range.to == to)
            .and_then(|range| range.mean())
            .with_context(|| format!("nothing went from the bond to {to}"))
    };
    let way = profile.per_packet(Class::Path);
    let replay = &profile.replay;
    Ok(Point {
        site,
        round,
        peer,
        generator,
        packets,
        insns: way.insns,
        select: range("__dev_queue_xmit")?,
        to_driver: range("virtio_net:start_xmit")?,
        conflicts: replay.conflicts.mean,
        transfers: [
            replay.transfers.mean,
            replay.transfers.min,
            replay.transfers.max,
        ],
        transfers_as_run: way.transfers,
        generator_transfers: replay.generator_transfers.mean,
        astray: sent.astray,
        functions: profile.path_functions(packets, |_| false),
    })
}

/// All rounds of a point to one line of the table.
pub fn sum_up(points: &[Point]) -> (Vec<Tx>, Vec<Tx>) {
    let mut keys: Vec<_> = points
        .iter()
        .map(|point| (point.site, point.generator, point.peer))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let (mut all, mut few) = (Vec::new(), Vec::new());
    for (site, generator, peer) in keys {
        let rounds: Vec<&Point> = points
            .iter()
            .filter(|point| (point.site, point.generator, point.peer) == (site, generator, peer))
            .collect();
        let mean = |of: &dyn Fn(&Point) -> f64| {
            rounds.iter().map(|point| of(point)).sum::<f64>() / rounds.len() as f64
        };
        // On a busy host packets wait for the emulated NIC now and then, and the allocator then
        // has other CPUs' memory for those that follow: a round in which that happens moves lines
        // for nothing that the peer does.
        let median = |of: &dyn Fn(&Point) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(|point| of(point)).collect();
            values.sort_unstable_by(f64::total_cmp);
            let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
            (at((values.len() - 1) / 2) + at(values.len() / 2)) / 2.0
        };
        let tx = Tx {
            peer,
            slaves: match site.kind {
                Kind::SingleQueue => Slaves::SingleQueue,
                _ => Slaves::Multiqueue,
            },
            generator,
            cpus: site.cpus,
            packets: rounds.iter().map(|point| point.packets).sum(),
            insns_per_packet: mean(&|point| point.insns),
            select_insns: mean(&|point| point.select),
            conflict_lines_per_packet: median(&|point| point.conflicts),
            transfers_per_packet: median(&|point| point.transfers[0]),
            transfers_min: rounds
                .iter()
                .map(|point| point.transfers[1])
                .fold(f64::INFINITY, f64::min),
            transfers_max: rounds
                .iter()
                .map(|point| point.transfers[2])
                .fold(0.0, f64::max),
        };
        match site.kind {
            Kind::FewQueues => few.push(tx),
            _ => all.push(tx),
        }
    }
    (all, few)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(round: u32, transfers: [f64; 3]) -> Point {
        Point {
            site: Site {
                kind: Kind::SingleQueue,
                cpus: 4,
            },
            round,
            peer: Peer::CpuBound,
            generator: Generator::Udp,
            packets: 10,
            insns: 100.0 + f64::from(round),
            select: 50.0,
            to_driver: 90.0,
            conflicts: 1.0,
            transfers,
            transfers_as_run: 0.0,
            generator_transfers: 0.0,
            astray: 0,
            functions: Vec::new(),
        }
    }

    #[test]
    fn rounds_are_one_line_with_their_spread() {
        let mut points = vec![
            point(0, [2.0, 1.0, 3.0]),
            point(1, [40.0, 20.0, 90.0]),
            point(2, [3.0, 2.0, 5.0]),
        ];
        points.push(Point {
            site: Site {
                kind: Kind::FewQueues,
                cpus: 8,
            },
            ..point(0, [0.0; 3])
        });
        let (tx, few) = sum_up(&points);
        assert_eq!((tx.len(), few.len()), (1, 1));
        assert_eq!(tx[0].packets, 30);
        assert_eq!(tx[0].insns_per_packet, 101.0);
        assert_eq!(tx[0].transfers_per_packet, 3.0);
        assert_eq!((tx[0].transfers_min, tx[0].transfers_max), (1.0, 90.0));
        assert_eq!(few[0].slaves, Slaves::Multiqueue);
        // Of an even number, the mean of the two in the middle.
        assert_eq!(sum_up(&points[..2]).0[0].transfers_per_packet, 21.0);
    }
}
