//! The journal: every change that is in force, on disk before it is made.
//!
//! One file for the machine. It is of one boot and one network namespace: after a reboot nothing
//! it describes exists any more, and in another namespace the same names are other devices.
//!
//! Changes are a log: the values from just before an apply are what a rollback of it restores,
//! from the end back to where it began. Once an apply is final its changes are merged with those
//! before, so that each item is there once, with the value from before cpubond first touched it:
//! that is what undo restores.

use crate::change::{Change, Item, Kernel, NOTHING, Undone};
use crate::error::{Error, Result};
use crate::host::{self, Host};
use crate::link::{self, Mac};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SCHEMA: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    schema: u32,
    /// `/proc/sys/kernel/random/boot_id`
    boot_id: String,
    /// Inode of `/proc/self/ns/net`.
    netns: u64,
    /// Which command has each bond.
    pub bonds: BTreeMap<String, By>,
    /// Tells the devices that were changed from others that have their names later.
    devices: BTreeMap<String, Device>,
    pub changes: Vec<Change>,
    /// The apply that is not final yet.
    pub pending: Option<Pending>,
}

/// What says how a bond should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The command line of `cpubond up`.
    Up,
    /// `config.toml`.
    Apply,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Device {
    index: u32,
    permanent_mac: Option<Mac>,
}

/// An apply that may yet be rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    pub state: State,
    /// How many changes there were before it, and whose the bonds were.
    mark: usize,
    bonds: BTreeMap<String, By>,
    /// Which guard waits to roll it back.
    pub guard: Option<u64>,
    /// When it is rolled back unless confirmed, in milliseconds since boot.
    pub deadline: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Changes are being made, or whoever made them was killed.
    Applying,
    /// All are made; `cpubond confirm` makes them final.
    Unconfirmed,
    /// They are being taken back, or that failed, or whoever did it was killed.
    RollingBack,
}

/// What undoing found.
#[derive(Debug, Default)]
pub struct Undoing {
    pub restored: usize,
    /// Lines about what was left as it is.
    pub left: Vec<String>,
    pub errors: Vec<Error>,
}

impl Undoing {
    fn add(&mut self, result: Result<Undone>) {
        match result {
            Ok(Undone::Restored) => self.restored += 1,
            Ok(Undone::Nothing) => {}
            Ok(Undone::Left(line)) => self.left.push(line),
            Err(error) => self.errors.push(error),
        }
    }

    /// Say on stderr what was left and what went wrong.
    pub fn report(&self) {
        for line in &self.left {
            eprintln!("cpubond: {line}");
        }
        for error in &self.errors {
            eprintln!("cpubond: {error}");
        }
    }
}

/// A journal's file, as it is found.
enum Found {
    Nothing,
    /// Of another boot: nothing that it describes exists any more.
    Stale,
    Journal(Journal),
}

impl Journal {
    fn new(host: &Host) -> Result<Self> {
        Ok(Self {
            schema: SCHEMA,
            boot_id: boot_id(host)?,
            netns: netns(host)?,
            bonds: BTreeMap::new(),
            devices: BTreeMap::new(),
            changes: Vec::new(),
            pending: None,
        })
    }

    pub fn path(host: &Host) -> PathBuf {
        host.run.join("journal.json")
    }

    /// The journal to go on with, an empty one if there is none; one of another boot is dropped,
    /// and that is said. Take the lock first.
    pub fn open(host: &Host) -> Result<Self> {
        match Self::find(host)? {
            Found::Journal(journal) => return Ok(journal),
            Found::Nothing => {}
            Found::Stale => {
                let path = Self::path(host);
                eprintln!(
                    "cpubond: {}: of another boot; nothing of what it describes exists any more, dropped",
                    path.display()
                );
                fs::remove_file(&path).map_err(|error| unwritable(&path, &error))?;
            }
        }
        Self::new(host)
    }

    /// The journal to look at, an empty one if nothing is in force; writes nothing.
    pub fn read(host: &Host) -> Result<Self> {
        match Self::find(host)? {
            Found::Journal(journal) => Ok(journal),
            Found::Nothing | Found::Stale => Self::new(host),
        }
    }

