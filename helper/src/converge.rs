//! Bring the machine to what is wanted of it: `up`, `apply`, `verify` and `--diff` are all this.
//!
//! Every step asks what an item holds and changes it only if that is not what is wanted, so doing
//! it again changes nothing; and what was changed before but is wanted no more gets back what it
//! held. Without leave to write, the same steps go over what the writes would have made of the
//! machine, and the changes they come to are the plan.

use crate::bind::{self, Binding};
use crate::bond;
use crate::change::{BANNED, Change, DOWN, Item, Kernel, NOTHING, PRESENT, UP, Want, quoted};
use crate::check::check_slave;
use crate::config::{self, Resolved};
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::journal::{self, By, Journal};
use crate::link;
use crate::options;
use crate::rivals::{self, irqbalance};
use crate::settle::Settle;

/// A bond that is wanted, and the devices that its slaves are now.
pub struct Target {
    pub bond: config::Bond,
    pub slaves: Vec<Resolved>,
}

/// All that a command wants.
pub struct Goal {
    pub targets: Vec<Target>,
    /// `Apply`: bonds that an earlier `apply` has made and that are no targets are to go.
    pub by: By,
    /// irqbalance is to leave the slaves' interrupts alone, if it runs. Of bonds for which it was
    /// told to before, it is in any case.
    pub ban: bool,
    /// A line for each slave that is not there.
    pub missing: Vec<Error>,
}

/// What it takes.
#[derive(Debug, Default)]
pub struct Plan {
    pub changes: Vec<Change>,
    /// Lines about what was changed before, is wanted no more, and is not as it was left.
    pub left: Vec<String>,
}

impl Goal {
    /// Find the devices, and see that what is wanted can be had; writes nothing.
    pub fn new(
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &Journal,
        bonds: &[config::Bond],
        by: By,
    ) -> Result<Self> {
        let mut targets: Vec<Target> = Vec::new();
        let mut missing = Vec::new();
        for bond in bonds {
            let (slaves, absent) = config::resolve(host, kernel, bond)?;
            // A server is to come up without the one NIC that has died. What somebody types is
            // meant as it is typed.
            if slaves.is_empty() || by == By::Up {
                if let Some(error) = absent.into_iter().next() {
                    return Err(error);
                }
            } else {
                missing.extend(absent);
            }
            for slave in &slaves {
                if let Some(other) = targets.iter().find(|other| other.has(&slave.link)) {
                    return Err(Error::new(
                        format_args!("{}: {}", bond.name, slave.slave.id()),
                        format_args!("is {}, which {} has too", slave.link, other.bond.name),
                    )
                    .fix("name each slave once")
                    .exit(Exit::Usage));
                }
            }
            targets.push(Target {
                bond: bond.clone(),
                slaves,
            });
        }
        let goal = Self {
            targets,
            by,
            ban: journal.in_force().iter().any(is_ban),
            missing,
        };
        for target in &goal.targets {
            goal.check(host, kernel, journal, target)?;
        }
        Ok(goal)
    }

    fn check(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &Journal,
        target: &Target,
    ) -> Result<()> {
        let name = &target.bond.name;
        if link::exists(host, name) && !journal.has_made(host, name) {
            return Err(
                Error::new(name, "exists already, and cpubond has not made it").fix(format_args!(
                    "choose another name, or \"ip link del {name}\" first"
                )),
            );
        }
        for slave in &target.slaves {
            // Ours already, or in a bond that gives it up.
            let is_had = link::master(host, &slave.link).is_some_and(|master| {
                journal.has_made(host, &master) && self.manages(journal, &master)
            });
            if !is_had {
                check_slave(host, kernel, &slave.link)?;
            }
        }
        bind::cpus_of_slaves(host, &target.bond, &target.slaves).map(drop)
    }

    /// Warn of rivals, or refuse to go on beside them, as the policy says.
    pub fn mind_rivals(&mut self, host: &Host, policy: rivals::Policy) -> Result<()> {
        let slaves: Vec<String> = self
            .targets
            .iter()
            .flat_map(|target| &target.slaves)
            .map(|slave| slave.link.clone())
            .collect();
        self.ban |= policy.ban_irqbalance;
        policy.check(host, &slaves, self.ban)
    }

