//! Steering by `reuseport`: all daemons listen on the public port with SO_REUSEPORT, and a classic
//! BPF program, attached to the group of these sockets, picks one by the CPU that runs it.
//!
//! The program gives an index into the group's array, which the kernel keeps in the order of
//! listen() (TCP) or bind() (UDP), but for this: when a member closes the last one takes its place
//! at once. So the array never has a dead socket, and an index beyond its end means that the
//! kernel picks a member by hash: between the death of a daemon and the next table some flows come
//! to the wrong CPU, none to nobody. Which socket has which index is read from the kernel (see
//! `bpf/reuseport.bpf.c`), before and after the program is attached, until both are the same.
//!
//! What a daemon that dies has not accepted yet would be reset; with net.ipv4.tcp_migrate_req it
//! moves to another member. It is set here, and put back with the last service that needs it.

use super::bpf::refused;
use super::socket::{self, Place};
use super::{Instance, Protocol, Service, State, Steer, candidates};
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::topology;
use aya::programs::{Iter, SkReuseport};
use aya::{Btf, Ebpf, EbpfLoader, include_bytes_aligned};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/reuseport.bpf.o"));

/// As in `bpf/reuseport.bpf.c`.
const NO_GROUP: u32 = u32::MAX;
const END: u32 = u32::MAX - 1;
const RECORD: usize = 16;
const INSTRUCTION: usize = 8;

/// Daemons that come and go while a program is attached make another attempt necessary.
const ATTEMPTS: u32 = 20;

/// Two instructions a CPU: so many fit in what the kernel lets us read back (32 KiB).
const MAX_CPUS: usize = 2000;

/// An instruction of classic BPF: operation, how many to skip if true, if not, operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// The place from which a load gives the CPU that runs the program.
const CPU: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_CPU) as u32;
/// No group is so large: the kernel picks by hash.
const BY_HASH: u32 = u32::MAX;

/// A socket on the public port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    inode: u64,
    /// The kernel's number of the group, and the index in its array.
    group: Option<(u32, u16)>,
    /// The classic program of its group; empty if there is none.
    program: Vec<Instruction>,
}

/// Steers the flows of one service to the sockets of a SO_REUSEPORT group.
pub struct Reuseport {
    host: Host,
    /// The loaded reader, and the port it is for.
    reader: Option<(Ebpf, u16)>,
}

impl Reuseport {
    pub fn open(host: &Host) -> Self {
        Self {
            host: host.clone(),
            reader: None,
        }
    }

    /// Read the groups on the service's port from the kernel, those of other processes too.
    fn members(&mut self, service: &Service) -> Result<Vec<Member>> {
        let (function, kind) = match service.protocol {
            Protocol::Tcp => ("cpubond_tcp", "tcp"),
            Protocol::Udp => ("cpubond_udp", "udp"),
        };
        let refused =
            |error: &(dyn std::error::Error + 'static)| refused("SO_REUSEPORT groups", error);
        if self
            .reader
            .as_ref()
            .is_none_or(|(_, port)| *port != service.port)
        {
            let mut bpf = EbpfLoader::new()
                .override_global("port", &u32::from(service.port), true)
                .load(OBJECT)
                .map_err(|error| refused(&error))?;
            let btf = Btf::from_sys_fs().map_err(|error| refused(&error))?;
            iterator(&mut bpf, function)?
                .load(kind, &btf)
                .map_err(|error| refused(&error))?;
            self.reader = Some((bpf, service.port));
        }
        let Some((bpf, _)) = &mut self.reader else {
            return Ok(Vec::new());
        };
        let program = iterator(bpf, function)?;
        let link = program
            .attach()
            .and_then(|id| program.take_link(id))
            .map_err(|error| refused(&error))?;
        let mut file = link.into_file().map_err(|error| refused(&error))?;
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 16];
        loop {
            let read = file.read(&mut chunk).map_err(|error| refused(&error))?;
            bytes.extend_from_slice(&chunk[..read]);
            let (members, ended) = parse(&bytes)
                .ok_or_else(|| Error::new("SO_REUSEPORT groups", "cut short by the kernel"))?;
            if ended || read == 0 {
                return Ok(members);
            }
        }
    }

