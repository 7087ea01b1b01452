//! Changes to the machine: an item, what it held before and what it is to hold. That is enough to
//! make them, to see whether they are needed, and to take them back: at once when a later one
//! fails, or in another process, long after.
//!
//! Undoing looks at the state it finds, not at how far the doing came. A change that was never
//! made needs nothing undone, and what somebody else has changed since is not ours to touch.
//!
//! A new kind of change is a variant of [`Item`] and an arm in each of its methods; planning,
//! journal, rollback, undo and drift report follow from these.

use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::ethtool::{Channels, Ethtool};
use crate::host::{self, Host};
use crate::irq;
use crate::link::{self, Mac};
use crate::netlink::Rtnetlink;
use crate::rivals::irqbalance::{self, Irqs};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Everything that writes, so that tests can count writes and make one fail, and what only
/// rtnetlink tells.
pub trait Kernel {
    /// A bond with this index and the driver's defaults.
    fn create_bond(&mut self, bond: &str, index: u32) -> Result<()>;
    fn delete(&mut self, link: &str) -> Result<()>;
    fn set_up(&mut self, link: &str, up: bool) -> Result<()>;
    fn set_master(&mut self, link: &str, master: Option<&str>) -> Result<()>;
    fn add_address(&mut self, link: &str, address: IpNet) -> Result<()>;
    fn delete_address(&mut self, link: &str, address: IpNet) -> Result<()>;
    fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>>;
    /// The address the device was made with, whatever it has now; `None` if it was not made with
    /// one, as software devices are not.
    fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>>;
    /// `None` if the device's driver does not tell.
    fn channels(&mut self, link: &str) -> Result<Option<Channels>>;
    /// Set the number of combined channels.
    fn set_channels(&mut self, link: &str, combined: u32) -> Result<()>;
    fn write(&mut self, path: &Path, value: &str) -> Result<()>;
    /// Have irqbalance leave these interrupts alone and no others.
    fn set_banned(&mut self, host: &Host, irqs: &Irqs) -> Result<()>;
}

impl Kernel for Rtnetlink {
    fn create_bond(&mut self, bond: &str, index: u32) -> Result<()> {
        self.create_bond(bond, index)
    }

    fn delete(&mut self, link: &str) -> Result<()> {
        self.delete(link)
    }

    fn set_up(&mut self, link: &str, up: bool) -> Result<()> {
        self.set_up(link, up)
    }

    fn set_master(&mut self, link: &str, master: Option<&str>) -> Result<()> {
        self.set_master(link, master)
    }

    fn add_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        self.add_address(link, address)
    }

    fn delete_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        self.delete_address(link, address)
    }

    fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>> {
        self.addresses(link)
    }

    fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>> {
        self.permanent_mac(link)
    }

    fn channels(&mut self, link: &str) -> Result<Option<Channels>> {
        match Ethtool::open()? {
            Some(mut ethtool) => ethtool.channels(link),
            None => Ok(None),
        }
    }

    fn set_channels(&mut self, link: &str, combined: u32) -> Result<()> {
        match Ethtool::open()? {
            Some(mut ethtool) => ethtool.set_combined(link, combined),
            None => Err(Error::new(link, "the kernel has no ethtool netlink")
                .fix("leave out channels, and set them by \"ethtool -L\"")
                .exit(Exit::Unsupported)),
        }
    }

    fn set_banned(&mut self, host: &Host, irqs: &Irqs) -> Result<()> {
        match irqbalance::running(host) {
            Some(irqbalance) => irqbalance.set_banned(irqs),
            None => Err(Error::new("irqbalance", "has ended").fix("try again")),
        }
    }

    fn write(&mut self, path: &Path, value: &str) -> Result<()> {
        fs::write(path, format!("{value}\n")).map_err(|error| {
            const EPERM: i32 = 1;
            const EIO: i32 = 5;
            let refused = Error::new(
                path.display(),
                format_args!("'{value}' cannot be written: {error}"),
            );
            let is_irq = path.ends_with("smp_affinity_list");
            let is_policy = path.ends_with("bonding/mode") || path.ends_with("xmit_hash_policy");
            match error.raw_os_error() {
                // EPERM since 6.13, even for root.
                Some(EIO | EPERM) if is_irq => kernel_managed(path),
                _ if is_policy && value == "cpu_bound" => refused
                    .fix("load the patched bonding.ko and bond_cpu_bound.ko (--module-dir); dmesg may say more")
                    .exit(Exit::Unsupported),
                _ => refused,
            }
        })
    }
}

