//! `cpubond bench report`: figures and `docs/results.md`, from what was measured.

mod reached;
mod system;

use super::figures::{Bars, Lines};
use super::load::Generator;
use super::peer::Peer;
use super::profile::Function;
use super::results::{Results, Slaves, Tx};
use super::tx::{Kind, Point};
use crate::vm::image::Host;
use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Figures and docs/results.md, from what was measured
#[derive(clap::Args, Default)]
#[command(after_help = "\
Examples:
  cpubond bench report
  cpubond bench report --from saved/ --docs /tmp/docs

Reads bench.json and what it was summed up from, in target/results; `bench all` has
run this at its end.")]
pub struct Report {
    /// Where bench.json is (default: target/results)
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Where results.md goes, and the figures beside it (default: docs)
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
}

pub use system::table as system_table;

/// What was measured, and point by point.
pub struct Measured {
    /// Summed up.
    pub results: Results,
    /// Each.
    pub points: Vec<Point>,
    /// Of the whole system, the rounds of each case as one.
    pub system: Vec<super::system::Point>,
    /// And each.
    pub system_rounds: Vec<super::system::Point>,
}

/// A part of the report: text, and the figures that it shows.
#[derive(Default)]
pub struct Section {
    text: String,
    /// File name and SVG.
    figures: Vec<(String, String)>,
}

impl Section {
    /// Nothing, if there is nothing to say.
    fn say(&mut self, paragraph: impl AsRef<str>) {
        let paragraph = paragraph.as_ref().trim_end();
        if !paragraph.is_empty() {
            self.text.push_str(paragraph);
            self.text.push_str("\n\n");
        }
    }

    fn figure(&mut self, name: &str, title: &str, svg: String) {
        // Writing to a String does not fail.
        let _ = writeln!(self.text, "![{title}](figures/{name}.svg)\n");
        self.figures.push((format!("{name}.svg"), svg));
    }
}

impl Report {
    /// Read, draw, write.
    pub fn run(&self) -> Result<ExitCode> {
        let checkout = super::checkout()?;
        let from = self
            .from
            .clone()
            .unwrap_or_else(|| checkout.join("target/results"));
        let docs = self.docs.clone().unwrap_or_else(|| checkout.join("docs"));
        let measured = Measured::load(&from)?;
        let qemu = Host::prepare(None, true)?.qemu_version()?;
        let mut text = head(&measured, &qemu);
        let mut figures = Vec::new();
        for section in [transmit(&measured)?, system::section(&measured)?] {
            text.push_str(&section.text);
            figures.extend(section.figures);
        }
        for (name, svg) in &figures {
            super::write_whole(&docs.join("figures").join(name), svg.as_bytes())?;
            super::write_whole(&from.join(name), svg.as_bytes())?;
        }
        let file = docs.join("results.md");
        super::write_whole(&file, format!("{}\n", text.trim_end()).as_bytes())?;
        eprintln!(
            "cpubond: {} and {} figures written",
            file.display(),
            figures.len()
        );
        Ok(ExitCode::SUCCESS)
    }
}

impl Measured {
    fn load(dir: &Path) -> Result<Self> {
        let system_rounds: Vec<_> = read_points(&dir.join("bench.system.points.json"))?;
        let mut results = Results::load(&dir.join("bench.json"))?;
        let points: Vec<Point> = read_points(&dir.join("bench.points.json"))?;
        // As the system's: how they are summed up may have changed since.
        if !points.is_empty() {
            (results.tx, results.tx_few_queues) = super::tx::sum_up(&points);
        }
        Ok(Self {
            results,
            points,
            system: super::system::merge(&system_rounds),
            system_rounds,
        })
    }
}

/// None where nothing of the kind was measured.
fn read_points<P: DeserializeOwned>(file: &Path) -> Result<Vec<P>> {
    if !file.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| file.display().to_string())
}

