//! The whole system: Figure 5, Table 4 and Figure 6.

use super::{Measured, Section};
use crate::bench::figures::{Bars, Lines};
use crate::bench::model::Model;
use crate::bench::profile::Class;
use crate::bench::results::System;
use crate::bench::system::{Case, Name, Point, SIZE, TABLE, find, scaling, scaling_of};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// What was to be reached: how near to linear, and how many times the usual set-up.
const LINEAR: f64 = 0.9;
const TIMES: f64 = 3.0;

/// Its part of the report; empty when nothing was measured.
pub fn section(measured: &Measured) -> Result<Section> {
    let mut section = Section::default();
    let points = &measured.system;
    if points.is_empty() {
        return Ok(section);
    }
    section.say(
        "## The whole system

Eight clients, each with an address of its own, make requests of a server behind one address and
port, each over a new connection. Counted is the server, from the packet that comes in to the last
of the reply: the kernel's part and the server program's. *usual* is one NIC whose interrupt is on
one CPU, one listener, a lighttpd worker for each CPU, placed by the scheduler.
*balance-rr+reuseport* and *balance-xor+reuseport* are a bond with a NIC for each CPU, interrupts
bound, and a pinned nginx on each CPU, all on one port by SO_REUSEPORT, among which the kernel's
hash chooses. *multiqueue+reuseport* is what is best today with one NIC: a queue pair, an interrupt
and a pinned nginx on each CPU, RSS, XPS, and SO_REUSEPORT with the CPU's own server.
*cpu_bound+…* is the paper's system with each way to steer: *nat* (the paper's), *sk_lookup*, both
with lighttpd, and *reuseport* with nginx. lighttpd cannot set SO_REUSEPORT; the two programs take
different numbers of instructions, so compare like with like. Source ports are taken in order,
which a switch's hash of ports spreads evenly; the hash of a tap device (multiqueue) and that of
SO_REUSEPORT are random, and a few hundred requests spread by them are uneven by chance alone.
What goes by the clock and not by the request is stopped meanwhile: `cpubond run` looking after
its daemons, and the kernel's DAMON statistics.",
    );
    let rounds = &measured.system_rounds;
    section.say(how_often(points, rounds));
    let cpus: BTreeSet<u32> = points
        .iter()
        .filter(|point| point.case.size == SIZE)
        .map(|point| point.case.cpus)
        .collect();
    if let Some(&most) = cpus.last() {
        section.say("### 128 bytes, from 1 CPU to many (the paper's Figure 5)");
        figures(&mut section, points, rounds, &cpus, most)?;
        section.say(table_4(points, most));
    }
    sizes(&mut section, points)?;
    section.say("### All of it\n");
    section.say(table(&measured.results.system));
    section.say(by_class(points));
    Ok(section)
}

/// Rounds, and what was left out of the whole.
fn how_often(points: &[Point], rounds: &[Point]) -> String {
    let whole = crate::bench::system::whole();
    let mut left_out: BTreeMap<(u32, u32), Vec<String>> = BTreeMap::new();
    for case in whole.iter().filter(|&&case| find(points, case).is_none()) {
        let at = left_out.entry((case.size, case.cpus)).or_default();
        at.push(case.name.to_string());
    }
    let left_out: Vec<String> = left_out
        .into_iter()
        .map(|((size, cpus), names)| {
            let of = |case: &&Case| (case.size, case.cpus) == (size, cpus);
            let which = if names.len() == whole.iter().filter(of).count() {
                "all".to_owned()
            } else {
                names.join(", ")
            };
            format!("{size} bytes at {cpus} CPUs: {which}")
        })
        .collect();
    let mut text = String::new();
    for (which, of) in [
        (
            "128 bytes",
            (|case: Case| case.size == SIZE) as fn(Case) -> bool,
        ),
        ("longer files", |case| case.size != SIZE),
    ] {
        let each = || {
            points
                .iter()
                .map(|point| point.case)
                .filter(|&case| of(case))
        };
        let count = |case| rounds.iter().filter(|point| point.case == case).count();
        if let (Some(least), Some(most)) = (each().map(count).min(), each().map(count).max()) {
            let times = if least == most {
                least.to_string()
            } else {
                format!("{least} to {most}")
            };
            let _ = write!(text, "Rounds with {which}: {times}. ");
        }
    }
    text.push_str(
        "The rounds of a point are put together as if they were one long one. How many packets a CPU \
         finds waiting when it looks, and so how often it looks, is up to the host that ran the virtual \
         CPUs: instructions a request, and with them the modelled scaling, vary with that.",
    );
    if !left_out.is_empty() {
        let _ = write!(text, " **Not measured**: {}.", left_out.join("; "));
    }
    text
}

