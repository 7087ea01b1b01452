//! One public port, one daemon a CPU: which daemon takes the new flows of each CPU, and `cpubond
//! steer`, which shows and removes it.
//!
//! `cpubond run` starts the daemons and calls a [`Steer`] method with a table from [`table`]
//! whenever a daemon comes, goes or drains. What it has set up is in the [`State`] file.

pub mod bpf;
pub mod control;
mod list;
mod nat;
mod netfilter;
mod reuseport;
mod sk_lookup;
mod socket;

use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::topology::Cpu;
use clap::{Subcommand, ValueEnum};
use control::Request;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const SCHEMA: u32 = 1;

/// Transport protocol of a service.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// How new flows get to the daemon of the CPU that received them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Method {
    /// nftables rewrites the destination port by CPU, conntrack restores it in the replies
    #[default]
    Nat,
    /// A BPF program picks the listener: no rewriting, no conntrack
    SkLookup,
    /// All daemons listen on the public port with SO_REUSEPORT, a BPF program picks by CPU
    Reuseport,
}

/// What clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Unique on the machine; part of file names and of the names of kernel objects. See
    /// [`check_name`].
    pub name: String,
    pub protocol: Protocol,
    /// The public port.
    pub port: u16,
}

/// One daemon that listens: the CPU it is pinned on, where it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub cpu: u32,
    /// The service's own port under `reuseport`.
    pub port: u16,
    /// A process that holds the listening sockets; not always the one that was started.
    pub pid: u32,
    /// Inode numbers of its listening sockets on `port`, sorted; one for each address. They are
    /// `socket:[INODE]` among the links in `/proc/PID/fd`.
    pub sockets: Vec<u64>,
}

/// See and change which daemon takes which CPU's flows
#[derive(Subcommand, Debug)]
#[command(
    long_about = "See and change which daemon takes which CPU's new flows.\n\n\
        \"cpubond run\" starts one daemon a CPU and steers to each CPU's daemon what that CPU \
        receives. A CPU whose daemon is dead or draining is served by the nearest live one: SMT \
        sibling, same last-level cache, same NUMA node, any.",
    after_long_help = "Examples:\n  \
        cpubond steer list\n  \
        Take CPU 3 out of service, later back:\n    \
          cpubond steer drain web 3\n    \
          cpubond steer undrain web 3\n  \
        End a service, or what is left of one whose \"cpubond run\" was killed:\n    \
          cpubond steer del web"
)]
pub enum SteerCommand {
    /// Show services, their daemons, and which CPUs' flows each takes
    ///
    /// What the kernel has that is not as it should be is a warning, and the exit code is then 3.
    List {
        /// The service to show [default: all]
        name: Option<String>,
        /// Print JSON (schema 1)
        #[arg(short, long)]
        json: bool,
    },
    /// End a service: stop its daemons, remove all traces of the steering
    Del {
        /// The service's name
        name: String,
    },
    /// Send no new flows to the daemon of a CPU; those it has stay
    Drain {
        /// The service's name
        name: String,
        /// The daemon's CPU
        cpu: u32,
    },
    /// Send new flows to the daemon of a CPU again
    Undrain {
        /// The service's name
        name: String,
        /// The daemon's CPU
        cpu: u32,
    },
}

impl SteerCommand {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        match self {
            Self::List { name, json } => list::run(&host, name.as_deref(), *json),
            Self::Del { name } => {
                remove(&host, name)?;
                println!("{name}: deleted");
                Ok(())
            }
            Self::Drain { name, cpu } => change(&host, name, Request::Drain(*cpu)),
            Self::Undrain { name, cpu } => change(&host, name, Request::Undrain(*cpu)),
        }
    }
}

fn change(host: &Host, name: &str, request: Request) -> Result<()> {
    let missing = || Error::new(name, "no such service").fix("\"cpubond steer list\" lists them");
    State::load(host, name)?.ok_or_else(missing)?;
    match Lock::take(host, name)? {
        Some(_lock) => Err(
            Error::new(name, "its \"cpubond run\" has ended").fix(format_args!(
                "\"cpubond steer del {name}\" removes what it left"
            )),
        ),
        None => control::ask(host, name, request),
    }
}

