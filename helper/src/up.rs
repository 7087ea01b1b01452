//! `cpubond up`: make a bond in which every CPU has its own slave, or change nothing.

use crate::bond::{self, MapLine};
use crate::change::{self, BondOptions, Change, Format, Kernel};
use crate::config::Address;
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::irq::{self, Irq};
use crate::journal::{Journal, Lock};
use crate::link;
use crate::module;
use crate::netlink::Rtnetlink;
use crate::options::{HashPolicy, LacpRate, Mode};
use crate::shares::shares;
use crate::show;
use crate::topology;
use clap::Args;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Make a bond whose slaves' interrupts, transmit queues and CPUs belong together
#[derive(Args, Debug)]
#[command(
    long_about = "Make a bond whose slaves' interrupts, transmit queues and CPUs belong together.\n\n\
        Each slave gets a share of the online CPUs: those of its own NUMA node first, as many as \
        the other slaves have, none in two shares unless there are more slaves than CPUs. Its \
        queue interrupts go to these CPUs one by one, its transmit queues (XPS) likewise, and \
        receive packet steering (RPS) is turned off. Under mode cpu_bound, or xmit hash policy \
        cpu_bound, the kernel then sends what a CPU has to send through that CPU's slave.\n\n\
        Missing modules are loaded first, and stay loaded. What is changed is written down in \
        /run/cpubond before it is changed; \"cpubond down\" restores it. If anything fails, all of \
        it is taken back at once (exit code 5). Stop irqbalance first, or tell it to leave these \
        interrupts alone: it would move them, and the map would follow.",
    after_long_help = "Examples:\n  \
        Four NICs as one, to a switch with a static aggregate:\n    \
          cpubond up bond0 eth0 eth1 eth2 eth3 --address 192.0.2.10/24\n  \
        The same with LACP:\n    \
          cpubond up bond0 eth0 eth1 --mode 802.3ad --lacp-rate fast --address 192.0.2.10/24\n  \
        Leave CPUs 0 and 1 to other work, take the modules from the build tree:\n    \
          cpubond up bond0 eth0 eth1 --cpus 2-7 --module-dir module\n  \
        For comparison, the same interrupts under round robin:\n    \
          cpubond up bond0 eth0 eth1 --mode balance-rr"
)]
pub struct Up {
    /// The bond to create
    pub bond: String,
    /// The network devices to enslave
    #[arg(required = true, value_name = "SLAVE")]
    pub slaves: Vec<String>,
    /// Bonding mode
    #[arg(long, value_enum, default_value_t = Mode::CpuBound)]
    pub mode: Mode,
    /// Address of the bond, with its prefix length; may be repeated
    #[arg(long = "address", value_name = "ADDRESS/LEN")]
    pub addresses: Vec<Address>,
    /// CPUs to share out, as a cpulist such as 0-3,8 [default: all online CPUs]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuSet>,
    /// Also write each slave's share to its bonding_slave/cpus, so that CPUs of the share without
    /// an interrupt of their own use the slave too; the map then no longer follows interrupts
    #[arg(long)]
    pub set_cpus: bool,
    /// Milliseconds between link checks
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub miimon: u32,
    /// How often the LACP partner is asked to report (802.3ad)
    #[arg(long, value_enum, value_name = "RATE")]
    pub lacp_rate: Option<LacpRate>,
    /// How 802.3ad and balance-xor pick a slave [default: cpu_bound]
    #[arg(long, value_enum, value_name = "POLICY")]
    pub xmit_hash_policy: Option<HashPolicy>,
    /// Load bonding.ko and bond_cpu_bound.ko from this directory rather than by modprobe
    #[arg(long, value_name = "DIR")]
    pub module_dir: Option<PathBuf>,
    /// Seconds to wait for carrier, and for the kernel's map to show what was set up
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    pub wait: u16,
}