fn parameters() -> String {
    let Model { cpi, latency } = Model::default();
    let [low, high] = Model::LATENCIES;
    format!("model: {cpi:.1} cycles an instruction, {latency} a transfer; whiskers {low} to {high}")
}

/// By the default latency, and the lowest and highest by the others.
fn spread(of: impl Fn(Model) -> Option<f64>) -> Option<[f64; 3]> {
    let mean = of(Model::default())?;
    let ends: Vec<f64> = Model::LATENCIES
        .iter()
        .filter_map(|&latency| of(Model::with_latency(latency)))
        .collect();
    Some([
        mean,
        ends.iter().copied().fold(mean, f64::min),
        ends.iter().copied().fold(mean, f64::max),
    ])
}

/// Requests a million cycles.
fn throughput(points: &[Point], case: Case, model: Model) -> Option<f64> {
    let point = find(points, case)?;
    Some(1e6 / model.busiest(&point.work(), point.requests)?)
}

fn figures(
    section: &mut Section,
    points: &[Point],
    rounds: &[Point],
    cpus: &BTreeSet<u32>,
    most: u32,
) -> Result<()> {
    let series = |of: &dyn Fn(Case) -> Option<[f64; 3]>| -> Vec<(String, Vec<[f64; 4]>)> {
        Name::ALL
            .into_iter()
            .map(|name| {
                let line = cpus
                    .iter()
                    .filter_map(|&n| {
                        let [value, low, high] = of(at(name, n))?;
                        Some([f64::from(n), value, low, high])
                    })
                    .collect::<Vec<_>>();
                (name.to_string(), line)
            })
            .filter(|(_, line)| !line.is_empty())
            .collect()
    };
    let x = "CPUs of the server";
    let title = format!("modelled scaling beside one CPU ({})", parameters());
    let svg = Lines {
        title: &title,
        x,
        y: "times the requests of one CPU (a model)",
        series: series(&|case| spread(|model| scaling(points, case, model))),
    }
    .svg()?;
    section.figure("system-scaling", &title, svg);
    section.say(read_scaling(points, rounds, most));
    let title = format!("modelled throughput ({})", parameters());
    let svg = Lines {
        title: &title,
        x,
        y: "requests a million cycles (a model)",
        series: series(&|case| spread(|model| throughput(points, case, model))),
    }
    .svg()?;
    section.figure("system-throughput", &title, svg);
    section.say(read_throughput(points, most));
    let title = "lines that a request moves in the server's kernel";
    let svg = Lines {
        title,
        x,
        y: "transfers a request",
        series: series(&|case| Some(find(points, case)?.transfers)),
    }
    .svg()?;
    section.figure("system-transfers", title, svg);
    section.say(read_transfers(points, most));
    Ok(())
}

/// Whether it is linear.
fn read_scaling(points: &[Point], rounds: &[Point], most: u32) -> String {
    let wanted = f64::from(most) * LINEAR;
    let [low, high] = Model::LATENCIES;
    let mut text = format!(
        "**This is a model**, made of what was counted: requests divided by the cycles of the busiest \
         CPU, which are its instructions and its share of the lines that move ({}). At {most} CPUs, in times \
         of the requests of the set-up's own single CPU; linear within 10 % is {wanted:.1} and more:\n\n\
         | set-up | times | {low} to {high} cycles a transfer | round by round | work on the busiest CPU | linear \
         |\n|---|---|---|---|---|---|\n",
        parameters()
    );
    for name in Name::ALL {
        let case = at(name, most);
        let Some([scale, least, best]) = spread(|model| scaling(points, case, model)) else {
            continue;
        };
        let each: Vec<String> = rounds
            .iter()
            .filter(|round| round.case == case && round.failed == 0)
            .filter_map(|round| scaling_of(points, round, Model::default()))
            .map(|scale| format!("{scale:.2}"))
            .collect();
        let _ = writeln!(
            text,
            "| {name} | {scale:.2} | {least:.2} to {best:.2} | {} | {:.1} % | {} |",
            each.join(", "),
            100.0 * find(points, case).map_or(0.0, Point::busiest_share),
            match (name.is_ours(), scale >= wanted) {
                (_, true) => "yes",
                (false, false) => "no",
                (true, false) => "**no**, which was to be reached",
            }
        );
    }
    text.push_str(
        "\nThe paper's Figure 5, by the clock: the usual set-up gains up to 3 cores, then stays flat or \
         falls; the proposed one grows linearly to 8.",
    );
    text
}

