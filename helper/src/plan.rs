//! `cpubond plan`: look at the machine, and propose a `config.toml` for it. Writes nothing.

mod choice;
mod machine;
#[cfg(test)]
mod tests;
mod text;

use crate::bind;
use crate::bond::{self, MapLine};
use crate::change::Kernel;
use crate::check::check_slave;
use crate::config::{self, Address, Config, Resolved, Slave};
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::journal::Journal;
use crate::link;
use crate::module::{self, Driver};
use crate::netlink::Rtnetlink;
use crate::options::{self, Mode};
use crate::predict;
use crate::rivals;
use crate::topology;
use choice::Choices;
use clap::Args;
use machine::Machine;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

const SCHEMA: u32 = 1;

/// The bond's name, unless somebody has a better one.
const BOND: &str = "bond0";

/// Look at this machine, and propose a config.toml for it
#[derive(Args, Debug)]
#[command(
    long_about = "Look at this machine, and propose a config.toml for it: a bond of its NICs, \
        each with CPUs of its own, those of its NUMA node first, both threads of a core with one \
        NIC, and as many channels as fit. The reason of each choice is in a comment above it. \
        Below it is the map that the kernel will come to, predicted by the very code that it \
        decides by: which slave each CPU will send through, and why.\n\n\
        Without NICs all of the machine's are taken, but for those that are in use: in another \
        bond or bridge, with a VLAN on it, with addresses, or carrying a default route. NICs that \
        are named are taken in any case, and it is said what keeps \"cpubond apply\" from doing so. \
        What else moves interrupts on this machine is named, with what to do about it.\n\n\
        NICs are written by permanent address where they have one, else by PCI place, else by \
        name: what is least likely to change.\n\n\
        Writes nothing and needs no privilege, but only root can ask irqbalance what it leaves \
        alone. Warnings are in the comments too.",
    after_long_help = "Examples:\n  \
        Propose, read, apply:\n    \
          cpubond plan --address 192.0.2.10/24 >/etc/cpubond/config.toml\n    \
          less /etc/cpubond/config.toml\n    \
          cpubond apply --rollback-after 60s && cpubond confirm\n  \
        Two NICs by LACP, CPUs 0 and 1 left to other work:\n    \
          cpubond plan bond0 eth2 eth3 --mode 802.3ad --cpus 2-15\n  \
        The map that a configuration would come to, by CPU:\n    \
          cpubond plan --config new.toml -j | jq -c '.map[]'"
)]
pub struct Plan {
    /// The bond [default: that of --config, or bond0]
    pub bond: Option<String>,
    /// The network devices to enslave [default: all NICs that are not in use]
    #[arg(value_name = "NIC")]
    pub nics: Vec<String>,
    /// Bonding mode [default: cpu_bound]
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// Address of the bond, with its prefix length; may be repeated [default: those it has, or its
    /// NICs]
    #[arg(long = "address", value_name = "ADDRESS/LEN")]
    pub addresses: Vec<Address>,
    /// CPUs to share out, as a cpulist such as 0-3,8 [default: all online CPUs]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuSet>,
    /// A configuration to go by: what it says stays as it is, what it leaves open is proposed
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON (schema 1)
    #[arg(short, long)]
    pub json: bool,
}

/// Reasons by the key of `config.toml` that they are for.
type Why = BTreeMap<&'static str, String>;

#[derive(Debug, Serialize)]
struct Proposal {
    schema: u32,
    host: Machine,
    /// One.
    bonds: Vec<BondProposal>,
    /// The bond's `cpu_bound_map`; empty in modes that ask no policy.
    map: Vec<MapLine>,
    warnings: Vec<String>,
    /// What else is in the configuration gone by.
    #[serde(skip)]
    rest: toml::Table,
}

#[derive(Debug, Serialize)]
struct BondProposal {
    /// Without its slaves.
    #[serde(flatten)]
    bond: config::Bond,
    why: Why,
    slaves: Vec<SlaveProposal>,
}

#[derive(Debug, Serialize)]
struct SlaveProposal {
    /// The device's name now; `null` if it is not there.
    device: Option<String>,
    #[serde(flatten)]
    slave: Slave,
    why: Why,
}

/// What is wanted, by the command line or by a configuration.
struct Wish {
    bond: config::Bond,
    /// Devices of the configuration's other bonds, and which has them.
    taken: BTreeMap<String, String>,
    rest: toml::Table,
}

impl Plan {
    pub fn run(&self) -> Result<()> {
        let proposal = self.propose(&Host::default(), &mut Rtnetlink::open()?)?;
        if self.json {
            let json = serde_json::to_string_pretty(&proposal)
                .map_err(|error| Error::new("cpubond plan", error))?;
            println!("{json}");
            return Ok(());
        }
        print!("{proposal}");
        // Who sends the text to a file does not see them there.
        if !io::stdout().is_terminal() {
            for warning in &proposal.warnings {
                eprintln!("cpubond: warning: {warning}");
            }
        }
        Ok(())
    }

