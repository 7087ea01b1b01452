//! Rivals: what else on a machine moves the interrupts and queues of slaves, or sends their
//! packets elsewhere. Found, named, and told with what to do about it; never changed here, but
//! for irqbalance's list of interrupts to leave alone (`irqbalance`).

pub mod irqbalance;
mod link_file;
mod manager;
mod queues;
mod tuned;

use crate::error::{Error, Result};
use crate::host::{self, Host};
use crate::irq;
use crate::link;
use clap::Args;
use irqbalance::Irqs;
use serde::Serialize;
use std::fmt;

const IRQBALANCE: &str = "irqbalance";

/// What it does to the binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Harm {
    /// Undoes it while it stands: not put up with unless asked to.
    Breaks,
    /// Undoes it now and then (at boot, at a change of profile), or makes it useless for some
    /// packets.
    Disturbs,
}

/// One rival, of one slave or of all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rival {
    /// What goes by this name: a program, or a feature of the kernel.
    pub rival: &'static str,
    pub harm: Harm,
    pub found: String,
    pub fix: String,
}

impl fmt::Display for Rival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.rival, self.found, self.fix)
    }
}

/// All rivals of these slaves, be they slaves already or about to be.
pub fn find(host: &Host, slaves: &[String]) -> Vec<Rival> {
    let mut rivals: Vec<Rival> = balancer(host, slaves).into_iter().collect();
    rivals.extend(tuned::find(host));
    for slave in slaves {
        rivals.extend(link_file::find(host, slave));
        rivals.extend(manager::find(host, slave));
        rivals.extend(queues::find(host, slave));
    }
    rivals
}

/// What to do about rivals, as the command line says.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Rivals")]
pub struct Policy {
    /// Have a running irqbalance leave the slaves' interrupts alone
    ///
    /// Its list of such interrupts is added to, read back, and restored by "cpubond down" and
    /// "undo", others' entries untouched. It is lost when irqbalance ends: "cpubond apply" tells
    /// a new one again, as cpubond.service does by itself.
    #[arg(long)]
    pub ban_irqbalance: bool,
    /// Only warn of what would break the binding
    ///
    /// Refused without this (exit code 1): an irqbalance that would move the slaves' interrupts,
    /// or that does not say whether it would. Warned of in any case: tuned, if its active profile
    /// moves interrupts or remakes queues; a systemd .link file that does ([Link] IRQAffinity=,
    /// IRQAffinityPolicy=, ReceivePacketSteeringCPUMask=, CombinedChannels=, RxChannels=,
    /// TxChannels=, NTupleFilter=); NetworkManager or systemd-networkd managing a slave; RPS, and
    /// RFS with or without aRFS, of a slave; XPS that its driver has set.
    #[arg(long)]
    pub allow_rivals: bool,
}

impl Policy {
    /// Warn of the rivals of these slaves; fails if one breaks the binding and is not allowed.
    /// With `ban`, irqbalance is about to be told.
    pub fn check(self, host: &Host, slaves: &[String], ban: bool) -> Result<()> {
        let mut rivals = find(host, slaves);
        rivals.retain(|rival| !(ban && rival.rival == IRQBALANCE));
        for rival in &rivals {
            if self.allow_rivals || rival.harm == Harm::Disturbs {
                eprintln!("cpubond: warning: {rival}");
            }
        }
        match rivals.iter().find(|rival| rival.harm == Harm::Breaks) {
            Some(rival) if !self.allow_rivals => {
                Err(Error::new(rival.rival, &rival.found).fix(&rival.fix))
            }
            _ => Ok(()),
        }
    }
}

/// The interrupts of these slaves that irqbalance must leave alone: those that serve queues.
pub fn irqs(host: &Host, slaves: &[String]) -> Irqs {
    slaves
        .iter()
        .flat_map(|slave| irq::of_link(host, slave))
        .filter(|irq| irq.queue.is_some())
        .map(|irq| irq.number)
        .collect()
}