/// The error for an interrupt whose CPUs the kernel keeps to itself.
pub fn kernel_managed(path: &Path) -> Error {
    Error::new(
        path.display(),
        "the kernel manages this interrupt and lets nobody move it",
    )
    .fix("leave this NIC out, or see whether its driver can be loaded without managed interrupts")
}

/// One thing on the machine that has a value, which is a text: a cpulist, a name, a word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// A bond: its index, or nothing if there is none of that name. The index is chosen before
    /// the bond is made, so that it can be told from one that somebody makes later.
    Bond { bond: String },
    /// A word or number in `/sys/class/net/BOND/bonding/NAME`.
    Option { bond: String, name: String },
    /// `present`, or nothing.
    Address { bond: String, address: IpNet },
    /// `up` or `down`.
    Up { link: String },
    /// The bond that has the slave, or nothing.
    Master { link: String },
    /// How many combined channels a device has.
    Channels { link: String },
    /// The CPUs that an interrupt of a device may go to.
    Irq { link: String, irq: u32 },
    /// A set of CPUs of a queue: `tx-0/xps_cpus`, `rx-0/rps_cpus`.
    Queue { link: String, file: String },
    /// `bonding_slave/cpus`.
    SlaveCpus { link: String },
    /// `banned` if irqbalance leaves the interrupt alone, or nothing. It is irqbalance's, not a
    /// device's: it outlives both the device and the interrupt.
    Ban { irq: u32 },
}

/// The value of a device that is up, or down.
pub const UP: &str = "up";
pub const DOWN: &str = "down";
/// The value of an address that is there.
pub const PRESENT: &str = "present";
/// The value of an interrupt that irqbalance leaves alone.
pub const BANNED: &str = "banned";
/// The value of what is not there.
pub const NOTHING: &str = "";

impl Item {
    /// The device it is of; empty if of none.
    pub fn link(&self) -> &str {
        match self {
            Self::Bond { bond } | Self::Option { bond, .. } | Self::Address { bond, .. } => bond,
            Self::Up { link }
            | Self::Master { link }
            | Self::Channels { link }
            | Self::Irq { link, .. }
            | Self::Queue { link, .. }
            | Self::SlaveCpus { link } => link,
            Self::Ban { .. } => "",
        }
    }

