//! `cpubond bench prof`: by function, what a packet costs over one bond, or over two side
//! by side.

use super::profile::{Class, Count, PerPacket, Profile, Profiler, Region};
use crate::vm::image::Host;
use crate::vm::lab::Lab;
use crate::vm::machine::Accel;
use crate::vm::topology::Topology;
use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// By function, what a packet costs over one bond, or over two side by side
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cpubond bench prof balance-rr cpu_bound        # the table, side by side
  cpubond bench prof cpu_bound --cpus 8
  cpubond bench prof balance-xor raw-private -j  # as JSON

pktgen sends from all CPUs of the lab's server at once; each has a NIC of one queue. The
server's QEMU counts, for each kernel function, a packet: instructions, conflicts (a read
of a line that another CPU wrote since, a write to a line that another CPU touched since)
and transfers (a read of a line dirty elsewhere, a write to a line held elsewhere), as run.
Replayed, below the table, is the figure that does not depend on how the host ran the CPUs:
mean, lowest and highest over round robin and seeded random orders of the same packets.

This counts lines, with caches that never evict. It knows nothing of cycles per
instruction, of hardware misses, of throughput; interconnect, DMA and prefetch are not
modelled.

Written to target/results: prof.json and prof.svg.")]
pub struct Prof {
    /// Bonding mode (`balance-xor:cpu_bound` for a policy), raw-private, or raw-shared
    #[arg(required = true, num_args = 1..=2, value_name = "HOW")]
    hows: Vec<String>,
    /// CPUs of the server, and its NICs
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=24))]
    cpus: u32,
    /// Packets of each CPU
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    packets: u32,
    /// Functions in the table
    #[arg(long, default_value_t = 25)]
    top: usize,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Show the result as JSON in place of the table
    #[arg(short, long)]
    json: bool,
}

/// What each packet of pktgen's calls once, first of all; pktgen_xmit itself is inlined.
const PACKET: &str = "pktgen:mod_cur_headers";
/// Where a packet enters the bond, and where the bond gives it to the slave.
const BOND: &str = "bond_start_xmit";
const SLAVE: &str = "__dev_queue_xmit";
/// Emulated, profiled, on a busy host.
const STEP: Duration = Duration::from_secs(900);
const LIMITS: &str = "Counted: instructions, and lines that move between caches that never evict. \
    Not cycles per instruction, hardware misses or throughput; interconnect, DMA and prefetch are \
    not modelled.";

/// Versioned: a reader checks `schema` first.
#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    kernel: &'a str,
    limits: &'a str,
    profiles: &'a [Profile],
}

impl Prof {
    /// Run it.
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::prepare(self.modules.clone(), false)?;
        let topology = Topology {
            cpus: self.cpus,
            nics: self.cpus,
            profiler: true,
            ..Topology::default()
        };
        eprintln!(
            "cpubond: boot a server of {} CPUs and NICs, and peer",
            self.cpus
        );
        let mut lab = Lab::boot(&host, &topology, Accel::Tcg, false)?;
        let mut profiles = Vec::new();
        for how in &self.hows {
            eprintln!("cpubond: {how}: {} packets of each CPU", self.packets);
            profiles.push(self.profile(&lab, how).with_context(|| how.clone())?);
        }
        let complaints = lab.complaints()?;
        if let Some(complaint) = complaints.first() {
            return Err(anyhow!("{complaint}"));
        }

