//! The BPF programs of `bpf/audit.bpf.c`: load, switch on and off, read. Nothing is judged here.

use super::judge::{Flow, Hop, Opened, Place};
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf, StackTraceMap};
use aya::programs::{BtfTracePoint, FEntry, FExit, Program};
use aya::{Btf, Ebpf, EbpfLoader, Pod};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fmt::Display;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;
use std::{fs, io, mem, ptr};

/// The most ports that can be asked for, as `MAX_PORTS` of the programs.
pub const MAX_PORTS: usize = 8;

const SEEN_SYN_RX: u32 = 1;
const SEEN_SYN_TX: u32 = 2;
const SEEN_FIN_RX: u32 = 4;
const SEEN_FIN_TX: u32 = 8;
const SEEN_RST: u32 = 16;
const SEEN_SOCKET: u32 = 32;

/// `struct key`: addresses in network byte order, IPv4 mapped to IPv6; ports in the host's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RawKey {
    local: [u8; 16],
    remote: [u8; 16],
    local_port: u16,
    remote_port: u16,
}

/// `struct hop`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawHop {
    first: u64,
    elsewhere: u64,
    total: u64,
    other_cpu: u64,
    other_slave: u64,
}

/// `struct flow`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawFlow {
    rx: RawHop,
    tx: RawHop,
    app: RawHop,
    rps: u64,
    closed_ns: u64,
    socket: RawKey,
    isn: u32,
    seen: u32,
    pad: u32,
}

/// `struct ended`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawEnded {
    key: RawKey,
    pad: u32,
    flow: RawFlow,
}

// SAFETY: integers only, of a fixed layout without padding bytes (the test `layouts` holds the
// sizes), so every byte pattern is a value.
unsafe impl Pod for RawKey {}
// SAFETY: as above.
unsafe impl Pod for RawFlow {}

impl RawKey {
    fn local(&self) -> SocketAddr {
        SocketAddr::new(address(self.local), self.local_port)
    }

    fn remote(&self) -> SocketAddr {
        SocketAddr::new(address(self.remote), self.remote_port)
    }
}

fn address(bytes: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}

impl From<RawHop> for Hop {
    fn from(raw: RawHop) -> Self {
        Self {
            first: place(raw.first),
            elsewhere: place(raw.elsewhere),
            total: raw.total,
            other_cpu: raw.other_cpu,
            other_slave: raw.other_slave,
        }
    }
}

/// `(ifindex << 32 | CPU + 1)`, 0 for none.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of it are what is wanted"
)]
fn place(raw: u64) -> Option<Place> {
    let cpu = (raw as u32).checked_sub(1)?;
    let slave = Some((raw >> 32) as u32).filter(|ifindex| *ifindex != 0);
    Some(Place { cpu, slave })
}

impl RawFlow {
    fn saw(&self, what: u32) -> bool {
        self.seen & what == what
    }

    fn is_closed(&self) -> bool {
        self.saw(SEEN_RST) || self.saw(SEEN_FIN_RX | SEEN_FIN_TX)
    }

    fn of(&self, key: &RawKey) -> Flow {
        Flow {
            local: key.local(),
            remote: key.remote(),
            socket: self.saw(SEEN_SOCKET).then(|| self.socket.local()),
            opened: if self.saw(SEEN_SYN_RX) {
                Some(Opened::Incoming)
            } else if self.saw(SEEN_SYN_TX) {
                Some(Opened::Outgoing)
            } else {
                None
            },
            closed: self.is_closed(),
            rx: self.rx.into(),
            app: self.app.into(),
            tx: self.tx.into(),
            rps: self.rps,
        }
    }
}

/// Sums over all CPUs, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// TCP packets that the slaves received and sent.
    pub rx_packets: u64,
    pub tx_packets: u64,
    /// Entries made in the map.
    pub flows: u64,
    /// Connections that found no room in it, and their packets and those of other such flows.
    pub lost_connections: u64,
    pub lost_packets: u64,
    /// Connections behind NAT whose application could not be told.
    pub lost_sockets: u64,
    /// Packets whose headers could not be read.
    pub unparsed: u64,
}

