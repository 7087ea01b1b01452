//! Steering by `sk_lookup`: a BPF program that the kernel asks for the listener of a new
//! connection names that of the CPU it runs on, which is the one that received it. Nothing is
//! rewritten and nothing tracked: the connection has the public port at both ends.
//!
//! The program and its maps are pinned in `/sys/fs/bpf/cpubond/NAME/`: others can see them, and they
//! stay if `cpubond run` is killed, until `cpubond steer del` removes them.

use super::bpf::refused;
use super::{Instance, Method, Service, Steer, candidates, socket};
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::topology::{self, Cpu};
use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError};
use aya::programs::links::{FdLink, LinkType, PinnedLink};
use aya::programs::{ProgramInfo, SkLookup as Program};
use aya::{EbpfLoader, include_bytes_aligned};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{ipv6_v6only, socket_cookie, socket_domain};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sk_lookup.bpf.o"));

/// As in `bpf/sk_lookup.bpf.c`.
const CANDIDATES: usize = 64;
const NONE: u16 = u16::MAX;
const BPF_F_INNER_MAP: u32 = 1 << 12;
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// CPUs whose instances take the connections of one CPU, in order, then `NONE`.
type Row = [u16; CANDIDATES];
type Table = Array<MapData, Row>;
/// File descriptors go in, cookies come out.
type Slots = HashMap<MapData, u32, u64>;

/// Steers the TCP connections of one service.
pub struct SkLookup {
    /// All possible ones.
    cpus: Vec<Cpu>,
    /// A directory of a BPF file system.
    pins: PathBuf,
    maps: Option<Maps>,
}

struct Maps {
    listeners: Slots,
    tables: ArrayOfMaps<MapData, Table>,
}

/// Of IPv4, of IPv6.
type Families<T> = [T; 2];

impl SkLookup {
    /// Reads the possible CPUs and what they share, once.
    pub fn open(host: &Host) -> Result<Self> {
        Ok(Self {
            pins: host.sys.join("fs/bpf"),
            cpus: topology::possible(host)?,
            maps: None,
        })
    }

    /// `cpubond` in the BPF file system, or why there is none.
    fn root(&self) -> Result<PathBuf> {
        let found = rustix::fs::statfs(&self.pins)
            .map_err(|error| Error::new(self.pins.display(), error))?;
        match found.f_type == BPF_FS_MAGIC {
            true => Ok(self.pins.join("cpubond")),
            false => Err(
                Error::new(self.pins.display(), "no BPF file system is mounted there")
                    .fix(format_args!("mount -t bpf bpf {}", self.pins.display()))
                    .exit(Exit::Unsupported),
            ),
        }
    }

    fn rows(&self, table: &BTreeMap<u32, Instance>) -> Vec<Row> {
        let last = self.cpus.iter().map(|cpu| cpu.id).max().unwrap_or(0);
        rows(&candidates(&self.cpus, table), last + 1)
    }

    /// Load the program and fill its maps, pin all, attach the program.
    fn install(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<()> {
        let rows = self.rows(table);
        let root = self.root()?;
        let dir = root.join(&service.name);
        unpin(&dir)?;
        fs::create_dir_all(&dir).map_err(|error| Error::new(dir.display(), error))?;

        let mut bpf = EbpfLoader::new()
            .override_global("port", &u32::from(service.port), true)
            .map_max_entries(
                "listeners",
                2 * u32::try_from(rows.len()).unwrap_or(u32::MAX),
            )
            .load(OBJECT)
            .map_err(|error| refused("sk_lookup", &error))?;
        for name in ["listeners", "tables"] {
            if let Some(map) = bpf.map(name) {
                map.pin(dir.join(name))
                    .map_err(|error| refused(dir.display(), &error))?;
            }
        }
        let mut maps = Maps::new(bpf.take_map("listeners"), bpf.take_map("tables"))?;
        maps.fill(&rows, table)?;

        let program: &mut Program = bpf
            .program_mut("cpubond_lookup")
            .ok_or_else(|| Error::new("sk_lookup", "no such program in the object"))?
            .try_into()
            .map_err(|error| refused("sk_lookup", &error))?;
        program
            .load()
            .map_err(|error| refused("sk_lookup", &error))?;
        program
            .pin(dir.join("program"))
            .map_err(|error| refused(dir.display(), &error))?;
        let netns = "/proc/self/ns/net";
        let netns = File::open(netns).map_err(|error| Error::new(netns, error))?;
        let link = program
            .attach(netns)
            .and_then(|id| program.take_link(id))
            .map_err(|error| refused("network namespace", &error))?;
        FdLink::from(link)
            .pin(dir.join("link"))
            .map_err(|error| refused(dir.display(), &error))?;

        self.maps = Some(maps);
        Ok(())
    }
}

impl Steer for SkLookup {
    fn route(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<()> {
        Method::SkLookup.check(service.protocol)?;
        let rows = self.rows(table);
        match &mut self.maps {
            None => self.install(service, table),
            Some(maps) => maps.fill(&rows, table),
        }
    }

    fn remove(&mut self, service: &Service) -> Result<()> {
        self.maps = None;
        let Ok(root) = self.root() else {
            // Without a BPF file system there can be no pins, and without pins no program.
            return Ok(());
        };
        unpin(&root.join(&service.name))?;
        // Other services may have theirs in it.
        match fs::remove_dir(&root) {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Err(Error::new(root.display(), error))
            }
            _ => Ok(()),
        }
    }