    /// Changes are undone from the highest to the lowest: interrupts and queues while the slave is
    /// in its bond, for many drivers have none while it is closed; the bond when it is empty.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Bond { .. } => 0,
            Self::Option { .. } | Self::Ban { .. } => 1,
            Self::Up { .. } => 2,
            Self::Master { .. } => 3,
            // Interrupts and queues may come and go with it.
            Self::Channels { .. } => 4,
            Self::Irq { .. } | Self::Queue { .. } | Self::SlaveCpus { .. } => 5,
            Self::Address { .. } => 6,
        }
    }

    /// What it holds now; `None` if there is no such thing on the machine (any more, or yet).
    pub fn read(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<Option<String>> {
        let link = self.link();
        if let Self::Bond { bond } = self {
            let index = link::index(host, bond).map_or(NOTHING.into(), |index| index.to_string());
            return Ok(Some(index));
        }
        if let Self::Ban { irq } = self {
            let Some(irqbalance) = irqbalance::running(host) else {
                return Ok(None);
            };
            let is_banned = irqbalance.banned_soon()?.contains(irq);
            return Ok(Some(if is_banned { BANNED } else { NOTHING }.into()));
        }
        if !link::exists(host, link) {
            return Ok(None);
        }
        let path = self.path(host);
        if path.as_ref().is_some_and(|path| !path.exists()) {
            return Ok(None);
        }
        let word = |word: &str, holds: bool| if holds { word } else { NOTHING }.to_string();
        let cpus = |parse: fn(&str) -> std::result::Result<CpuSet, String>| {
            let path = path.clone().unwrap_or_default();
            parse(&host::read(&path)?)
                .map(|cpus| cpus.to_string())
                .map_err(|error| Error::new(path.display(), error))
        };
        let value = match self {
            Self::Bond { .. } | Self::Ban { .. } => NOTHING.into(),
            Self::Option { .. } => {
                let text = host::read(path.as_deref().unwrap_or(Path::new("")))?;
                // NAME NUMBER, for those that have names.
                text.split_whitespace().next().unwrap_or_default().into()
            }
            Self::Address { bond, address } => {
                word(PRESENT, kernel.addresses(bond)?.contains(address))
            }
            Self::Up { link } => if link::is_up(host, link) { UP } else { DOWN }.into(),
            Self::Master { link } => link::master(host, link).unwrap_or_default(),
            Self::Channels { link } => {
                // One that has none that do both is left alone.
                let channels = kernel.channels(link)?;
                match channels.filter(|channels| channels.combined_max > 0) {
                    Some(channels) => channels.combined.to_string(),
                    None => return Ok(None),
                }
            }
            Self::Irq { .. } | Self::SlaveCpus { .. } => cpus(|text| text.parse())?,
            Self::Queue { .. } => cpus(CpuSet::from_mask)?,
        };
        Ok(Some(value))
    }

    /// Have it hold a value, and read that back.
    pub fn write(&self, host: &Host, kernel: &mut dyn Kernel, value: &str) -> Result<()> {
        match self {
            Self::Bond { bond } => match value.parse() {
                Ok(index) => kernel.create_bond(bond, index)?,
                Err(_) => kernel.delete(bond)?,
            },
            Self::Address { bond, address } => match value {
                PRESENT => kernel.add_address(bond, *address)?,
                _ => kernel.delete_address(bond, *address)?,
            },
            Self::Up { link } => kernel.set_up(link, value == UP)?,
            Self::Master { link } => {
                kernel.set_master(link, Some(value).filter(|bond| !bond.is_empty()))?;
            }
            Self::Channels { link } => {
                let count = value.parse().map_err(|error| Error::new(self, error))?;
                set_channels(host, kernel, link, count)?;
            }
            Self::Ban { irq } => {
                // The list can only be replaced, so others' entries go with ours.
                let mut banned = match irqbalance::running(host) {
                    Some(irqbalance) => irqbalance.banned_soon()?,
                    None => Irqs::new(),
                };
                match value {
                    BANNED => banned.insert(*irq),
                    _ => banned.remove(irq),
                };
                kernel.set_banned(host, &banned)?;
            }
            Self::Queue { .. } => {
                let cpus: CpuSet = value.parse().map_err(|error| Error::new(self, error))?;
                kernel.write(&self.path(host).unwrap_or_default(), &cpus.to_mask())?;
            }
            Self::Option { .. } | Self::Irq { .. } | Self::SlaveCpus { .. } => {
                kernel.write(&self.path(host).unwrap_or_default(), value)?;
            }
        }
        match self.read(host, kernel)? {
            Some(found) if found == value => Ok(()),
            found => Err(Error::new(
                self,
                format_args!(
                    "was set to {}, but has {}",
                    quoted(value),
                    found.as_deref().map_or("gone".to_string(), quoted)
                ),
            )),
        }
    }

    /// Whether an interrupt is of another device now, as when a driver was loaded anew.
    pub fn is_strangers(&self, host: &Host) -> bool {
        matches!(self, Self::Irq { link, irq } if !irq::numbers(host, link).contains(irq))
    }

    /// The file it is in, for those that are in one.
    fn path(&self, host: &Host) -> Option<PathBuf> {
        let link = host.link(self.link());
        match self {
            Self::Bond { .. }
            | Self::Address { .. }
            | Self::Up { .. }
            | Self::Master { .. }
            | Self::Channels { .. }
            | Self::Ban { .. } => None,
            Self::Option { name, .. } => Some(link.join("bonding").join(name)),
            Self::Irq { irq, .. } => Some(irq::affinity_path(host, *irq)),
            Self::Queue { file, .. } => Some(link.join("queues").join(file)),
            Self::SlaveCpus { .. } => Some(link.join("bonding_slave/cpus")),
        }
    }
}