    pub fn target(&self, bond: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.bond.name == bond)
    }

    fn manages(&self, journal: &Journal, bond: &str) -> bool {
        self.target(bond).is_some()
            || (self.by == By::Apply && journal.bonds.get(bond) == Some(&By::Apply))
    }

    /// Whether any of the bonds asks the module which slave to send through.
    pub fn needs_policy(&self) -> bool {
        self.targets.iter().any(|target| target.bond.needs_policy())
    }

    /// What it takes to get there; writes nothing.
    pub fn plan(&self, host: &Host, kernel: &mut dyn Kernel, journal: &Journal) -> Result<Plan> {
        let mut journal = journal.clone();
        journal.begin(host, kernel, None)?;
        let mut steps = Steps {
            host,
            kernel,
            journal: &mut journal,
            go_on: &|| Ok(()),
            made_up: Some(Vec::new()),
            plan: Plan::default(),
        };
        steps.take(self)?;
        Ok(steps.plan)
    }

    /// Get there, and wait up to `seconds` until the kernel shows it. The journal must have begun;
    /// after an error it is for the caller to roll back. `go_on` is asked before each change.
    pub fn reach(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &mut Journal,
        seconds: u16,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Plan> {
        for target in &self.targets {
            journal.bonds.insert(target.bond.name.clone(), self.by);
        }
        let mut steps = Steps {
            host,
            kernel,
            journal,
            go_on,
            made_up: None,
            plan: Plan::default(),
        };
        let bindings = steps.take(self)?;
        let plan = steps.plan;
        for (target, bindings) in self.targets.iter().zip(&bindings) {
            let bond = &target.bond;
            if plan.changes.iter().any(|change| change.bond == bond.name) {
                let settle = Settle {
                    bond,
                    bindings,
                    seconds,
                };
                for waiting in settle.wait(host, go_on)? {
                    eprintln!("cpubond: warning: {waiting}");
                }
            }
        }
        Ok(plan)
    }
}

impl Target {
    pub fn has(&self, link: &str) -> bool {
        self.slaves.iter().any(|slave| slave.link == link)
    }

    /// What its slaves are to be given, as the machine is now.
    pub fn bindings(&self, host: &Host) -> Result<Vec<Binding>> {
        let shares = bind::cpus_of_slaves(host, &self.bond, &self.slaves)?;
        let needs_policy = self.bond.needs_policy();
        Ok(self
            .slaves
            .iter()
            .zip(shares)
            .map(|(slave, share)| {
                Binding::new(host, &slave.link, share, needs_policy, slave.slave.set_cpus)
            })
            .collect())
    }

    fn option(&self, name: &str) -> Item {
        Item::Option {
            bond: self.bond.name.clone(),
            name: name.to_string(),
        }
    }

    /// In the order in which the driver takes them: which it knows depends on the mode.
    fn options(&self) -> Vec<Want> {
        let bond = &self.bond;
        let want = |name: &str, value: String| Want {
            item: self.option(name),
            value,
        };
        let mut wants = vec![
            want("mode", options::name(bond.mode)),
            want("miimon", bond.miimon.to_string()),
        ];
        if let Some(policy) = bond.hash_policy() {
            wants.push(want("xmit_hash_policy", options::name(policy)));
        }
        if let Some(rate) = bond.lacp_rate {
            wants.push(want("lacp_rate", options::name(rate)));
        }
        if let Some(follow) = bond.follow {
            wants.push(want("cpu_bound_follow", options::name(follow)));
        }
        wants
    }
}

/// What the driver gives a new bond, unless its module parameters say otherwise.
const NEW_BOND: [(&str, &str); 5] = [
    ("mode", "balance-rr"),
    ("miimon", "0"),
    ("xmit_hash_policy", "layer2"),
    ("lacp_rate", "slow"),
    ("cpu_bound_follow", "cpu"),
];

/// The steps towards a goal, taken or only thought through.
struct Steps<'a> {
    host: &'a Host,
    kernel: &'a mut dyn Kernel,
    journal: &'a mut Journal,
    go_on: &'a dyn Fn() -> Result<()>,
    /// What items would hold, the newest last; `None`: changes are made.
    made_up: Option<Vec<(Item, String)>>,
    plan: Plan,
}