/// irqbalance, unless it leaves the slaves' interrupts alone.
fn balancer(host: &Host, slaves: &[String]) -> Option<Rival> {
    let irqbalance = irqbalance::running(host)?;
    // Many drivers request interrupts only when the device is opened: of those of a device that
    // is down, nothing can be said.
    let unknown: Vec<&str> = slaves
        .iter()
        .filter(|slave| host.link(slave).join("device").exists() && !link::is_up(host, slave))
        .filter(|slave| irqs(host, std::slice::from_ref(slave)).is_empty())
        .map(String::as_str)
        .collect();
    let ours = irqs(host, slaves);
    let what = match irqbalance.banned() {
        _ if ours.is_empty() && unknown.is_empty() => return None,
        Err(error) => format!("runs, and whether it leaves them alone is not known: {error}"),
        Ok(banned) => {
            let free: Irqs = ours.difference(&banned).copied().collect();
            match (free.is_empty(), unknown.is_empty()) {
                (true, true) => return None,
                (false, _) => format!(
                    "runs (process {}) and moves interrupts {}",
                    irqbalance.pid,
                    irqbalance::list(&free, ",")
                ),
                (true, false) => format!(
                    "runs (process {}) and will move the interrupts that {} gets",
                    irqbalance.pid,
                    unknown.join(",")
                ),
            }
        }
    };
    Some(Rival {
        rival: IRQBALANCE,
        harm: Harm::Breaks,
        found: what,
        fix: "--ban-irqbalance (of up and apply) has it leave them alone, \"systemctl disable \
              --now irqbalance\" ends it, --allow-rivals puts up with it"
            .into(),
    })
}

/// The processes of this name, by number.
pub fn pids(host: &Host, name: &str) -> Vec<u32> {
    host::numbered(&host.proc, "")
        .into_iter()
        .filter(|pid| {
            host::read_if_any(&host.proc.join(pid.to_string()).join("comm")).as_deref()
                == Some(name)
        })
        .collect()
}