impl Up {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        self.check_usage()?;
        check_privilege(&host)?;
        let _lock = Lock::take(&host)?;
        let mut kernel = Rtnetlink::open()?;
        self.check_machine(&host, &mut kernel)?;
        module::check(&host, self.needs_policy())?;

        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .map_err(|error| Error::new("signal handler", error))?;
        }
        let loaded = module::load(&host, self.module_dir.as_deref(), self.needs_policy())?;
        match self.bring_up(
            &host,
            &mut kernel,
            &|| match interrupted.load(Ordering::Relaxed) {
                true => Err(Error::new(&self.bond, "interrupted")),
                false => Ok(()),
            },
        ) {
            Ok(()) => {
                self.report(&host);
                Ok(())
            }
            Err(error) => {
                loaded.unload();
                Err(error)
            }
        }
    }

    /// Whether the bond asks the module which slave to send through.
    fn needs_policy(&self) -> bool {
        self.mode == Mode::CpuBound || self.hash_policy() == Some(HashPolicy::CpuBound)
    }

    fn hash_policy(&self) -> Option<HashPolicy> {
        match self.mode {
            Mode::Lacp | Mode::BalanceXor => {
                Some(self.xmit_hash_policy.unwrap_or(HashPolicy::CpuBound))
            }
            _ => self.xmit_hash_policy,
        }
    }

    fn options(&self) -> BondOptions {
        BondOptions {
            mode: self.mode as u8,
            xmit_hash_policy: self.hash_policy().map(|policy| policy as u8),
            lacp_rate: self.lacp_rate.map(|rate| rate as u8),
            miimon: self.miimon,
        }
    }

    /// What can be told from the command line alone.
    fn check_usage(&self) -> Result<()> {
        let usage = |place: &str, found: &str, fix: &str| {
            Err(Error::new(place, found).fix(fix).exit(Exit::Usage))
        };
        for name in self.slaves.iter().chain([&self.bond]) {
            if !link::is_device_name(name) {
                return usage(
                    name,
                    "no name of a network device",
                    "use 1 to 15 characters without spaces, '/' and ':'",
                );
            }
        }
        for (index, slave) in self.slaves.iter().enumerate() {
            if *slave == self.bond {
                return usage(
                    slave,
                    "named as bond and as slave",
                    "the bond is new and needs a name of its own",
                );
            }
            if self.slaves[..index].contains(slave) {
                return usage(slave, "named twice", "name each slave once");
            }
        }
        for (index, address) in self.addresses.iter().enumerate() {
            if self.addresses[..index].contains(address) {
                return usage(
                    &address.to_string(),
                    "named twice",
                    "name each address once",
                );
            }
        }
        if self.lacp_rate.is_some() && self.mode != Mode::Lacp {
            return usage("--lacp-rate", "only 802.3ad has LACP", "add --mode 802.3ad");
        }
        if self
            .xmit_hash_policy
            .is_some_and(|policy| !self.mode.uses(policy))
        {
            return usage(
                "--xmit-hash-policy",
                "this mode does not use this policy",
                "add --mode 802.3ad or --mode balance-xor",
            );
        }
        if self.miimon == 0 {
            return usage(
                "--miimon",
                "0 turns link checks off, and dead slaves would be sent through",
                "use 100",
            );
        }
        Ok(())
    }

    /// What can be told from the machine before anything is written.
    fn check_machine(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<()> {
        let bond = &self.bond;
        if Journal::load(host, bond)?.is_some() {
            return Err(Error::new(bond, "cpubond has set it up before")
                .fix(format_args!("\"cpubond down {bond}\" takes it down")));
        }
        if link::exists(host, bond) {
            return Err(Error::new(bond, "exists already").fix(format_args!(
                "choose another name, or \"ip link del {bond}\" first"
            )));
        }
        for slave in &self.slaves {
            check_slave(host, kernel, slave)?;
        }
        self.cpus(host).map(drop)
    }

    /// The CPUs to share out.
    fn cpus(&self, host: &Host) -> Result<Vec<topology::Cpu>> {
        let mut cpus = topology::online(host)?;
        if let Some(wanted) = &self.cpus {
            let online: CpuSet = cpus.iter().map(|cpu| cpu.id).collect();
            let offline = wanted.difference(&online);
            if wanted.is_empty() || !offline.is_empty() {
                let found = match wanted.is_empty() {
                    true => "empty".to_string(),
                    false => format!("CPUs {offline} are not online"),
                };
                return Err(Error::new("--cpus", found).fix(format_args!("choose from {online}")));
            }
            cpus.retain(|cpu| wanted.contains(cpu.id));
        }
        Ok(cpus)
    }

    /// Make all changes, or take back those made.
    fn bring_up(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let mut journal = Journal::new(&self.bond);
        let Err(cause) = self.make(host, kernel, &mut journal, go_on) else {
            return Ok(());
        };
        let undoing = journal.undo(host, kernel);
        for line in &undoing.left {
            eprintln!("cpubond: {line}");
        }
        for error in &undoing.errors {
            eprintln!("cpubond: rolling back: {error}");
        }
        match (undoing.errors.len(), undoing.restored) {
            (0, 0) => Err(cause),
            (0, _) => {
                eprintln!("cpubond: {}: failed, everything was rolled back", self.bond);
                Err(cause.exit(Exit::RolledBack))
            }
            (errors, _) => {
                eprintln!(
                    "cpubond: {bond}: failed, and rolling back failed in {errors} places (see above); \
                     \"cpubond down {bond}\" tries again",
                    bond = self.bond
                );
                Err(cause.exit(Exit::RolledBack))
            }
        }
    }

    fn make(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &mut Journal,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let bond = &self.bond;
        journal.make(
            host,
            kernel,
            vec![Change::Create {
                bond: bond.clone(),
                options: self.options(),
            }],
            go_on,
        )?;
        if self.needs_policy() && bond::map(host, bond).is_none() {
            return Err(
                Error::new(bond, "made by the stock driver, without transmit policies")
                    .fix("load the patched bonding.ko")
                    .exit(Exit::Unsupported),
            );
        }

        let enslave = self.slaves.iter().flat_map(|slave| {
            [
                Change::TakeDown {
                    link: slave.clone(),
                    was_up: link::is_up(host, slave),
                },
                Change::Enslave {
                    bond: bond.clone(),
                    slave: slave.clone(),
                },
            ]
        });
        journal.make(host, kernel, enslave.collect(), go_on)?;

        // Only now: many drivers request interrupts when the device is opened, and it was opened
        // by being enslaved.
        let nodes: Vec<Option<u32>> = self
            .slaves
            .iter()
            .map(|slave| link::numa_node(host, slave))
            .collect();
        let mut bindings = Vec::new();
        let mut changes = Vec::new();
        for (slave, share) in self.slaves.iter().zip(shares(&nodes, &self.cpus(host)?)) {
            let binding = Binding::new(host, slave, share);
            changes.extend(binding.changes(host, self.needs_policy(), self.set_cpus)?);
            bindings.push(binding);
        }
        journal.make(host, kernel, changes, go_on)?;

        let finish = self
            .addresses
            .iter()
            .map(|address| Change::Address {
                bond: bond.clone(),
                address: address.0,
            })
            .chain([Change::BringUp { bond: bond.clone() }]);
        journal.make(host, kernel, finish.collect(), go_on)?;
        self.settle(host, &bindings, go_on)
    }

    /// Wait until the kernel shows what was set up. A slave without a link, one that LACP has not
    /// let in yet, or an interrupt that will move when it next fires, is worth a warning (by
    /// `report`); an interrupt that has moved, on a usable slave, and that the map does not follow
    /// is an error.
    fn settle(
        &self,
        host: &Host,
        bindings: &[Binding],
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let wait = Duration::from_secs(self.wait.into());
        let start = Instant::now();
        let mut steady = start;
        let mut expected = self.expected_map(host, bindings);
        loop {
            go_on()?;
            let now_expected = self.expected_map(host, bindings);
            if now_expected != expected {
                // The kernel looks at interrupts about once a second: give it time again.
                expected = now_expected;
                steady = Instant::now();
            }
            let waiting: Vec<&Binding> = bindings
                .iter()
                .filter(|binding| !self.may_send(host, &binding.slave))
                .collect();
            let pending = bindings.iter().any(|binding| binding.is_pending(host));
            let mismatch = self.map_mismatch(host, &expected);
            if waiting.is_empty() && !pending && mismatch.is_none() {
                return Ok(());
            }
            // Not for ever, should something keep moving interrupts.
            let patience = if mismatch.is_some() {
                steady.elapsed()
            } else {
                start.elapsed()
            };
            if patience < wait && start.elapsed() < 5 * wait {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            if let Some(line) = mismatch {
                return Err(Error::new(&self.bond, line));
            }
            for Binding { slave, .. } in waiting {
                eprintln!(
                    "cpubond: warning: {slave}: {} after {} s; its CPUs send through other slaves until it is usable",
                    match link::has_carrier(host, slave) {
                        true => "not let into the aggregate",
                        false => "no carrier",
                    },
                    self.wait
                );
            }
            return Ok(());
        }
    }

    fn may_send(&self, host: &Host, slave: &str) -> bool {
        match self.mode {
            // All but one are backups, as they should be.
            Mode::ActiveBackup => bond::has_link(host, slave),
            _ => bond::is_usable(host, slave),
        }
    }

    /// What the map must show by now.
    fn expected_map(&self, host: &Host, bindings: &[Binding]) -> Vec<Expected> {
        bindings
            .iter()
            .filter(|binding| self.needs_policy() && bond::is_usable(host, &binding.slave))
            .map(|binding| Expected {
                slave: binding.slave.clone(),
                bound: binding.bound_cpus(host, self.set_cpus),
                interrupted: binding.interrupted_cpus(host),
            })
            .collect()
    }

    /// The first CPU that the kernel's map binds otherwise.
    fn map_mismatch(&self, host: &Host, expected: &[Expected]) -> Option<String> {
        let map = bond::map(host, &self.bond).unwrap_or_default();
        for Expected {
            slave,
            bound,
            interrupted,
        } in expected
        {
            for cpu in bound.iter() {
                let line = map.iter().find(|line| line.cpu == cpu);
                if !line.is_some_and(|line| line.is_bound() && line.slaves.contains(slave)) {
                    let found = line.map_or("nothing".to_string(), |line| {
                        format!("'{} {}'", line.slaves.join(","), line.reason)
                    });
                    return Some(format!(
                        "CPU {cpu} was given to {slave}, but after {} s cpu_bound_map has {found}",
                        self.wait
                    ));
                }
            }
            let stale = map.iter().find(|line| {
                line.reason == "irq"
                    && line.slaves.contains(slave)
                    && !interrupted.contains(line.cpu)
            });
            if let Some(MapLine { cpu, .. }) = stale {
                return Some(format!(
                    "after {} s cpu_bound_map binds CPU {cpu} to {slave}, none of whose interrupts goes there",
                    self.wait
                ));
            }
        }
        None
    }

    fn report(&self, host: &Host) {
        match show::Report::new(host, std::slice::from_ref(&self.bond)) {
            Ok(report) => print!("{report}"),
            Err(error) => eprintln!("cpubond: {error}"),
        }
    }
}

/// One slave and the CPUs it is given.
struct Binding {
    slave: String,
    share: Vec<u32>,
    queue_irqs: Vec<(Irq, u32)>,
}

impl Binding {
    fn new(host: &Host, slave: &str, share: Vec<u32>) -> Self {
        let queue_irqs = irq::of_link(host, slave)
            .into_iter()
            .filter_map(|irq| {
                let cpu = cpu_of_queue(&share, irq.queue?)?;
                Some((irq, cpu))
            })
            .collect();
        Self {
            slave: slave.to_string(),
            share,
            queue_irqs,
        }
    }

    fn changes(&self, host: &Host, needs_policy: bool, set_cpus: bool) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for (irq, cpu) in &self.queue_irqs {
            changes.push(Change::Cpus {
                path: irq::affinity_path(host, irq.number),
                format: Format::List,
                before: irq::affinity(host, irq.number)?,
                after: CpuSet::from_iter([*cpu]),
            });
        }
        // A device without interrupts of its own (veth, USB) has nothing the kernel could bind
        // it by.
        if needs_policy && (set_cpus || self.queue_irqs.is_empty()) {
            let path = host.link(&self.slave).join("bonding_slave/cpus");
            changes.push(Change::Cpus {
                before: Format::List.read(&path)?,
                path,
                format: Format::List,
                after: self.share.iter().copied().collect(),
            });
        }
        let xps = link::xps(host, &self.slave);
        let masks = cpus_of_queues(&self.share, xps.len());
        for (queue, after) in xps.into_iter().zip(masks) {
            changes.push(Change::Cpus {
                path: queue.path,
                format: Format::Mask,
                before: queue.cpus,
                after,
            });
        }
        for queue in link::rps(host, &self.slave) {
            changes.push(Change::Cpus {
                path: queue.path,
                format: Format::Mask,
                before: queue.cpus,
                after: CpuSet::default(),
            });
        }
        changes.retain(
            |change| !matches!(change, Change::Cpus { before, after, .. } if before == after),
        );
        Ok(changes)
    }

    /// The CPUs that the map must show as bound to the slave by now.
    fn bound_cpus(&self, host: &Host, set_cpus: bool) -> CpuSet {
        match set_cpus || self.queue_irqs.is_empty() {
            true => self.share.iter().copied().collect(),
            false => self
                .queue_irqs
                .iter()
                .filter(|(irq, cpu)| has_moved(host, irq, *cpu))
                .map(|(_, cpu)| *cpu)
                .collect(),
        }
    }

    /// The CPUs that the slave's queue interrupts go to now, wherever they were sent, and those
    /// that they will go to when they fire next: the kernel's map is ahead of them.
    fn interrupted_cpus(&self, host: &Host) -> CpuSet {
        let now = self
            .queue_irqs
            .iter()
            .filter_map(|(irq, _)| irq::effective_affinity(host, irq.number).ok());
        let next = self
            .queue_irqs
            .iter()
            .filter_map(|(irq, _)| irq::affinity(host, irq.number).ok())
            // Of several CPUs, the one is yet to be chosen.
            .filter(|cpus| cpus.iter().nth(1).is_none());
        now.chain(next)
            .flat_map(|cpus| cpus.iter().collect::<Vec<_>>())
            .collect()
    }

    /// Without interrupt remapping, x86 moves an interrupt only when it fires.
    fn is_pending(&self, host: &Host) -> bool {
        self.queue_irqs
            .iter()
            .any(|(irq, cpu)| !has_moved(host, irq, *cpu))
    }
}