/// What the probe costs.
#[derive(Debug, Serialize)]
pub struct Overhead {
    /// Memory of all of the maps.
    pub map_bytes: u64,
    pub probes: Vec<ProbeCost>,
    /// Run time of all of the probes by packet received or sent; `null` if the kernel may not
    /// measure it for us.
    pub ns_per_packet: Option<f64>,
    /// Run time of all of the probes by the time watched: 1 is all of one CPU's.
    pub cpu_share: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct ProbeCost {
    pub probe: &'static str,
    /// Length of the program; what runs for a packet is less.
    pub instructions: u32,
    /// Runs that the kernel left out, for the probe was already running on that CPU.
    pub missed: u64,
    /// `null` if they may not be counted.
    pub runs: Option<u64>,
    pub ns_per_run: Option<f64>,
}

/// Who sent on another CPU than the one that received the flow.
#[derive(Debug, Serialize)]
pub struct Stack {
    pub packets: u64,
    /// Kernel functions, the innermost first.
    pub functions: Vec<String>,
}

/// How a program is attached.
enum Attach {
    Tracepoint(&'static str),
    Entry(&'static str),
    Exit(&'static str),
}

impl Attach {
    fn target(&self) -> &'static str {
        match self {
            Self::Tracepoint(name) | Self::Entry(name) | Self::Exit(name) => name,
        }
    }
}

/// In the order in which they are attached: a connection's SYN is the first that is seen of it.
const PROGRAMS: [(&str, Attach); 7] = [
    ("audit_accept", Attach::Exit("inet_csk_accept")),
    ("audit_receive", Attach::Exit("tcp_recvmsg")),
    ("audit_send", Attach::Exit("tcp_sendmsg_locked")),
    ("audit_backlog", Attach::Entry("process_backlog")),
    ("audit_backlog_done", Attach::Exit("process_backlog")),
    ("audit_tx", Attach::Tracepoint("net_dev_start_xmit")),
    ("audit_rx", Attach::Tracepoint("netif_receive_skb")),
];

pub struct Options<'a> {
    /// Flows that the map has room for.
    pub flows: u32,
    /// Only these ports, at either end; all if empty, at most [`MAX_PORTS`].
    pub ports: &'a [u16],
    pub stacks: bool,
}

pub struct Probe {
    ebpf: Ebpf,
    ended: RingBuf<MapData>,
    slaves: BTreeSet<u32>,
    /// Entries removed from the map of flows.
    removed: u64,
    capacity: u64,
    with_stacks: bool,
    /// The kernel measures run times for as long as this is open. It takes CAP_SYS_ADMIN.
    run_time: Option<OwnedFd>,
}

impl Probe {
    /// Attach everything; nothing is counted before [`Probe::watch`].
    pub fn load(host: &Host, options: &Options<'_>) -> Result<Self> {
        check_privilege(host)?;
        let btf = Btf::from_sys_fs().map_err(|error| {
            let cause = error.source().map(|cause| format!(": {cause}"));
            unsupported(
                "type information of the kernel",
                format_args!("{error}{}", cause.unwrap_or_default()),
            )
            .fix("use a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions' are")
        })?;
        let netns = netns()?;
        let mut ports = [0u16; MAX_PORTS];
        for (slot, port) in ports.iter_mut().zip(options.ports) {
            *slot = *port;
        }
        let want_stacks = u32::from(options.stacks);
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .map_max_entries("flows", options.flows)
            .map_max_entries("aliases", options.flows)
            .override_global("netns", &netns, true)
            .override_global("want_stacks", &want_stacks, true)
            .override_global("ports", &ports[..], true)
            .load(aya::include_bytes_aligned!(concat!(
                env!("OUT_DIR"),
                "/audit.bpf.o"
            )))
            .map_err(|error| refused("the audit's maps", &error))?;
        for (name, attach) in &PROGRAMS {
            let program = ebpf
                .program_mut(name)
                .ok_or_else(|| Error::new(name, "not in the BPF object"))?;
            load_and_attach(program, attach, &btf)
                .map_err(|error| refused(attach.target(), &*error))?;
        }
        let ended = ebpf
            .take_map("ended")
            .ok_or_else(|| Error::new("ended", "not in the BPF object"))?;
        let run_time = match aya::sys::enable_stats(aya::sys::Stats::RunTime) {
            Ok(run_time) => Some(run_time),
            Err(error) if error.io_error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(refused("BPF_ENABLE_STATS", &error)),
        };
        Ok(Self {
            ebpf,
            ended: RingBuf::try_from(ended).map_err(bug)?,
            slaves: BTreeSet::new(),
            removed: 0,
            capacity: u64::from(options.flows),
            with_stacks: options.stacks,
            run_time,
        })
    }

