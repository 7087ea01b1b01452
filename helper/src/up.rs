//! `cpubond up`: make a bond in which every CPU has its own slave, or change nothing.

use crate::change::Kernel;
use crate::check::check_privilege;
use crate::config::{self, Address};
use crate::converge::{self, Goal};
use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::journal::{By, Journal, Lock};
use crate::link;
use crate::module;
use crate::netlink::Rtnetlink;
use crate::options::{Follow, HashPolicy, LacpRate, Mode};
use crate::rivals;
use crate::show;
use crate::signals;
use clap::Args;
use std::path::PathBuf;

/// Make a bond whose slaves' interrupts, transmit queues and CPUs belong together
#[derive(Args, Debug)]
#[command(
    long_about = "Make a bond whose slaves' interrupts, transmit queues and CPUs belong together.\n\n\
        Each slave gets a share of the online CPUs: those of its own NUMA node first, as many \
        cores as the other slaves have, both threads of each, none in two shares unless there are \
        more slaves than CPUs. Its \
        queue interrupts go to these CPUs one by one, its transmit queues (XPS) likewise, and \
        receive packet steering (RPS) is turned off. Under mode cpu_bound, or xmit hash policy \
        cpu_bound, the kernel then sends what a CPU has to send through that CPU's slave.\n\n\
        Missing modules are loaded first, and stay loaded. What is changed is written down in \
        /run/cpubond before it is changed; \"cpubond down\" restores it. If anything fails, all of \
        it is taken back at once (exit code 5).\n\n\
        What else moves interrupts or takes packets to other CPUs is named, with what to do about \
        it. It is refused while irqbalance runs and would move these interrupts: --ban-irqbalance \
        has it leave them alone.",
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
    /// Whose slave a packet takes: that of the CPU that transmits, or of the CPU that last received
    /// for its socket [default: cpu]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub follow: Option<Follow>,
    /// Load bonding.ko and bond_cpu_bound.ko from this directory rather than by modprobe
    #[arg(long, value_name = "DIR")]
    pub module_dir: Option<PathBuf>,
    /// Seconds to wait for carrier, and for the kernel's map to show what was set up
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    pub wait: u16,
    #[command(flatten)]
    pub rivals: rivals::Policy,
}

impl Up {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        let bond = self.bond()?;
        check_privilege(&host, "cpubond up")?;
        let _lock = Lock::take(&host)?;
        let mut kernel = Rtnetlink::open()?;
        let mut journal = Journal::open(&host)?;
        let goal = self.goal(&host, &mut kernel, &journal, bond)?;
        module::check(&host, goal.needs_policy())?;

        let go_on = signals::go_on()?;
        let loaded = module::load(&host, self.module_dir.as_deref(), goal.needs_policy())?;
        match self.bring_up(&host, &mut kernel, &mut journal, &goal, &go_on) {
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

    /// The bond that the command line describes, if it makes sense.
    fn bond(&self) -> Result<config::Bond> {
        let bond = config::Bond {
            mode: self.mode,
            xmit_hash_policy: self.xmit_hash_policy,
            lacp_rate: self.lacp_rate,
            miimon: self.miimon,
            follow: self.follow,
            addresses: self.addresses.clone(),
            cpus: self.cpus.clone(),
            slaves: self
                .slaves
                .iter()
                .map(|slave| config::Slave::named(slave).set_cpus(self.set_cpus))
                .collect(),
            ..config::Bond::named(&self.bond)
        };
        match bond.check() {
            Ok(()) => Ok(bond),
            Err(nonsense) => Err(nonsense.of_command("cpubond up")),
        }
    }

    /// What can be told from the machine before anything is written.
    fn goal(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &Journal,
        bond: config::Bond,
    ) -> Result<Goal> {
        let name = &self.bond;
        journal.refuse_if_unconfirmed()?;
        if journal.bonds.contains_key(name) {
            return Err(Error::new(name, "cpubond has set it up before")
                .fix(format_args!("\"cpubond down {name}\" takes it down")));
        }
        if link::exists(host, name) {
            return Err(Error::new(name, "exists already").fix(format_args!(
                "choose another name, or \"ip link del {name}\" first"
            )));
        }
        let mut goal = Goal::new(host, kernel, journal, &[bond], By::Up)?;
        goal.mind_rivals(host, self.rivals)?;
        Ok(goal)
    }

    /// Make all changes, or take back those made.
    fn bring_up(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &mut Journal,
        goal: &Goal,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        journal.begin(host, kernel, None)?;
        match goal.reach(host, kernel, journal, self.wait, go_on) {
            Ok(_) => journal.commit(host),
            Err(cause) => Err(converge::roll_back(host, kernel, journal, cause)),
        }
    }

    fn report(&self, host: &Host) {
        match show::Report::new(host, std::slice::from_ref(&self.bond)) {
            Ok(report) => print!("{report}"),
            Err(error) => eprintln!("cpubond: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Exit;
    use crate::journal::Undoing;
    use crate::testing::{Fake, FakeKernel};
    use clap::Parser;
    use std::os::unix::fs::PermissionsExt;

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
            fake.virtio_nic(nic, first, 2);
        }
        fake.file("sys/class/net/eth0/flags", "0x1003\n");
        fake
    }

    fn go_on() -> Result<()> {
        Ok(())
    }

    /// All that `run` does to the machine.
    fn make(
        up: &Up,
        fake: &Fake,
        kernel: &mut FakeKernel,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let host = fake.host();
        let mut journal = Journal::open(&host)?;
        let goal = up.goal(&host, kernel, &journal, up.bond()?)?;
        up.bring_up(&host, kernel, &mut journal, &goal, go_on)
    }

    fn undo(fake: &Fake, kernel: &mut FakeKernel) -> Undoing {
        let mut journal = Journal::open(&fake.host()).unwrap();
        journal.undo(&fake.host(), kernel, Some("bond0"))
    }

    #[test]
    fn binds_interrupts_and_queues() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let up = up("bond0 eth0 eth1 --address 192.0.2.1/24");
        make(&up, &fake, &mut kernel, &go_on).unwrap();

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
        make(&up, &fake, &mut kernel, &go_on).unwrap();
        let writes = kernel.writes;
        assert!(writes > 20, "only {writes} writes");
        let undoing = undo(&fake, &mut kernel);
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
            let error = make(&up, &fake, &mut kernel, &go_on).unwrap_err();
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
            make(&up, &fake, &mut kernel, &go_on).unwrap_err().exit,
            Exit::RolledBack
        );

        let undoing = undo(&fake, &mut FakeKernel::new(&fake));
        assert!(undoing.errors.is_empty(), "{undoing:?}");
        assert_eq!(fake.snapshot(), before);
    }

