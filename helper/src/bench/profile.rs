//! Regions of a lab's run, counted by the profiler in the server's QEMU.
//!
//! ```text
//! let topology = Topology { profiler: true, ..Topology::default() };
//! let lab = Lab::boot(&host, &topology, accel, false)?;
//! let mut profiler = Profiler::of(&lab)?;
//! profiler.open(&Region::packets("balance-rr", "bonding:bond_start_xmit"))?;
//! lab.server().output("…the load…", timeout)?;
//! let profile = profiler.close()?;
//! println!("{} instructions a packet", profile.per_packet(Class::Path).insns);
//! ```
//!
//! What the figures are not: they say nothing of cycles per instruction, of hardware cache
//! misses and of throughput; interconnect, DMA and prefetch are not modelled.

use crate::vm::guest::Guest;
use crate::vm::lab::Lab;
use anyhow::{Context, Result, anyhow, bail};
use profiler_model::counts::Counts;
use profiler_model::region::{REGION_FILE, STATUS_FILE, SYMBOLS_FILE};
use profiler_model::replay;
use profiler_model::trace::{self, Stream};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub use profiler_model::class::Class;
pub use profiler_model::counts::{Count, FunctionCount, RangeCount, Replay};
pub use profiler_model::region::{Region, Window};

/// For a marker, at whose end the counts are written.
const MARK: Duration = Duration::from_secs(120);
/// For the kernel's symbols, a few MB.
const SYMBOLS: Duration = Duration::from_secs(60);
/// Functions of a point that are kept, by each figure.
const FUNCTIONS: usize = 40;
/// The status before the plugin has seen a marker.
const UNSEEN: &str = "QEMU has seen no marker; is it the plugin's?";

/// What was counted in one region.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// The region's.
    pub label: String,
    /// CPUs of the server.
    pub cpus: u32,
    /// Packets (or requests) that the counts are over, by CPU. With [`Window::Packets`]
    /// those that are whole: from a mark to the CPU's next.
    pub packets: Vec<u64>,
    /// Every function that ran, by class.
    pub functions: Vec<FunctionCount>,
    /// As [`Region::ranges`] asked.
    pub ranges: Vec<RangeCount>,
    /// Path instructions of the packet in the middle, were they sorted; none when there
    /// were no whole packets. What an interrupt or a full queue adds now and then is not in it.
    pub median_insns: Option<u32>,
    /// The figure that does not depend on the host's scheduling.
    pub replay: Replay,
}

/// Figures of a function, a packet or request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// As in kallsyms.
    pub name: String,
    /// Instructions.
    pub insns: f64,
    /// Conflict lines, as run.
    pub conflicts: f64,
    /// Transfers, as run.
    pub transfers: f64,
}

/// Three figures a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PerPacket {
    /// Instructions.
    pub insns: f64,
    /// Conflict lines.
    pub conflicts: f64,
    /// Transfers, as run.
    pub transfers: f64,
}

impl Profile {
    fn new(cpus: u32, counts: Counts, streams: &[Stream]) -> Self {
        let whole: Vec<u64> = counts
            .packet_insns
            .iter()
            .map(|packets| packets.len() as u64)
            .collect();
        // In a region that counts as a whole, the last packet of each CPU does too.
        let packets = match counts.window {
            Window::Packets => whole,
            Window::Region => counts.marks,
        };
        let mut insns = counts.packet_insns.concat();
        insns.sort_unstable();
        Self {
            label: counts.label,
            cpus,
            replay: replay::replay(streams, packets.iter().sum()),
            packets,
            functions: counts.functions,
            ranges: counts.ranges,
            median_insns: insns.get(insns.len() / 2).copied(),
        }
    }

    /// Packets (or requests) on all CPUs.
    pub fn total_packets(&self) -> u64 {
        self.packets.iter().sum()
    }

    /// All of one class.
    pub fn total(&self, class: Class) -> Count {
        self.rows(class).map(FunctionCount::total).sum()
    }

    /// One class on one CPU.
    pub fn on_cpu(&self, class: Class, cpu: u32) -> Count {
        self.rows(class)
            .filter_map(|row| row.cpus.get(cpu as usize))
            .copied()
            .sum()
    }

    /// One class, a packet. Zero where there were no packets.
    pub fn per_packet(&self, class: Class) -> PerPacket {
        self.divide(self.total(class))
    }

    /// Instructions from entry of one function to entry of another, as asked for.
    pub fn range(&self, from: &str, to: &str) -> Option<&RangeCount> {
        self.ranges
            .iter()
            .find(|range| range.from == from && range.to == to)
    }