/// `KEY=VALUE` lines with their `[SECTION]`, as in files of systemd, NetworkManager and tuned;
/// comments and what is no such line are left out.
fn ini(text: &str) -> Vec<(String, String, String)> {
    let mut section = String::new();
    let mut entries = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'))
        {
            section = name.trim().to_string();
        } else if let Some((key, value)) = line.split_once('=') {
            entries.push((
                section.clone(),
                key.trim().to_string(),
                value.trim().to_string(),
            ));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::converge::Goal;
    use crate::error::Exit;
    use crate::journal::{By, Journal};
    use crate::testing::{Fake, FakeIrqbalance, FakeKernel, Moment, killed};

    /// eth0: queue interrupts 25 and 26, index 62, no RPS and no XPS.
    fn machine() -> (Fake, Vec<String>) {
        let fake = Fake::with_cpus(2);
        fake.virtio_nic("eth0", 24, 1);
        fake.file("sys/class/net/eth0/queues/rx-0/rps_cpus", "0\n");
        fake.file("sys/class/net/eth0/queues/tx-0/xps_cpus", "0\n");
        fake.file("sys/class/net/eth0/ifindex", "62\n");
        (fake, vec!["eth0".to_string()])
    }

    /// What is found, one line a rival.
    fn found(fake: &Fake, slaves: &[String]) -> Vec<String> {
        find(&fake.host(), slaves)
            .iter()
            .map(Rival::to_string)
            .collect()
    }

    #[test]
    fn a_quiet_machine_has_none() {
        let (fake, slaves) = machine();
        assert_eq!(found(&fake, &slaves), [] as [String; 0]);
    }

    #[test]
    fn irqbalance_is_one_unless_it_leaves_all_queues_alone() {
        let (fake, slaves) = machine();
        let _stub = FakeIrqbalance::start(&fake, 500, [25].into());
        let rivals = find(&fake.host(), &slaves);
        assert_eq!((rivals.len(), rivals[0].harm), (1, Harm::Breaks));
        assert!(
            rivals[0].found.contains("moves interrupts 26"),
            "{}",
            rivals[0]
        );
        let error = Policy::default()
            .check(&fake.host(), &slaves, false)
            .unwrap_err();
        assert_eq!(error.exit, Exit::Failed);
        assert!(error.to_string().contains("--ban-irqbalance"), "{error}");
        let allow = Policy {
            allow_rivals: true,
            ..Policy::default()
        };
        allow.check(&fake.host(), &slaves, false).unwrap();
        Policy::default()
            .check(&fake.host(), &slaves, true)
            .unwrap();

        // The configuration vector may move.
        running_with(&fake, [25, 26].into());
        assert_eq!(found(&fake, &slaves), [] as [String; 0]);
    }

    fn running_with(fake: &Fake, irqs: Irqs) {
        irqbalance::running(&fake.host())
            .unwrap()
            .set_banned(&irqs)
            .unwrap();
    }

    #[test]
    fn irqbalance_that_cannot_be_asked_is_one() {
        let (fake, slaves) = machine();
        fake.file("proc/17/comm", "irqbalance\n");
        let rivals = find(&fake.host(), &slaves);
        assert_eq!(rivals[0].harm, Harm::Breaks);
        assert!(rivals[0].found.contains("is not known"), "{}", rivals[0]);
        // There is nothing of a device without interrupts that it could move.
        fake.file("sys/class/net/veth0/flags", "0x1002\n");
        assert_eq!(found(&fake, &["veth0".to_string()]), [] as [String; 0]);
    }

    #[test]
    fn irqbalance_is_one_for_interrupts_yet_to_come() {
        let (fake, _) = machine();
        let _stub = FakeIrqbalance::start(&fake, 500, [].into());
        fake.nic("eth1", &[]);
        let lines = found(&fake, &["eth1".to_string()]);
        assert!(
            lines[0].contains("will move the interrupts that eth1 gets"),
            "{lines:?}"
        );
    }

    #[test]
    fn tuned_is_one_if_its_profile_moves_interrupts() {
        let (fake, slaves) = machine();
        fake.file("root/etc/tuned/active_profile", "mine\n");
        fake.file(
            "root/etc/tuned/mine/tuned.conf",
            "[main]\ninclude=theirs\n[mine]\ntype=irq\naffinity=0\n",
        );
        fake.file(
            "root/usr/lib/tuned/profiles/theirs/tuned.conf",
            "[main]\ninclude=mine\n# [net]\n[scheduler]\nisolated_cores=1\n[sysctl]\nvm.swappiness=1\n",
        );
        // It does not run.
        assert_eq!(found(&fake, &slaves), [] as [String; 0]);
        fake.file("proc/18/comm", "tuned\n");
        let lines = found(&fake, &slaves);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].contains("[scheduler] isolated_cores=1 of profile mine"),
            "{lines:?}"
        );
        assert!(
            lines[1].contains("[irq] affinity=0 of profile mine"),
            "{lines:?}"
        );
        fake.file(
            "root/etc/tuned/mine/tuned.conf",
            "[main]\ninclude=theirs\n[scheduler]\nirq_process=false\n",
        );
        assert_eq!(found(&fake, &slaves), [] as [String; 0]);
        for bad in ["", "../../mine", "absent"] {
            fake.file("root/etc/tuned/active_profile", bad);
            assert_eq!(found(&fake, &slaves), [] as [String; 0], "{bad}");
        }
    }

    #[test]
    fn link_files_are_if_they_touch_interrupts_or_queues() {
        let (fake, slaves) = machine();
        fake.file(
            "root/run/udev/data/n62",
            "I:1\nE:ID_NET_LINK_FILE=/etc/systemd/network/10-nic.link\n\
             E:ID_NET_LINK_FILE_DROPINS=/etc/systemd/network/10-nic.link.d/a.conf\n",
        );
        fake.file(
            "root/etc/systemd/network/10-nic.link",
            "[Match]\nOriginalName=*\n[Link]\nName=eth0\nIRQAffinityPolicy=spread\nNTupleFilter=no\n",
        );
        fake.file(
            "root/etc/systemd/network/10-nic.link.d/a.conf",
            "[Link]\n#RxChannels=2\nCombinedChannels=4\n[SR-IOV]\nTxChannels=1\n",
        );
        let lines = found(&fake, &slaves);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].contains("IRQAffinityPolicy=spread moves its interrupts"),
            "{lines:?}"
        );
        assert!(
            lines[1].contains("a.conf") && lines[1].contains("CombinedChannels=4"),
            "{lines:?}"
        );
    }

    #[test]
    fn managers_are_if_they_manage_a_slave() {
        let (fake, slaves) = machine();
        fake.file(
            "root/run/NetworkManager/devices/62",
            "[device]\nmanaged=false\n",
        );
        fake.file("root/run/systemd/netif/links/62", "ADMIN_STATE=unmanaged\n");
        assert_eq!(found(&fake, &slaves), [] as [String; 0]);
        fake.file(
            "root/run/NetworkManager/devices/62",
            "[device]\nconnection-uuid=1\nmanaged=true\n",
        );
        fake.file(
            "root/run/systemd/netif/links/62",
            "# This is private data. Do not parse.\nADMIN_STATE=configured\n",
        );
        let lines = found(&fake, &slaves);
        assert!(
            lines[0].starts_with("NetworkManager: manages eth0"),
            "{lines:?}"
        );
        assert!(
            lines[1].starts_with("systemd-networkd: manages eth0"),
            "{lines:?}"
        );
        assert_eq!(find(&fake.host(), &slaves)[0].harm, Harm::Disturbs);
    }

    #[test]
    fn queues_are_if_packets_take_other_ways() {
        let (fake, slaves) = machine();
        let queues = "sys/class/net/eth0/queues";
        fake.file(&format!("{queues}/rx-0/rps_cpus"), "3\n");
        fake.file(&format!("{queues}/tx-0/xps_cpus"), "2\n");
        // Flow tables need both.
        fake.file(&format!("{queues}/rx-0/rps_flow_cnt"), "4096\n");
        let lines = found(&fake, &slaves);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].contains("queue 0 of eth0 passes received packets on to CPUs 0-1"),
            "{lines:?}"
        );
        assert!(
            lines[1].starts_with("XPS: 1 transmit queues of eth0"),
            "{lines:?}"
        );
        fake.file("proc/sys/net/core/rps_sock_flow_entries", "32768\n");
        let lines = found(&fake, &slaves);
        assert!(lines[1].starts_with("RFS: "), "{lines:?}");

        // Of a slave, XPS is what cpubond set.
        std::os::unix::fs::symlink(fake.path("bond0"), fake.path("sys/class/net/eth0/master"))
            .unwrap();
        assert!(
            found(&fake, &slaves)
                .iter()
                .all(|line| !line.starts_with("XPS"))
        );
    }

    /// One bond of eth0.
    fn goal(fake: &Fake, kernel: &mut FakeKernel, journal: &Journal) -> Result<Goal> {
        let mut bond = config::Bond::named("bond0");
        bond.slaves = vec![config::Slave::named("eth0")];
        Goal::new(&fake.host(), kernel, journal, &[bond], By::Apply)
    }

    /// `ban`: have irqbalance leave its interrupts alone. Says how many changes that took.
    fn apply(fake: &Fake, kernel: &mut FakeKernel, ban: bool) -> Result<usize> {
        let host = fake.host();
        let mut journal = Journal::open(&host)?;
        let mut goal = goal(fake, kernel, &journal)?;
        let policy = Policy {
            ban_irqbalance: ban,
            ..Policy::default()
        };
        goal.mind_rivals(&host, policy)?;
        journal.begin(&host, kernel, None)?;
        let plan = goal.reach(&host, kernel, &mut journal, 0, &|| Ok(()))?;
        journal.commit(&host)?;
        Ok(plan.changes.len())
    }

    /// What "verify" finds to change; nobody says to it what to do about rivals.
    fn drift(fake: &Fake, kernel: &mut FakeKernel) -> usize {
        let journal = Journal::open(&fake.host()).unwrap();
        let goal = goal(fake, kernel, &journal).unwrap();
        let plan = goal.plan(&fake.host(), kernel, &journal).unwrap();
        plan.changes.len()
    }

    fn undo(fake: &Fake, kernel: &mut FakeKernel) {
        let undoing = Journal::open(&fake.host())
            .unwrap()
            .undo(&fake.host(), kernel, None);
        assert!(
            undoing.errors.is_empty() && undoing.left.is_empty(),
            "{undoing:?}"
        );
    }

    #[test]
    fn a_ban_is_told_told_again_and_lifted() {
        let (fake, _) = machine();
        let mut kernel = FakeKernel::new(&fake);
        let stub = FakeIrqbalance::start(&fake, 500, [7].into());
        let error = apply(&fake, &mut kernel, false).unwrap_err();
        assert!(
            error.to_string().contains("moves interrupts 25,26"),
            "{error}"
        );
        assert_eq!(kernel.writes, 0);
        apply(&fake, &mut kernel, true).unwrap();
        assert_eq!(stub.banned(), [7, 25, 26].into());
        assert_eq!(apply(&fake, &mut kernel, true).unwrap(), 0);

        // A new one has forgotten. That it was told is remembered.
        stub.forget([7, 8].into());
        assert_eq!(drift(&fake, &mut kernel), 2);
        assert_eq!(apply(&fake, &mut kernel, false).unwrap(), 2);
        assert_eq!(stub.banned(), [7, 8, 25, 26].into());

        // Others add to the list and take from it.
        stub.forget([8, 25, 40].into());
        undo(&fake, &mut kernel);
        assert_eq!(stub.banned(), [8, 40].into());
    }

    #[test]
    fn interrupts_that_change_their_numbers_change_the_ban() {
        let (fake, _) = machine();
        let mut kernel = FakeKernel::new(&fake);
        let stub = FakeIrqbalance::start(&fake, 500, [7].into());
        apply(&fake, &mut kernel, true).unwrap();
        // The NIC's device is that of the virtio device's parent.
        let virtio = std::fs::canonicalize(fake.path("sys/class/net/eth0/device")).unwrap();
        let msi = virtio.parent().unwrap().join("msi_irqs");
        std::fs::rename(msi.join("26"), msi.join("36")).unwrap();
        fake.file("sys/kernel/irq/36/actions", "virtio0-output.0\n");
        fake.file("proc/irq/36/smp_affinity_list", "1\n");
        fake.file("proc/irq/36/effective_affinity_list", "1\n");
        apply(&fake, &mut kernel, false).unwrap();
        assert_eq!(stub.banned(), [7, 25, 36].into());
    }

    #[test]
    fn killed_at_any_write_undo_lifts_our_bans_only() {
        for moment in [Moment::Before, Moment::After] {
            let mut write = 0;
            loop {
                write += 1;
                let (fake, _) = machine();
                // 25 is somebody's already.
                let stub = FakeIrqbalance::start(&fake, 500, [7, 25].into());
                let mut doomed = FakeKernel {
                    kill_at: Some((write, moment)),
                    ..FakeKernel::new(&fake)
                };
                if !killed(|| drop(apply(&fake, &mut doomed, true))) {
                    break;
                }
                undo(&fake, &mut FakeKernel::new(&fake));
                assert_eq!(stub.banned(), [7, 25].into(), "{moment:?} write {write}");
            }
            assert!(write > 5, "only {write} writes");
        }
    }

    #[test]
    fn without_irqbalance_there_is_nothing_to_tell_nor_to_undo() {
        let (fake, _) = machine();
        let mut kernel = FakeKernel::new(&fake);
        apply(&fake, &mut kernel, true).unwrap();
        undo(&fake, &mut kernel);

        let stub = FakeIrqbalance::start(&fake, 500, [].into());
        apply(&fake, &mut kernel, true).unwrap();
        drop(stub);
        std::fs::remove_file(fake.path("proc/17/comm")).unwrap();
        undo(&fake, &mut kernel);
    }
}
