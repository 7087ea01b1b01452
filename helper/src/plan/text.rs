//! A proposal as `config.toml`, with its reasons as comments.

use super::{Proposal, Why};
use crate::bond::MapLine;
use serde::Serialize;
use std::fmt;

/// Columns of a comment.
const WIDTH: usize = 95;

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        comment(
            f,
            "Proposed by \"cpubond plan\". \"cpubond apply --check --diff\" shows what it would \
             change, \"cpubond apply\" makes it so.",
        )?;
        writeln!(f, "#")?;
        for fact in self.host.facts() {
            comment(f, &fact)?;
        }
        let left_out = self.host.nics.iter().filter_map(|nic| {
            let why = nic.left_out.as_ref()?;
            Some(format!("Left out: {}: {why}", nic.name))
        });
        for line in left_out {
            comment(f, &line)?;
        }
        if !self.host.virtual_devices.is_empty() {
            let names = self.host.virtual_devices.join(", ");
            comment(f, &format!("Left out, for they are no NICs: {names}"))?;
        }
        for warning in &self.warnings {
            comment(f, &format!("WARNING: {warning}"))?;
        }
        for bond in &self.bonds {
            writeln!(f, "\n[[bond]]")?;
            table(f, &bond.bond, &bond.why)?;
            for slave in &bond.slaves {
                writeln!(f)?;
                let nic = slave.device.as_ref().and_then(|name| self.host.nic(name));
                if let Some(nic) = nic {
                    comment(f, &nic.fact(&self.host))?;
                }
                writeln!(f, "[[bond.slave]]")?;
                table(f, &slave.slave, &slave.why)?;
            }
        }
        if !self.rest.is_empty() {
            writeln!(f)?;
            comment(f, "The rest, as it was.")?;
            write!(
                f,
                "{}",
                toml::to_string(&self.rest).map_err(|_| fmt::Error)?
            )?;
        }
        self.write_map(f)
    }
}

impl Proposal {
    /// The lines of `cpu_bound_map`, each behind `#   `.
    fn write_map(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bond) = self.bonds.first() else {
            return Ok(());
        };
        let name = &bond.bond.name;
        writeln!(f)?;
        if self.map.is_empty() {
            return comment(
                f,
                &format!("{name} asks no policy: its mode alone says which slave sends."),
            );
        }
        comment(
            f,
            &format!(
                "What /sys/class/net/{name}/bonding/cpu_bound_map will show while all slaves have \
                 a link: CPU, the slaves it sends by, and why these (set: by hand; irq: their \
                 interrupts are on this CPU; smt, llc, node, any: the nearest that there are, by \
                 core, last-level cache, NUMA node, or not at all)."
            ),
        )?;
        writeln!(f, "#")?;
        for MapLine {
            cpu,
            slaves,
            reason,
        } in &self.map
        {
            writeln!(f, "#   {cpu} {} {reason}", slaves.join(","))?;
        }
        Ok(())
    }
}

/// The keys and values of a table, each below its reason.
fn table(f: &mut fmt::Formatter<'_>, table: &impl Serialize, why: &Why) -> fmt::Result {
    let text = toml::to_string(table).map_err(|_| fmt::Error)?;
    for line in text.lines() {
        let key = line.split(" =").next().unwrap_or_default();
        if let Some(why) = why.get(key) {
            comment(f, why)?;
        }
        writeln!(f, "{line}")?;
    }
    Ok(())
}

/// Text that may have come from anywhere, in lines that are comments whatever is in it.
fn comment(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() > 1 && line.len() + 1 + word.len() > WIDTH {
            writeln!(f, "{line}")?;
            line = String::from("#  ");
        }
        line.push(' ');
        // TOML has no control characters in comments.
        line.extend(word.chars().filter(|c| !c.is_control()));
    }
    writeln!(f, "{line}")
}