        let report = Report {
            schema: 1,
            kernel: &host.kernel,
            limits: LIMITS,
            profiles: &profiles,
        };
        let json = serde_json::to_string_pretty(&report)? + "\n";
        let at = |name: &str| host.checkout.join("target/results").join(name);
        save(&at("prof.json"), &json)?;
        save(&at("prof.svg"), &chart(&profiles)?)?;
        if self.json {
            print!("{json}");
        } else {
            print!("{}", table(&profiles, self.top)?);
            println!("\nwritten to target/results/prof.json and prof.svg");
        }
        Ok(ExitCode::SUCCESS)
    }

    fn profile(&self, lab: &Lab, how: &str) -> Result<Profile> {
        let server = lab.server();
        lab.reset(if how.starts_with("802.3ad") {
            "802.3ad"
        } else {
            "balance-xor"
        })?;
        let script =
            |words: &str| server.output(&format!("/cpubond/guest/pktgen.sh {words}"), STEP);
        script(&format!("set-up '{how}'"))?;
        // What only the first packets do is done: translation, slabs, rings.
        script(&format!("send {}", self.packets.min(200)))?;
        let mut profiler = Profiler::of(lab)?;
        let mut region = Region::packets(&how.replace(':', "+"), PACKET);
        if !how.starts_with("raw-") {
            region.ranges = vec![(BOND.to_owned(), SLAVE.to_owned())];
        }
        profiler.open(&region)?;
        let sent = script(&format!("send {}", self.packets));
        let profile = profiler.close()?;
        sent?;
        Ok(profile)
    }
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// A function of class `path`, in each profile, a packet.
fn functions(profiles: &[Profile]) -> Vec<(String, Vec<PerPacket>)> {
    let mut found: BTreeMap<String, Vec<Count>> = BTreeMap::new();
    for (place, profile) in profiles.iter().enumerate() {
        for row in &profile.functions {
            if row.class != Class::Path {
                continue;
            }
            let name = match &row.module {
                Some(module) => format!("{} [{module}]", row.name),
                None => row.name.clone(),
            };
            let all = found
                .entry(name)
                .or_insert_with(|| vec![Count::default(); profiles.len()]);
            all[place] += row.total();
        }
    }
    let mut rows: Vec<_> = found
        .into_iter()
        .map(|(name, counts)| {
            let each = profiles
                .iter()
                .zip(counts)
                .map(|(profile, count)| profile.divide(count))
                .collect();
            (name, each)
        })
        .collect();
    // What moves most lines in either first, then what runs longest.
    let most =
        |row: &[PerPacket], what: fn(&PerPacket) -> f64| row.iter().map(what).fold(0.0, f64::max);
    rows.sort_by(|(_, a), (_, b): &(String, Vec<PerPacket>)| {
        most(b, |each| each.transfers)
            .total_cmp(&most(a, |each| each.transfers))
            .then(most(b, |each| each.insns).total_cmp(&most(a, |each| each.insns)))
    });
    rows
}

/// The table a kernel developer wants.
fn table(profiles: &[Profile], top: usize) -> Result<String> {
    let mut out = String::new();
    write!(out, "{:<40}", "a packet")?;
    for profile in profiles {
        write!(out, " {:>34}", profile.label)?;
    }
    write!(out, "\n{:<40}", "function")?;
    for _ in profiles {
        write!(
            out,
            " {:>12} {:>10} {:>10}",
            "insns", "conflicts", "transfers"
        )?;
    }
    writeln!(out)?;
    let line = |out: &mut String, name: &str, each: &[PerPacket]| -> Result<()> {
        write!(out, "{name:<40}")?;
        for figures in each {
            write!(
                out,
                " {:>12.1} {:>10.2} {:>10.2}",
                figures.insns, figures.conflicts, figures.transfers
            )?;
        }
        writeln!(out)?;
        Ok(())
    };
    let rows = functions(profiles);
    for (name, each) in rows.iter().take(top) {
        line(&mut out, name, each)?;
    }
    if let Some(rest) = rows.get(top..).filter(|rest| !rest.is_empty()) {
        let each: Vec<_> = (0..profiles.len())
            .map(|place| {
                rest.iter()
                    .fold(PerPacket::default(), |sum, (_, each)| PerPacket {
                        insns: sum.insns + each[place].insns,
                        conflicts: sum.conflicts + each[place].conflicts,
                        transfers: sum.transfers + each[place].transfers,
                    })
            })
            .collect();
        line(&mut out, &format!("{} more", rest.len()), &each)?;
    }
    writeln!(out)?;
    for class in Class::ALL {
        let each: Vec<_> = profiles.iter().map(|p| p.per_packet(class)).collect();
        let apart = if class == Class::Path { "" } else { " (apart)" };
        line(&mut out, &format!("all of {}{apart}", class.name()), &each)?;
    }
    writeln!(out)?;
    for profile in profiles {
        let replay = &profile.replay;
        write!(
            out,
            "{}: {} packets; replayed in {} orders, transfers {:.2} ({:.2} to {:.2}), conflicts \
             {:.2} ({:.2} to {:.2})",
            profile.label,
            profile.total_packets(),
            replay.orders,
            replay.transfers.mean,
            replay.transfers.min,
            replay.transfers.max,
            replay.conflicts.mean,
            replay.conflicts.min,
            replay.conflicts.max,
        )?;
        if let Some(median) = profile.median_insns {
            write!(out, "; {median} path instructions in the median packet")?;
        }
        if let Some(range) = profile.range(BOND, SLAVE)
            && let Some(mean) = range.mean()
        {
            write!(
                out,
                "; {BOND} to {SLAVE}: {mean:.1} instructions ({} to {})",
                range.min, range.max
            )?;
        }
        let share = 100.0 * profile.busiest_share(&[Class::Path]);
        writeln!(out, "; {share:.0} % of them on the busiest CPU")?;
    }
    writeln!(out, "{LIMITS}")?;
    Ok(out)
}