impl Steps<'_> {
    /// All steps; gives back the bindings of each target.
    fn take(&mut self, goal: &Goal) -> Result<Vec<Vec<Binding>>> {
        // First what is wanted no more: a slave may go from one bond to another.
        let bonds: Vec<String> = self.journal.bonds.keys().cloned().collect();
        for bond in bonds {
            if !goal.manages(self.journal, &bond) {
                continue;
            }
            match goal.target(&bond) {
                None => self.restore(&[], |change| change.bond == bond)?,
                Some(target) => self.restore(&[], |change| {
                    let link = change.item.link();
                    // Bans have no device: they are seen to when the slaves' interrupts are known.
                    change.bond == bond && link != bond && !target.has(link) && !is_ban(change)
                })?,
            }
        }
        let mut bindings = Vec::new();
        for target in &goal.targets {
            self.make_bond(target)?;
            self.enslave(target)?;
            bindings.push(self.bind(target, goal.ban)?);
            self.finish(target)?;
        }
        Ok(bindings)
    }

    /// The bond and its options.
    fn make_bond(&mut self, target: &Target) -> Result<()> {
        let bond = &target.bond.name;
        let item = Item::Bond { bond: bond.clone() };
        if self.read(&item)?.as_deref() == Some(NOTHING) {
            let index = journal::free_index(self.host).to_string();
            self.set(bond, item, index)?;
        }
        let is_stock = self.made_up.is_none() && bond::map(self.host, bond).is_none();
        if is_stock && target.bond.needs_policy() {
            return Err(
                Error::new(bond, "made by the stock driver, without transmit policies")
                    .fix("load the patched bonding.ko")
                    .exit(Exit::Unsupported),
            );
        }
        let wants = target.options();
        // The driver changes the mode of a bond without slaves only, and that and the LACP rate
        // only while it is down.
        let is_mode = self.differs(&wants, &target.option("mode"))?;
        let is_rate = self.differs(&wants, &target.option("lacp_rate"))?;
        if is_mode {
            for slave in &target.slaves {
                self.release(bond, &slave.link)?;
            }
        }
        let up = Item::Up { link: bond.clone() };
        if (is_mode || is_rate) && self.read(&up)?.as_deref() == Some(UP) {
            self.set(bond, up, DOWN.into())?;
        }
        self.bring(
            bond,
            wants,
            |item| matches!(item, Item::Option { bond: of, .. } if of == bond),
        )
    }

    /// Whether an option of a bond will have to be written, or given back what it held.
    fn differs(&mut self, wants: &[Want], item: &Item) -> Result<bool> {
        let now = self.read(item)?;
        Ok(match wants.iter().find(|want| want.item == *item) {
            Some(want) => now.as_deref() != Some(&want.value),
            None => self.journal.in_force().iter().any(|change| {
                change.item == *item && now.as_ref().is_some_and(|now| *now != change.before)
            }),
        })
    }

    /// Take a slave out of the bond, to be put back.
    fn release(&mut self, bond: &str, slave: &str) -> Result<()> {
        let link = || slave.to_string();
        let master = Item::Master { link: link() };
        if self.read(&master)?.as_deref() != Some(bond) {
            return Ok(());
        }
        // The kernel forgets it now; a rollback must not.
        let cpus = Item::SlaveCpus { link: link() };
        if self.read(&cpus)?.is_some() {
            self.set(bond, cpus, NOTHING.into())?;
        }
        self.set(bond, master, NOTHING.into())
    }

    fn enslave(&mut self, target: &Target) -> Result<()> {
        let bond = &target.bond.name;
        for slave in &target.slaves {
            let link = || slave.link.clone();
            let master = Item::Master { link: link() };
            if self.read(&master)?.as_ref() == Some(bond) {
                continue;
            }
            self.set(bond, Item::Up { link: link() }, DOWN.into())?;
            self.set(bond, master, bond.clone())?;
        }
        Ok(())
    }

    /// Interrupts and queues. Only now: many drivers request interrupts when the device is opened,
    /// and it was opened by being enslaved.
    fn bind(&mut self, target: &Target, ban: bool) -> Result<Vec<Binding>> {
        self.set_channels(target)?;
        let bindings = target.bindings(self.host)?;
        self.ban(target, &bindings, ban)?;
        let wants = bindings
            .iter()
            .flat_map(|binding| binding.wants(self.host))
            .collect();
        self.bring(&target.bond.name, wants, |item| {
            let is_else = matches!(
                item,
                Item::Up { .. } | Item::Master { .. } | Item::Channels { .. }
            );
            target.has(item.link()) && !is_else
        })?;
        Ok(bindings)
    }

    /// Before interrupts and queues are looked for: it may make them anew.
    fn set_channels(&mut self, target: &Target) -> Result<()> {
        let mut wants = Vec::new();
        for slave in &target.slaves {
            let Some(channels) = slave.slave.channels else {
                continue;
            };
            let item = Item::Channels {
                link: slave.link.clone(),
            };
            if self.read(&item)?.is_none() {
                return Err(Error::new(item, "its driver has none that can be set").fix(
                    format_args!("take channels out of the configuration of {}", slave.link),
                ));
            }
            wants.push(Want {
                item,
                value: channels.to_string(),
            });
        }
        self.bring(&target.bond.name, wants, |item| {
            target.has(item.link()) && matches!(item, Item::Channels { .. })
        })
    }

    /// Before the interrupts are moved, irqbalance is told to leave them alone. A new one has
    /// forgotten; interrupts that a slave no longer has are taken back.
    fn ban(&mut self, target: &Target, bindings: &[Binding], ban: bool) -> Result<()> {
        let bond = &target.bond.name;
        let mut in_force = self.journal.in_force().into_iter();
        let is_wanted = ban || in_force.any(|change| change.bond == *bond && is_ban(&change));
        let wants = match is_wanted && irqbalance::running(self.host).is_some() {
            false => Vec::new(),
            true => bindings
                .iter()
                .flat_map(Binding::irqs)
                .map(|irq| Want {
                    item: Item::Ban { irq },
                    value: BANNED.into(),
                })
                .collect(),
        };
        self.bring(bond, wants, |item| matches!(item, Item::Ban { .. }))
    }

    /// Addresses, and up.
    fn finish(&mut self, target: &Target) -> Result<()> {
        let bond = &target.bond.name;
        let wants = target
            .bond
            .addresses
            .iter()
            .map(|address| Want {
                item: Item::Address {
                    bond: bond.clone(),
                    address: address.0,
                },
                value: PRESENT.into(),
            })
            .collect();
        self.bring(
            bond,
            wants,
            |item| matches!(item, Item::Address { bond: of, .. } if of == bond),
        )?;
        self.set(bond, Item::Up { link: bond.clone() }, UP.into())
    }

    /// Restore what is wanted no more of the items in question, then have the others hold what is
    /// wanted. In this order: the kernel takes away an address's secondaries with it.
    fn bring(&mut self, bond: &str, wants: Vec<Want>, scope: impl Fn(&Item) -> bool) -> Result<()> {
        self.restore(&wants, |change| change.bond == bond && scope(&change.item))?;
        for Want { item, value } in wants {
            self.set(bond, item, value)?;
        }
        Ok(())
    }

    /// Give what was changed before and is wanted no more what it held, the last change first.
    fn restore(&mut self, wants: &[Want], scope: impl Fn(&Change) -> bool) -> Result<()> {
        let mut old = self.journal.in_force();
        old.retain(|change| scope(change) && !wants.iter().any(|want| want.item == change.item));
        let going: Vec<String> = old
            .iter()
            .filter(|change| matches!(change.item, Item::Bond { .. }))
            .map(|change| change.item.link().to_string())
            .collect();
        for change in old.into_iter().rev() {
            let now = self.read(&change.item)?;
            let is_bond = matches!(change.item, Item::Bond { .. });
            let goes_with_bond = !is_bond && going.iter().any(|bond| bond == change.item.link());
            match now {
                Some(now)
                    if now != change.before
                        && !goes_with_bond
                        && change.is_ours(&now)
                        && !change.item.is_strangers(self.host) =>
                {
                    self.set(&change.bond, change.item, change.before)?;
                }
                now => {
                    let now = now.unwrap_or_default();
                    if now != change.before && !goes_with_bond {
                        self.plan.left.push(format!(
                            "{}: holds {}, not what cpubond set ({}), left as it is",
                            change.item,
                            quoted(&now),
                            quoted(&change.after)
                        ));
                    }
                    // Restored by others, or by the bond's going: it is no longer in force.
                    self.journal.note(Change {
                        after: change.before,
                        before: now,
                        earlier: Vec::new(),
                        ..change
                    });
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, item: &Item) -> Result<Option<String>> {
        let made_up = self.made_up.iter().flatten().rev();
        match made_up.into_iter().find(|(made_up, _)| made_up == item) {
            Some((_, value)) => Ok(Some(value.clone())),
            None => item.read(self.host, self.kernel),
        }
    }

    /// Have an item hold a value, if it does not.
    fn set(&mut self, bond: &str, item: Item, value: String) -> Result<()> {
        let now = self.read(&item)?;
        if now.as_ref() == Some(&value) {
            return Ok(());
        }
        if now.is_none() && self.made_up.is_none() && matches!(item, Item::Option { .. }) {
            return Err(Error::new(item, "the bonding driver has no such option")
                .fix("load the patched bonding.ko")
                .exit(Exit::Unsupported));
        }
        let change = Change {
            bond: bond.to_string(),
            item,
            before: now.unwrap_or_default(),
            after: value,
            earlier: Vec::new(),
        };
        self.plan.changes.push(change.clone());
        let Some(made_up) = &mut self.made_up else {
            (self.go_on)()?;
            return self.journal.make(self.host, self.kernel, change);
        };
        if let Item::Bond { bond } = &change.item {
            for (name, default) in NEW_BOND {
                let (bond, name) = (bond.clone(), name.to_string());
                made_up.push((Item::Option { bond, name }, default.into()));
            }
            made_up.push((Item::Up { link: bond.clone() }, DOWN.into()));
        }
        if let Item::Master { link } = &change.item {
            // The bond opens its slaves, and closes them when it lets go.
            let state = if change.after == NOTHING { DOWN } else { UP };
            made_up.push((Item::Up { link: link.clone() }, state.into()));
        }
        made_up.push((change.item, change.after));
        Ok(())
    }
}

fn is_ban(change: &Change) -> bool {
    matches!(change.item, Item::Ban { .. })
}

/// Take back what a failed apply has done, say how that went, and give back the error it failed
/// with, which exits with 5 if anything was taken back.
pub fn roll_back(
    host: &Host,
    kernel: &mut dyn Kernel,
    journal: &mut Journal,
    cause: Error,
) -> Error {
    let undoing = journal.roll_back(host, kernel);
    undoing.report();
    match (undoing.errors.len(), undoing.restored) {
        (0, 0) => cause,
        (0, _) => {
            eprintln!("cpubond: failed, everything was rolled back");
            cause.exit(Exit::RolledBack)
        }
        (errors, _) => {
            eprintln!(
                "cpubond: failed, and rolling back failed in {errors} places (see above); \
                 \"cpubond rollback\" tries again, \"cpubond undo\" undoes everything"
            );
            cause.exit(Exit::RolledBack)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::ethtool::Channels;
    use crate::testing::{Fake, FakeKernel, Moment, killed};
    use std::path::Path;

    /// Four CPUs; three NICs with two queue pairs each, one of them up.
    fn machine() -> Fake {
        let fake = Fake::with_cpus(4);
        for (nic, first) in [("eth0", 24), ("eth1", 34), ("eth2", 44)] {
            fake.virtio_nic(nic, first, 2);
        }
        fake.file("sys/class/net/eth0/flags", "0x1003\n");
        fake
    }

    const FIRST: &str = r#"
        [[bond]]
        name = "bond0"
        mode = "802.3ad"
        lacp_rate = "fast"
        follow = "flow"
        addresses = ["192.0.2.1/24", "192.0.2.2/24"]
        [[bond.slave]]
        name = "eth0"
        set_cpus = true
        [[bond.slave]]
        name = "eth1"
    "#;

    /// Everything about it is different.
    const SECOND: &str = r#"
        [[bond]]
        name = "bond0"
        miimon = 50
        addresses = ["192.0.2.1/24", "192.0.2.3/24"]
        [[bond.slave]]
        name = "eth1"
        set_cpus = true
        [[bond]]
        name = "bond1"
        mode = "balance-rr"
        cpus = "2-3"
        [[bond.slave]]
        name = "eth0"
        [[bond.slave]]
        name = "eth2"
    "#;

    fn goal(fake: &Fake, kernel: &mut FakeKernel, text: &str) -> Goal {
        let config = Config::parse(Path::new("c.toml"), text).unwrap();
        let journal = Journal::open(&fake.host()).unwrap();
        Goal::new(&fake.host(), kernel, &journal, &config.bonds, By::Apply).unwrap()
    }

    fn plan(fake: &Fake, kernel: &mut FakeKernel, text: &str) -> Plan {
        let goal = goal(fake, kernel, text);
        let journal = Journal::open(&fake.host()).unwrap();
        goal.plan(&fake.host(), kernel, &journal).unwrap()
    }

    fn apply(fake: &Fake, kernel: &mut FakeKernel, text: &str) -> Result<Plan> {
        let host = fake.host();
        let goal = goal(fake, kernel, text);
        let mut journal = Journal::open(&host).unwrap();
        journal.begin(&host, kernel, None)?;
        match goal.reach(&host, kernel, &mut journal, 0, &|| Ok(())) {
            Ok(plan) => journal.commit(&host).map(|()| plan),
            Err(cause) => Err(roll_back(&host, kernel, &mut journal, cause)),
        }
    }

    /// Undo everything; what it says must be nothing.
    fn undo(fake: &Fake, kernel: &mut FakeKernel) {
        let mut journal = Journal::open(&fake.host()).unwrap();
        let undoing = journal.undo(&fake.host(), kernel, None);
        assert!(
            undoing.errors.is_empty() && undoing.left.is_empty(),
            "{undoing:?}"
        );
    }

    /// A kernel like `old` that has seen what it has seen.
    fn kernel<'a>(fake: &'a Fake, old: &FakeKernel) -> FakeKernel<'a> {
        FakeKernel {
            addresses: old.addresses.clone(),
            ..FakeKernel::new(fake)
        }
    }

    /// What differs; nothing must.
    fn same(now: &Snapshot, then: &Snapshot, when: &str) {
        let gone: Vec<_> = then.0.iter().filter(|line| !now.0.contains(line)).collect();
        let new: Vec<_> = now.0.iter().filter(|line| !then.0.contains(line)).collect();
        assert!(
            gone.is_empty() && new.is_empty(),
            "{when}: was {gone:#?}, is {new:#?}"
        );
        assert_eq!(now.1, then.1, "{when}");
    }

    type Snapshot = (Vec<(String, String)>, Vec<String>);

    /// All of the machine but the indices of bonds, which are never the same.
    fn snapshot(fake: &Fake, kernel: &FakeKernel) -> Snapshot {
        let files = fake
            .snapshot()
            .into_iter()
            .map(|(path, text)| (path.display().to_string(), text))
            // The kernel's own doing.
            .filter(|(path, _)| !path.ends_with("cpu_bound_map"))
            .map(|(path, text)| {
                let mut words: Vec<&str> = text.split_whitespace().collect();
                if path.ends_with("bonding/slaves") {
                    // Those that were put back come last.
                    words.sort_unstable();
                } else if path.contains("/bonding/") {
                    // NAME NUMBER
                    words.truncate(1);
                }
                let text = words.join(" ");
                (path, text)
            })
            .filter(|(path, _)| {
                !path.ends_with("bond0/ifindex") && !path.ends_with("bond1/ifindex")
            })
            .filter(|(path, _)| !path.contains("/run/"))
            .collect();
        let mut addresses: Vec<String> = kernel
            .addresses
            .iter()
            .map(|(of, address)| format!("{of} {address}"))
            .collect();
        addresses.sort();
        (files, addresses)
    }

    #[test]
    fn a_second_apply_writes_nothing() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let done = apply(&fake, &mut kernel, FIRST).unwrap();
        assert!(done.changes.len() > 20, "{}", done.changes.len());
        let writes = kernel.writes;
        let journal = fake.text("run/journal.json");
        assert_eq!(plan(&fake, &mut kernel, FIRST).changes, []);
        let again = apply(&fake, &mut kernel, FIRST).unwrap();
        assert_eq!((again.changes, again.left.len()), (vec![], 0));
        assert_eq!(
            (kernel.writes, fake.text("run/journal.json")),
            (writes, journal)
        );
    }

    #[test]
    fn the_plan_is_what_is_done() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let items = |plan: &Plan| -> Vec<(Item, String, String)> {
            let index = |change: &Change| match change.item {
                Item::Bond { .. } if change.after != NOTHING => "index".to_string(),
                _ => change.after.clone(),
            };
            plan.changes
                .iter()
                .map(|change| (change.item.clone(), change.before.clone(), index(change)))
                .collect()
        };
        for text in [FIRST, SECOND, FIRST, ""] {
            let before = snapshot(&fake, &kernel);
            let writes = kernel.writes;
            let planned = plan(&fake, &mut kernel, text);
            assert_eq!((snapshot(&fake, &kernel), kernel.writes), (before, writes));
            let done = apply(&fake, &mut kernel, text).unwrap();
            assert_eq!(items(&planned), items(&done));
            assert_eq!(kernel.writes, writes + done.changes.len());
        }
    }

    #[test]
    fn channels_are_set_before_queues_are_bound_and_restored() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let channels = |combined| Channels {
            combined,
            combined_max: 2,
            ..Channels::default()
        };
        kernel.channels.insert("eth0".into(), channels(1));
        let before = snapshot(&fake, &kernel);
        let text = |count: u32| {
            format!(
                "[[bond]]\nname = \"bond0\"\n[[bond.slave]]\nname = \"eth0\"\nchannels = {count}\n"
            )
        };
        let done = apply(&fake, &mut kernel, &text(2)).unwrap();
        let place = |wanted: fn(&Item) -> bool| {
            let mut items = done.changes.iter().map(|change| &change.item);
            items.position(wanted).unwrap()
        };
        let set = place(|item| matches!(item, Item::Channels { .. }));
        assert!(place(|item| matches!(item, Item::Master { .. })) < set);
        assert!(set < place(|item| matches!(item, Item::Irq { .. } | Item::Queue { .. })));
        assert_eq!(kernel.channels["eth0"], channels(2));
        assert_eq!(plan(&fake, &mut kernel, &text(2)).changes, []);

        // Wanted no more, they are what they were.
        let none = text(2).replace("channels = 2", "");
        assert_eq!(plan(&fake, &mut kernel, &none).changes.len(), 1);
        apply(&fake, &mut kernel, &none).unwrap();
        assert_eq!(kernel.channels["eth0"], channels(1));
        apply(&fake, &mut kernel, &text(2)).unwrap();
        undo(&fake, &mut kernel);
        assert_eq!(kernel.channels["eth0"], channels(1));
        same(&snapshot(&fake, &kernel), &before, "undone");

        let error = apply(&fake, &mut kernel, &text(3)).unwrap_err();
        assert_eq!(error.exit, Exit::RolledBack, "{error}");
        assert_eq!(kernel.channels["eth0"], channels(1));
        kernel.channels.clear();
        let error = apply(&fake, &mut kernel, &text(2)).unwrap_err().to_string();
        assert!(
            error.starts_with("eth0: combined channels: its driver has none"),
            "{error}"
        );
    }

    #[test]
    fn a_config_change_is_applied_and_undo_still_goes_all_the_way_back() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let before = snapshot(&fake, &kernel);
        apply(&fake, &mut kernel, FIRST).unwrap();
        assert_eq!(fake.text("sys/class/net/bond0/bonding/mode"), "802.3ad");
        assert_eq!(
            fake.text("sys/class/net/bond0/bonding/cpu_bound_follow"),
            "flow"
        );
        assert_eq!(fake.text("sys/class/net/eth0/bonding_slave/cpus"), "0-1");
        apply(&fake, &mut kernel, SECOND).unwrap();
        assert_eq!(fake.text("sys/class/net/bond0/bonding/mode"), "cpu_bound");
        assert_eq!(fake.text("sys/class/net/bond0/bonding/slaves"), "eth1");
        assert_eq!(
            fake.text("sys/class/net/bond0/bonding/cpu_bound_follow"),
            "cpu"
        );
        assert_eq!(fake.text("sys/class/net/eth1/bonding_slave/cpus"), "0-3");
        assert_eq!(fake.text("sys/class/net/bond1/bonding/slaves"), "eth0 eth2");
        assert_eq!(fake.text("proc/irq/25/smp_affinity_list"), "2");
        assert_eq!(
            snapshot(&fake, &kernel).1,
            ["bond0 192.0.2.1/24", "bond0 192.0.2.3/24"]
        );
        undo(&fake, &mut kernel);
        same(&snapshot(&fake, &kernel), &before, "");
        assert!(!fake.path("run/journal.json").exists());

        apply(&fake, &mut kernel, SECOND).unwrap();
        apply(&fake, &mut kernel, FIRST).unwrap();
        assert_eq!(fake.text("sys/class/net/bond0/bonding/slaves"), "eth0 eth1");
        apply(&fake, &mut kernel, "").unwrap();
        same(&snapshot(&fake, &kernel), &before, "");
        assert!(!fake.path("run/journal.json").exists());
    }

    #[test]
    fn a_failure_at_any_write_is_rolled_back() {
        for (first, second) in [("", FIRST), (FIRST, SECOND), (SECOND, "")] {
            let mut write = 0;
            loop {
                write += 1;
                let fake = machine();
                let mut old = FakeKernel::new(&fake);
                let origin = snapshot(&fake, &old);
                apply(&fake, &mut old, first).unwrap();
                let before = snapshot(&fake, &old);
                let journal = fake.path("run/journal.json").exists();
                let mut broken = FakeKernel {
                    fail_after: Some(write),
                    ..kernel(&fake, &old)
                };
                let Err(error) = apply(&fake, &mut broken, second) else {
                    break;
                };
                assert_eq!(
                    error.exit == Exit::Failed,
                    write == 1,
                    "write {write}: {error}"
                );
                same(
                    &snapshot(&fake, &broken),
                    &before,
                    &format!("write {write} of {second}"),
                );
                assert_eq!(fake.path("run/journal.json").exists(), journal);
                undo(&fake, &mut broken);
                same(
                    &snapshot(&fake, &broken),
                    &origin,
                    &format!("write {write} of {second}"),
                );
            }
            assert!(write > 20, "only {write} writes");
        }
    }

    #[test]
    fn killed_at_any_write_undo_restores_all() {
        for (first, second) in [("", FIRST), (FIRST, SECOND)] {
            for moment in [Moment::Before, Moment::After] {
                let mut write = 0;
                loop {
                    write += 1;
                    let fake = machine();
                    let mut old = FakeKernel::new(&fake);
                    let origin = snapshot(&fake, &old);
                    apply(&fake, &mut old, first).unwrap();
                    let mut doomed = FakeKernel {
                        kill_at: Some((write, moment)),
                        ..kernel(&fake, &old)
                    };
                    if !killed(|| drop(apply(&fake, &mut doomed, second))) {
                        break;
                    }
                    // And killed again at any write of the undo.
                    let mut again = FakeKernel {
                        kill_at: Some((1 + write % 7, moment)),
                        ..kernel(&fake, &doomed)
                    };
                    killed(|| undo(&fake, &mut again));
                    undo(&fake, &mut kernel(&fake, &again));
                    let left = kernel(&fake, &again);
                    let mut now = snapshot(&fake, &left);
                    // The addresses went with the bonds.
                    now.1.clear();
                    same(
                        &now,
                        &origin,
                        &format!("killed {moment:?} write {write} of {second}"),
                    );
                    assert!(!fake.path("run/journal.json").exists());
                }
                assert!(write > 20, "only {write} writes");
            }
        }
    }

    #[test]
    fn killed_at_any_write_a_rollback_restores_what_was() {
        for moment in [Moment::Before, Moment::After] {
            let mut write = 0;
            loop {
                write += 1;
                let fake = machine();
                let mut old = FakeKernel::new(&fake);
                apply(&fake, &mut old, FIRST).unwrap();
                let before = snapshot(&fake, &old);
                let mut doomed = FakeKernel {
                    kill_at: Some((write, moment)),
                    ..kernel(&fake, &old)
                };
                if !killed(|| drop(apply(&fake, &mut doomed, SECOND))) {
                    break;
                }
                let mut addresses = doomed.addresses.clone();
                for limit in 1.. {
                    let mut again = FakeKernel {
                        kill_at: Some((limit, moment)),
                        addresses: addresses.clone(),
                        ..FakeKernel::new(&fake)
                    };
                    let was_killed = killed(|| {
                        let mut journal = Journal::open(&fake.host()).unwrap();
                        let undoing = journal.roll_back(&fake.host(), &mut again);
                        assert!(
                            undoing.errors.is_empty() && undoing.left.is_empty(),
                            "{undoing:?}"
                        );
                    });
                    addresses = again.addresses.clone();
                    if !was_killed {
                        same(
                            &snapshot(&fake, &again),
                            &before,
                            &format!("{moment:?} write {write}"),
                        );
                        break;
                    }
                }
            }
            assert!(write > 20, "only {write} writes");
        }
    }

    #[test]
    fn killed_at_any_write_the_next_apply_goes_on() {
        let mut write = 0;
        loop {
            write += 1;
            let fake = machine();
            let mut old = FakeKernel::new(&fake);
            let origin = snapshot(&fake, &old);
            apply(&fake, &mut old, FIRST).unwrap();
            let mut doomed = FakeKernel {
                kill_at: Some((write, Moment::After)),
                ..kernel(&fake, &old)
            };
            if !killed(|| drop(apply(&fake, &mut doomed, SECOND))) {
                break;
            }
            let mut next = kernel(&fake, &doomed);
            apply(&fake, &mut next, SECOND).unwrap();
            assert_eq!(plan(&fake, &mut next, SECOND).changes, []);
            undo(&fake, &mut next);
            same(&snapshot(&fake, &next), &origin, &format!("write {write}"));
        }
    }

    #[test]
    fn what_others_made_of_it_is_left_and_said() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        apply(&fake, &mut kernel, FIRST).unwrap();
        fake.file("proc/irq/27/smp_affinity_list", "3\n");
        let done = apply(&fake, &mut kernel, "").unwrap();
        assert_eq!(done.left.len(), 1, "{:?}", done.left);
        assert!(
            done.left[0].contains("irq/27: holds '3'"),
            "{:?}",
            done.left
        );
        assert!(!fake.path("run/journal.json").exists());
    }

    #[test]
    fn drift_is_mended_and_the_first_value_stays_the_one_to_restore() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let before = snapshot(&fake, &kernel);
        apply(&fake, &mut kernel, FIRST).unwrap();
        fake.file("proc/irq/27/smp_affinity_list", "3\n");
        let done = apply(&fake, &mut kernel, FIRST).unwrap();
        assert_eq!(done.changes.len(), 1);
        assert_eq!(
            (
                done.changes[0].before.as_str(),
                done.changes[0].after.as_str()
            ),
            ("3", "1")
        );
        undo(&fake, &mut kernel);
        same(&snapshot(&fake, &kernel), &before, "");
    }

    #[test]
    fn a_bond_that_others_deleted_is_made_again() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        let before = snapshot(&fake, &kernel);
        apply(&fake, &mut kernel, FIRST).unwrap();
        kernel.delete("bond0").unwrap();
        apply(&fake, &mut kernel, FIRST).unwrap();
        assert_eq!(plan(&fake, &mut kernel, FIRST).changes, []);
        undo(&fake, &mut kernel);
        same(&snapshot(&fake, &kernel), &before, "");
    }

    #[test]
    fn others_bonds_and_slaves_are_refused() {
        let fake = machine();
        let mut kernel = FakeKernel::new(&fake);
        kernel.create_bond("bond1", 9).unwrap();
        let refused = |kernel: &mut FakeKernel, text: &str| {
            let config = Config::parse(Path::new("c.toml"), text).unwrap();
            let journal = Journal::open(&fake.host()).unwrap();
            Goal::new(&fake.host(), kernel, &journal, &config.bonds, By::Apply)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert!(refused(&mut kernel, SECOND).contains("bond1: exists already"));
        kernel.set_master("eth1", Some("bond1")).unwrap();
        assert!(refused(&mut kernel, FIRST).contains("eth1: busy: in bond1 already"));
    }
}
