//! Changes to the machine, each declared with its undoing, so that a journal of them is enough
//! to take them back: at once when a later one fails, or in another process by `cpubond down`.
//!
//! Undoing looks at the state it finds, not at how far the doing came. A change that was never
//! made needs nothing undone, and what somebody else has changed since is not ours to touch.

use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::{self, Host};
use crate::link::{self, Mac};
use crate::netlink::Rtnetlink;
use ipnet::IpNet;
use netlink_packet_route::link::{BondLacpRate, BondMode, BondXmitHashPolicy, InfoBond};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Everything that writes, so that tests can count writes and make one fail, and what only
/// rtnetlink tells.
pub trait Kernel {
    fn create_bond(&mut self, bond: &str, options: &BondOptions) -> Result<()>;
    fn delete(&mut self, link: &str) -> Result<()>;
    fn set_up(&mut self, link: &str, up: bool) -> Result<()>;
    fn set_master(&mut self, link: &str, master: Option<&str>) -> Result<()>;
    fn add_address(&mut self, link: &str, address: IpNet) -> Result<()>;
    fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>>;
    /// The address the device was made with, whatever it has now; `None` if it was not made with
    /// one, as software devices are not.
    fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>>;
    fn write(&mut self, path: &Path, value: &str) -> Result<()>;
}

/// What a bond is created with; numbers are the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BondOptions {
    pub mode: u8,
    pub xmit_hash_policy: Option<u8>,
    pub lacp_rate: Option<u8>,
    pub miimon: u32,
}

impl Kernel for Rtnetlink {
    fn create_bond(&mut self, bond: &str, options: &BondOptions) -> Result<()> {
        // The order matters: the kernel checks the policy and the rate against the mode.
        let mut list = vec![
            InfoBond::Mode(BondMode::from(options.mode)),
            InfoBond::MiiMon(options.miimon),
        ];
        list.extend(
            options
                .xmit_hash_policy
                .map(|policy| InfoBond::XmitHashPolicy(BondXmitHashPolicy::from(policy))),
        );
        list.extend(
            options
                .lacp_rate
                .map(|rate| InfoBond::AdLacpRate(BondLacpRate::from(rate))),
        );
        self.create_bond(bond, list)
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

    fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>> {
        self.addresses(link)
    }

    fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>> {
        self.permanent_mac(link)
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
            match error.raw_os_error() {
                // EPERM since 6.13, even for root.
                Some(EIO | EPERM) if is_irq => kernel_managed(path),
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    Create {
        bond: String,
        options: BondOptions,
    },
    /// A device must be down to be enslaved; undone only if it was up.
    TakeDown {
        link: String,
        was_up: bool,
    },
    Enslave {
        bond: String,
        slave: String,
    },
    /// A file that holds a set of CPUs.
    Cpus {
        path: PathBuf,
        format: Format,
        before: CpuSet,
        after: CpuSet,
    },
    /// Goes with the bond.
    Address {
        bond: String,
        address: IpNet,
    },
    /// Goes with the bond.
    BringUp {
        bond: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    List,
    Mask,
}

impl Format {
    fn parse(self, text: &str) -> std::result::Result<CpuSet, String> {
        match self {
            Self::List => text.parse(),
            Self::Mask => CpuSet::from_mask(text),
        }
    }

    fn print(self, cpus: &CpuSet) -> String {
        match self {
            Self::List => cpus.to_string(),
            Self::Mask => cpus.to_mask(),
        }
    }

    pub fn read(self, path: &Path) -> Result<CpuSet> {
        self.parse(&host::read(path)?)
            .map_err(|error| Error::new(path.display(), error))
    }
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
    /// Make the change and read it back.
    pub fn apply(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<()> {
        match self {
            Self::Create { bond, options } => {
                kernel.create_bond(bond, options)?;
                check(
                    link::exists(host, bond),
                    bond,
                    "was created but is not in sysfs",
                )
            }
            Self::TakeDown { link, .. } => {
                kernel.set_up(link, false)?;
                check(!link::is_up(host, link), link, "was taken down but is up")
            }
            Self::Enslave { bond, slave } => {
                kernel.set_master(slave, Some(bond))?;
                let master = link::master(host, slave);
                check(
                    master.as_ref() == Some(bond),
                    slave,
                    "was enslaved but is in no bond",
                )
            }
            Self::Cpus {
                path,
                format,
                after,
                ..
            } => write_cpus(kernel, path, *format, after),
            Self::Address { bond, address } => {
                kernel.add_address(bond, *address)?;
                check(
                    kernel.addresses(bond)?.contains(address),
                    bond,
                    "was given an address it does not have",
                )
            }
            Self::BringUp { bond } => {
                kernel.set_up(bond, true)?;
                check(link::is_up(host, bond), bond, "was brought up but is down")
            }
        }
    }

    /// Take the change back. `ours` is the index of the bond we created, if we got that far.
    pub fn undo(&self, host: &Host, kernel: &mut dyn Kernel, ours: Option<u32>) -> Result<Undone> {
        match self {
            Self::Create { bond, .. } => match link::index(host, bond) {
                None => Ok(Undone::Nothing),
                index if index == ours => kernel.delete(bond).map(|()| Undone::Restored),
                Some(_) => Ok(Undone::Left(format!(
                    "{bond}: not the bond that cpubond created; \"ip link del {bond}\" deletes it"
                ))),
            },
            Self::TakeDown { was_up: false, .. } => Ok(Undone::Nothing),
            Self::TakeDown { link, .. } => match link::master(host, link) {
                _ if !link::exists(host, link) => Ok(gone(link)),
                Some(master) => Ok(Undone::Left(format!(
                    "{link}: is in {master} now, left as it is"
                ))),
                None if link::is_up(host, link) => Ok(Undone::Nothing),
                None => kernel.set_up(link, true).map(|()| Undone::Restored),
            },
            Self::Enslave { bond, slave } => match link::master(host, slave) {
                _ if !link::exists(host, slave) => Ok(gone(slave)),
                Some(master) if master == *bond && link::index(host, bond) == ours => {
                    kernel.set_master(slave, None).map(|()| Undone::Restored)
                }
                // A later line says so if it was up before.
                _ => Ok(Undone::Nothing),
            },
            Self::Cpus {
                path,
                format,
                before,
                after,
            } => {
                if !path.exists() {
                    return Ok(gone(&path.display().to_string()));
                }
                let now = format.read(path)?;
                if now == *before {
                    Ok(Undone::Nothing)
                } else if now == *after {
                    write_cpus(kernel, path, *format, before).map(|()| Undone::Restored)
                } else {
                    Ok(Undone::Left(format!(
                        "{}: holds '{now}', neither what cpubond wrote ('{after}') nor what was \
                         there before ('{before}'), left as it is",
                        path.display()
                    )))
                }
            }
            Self::Address { .. } | Self::BringUp { .. } => Ok(Undone::Nothing),
        }
    }
}

fn gone(place: &str) -> Undone {
    Undone::Left(format!("{place}: no longer exists, nothing to restore"))
}

fn write_cpus(kernel: &mut dyn Kernel, path: &Path, format: Format, cpus: &CpuSet) -> Result<()> {
    kernel.write(path, &format.print(cpus))?;
    let found = format.read(path)?;
    check(
        found == *cpus,
        path.display(),
        format_args!("was written '{cpus}' but reads back '{found}'"),
    )
}

fn check(
    holds: bool,
    place: impl std::fmt::Display,
    otherwise: impl std::fmt::Display,
) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::new(place, otherwise)),
    }
}