    fn find(host: &Host) -> Result<Found> {
        let path = Self::path(host);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(Error::new(path.display(), error)),
        };
        /// What every schema has.
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
            boot_id: String,
        }
        let broken = |error: serde_json::Error| {
            Error::new(path.display(), format_args!("not a journal: {error}"))
                .fix("undo by hand and delete the file")
        };
        let head: Head = serde_json::from_slice(&text).map_err(broken)?;
        if head.boot_id != boot_id(host)? {
            return Ok(Found::Stale);
        }
        if head.schema != SCHEMA {
            return Err(Error::new(
                path.display(),
                format_args!("schema {}, this is schema {SCHEMA}", head.schema),
            )
            .fix("use the cpubond that wrote it"));
        }
        let journal: Self = serde_json::from_slice(&text).map_err(broken)?;
        let here = netns(host)?;
        if journal.netns != here {
            return Err(Error::new(
                path.display(),
                format_args!(
                    "of another network namespace (net:[{}], this is net:[{here}])",
                    journal.netns
                ),
            )
            .fix("run cpubond there: \"lsns -t net\" lists them, \"nsenter --net=\" enters one; if it is gone, delete the file"));
        }
        Ok(Found::Journal(journal))
    }

    /// Whether the bond with this name is the one that cpubond made.
    pub fn has_made(&self, host: &Host, bond: &str) -> bool {
        let index = link::index(host, bond).map(|index| index.to_string());
        index.is_some_and(|index| {
            self.changes.iter().any(|change| {
                matches!(&change.item, Item::Bond { bond: made } if made == bond)
                    && change.is_ours(&index)
            })
        })
    }

    /// Fails while an apply waits to be confirmed: what it is rolled back to must stay what it was.
    pub fn refuse_if_unconfirmed(&self) -> Result<()> {
        match &self.pending {
            Some(pending) if pending.state == State::Unconfirmed => Err(Error::new(
                "cpubond apply",
                "an earlier one waits to be confirmed",
            )
            .fix("\"cpubond confirm\" keeps it, \"cpubond rollback\" takes it back")),
            _ => Ok(()),
        }
    }

    /// The changes in force, each item once, in an order in which they can be made; undone in the
    /// opposite one.
    pub fn in_force(&self) -> Vec<Change> {
        merged(&self.changes)
    }

    /// Begin an apply, in memory only: nothing is written until something is changed. What is left
    /// of one that was killed becomes part of the state before.
    pub fn begin(
        &mut self,
        host: &Host,
        kernel: &mut dyn Kernel,
        guard: Option<u64>,
    ) -> Result<()> {
        // What was changed of devices that are gone is gone with them.
        let mut kept = Vec::new();
        for change in merged(&self.changes) {
            let is_gone = match &change.item {
                Item::Bond { bond } => !self.has_made(host, bond),
                item => self.stranger(host, kernel, item.link())?.is_some(),
            };
            if !is_gone {
                kept.push(change);
            }
        }
        self.changes = kept;
        self.tidy();
        self.pending = Some(Pending {
            state: State::Applying,
            mark: self.changes.len(),
            bonds: self.bonds.clone(),
            guard,
            deadline: None,
        });
        Ok(())
    }

    /// Write a change down, then make it.
    pub fn make(&mut self, host: &Host, kernel: &mut dyn Kernel, change: Change) -> Result<()> {
        let link = change.item.link().to_string();
        match &change.item {
            // Not there yet.
            Item::Bond { .. } => {
                if let Ok(index) = change.after.parse() {
                    let device = Device {
                        index,
                        permanent_mac: None,
                    };
                    self.devices.insert(link, device);
                }
            }
            _ => {
                if let Some(device) = device(host, kernel, &link)? {
                    self.devices.insert(link, device);
                }
            }
        }
        self.changes.push(change.clone());
        self.save(host)?;
        change.item.write(host, kernel, &change.after)
    }

    /// Write down a change that comes by itself, with another that is about to be made or because
    /// there is nothing left to change.
    pub fn note(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Whether there is, or was, a bond of ours with this name.
    fn made(&self, bond: &str) -> bool {
        self.changes
            .iter()
            .any(|change| matches!(&change.item, Item::Bond { bond: made } if made == bond))
    }

    /// The apply is final.
    pub fn commit(&mut self, host: &Host) -> Result<()> {
        self.pending = None;
        self.changes = merged(&self.changes);
        for change in &mut self.changes {
            change.earlier.clear();
        }
        // What holds again what it held before is nobody's change.
        self.changes.retain(|change| change.before != change.after);
        self.tidy();
        self.save(host)
    }

    /// The apply is made and waits to be confirmed for so long.
    pub fn wait_for_confirmation(&mut self, host: &Host, time: Duration) -> Result<()> {
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let deadline = host.uptime()?.saturating_add(time);
        if let Some(pending) = &mut self.pending {
            pending.state = State::Unconfirmed;
            pending.deadline = Some(deadline);
        }
        self.save(host)
    }

    /// Take back what the apply has changed, the last change first, past errors. With errors it
    /// stays pending, so that it can be tried again.
    pub fn roll_back(&mut self, host: &Host, kernel: &mut dyn Kernel) -> Undoing {
        let mut undoing = Undoing::default();
        let Some(pending) = &mut self.pending else {
            return undoing;
        };
        pending.state = State::RollingBack;
        let (mark, bonds) = (pending.mark, pending.bonds.clone());
        if self.changes.len() > mark
            && let Err(error) = self.save(host)
        {
            undoing.errors.push(error);
        }
        // Each one that was taken back is crossed out at once: an item may have been changed
        // twice, and what it holds does not tell how far we are.
        for index in (mark..self.changes.len()).rev() {
            undoing.add(self.undo_change(host, kernel, &self.changes[index]));
            // But not what came after an error, which may have been in its way.
            if undoing.errors.is_empty() {
                self.changes.remove(index);
                if let Err(error) = self.save(host) {
                    undoing.errors.push(error);
                }
            }
        }
        if undoing.errors.is_empty() {
            self.bonds = bonds;
            self.pending = None;
            self.tidy();
            if let Err(error) = self.save(host) {
                undoing.errors.push(error);
            }
        }
        undoing
    }

    /// Take back all changes, or those made for one bond, the last one first, past errors. What
    /// was taken back is forgotten, unless there were errors, so that it can be tried again.
    pub fn undo(&mut self, host: &Host, kernel: &mut dyn Kernel, bond: Option<&str>) -> Undoing {
        let mut undoing = Undoing::default();
        let all = merged(&self.changes);
        let (chosen, others): (Vec<Change>, Vec<Change>) = all
            .into_iter()
            .partition(|change| bond.is_none_or(|bond| change.bond == bond));
        for change in chosen.iter().rev() {
            // These go with the bond.
            let made = match &change.item {
                Item::Option { bond, .. } | Item::Address { bond, .. } => Some(bond),
                Item::Up { link } => Some(link),
                _ => None,
            };
            let goes = made.is_some_and(|made| {
                chosen
                    .iter()
                    .any(|other| matches!(&other.item, Item::Bond { bond } if bond == made))
            });
            if !goes {
                undoing.add(self.undo_change(host, kernel, change));
            }
        }
        if undoing.errors.is_empty() {
            self.changes = others;
            match bond {
                Some(bond) => drop(self.bonds.remove(bond)),
                None => self.bonds.clear(),
            }
            self.pending = None;
            self.tidy();
            if let Err(error) = self.save(host) {
                undoing.errors.push(error);
            }
        }
        undoing
    }

    /// Take back one change if its device is still the one that was changed.
    pub fn undo_change(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        change: &Change,
    ) -> Result<Undone> {
        if let Item::Bond { bond } = &change.item {
            let now = link::index(host, bond).map(|index| index.to_string());
            if now.is_some_and(|now| change.before == NOTHING && !change.is_ours(&now)) {
                return Ok(Undone::Left(format!(
                    "{bond}: not the bond that cpubond created; \"ip link del {bond}\" deletes it"
                )));
            }
        } else if !link::exists(host, change.item.link()) && self.made(change.item.link()) {
            // Went with the bond.
            return Ok(Undone::Nothing);
        } else if let Some(line) = self.stranger(host, kernel, change.item.link())? {
            return Ok(Undone::Left(format!("{}: {line}", change.item)));
        }
        // Its master has opened it, and closes it when it lets go.
        if let Item::Up { link } = &change.item
            && let Some(master) = link::master(host, link)
        {
            return Ok(match self.has_made(host, &master) {
                true => Undone::Nothing,
                false => Undone::Left(format!("{link}: is in {master} now, left as it is")),
            });
        }
        change.undo(host, kernel)
    }

    /// Why a device is not the one that was changed under this name.
    fn stranger(&self, host: &Host, kernel: &mut dyn Kernel, link: &str) -> Result<Option<String>> {
        let Some(then) = self.devices.get(link) else {
            return Ok(None);
        };
        Ok(match device(host, kernel, link)? {
            None => Some(format!("{link} no longer exists, nothing to restore")),
            Some(now) if now == *then => None,
            Some(now) => Some(format!(
                "{link} is another device than the one that cpubond changed ({now}, not {then}), left as it is"
            )),
        })
    }

    /// Forget devices and bonds of which nothing is changed.
    fn tidy(&mut self) {
        let changes = &self.changes;
        self.devices
            .retain(|link, _| changes.iter().any(|change| change.item.link() == link));
        self.bonds
            .retain(|bond, _| changes.iter().any(|change| change.bond == *bond));
    }

    /// Replace the file as a whole, so that a crash leaves the old journal or the new one; remove
    /// it if nothing is in force. Writes nothing if the file has all this already.
    pub fn save(&self, host: &Host) -> Result<()> {
        let path = Self::path(host);
        let new = path.with_extension("json.new");
        let save = || -> io::Result<()> {
            let old = match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                old => Some(old?),
            };
            if self.changes.is_empty() && self.pending.is_none() {
                return match old {
                    None => Ok(()),
                    Some(_) => {
                        fs::remove_file(&path)?;
                        File::open(&host.run)?.sync_all()
                    }
                };
            }
            let text = serde_json::to_vec_pretty(self)?;
            if old.as_ref() == Some(&text) {
                return Ok(());
            }
            fs::create_dir_all(&host.run)?;
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&host.run)?.sync_all()
        };
        save().map_err(|error| unwritable(&path, &error))
    }
}

