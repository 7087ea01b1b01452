//! A made-up machine in a temporary directory, and a kernel that works on it.

use crate::change::Kernel;
use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::ethtool::Channels;
use crate::host::{self, Host};
use crate::link::Mac;
use crate::rivals::irqbalance;
use crate::{irq, link};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use tempfile::TempDir;

pub struct Fake {
    root: TempDir,
}

impl Fake {
    pub fn new() -> Self {
        // In memory where there is such a place: journals are synced to disk at every write.
        let root = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new());
        let fake = Self {
            root: root.unwrap(),
        };
        fs::create_dir_all(fake.path("sys/class/net")).unwrap();
        fs::create_dir_all(fake.path("proc")).unwrap();
        fs::create_dir_all(fake.path("sys/bus/pci")).unwrap();
        fake.file("proc/sys/kernel/random/boot_id", "this\n");
        fake.file("proc/self/ns/net", "");
        fake
    }

    /// `count` CPUs without NUMA, SMT or shared caches.
    pub fn with_cpus(count: u32) -> Self {
        let fake = Self::new();
        for cpu in 0..count {
            fake.cpu(cpu, None, &cpu.to_string());
        }
        fake.file(
            "sys/devices/system/cpu/online",
            &format!("0-{}\n", count - 1),
        );
        fake
    }

    pub fn host(&self) -> Host {
        Host {
            sys: self.path("sys"),
            proc: self.path("proc"),
            run: self.path("run"),
            root: self.path("root"),
        }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    pub fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn text(&self, path: &str) -> String {
        fs::read_to_string(self.path(path))
            .unwrap()
            .trim()
            .to_string()
    }

    pub fn cpu(&self, cpu: u32, node: Option<u32>, core: &str) {
        let dir = format!("sys/devices/system/cpu/cpu{cpu}");
        self.file(&format!("{dir}/topology/thread_siblings_list"), core);
        if let Some(node) = node {
            self.file(&format!("{dir}/node{node}/cpulist"), "");
        }
    }

    /// One like the lab's: an interrupt for its configuration, then two for each queue pair.
    pub fn virtio_nic(&self, name: &str, first: u32, pairs: u32) {
        let mut actions = vec!["virtio0-config".to_string()];
        for pair in 0..pairs {
            actions.extend(["input", "output"].map(|way| format!("virtio0-{way}.{pair}")));
        }
        let irqs: Vec<(u32, &str)> = (first..).zip(actions.iter().map(String::as_str)).collect();
        self.nic(name, &irqs);
    }

    /// A virtio-net device below a PCI device with these interrupts, all on CPU 0, and as many
    /// queues as interrupts with "input" in their names.
    pub fn nic(&self, name: &str, irqs: &[(u32, &str)]) {
        let number = name.bytes().fold(0u16, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(byte.into())
        });
        let pci = format!(
            "sys/devices/pci0000:00/0000:{:02x}:{:02x}.0",
            number >> 8,
            number & 0xff
        );
        let net = format!("{pci}/virtio/net/{name}");
        self.file(&format!("{net}/flags"), "0x1002\n");
        self.file(&format!("{net}/type"), "1\n");
        self.file(&format!("{net}/carrier"), "1\n");
        self.file(&format!("{net}/ifindex"), &format!("{number}\n"));
        symlink(
            self.path(&format!("{pci}/virtio")),
            self.path(&format!("{net}/device")),
        )
        .unwrap();
        symlink(
            self.path("sys/bus/pci"),
            self.path(&format!("{pci}/subsystem")),
        )
        .unwrap();
        symlink(self.path(&net), self.path(&format!("sys/class/net/{name}"))).unwrap();
        for (number, action) in irqs {
            self.file(&format!("{pci}/msi_irqs/{number}"), "msix\n");
            self.file(
                &format!("sys/kernel/irq/{number}/actions"),
                &format!("{action}\n"),
            );
            self.file(&format!("proc/irq/{number}/smp_affinity_list"), "0\n");
            symlink(
                "smp_affinity_list",
                self.path(&format!("proc/irq/{number}/effective_affinity_list")),
            )
            .unwrap();
        }
        let queues = irqs
            .iter()
            .filter(|(_, action)| action.contains("input"))
            .count();
        for queue in 0..queues {
            self.file(&format!("{net}/queues/rx-{queue}/rps_cpus"), "3\n");
            self.file(&format!("{net}/queues/tx-{queue}/xps_cpus"), "f\n");
        }
    }

    /// All files and what they hold, for "nothing was changed".
    pub fn snapshot(&self) -> BTreeMap<PathBuf, String> {
        fn walk(dir: &Path, files: &mut BTreeMap<PathBuf, String>) {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    walk(&entry.path(), files);
                } else if kind.is_symlink() {
                    let target = fs::read_link(entry.path()).unwrap();
                    files.insert(entry.path(), target.display().to_string());
                } else {
                    let text = fs::read_to_string(entry.path()).unwrap();
                    files.insert(entry.path(), text.trim().to_string());
                }
            }
        }
        let mut files = BTreeMap::new();
        walk(self.root.path(), &mut files);
        files.retain(|path, _| {
            !path.ends_with("run/lock") && !path.ends_with("run/journal.json.new")
        });
        files
    }
}