    /// Functions of the way of `times` packets or requests, those that matter: the first
    /// [`FUNCTIONS`] by transfers, as many by conflicts and by instructions, and those that are
    /// `wanted`. Those with most transfers come first.
    pub fn path_functions(&self, times: u64, wanted: impl Fn(&str) -> bool) -> Vec<Function> {
        let each = |n: u64| n as f64 / times.max(1) as f64;
        let mut all: Vec<Function> = self
            .rows(Class::Path)
            .map(|row| {
                let total = row.total();
                Function {
                    name: row.name.clone(),
                    insns: each(total.insns),
                    conflicts: each(total.conflicts),
                    transfers: each(total.transfers),
                }
            })
            .collect();
        let mut kept = Vec::new();
        for of in [
            |function: &Function| function.transfers,
            |function: &Function| function.conflicts,
            |function: &Function| function.insns,
        ] {
            all.sort_by(|a, b| of(b).total_cmp(&of(a)));
            kept.extend(all.drain(..all.len().min(FUNCTIONS)));
        }
        kept.extend(all.into_iter().filter(|function| wanted(&function.name)));
        kept.sort_by(|a, b| b.transfers.total_cmp(&a.transfers));
        kept
    }

    /// Share of the busiest CPU in the instructions of some classes, 1 / CPUs to 1.
    pub fn busiest_share(&self, classes: &[Class]) -> f64 {
        let by_cpu: Vec<u64> = (0..self.cpus)
            .map(|cpu| {
                classes
                    .iter()
                    .map(|&class| self.on_cpu(class, cpu).insns)
                    .sum()
            })
            .collect();
        let all: u64 = by_cpu.iter().sum();
        let most = by_cpu.into_iter().max().unwrap_or_default();
        if all == 0 {
            0.0
        } else {
            most as f64 / all as f64
        }
    }

    fn rows(&self, class: Class) -> impl Iterator<Item = &FunctionCount> {
        self.functions.iter().filter(move |row| row.class == class)
    }

    /// A count of this profile, a packet. Zero where there were no packets.
    pub fn divide(&self, count: Count) -> PerPacket {
        let packets = self.total_packets();
        if packets == 0 {
            return PerPacket::default();
        }
        let each = |n: u64| n as f64 / packets as f64;
        PerPacket {
            insns: each(count.insns),
            conflicts: each(count.conflicts),
            transfers: each(count.transfers),
        }
    }
}

/// Opens and closes regions of one lab.
pub struct Profiler<'a> {
    lab: &'a Lab,
    exchange: &'a Exchange,
    /// Label of the open region.
    open: Option<String>,
}

impl<'a> Profiler<'a> {
    /// Of a lab that was booted with `profiler` in its topology.
    pub fn of(lab: &'a Lab) -> Result<Self> {
        let exchange = lab
            .profile()
            .ok_or_else(|| anyhow!("this lab was booted without the profiler"))?;
        Ok(Self {
            lab,
            exchange,
            open: None,
        })
    }

    /// From here on it is counted. One region at a time.
    pub fn open(&mut self, region: &Region) -> Result<()> {
        let guest = self.lab.server();
        self.exchange.arm(guest, region)?;
        guest.output("cpubond vm mark open-armed", MARK)?;
        self.exchange.status("open")?;
        self.open = Some(region.label.clone());
        Ok(())
    }

    /// Up to here it was counted.
    pub fn close(&mut self) -> Result<Profile> {
        let label = self
            .open
            .take()
            .ok_or_else(|| anyhow!("no region of the profiler is open"))?;
        self.lab.server().output("cpubond vm mark close", MARK)?;
        self.exchange.read(&label)
    }
}

/// The directory that the helper and the plugin in the server's QEMU exchange files in.
pub struct Exchange {
    dir: PathBuf,
    cpus: u32,
    /// Modules at the time the plugin was last given the symbols: only they change them.
    modules: Mutex<Option<String>>,
}

impl Exchange {
    /// In a directory that is there, of a server with some CPUs.
    pub fn new(dir: PathBuf, cpus: u32) -> Self {
        Self {
            dir,
            cpus,
            modules: Mutex::default(),
        }
    }

    /// Tell the plugin what the marker that comes next is to open.
    pub fn arm(&self, server: &Guest, region: &Region) -> Result<()> {
        region.check().map_err(anyhow::Error::msg)?;
        self.refresh_symbols(server)?;
        self.put(REGION_FILE, &serde_json::to_string(region)?)?;
        // So that a marker nobody sees does not pass for one that was.
        self.put(STATUS_FILE, UNSEEN)
    }

    /// The functions of the guest's kernel, as it says.
    pub fn put_symbols(&self, text: &str) -> Result<()> {
        self.put(SYMBOLS_FILE, text)
    }