/// Each item once, by rank: the value from before the first change of it, the value of the last,
/// and those between, any of which it may hold if the last was not made.
fn merged(changes: &[Change]) -> Vec<Change> {
    let mut merged: Vec<Change> = Vec::new();
    for change in changes {
        let Some(first) = merged.iter_mut().find(|first| first.item == change.item) else {
            merged.push(change.clone());
            continue;
        };
        first.bond.clone_from(&change.bond);
        let last = std::mem::replace(&mut first.after, change.after.clone());
        for value in change.earlier.iter().cloned().chain([last]) {
            if value != first.after && !first.earlier.contains(&value) {
                first.earlier.push(value);
            }
        }
    }
    merged.sort_by_key(|change| change.item.rank());
    merged
}

/// `None` if there is no device of that name.
fn device(host: &Host, kernel: &mut dyn Kernel, link: &str) -> Result<Option<Device>> {
    let Some(index) = link::index(host, link) else {
        return Ok(None);
    };
    Ok(Some(Device {
        index,
        permanent_mac: kernel.permanent_mac(link)?,
    }))
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "index {}", self.index)?;
        match self.permanent_mac {
            Some(mac) => write!(f, ", permanent address {mac}"),
            None => Ok(()),
        }
    }
}

fn boot_id(host: &Host) -> Result<String> {
    host::read(&host.proc.join("sys/kernel/random/boot_id"))
}