    /// Count what goes through these slaves, by ifindex, and through no other. This is the switch:
    /// with none, nothing is counted any more.
    pub fn watch(&mut self, slaves: &BTreeSet<u32>) -> Result<()> {
        let mut map: HashMap<_, u32, u32> =
            HashMap::try_from(map_mut(&mut self.ebpf, "slaves")?).map_err(bug)?;
        for gone in self.slaves.difference(slaves) {
            map.remove(gone).map_err(bug)?;
        }
        for new in slaves.difference(&self.slaves) {
            map.insert(new, 1, 0).map_err(bug)?;
        }
        self.slaves.clone_from(slaves);
        Ok(())
    }

    pub fn counters(&self) -> Result<Counters> {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(map(&self.ebpf, "counters")?).map_err(bug)?;
        let sum = |index: u32| -> Result<u64> {
            Ok(map.get(&index, 0).map_err(bug)?.iter().copied().sum())
        };
        Ok(Counters {
            rx_packets: sum(0)?,
            tx_packets: sum(1)?,
            flows: sum(2)?,
            lost_connections: sum(3)?,
            lost_packets: sum(4)?,
            lost_sockets: sum(5)?,
            unparsed: sum(6)?,
        })
    }

    /// Connections whose addresses and ports another one has taken over.
    pub fn replaced(&mut self) -> Vec<Flow> {
        let mut flows = Vec::new();
        while let Some(item) = self.ended.next() {
            if item.len() < mem::size_of::<RawEnded>() {
                continue;
            }
            // SAFETY: there are enough bytes, and any bytes are a `RawEnded`: it is made of
            // integers. The ring aligns to 8, but nothing here depends on it.
            let ended: RawEnded = unsafe { ptr::read_unaligned(item.as_ptr().cast()) };
            flows.push(ended.flow.of(&ended.key));
        }
        flows
    }

    /// Take connections that have been closed for `idle` out of the map, if it is half full.
    pub fn sweep(&mut self, idle: Duration) -> Result<Vec<Flow>> {
        if 2 * (self.counters()?.flows - self.removed) < self.capacity {
            return Ok(Vec::new());
        }
        let now = monotonic();
        let mut gone = Vec::new();
        for (key, flow) in self.raw_flows()? {
            let closed = Duration::from_nanos(flow.closed_ns);
            if flow.is_closed() && now.saturating_sub(closed) >= idle {
                gone.push((key, flow));
            }
        }
        let mut map: HashMap<_, RawKey, RawFlow> =
            HashMap::try_from(map_mut(&mut self.ebpf, "flows")?).map_err(bug)?;
        for (key, _) in &gone {
            map.remove(key).map_err(bug)?;
        }
        self.removed += gone.len() as u64;
        let mut aliases: HashMap<_, RawKey, RawKey> =
            HashMap::try_from(map_mut(&mut self.ebpf, "aliases")?).map_err(bug)?;
        for (key, flow) in &gone {
            if flow.saw(SEEN_SOCKET) && flow.socket != *key {
                // Not there if it found no room; that is counted.
                let _ = aliases.remove(&flow.socket);
            }
        }
        Ok(gone.iter().map(|(key, flow)| flow.of(key)).collect())
    }

    /// Everything that is in the map now.
    pub fn flows(&self) -> Result<Vec<Flow>> {
        Ok(self
            .raw_flows()?
            .iter()
            .map(|(key, flow)| flow.of(key))
            .collect())
    }

    fn raw_flows(&self) -> Result<Vec<(RawKey, RawFlow)>> {
        let map: HashMap<_, RawKey, RawFlow> =
            HashMap::try_from(map(&self.ebpf, "flows")?).map_err(bug)?;
        map.iter()
            .map(|entry| entry.map_err(bug))
            .collect::<Result<_>>()
    }