    /// What each group's program is to be, by the group's number, with the members it names.
    fn wanted(
        &self,
        service: &Service,
        table: &BTreeMap<u32, Instance>,
        members: &[Member],
    ) -> Result<BTreeMap<u32, Vec<Instruction>>> {
        let candidates = candidates(&topology::possible(&self.host)?, table);
        if candidates.len() > MAX_CPUS {
            return Err(Error::new(
                "reuseport",
                format_args!("{} CPUs are too many for it", candidates.len()),
            )
            .fix("use --steer sk_lookup")
            .exit(Exit::Unsupported));
        }
        Ok(indexes(service, table, members)?
            .into_iter()
            .map(|(group, indexes)| (group, program(&candidates, &indexes)))
            .collect())
    }

    fn migrate_req(&self) -> PathBuf {
        self.host.proc.join("sys/net/ipv4/tcp_migrate_req")
    }

    /// What net.ipv4.tcp_migrate_req was before the first service set it.
    fn before(&self, name: &str) -> PathBuf {
        State::path(&self.host, name, "tcp_migrate_req")
    }

    /// The other services that need net.ipv4.tcp_migrate_req.
    fn others(&self, name: &str) -> Option<String> {
        let dir = self.before(name);
        host::names(dir.parent()?)
            .into_iter()
            .filter_map(|file| Some(file.strip_suffix(".tcp_migrate_req")?.to_string()))
            .find(|other| other != name)
    }

    fn set_migrate_req(&self, service: &Service) -> Result<()> {
        let (path, before) = (self.migrate_req(), self.before(&service.name));
        if service.protocol != Protocol::Tcp || before.exists() {
            return Ok(());
        }
        // Before 5.14 there is none.
        let Some(mut found) = host::read_if_any(&path) else {
            return Ok(());
        };
        if let Some(other) = self.others(&service.name) {
            found = host::read(&self.before(&other))?;
        }
        let unwritable =
            |path: &PathBuf, error: io::Error| Error::new(path.display(), error).fix("run as root");
        let save = || {
            fs::create_dir_all(before.parent().unwrap_or(&before))?;
            let file = fs::File::create(&before)?;
            fs::write(&before, &found)?;
            file.sync_all()
        };
        save().map_err(|error| unwritable(&before, error))?;
        fs::write(&path, "1\n").map_err(|error| unwritable(&path, error))?;
        match host::read(&path)?.as_str() {
            "1" => Ok(()),
            other => Err(Error::new(
                path.display(),
                format_args!("was written '1' but reads back '{other}'"),
            )),
        }
    }

    /// Restored with the last service that needs it, and only if it is still as we set it.
    fn restore_migrate_req(&self, service: &Service) -> Result<()> {
        let (path, before) = (self.migrate_req(), self.before(&service.name));
        let Some(was) = host::read_if_any(&before) else {
            return Ok(());
        };
        if self.others(&service.name).is_none() && host::read(&path)? == "1" {
            fs::write(&path, was).map_err(|error| Error::new(path.display(), error))?;
        }
        fs::remove_file(&before).map_err(|error| Error::new(before.display(), error))
    }

