//! `cpubond vm mark`, in a guest: the instructions that open and close a region for the
//! profiler, and what it needs to know of the guest's kernel.

use super::agent;
use anyhow::{Context, Result, bail};
use profiler_model::region::{CLOSE, OPEN, Region, Window};
use std::arch::asm;
use std::fs;
use std::process::ExitCode;

/// What to do.
#[derive(clap::Subcommand)]
pub enum MarkCommand {
    /// Count from here on
    Open(Open),
    /// The same, where the host has prepared it
    OpenArmed,
    /// Count no more
    Close,
    /// Tell the host the functions of the running kernel
    Symbols,
}

/// `vm mark open`.
#[derive(clap::Args)]
pub struct Open {
    /// What the region is called
    label: String,
    /// A packet begins where this function is entered (again: or this one)
    #[arg(long = "packet", value_name = "[MODULE:]FUNCTION")]
    marks: Vec<String>,
    /// Count all of the region, not just from first to last packet
    #[arg(long)]
    all: bool,
    /// Count instructions from entry of one function to entry of another
    #[arg(long = "range", value_name = "FROM,TO", value_parser = range)]
    ranges: Vec<(String, String)>,
}

fn range(text: &str) -> Result<(String, String), String> {
    text.split_once(',')
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .ok_or_else(|| "want FROM,TO".to_owned())
}

/// Run it.
pub fn run(command: &MarkCommand) -> Result<ExitCode> {
    match command {
        MarkCommand::Open(args) => open(&Region {
            label: args.label.clone(),
            marks: args.marks.clone(),
            window: if args.all {
                Window::Region
            } else {
                Window::Packets
            },
            ranges: args.ranges.clone(),
            ..Region::default()
        })?,
        MarkCommand::OpenArmed => execute_open(),
        MarkCommand::Close => close()?,
        MarkCommand::Symbols => symbols()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Have the host prepare the region, then open it.
pub fn open(region: &Region) -> Result<()> {
    region.check().map_err(anyhow::Error::msg)?;
    call("arm", &serde_json::to_string(region)?)?;
    execute_open();
    call("status", "open")
}

/// Close the region; its counts are there when this returns.
pub fn close() -> Result<()> {
    execute_close();
    call("status", "close")
}

fn call(what: &str, arg: &str) -> Result<()> {
    if agent::call(&["profile", what, arg])? != ExitCode::SUCCESS {
        bail!("the host could not do it: profile {what}");
    }
    Ok(())
}

/// The marker, and no more: for a program that asked for the region before.
fn execute_open() {
    // SAFETY: a no-op, on a CPU of the profiler as on any other.
    unsafe { asm!(".byte 0x0f, 0x1f, 0x84, 0x00", ".long {}", const OPEN) }
}

fn execute_close() {
    // SAFETY: as above.
    unsafe { asm!(".byte 0x0f, 0x1f, 0x84, 0x00", ".long {}", const CLOSE) }
}

/// By a call to the host: what a command prints may be cut off on a slow machine.
fn symbols() -> Result<()> {
    let path = "/proc/kallsyms";
    let all = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let mut text = String::with_capacity(all.len());
    for line in all.lines() {
        if matches!(line.split(' ').nth(1), Some("t" | "T" | "w" | "W")) {
            text.push_str(line);
            text.push('\n');
        }
    }
    call("symbols", &text)
}