/// Does to the made-up machine what rtnetlink does to a real one, and refuses what the bonding
/// driver refuses.
pub struct FakeKernel<'a> {
    pub fake: &'a Fake,
    /// Writes until one fails, and whether all later ones do too.
    pub fail_after: Option<usize>,
    pub stay_broken: bool,
    /// Kill the caller (see `killed`) at this write, before it is done or after.
    pub kill_at: Option<(usize, Moment)>,
    pub writes: usize,
    pub addresses: Vec<(String, IpNet)>,
    /// The map the driver shows does not follow the interrupts.
    pub wrong_map: bool,
    pub permanent: BTreeMap<String, Mac>,
    pub channels: BTreeMap<String, Channels>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Before,
    After,
}

/// Whether `act` was killed by its `FakeKernel`: nothing of it goes on, not even its error paths.
pub fn killed(act: impl FnOnce()) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).is_err_and(|cause| {
        match cause.downcast::<Killed>() {
            Ok(_) => true,
            Err(cause) => std::panic::resume_unwind(cause),
        }
    })
}

struct Killed;

impl<'a> FakeKernel<'a> {
    pub fn new(fake: &'a Fake) -> Self {
        Self {
            fake,
            fail_after: None,
            stay_broken: false,
            kill_at: None,
            writes: 0,
            addresses: Vec::new(),
            wrong_map: false,
            permanent: BTreeMap::new(),
            channels: BTreeMap::new(),
        }
    }

    /// One write: it fails, kills or is done.
    fn count(&mut self, write: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.writes += 1;
        if self.kill_at == Some((self.writes, Moment::Before)) {
            std::panic::resume_unwind(Box::new(Killed));
        }
        match self.fail_after {
            Some(limit) if self.writes == limit || (self.stay_broken && self.writes > limit) => {
                return Err(Error::new("fake", "made to fail"));
            }
            _ => {}
        }
        write(self)?;
        if self.kill_at == Some((self.writes, Moment::After)) {
            std::panic::resume_unwind(Box::new(Killed));
        }
        Ok(())
    }

    fn net(&self, link: &str, file: &str) -> PathBuf {
        self.fake.path(&format!("sys/class/net/{link}/{file}"))
    }

    fn put(&self, link: &str, file: &str, text: &str) {
        self.fake
            .file(&format!("sys/class/net/{link}/{file}"), text);
    }

    fn raise(&self, link: &str, up: bool) {
        let flags = link::flags(&self.fake.host(), link) & !1 | u32::from(up);
        self.put(link, "flags", &format!("{flags:#x}\n"));
    }

    /// A slave is closed when released.
    fn release(&self, slave: &str) {
        let host = self.fake.host();
        let bond = link::master(&host, slave).unwrap();
        let mut slaves = crate::bond::slaves(&host, &bond);
        slaves.retain(|other| other != slave);
        fs::remove_file(self.net(slave, "master")).unwrap();
        fs::remove_dir_all(self.net(slave, "bonding_slave")).unwrap();
        self.raise(slave, false);
        self.put(&bond, "bonding/slaves", &format!("{}\n", slaves.join(" ")));
    }