    /// Whether the last marker did what it should.
    pub fn status(&self, what: &str) -> Result<()> {
        let path = self.dir.join(STATUS_FILE);
        let status = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if !status.is_empty() {
            bail!("profiler: cannot {what} the region: {status}");
        }
        Ok(())
    }

    /// What was counted in a region that is closed.
    pub fn read(&self, label: &str) -> Result<Profile> {
        let path = Region::counts_file(&self.dir, label);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: no region '{label}' was counted", path.display()))?;
        let counts: Counts =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let path = Region::trace_file(&self.dir, label);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let streams =
            trace::read(&mut BufReader::new(file)).with_context(|| path.display().to_string())?;
        Ok(Profile::new(self.cpus, counts, &streams))
    }

    fn put(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    fn refresh_symbols(&self, server: &Guest) -> Result<()> {
        let mut known = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        // BPF programs come and go without a module; their names hold a hash.
        let modules = server.output(
            "cut -d' ' -f1,6 /proc/modules; bpftool prog list 2>/dev/null",
            MARK,
        )?;
        if known.as_ref() == Some(&modules) {
            return Ok(());
        }
        // It calls back, with the text.
        server.output("cpubond vm mark symbols", SYMBOLS)?;
        *known = Some(modules);
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn row(name: &str, class: Class, insns: &[u64]) -> FunctionCount {
        FunctionCount {
            name: name.to_owned(),
            module: None,
            class,
            cpus: insns
                .iter()
                .map(|&insns| Count {
                    insns,
                    conflicts: insns / 10,
                    transfers: insns / 20,
                })
                .collect(),
        }
    }

    /// Two CPUs, four packets.
    pub fn profile(label: &str, scale: u64) -> Profile {
        let counts = Counts {
            label: label.to_owned(),
            window: Window::Packets,
            functions: vec![
                row("bond_start_xmit", Class::Path, &[100 * scale, 300 * scale]),
                row("memset", Class::Path, &[40, 40]),
                row("memset", Class::Generator, &[4000, 4000]),
                row("tick", Class::Sched, &[5000, 0]),
            ],
            ranges: vec![RangeCount {
                from: "bond_start_xmit".to_owned(),
                to: "__dev_queue_xmit".to_owned(),
                times: 4,
                insns: 200,
                min: 40,
                max: 60,
                ..RangeCount::default()
            }],
            packet_insns: vec![vec![110], vec![120, 115, 130]],
            marks: vec![2, 4],
        };
        Profile::new(2, counts, &[])
    }

    #[test]
    fn figures_are_a_packet_and_by_class() {
        let profile = profile("x", 1);
        assert_eq!(profile.packets, [1, 3]);
        assert_eq!(profile.per_packet(Class::Path).insns, 120.0);
        assert_eq!(profile.per_packet(Class::Path).transfers, 6.0);
        assert_eq!(profile.per_packet(Class::Generator).insns, 2000.0);
        assert_eq!(profile.on_cpu(Class::Path, 1).insns, 340);
        assert_eq!(profile.median_insns, Some(120));
        let range = profile.range("bond_start_xmit", "__dev_queue_xmit");
        assert_eq!(range.and_then(RangeCount::mean), Some(50.0));
        assert_eq!(profile.range("a", "b"), None);
        let share = profile.busiest_share(&[Class::Path]);
        assert!((share - 340.0 / 480.0).abs() < 1e-9, "{share}");
    }

    #[test]
    fn functions_that_move_lines_are_kept_however_short() {
        let mut profile = profile("x", 1);
        let mut count = |name: &str, insns, transfers| {
            profile.functions.push(FunctionCount {
                cpus: vec![Count {
                    insns,
                    conflicts: transfers,
                    transfers,
                }],
                ..row(name, Class::Path, &[])
            });
        };
        for number in 0..3 * FUNCTIONS as u64 {
            count(&format!("long{number}"), 1_000_000 + number, 0);
        }
        count("short", 4, 400);
        count("asked_for", 0, 0);
        count("not_asked_for", 0, 0);
        let functions = profile.path_functions(4, |name| name == "asked_for");
        let short = Function {
            name: "short".to_owned(),
            insns: 1.0,
            conflicts: 100.0,
            transfers: 100.0,
        };
        assert_eq!(functions.first(), Some(&short));
        let there = |name: &str| functions.iter().any(|function| function.name == name);
        assert!(there("asked_for") && there("long119") && !there("not_asked_for"));
    }

    #[test]
    fn no_packets_are_no_figures() {
        let profile = Profile::new(1, Counts::default(), &[]);
        assert_eq!(profile.per_packet(Class::Path), PerPacket::default());
        assert_eq!(profile.busiest_share(&[Class::Path]), 0.0);
        assert_eq!(profile.median_insns, None);
    }
}