fn head(measured: &Measured, qemu: &str) -> String {
    let packets: u64 = measured.points.iter().map(|point| point.packets).sum();
    let mut runs = String::new();
    let keys: BTreeSet<_> = measured
        .points
        .iter()
        .map(|point| (point.site, point.generator))
        .collect();
    for (site, generator) in keys {
        let at: Vec<&Point> = measured
            .points
            .iter()
            .filter(|point| (point.site, point.generator) == (site, generator))
            .collect();
        let peers: BTreeSet<Peer> = at.iter().map(|point| point.peer).collect();
        let rounds = at.iter().map(|point| point.round + 1).max().unwrap_or(0);
        let _ = writeln!(
            runs,
            "| {} | {} | {generator} | {} | {rounds} | {} |",
            site.cpus,
            site.kind.name(),
            peers.len(),
            at.iter().map(|point| point.packets).sum::<u64>()
        );
    }
    format!(
        "# What sending costs, and what serving does

Written by `cpubond bench report` (cpubond {version}, {commit}) from what `make bench`, or parts of it
(`cpubond bench tx`, `cpubond bench system`), had measured: {points} measurements of {packets}
packets in all, and {system} of {requests} requests of a server. Kernel {kernel},
{qemu}.
To send, all peers of each kind of machine were measured in turn, round by round:

| CPUs | NICs | generator | peers | rounds | packets |
|---|---|---|---|---|---|
{runs}
**What the figures are.** The real kernel binary ran in a virtual machine under QEMU's
translator, and a plugin counted, function by function, each instruction and each access to
memory. A *transfer* is a cache line of 64 bytes that has to move: a read of a line that is
dirty in another CPU, or a write to a line that another CPU holds. A *conflict line* is an
access to a line that another CPU wrote (for a write: touched) since this CPU last did; caches
are infinite. The figures are of whole packets, replayed in turn from CPU to CPU and in random
orders, so that they do not depend on how the host ran the virtual CPUs. Each is the mean over
the orders, of the transmit path the median of the rounds; the lowest and the highest of all
orders and rounds are the whiskers. Of a packet's way through the kernel
everything counts, what is done after it was sent included; what the load generator does to
make it, waiting for locks, scheduler, timers and interrupt entry are kept apart.

**What they are not.** They say nothing of cycles per instruction, of hardware cache misses and
of throughput, and no time was measured: interconnect, DMA and prefetch are not modelled. The
paper's figures, beside which they stand, are of throughput and of hardware counters; what can
be compared is how one way to send relates to another. All bonds ran on the patched driver.

",
        version = env!("CARGO_PKG_VERSION"),
        kernel = measured.results.kernel,
        commit = match measured.results.commit.as_str() {
            "" => "of no commit".to_owned(),
            commit => format!("commit {commit}"),
        },
        points = measured.points.len(),
        system = measured.system_rounds.len(),
        requests = measured
            .system
            .iter()
            .map(|point| point.requests)
            .sum::<u64>(),
    )
}

/// The transmit path: Figure 4, Tables 2 and 3.
fn transmit(measured: &Measured) -> Result<Section> {
    let results = &measured.results;
    let mut section = Section::default();
    if results.tx.is_empty() && results.tx_few_queues.is_empty() {
        return Ok(section);
    }
    section.say("## The transmit path\n");
    let single = |peer, cpus| results.find(peer, Slaves::SingleQueue, Generator::Pktgen, cpus);
    let cpus: BTreeSet<u32> = results
        .tx
        .iter()
        .filter(|tx| tx.slaves == Slaves::SingleQueue)
        .map(|tx| tx.cpus)
        .collect();

    if !cpus.is_empty() {
        section.say("### Single-queue NICs, from 1 CPU to many (the paper's Figure 4)");
        for (name, y, of) in [
            (
                "transfers",
                "transfers a packet",
                (|tx: &Tx| [tx.transfers_per_packet, tx.transfers_min, tx.transfers_max])
                    as fn(&Tx) -> [f64; 3],
            ),
            ("conflicts", "conflict lines a packet", |tx| {
                [tx.conflict_lines_per_packet; 3]
            }),
            ("instructions", "instructions a packet", |tx| {
                [tx.insns_per_packet; 3]
            }),
        ] {
            let title = format!("{y}, a single-queue NIC for every CPU, pktgen");
            let series = Peer::ALL
                .into_iter()
                .filter_map(|peer| {
                    let points: Vec<[f64; 4]> = cpus
                        .iter()
                        .filter_map(|&n| {
                            let [mean, min, max] = of(single(peer, n)?);
                            Some([f64::from(n), mean, min, max])
                        })
                        .collect();
                    (!points.is_empty()).then(|| (peer.to_string(), points))
                })
                .collect();
            let svg = Lines {
                title: &title,
                x: "CPUs that send, each pinned",
                y,
                series,
            }
            .svg()?;
            section.figure(&format!("tx-{name}"), &title, svg);
            section.say(match name {
                "transfers" => read_transfers(results, &cpus),
                "conflicts" => read_conflicts(results, &cpus),
                _ => read_instructions(results, &cpus),
            });
        }
        section.say(functions(measured, &cpus));
        let (text, svg, title) = selection(results, &cpus)?;
        if let Some(svg) = svg {
            section.say("### What the choice of a slave costs");
            section.figure("tx-select", &title, svg);
            section.say(text);
        }
    }
    for (heading, name, table) in [
        (
            "### More CPUs than queues a NIC: 8 CPUs, 4 NICs of 2 queues",
            "tx-few-queues",
            results.tx_few_queues.iter().collect::<Vec<_>>(),
        ),
        ("### A queue for every CPU on every NIC", "tx-multiqueue", {
            let most = results
                .tx
                .iter()
                .filter(|tx| tx.slaves == Slaves::Multiqueue)
                .map(|tx| tx.cpus)
                .max();
            results
                .tx
                .iter()
                .filter(|tx| tx.slaves == Slaves::Multiqueue && Some(tx.cpus) == most)
                .collect()
        }),
    ] {
        if table.is_empty() {
            continue;
        }
        section.say(heading);
        bars(&mut section, name, &table)?;
        let enough = name == "tx-multiqueue";
        section.say(read_queues(&table, enough));
        if enough {
            section.say(what_is_left(measured));
        }
    }
    section.say(reached::section(results));
    section.say("### All of it\n");
    section.say(tables(results));
    section.say(left_out(results));
    Ok(section)
}