    fn update_map(&self, bond: &str) {
        let host = self.fake.host();
        let slaves = crate::bond::slaves(&host, bond);
        let mut map = String::new();
        let queue_cpus: BTreeMap<&String, CpuSet> = slaves
            .iter()
            .map(|slave| {
                let irqs = irq::of_link(&host, slave);
                let queues = irqs.iter().filter(|irq| irq.queue.is_some());
                let cpus = queues
                    .flat_map(|irq| {
                        let cpus = irq::effective_affinity(&host, irq.number).unwrap();
                        cpus.iter().collect::<Vec<_>>()
                    })
                    .collect();
                (slave, cpus)
            })
            .collect();
        for cpu in crate::topology::online(&host).unwrap() {
            let own = |slave: &&String| queue_cpus[*slave].contains(cpu.id);
            let by_hand = |slave: &&String| {
                crate::bond::cpus_by_hand(&host, slave).is_some_and(|cpus| cpus.contains(cpu.id))
            };
            let named = |pick: &dyn Fn(&&String) -> bool| {
                slaves
                    .iter()
                    .filter(pick)
                    .cloned()
                    .collect::<Vec<_>>()
                    .join(",")
            };
            let line = match (named(&by_hand), named(&own)) {
                _ if self.wrong_map => format!("{} {} any\n", cpu.id, slaves.join(",")),
                (set, _) if !set.is_empty() => format!("{} {set} set\n", cpu.id),
                (_, irq) if !irq.is_empty() => format!("{} {irq} irq\n", cpu.id),
                _ => format!("{} {} any\n", cpu.id, slaves.join(",")),
            };
            map.push_str(&line);
        }
        self.put(bond, "bonding/cpu_bound_map", &map);
    }
}

impl Kernel for FakeKernel<'_> {
    fn create_bond(&mut self, bond: &str, index: u32) -> Result<()> {
        self.count(|kernel| {
            assert!(!kernel.net(bond, "ifindex").exists(), "{bond} exists");
            kernel.put(bond, "ifindex", &format!("{index}\n"));
            kernel.put(bond, "flags", "0x1402\n");
            kernel.put(bond, "type", "1\n");
            for (option, value) in [
                ("mode", "balance-rr 0"),
                ("miimon", "0"),
                ("xmit_hash_policy", "layer2 0"),
                ("lacp_rate", "slow 0"),
                ("cpu_bound_follow", "cpu"),
                ("slaves", ""),
                ("cpu_bound_map", ""),
            ] {
                kernel.put(bond, &format!("bonding/{option}"), &format!("{value}\n"));
            }
            Ok(())
        })
    }

    fn delete(&mut self, link: &str) -> Result<()> {
        self.count(|kernel| {
            for slave in crate::bond::slaves(&kernel.fake.host(), link) {
                kernel.release(&slave);
            }
            fs::remove_dir_all(kernel.fake.path(&format!("sys/class/net/{link}"))).unwrap();
            kernel.addresses.retain(|(of, _)| of != link);
            Ok(())
        })
    }

    fn set_up(&mut self, link: &str, up: bool) -> Result<()> {
        self.count(|kernel| {
            kernel.raise(link, up);
            if up && kernel.net(link, "bonding").exists() {
                kernel.update_map(link);
            }
            Ok(())
        })
    }

    fn set_master(&mut self, link: &str, master: Option<&str>) -> Result<()> {
        self.count(|kernel| {
            let host = kernel.fake.host();
            let Some(bond) = master else {
                kernel.release(link);
                return Ok(());
            };
            if link::is_up(&host, link) {
                return Err(Error::new(link, "cannot be enslaved: it is up"));
            }
            if let Some(master) = link::master(&host, link) {
                return Err(Error::new(link, format_args!("is in {master}")));
            }
            let mut slaves = crate::bond::slaves(&host, bond);
            slaves.push(link.to_string());
            symlink(
                kernel.fake.path(&format!("sys/class/net/{bond}")),
                kernel.net(link, "master"),
            )
            .unwrap();
            for (file, text) in [
                ("mii_status", "up"),
                ("state", "active"),
                ("cpus", ""),
                ("cpu_bound_stats", "local 0\nremote 0"),
            ] {
                kernel.put(link, &format!("bonding_slave/{file}"), &format!("{text}\n"));
            }
            kernel.raise(link, true);
            kernel.put(bond, "bonding/slaves", &format!("{}\n", slaves.join(" ")));
            Ok(())
        })
    }

    fn add_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        self.count(|kernel| {
            kernel.addresses.push((link.to_string(), address));
            Ok(())
        })
    }

    fn delete_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        self.count(|kernel| {
            kernel
                .addresses
                .retain(|(of, there)| of != link || *there != address);
            Ok(())
        })
    }

    fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>> {
        Ok(self
            .addresses
            .iter()
            .filter(|(of, _)| of == link)
            .map(|(_, address)| *address)
            .collect())
    }

    fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>> {
        Ok(self.permanent.get(link).copied())
    }

    fn channels(&mut self, link: &str) -> Result<Option<Channels>> {
        Ok(self.channels.get(link).copied())
    }

    fn set_channels(&mut self, link: &str, combined: u32) -> Result<()> {
        self.count(|kernel| {
            let channels = kernel.channels.get_mut(link).unwrap();
            if combined > channels.combined_max {
                return Err(Error::new(link, "has not as many channels"));
            }
            channels.combined = combined;
            // As drivers do.
            for irq in irq::of_link(&kernel.fake.host(), link) {
                let path = format!("proc/irq/{}/smp_affinity_list", irq.number);
                kernel.fake.file(&path, "0-1\n");
            }
            Ok(())
        })
    }

    fn set_banned(&mut self, host: &Host, irqs: &BTreeSet<u32>) -> Result<()> {
        self.count(|_| irqbalance::running(host).unwrap().set_banned(irqs))
    }

    fn write(&mut self, path: &Path, value: &str) -> Result<()> {
        self.count(|kernel| {
            let _: String = host::read(path)?;
            let bond = path.ancestors().nth(2).and_then(|dir| dir.file_name());
            if let Some(bond) = bond.and_then(|bond| bond.to_str()) {
                let host = kernel.fake.host();
                let is_up = link::is_up(&host, bond);
                let has_slaves = !crate::bond::slaves(&host, bond).is_empty();
                let is_lacp =
                    crate::bond::option_name(&host, bond, "mode").as_deref() == Some("802.3ad");
                let refused = match path.file_name().and_then(|name| name.to_str()) {
                    Some("mode") => is_up || has_slaves,
                    Some("lacp_rate") => is_up || !is_lacp,
                    _ => false,
                };
                if refused {
                    return Err(Error::new(path.display(), "the fake driver refuses"));
                }
            }
            fs::write(path, format!("{value}\n")).unwrap();
            let moves = path.ends_with("smp_affinity_list") || path.ends_with("bonding_slave/cpus");
            for link in host::names(&kernel.fake.path("sys/class/net")) {
                if moves && kernel.net(&link, "bonding").exists() {
                    kernel.update_map(&link);
                }
            }
            Ok(())
        })
    }
}

