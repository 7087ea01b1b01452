//! `cpubond vm micro`, in a guest: small programs whose conflicts and transfers can be
//! counted by hand. They open and close a region of their own.
//!
//! Memory is at a fixed address, of which each line is counted apart. Where two CPUs take
//! turns they do so by a line of their own, [`TURN`], so that their order is certain and
//! the figures of the others are exact.

use super::mark;
use anyhow::{Context, Result, anyhow};
use profiler_model::region::Region;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

const LINE: usize = 64;
const BASE: usize = 0x6370_0000_0000;
const SIZE: usize = 2 * 4096;
/// On the second page.
const TURN: usize = 64;
const LINES: usize = SIZE / LINE;

/// Run one of them.
#[derive(clap::Args)]
pub struct Args {
    /// Which
    #[arg(value_enum)]
    case: Case,
    /// What its region is called
    label: String,
    /// Turns of each CPU
    #[arg(long, default_value_t = 100)]
    rounds: u64,
}

/// What they do, with what it costs for n rounds.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Case {
    /// Line 0, read and written in turns: 2 × (2n - 1)
    Pass,
    /// Line 0, written in turns: 2n - 1
    Write,
    /// Line 0, updated atomically in turns: 2n - 1
    Update,
    /// Line 0 by one CPU, line 1 by the other: 0
    Private,
    /// Line 0, written once, then read by both: 1
    ReadShared,
    /// Line 0, of which each CPU writes a word of its own in turns: 2n - 1
    FalseSharing,
    /// Lines 0 to 3, read and written by a thread that changes CPUs: 4 × 2 × (n - 1)
    Migration,
}

/// The lines, each as words.
#[derive(Clone, Copy)]
struct Memory(&'static [[AtomicU64; LINE / 8]; LINES]);

impl Memory {
    fn map() -> Result<Self> {
        // SAFETY: the kernel places it only where nothing else is.
        let at = unsafe {
            mmap_anonymous(
                BASE as *mut _,
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::POPULATE,
            )
        }
        .with_context(|| format!("cannot map memory at {BASE:#x}"))?;
        // SAFETY: mapped above, zeroed, of that size, page aligned, and never unmapped.
        Ok(Self(unsafe { &*at.cast() }))
    }

    fn word(self, line: usize, word: usize) -> &'static AtomicU64 {
        &self.0[line][word]
    }

    /// A load and a store.
    fn read_and_write(self, line: usize) {
        let word = self.word(line, 0);
        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Two CPUs do something in turns, CPU 0 first.
    fn in_turns(self, cpu: usize, rounds: u64, what: impl Fn()) {
        let turn = self.word(TURN, 0);
        for round in 0..rounds {
            let own = round * 2 + cpu as u64;
            while turn.load(Ordering::Acquire) != own {
                std::hint::spin_loop();
            }
            what();
            turn.store(own + 1, Ordering::Release);
        }
    }
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Run it, in a region.
pub fn run(args: &Args) -> Result<ExitCode> {
    let memory = Memory::map()?;
    mark::open(&Region {
        label: args.label.clone(),
        watch: Some((BASE as u64, (BASE + SIZE) as u64)),
        ..Region::default()
    })?;
    let done = both_cpus(args, memory);
    mark::close()?;
    done?;
    Ok(ExitCode::SUCCESS)
}

fn both_cpus(args: &Args, memory: Memory) -> Result<()> {
    let &Args { case, rounds, .. } = args;
    if case == Case::Migration {
        for round in 0..rounds {
            pin((round % 2) as usize)?;
            (0..4).for_each(|line| memory.read_and_write(line));
        }
        return Ok(());
    }
    let cpus = [0, 1].map(|cpu| {
        thread::spawn(move || -> Result<()> {
            pin(cpu)?;
            let turns = |what: &dyn Fn()| memory.in_turns(cpu, rounds, what);
            match case {
                Case::Pass => turns(&|| memory.read_and_write(0)),
                Case::Write => turns(&|| memory.word(0, 0).store(1, Ordering::Relaxed)),
                Case::Update => turns(&|| {
                    memory.word(0, 0).fetch_add(1, Ordering::Relaxed);
                }),
                Case::FalseSharing => {
                    turns(&|| memory.word(0, cpu).store(1, Ordering::Relaxed));
                }
                Case::Private => (0..rounds).for_each(|_| memory.read_and_write(cpu)),
                Case::ReadShared => {
                    let first = || {
                        if cpu == 0 {
                            memory.word(0, 0).store(1, Ordering::Relaxed);
                        }
                    };
                    memory.in_turns(cpu, 1, first);
                    for _ in 0..rounds {
                        memory.word(0, 0).load(Ordering::Relaxed);
                    }
                }
                Case::Migration => {}
            }
            Ok(())
        })
    });
    for cpu in cpus {
        cpu.join()
            .map_err(|_| anyhow!("a CPU's thread panicked"))??;
    }
    Ok(())
}