fn bars(section: &mut Section, name: &str, table: &[&Tx]) -> Result<()> {
    let generators: BTreeSet<Generator> = table.iter().map(|tx| tx.generator).collect();
    let cpus = table.first().map_or(0, |tx| tx.cpus);
    let what = if name == "tx-multiqueue" {
        "a queue for every CPU on every NIC"
    } else {
        "4 NICs of 2 queues"
    };
    let title = format!("transfers a packet, {cpus} CPUs, {what}");
    let groups = Peer::ALL
        .into_iter()
        .filter(|&peer| table.iter().any(|tx| tx.peer == peer))
        .map(|peer| {
            let bars = generators
                .iter()
                .map(|&generator| {
                    table
                        .iter()
                        .find(|tx| tx.peer == peer && tx.generator == generator)
                        .map(|tx| [tx.transfers_per_packet, tx.transfers_min, tx.transfers_max])
                })
                .collect();
            (peer.to_string(), bars)
        })
        .collect();
    let svg = Bars {
        title: &title,
        y: "transfers a packet",
        series: generators.iter().map(Generator::to_string).collect(),
        groups,
    }
    .svg()?;
    section.figure(name, &title, svg);
    Ok(())
}

fn read_transfers(results: &Results, cpus: &BTreeSet<u32>) -> String {
    let get = |peer, n| {
        results
            .find(peer, Slaves::SingleQueue, Generator::Pktgen, n)
            .map(|tx| tx.transfers_per_packet)
    };
    let mut text = String::new();
    let most = cpus
        .iter()
        .rev()
        .find(|&&n| get(Peer::BalanceRr, n).is_some() && get(Peer::CpuBound, n).is_some());
    if let Some(&n) = most
        && let (Some(rr), Some(ours), Some(floor)) = (
            get(Peer::BalanceRr, n),
            get(Peer::CpuBound, n),
            get(Peer::RawPrivate, n),
        )
    {
        let _ = write!(
            text,
            "At {n} CPUs a packet moves {rr:.1} lines over balance-rr and {ours:.2} over cpu_bound; \
             the floor, a bare NIC that is the CPU's own, is {floor:.2}. "
        );
    }
    let flat: Vec<String> = cpus
        .iter()
        .filter_map(|&n| get(Peer::CpuBound, n).map(|each| format!("{each:.2} at {n}")))
        .collect();
    let _ = write!(
        text,
        "Over cpu_bound it is {}. The paper's Figure 4 has six times the requests a second \
         with cpu_bound than with round robin, on 4 NICs; throughput is nothing that we can measure, \
         and what is counted here is the cause that the paper names for it: lines that move.",
        flat.join(", ")
    );
    text
}