/// A way to steer. Each method has its file in `steer/`.
pub trait Steer {
    /// For every possible CPU the instance that takes new flows received there (already the
    /// nearest live one for a CPU whose own is dead or draining); empty if none is live. Replaces
    /// the whole table at once; idempotent.
    fn route(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<()>;

    /// `instance`, which `route` has left out before, is dead (not draining): let go of flows that
    /// are held to it, so that their next packets go to another. Most methods hold none.
    fn forget(&mut self, service: &Service, instance: &Instance) -> Result<()> {
        let _ = (service, instance);
        Ok(())
    }

    /// Whether somebody else has changed what `route` made of `table`. Asked about once a second,
    /// so it must cost little when nothing has.
    fn is_disturbed(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<bool> {
        let _ = (service, table);
        Ok(false)
    }

    /// Remove all traces; fine if there is none.
    fn remove(&mut self, service: &Service) -> Result<()>;

    /// What the kernel has that is not what `route` would make of `table`: a line each, none if
    /// it is as it should be. Writes nothing.
    fn differences(
        &mut self,
        service: &Service,
        table: &BTreeMap<u32, Instance>,
    ) -> Result<Vec<String>>;
}

impl Method {
    /// Ready to steer, nothing changed yet.
    pub fn open(self, host: &Host) -> Result<Box<dyn Steer>> {
        Ok(match self {
            Self::Nat => Box::<nat::Nat>::default(),
            Self::SkLookup => Box::new(sk_lookup::SkLookup::open(host)?),
            Self::Reuseport => Box::new(reuseport::Reuseport::open(host)),
        })
    }

    /// Whether it can steer this protocol.
    pub fn check(self, protocol: Protocol) -> Result<()> {
        match (self, protocol) {
            (Self::SkLookup, Protocol::Udp) => Err(Error::new(
                self,
                "steers TCP only: the replies of a UDP daemon would come from its own port, not \
                 from the public one",
            )
            .fix("use --steer nat, or reuseport if the daemon sets SO_REUSEPORT")
            .exit(Exit::Unsupported)),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::SkLookup => "sk_lookup",
            Self::Reuseport => "reuseport",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// For each CPU the live instance that takes its new flows: its own, else the nearest by SMT
/// sibling, last-level cache, NUMA node, any. Of several as near the one that has the fewest CPUs
/// so far, then the lowest: the same input gives the same table. Empty if there is no instance.
pub fn table(cpus: &[Cpu], live: &[Instance]) -> BTreeMap<u32, Instance> {
    let place = |id: u32| cpus.iter().find(|cpu| cpu.id == id);
    let mut load: BTreeMap<u32, usize> = live.iter().map(|instance| (instance.cpu, 0)).collect();
    let mut ids: Vec<&Cpu> = cpus.iter().collect();
    // CPUs with an instance of their own first: the others then see how busy these are.
    ids.sort_by_key(|cpu| (!load.contains_key(&cpu.id), cpu.id));
    ids.into_iter()
        .filter_map(|cpu| {
            let nearest = live.iter().min_by_key(|instance| {
                (
                    distance(cpu, place(instance.cpu), instance.cpu),
                    load[&instance.cpu],
                    instance.cpu,
                )
            })?;
            *load.entry(nearest.cpu).or_default() += 1;
            Some((cpu.id, nearest.clone()))
        })
        .collect()
}

/// For each CPU of the table the CPUs whose instances may take its new flows, in this order: the
/// table's choice, then the others, the nearest first. For methods whose kernel side can tell by
/// itself that an instance is gone.
fn candidates(cpus: &[Cpu], table: &BTreeMap<u32, Instance>) -> BTreeMap<u32, Vec<u32>> {
    let place = |id: u32| cpus.iter().find(|cpu| cpu.id == id);
    let all: BTreeSet<u32> = table.values().map(|instance| instance.cpu).collect();
    table
        .iter()
        .map(|(&id, chosen)| {
            let mut list: Vec<u32> = all.iter().copied().collect();
            list.sort_by_key(|&to| {
                let far = place(id).map_or(4, |from| distance(from, place(to), to));
                (to != chosen.cpu, far, to)
            });
            (id, list)
        })
        .collect()
}

/// `now` as it is to be told while the kernel's table is still that of `before`: a daemon that
/// was not live then takes no flows yet.
pub fn before_routing(before: &[Daemon], now: &[Daemon]) -> Vec<Daemon> {
    let was_live = |cpu| {
        before
            .iter()
            .any(|daemon| daemon.cpu == cpu && daemon.phase == Phase::Live)
    };
    now.iter()
        .cloned()
        .map(|daemon| match daemon.phase {
            Phase::Live if !was_live(daemon.cpu) => Daemon {
                phase: Phase::Starting,
                ..daemon
            },
            _ => daemon,
        })
        .collect()
}

/// 0 the CPU itself, 1 SMT sibling, 2 same last-level cache, 3 same node, 4 any.
fn distance(from: &Cpu, to: Option<&Cpu>, id: u32) -> u8 {
    match to {
        _ if from.id == id => 0,
        Some(to) if to.core == from.core => 1,
        Some(to) if to.llc == from.llc => 2,
        Some(to) if to.node.is_some() && to.node == from.node => 3,
        _ => 4,
    }
}

/// What a service may be called.
pub const NAME: &str = "1 to 32 letters, digits, '-' and '_', the first a letter or digit";

/// The name of a service becomes part of file names and of names of kernel objects.
pub fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    name.len() <= 32
        && name.chars().all(good)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// As an error.
pub fn check_name(name: &str) -> Result<()> {
    match is_name(name) {
        true => Ok(()),
        false => Err(Error::new(format_args!("'{name}'"), "no name of a service")
            .fix(format_args!("use {NAME}"))
            .exit(Exit::Usage)),
    }
}

/// Where a daemon is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Runs, but does not listen yet, or no flows are steered to it yet.
    Starting,
    /// Listens and takes new flows: the kernel's table leads to it.
    Live,
    /// Keeps its flows, takes no new ones.
    Draining,
    /// Has ended and waits to be started again.
    Down,
    /// Has ended too often.
    #[serde(rename = "given up")]
    GivenUp,
}

/// A daemon as `cpubond steer list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    pub cpu: u32,
    pub port: u16,
    /// `None` when it is down.
    pub pid: Option<u32>,
    pub phase: Phase,
    /// How often it was started again.
    pub restarts: u32,
}

/// What `cpubond run` has set up for one service: `/run/cpubond/steer/NAME.json`, written before
/// the kernel's table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub schema: u32,
    #[serde(flatten)]
    pub service: Service,
    pub steer: Method,
    /// The `cpubond run` that supervises it; it holds the lock on `NAME.lock` while it lives.
    pub supervisor: u32,
    pub daemons: Vec<Daemon>,
    /// As last given to [`Steer::route`].
    pub table: BTreeMap<u32, Instance>,
}

impl State {
    pub fn new(service: Service, steer: Method) -> Self {
        Self {
            schema: SCHEMA,
            service,
            steer,
            supervisor: std::process::id(),
            daemons: Vec::new(),
            table: BTreeMap::new(),
        }
    }

    fn dir(host: &Host) -> PathBuf {
        host.run.join("steer")
    }

    /// `/run/cpubond/steer/NAME.EXTENSION`
    pub fn path(host: &Host, name: &str, extension: &str) -> PathBuf {
        Self::dir(host).join(format!("{name}.{extension}"))
    }

    /// Names of the services there are, sorted.
    pub fn names(host: &Host) -> Vec<String> {
        host::names(&Self::dir(host))
            .into_iter()
            .filter_map(|file| file.strip_suffix(".json").map(str::to_string))
            .collect()
    }

    /// `None` if there is no such service.
    pub fn load(host: &Host, name: &str) -> Result<Option<Self>> {
        check_name(name)?;
        let path = Self::path(host, name, "json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::new(path.display(), error)),
        };
        let state: Self = serde_json::from_slice(&text).map_err(|error| {
            Error::new(
                path.display(),
                format_args!("not a steering state: {error}"),
            )
            .fix("delete the file, and what it stood for by hand")
        })?;
        match state.schema == SCHEMA && state.service.name == name {
            true => Ok(Some(state)),
            false => Err(Error::new(
                path.display(),
                format_args!(
                    "state of {}, schema {}; this is schema {SCHEMA}",
                    state.service.name, state.schema
                ),
            )
            .fix("use the cpubond that wrote it")),
        }
    }

    /// Replace the file as a whole, so that a crash leaves the old state or the new one.
    pub fn save(&self, host: &Host) -> Result<()> {
        let path = Self::path(host, &self.service.name, "json");
        let new = path.with_extension("json.new");
        let save = || -> io::Result<()> {
            fs::create_dir_all(Self::dir(host))?;
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        save().map_err(|error| unwritable(&path, &error))
    }
}

/// Held by the `cpubond run` of a service for as long as it lives, and by who tidies up after one
/// that was killed.
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// `None` if somebody has it.
    pub fn take(host: &Host, name: &str) -> Result<Option<Self>> {
        let path = State::path(host, name, "lock");
        let unwritable = |error: io::Error| unwritable(&path, &error);
        fs::create_dir_all(State::dir(host)).map_err(unwritable)?;
        let mut tries = 0;
        loop {
            let file = File::create(&path).map_err(unwritable)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // `is_held` has it for a moment.
                Err(Errno::WOULDBLOCK) if tries < 5 => {
                    tries += 1;
                    thread::sleep(Duration::from_millis(20));
                    continue;
                }
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(unwritable(error.into())),
            }
            // Who had it before deletes the file: a lock on a deleted one keeps nobody out.
            let same = fs::metadata(&path)
                .and_then(|there| Ok(there.ino() == file.metadata()?.ino()))
                .unwrap_or(false);
            if same {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Lock {
    /// Whether somebody has it. Needs no privilege, leaves nothing behind.
    pub fn is_held(host: &Host, name: &str) -> bool {
        File::open(State::path(host, name, "lock")).is_ok_and(|file| {
            flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still held. Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

/// Remove what a `cpubond run` that is no more has left: in the kernel, then in `/run`.
pub fn clean(host: &Host, state: &State) -> Result<()> {
    state.steer.open(host)?.remove(&state.service)?;
    for extension in ["sock", "json"] {
        let path = State::path(host, &state.service.name, extension);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(unwritable(&path, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// End a service: its supervisor stops the daemons and removes the steering; what a supervisor
/// that was killed has left is removed here.
pub fn remove(host: &Host, name: &str) -> Result<()> {
    let missing = || Error::new(name, "no such service").fix("\"cpubond steer list\" lists them");
    let state = State::load(host, name)?.ok_or_else(missing)?;
    match Lock::take(host, name)? {
        Some(_lock) => clean(host, &state),
        None => control::ask(host, name, Request::Stop),
    }
}

/// What [`remove_all`] has done.
#[derive(Debug, Default)]
pub struct Removed {
    pub names: Vec<String>,
    pub errors: Vec<Error>,
}

/// End every service there is, past errors. For `cpubond undo`.
pub fn remove_all(host: &Host) -> Removed {
    let mut removed = Removed::default();
    for name in State::names(host) {
        match remove(host, &name) {
            Ok(()) => removed.names.push(name),
            Err(error) => removed.errors.push(error),
        }
    }
    removed
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = Error::new(path.display(), format_args!("cannot be written: {error}"));
    match denied {
        true => error.fix("run as root"),
        false => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;
    use proptest::prelude::*;

    fn cpu(id: u32, node: u32, llc: u32, core: u32) -> Cpu {
        Cpu {
            id,
            node: Some(node),
            llc,
            core,
        }
    }

    fn instance(cpu: u32) -> Instance {
        Instance {
            cpu,
            port: 8000 + u16::try_from(cpu).unwrap(),
            pid: 100 + cpu,
            sockets: vec![u64::from(cpu)],
        }
    }

    /// Which CPU's instance each CPU has.
    fn chosen(cpus: &[Cpu], live: &[u32]) -> Vec<(u32, u32)> {
        let live: Vec<Instance> = live.iter().map(|&cpu| instance(cpu)).collect();
        table(cpus, &live)
            .into_iter()
            .map(|(cpu, instance)| (cpu, instance.cpu))
            .collect()
    }

    /// Two nodes of two caches of two cores of two threads.
    fn big() -> Vec<Cpu> {
        (0..16)
            .map(|id| cpu(id, id / 8, id / 4 * 4, id / 2 * 2))
            .collect()
    }

    #[test]
    fn nearest_first() {
        let all: Vec<u32> = (0..16).collect();
        for (cpu, to) in chosen(&big(), &all) {
            assert_eq!(cpu, to);
        }
        let at = |live: &[u32], cpu: usize| chosen(&big(), live)[cpu].1;
        assert_eq!(at(&[1, 2, 4, 8], 0), 1, "SMT sibling");
        assert_eq!(at(&[2, 4, 8], 0), 2, "last-level cache");
        assert_eq!(at(&[4, 8], 0), 4, "node");
        assert_eq!(at(&[8], 0), 8, "any");
        assert!(chosen(&big(), &[]).is_empty());
    }

    #[test]
    fn is_live_when_routed_to() {
        use Phase::{Down, Draining, Live, Starting};
        let daemons = |phases: &[Phase]| -> Vec<Daemon> {
            (0..)
                .zip(phases)
                .map(|(cpu, &phase)| Daemon {
                    cpu,
                    port: 8000,
                    pid: Some(100 + cpu),
                    phase,
                    restarts: 0,
                })
                .collect()
        };
        let told = |before: &[Phase], now: &[Phase]| -> Vec<Phase> {
            let told = before_routing(&daemons(before), &daemons(now));
            told.into_iter().map(|daemon| daemon.phase).collect()
        };
        assert_eq!(told(&[], &[Live, Starting]), [Starting, Starting]);
        assert_eq!(
            told(&[Live, Draining, Down], &[Live; 3]),
            [Live, Starting, Starting]
        );
        // What takes no flows any more is told at once.
        assert_eq!(
            told(&[Live; 3], &[Down, Draining, Live]),
            [Down, Draining, Live]
        );
    }

    #[test]
    fn the_nearest_are_next() {
        let live: Vec<Instance> = [1, 2, 4, 8].into_iter().map(instance).collect();
        let mut table = table(&big(), &live);
        let list = candidates(&big(), &table);
        assert_eq!(list.len(), 16);
        assert_eq!(list[&0], [1, 2, 4, 8]);
        assert_eq!(list[&5], [4, 1, 2, 8]);
        assert_eq!(list[&15], [8, 1, 2, 4]);
        // The table's choice goes first, near or not.
        table.insert(0, instance(8));
        assert_eq!(candidates(&big(), &table)[&0], [8, 1, 2, 4]);
        assert!(candidates(&big(), &BTreeMap::new()).is_empty());
    }

    #[test]
    fn no_udp_without_its_port() {
        let error = Method::SkLookup.check(Protocol::Udp).unwrap_err();
        assert_eq!(error.exit, Exit::Unsupported);
        assert!(error.to_string().contains("--steer nat"));
        Method::Reuseport.check(Protocol::Udp).unwrap();
    }

    #[test]
    fn those_without_their_own_are_spread() {
        // One cache: the dead ones' CPUs go to different neighbours.
        let flat: Vec<Cpu> = (0..4).map(|id| cpu(id, 0, 0, id)).collect();
        assert_eq!(chosen(&flat, &[0, 2]), [(0, 0), (1, 0), (2, 2), (3, 2)]);
        assert_eq!(chosen(&flat, &[0, 2, 3]), [(0, 0), (1, 0), (2, 2), (3, 3)]);
    }

    #[test]
    fn names() {
        for name in ["web", "a", "dns-2", "0_x"] {
            check_name(name).unwrap();
        }
        for name in [
            "",
            ".",
            "../x",
            "-a",
            "a b",
            "ä",
            "a.b",
            "a/b",
            &"x".repeat(33),
        ] {
            assert_eq!(check_name(name).unwrap_err().exit, Exit::Usage, "{name}");
        }
    }

    #[test]
    fn state_round_trips() {
        let fake = Fake::new();
        let host = fake.host();
        assert!(State::load(&host, "web").unwrap().is_none());
        let service = Service {
            name: "web".to_string(),
            protocol: Protocol::Tcp,
            port: 80,
        };
        let mut state = State::new(service, Method::SkLookup);
        state.table.insert(3, instance(1));
        state.save(&host).unwrap();
        assert_eq!(State::names(&host), ["web"]);
        assert_eq!(State::load(&host, "web").unwrap().unwrap(), state);
        fake.file("run/steer/other.json", &fake.text("run/steer/web.json"));
        assert!(State::load(&host, "other").is_err(), "the wrong name");
        fake.file("run/steer/web.json", "{}");
        assert!(State::load(&host, "web").is_err());
    }

    proptest! {
        #[test]
        fn every_cpu_has_a_nearest_one(live in prop::collection::btree_set(0u32..16, 1..16)) {
            let cpus = big();
            let live: Vec<Instance> = live.into_iter().map(instance).collect();
            let table = table(&cpus, &live);
            prop_assert_eq!(table.len(), cpus.len());
            for cpu in &cpus {
                let far = |to: u32| distance(cpu, cpus.iter().find(|cpu| cpu.id == to), to);
                let nearest = live.iter().map(|instance| far(instance.cpu)).min().unwrap();
                prop_assert_eq!(far(table[&cpu.id].cpu), nearest);
            }
            let mut turned = live.clone();
            turned.reverse();
            prop_assert_eq!(table, super::table(&cpus, &turned));
        }
    }
}