    fn differences(
        &mut self,
        service: &Service,
        table: &BTreeMap<u32, Instance>,
    ) -> Result<Vec<String>> {
        let dir = self.root()?.join(&service.name);
        if !dir.exists() {
            return Ok(vec![format!("{}: the program is gone", dir.display())]);
        }
        let mut found = Vec::new();
        found.extend(attachment(&dir)?);
        let open = |name: &str| {
            MapData::from_pin(dir.join(name)).map_err(|error| refused(dir.display(), &error))
        };
        let maps = Maps::new(
            Some(Map::SockMap(open("listeners")?)),
            Some(Map::ArrayOfMaps(open("tables")?)),
        )?;
        found.extend(maps.differences(&self.rows(table), table)?);
        Ok(found)
    }
}

impl Maps {
    fn new(listeners: Option<Map>, tables: Option<Map>) -> Result<Self> {
        let (Some(Map::SockMap(listeners)), Some(tables)) = (listeners, tables) else {
            return Err(Error::new("sk_lookup", "no such maps in the object"));
        };
        let maps = || -> std::result::Result<Self, MapError> {
            Ok(Self {
                // aya has a type for sockmaps of descriptors only, which cannot be read back.
                // With 8 bytes a value it is to the system calls what a hash map is.
                listeners: Map::HashMap(listeners).try_into()?,
                tables: tables.try_into()?,
            })
        };
        maps().map_err(|error| refused("sk_lookup", &error))
    }