    fn propose(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<Proposal> {
        let Wish {
            mut bond,
            taken,
            rest,
        } = self.wish(host, kernel)?;
        let journal = Journal::read(host)?;
        let name = bond.name.clone();
        let is_ours = journal.has_made(host, &name);
        if link::exists(host, &name) && !is_ours {
            return Err(name_taken(host, &name));
        }
        let mut warnings = Vec::new();

        let (mut slaves, absent) = config::resolve(host, kernel, &bond)?;
        warnings.extend(absent.iter().map(Error::to_string));
        if slaves.is_empty()
            && let Some(error) = absent.into_iter().next()
        {
            return Err(error);
        }
        let missing: Vec<Slave> = bond
            .slaves
            .iter()
            .filter(|slave| !slaves.iter().any(|there| there.slave == **slave))
            .cloned()
            .collect();
        let named: Vec<String> = slaves.iter().map(|slave| slave.link.clone()).collect();
        let mut machine = Machine::look(host, kernel, &named)?;
        for nic in &mut machine.nics {
            let is_had = is_ours && nic.master.as_ref() == Some(&name);
            let busy = match (taken.get(&nic.name), is_had) {
                (Some(other), _) => Some(format!("{other} of the configuration has it")),
                (None, true) => None,
                (None, false) => check_slave(host, kernel, &nic.name)
                    .err()
                    .map(|error| error.to_string()),
            };
            if named.contains(&nic.name) {
                warnings
                    .extend(busy.map(|busy| format!("{busy}: until then it cannot be applied")));
                continue;
            }
            nic.left_out = match busy {
                _ if !named.is_empty() => Some("not named".to_string()),
                _ if host.link(&nic.name).join("phy80211").exists() => Some("wireless".to_string()),
                _ if nic.default_route => {
                    Some("it carries a default route; name it to have it in the plan".to_string())
                }
                Some(busy) => {
                    let place = format!("{}: ", nic.name);
                    Some(busy.strip_prefix(&place).unwrap_or(&busy).to_string())
                }
                None => None,
            };
            match &nic.left_out {
                None => slaves.push(Resolved {
                    link: nic.name.clone(),
                    slave: Slave::named(&nic.name),
                }),
                Some(why) if named.is_empty() => {
                    warnings.push(format!("{}: left out: {why}", nic.name));
                }
                Some(_) => {}
            }
        }
        if slaves.is_empty() {
            let found = match warnings.is_empty() {
                true => "this machine has no NIC".to_string(),
                false => format!("no NIC is free ({})", warnings.join("; ")),
            };
            return Err(Error::new("cpubond plan", found)
                .fix("name the network devices to plan with: \"cpubond plan bond0 DEVICE…\""));
        }

        let mut why = Why::new();
        if bond.addresses.is_empty() {
            bond.addresses = self.addresses(host, kernel, &machine, &slaves, &name, is_ours)?;
            if !bond.addresses.is_empty() && !is_ours {
                let text = "the NICs' own: the kernel takes no notice of addresses of slaves";
                why.insert("addresses", text.to_string());
            }
        }
        let asks = bond.needs_policy();
        why.insert("mode", mode_reason(&bond));
        why.insert(
            "miimon",
            "a slave whose link is down is noticed in so many ms".into(),
        );
        if bond.cpus.is_some() {
            why.insert("cpus", "the slaves share these".into());
        }

        let shares = bind::cpus_of_slaves(host, &bond, &slaves)?;
        let online = topology::online(host)?;
        let choices = Choices {
            host,
            machine: &machine,
            online: &online,
            shares: &shares,
            slaves: &slaves,
        };
        let mut predicted = Vec::new();
        let mut proposals = Vec::new();
        for (slave, share) in slaves.iter().zip(&shares) {
            let (proposal, bound) = choices.slave(slave, share, &mut warnings);
            predicted.push(bound);
            proposals.push(proposal);
        }
        // The bond's order is that in which it got them, and it keeps those that it has.
        let had = match bond::option_name(host, &name, "mode") {
            Some(mode) if mode == options::name(bond.mode) => bond::slaves(host, &name),
            _ => Vec::new(),
        };
        predicted.sort_by_key(|slave| {
            let place = had.iter().position(|had| *had == slave.name);
            place.unwrap_or(had.len())
        });
        proposals.extend(missing.into_iter().map(|slave| SlaveProposal {
            why: Why::from([(slave.id().key(), "not there now: left as it was".into())]),
            device: None,
            slave,
        }));
        let map = match asks {
            true => predict::map(host, &predicted)?,
            false => Vec::new(),
        };
        choices.warn(&mut warnings);
        if asks && predicted.iter().any(|slave| slave.node.is_some()) {
            let unknown = predict::unknown(host)?;
            if !unknown.is_empty() {
                warnings.push(format!(
                    "CPUs {unknown} are offline, and on which node is not known before they are \
                     online: what the map has for them is a guess"
                ));
            }
        }
        if asks && module::driver(host) == Driver::Stock {
            warnings.push(
                "bonding: the loaded driver is the stock one, without transmit policies; delete \
                 its bonds, \"rmmod bonding\", and load the patched one"
                    .into(),
            );
        }
        let links: Vec<String> = slaves.iter().map(|slave| slave.link.clone()).collect();
        warnings.extend(
            rivals::find(host, &links)
                .iter()
                .map(rivals::Rival::to_string),
        );
        bond.slaves = Vec::new();
        Ok(Proposal {
            schema: SCHEMA,
            bonds: vec![BondProposal {
                bond,
                why,
                slaves: proposals,
            }],
            host: machine,
            map,
            warnings,
            rest,
        })
    }

    /// The bond as far as it is said how it is to be.
    fn wish(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<Wish> {
        let mut rest = toml::Table::new();
        let mut bonds = Vec::new();
        if let Some(path) = &self.config {
            bonds = Config::load(path)?.bonds;
            rest = toml::from_str(&host::read(path)?)
                .map_err(|error| Error::new(path.display(), error.message()))?;
        }
        let name = match (&self.bond, &bonds[..]) {
            (Some(name), _) => name.clone(),
            (None, []) => BOND.to_string(),
            (None, [bond]) => bond.name.clone(),
            (None, [bond, ..]) => {
                return Err(
                    Error::new("cpubond plan", "the configuration has several bonds")
                        .fix(format_args!("name one: \"cpubond plan {}\"", bond.name))
                        .exit(Exit::Usage),
                );
            }
        };
        let mut bond = config::Bond::named(&name);
        if let Some(index) = bonds.iter().position(|bond| bond.name == name) {
            bond = bonds.remove(index);
        }
        if let Some(toml::Value::Array(tables)) = rest.get_mut("bond") {
            tables.retain(|table| table.get("name").and_then(toml::Value::as_str) != Some(&name));
            if tables.is_empty() {
                rest.remove("bond");
            }
        }
        let mut taken = BTreeMap::new();
        for other in &bonds {
            for slave in config::resolve(host, kernel, other)?.0 {
                taken.insert(slave.link, other.name.clone());
            }
        }

        bond.mode = self.mode.unwrap_or(bond.mode);
        if !self.addresses.is_empty() {
            bond.addresses = self.addresses.clone();
        }
        if self.cpus.is_some() {
            bond.cpus = self.cpus.clone();
        }
        if !self.nics.is_empty() {
            let (known, _) = config::resolve(host, kernel, &bond)?;
            bond.slaves = Vec::new();
            for nic in &self.nics {
                if !link::exists(host, nic) || !is_slave(host, nic) {
                    check_slave(host, kernel, nic)?;
                }
                let slave = known.iter().find(|slave| slave.link == *nic);
                bond.slaves
                    .push(slave.map_or(Slave::named(nic), |slave| slave.slave.clone()));
            }
        }
        // Slaves are yet to be found, where none are named.
        let mut checked = bond.clone();
        if checked.slaves.is_empty() {
            checked.slaves.push(Slave::named("any"));
        }
        match checked.check() {
            Ok(()) => Ok(Wish { bond, taken, rest }),
            Err(nonsense) => Err(nonsense.of_command("cpubond plan")),
        }
    }

    /// Those that the bond has, or else those that its slaves would lose.
    fn addresses(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        machine: &Machine,
        slaves: &[Resolved],
        bond: &str,
        is_ours: bool,
    ) -> Result<Vec<Address>> {
        if is_ours && link::exists(host, bond) {
            return Ok(kernel.addresses(bond)?.into_iter().map(Address).collect());
        }
        let nics = slaves.iter().filter_map(|slave| machine.nic(&slave.link));
        Ok(nics.flat_map(|nic| nic.addresses.clone()).collect())
    }
}

/// Whether it is a device that could be a slave, if it were not for what it is used for.
fn is_slave(host: &Host, link: &str) -> bool {
    link::is_ethernet(host, link) && !link::is_loopback(host, link) && !bond::is_bond(host, link)
}

fn name_taken(host: &Host, name: &str) -> Error {
    let error = Error::new(name, "exists already, and cpubond has not made it");
    match bond::is_bond(host, name) {
        true => error.fix(format_args!(
            "choose another name, or \"ip link del {name}\" first"
        )),
        false => error.fix(format_args!(
            "the first argument is the bond: \"cpubond plan {BOND} {name} …\""
        )),
    }
}

fn mode_reason(bond: &config::Bond) -> String {
    match (bond.mode, bond.needs_policy()) {
        (Mode::CpuBound, _) => {
            "each CPU sends by the slave that interrupts it; the switch's ports are to be a static \
             aggregate"
        }
        (Mode::Lacp, true) => {
            "LACP on the switch's ports; each CPU sends by the slave that interrupts it"
        }
        (_, true) => "each CPU sends by the slave that interrupts it",
        (_, false) => "which CPU sends makes no difference in this mode",
    }
    .to_string()
}

/// Orders eth2 before eth10.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let word = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let digits = &rest[word..];
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        parts.push((rest[..word].to_string(), digits[..end].parse().unwrap_or(0)));
        rest = &digits[end..];
    }
    parts
}