    #[test]
    fn others_changes_are_left() {
        let fake = machine();
        let up = up("bond0 eth0 eth1");
        let mut kernel = FakeKernel::new(&fake);
        make(&up, &fake, &mut kernel, &go_on).unwrap();
        fake.file("proc/irq/27/smp_affinity_list", "3\n");
        let undoing = undo(&fake, &mut kernel);
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
        make(&up, &fake, &mut kernel, &go_on).unwrap();
        fake.file("sys/class/net/bond0/ifindex", "78\n");
        let undoing = undo(&fake, &mut kernel);
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
        let error = make(&up("bond0 eth0 eth1"), &fake, &mut kernel, &go_on).unwrap_err();
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
        make(
            &up("bond0 eth0 eth1"),
            &fake,
            &mut FakeKernel::new(&fake),
            &go_on,
        )
        .unwrap();
    }

    #[test]
    fn a_map_that_lags_behind_is_an_error() {
        let fake = machine();
        // When the map is made the interrupt is on CPU 1 still, and moves after that.
        stuck(&fake, 35, "1");
        let bond_is_up = || link::is_up(&fake.host(), "bond0");
        let error = make(
            &up("bond0 eth0 eth1"),
            &fake,
            &mut FakeKernel::new(&fake),
            &|| {
                if bond_is_up() {
                    fake.file("proc/irq/35/effective_affinity_list", "2");
                }
                Ok(())
            },
        )
        .unwrap_err();
        assert!(error.to_string().contains("binds CPU 1 to eth1"), "{error}");
    }

    #[test]
    fn an_interruption_rolls_back() {
        let fake = machine();
        let before = fake.snapshot();
        let asked = std::cell::Cell::new(0);
        let error = make(
            &up("bond0 eth0 eth1"),
            &fake,
            &mut FakeKernel::new(&fake),
            &|| {
                asked.set(asked.get() + 1);
                if asked.get() > 8 {
                    Err(Error::new("bond0", "interrupted"))
                } else {
                    Ok(())
                }
            },
        )
        .unwrap_err();
        assert_eq!(error.exit, Exit::RolledBack);
        assert_eq!(fake.snapshot(), before);
    }

    #[test]
    fn a_slave_without_interrupts_is_bound_by_hand() {
        let fake = machine();
        fake.nic("veth0", &[]);
        make(
            &up("bond0 eth0 veth0"),
            &fake,
            &mut FakeKernel::new(&fake),
            &go_on,
        )
        .unwrap();
        assert_eq!(fake.text("sys/class/net/veth0/bonding_slave/cpus"), "2-3");
    }

    #[test]
    fn plain_modes_do_not_need_the_module() {
        let bond = |line: &str| up(line).bond().unwrap();
        assert!(!bond("bond0 eth0 --mode balance-rr").needs_policy());
        assert!(bond("bond0 eth0 --mode 802.3ad").needs_policy());
        assert!(!bond("bond0 eth0 --mode 802.3ad --xmit-hash-policy layer3+4").needs_policy());
        assert_eq!(bond("bond0 eth0").mode, Mode::CpuBound);
        let xor = bond("bond0 eth0 --mode balance-xor");
        assert_eq!(xor.hash_policy(), Some(HashPolicy::CpuBound));
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
            assert_eq!(up(line).bond().unwrap_err().exit, Exit::Usage, "{line}");
        }
        up("bond0 eth0 --mode 802.3ad --lacp-rate fast")
            .bond()
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
            let error =
                make(&up(&format!("bond0 {slave}")), &fake, &mut kernel, &go_on).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = make(&up("bond0 eth0 --cpus 2-9"), &fake, &mut kernel, &go_on).unwrap_err();
        assert!(
            error.to_string().contains("CPUs 4-9 are not online"),
            "{error}"
        );
        let error = make(&up("eth1 eth0"), &fake, &mut kernel, &go_on).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        assert_eq!(kernel.writes, 0);
    }
}