    /// Put in the listeners that the table needs, replace the table, take out the others.
    fn fill(&mut self, rows: &[Row], table: &BTreeMap<u32, Instance>) -> Result<()> {
        let mut used = BTreeSet::new();
        for instance in instances(table).values() {
            for (slot, listener) in slots(instance, &listeners(instance)?) {
                if let Some(listener) = listener {
                    self.put(slot, listener)?;
                    used.insert(slot);
                }
            }
        }
        let write = |error: MapError| refused("sk_lookup table", &error);
        let fresh_len = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let mut fresh = Table::create(fresh_len, BPF_F_INNER_MAP).map_err(write)?;
        for (cpu, row) in (0..).zip(rows) {
            fresh.set(cpu, *row, 0).map_err(write)?;
        }
        // The kernel waits for programs that still use the one before.
        self.tables.set(0, &fresh, 0).map_err(write)?;
        for slot in 0..2 * fresh_len {
            if !used.contains(&slot) {
                match self.listeners.remove(&slot) {
                    Err(error) if !is_missing(&error) => return Err(write(error)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, slot: u32, listener: &OwnedFd) -> Result<()> {
        let number = u64::try_from(listener.as_raw_fd()).unwrap_or(u64::MAX);
        let cookie = cookie(listener)?;
        // Writing the same socket again would be harmless, but not free.
        if self.cookie(slot)? == Some(cookie) {
            return Ok(());
        }
        self.listeners.insert(slot, number, 0).map_err(|error| {
            let is_other = is_errno(&error, &[libc::EOPNOTSUPP]);
            let error = refused(format_args!("listener of CPU {}", slot / 2), &error);
            match is_other {
                true => error.fix(
                    "not a plain TCP listener (of Multipath TCP, perhaps; programs in Go: \
                     GODEBUG=multipathtcp=0), use --steer nat",
                ),
                false => error,
            }
        })
    }

    fn cookie(&self, slot: u32) -> Result<Option<u64>> {
        match self.listeners.get(&slot, 0) {
            Ok(cookie) => Ok(Some(cookie)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(refused(format_args!("sk_lookup slot {slot}"), &error)),
        }
    }

    fn differences(&self, rows: &[Row], table: &BTreeMap<u32, Instance>) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut wanted: BTreeMap<u32, u64> = BTreeMap::new();
        for instance in instances(table).values() {
            for (slot, listener) in slots(instance, &listeners(instance)?) {
                if let Some(listener) = listener {
                    wanted.insert(slot, cookie(listener)?);
                }
            }
        }
        for slot in 0..2 * u32::try_from(rows.len()).unwrap_or(u32::MAX) {
            let (has, wants) = (self.cookie(slot)?, wanted.get(&slot).copied());
            if has != wants {
                let family = ["IPv4", "IPv6"][slot as usize % 2];
                found.push(format!(
                    "CPU {}, {family}: has {}, not {}",
                    slot / 2,
                    Socket(has),
                    Socket(wants)
                ));
            }
        }
        let read = |error: MapError| refused("sk_lookup table", &error);
        let table = self.tables.get(&0, 0).map_err(read)?;
        for (cpu, row) in (0..).zip(rows) {
            let has = table.get(&cpu, 0).map_err(read)?;
            if has != *row {
                found.push(format!(
                    "CPU {cpu}: its connections go to the instances of CPUs {:?}, not {:?}",
                    cpus(&has),
                    cpus(row)
                ));
            }
        }
        Ok(found)
    }
}

/// Shown as a cookie, or as nothing.
struct Socket(Option<u64>);

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(cookie) => write!(f, "socket {cookie}"),
            None => write!(f, "no socket"),
        }
    }
}

/// A row for each CPU up to the last possible one. Numbers may be left out in the table; what the
/// kernel does not have can have any row.
fn rows(candidates: &BTreeMap<u32, Vec<u32>>, possible: u32) -> Vec<Row> {
    let any = candidates.values().next();
    (0..possible)
        .map(|cpu| {
            let mut row = [NONE; CANDIDATES];
            let list = candidates.get(&cpu).or(any).into_iter().flatten();
            for (place, &cpu) in row.iter_mut().zip(list) {
                *place = u16::try_from(cpu).unwrap_or(NONE);
            }
            row
        })
        .collect()
}

fn cpus(row: &Row) -> Vec<u16> {
    row.iter().copied().take_while(|&cpu| cpu != NONE).collect()
}

/// Each instance of the table once, by its CPU.
fn instances(table: &BTreeMap<u32, Instance>) -> BTreeMap<u32, &Instance> {
    table
        .values()
        .map(|instance| (instance.cpu, instance))
        .collect()
}

/// A listening socket, and the slots that it can serve.
struct Listener {
    socket: OwnedFd,
    serves: Families<bool>,
}

/// The kernel gives no IPv6 connection to an IPv4 socket, and none of IPv4 to an IPv6 socket with
/// IPV6_V6ONLY; without, one socket serves both.
fn listeners(instance: &Instance) -> Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for socket in socket::listeners(instance)? {
        let serves = || -> rustix::io::Result<Families<bool>> {
            let is_v6 = socket_domain(&socket)? == AddressFamily::INET6;
            Ok([!is_v6 || !ipv6_v6only(&socket)?, is_v6])
        };
        let serves = serves()
            .map_err(|error| Error::new(format_args!("process {}", instance.pid), error))?;
        listeners.push(Listener { socket, serves });
    }
    // A socket of one family only goes before one of both.
    listeners.sort_by_key(|listener| listener.serves == [true, true]);
    Ok(listeners)
}

/// Each slot of the instance, with its listener if it has one.
fn slots<'a>(instance: &Instance, listeners: &'a [Listener]) -> Vec<(u32, Option<&'a OwnedFd>)> {
    [0, 1]
        .into_iter()
        .map(|family| {
            let listener = listeners.iter().find(|listener| listener.serves[family]);
            (
                2 * instance.cpu + family as u32,
                listener.map(|listener| &listener.socket),
            )
        })
        .collect()
}