    /// Take our program off the groups on the service's port.
    fn detach(&mut self, service: &Service) -> Result<()> {
        let place = format!("port {}", service.port);
        for _ in 0..ATTEMPTS {
            let members = self.members(service)?;
            let ours = || members.iter().filter(|member| is_ours(&member.program));
            let inodes: BTreeSet<u64> = ours().map(|member| member.inode).collect();
            if inodes.is_empty() {
                return Ok(());
            }
            let holders = socket::holders(host::numbered(&self.host.proc, ""), &inodes);
            let mut done = BTreeSet::new();
            for member in ours() {
                let Some((group, _)) = member.group.filter(|(group, _)| !done.contains(group))
                else {
                    continue;
                };
                if let Some(socket) = taken(&holders, member.inode)? {
                    SkReuseport::detach(&socket).map_err(|error| refused(&place, &error))?;
                    done.insert(group);
                }
            }
        }
        Err(
            Error::new(place, "its SO_REUSEPORT group keeps our program")
                .fix("it goes when the daemons end"),
        )
    }
}

impl Steer for Reuseport {
    fn route(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<()> {
        self.set_migrate_req(service)?;
        for _ in 0..ATTEMPTS {
            let members = self.members(service)?;
            let wanted = self.wanted(service, table, &members)?;
            let holders = instance_holders(table);
            let mut changed = false;
            for (group, program) in wanted {
                let mut of_group = members.iter().filter(|member| member.is_of(group));
                if of_group.clone().all(|member| member.program == program) {
                    continue;
                }
                changed = true;
                // Any member will do; ours, for another's may go any time.
                let ours = of_group.find(|member| holders.contains_key(&member.inode));
                let Some(member) = ours else { continue };
                if let Some(socket) = taken(&holders, member.inode)? {
                    attach(service, &socket, &program)?;
                }
            }
            if !changed {
                return Ok(());
            }
        }
        Err(Error::new(
            format_args!("port {}", service.port),
            "its SO_REUSEPORT group changes faster than a program can be attached",
        )
        .fix("see what opens and closes sockets there"))
    }

    fn remove(&mut self, service: &Service) -> Result<()> {
        let detached = self.detach(service);
        let restored = self.restore_migrate_req(service);
        self.reader = None;
        detached.and(restored)
    }

    fn differences(
        &mut self,
        service: &Service,
        table: &BTreeMap<u32, Instance>,
    ) -> Result<Vec<String>> {
        let members = self.members(service)?;
        let mut found = Vec::new();
        for (group, program) in self.wanted(service, table, &members)? {
            let Some(member) = members.iter().find(|member| member.is_of(group)) else {
                continue;
            };
            if member.program.is_empty() {
                found.push(format!("port {}: no program picks by CPU", service.port));
            } else if member.program != program {
                found.push(format!(
                    "port {}: the program picks {}, not {}",
                    service.port,
                    picks(&member.program),
                    picks(&program)
                ));
            }
        }
        let there: BTreeSet<u64> = members.iter().map(|member| member.inode).collect();
        let gone: BTreeSet<u32> = table
            .values()
            .filter(|instance| !instance.sockets.iter().any(|inode| there.contains(inode)))
            .map(|instance| instance.cpu)
            .collect();
        found.extend(
            gone.iter()
                .map(|cpu| format!("CPU {cpu}: its daemon does not listen any more")),
        );
        Ok(found)
    }
}

impl Member {
    fn is_of(&self, group: u32) -> bool {
        self.group.is_some_and(|(number, _)| number == group)
    }
}

fn iterator<'a>(bpf: &'a mut Ebpf, function: &str) -> Result<&'a mut Iter> {
    bpf.program_mut(function)
        .ok_or_else(|| Error::new(function, "no such program in the object"))?
        .try_into()
        .map_err(|error| refused(function, &error))
}

/// Where the sockets of the table's instances are open.
fn instance_holders(table: &BTreeMap<u32, Instance>) -> BTreeMap<u64, Place> {
    let inodes = table
        .values()
        .flat_map(|instance| instance.sockets.iter().copied())
        .collect();
    let pids: BTreeSet<u32> = table.values().map(|instance| instance.pid).collect();
    socket::holders(pids, &inodes)
}