/// An irqbalance of process 17 that answers on its socket, and forgets it all when dropped.
pub struct FakeIrqbalance {
    state: Arc<Mutex<Balancer>>,
}

#[derive(Default)]
struct Balancer {
    banned: BTreeSet<u32>,
    is_deaf: bool,
}

impl FakeIrqbalance {
    /// It reads up to `limit` bytes of a command, as the real one does.
    pub fn start(fake: &Fake, limit: usize, banned: BTreeSet<u32>) -> Self {
        fake.file("proc/17/comm", "irqbalance\n");
        fake.file("root/run/irqbalance/there", "");
        let listener = UnixListener::bind(fake.path("root/run/irqbalance/irqbalance17.sock"));
        let listener = listener.unwrap();
        let state = Arc::new(Mutex::new(Balancer {
            banned,
            is_deaf: false,
        }));
        let balancer = Arc::downgrade(&state);
        // It ends with the connection after the last one.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(state) = balancer.upgrade() else {
                    return;
                };
                let mut stream = stream.unwrap();
                let mut command = vec![0; limit];
                let length = stream.read(&mut command).unwrap();
                let command = String::from_utf8(command[..length].to_vec()).unwrap();
                state.lock().unwrap().obey(&command, &mut stream);
            }
        });
        Self { state }
    }

    pub fn banned(&self) -> BTreeSet<u32> {
        self.state.lock().unwrap().banned.clone()
    }

    /// As a new one does, or at the word of somebody else.
    pub fn forget(&self, banned: BTreeSet<u32>) {
        self.state.lock().unwrap().banned = banned;
    }

    /// From now on, ban nothing else.
    pub fn be_deaf(&self) {
        self.state.lock().unwrap().is_deaf = true;
    }
}

impl Balancer {
    fn obey(&mut self, command: &str, answer: &mut UnixStream) {
        if let Some(list) = command.strip_prefix("settings ban irqs ") {
            let irqs = list.split_whitespace().map_while(|irq| irq.parse().ok());
            if !self.is_deaf {
                self.banned = irqs.collect();
            }
        } else if command.starts_with("setup") {
            write!(answer, "SLEEP 10 ").unwrap();
            for irq in &self.banned {
                write!(answer, "IRQ {irq} LOAD 0 DIFF 0 CLASS 0 ").unwrap();
            }
            write!(answer, "BANNED 00000000").unwrap();
        }
    }
}

/// `"0-3"` as a set.
pub fn cpus(list: &str) -> CpuSet {
    list.parse().unwrap()
}