/// Bars: transfers a packet of the functions that have most.
fn chart(profiles: &[Profile]) -> Result<String> {
    const SHOWN: usize = 20;
    const COLOURS: [RGBColor; 2] = [RGBColor(213, 94, 0), RGBColor(0, 114, 178)];
    let mut rows = functions(profiles);
    rows.truncate(SHOWN);
    let failed = |error: &dyn std::fmt::Display| anyhow!("the chart cannot be drawn: {error}");
    let mut svg = String::new();
    {
        let height = 130 + 26 * rows.len() as u32;
        let area = SVGBackend::with_string(&mut svg, (960, height)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let names: Vec<String> = rows.iter().map(|(name, _)| name.clone()).collect();
        let most = rows
            .iter()
            .flat_map(|(_, each)| each.iter().map(|figures| figures.transfers))
            .fold(0.1, f64::max);
        let count = rows.len() as f64;
        let mut chart = ChartBuilder::on(&area)
            .caption(
                "cache-line transfers a packet, by function, as run",
                ("sans-serif", 18),
            )
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(260)
            .build_cartesian_2d(0.0..most * 1.05, 0.0..count)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc("transfers a packet; no CPI, no misses, no throughput; DMA and prefetch not modelled")
            .draw()
            .map_err(|error| failed(&error))?;
        for (row, name) in names.iter().enumerate() {
            let at = chart.backend_coord(&(0.0, count - row as f64 - 0.5));
            area.draw(&Text::new(
                name.clone(),
                (at.0 - 250, at.1 - 6),
                ("sans-serif", 12),
            ))
            .map_err(|error| failed(&error))?;
        }
        for (place, profile) in profiles.iter().enumerate() {
            let colour = COLOURS[place % COLOURS.len()];
            let thick = 0.8 / profiles.len() as f64;
            let bars = rows.iter().enumerate().map(|(row, (_, each))| {
                let top = count - row as f64 - 0.1 - thick * place as f64;
                Rectangle::new(
                    [(0.0, top - thick), (each[place].transfers, top)],
                    colour.filled(),
                )
            });
            chart
                .draw_series(bars)
                .map_err(|error| failed(&error))?
                .label(profile.label.clone())
                .legend(move |(x, y)| {
                    Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled())
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE)
            .border_style(BLACK)
            .draw()
            .map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::super::profile::tests::profile;
    use super::*;

    #[test]
    fn the_table_has_both_side_by_side_and_classes_apart() {
        let table = table(&[profile("slow", 10), profile("fast", 1)], 1).expect("made");
        let line = |begin: &str| -> Vec<&str> {
            table
                .lines()
                .find(|line| line.starts_with(begin))
                .unwrap_or_else(|| panic!("no {begin} in\n{table}"))
                .split_whitespace()
                .collect()
        };
        assert_eq!(
            line("bond_start_xmit")[1..],
            ["1000.0", "100.00", "50.00", "100.0", "10.00", "5.00"]
        );
        assert_eq!(line("1 more")[2], "20.0");
        assert_eq!(line("all of path")[3], "1020.0");
        assert_eq!(line("all of generator (apart)")[4], "2000.0");
        assert!(
            table.contains("bond_start_xmit to __dev_queue_xmit: 50.0 instructions (40 to 60)")
        );
        assert!(table.contains("Not cycles per instruction"));
    }

    #[test]
    fn the_chart_names_functions_and_its_limits() {
        let svg = chart(&[profile("slow", 10), profile("fast", 1)]).expect("drawn");
        for text in ["<svg", "bond_start_xmit", "slow", "fast", "no CPI"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(chart(&[profile("alone", 1)]).is_ok());
        assert!(chart(&[]).is_ok());
    }
}