fn read_conflicts(results: &Results, cpus: &BTreeSet<u32>) -> String {
    let get = |peer, n| {
        results
            .find(peer, Slaves::SingleQueue, Generator::Pktgen, n)
            .map(|tx| tx.conflict_lines_per_packet)
    };
    let all: Vec<String> = cpus
        .iter()
        .filter_map(|&n| {
            Some(format!(
                "{:.2} over cpu_bound, {:.2} over a bare NIC of the CPU's own at {n} CPUs",
                get(Peer::CpuBound, n)?,
                get(Peer::RawPrivate, n)?
            ))
        })
        .collect();
    format!(
        "A conflict does not depend on who has the line now, only on who wrote it since: it is how \
         scalable the code is, where a transfer is what one order of events costs. A packet has {}. \
         What is left there is nobody's packet's: the kernel's own housekeeping that falls into the \
         window.",
        all.join("; ")
    )
}

fn read_instructions(results: &Results, cpus: &BTreeSet<u32>) -> String {
    let Some(&n) = cpus.iter().rev().find(|&&n| n <= 8) else {
        return String::new();
    };
    let all: Vec<String> = Peer::ALL
        .into_iter()
        .filter_map(|peer| {
            let tx = results.find(peer, Slaves::SingleQueue, Generator::Pktgen, n)?;
            Some(format!("{peer} {:.0}", tx.insns_per_packet))
        })
        .collect();
    format!(
        "Instructions a packet at {n} CPUs: {}. A bond costs what it costs to go through the \
         stack twice; where a packet finds its queue taken by another CPU it is sent by that CPU \
         instead, so the figures of the peers that share queues are means over both.",
        all.join(", ")
    )
}

/// Tables 2 and 3.
fn functions(measured: &Measured, cpus: &BTreeSet<u32>) -> String {
    let mut text = String::new();
    let at = |n, peer| {
        mean_functions(measured.points.iter().filter(|point| {
            point.site.kind == Kind::SingleQueue
                && point.site.cpus == n
                && point.generator == Generator::Pktgen
                && point.peer == peer
        }))
    };
    let Some((n, [rr, ours])) = cpus
        .iter()
        .rev()
        .filter(|&&n| n <= 8)
        .map(|&n| (n, [Peer::BalanceRr, Peer::CpuBound].map(|peer| at(n, peer))))
        .find(|(_, both)| both.iter().all(|functions| !functions.is_empty()))
    else {
        return text;
    };
    let get = |functions: &[Function], name: &str| {
        functions
            .iter()
            .find(|function| function.name == name)
            .cloned()
            .unwrap_or_default()
    };
    let mut names: Vec<&str> = rr
        .iter()
        .chain(&ours)
        .map(|function| function.name.as_str())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    names.sort_by(|a, b| {
        let weight = |name: &str| get(&rr, name).transfers + get(&ours, name).transfers;
        weight(b).total_cmp(&weight(a))
    });
    names.truncate(16);
    let _ = writeln!(
        text,
        "### Function by function (the paper's Tables 2 and 3)\n\nA packet at {n} CPUs, as run, by \
         pktgen over single-queue NICs:\n\n| function | insns, balance-rr | insns, cpu_bound | conflicts, \
         balance-rr | conflicts, cpu_bound | transfers, balance-rr | transfers, cpu_bound |\n\
         |---|---|---|---|---|---|---|"
    );
    for name in &names {
        let (rr, ours) = (get(&rr, name), get(&ours, name));
        let _ = writeln!(
            text,
            "| `{name}` | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} |",
            rr.insns, ours.insns, rr.conflicts, ours.conflicts, rr.transfers, ours.transfers
        );
    }
    let _ = write!(
        text,
        "\nThe paper's cache misses, round robin → cpu_bound: `dev_queue_xmit` 26,435 → 11,652, the \
         bond's transmit function 11,619 → 582, `_spin_lock_bh` 11,330 → off the list, and under round \
         robin alone `__kfree_skb` 18,254 and `sock_wfree` 13,582. The same places, by today's names, \
         head the list: the queue's lock and state, and the slave's ring."
    );
    text
}