fn taken(holders: &BTreeMap<u64, Place>, inode: u64) -> Result<Option<OwnedFd>> {
    match holders.get(&inode) {
        Some(&place) => socket::fetch(place, inode),
        None => Ok(None),
    }
}

fn attach(service: &Service, socket: &OwnedFd, program: &[Instruction]) -> Result<()> {
    let mut filter: Vec<libc::sock_filter> = program
        .iter()
        .map(|&Instruction { code, jt, jf, k }| libc::sock_filter { code, jt, jf, k })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or(u16::MAX),
        filter: filter.as_mut_ptr(),
    };
    setsockopt(socket, sockopt::AttachReusePortCbpf, &program).map_err(|error| {
        let place = format!("port {}", service.port);
        match error {
            nix::Error::EPERM => {
                Error::new(place, "the daemon has locked its filters (SO_LOCK_FILTER)")
                    .fix("use --steer nat")
            }
            error => Error::new(place, format_args!("no program can be attached: {error}"))
                .exit(Exit::Unsupported),
        }
    })
}

/// For each group the index of each instance that has a socket in it, by the instance's CPU.
fn indexes(
    service: &Service,
    table: &BTreeMap<u32, Instance>,
    members: &[Member],
) -> Result<BTreeMap<u32, BTreeMap<u32, u16>>> {
    let mut groups: BTreeMap<u32, BTreeMap<u32, u16>> = BTreeMap::new();
    let instances: BTreeMap<u32, &Instance> = table
        .values()
        .map(|instance| (instance.cpu, instance))
        .collect();
    for (&cpu, instance) in &instances {
        let of_instance = |member: &&Member| instance.sockets.contains(&member.inode);
        for member in members.iter().filter(of_instance) {
            let place = format!("port {}, process {}", service.port, instance.pid);
            let Some((group, index)) = member.group else {
                return Err(Error::new(place, "listens without SO_REUSEPORT")
                    .fix("make the program set it (nginx: \"listen 80 reuseport\"), or use --steer sk_lookup or nat")
                    .exit(Exit::Unsupported));
            };
            if groups
                .entry(group)
                .or_default()
                .insert(cpu, index)
                .is_some()
            {
                return Err(Error::new(
                    place,
                    "listens by several sockets of one SO_REUSEPORT group, of which only one can be its CPU's",
                )
                .fix("let each instance have one worker (nginx: \"worker_processes 1\")")
                .exit(Exit::Unsupported));
            }
        }
    }
    Ok(groups)
}

/// If the CPU is this, return that; for each. Each CPU gets the first of its candidates that is in
/// the group.
fn program(candidates: &BTreeMap<u32, Vec<u32>>, indexes: &BTreeMap<u32, u16>) -> Vec<Instruction> {
    let instruction = |code, jf, k| Instruction { code, jt: 0, jf, k };
    let mut program = vec![instruction(LOAD, 0, CPU)];
    for (&cpu, list) in candidates {
        if let Some(&index) = list.iter().find_map(|cpu| indexes.get(cpu)) {
            program.push(instruction(JUMP_IF_EQUAL, 1, cpu));
            program.push(instruction(RETURN, 0, index.into()));
        }
    }
    program.push(instruction(RETURN, 0, BY_HASH));
    program
}

/// Whether this is a program that [`program`] makes.
fn is_ours(program: &[Instruction]) -> bool {
    let is = |at: usize, code: u16| program.get(at).is_some_and(|step| step.code == code);
    let last = program.len().saturating_sub(1);
    is(0, LOAD)
        && program[0].k == CPU
        && is(last, RETURN)
        && program[last].k == BY_HASH
        && (1..last).all(|at| is(at, if at % 2 == 1 { JUMP_IF_EQUAL } else { RETURN }))
}

/// `CPU:INDEX …`
fn picks(program: &[Instruction]) -> String {
    if !is_ours(program) {
        return "by another's rule".to_string();
    }
    program[1..program.len() - 1]
        .chunks_exact(2)
        .map(|pair| format!("{}:{}", pair[0].k, pair[1].k))
        .collect::<Vec<_>>()
        .join(" ")
}