/// Beside the usual set-up, and beside the best of the others.
fn read_throughput(points: &[Point], most: u32) -> String {
    let all: Vec<(Name, f64)> = Name::ALL
        .into_iter()
        .filter_map(|name| Some((name, throughput(points, at(name, most), Model::default())?)))
        .collect();
    let mut text = format!("The same model, all on one scale, at {most} CPUs: ");
    for (name, _) in all.iter().filter(|(name, _)| name.is_ours()) {
        let Some([times, low, high]) = spread(|model| {
            Some(
                throughput(points, at(*name, most), model)?
                    / throughput(points, at(Name::Usual, most), model)?,
            )
        }) else {
            continue;
        };
        let _ = write!(
            text,
            "{name} does {times:.2} times the requests of the usual set-up ({low:.2} to {high:.2}){}; ",
            match (times >= TIMES, most >= 8) {
                (true, _) => "",
                (false, true) => ", **less** than the 3 times that were to be reached",
                (false, false) => ", where 3 are to be reached at 8 CPUs",
            }
        );
    }
    text.push_str("the paper has +300 % at 8 cores. ");
    let even = |name| {
        let point = find(points, at(name, most))?;
        Some(1e6 / Model::default().spread_evenly(&point.work(), point.requests)?)
    };
    let show = |(name, each): &(Name, f64)| {
        format!("{name} {each:.1} ({:.1})", even(*name).unwrap_or_default())
    };
    let list = |ours: bool| {
        all.iter()
            .filter(|(name, _)| name.is_ours() == ours)
            .map(show)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let _ = write!(
        text,
        "In requests a million cycles, and in brackets if the work were spread over the CPUs evenly, which \
         takes out what chance did in a few hundred requests but also what a set-up does: {}; the others \
         {}.",
        list(true),
        list(false)
    );
    let best = |ours: bool| {
        all.iter()
            .filter(|(name, _)| name.is_ours() == ours)
            .max_by(|a, b| a.1.total_cmp(&b.1))
    };
    if let (Some(ours), Some(peer)) = (best(true), best(false)) {
        let _ = write!(
            text,
            " Of the others that were measured the best is {}, ours {}: {}.",
            show(peer),
            show(ours),
            if ours.1 >= peer.1 {
                "no worse, as was to be reached"
            } else {
                "**worse**, which was not to be"
            }
        );
    }
    text
}

fn at(name: Name, cpus: u32) -> Case {
    Case {
        cpus,
        size: SIZE,
        name,
    }
}

fn read_transfers(points: &[Point], most: u32) -> String {
    let all: Vec<String> = Name::ALL
        .into_iter()
        .filter_map(|name| {
            let point = find(points, at(name, most))?;
            Some(format!("{name} {:.1}", point.transfers[0]))
        })
        .collect();
    let mut text = format!(
        "Lines that a request moves at {most} CPUs: {}. The replay puts the CPUs' steps (a packet \
         received, a call on a connection) into other orders, so that the figures do not depend on \
         how the host ran the virtual CPUs.",
        all.join(", ")
    );
    for name in [Name::CpuBoundSkLookup, Name::CpuBoundNat, Name::Multiqueue] {
        let Some(point) = find(points, at(name, most)) else {
            continue;
        };
        let mut functions: Vec<_> = point.functions.iter().collect();
        functions.sort_by(|a, b| b.transfers.total_cmp(&a.transfers));
        let left: Vec<String> = functions
            .iter()
            .take(16)
            .map(|f| format!("`{}` {:.2}", f.name, f.transfers))
            .collect();
        let _ = write!(
            text,
            " What is left in {name}, as run: {}.",
            left.join(", ")
        );
    }
    text.push_str(
        "\n\nThese are what connections share whoever serves them: the list of those bound to the one port, \
         with its lock (`_raw_spin_lock`, `__inet_inherit_port`, `inet_put_port`, \
         `inet_twsk_hashdance_schedule`; with nat each daemon has a port of its own, and conntrack's lists \
         in place of it), how many are in TIME-WAIT (`inet_twsk_alloc`), what TCP remembers of a client's \
         address (`tcp_*_metrics`), the file that is served (`filemap_get_entry`, `lockref_*`, \
         `do_dentry_open`), AppArmor's label of the server; and what goes by the clock, which under \
         emulation is far too often beside the requests: the time itself (`ktime_get_seconds`, `jiffies` in \
         `ip_finish_output2`, which there confirms the neighbour), the bond's look at its links \
         (`bond_handle_frame`). The NICs and their queues are not among them.",
    );
    text
}

/// The paper's Table 4.
fn table_4(points: &[Point], most: u32) -> String {
    let find = |name| find(points, at(name, most));
    let (Some(usual), Some(ours)) = (find(Name::Usual), find(Name::CpuBoundSkLookup)) else {
        return String::new();
    };
    let nat = find(Name::CpuBoundNat);
    let mut text = format!(
        "### TCP, function by function (the paper's Table 4)\n\nA request at {most} CPUs, as run; the \
         paper's are cache misses of a whole run, in another unit: compare how one column relates to the \
         next.\n\n| function | conflicts, usual | conflicts, sk_lookup | conflicts, nat | transfers, usual | \
         transfers, sk_lookup | transfers, nat | insns, usual | insns, sk_lookup | insns, nat | paper, usual \
         | paper, proposed |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    );
    let columns = [Some(usual), Some(ours), nat];
    let mut sums = columns.map(|point| point.map(|_| [0.0; 3]));
    for (name, paper, names) in TABLE {
        let figures = columns.map(|point| point.map(|point| point.function(names)));
        for (sum, figures) in sums.iter_mut().flatten().zip(figures.iter().flatten()) {
            for (sum, figure) in sum.iter_mut().zip(figures) {
                *sum += figure;
            }
        }
        let today = if names == [name] {
            String::new()
        } else {
            format!(" ({})", names.join(", "))
        };
        row(&mut text, &format!("`{name}`{today}"), &figures, paper);
    }
    row(&mut text, "sum", &sums, [60_754, 42_448]);
    let change = |what: usize| {
        let of = |column: usize| sums[column].map_or(f64::NAN, |sum| sum[what]);
        format!("{:.2} to {:.2}", of(0), of(1))
    };
    let _ = write!(
        text,
        "\nOver these functions conflict lines go from {} and transfers from {}; the paper's misses from \
         60,754 to 42,448, and its mean CPI from 5.63 to 2.84. A miss is counted there whatever its \
         cause, first touches of new memory included; here only lines that another CPU had. \
         What a request conflicts over outside of them (the socket's lock, memory, wake-ups, the NIC's \
         queue) is in the figures of the whole request.",
        change(1),
        change(2)
    );
    text
}

/// `None` was not measured.
fn row(text: &mut String, name: &str, figures: &[Option<[f64; 3]>; 3], paper: [u32; 2]) {
    let _ = write!(text, "| {name} ");
    for what in [1, 2, 0] {
        for figures in figures {
            let _ = match figures {
                Some(figures) if what == 0 => write!(text, "| {:.0} ", figures[what]),
                Some(figures) => write!(text, "| {:.2} ", figures[what]),
                None => write!(text, "| – "),
            };
        }
    }
    let _ = writeln!(text, "| {} | {} |", paper[0], paper[1]);
}

/// Figure 6.
fn sizes(section: &mut Section, points: &[Point]) -> Result<()> {
    let sizes: BTreeSet<u32> = points.iter().map(|point| point.case.size).collect();
    let most = points
        .iter()
        .filter(|point| point.case.size != SIZE)
        .map(|point| point.case.cpus)
        .max();
    let Some(cpus) = most else {
        return Ok(());
    };
    section.say("### From 128 bytes to 32 KiB (the paper's Figure 6)");
    let names: Vec<Name> = Name::ALL
        .into_iter()
        .filter(|&name| {
            points
                .iter()
                .any(|point| point.case.size != SIZE && point.case.name == name)
        })
        .collect();
    let bars = |of: &dyn Fn(Case) -> Option<[f64; 3]>| {
        sizes
            .iter()
            .map(|&size| {
                let label = if size < 1024 {
                    format!("{size} B")
                } else {
                    format!("{} KiB", size / 1024)
                };
                let bars = names
                    .iter()
                    .map(|&name| of(Case { cpus, size, name }))
                    .collect();
                (label, bars)
            })
            .collect()
    };
    let scale = |case| spread(|model| scaling(points, case, model));
    let title = format!("modelled scaling at {cpus} CPUs by size ({})", parameters());
    let series: Vec<String> = names.iter().map(Name::to_string).collect();
    let svg = Bars {
        title: &title,
        y: "times the requests of one CPU (a model)",
        series: series.clone(),
        groups: bars(&scale),
    }
    .svg()?;
    section.figure("system-sizes", &title, svg);
    let mut text = format!(
        "The paper's Figure 6 has throughput that grows with the cores whatever the size of the reply. \
         The model, at {cpus} CPUs, in times of the requests of one ({:.1} and more is linear within 10 %):\n\n\
         | set-up |",
        f64::from(cpus) * LINEAR
    );
    for size in &sizes {
        let _ = write!(text, " {size} bytes |");
    }
    let _ = write!(text, "\n|---|{}", "---|".repeat(sizes.len()));
    for &name in &names {
        let _ = write!(text, "\n| {name} |");
        for &size in &sizes {
            let _ = match scale(Case { cpus, size, name }) {
                Some([value, ..]) => write!(text, " {value:.2} |"),
                None => write!(text, " – |"),
            };
        }
    }
    text.push_str(
        "\n\nWires are not in the model: a NIC of 1 Gbit/s is full at some 3,600 replies of 32 KiB a \
         second, and the usual set-up has one. No NIC of the lab makes checksums or cuts long replies into \
         packets, as real ones do: in every set-up the kernel does both.",
    );
    section.say(text);
    let title = format!("lines that a request moves in the server's kernel, {cpus} CPUs");
    let svg = Bars {
        title: &title,
        y: "transfers a request",
        series,
        groups: bars(&|case| Some(find(points, case)?.transfers)),
    }
    .svg()?;
    section.figure("system-sizes-transfers", &title, svg);
    section.say(
        "A longer reply takes more packets, each of which may move lines; what a connection moves \
         to be set up and torn down stays. Where receive, server and transmit are one CPU's, \
         neither has anything to move.",
    );
    Ok(())
}

/// All figures, as Markdown.
pub fn table(rows: &[System]) -> String {
    let mut text =
        "| set-up | size | CPUs | requests | failed | instructions | conflict lines | transfers | \
                    busiest CPU | modelled scaling |\n|---|---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for row in rows {
        let scaling = match row.modelled_scaling {
            0.0 => "–".to_owned(),
            scaling => format!("{scaling:.2}"),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.0} | {:.1} | {:.1} | {:.3} | {scaling} |",
            row.setup,
            row.size,
            row.cpus,
            row.requests,
            row.failed,
            row.insns_per_request,
            row.conflict_lines_per_request,
            row.transfers_per_request,
            row.busiest_cpu_share
        );
    }
    text
}