    /// What the probes have cost, `watched` for so long.
    pub fn overhead(&self, watched: Duration) -> Result<Overhead> {
        let mut probes = Vec::new();
        let mut ns = 0;
        for (name, attach) in &PROGRAMS {
            let fd = self
                .ebpf
                .program(name)
                .ok_or_else(|| Error::new(name, "not loaded"))?
                .fd()
                .map_err(bug)?
                .as_fd()
                .as_raw_fd();
            let info = fdinfo(fd)?;
            let value = |key: &str| number(&info, key).unwrap_or(0);
            let runs = self.run_time.as_ref().map(|_| value("run_cnt"));
            ns += value("run_time_ns");
            probes.push(ProbeCost {
                probe: attach.target(),
                instructions: self.instructions(name)?,
                missed: value("recursion_misses"),
                runs,
                ns_per_run: runs.and_then(|runs| ratio(value("run_time_ns"), runs)),
            });
        }
        let counters = self.counters()?;
        let measured = |whole| self.run_time.as_ref().and_then(|_| ratio(ns, whole));
        let watched = u64::try_from(watched.as_nanos()).unwrap_or(u64::MAX);
        Ok(Overhead {
            map_bytes: map_bytes()?,
            probes,
            ns_per_packet: measured(counters.rx_packets + counters.tx_packets),
            cpu_share: measured(watched),
        })
    }

    fn instructions(&self, name: &str) -> Result<u32> {
        const INSTRUCTION_BYTES: u32 = 8;
        let program = self
            .ebpf
            .program(name)
            .ok_or_else(|| Error::new(name, "not loaded"))?;
        let info = match program {
            Program::BtfTracePoint(program) => program.info(),
            Program::FEntry(program) => program.info(),
            Program::FExit(program) => program.info(),
            _ => return Err(Error::new(name, "no tracing program")),
        };
        Ok(info.map_err(bug)?.size_translated().unwrap_or(0) / INSTRUCTION_BYTES)
    }

    /// With `stacks`: who sent on another CPU than the one that received, the most frequent first.
    pub fn stacks(&self) -> Result<Vec<Stack>> {
        if !self.with_stacks {
            return Ok(Vec::new());
        }
        let counts: HashMap<_, u32, u64> =
            HashMap::try_from(map(&self.ebpf, "stack_counts")?).map_err(bug)?;
        let traces = StackTraceMap::try_from(map(&self.ebpf, "stacks")?).map_err(bug)?;
        let symbols = aya::util::kernel_symbols()
            .map_err(|error| Error::new("/proc/kallsyms", error).fix("run as root"))?;
        let mut by_functions: BTreeMap<Vec<String>, u64> = BTreeMap::new();
        for entry in counts.iter() {
            let (id, packets) = entry.map_err(bug)?;
            let functions = traces
                .get(&id, 0)
                .map_err(bug)?
                .frames()
                .iter()
                .map(|frame| symbol(&symbols, frame.ip))
                .filter(|name| !name.starts_with("bpf_"))
                .collect();
            *by_functions.entry(functions).or_default() += packets;
        }
        let mut stacks: Vec<Stack> = by_functions
            .into_iter()
            .map(|(functions, packets)| Stack { packets, functions })
            .collect();
        stacks.sort_by_key(|stack| std::cmp::Reverse(stack.packets));
        Ok(stacks)
    }
}

fn load_and_attach(
    program: &mut Program,
    attach: &Attach,
    btf: &Btf,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    match attach {
        Attach::Tracepoint(name) => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(name, btf)?;
            program.attach()?;
        }
        Attach::Entry(name) => {
            let program: &mut FEntry = program.try_into()?;
            program.load(name, btf)?;
            program.attach()?;
        }
        Attach::Exit(name) => {
            let program: &mut FExit = program.try_into()?;
            program.load(name, btf)?;
            program.attach()?;
        }
    }
    Ok(())
}

fn map<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a aya::maps::Map> {
    ebpf.map(name)
        .ok_or_else(|| Error::new(name, "not in the BPF object"))
}

fn map_mut<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::maps::Map> {
    ebpf.map_mut(name)
        .ok_or_else(|| Error::new(name, "not in the BPF object"))
}

/// The kernel took the map, and now won't let us have what is in it.
fn bug(error: impl Display) -> Error {
    Error::new("the audit's BPF maps", error)
}

fn unsupported(place: &str, error: impl Display) -> Error {
    Error::new(place, error).exit(Exit::Unsupported)
}

/// The kernel refuses a map or a program: in one line, with the end of what its verifier says.
fn refused(place: &str, error: &dyn std::error::Error) -> Error {
    let mut causes = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        causes = format!("{causes}: {cause}");
        source = cause.source();
    }
    let lines: Vec<&str> = causes
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let shown = match lines[..] {
        [first, .., before, last] => format!("{first} … {before} … {last}"),
        _ => lines.join("; "),
    };
    unsupported(place, format_args!("the kernel refuses the probe: {shown}")).fix(
        "a kernel is needed with CONFIG_DEBUG_INFO_BTF, CONFIG_BPF_JIT and \
         CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS, that is not locked down; 7.3 is tested",
    )
}