fn cookie(socket: &OwnedFd) -> Result<u64> {
    socket_cookie(socket).map_err(|error| Error::new("cookie of a listener", error))
}

fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound) || is_errno(error, &[libc::ENOENT, libc::EINVAL])
}

fn is_errno(error: &MapError, numbers: &[i32]) -> bool {
    let MapError::SyscallError(error) = error else {
        return false;
    };
    let number = error.io_error.raw_os_error();
    number.is_some_and(|number| numbers.contains(&number))
}

/// Whether the link that is pinned there runs the program that is.
fn attachment(dir: &Path) -> Result<Option<String>> {
    let link = PinnedLink::from_pin(dir.join("link"))
        .and_then(|link| FdLink::from(link).info())
        .map_err(|error| refused(dir.display(), &error))?;
    let program = ProgramInfo::from_pin(dir.join("program"))
        .map_err(|error| refused(dir.display(), &error))?;
    let is_ours = link.link_type().is_ok_and(|kind| kind == LinkType::Netns)
        && link.program_id() == program.id();
    Ok((!is_ours).then(|| format!("{}: the link is not of the program", dir.display())))
}

/// Remove the pins, the link's first, which detaches the program.
fn unpin(dir: &Path) -> Result<()> {
    let fine = |path: &Path, result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::new(path.display(), error))
        }
        _ => Ok(()),
    };
    if let Ok(link) = PinnedLink::from_pin(dir.join("link")) {
        // Held until the file is gone: the kernel detaches when the last of both goes, and of
        // the two only closing waits for it.
        fine(dir, link.unpin().map(drop))?;
    }
    for name in host::names(dir) {
        fine(&dir.join(&name), fs::remove_file(dir.join(&name)))?;
    }
    fine(dir, fs::remove_dir(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_row_for_each_cpu_there_may_be() {
        let candidates = BTreeMap::from([(1, vec![1, 3]), (2, vec![3, 1]), (3, vec![3, 1])]);
        let rows = rows(&candidates, 6);
        let rows: Vec<Vec<u16>> = rows.iter().map(cpus).collect();
        assert_eq!(rows[1..4], [vec![1, 3], vec![3, 1], vec![3, 1]]);
        assert_eq!(
            [&rows[0], &rows[4], &rows[5]],
            [&vec![1, 3]; 3],
            "no such CPU"
        );
        let many = BTreeMap::from([(0, (0..100).collect())]);
        assert_eq!(cpus(&super::rows(&many, 1)[0]), (0..64).collect::<Vec<_>>());
        assert!(cpus(&super::rows(&BTreeMap::new(), 1)[0]).is_empty());
    }

    #[test]
    fn a_slot_for_each_family() {
        let of = |sockets: &[&str]| {
            let sockets: Vec<TcpListener> = sockets
                .iter()
                .map(|address| TcpListener::bind(address).unwrap())
                .collect();
            let instance = Instance {
                cpu: 3,
                port: 1,
                pid: std::process::id(),
                sockets: sockets
                    .iter()
                    .map(|socket| rustix::fs::fstat(socket).unwrap().st_ino)
                    .collect(),
            };
            let listeners = listeners(&instance).unwrap();
            slots(&instance, &listeners)
                .into_iter()
                .map(|(slot, socket)| (slot, socket.map(|socket| socket_domain(socket).unwrap())))
                .collect::<Vec<_>>()
        };
        let (v4, v6) = (Some(AddressFamily::INET), Some(AddressFamily::INET6));
        assert_eq!(of(&["127.0.0.1:0"]), [(6, v4), (7, None)]);
        assert_eq!(of(&["[::]:0"]), [(6, v6), (7, v6)]);
        assert_eq!(of(&["[::1]:0"]), [(6, None), (7, v6)]);
        assert_eq!(of(&["[::]:0", "127.0.0.1:0"]), [(6, v4), (7, v6)]);
        assert_eq!(of(&[]), [(6, None), (7, None)]);
    }
}
