//! `cpubond verify`: what is not as it should be. Writes nothing.

use crate::bond;
use crate::change::{DOWN, Item, Kernel, quoted};
use crate::config::{self, Config};
use crate::converge::Goal;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::journal::{By, Journal, State};
use crate::netlink::Rtnetlink;
use crate::settle::Settle;
use clap::Args;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const SCHEMA: u32 = 1;

/// Report what is not as config.toml, or "cpubond up", has said
#[derive(Args, Debug)]
#[command(
    long_about = "Report what is not as it should be: bonds of /etc/cpubond/config.toml and those \
        made by \"cpubond up\". A line each: where, what is wanted, what was found, and the fix. \
        Also: slaves that are not there or that the bond cannot send by, CPUs that the kernel's map \
        sends elsewhere, slaves that nobody asked for, an apply that is not final.\n\n\
        Exits with 0 if all is well, with 3 if not. Changes nothing and needs no privilege.",
    after_long_help = "Examples:\n  cpubond verify\n  cpubond verify -j | jq -r '.drift[].place'"
)]
pub struct Verify {
    /// The configuration [default: /etc/cpubond/config.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON (schema 1)
    #[arg(short, long)]
    pub json: bool,
    /// Seconds to wait for the kernel's map to follow a change
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    pub wait: u16,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    drift: Vec<Drift>,
}

/// One thing that is not as it should be.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Drift {
    place: String,
    wanted: String,
    found: String,
    fix: String,
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            wanted,
            found,
            fix,
        } = self;
        write!(f, "{place}: wanted {wanted}, found {found}; {fix}")
    }
}

impl Verify {
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let config = match &self.config {
            None if !Path::new(config::PATH).exists() => None,
            path => Some(Config::load(&config::path(path.as_deref()))?),
        };
        let bonds = config.map(|config| config.bonds).unwrap_or_default();
        let drift = drift(&host, &mut Rtnetlink::open()?, &bonds, self.wait)?;
        let code = match drift.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(Exit::Drift as u8),
        };
        if self.json {
            let report = Report {
                schema: SCHEMA,
                drift,
            };
            let json = serde_json::to_string_pretty(&report)
                .map_err(|error| Error::new("cpubond verify", error))?;
            println!("{json}");
        } else {
            for line in &drift {
                println!("{line}");
            }
            if drift.is_empty() {
                println!("all as it should be");
            }
        }
        Ok(code)
    }
}

