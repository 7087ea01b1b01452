//! `cpubond man`: the manual pages, from the same text as `--help`.

use crate::error::{Error, Result};
use clap::{Args, Command};
use clap_mangen::Man;
use std::fs;
use std::path::{Path, PathBuf};

/// Write the manual pages
#[derive(Args, Debug)]
#[command(
    long_about = "Write the manual pages: cpubond(8) and one for each subcommand, from the same \
        text as --help. \"make man\" writes them to target/man, \"make install\" installs them.",
    after_long_help = "Example:\n  cpubond man /tmp/man && man -l /tmp/man/cpubond-up.8"
)]
pub struct Pages {
    /// The directory to write them to; made when missing
    pub dir: PathBuf,
}

impl Pages {
    /// Write a page for `command` and one for each of its visible subcommands.
    pub fn run(&self, command: Command) -> Result<()> {
        fs::create_dir_all(&self.dir)
            .map_err(|error| Error::new(self.dir.display(), error).fix("name another directory"))?;
        let mut command = command.disable_help_subcommand(true);
        command.build();
        write(command, &self.dir)
    }
}

fn write(command: Command, dir: &Path) -> Result<()> {
    for subcommand in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        write(subcommand.clone(), dir)?;
    }
    let version = concat!("cpubond ", env!("CARGO_PKG_VERSION"));
    Man::new(command)
        .section("8")
        // No date, so that the same source makes the same page; left empty, the source would
        // stand in its place.
        .date("\"\"")
        .source(version)
        .manual("System administration")
        .generate_to(dir)
        .map(drop)
        .map_err(|error| {
            Error::new(dir.display(), error).fix("free some space, or name another directory")
        })
}
