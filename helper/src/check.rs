//! What can be told before anything is written: privilege, and slaves that are busy.

use crate::change::{self, Kernel};
use crate::error::{Error, Result};
use crate::host::{self, Host};
use crate::irq;
use crate::link;
use std::os::unix::fs::PermissionsExt;

/// Fails unless the device is there and can be enslaved without harm to anything that uses it.
pub fn check_slave(host: &Host, kernel: &mut dyn Kernel, slave: &str) -> Result<()> {
    let busy = |found: String, fix: String| Err(Error::new(slave, found).fix(fix));
    if !link::exists(host, slave) {
        return busy(
            "no such network device".into(),
            "\"ip link\" lists them".into(),
        );
    }
    if link::is_loopback(host, slave) {
        return busy(
            "the loopback device cannot be enslaved".into(),
            "name NICs".into(),
        );
    }
    if !link::is_ethernet(host, slave) {
        return busy("not an Ethernet device".into(), "name Ethernet NICs".into());
    }
    if host.link(slave).join("bonding").exists() {
        return busy(
            "a bond itself, and bonds do not nest".into(),
            "name NICs".into(),
        );
    }
    if let Some(master) = link::master(host, slave) {
        return busy(
            format!("busy: in {master} already"),
            format!("\"ip link set {slave} nomaster\" frees it"),
        );
    }
    if let Some(upper) = link::uppers(host, slave).first() {
        return busy(
            format!("busy: {upper} is built on it"),
            format!("delete {upper}, and build it on the bond"),
        );
    }
    if let Some(address) = kernel.addresses(slave)?.first() {
        return busy(
            format!("busy: it has address {address}, which would stop working"),
            format!(
                "\"ip address del {address} dev {slave}\", and give it to the bond with --address"
            ),
        );
    }
    for irq in irq::of_link(host, slave)
        .iter()
        .filter(|irq| irq.queue.is_some())
    {
        let path = irq::affinity_path(host, irq.number);
        // Since 6.13 such interrupts show by the mode of the file; before, by EIO on writing.
        let writable = path
            .metadata()
            .is_ok_and(|file| file.permissions().mode() & 0o200 != 0);
        if !writable {
            return Err(change::kernel_managed(&path));
        }
    }
    Ok(())
}

/// Fails if this process may not change network devices.
pub fn check_privilege(host: &Host, command: &str) -> Result<()> {
    const CAP_NET_ADMIN: u64 = 12;
    let capabilities = host::read_if_any(&host.proc.join("self/status")).and_then(|status| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    match capabilities {
        Some(capabilities) if capabilities >> CAP_NET_ADMIN & 1 == 0 => {
            Err(Error::new(command, "no permission to change network devices").fix("run as root"))
        }
        // Not knowing is no reason to refuse: the kernel will.
        _ => Ok(()),
    }
}