/// What the map must show of a usable slave.
#[derive(PartialEq, Eq)]
struct Expected {
    slave: String,
    /// CPUs bound to it.
    bound: CpuSet,
    /// The only CPUs that may be bound to it by interrupt.
    interrupted: CpuSet,
}

fn has_moved(host: &Host, irq: &Irq, cpu: u32) -> bool {
    irq::effective_affinity(host, irq.number).is_ok_and(|cpus| cpus == CpuSet::from_iter([cpu]))
}

fn cpu_of_queue(share: &[u32], queue: u32) -> Option<u32> {
    let index = usize::try_from(queue).ok()?.checked_rem(share.len())?;
    share.get(index).copied()
}

/// The CPUs that send on each of `count` queues: the one its interrupt is on, and, where there
/// are fewer queues than CPUs, every `count`th after it.
fn cpus_of_queues(share: &[u32], count: usize) -> Vec<CpuSet> {
    (0..count)
        .map(|queue| {
            let first = queue.checked_rem(share.len()).unwrap_or(0);
            share.iter().skip(first).step_by(count).copied().collect()
        })
        .collect()
}

fn check_slave(host: &Host, kernel: &mut dyn Kernel, slave: &str) -> Result<()> {
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

fn check_privilege(host: &Host) -> Result<()> {
    const CAP_NET_ADMIN: u64 = 12;
    let capabilities = host::read_if_any(&host.proc.join("self/status")).and_then(|status| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    match capabilities {
        Some(capabilities) if capabilities >> CAP_NET_ADMIN & 1 == 0 => Err(Error::new(
            "cpubond up",
            "no permission to change network devices",
        )
        .fix("run as root")),
        // Not knowing is no reason to refuse: the kernel will.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeKernel, cpus};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: Up,
    }

    fn up(arguments: &str) -> Up {
        let line = format!("up {arguments} --wait 0");
        Line::try_parse_from(line.split_whitespace()).unwrap().up
    }

    /// Four CPUs; two NICs with two queue pairs each, one of them up.
    fn machine() -> Fake {
        let fake = Fake::with_cpus(4);
        for (nic, first) in [("eth0", 24), ("eth1", 34)] {
            fake.nic(
                nic,
                &[
                    (first, "virtio0-config"),
                    (first + 1, "virtio0-input.0"),
                    (first + 2, "virtio0-output.0"),
                    (first + 3, "virtio0-input.1"),
                    (first + 4, "virtio0-output.1"),
                ],
            );
        }
        fake.file("sys/class/net/eth0/flags", "0x1003\n");
        fake
    }

    fn go_on() -> Result<()> {
        Ok(())
    }

    #[test]
    fn binds_interrupts_and_queues() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let up = up("bond0 eth0 eth1 --address 192.0.2.1/24");
        up.check_machine(&fake.host(), &mut kernel).unwrap();
        up.bring_up(&fake.host(), &mut kernel, &go_on).unwrap();

        let irqs = |first: u32| -> Vec<String> {
            (first..first + 5)
                .map(|irq| fake.text(&format!("proc/irq/{irq}/smp_affinity_list")))
                .collect()
        };
        // The config vector is nobody's business.
        assert_eq!(irqs(24), ["0", "0", "0", "1", "1"]);
        assert_eq!(irqs(34), ["0", "2", "2", "3", "3"]);
        assert_eq!(fake.text("sys/class/net/eth1/queues/tx-0/xps_cpus"), "4");
        assert_eq!(fake.text("sys/class/net/eth1/queues/tx-1/xps_cpus"), "8");
        assert_eq!(fake.text("sys/class/net/eth1/queues/rx-1/rps_cpus"), "0");
        assert_eq!(fake.text("sys/class/net/eth1/bonding_slave/cpus"), "");
        assert_eq!(kernel.addresses.len(), 1);
    }

    #[test]
    fn a_failure_anywhere_leaves_nothing_behind() {
        let fake = machine();
        let before = fake.snapshot();
        let up = up("bond0 eth0 eth1 --set-cpus --address 192.0.2.1/24");

        let mut kernel = FakeKernel::new(&fake);
        up.bring_up(&fake.host(), &mut kernel, &go_on).unwrap();
        let writes = kernel.writes;
        assert!(writes > 20, "only {writes} writes");
        let undoing = Journal::load(&fake.host(), "bond0")
            .unwrap()
            .unwrap()
            .undo(&fake.host(), &mut kernel);
        assert!(
            undoing.errors.is_empty() && undoing.left.is_empty(),
            "{undoing:?}"
        );
        assert_eq!(fake.snapshot(), before);

        for limit in 1..=writes {
            let mut kernel = FakeKernel {
                fail_after: Some(limit),
                ..FakeKernel::new(&fake)
            };
            let error = up.bring_up(&fake.host(), &mut kernel, &go_on).unwrap_err();
            let exit = if limit == 1 {
                Exit::Failed
            } else {
                Exit::RolledBack
            };
            assert_eq!(error.exit, exit, "write {limit}");
            assert_eq!(fake.snapshot(), before, "write {limit}");
        }
    }

    #[test]
    fn what_cannot_be_rolled_back_stays_in_the_journal() {
        let fake = machine();
        let before = fake.snapshot();
        let up = up("bond0 eth0 eth1");
        let mut kernel = FakeKernel {
            fail_after: Some(10),
            stay_broken: true,
            ..FakeKernel::new(&fake)
        };
        assert_eq!(
            up.bring_up(&fake.host(), &mut kernel, &go_on)
                .unwrap_err()
                .exit,
            Exit::RolledBack
        );

        let journal = Journal::load(&fake.host(), "bond0").unwrap().unwrap();
        let undoing = journal.undo(&fake.host(), &mut FakeKernel::new(&fake));
        assert!(undoing.errors.is_empty(), "{undoing:?}");
        assert_eq!(fake.snapshot(), before);
    }

    #[test]
    fn others_changes_are_left() {
        let fake = machine();
        let up = up("bond0 eth0 eth1");
        let mut kernel = FakeKernel::new(&fake);
        up.bring_up(&fake.host(), &mut kernel, &go_on).unwrap();
        fake.file("proc/irq/27/smp_affinity_list", "3\n");
        let undoing = Journal::load(&fake.host(), "bond0")
            .unwrap()
            .unwrap()
            .undo(&fake.host(), &mut kernel);
        assert_eq!(undoing.left.len(), 1);
        assert!(undoing.left[0].contains("irq/27") && undoing.errors.is_empty());
        assert_eq!(fake.text("proc/irq/27/smp_affinity_list"), "3");
        assert_eq!(fake.text("proc/irq/37/smp_affinity_list"), "0");
    }

    #[test]
    fn a_bond_of_somebody_else_is_left() {
        let fake = machine();
        let up = up("bond0 eth0");
        let mut kernel = FakeKernel::new(&fake);
        up.bring_up(&fake.host(), &mut kernel, &go_on).unwrap();
        fake.file("sys/class/net/bond0/ifindex", "78\n");
        let undoing = Journal::load(&fake.host(), "bond0")
            .unwrap()
            .unwrap()
            .undo(&fake.host(), &mut kernel);
        assert!(fake.path("sys/class/net/bond0").exists());
        assert!(
            undoing
                .left
                .iter()
                .any(|line| line.starts_with("bond0: not the bond")),
            "{undoing:?}"
        );
    }

    #[test]
    fn a_map_that_does_not_show_it_is_an_error() {
        let fake = machine();
        let before = fake.snapshot();
        let mut kernel = FakeKernel {
            wrong_map: true,
            ..FakeKernel::new(&fake)
        };
        let error = up("bond0 eth0 eth1")
            .bring_up(&fake.host(), &mut kernel, &go_on)
            .unwrap_err();
        assert_eq!(error.exit, Exit::RolledBack);
        assert!(
            error.to_string().contains("CPU 0 was given to eth0"),
            "{error}"
        );
        assert_eq!(fake.snapshot(), before);
    }

    /// Interrupt `irq` stays where it is whatever is asked of it.
    fn stuck(fake: &Fake, irq: u32, cpu: &str) {
        let path = format!("proc/irq/{irq}/effective_affinity_list");
        std::fs::remove_file(fake.path(&path)).unwrap();
        fake.file(&path, cpu);
    }

    #[test]
    fn an_interrupt_that_has_yet_to_move_is_no_error() {
        let fake = machine();
        // Both of a queue pair, or the other would do for the CPU.
        stuck(&fake, 35, "1");
        stuck(&fake, 36, "1");
        up("bond0 eth0 eth1")
            .bring_up(&fake.host(), &mut FakeKernel::new(&fake), &go_on)
            .unwrap();
    }

    #[test]
    fn a_map_that_lags_behind_is_an_error() {
        let fake = machine();
        // When the map is made the interrupt is on CPU 1 still, and moves after that.
        stuck(&fake, 35, "1");
        let bond_is_up = || link::is_up(&fake.host(), "bond0");
        let error = up("bond0 eth0 eth1")
            .bring_up(&fake.host(), &mut FakeKernel::new(&fake), &|| {
                if bond_is_up() {
                    fake.file("proc/irq/35/effective_affinity_list", "2");
                }
                Ok(())
            })
            .unwrap_err();
        assert!(error.to_string().contains("binds CPU 1 to eth1"), "{error}");
    }

    #[test]
    fn an_interruption_rolls_back() {
        let fake = machine();
        let before = fake.snapshot();
        let asked = std::cell::Cell::new(0);
        let error = up("bond0 eth0 eth1")
            .bring_up(&fake.host(), &mut FakeKernel::new(&fake), &|| {
                asked.set(asked.get() + 1);
                if asked.get() > 8 {
                    Err(Error::new("bond0", "interrupted"))
                } else {
                    Ok(())
                }
            })
            .unwrap_err();
        assert_eq!(error.exit, Exit::RolledBack);
        assert_eq!(fake.snapshot(), before);
    }

    #[test]
    fn a_slave_without_interrupts_is_bound_by_hand() {
        let fake = machine();
        fake.nic("veth0", &[]);
        up("bond0 eth0 veth0")
            .bring_up(&fake.host(), &mut FakeKernel::new(&fake), &go_on)
            .unwrap();
        assert_eq!(fake.text("sys/class/net/veth0/bonding_slave/cpus"), "2-3");
    }

    #[test]
    fn plain_modes_do_not_need_the_module() {
        assert!(!up("bond0 eth0 --mode balance-rr").needs_policy());
        assert!(up("bond0 eth0 --mode 802.3ad").needs_policy());
        assert!(!up("bond0 eth0 --mode 802.3ad --xmit-hash-policy layer3+4").needs_policy());
        assert_eq!(up("bond0 eth0").options().mode, 7);
        assert_eq!(
            up("bond0 eth0 --mode balance-xor")
                .options()
                .xmit_hash_policy,
            Some(6)
        );
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_read() {
        for line in [
            "bond0 eth0 eth0",
            "bond0 bond0",
            "bond0 a/b",
            "bond0 .. ",
            "a-name-of-16-char eth0",
            "bond0 eth0 --lacp-rate fast",
            "bond0 eth0 --xmit-hash-policy layer2",
            "bond0 eth0 --miimon 0",
            "bond0 eth0 --address 192.0.2.1/24 --address 192.0.2.1/24",
        ] {
            assert_eq!(
                up(line).check_usage().unwrap_err().exit,
                Exit::Usage,
                "{line}"
            );
        }
        up("bond0 eth0 --mode 802.3ad --lacp-rate fast")
            .check_usage()
            .unwrap();
    }

    #[test]
    fn busy_and_missing_slaves_are_refused() {
        let fake = machine();
        fake.nic("bridged", &[]);
        std::os::unix::fs::symlink(fake.path("br0"), fake.path("sys/class/net/bridged/master"))
            .unwrap();
        fake.nic("stacked", &[]);
        fake.file("sys/class/net/stacked/upper_vlan7", "");
        fake.nic("lo", &[]);
        fake.file("sys/class/net/lo/flags", "0x9\n");
        fake.nic("addressed", &[]);
        fake.nic("managed", &[(50, "nvme0q1")]);
        let path = fake.path("proc/irq/50/smp_affinity_list");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();

        let mut kernel = FakeKernel::new(&fake);
        kernel
            .addresses
            .push(("addressed".into(), "192.0.2.9/24".parse().unwrap()));
        for (slave, expected) in [
            ("eth9", "no such network device"),
            ("bridged", "in br0 already"),
            ("stacked", "vlan7 is built on it"),
            ("lo", "loopback"),
            ("addressed", "192.0.2.9/24"),
            ("managed", "the kernel manages this interrupt"),
        ] {
            let error = up(&format!("bond0 {slave}"))
                .check_machine(&fake.host(), &mut kernel)
                .unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = up("bond0 eth0 --cpus 2-9")
            .check_machine(&fake.host(), &mut kernel)
            .unwrap_err();
        assert!(
            error.to_string().contains("CPUs 4-9 are not online"),
            "{error}"
        );
        let error = up("eth1 eth0")
            .check_machine(&fake.host(), &mut kernel)
            .unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        assert_eq!(kernel.writes, 0);
    }

    #[test]
    fn queues_cover_the_share() {
        assert_eq!(cpus_of_queues(&[4, 5], 4), ["4", "5", "4", "5"].map(cpus));
        assert_eq!(cpus_of_queues(&[0, 1, 2, 3], 2), ["0,2", "1,3"].map(cpus));
        assert_eq!(cpus_of_queues(&[7], 1), ["7"].map(cpus));
        assert_eq!(cpu_of_queue(&[4, 5], 3), Some(5));
        assert_eq!(cpu_of_queue(&[], 3), None);
    }
}