fn netns(host: &Host) -> Result<u64> {
    let path = host.proc.join("self/ns/net");
    fs::metadata(&path)
        .map(|metadata| metadata.ino())
        .map_err(|error| Error::new(path.display(), error))
}

/// An index for a bond that no device has, nor will get by counting up.
pub fn free_index(host: &Host) -> u32 {
    use std::hash::{BuildHasher, RandomState};
    let taken: Vec<u32> = host::names(&host.sys.join("class/net"))
        .iter()
        .filter_map(|link| link::index(host, link))
        .collect();
    let mut index = taken.iter().max().map_or(0, |highest| *highest % 1_000_000) + 10_000;
    // Not the same one in every run, lest a bond be taken for the one of a run that was killed.
    index += u32::try_from(RandomState::new().hash_one(0) % 100_000).unwrap_or_default();
    while taken.contains(&index) {
        index += 1;
    }
    index
}

/// Held while this process changes things; two at once would journal each other's changes as the
/// state before. The kernel drops it when the process ends, however it ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Fails if another process has it.
    pub fn take(host: &Host) -> Result<Self> {
        Self::flock(host, FlockOperation::NonBlockingLockExclusive)
    }

    /// Waits until no other process has it.
    pub fn wait(host: &Host) -> Result<Self> {
        Self::flock(host, FlockOperation::LockExclusive)
    }

    fn flock(host: &Host, operation: FlockOperation) -> Result<Self> {
        let path = host.run.join("lock");
        let file = fs::create_dir_all(&host.run)
            .and_then(|()| File::create(&path))
            .map_err(|error| unwritable(&path, &error))?;
        flock(&file, operation).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => {
                Error::new(path.display(), "another cpubond is changing things")
                    .fix("wait for it to end")
            }
            error => Error::new(path.display(), error),
        })?;
        Ok(Self { _file: file })
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = Error::new(path.display(), format_args!("cannot be written: {error}"));
    if denied {
        error.fix("run as root")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeKernel};

    #[test]
    fn one_at_a_time() {
        let fake = Fake::new();
        let lock = Lock::take(&fake.host()).unwrap();
        assert!(Lock::take(&fake.host()).is_err());
        drop(lock);
        Lock::take(&fake.host()).unwrap();
        Lock::wait(&fake.host()).unwrap();
    }

    #[test]
    fn refuses_what_is_no_journal() {
        let fake = Fake::new();
        assert_eq!(Journal::open(&fake.host()).unwrap().changes, []);
        let boot_id = fake.text("proc/sys/kernel/random/boot_id");
        for text in [
            "".to_string(),
            "{}".to_string(),
            format!(r#"{{"schema":99,"boot_id":"{boot_id}"}}"#),
            format!(r#"{{"schema":2,"boot_id":"{boot_id}"}}"#),
        ] {
            fake.file("run/journal.json", &text);
            assert!(Journal::open(&fake.host()).is_err(), "{text}");
        }
    }

    fn rps(before: &str, after: &str) -> Change {
        Change {
            bond: "bond0".into(),
            item: Item::Queue {
                link: "eth0".into(),
                file: "rx-0/rps_cpus".into(),
            },
            before: before.into(),
            after: after.into(),
            earlier: Vec::new(),
        }
    }

    /// A NIC whose RPS (CPUs 0 and 1) was changed, and the journal of that.
    fn changed() -> Fake {
        let fake = Fake::with_cpus(4);
        fake.nic("eth0", &[(25, "virtio0-input.0")]);
        let mut journal = Journal::open(&fake.host()).unwrap();
        journal.bonds.insert("bond0".into(), By::Apply);
        journal
            .make(&fake.host(), &mut FakeKernel::new(&fake), rps("0-1", "2"))
            .unwrap();
        assert_eq!(fake.text("sys/class/net/eth0/queues/rx-0/rps_cpus"), "4");
        fake
    }

    fn undo(fake: &Fake, kernel: &mut FakeKernel) -> Undoing {
        let mut journal = Journal::open(&fake.host()).unwrap();
        journal.undo(&fake.host(), kernel, None)
    }

    #[test]
    fn a_journal_of_another_boot_is_dropped() {
        let fake = changed();
        fake.file("proc/sys/kernel/random/boot_id", "another\n");
        assert_eq!(Journal::read(&fake.host()).unwrap().changes, []);
        let mut kernel = FakeKernel::new(&fake);
        assert_eq!(undo(&fake, &mut kernel).restored, 0);
        assert_eq!(kernel.writes, 0);
        assert!(!fake.path("run/journal.json").exists());
    }

    #[test]
    fn a_journal_of_another_namespace_is_refused() {
        let fake = changed();
        fs::rename(fake.path("proc/self/ns/net"), fake.path("proc/old")).unwrap();
        fake.file("proc/self/ns/net", "");
        let error = Journal::open(&fake.host()).unwrap_err().to_string();
        assert!(
            error.contains("another network namespace") && error.contains("nsenter"),
            "{error}"
        );
        assert!(fake.path("run/journal.json").exists());
    }

    #[test]
    fn a_device_that_took_the_name_is_left() {
        for (index, mac) in [(true, false), (false, true)] {
            let fake = changed();
            let mut kernel = FakeKernel::new(&fake);
            if index {
                fake.file("sys/class/net/eth0/ifindex", "4711\n");
            }
            if mac {
                kernel
                    .permanent
                    .insert("eth0".into(), Mac([2, 0, 0, 0, 0, 9]));
            }
            let undoing = undo(&fake, &mut kernel);
            assert!(undoing.left[0].contains("is another device"), "{undoing:?}");
            assert_eq!(kernel.writes, 0);
            assert!(!fake.path("run/journal.json").exists());
        }
        let fake = changed();
        let mut kernel = FakeKernel::new(&fake);
        assert_eq!(undo(&fake, &mut kernel).restored, 1);
        assert_eq!(fake.text("sys/class/net/eth0/queues/rx-0/rps_cpus"), "3");
    }

    #[test]
    fn the_first_value_is_kept_and_any_of_ours_is_taken_back() {
        let merged = merged(&[rps("0-1", "2"), rps("2", "3"), rps("3", "")]);
        let [change] = &merged[..] else {
            panic!("{merged:?}")
        };
        assert_eq!((change.before.as_str(), change.after.as_str()), ("0-1", ""));
        assert_eq!(change.earlier, ["2", "3"]);
        assert!(change.is_ours("3") && !change.is_ours("0-1"));
    }
}