fn drift(
    host: &Host,
    kernel: &mut dyn Kernel,
    bonds: &[config::Bond],
    wait: u16,
) -> Result<Vec<Drift>> {
    let journal = Journal::read(host)?;
    let mut drift = Vec::new();
    let mut add = |place: &dyn fmt::Display, wanted: &str, found: &str, fix: &str| {
        drift.push(Drift {
            place: place.to_string(),
            wanted: wanted.to_string(),
            found: found.to_string(),
            fix: fix.to_string(),
        });
    };
    const APPLY: &str = "\"cpubond apply\" mends it";

    let goal = Goal::new(host, kernel, &journal, bonds, By::Apply)?;
    for error in &goal.missing {
        add(
            error,
            "the device",
            "none",
            "plug it in, or take it out of the configuration",
        );
    }
    for change in goal.plan(host, kernel, &journal)?.changes {
        add(
            &change.item,
            &quoted(&change.after),
            &quoted(&change.before),
            APPLY,
        );
    }
    for (bond, _) in journal.bonds.iter().filter(|(_, by)| **by == By::Up) {
        if goal.target(bond).is_some() {
            continue;
        }
        let again = format!("\"cpubond down {bond}\", and up again");
        for change in journal.in_force() {
            // A slave's was taken down to be enslaved, and is up since.
            let is_passing = matches!(change.item, Item::Up { .. }) && change.after == DOWN;
            if change.bond != *bond || is_passing {
                continue;
            }
            let now = change.item.read(host, kernel)?.unwrap_or_default();
            if now != change.after {
                add(&change.item, &quoted(&change.after), &quoted(&now), &again);
            }
        }
    }
    for target in &goal.targets {
        let name = &target.bond.name;
        for slave in bond::slaves(host, name) {
            if !target.has(&slave) {
                let fix =
                    format!("\"ip link set {slave} nomaster\", or add it to the configuration");
                add(
                    &format_args!("{slave}: master"),
                    "not this bond",
                    name,
                    &fix,
                );
            }
        }
        if !journal.has_made(host, name) {
            continue;
        }
        let bindings = target.bindings(host)?;
        let settle = Settle {
            bond: &target.bond,
            bindings: &bindings,
            seconds: wait,
        };
        match settle.wait(host, &|| Ok(())) {
            Ok(waiting) => {
                for slave in waiting {
                    let fix = "see to its cable, its switch port and the aggregate there";
                    add(
                        &format_args!("{}: link", slave.slave),
                        "usable",
                        slave.found,
                        fix,
                    );
                }
            }
            Err(error) => add(
                &format_args!("{name}: cpu_bound_map"),
                "each CPU bound to its slave",
                &error.to_string(),
                APPLY,
            ),
        }
    }
    match journal.pending.as_ref().map(|pending| pending.state) {
        None => {}
        Some(State::Unconfirmed) => add(
            &"cpubond apply",
            "final",
            "waits to be confirmed",
            "\"cpubond confirm\" keeps it, \"cpubond rollback\" takes it back",
        ),
        Some(State::Applying) => add(&"cpubond apply", "final", "killed, or under way", APPLY),
        Some(State::RollingBack) => add(
            &"cpubond apply",
            "final",
            "rolled back, but not in full",
            "\"cpubond rollback\" tries again",
        ),
    }
    Ok(drift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeKernel};

    const CONFIG: &str = r#"
        [[bond]]
        name = "bond0"
        [[bond.slave]]
        name = "eth0"
        [[bond.slave]]
        name = "eth1"
    "#;

    #[test]
    fn each_drift_has_its_line() {
        let fake = Fake::with_cpus(4);
        fake.nic("eth0", &[(25, "virtio0-input.0")]);
        fake.nic("eth1", &[(35, "virtio1-input.0")]);
        let host = fake.host();
        let mut kernel = FakeKernel::new(&fake);
        let bonds = Config::parse(Path::new("c.toml"), CONFIG).unwrap().bonds;
        let lines = |kernel: &mut FakeKernel, bonds: &[config::Bond]| -> Vec<String> {
            drift(&host, kernel, bonds, 0)
                .unwrap()
                .iter()
                .map(Drift::to_string)
                .collect()
        };
        assert!(lines(&mut kernel, &bonds).len() > 5);

        let mut journal = Journal::open(&host).unwrap();
        let goal = Goal::new(&host, &mut kernel, &journal, &bonds, By::Apply).unwrap();
        journal.begin(&host, &mut kernel, None).unwrap();
        goal.reach(&host, &mut kernel, &mut journal, 0, &|| Ok(()))
            .unwrap();
        assert!(lines(&mut kernel, &bonds)[0].contains("killed, or under way"));
        journal.commit(&host).unwrap();
        assert_eq!(lines(&mut kernel, &bonds), [""; 0]);

        let writes = kernel.writes;
        fake.file("sys/class/net/eth1/bonding_slave/mii_status", "down\n");
        fake.file("sys/class/net/eth1/carrier", "0\n");
        assert!(
            lines(&mut kernel, &bonds)[0]
                .starts_with("eth1: link: wanted usable, found no carrier")
        );
        fake.file("sys/class/net/eth1/bonding_slave/mii_status", "up\n");
        fake.file("proc/irq/35/smp_affinity_list", "3\n");
        assert_eq!(
            lines(&mut kernel, &bonds)[0],
            "eth1: CPUs of irq/35: wanted '2', found '3'; \"cpubond apply\" mends it"
        );
        fake.file("proc/irq/35/smp_affinity_list", "2\n");
        fake.file("sys/class/net/bond0/bonding/slaves", "eth0 eth1 eth2\n");
        assert!(lines(&mut kernel, &bonds)[0].starts_with("eth2: master: wanted not this bond"));
        assert_eq!(kernel.writes, writes);

        // The same bond by the command line: its journal says how it should be.
        fake.file("sys/class/net/bond0/bonding/slaves", "eth0 eth1\n");
        journal.bonds.insert("bond0".into(), By::Up);
        journal.save(&host).unwrap();
        assert_eq!(lines(&mut kernel, &[]), [""; 0]);
        fake.file("proc/irq/35/smp_affinity_list", "3\n");
        assert_eq!(
            lines(&mut kernel, &[]),
            ["eth1: CPUs of irq/35: wanted '2', found '3'; \"cpubond down bond0\", and up again"]
        );
    }
}