/// What the reader wrote, and whether it has said that no more follows; `None` if it breaks off
/// inside a record.
fn parse(mut bytes: &[u8]) -> Option<(Vec<Member>, bool)> {
    let mut members = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) = bytes.split_at_checked(RECORD)?;
        let u16_at = |bytes: &[u8], at: usize| {
            Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
        };
        let u32_at = |bytes: &[u8], at: usize| {
            Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        let group = u32_at(record, 8)?;
        if group == END {
            return Some((members, true));
        }
        let (program, rest) =
            rest.split_at_checked(usize::from(u16_at(record, 14)?) * INSTRUCTION)?;
        let program = program
            .chunks_exact(INSTRUCTION)
            .map(|bytes| {
                Some(Instruction {
                    code: u16_at(bytes, 0)?,
                    jt: *bytes.get(2)?,
                    jf: *bytes.get(3)?,
                    k: u32_at(bytes, 4)?,
                })
            })
            .collect::<Option<_>>()?;
        members.push(Member {
            inode: u64::from_ne_bytes(record.get(..8)?.try_into().ok()?),
            group: match group {
                NO_GROUP => None,
                group => Some((group, u16_at(record, 12)?)),
            },
            program,
        });
        bytes = rest;
    }
    Some((members, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;
    use proptest::prelude::*;

    fn service() -> Service {
        Service {
            name: "web".to_string(),
            protocol: Protocol::Tcp,
            port: 80,
        }
    }

    fn instance(cpu: u32) -> Instance {
        Instance {
            cpu,
            port: 80,
            pid: 100 + cpu,
            sockets: vec![u64::from(cpu)],
        }
    }

    fn member(inode: u64, group: u32, index: u16) -> Member {
        Member {
            inode,
            group: Some((group, index)),
            program: Vec::new(),
        }
    }

    /// What the kernel makes of the program on this CPU.
    fn run(program: &[Instruction], cpu: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD if step.k == CPU => accumulator = cpu,
                JUMP_IF_EQUAL if accumulator == step.k => at += usize::from(step.jt),
                JUMP_IF_EQUAL => at += usize::from(step.jf),
                RETURN => return step.k,
                code => panic!("instruction {code}"),
            }
        }
    }

    /// What the reader writes for a member.
    fn record(member: &Member) -> Vec<u8> {
        let (group, index) = member.group.unwrap_or((NO_GROUP, 0));
        let mut bytes = member.inode.to_ne_bytes().to_vec();
        bytes.extend(group.to_ne_bytes());
        bytes.extend(index.to_ne_bytes());
        bytes.extend(u16::try_from(member.program.len()).unwrap().to_ne_bytes());
        for step in &member.program {
            bytes.extend(step.code.to_ne_bytes());
            bytes.extend([step.jt, step.jf]);
            bytes.extend(step.k.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn each_group_has_its_own_indexes() {
        let table = (0..3).map(|cpu| (cpu, instance(cpu))).collect();
        // Started in another order; CPU 2 does not listen for IPv6; a stranger is in the group.
        let members = [
            member(2, 7, 0),
            member(0, 7, 2),
            member(1, 7, 1),
            member(99, 7, 3),
        ];
        let found = indexes(&service(), &table, &members).unwrap();
        assert_eq!(
            found,
            BTreeMap::from([(7, BTreeMap::from([(0, 2), (1, 1), (2, 0)]))])
        );
        let mut two = table[&1].clone();
        two.sockets.push(51);
        let table = BTreeMap::from([(0, instance(0)), (1, two)]);
        let members = [member(0, 7, 0), member(1, 7, 1), member(51, 8, 0)];
        let found = indexes(&service(), &table, &members).unwrap();
        assert_eq!(found[&8], BTreeMap::from([(1, 0)]));
        let members = [member(0, 7, 0), member(1, 7, 1), member(51, 7, 2)];
        let error = indexes(&service(), &table, &members).unwrap_err();
        assert!(error.to_string().contains("several sockets"), "{error}");
        let mut alone = member(0, 0, 0);
        alone.group = None;
        let error = indexes(&service(), &table, &[alone]).unwrap_err();
        assert!(
            error.to_string().contains("without SO_REUSEPORT"),
            "{error}"
        );
    }

    #[test]
    fn the_program_falls_back_by_nearness() {
        let candidates = BTreeMap::from([(0, vec![0, 1]), (1, vec![1, 0]), (5, vec![1, 0])]);
        let both = program(&candidates, &BTreeMap::from([(0, 1), (1, 0)]));
        assert_eq!([0, 1, 5].map(|cpu| run(&both, cpu)), [1, 0, 0]);
        assert_eq!(run(&both, 2), BY_HASH);
        assert_eq!(picks(&both), "0:1 1:0 5:0");
        let one = program(&candidates, &BTreeMap::from([(0, 0)]));
        assert_eq!([0, 1, 5].map(|cpu| run(&one, cpu)), [0, 0, 0]);
        let none = program(&candidates, &BTreeMap::new());
        assert_eq!(run(&none, 0), BY_HASH);
        for ours in [&both, &one, &none] {
            assert!(is_ours(ours));
        }
        assert!(!is_ours(&[]));
        assert!(!is_ours(&both[1..]) && !is_ours(&both[..2]));
    }

    #[test]
    fn tcp_migrate_req_goes_back_with_the_last() {
        let fake = Fake::new();
        let path = "proc/sys/net/ipv4/tcp_migrate_req";
        fake.file(path, "0\n");
        let reuseport = Reuseport::open(&fake.host());
        let other = Service {
            name: "other".to_string(),
            ..service()
        };
        reuseport.set_migrate_req(&service()).unwrap();
        reuseport.set_migrate_req(&other).unwrap();
        reuseport.set_migrate_req(&service()).unwrap();
        assert_eq!(fake.text(path).trim(), "1");
        reuseport.restore_migrate_req(&service()).unwrap();
        assert_eq!(fake.text(path).trim(), "1", "the other needs it still");
        reuseport.restore_migrate_req(&other).unwrap();
        assert_eq!(fake.text(path).trim(), "0");
        reuseport.restore_migrate_req(&other).unwrap();

        // Somebody else's by then.
        reuseport.set_migrate_req(&other).unwrap();
        fake.file(path, "2\n");
        reuseport.restore_migrate_req(&other).unwrap();
        assert_eq!(fake.text(path).trim(), "2");
        assert!(State::names(&fake.host()).is_empty());
    }

    proptest! {
        #[test]
        fn reads_what_the_reader_writes(
            inodes in prop::collection::vec((any::<u64>(), 0..END, any::<u16>()), 0..8),
            cpus in 0u32..40,
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let candidates: BTreeMap<u32, Vec<u32>> = (0..cpus).map(|cpu| (cpu, vec![cpu])).collect();
            let program = program(&candidates, &(0..cpus).map(|cpu| (cpu, 7)).collect());
            let members: Vec<Member> = inodes
                .into_iter()
                .map(|(inode, group, index)| Member { inode, group: Some((group, index)), program: program.clone() })
                .collect();
            let mut bytes: Vec<u8> = members.iter().flat_map(record).collect();
            prop_assert_eq!(parse(&bytes), Some((members.clone(), false)));
            if let [.., last] = bytes[..] {
                prop_assert_eq!(parse(&bytes[..bytes.len() - 1]), None, "{}", last);
            }
            bytes.extend(record(&Member { inode: 0, group: Some((END, 0)), program: Vec::new() }));
            bytes.extend(tail);
            prop_assert_eq!(parse(&bytes), Some((members, true)));
        }
    }
}