/// What the choice of a slave costs: text, figure, its title.
fn selection(results: &Results, cpus: &BTreeSet<u32>) -> Result<(String, Option<String>, String)> {
    let title = "instructions from the bond's transmit function to the slave's queue".to_owned();
    let Some(&n) = cpus.iter().rev().find(|&&n| n <= 8) else {
        return Ok((String::new(), None, title));
    };
    let all: Vec<&Tx> = Peer::ALL
        .into_iter()
        .filter(|peer| peer.entry().is_some())
        .filter_map(|peer| results.find(peer, Slaves::SingleQueue, Generator::Pktgen, n))
        .collect();
    let svg = Bars {
        title: &title,
        y: "instructions",
        series: vec![String::new()],
        groups: all
            .iter()
            .map(|tx| (tx.peer.to_string(), vec![Some([tx.select_insns; 3])]))
            .collect(),
    }
    .svg()?;
    let get = |peer| {
        all.iter()
            .find(|tx| tx.peer == peer)
            .map(|tx| tx.select_insns)
    };
    let mut text = String::new();
    if let (Some(ours), Some(fixed)) = (get(Peer::CpuBound), get(Peer::ActiveBackup)) {
        let _ = write!(
            text,
            "cpu_bound takes {ours:.1} instructions from entry of the bond's transmit function to the \
             slave's `__dev_queue_xmit`, {:.1} more than active-backup, which has nothing to choose. ",
            ours - fixed
        );
        let _ = write!(
            text,
            "By number of CPUs and slaves; with an asterisk, no more than cpu_bound's:\n\n| peer |{}\n|---|{}\n",
            cpus.iter().map(|n| format!(" {n} |")).collect::<String>(),
            "---|".repeat(cpus.len())
        );
        for peer in Peer::ALL.into_iter().filter(|peer| peer.entry().is_some()) {
            let _ = write!(text, "| {peer} |");
            for &n in cpus {
                let at = |peer| results.find(peer, Slaves::SingleQueue, Generator::Pktgen, n);
                let _ = match (at(peer), at(Peer::CpuBound)) {
                    (Some(tx), Some(ours)) => {
                        let less = !peer.is_ours() && tx.select_insns <= ours.select_insns;
                        let mark = if less { "*" } else { "" };
                        write!(text, " {:.1}{mark} |", tx.select_insns)
                    }
                    _ => write!(text, " – |"),
                };
            }
            text.push('\n');
        }
        text.push_str(
            "\nThe program that steers queue_id runs before the bond's function, so its instructions are in \
             those of the packet and not in these; balance-rr and queue_id walk a list of the slaves, so \
             they grow with it. cpu_bound reads one entry of a table, however many slaves there are.",
        );
    }
    Ok((text, Some(svg), title))
}

fn read_queues(table: &[&Tx], enough: bool) -> String {
    let get = |peer| {
        table
            .iter()
            .find(|tx| tx.peer == peer && tx.generator == Generator::Pktgen)
            .map(|tx| tx.transfers_per_packet)
    };
    let show = |peer: Peer| get(peer).map(|each| format!("{peer} {each:.2}"));
    let all: Vec<String> = Peer::ALL.into_iter().filter_map(show).collect();
    let lead = if enough {
        "Where every slave has a queue for every CPU, XPS makes every peer's queue local already: \
         here nothing is claimed for cpu_bound but that it is no worse. What is left in the figures is \
         what the slaves share whatever the queue."
    } else {
        "The case of today's servers: more CPUs than queues a NIC, but queues enough for all CPUs \
         together. Each CPU has a queue to itself if its packets go by the right NIC."
    };
    format!("{lead} Transfers a packet by pktgen: {}.", all.join(", "))
}

/// What the slaves share even where each has a queue for every CPU, function by function.
fn what_is_left(measured: &Measured) -> String {
    let Some(most) = measured
        .points
        .iter()
        .map(|point| point.site)
        .filter(|site| site.kind == Kind::Multiqueue)
        .max()
    else {
        return String::new();
    };
    let left: Vec<String> = [Peer::RawPrivate, Peer::BalanceXor, Peer::CpuBound]
        .into_iter()
        .map(|peer| {
            let functions = mean_functions(measured.points.iter().filter(|point| {
                (point.site, point.peer, point.generator) == (most, peer, Generator::Udp)
            }));
            let first: Vec<String> = functions
                .iter()
                .take(6)
                .filter(|function| function.transfers >= 0.005)
                .map(|function| format!("`{}` {:.2}", function.name, function.transfers))
                .collect();
            format!("{peer}: {}", first.join(", "))
        })
        .collect();
    format!(
        "What is left, by UDP sockets, as run: {}. virtio-net keeps the states of its queues side by side \
         (`struct send_queue`, not aligned to cache lines), so neighbouring queues of a NIC share a line: \
         the scatterlist of one, which is cleared for each packet (`memset`), and the end of the other, \
         which `virtnet_poll_tx` reads. On a machine of several NUMA nodes one thing more \
         is left, which no count here shows: a queue's ring and the NIC are of one node, and a flow's \
         hash takes NICs of all of them.",
        left.join("; ")
    )
}