/// What is in the figures and what was kept apart.
fn by_class(points: &[Point]) -> String {
    let mut text = "What is in these figures, and what was kept apart, in instructions a request: the \
                    *path* through the kernel and the server program (*user*) are in; waiting for locks, \
                    scheduler and timers, and interrupt entry depend on how the host ran the virtual CPUs, \
                    and are not. Transfers as run, beside the replay's, and of the server program's own \
                    memory, which are not in either.\n\n| set-up | size | CPUs | path | user | spin | sched | irq \
                    | transfers, replay | lowest | highest | as run | user's | packets | sent twice |\n\
                    |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    let mut cases: Vec<Case> = points.iter().map(|point| point.case).collect();
    cases.sort_unstable_by_key(|case| (case.size, case.name, case.cpus));
    cases.dedup();
    for point in cases.into_iter().filter_map(|case| find(points, case)) {
        let class = |class| point.insns.get(&class).copied().unwrap_or_default();
        let [mean, low, high] = point.transfers;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {mean:.1} | {low:.1} | {high:.1} | {:.1} \
             | {:.1} | {:.1} | {} |",
            point.case.name,
            point.case.size,
            point.case.cpus,
            class(Class::Path),
            class(Class::User),
            class(Class::Spin),
            class(Class::Sched),
            class(Class::Irq),
            point.transfers_as_run,
            point.user_transfers,
            point.packets as f64 / point.requests.max(1) as f64,
            point.retransmitted
        );
    }
    text
}