/// Set a device's channels. Drivers then spread interrupts and queues over the CPUs anew; those that
/// are still there get back what they held, so that it is as if nothing else had been changed.
fn set_channels(host: &Host, kernel: &mut dyn Kernel, link: &str, count: u32) -> Result<()> {
    let irqs = |host: &Host| -> Vec<PathBuf> {
        irq::of_link(host, link)
            .iter()
            .map(|irq| irq::affinity_path(host, irq.number))
            .collect()
    };
    let queues = |host: &Host| -> Vec<PathBuf> {
        let queues = link::xps(host, link)
            .into_iter()
            .chain(link::rps(host, link));
        queues.map(|queue| queue.path).collect()
    };
    let held: Vec<(PathBuf, Option<String>)> = irqs(host)
        .into_iter()
        .chain(queues(host))
        .map(|path| (path.clone(), host::read_if_any(&path)))
        .collect();
    kernel.set_channels(link, count)?;
    let there: Vec<PathBuf> = irqs(host).into_iter().chain(queues(host)).collect();
    for (path, value) in held {
        if let Some(value) = value.filter(|_| there.contains(&path))
            && host::read_if_any(&path).as_ref() != Some(&value)
        {
            kernel.write(&path, &value)?;
        }
    }
    Ok(())
}

/// Where it is, for people.
impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bond { bond } => write!(f, "{bond}: bond"),
            Self::Option { bond, name } => write!(f, "{bond}: {name}"),
            Self::Address { bond, address } => write!(f, "{bond}: address {address}"),
            Self::Up { link } => write!(f, "{link}: link"),
            Self::Master { link } => write!(f, "{link}: master"),
            Self::Channels { link } => write!(f, "{link}: combined channels"),
            Self::Irq { link, irq } => write!(f, "{link}: CPUs of irq/{irq}"),
            Self::Queue { link, file } => write!(f, "{link}: {file}"),
            Self::SlaveCpus { link } => write!(f, "{link}: bonding_slave/cpus"),
            Self::Ban { irq } => write!(f, "irqbalance: leaves irq/{irq} alone"),
        }
    }
}

/// What an item is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    pub item: Item,
    pub value: String,
}

/// A value for people: nothing has to show.
pub fn quoted(value: &str) -> String {
    match value {
        NOTHING => "nothing".to_string(),
        value => format!("'{value}'"),
    }
}

/// One change of one item, for a bond.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The bond it was made for.
    pub bond: String,
    pub item: Item,
    /// What it held before we touched it.
    pub before: String,
    /// What it was last set to.
    pub after: String,
    /// What we had set it to before that, if it may still hold that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<String>,
}

/// How taking a change back went.
#[derive(Debug, PartialEq, Eq)]
pub enum Undone {
    Restored,
    /// Nothing to restore: the change was never made, or went with the bond.
    Nothing,
    /// Not as we left it, so left as it is; one line why.
    Left(String),
}

impl Change {
    /// Whether we have set the item to this value.
    pub fn is_ours(&self, value: &str) -> bool {
        self.after == value || self.earlier.iter().any(|earlier| earlier == value)
    }

    /// Take the change back. That the device is still the one that was changed is for the caller
    /// to see.
    pub fn undo(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<Undone> {
        let item = &self.item;
        let now = match item.read(host, kernel)? {
            // The file comes and goes with the bond's hold on the slave; the ban, with irqbalance.
            None if matches!(item, Item::SlaveCpus { .. } | Item::Ban { .. }) => {
                return Ok(Undone::Nothing);
            }
            None => {
                return Ok(Undone::Left(format!(
                    "{item}: no longer exists, nothing to restore"
                )));
            }
            Some(now) => now,
        };
        if now == self.before {
            return Ok(Undone::Nothing);
        }
        if item.is_strangers(host) {
            return Ok(Undone::Left(format!(
                "{item}: of another device now, left as it is"
            )));
        }
        if !self.is_ours(&now) {
            return Ok(Undone::Left(format!(
                "{item}: holds {}, neither what cpubond set ({}) nor what was there before ({}), \
                 left as it is",
                quoted(&now),
                quoted(&self.after),
                quoted(&self.before)
            )));
        }
        item.write(host, kernel, &self.before)
            .map(|()| Undone::Restored)
    }
}