/// Means over rounds; those with most transfers first.
fn mean_functions<'a>(rounds: impl Iterator<Item = &'a Point>) -> Vec<Function> {
    let mut sums: BTreeMap<&str, Function> = BTreeMap::new();
    let mut count = 0.0;
    for point in rounds {
        count += 1.0;
        for function in &point.functions {
            let sum = sums.entry(&function.name).or_default();
            sum.insns += function.insns;
            sum.conflicts += function.conflicts;
            sum.transfers += function.transfers;
        }
    }
    let mut means: Vec<Function> = sums
        .into_iter()
        .map(|(name, sum)| Function {
            name: name.to_owned(),
            insns: sum.insns / count,
            conflicts: sum.conflicts / count,
            transfers: sum.transfers / count,
        })
        .collect();
    means.sort_by(|a, b| b.transfers.total_cmp(&a.transfers));
    means
}

fn left_out(results: &Results) -> String {
    let single = |n| {
        results
            .tx
            .iter()
            .any(|tx| tx.slaves == Slaves::SingleQueue && tx.cpus == n)
    };
    let absent: Vec<String> = [1, 2, 4, 8, 16, 32]
        .into_iter()
        .filter(|&n| !single(n))
        .map(|n| n.to_string())
        .collect();
    let mut missing = Vec::new();
    if !absent.is_empty() {
        missing.push(format!("single-queue NICs at {} CPUs", absent.join(", ")));
    }
    if !results.tx.iter().any(|tx| tx.slaves == Slaves::Multiqueue) {
        missing.push("NICs with a queue for every CPU".to_owned());
    }
    if results.tx_few_queues.is_empty() {
        missing.push("the case of more CPUs than queues".to_owned());
    }
    for generator in [Generator::Udp, Generator::Tcp] {
        if !results.tx.iter().any(|tx| tx.generator == generator) {
            missing.push(format!("{generator} sockets"));
        }
    }
    let mut text = "**Left out.** ".to_owned();
    if !missing.is_empty() {
        let _ = write!(text, "Not in this run: {}. ", missing.join("; "));
    }
    if single(16) || single(32) {
        text.push_str("Beyond 8 CPUs there is one round of pktgen with some of the peers. ");
    }
    text.push_str("There is no NUMA machine among these.");
    text
}

/// All figures, as Markdown.
pub fn tables(results: &Results) -> String {
    let mut text = String::new();
    for (what, table) in [
        ("", &results.tx),
        (", 4 NICs of 2 queues", &results.tx_few_queues),
    ] {
        let keys: BTreeSet<(Slaves, Generator, u32)> = table
            .iter()
            .map(|tx| (tx.slaves, tx.generator, tx.cpus))
            .collect();
        for (slaves, generator, cpus) in keys {
            let kind = if what.is_empty() { slaves.name() } else { "" };
            let plural = if cpus == 1 { "" } else { "s" };
            let _ = writeln!(
                text,
                "**{cpus} CPU{plural}, {kind}{}, {generator}**\n\n| peer | packets | instructions | select | conflict \
                 lines | transfers | lowest | highest |\n|---|---|---|---|---|---|---|---|",
                what.trim_start_matches(", ")
            );
            for peer in Peer::ALL {
                for tx in table.iter().filter(|tx| {
                    (tx.peer, tx.slaves, tx.generator, tx.cpus) == (peer, slaves, generator, cpus)
                }) {
                    let select = match peer.entry() {
                        Some(_) => format!("{:.1}", tx.select_insns),
                        None => "–".to_owned(),
                    };
                    let _ = writeln!(
                        text,
                        "| {peer} | {} | {:.0} | {select} | {:.2} | {:.2} | {:.2} | {:.2} |",
                        tx.packets,
                        tx.insns_per_packet,
                        tx.conflict_lines_per_packet,
                        tx.transfers_per_packet,
                        tx.transfers_min,
                        tx.transfers_max
                    );
                }
            }
            text.push('\n');
        }
    }
    text
}