fn check_privilege(host: &Host) -> Result<()> {
    const CAP_SYS_ADMIN: u64 = 21;
    const CAP_PERFMON: u64 = 38;
    const CAP_BPF: u64 = 39;
    let capabilities =
        host::read_if_any(&host.proc.join("self/status")).and_then(|status| capabilities(&status));
    let has = |bit: u64| capabilities.is_none_or(|set| set >> bit & 1 == 1);
    if has(CAP_SYS_ADMIN) || (has(CAP_BPF) && has(CAP_PERFMON)) {
        return Ok(());
    }
    Err(
        Error::new("cpubond audit", "no permission to load BPF programs")
            .fix("run as root, or with CAP_BPF and CAP_PERFMON"),
    )
}

fn capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The number of our network namespace, as the kernel has it in `net->ns.inum`.
fn netns() -> Result<u32> {
    let path = "/proc/self/ns/net";
    let inode = fs::metadata(path)
        .map_err(|error| Error::new(path, error))?
        .ino();
    u32::try_from(inode).map_err(|error| Error::new(path, error))
}

/// As `bpf_ktime_get_ns()`.
fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

fn fdinfo(fd: i32) -> Result<String> {
    let path = format!("/proc/self/fdinfo/{fd}");
    fs::read_to_string(&path).map_err(|error| Error::new(path, error))
}

/// The memory of the maps of this process: all of them are the audit's.
fn map_bytes() -> Result<u64> {
    let path = "/proc/self/fdinfo";
    let mut bytes = 0;
    for entry in fs::read_dir(path).map_err(|error| Error::new(path, error))? {
        let entry = entry.map_err(|error| Error::new(path, error))?;
        // Of descriptors that are gone again there is none: the one of the listing itself.
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        if number(&info, "map_type").is_some() {
            bytes += number(&info, "memlock").unwrap_or(0);
        }
    }
    Ok(bytes)
}

/// The value of a line `KEY:\tVALUE`.
fn number(info: &str, key: &str) -> Option<u64> {
    info.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?
        .trim()
        .parse()
        .ok()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "nanoseconds of an audit are far below 2^52"
)]
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn symbol(symbols: &BTreeMap<u64, String>, address: u64) -> String {
    symbols
        .range(..=address)
        .next_back()
        .map_or_else(|| format!("{address:#x}"), |(_, name)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts() {
        // As clang lays the structures of audit.bpf.c out.
        assert_eq!(mem::size_of::<RawKey>(), 36);
        assert_eq!(mem::size_of::<RawHop>(), 40);
        assert_eq!(mem::size_of::<RawFlow>(), 184);
        assert_eq!(mem::size_of::<RawEnded>(), 224);
    }

    #[test]
    fn reads_what_the_programs_write() {
        let mut key = RawKey {
            local_port: 80,
            remote_port: 40000,
            ..RawKey::default()
        };
        key.local[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 1]);
        key.remote[..2].copy_from_slice(&[0xfd, 0]);
        let mut raw = RawFlow {
            seen: SEEN_SYN_RX | SEEN_FIN_RX,
            ..RawFlow::default()
        };
        raw.rx.first = 7 << 32 | 1;
        raw.app.first = 3;
        let flow = raw.of(&key);
        assert_eq!(flow.local.to_string(), "10.0.0.1:80");
        assert_eq!(flow.remote.to_string(), "[fd00::]:40000");
        assert_eq!(flow.opened, Some(Opened::Incoming));
        assert_eq!(flow.socket, None);
        assert!(!flow.closed);
        let at = |cpu, slave| Some(Place { cpu, slave });
        assert_eq!(flow.rx.first, at(0, Some(7)));
        assert_eq!(flow.app.first, at(2, None));
        assert_eq!(flow.tx.first, None);
        raw.seen |= SEEN_FIN_TX;
        assert!(raw.of(&key).closed);
    }

    #[test]
    fn reads_fdinfo_and_status() {
        let info = "pos:\t0\nmap_type:\t1\nmemlock:\t4096\n";
        assert_eq!(number(info, "memlock"), Some(4096));
        assert_eq!(number(info, "mem"), None);
        assert_eq!(
            capabilities("Name:\tx\nCapEff:\t000000c000000000\n"),
            Some(0xc0_0000_0000)
        );
    }
}
