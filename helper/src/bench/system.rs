//! `cpubond bench system`: what a request costs the whole server, in each set-up, at each
//! number of CPUs and size of the file.
//!
//! A lab for each number of CPUs, one more where the NIC has to have several queues. The
//! points go to a state file one by one, then all of them to `bench.json`.

use super::ask::{Ask, Asked};
use super::model::{Model, Work};
use super::profile::{Class, Function, Profile, Profiler, Region};
use super::progress::Progress;
use super::results::{Results, System};
use super::state::State;
use super::{gate, report};
use crate::steer::Method;
use crate::vm::image::Host;
use crate::vm::lab::Lab;
use crate::vm::machine;
use crate::vm::setup::Setup;
use crate::vm::topology::Topology;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::ExitCode;
use std::time::Duration;

/// Clients, as in the paper.
const CLIENTS: u8 = 8;
const STEP: Duration = Duration::from_secs(580);
/// The paper's file, in bytes.
pub const SIZE: u32 = 128;
/// Those of its last figure, or some of them.
const SIZES: [u32; 4] = [256, 2048, 8192, 32768];
/// At which numbers of CPUs they are measured.
const SIZES_AT: [u32; 2] = [1, 8];
/// A CPU's steps, between which other CPUs' may come in the replay: a packet comes in, or the
/// server does something with a connection. What goes on before the first and after the last
/// is not counted.
const STEPS: [&str; 5] = [
    "tcp_v4_rcv",
    "inet_csk_accept",
    "tcp_recvmsg",
    "tcp_sendmsg",
    "tcp_close",
];

/// The functions of the paper's Table 4, with its cache misses in the usual set-up and in the
/// proposed one, and by what names they go today.
pub const TABLE: [(&str, [u32; 2], &[&str]); 13] = [
    ("tcp_v4_rcv", [16_499, 9_450], &["tcp_v4_rcv"]),
    ("tcp_v4_do_rcv", [3_567, 114], &["tcp_v4_do_rcv"]),
    ("tcp_v4_hnd_req", [7_157, 203], &["tcp_check_req"]),
    (
        "tcp_v4_syn_recv_sock",
        [1_823, 2_242],
        &["tcp_v4_syn_recv_sock"],
    ),
    (
        "tcp_rcv_state_process",
        [1_920, 2_310],
        &["tcp_rcv_state_process"],
    ),
    (
        "__inet_lookup_listener",
        [5_140, 6_475],
        &[
            "__inet_lookup_listener",
            "inet_lookup_reuseport",
            "inet_lhash2_lookup",
        ],
    ),
    ("tcp_poll", [6_758, 102], &["tcp_poll"]),
    ("inet_csk_accept", [6_316, 6_408], &["inet_csk_accept"]),
    (
        "inet_accept",
        [2_734, 1_826],
        &["inet_accept", "__inet_accept"],
    ),
    (
        "tcp_sendmsg",
        [1_113, 2_209],
        &["tcp_sendmsg", "tcp_sendmsg_locked"],
    ),
    ("tcp_current_mss", [4_846, 5_852], &["tcp_current_mss"]),
    ("tcp_close", [1_995, 2_947], &["tcp_close", "__tcp_close"]),
    (
        "tcp_v4_destroy_sock",
        [886, 2_310],
        &["tcp_v4_destroy_sock"],
    ),
];

/// What a request costs the whole server, in each set-up
#[derive(clap::Args, Default)]
#[command(after_help = "\
Examples:
  cpubond bench system                       # all set-ups, 1 to 8 CPUs, all sizes
  cpubond bench system --quick               # usual and cpu_bound+sk_lookup on 4 CPUs
  cpubond bench system --cpus 1,8 --setup usual,cpu_bound+nat --size 128

Eight clients make requests, each over a new connection, of a server in the lab, whose
instructions and memory accesses the profiler counts. From these a model says how it would
scale with its CPUs. A run that was ended goes on where it was, as long as kernel, modules
and helper are the same. The results are in target/results/bench.json; `cpubond bench
report` draws them.
Exit code 1 when something could not be measured, a request failed, or a --check failed.")]
pub struct Args {
    /// Two set-ups on 4 CPUs: for ratios, not for figures
    #[arg(long)]
    pub quick: bool,
    /// Judge the ratios that must hold, as KTAP
    #[arg(long, requires = "quick")]
    pub check: bool,
    /// Numbers of CPUs of the server
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub cpus: Vec<u32>,
    /// Only these set-ups
    #[arg(long, value_enum, value_delimiter = ',')]
    pub setup: Vec<Name>,
    /// Bytes of the file
    #[arg(long, value_delimiter = ',', value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub size: Vec<u32>,
    /// How often each point is measured (default: 3 times, longer files than 128 bytes once)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Requests of each point; made a multiple of 8
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..=50_000))]
    pub requests: Option<u32>,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR")]
    pub modules: Option<std::path::PathBuf>,
}

/// How the server is set up, as in `bench.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub enum Name {
    /// One NIC, one listener, a worker for each CPU
    #[value(name = "usual")]
    #[serde(rename = "usual")]
    Usual,
    /// A NIC for each CPU, servers by SO_REUSEPORT
    #[value(name = "balance-rr+reuseport")]
    #[serde(rename = "balance-rr+reuseport")]
    BalanceRr,
    /// The same, sent by a hash of the flow
    #[value(name = "balance-xor+reuseport")]
    #[serde(rename = "balance-xor+reuseport")]
    BalanceXor,
    /// One NIC with a queue and a server for each CPU
    #[value(name = "multiqueue+reuseport")]
    #[serde(rename = "multiqueue+reuseport")]
    Multiqueue,
    /// The paper's system
    #[value(name = "cpu_bound+nat")]
    #[serde(rename = "cpu_bound+nat")]
    CpuBoundNat,
    /// The same without NAT
    #[value(name = "cpu_bound+sk_lookup")]
    #[serde(rename = "cpu_bound+sk_lookup")]
    CpuBoundSkLookup,
    /// The same with SO_REUSEPORT, chosen by CPU
    #[value(name = "cpu_bound+reuseport")]
    #[serde(rename = "cpu_bound+reuseport")]
    CpuBoundReuseport,
}

impl Name {
    /// In the order of the tables.
    pub const ALL: [Self; 7] = [
        Self::Usual,
        Self::BalanceRr,
        Self::BalanceXor,
        Self::Multiqueue,
        Self::CpuBoundNat,
        Self::CpuBoundSkLookup,
        Self::CpuBoundReuseport,
    ];

    /// What is started.
    pub fn setup(self) -> Setup {
        match self {
            Self::Usual => Setup::Usual,
            Self::BalanceRr => Setup::Balance("balance-rr"),
            Self::BalanceXor => Setup::Balance("balance-xor"),
            Self::Multiqueue => Setup::Multiqueue,
            Self::CpuBoundNat => Setup::CpuBound(Method::Nat),
            Self::CpuBoundSkLookup => Setup::CpuBound(Method::SkLookup),
            Self::CpuBoundReuseport => Setup::CpuBound(Method::Reuseport),
        }
    }

    /// Whether it is what this project makes.
    pub fn is_ours(self) -> bool {
        matches!(self.setup(), Setup::CpuBound(_))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::options::name(*self))
    }
}

/// What is measured at one point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Case {
    /// CPUs of the server.
    pub cpus: u32,
    /// Bytes of the file.
    pub size: u32,
    /// In which set-up.
    pub name: Name,
}

impl Case {
    /// The lab it is measured in: the same one for all that can share it.
    fn topology(self) -> Topology {
        let needed = self.name.setup().topology(self.cpus);
        Topology {
            nics: if needed.queues > 1 {
                needed.nics
            } else {
                self.cpus
            },
            offload: false,
            profiler: true,
            ..needed
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} CPUs, {} bytes", self.name, self.cpus, self.size)
    }
}

/// One measurement, or all rounds of one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Of what.
    #[serde(flatten)]
    pub case: Case,
    /// From 0.
    pub round: u32,
    /// Answered.
    pub requests: u64,
    /// Not answered.
    pub failed: u64,
    /// TCP segments that the server sent twice.
    pub retransmitted: u64,
    /// Packets that the requests took, both ways.
    pub packets: u64,
    /// Each CPU's, in order.
    pub by_cpu: Vec<Cpu>,
    /// As in [`System`].
    pub conflicts: f64,
    /// As in [`System`]: mean, lowest, highest.
    pub transfers: [f64; 3],
    /// As the host happened to run the CPUs.
    pub transfers_as_run: f64,
    /// Of the server program's own memory.
    pub user_transfers: f64,
    /// By class, a request.
    pub insns: BTreeMap<Class, f64>,
    /// Functions of the requests' way, those that matter, a request.
    pub functions: Vec<Function>,
}

/// What one CPU did for all requests.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Cpu {
    /// Instructions in the kernel.
    pub path: u64,
    /// Instructions of the server program.
    pub user: u64,
    /// Transfers in the kernel, as run.
    pub transfers: u64,
}

impl Point {
    /// Instructions a request, in the kernel and in all.
    pub fn insns(&self) -> [f64; 2] {
        let path: u64 = self.by_cpu.iter().map(|cpu| cpu.path).sum();
        let user: u64 = self.by_cpu.iter().map(|cpu| cpu.user).sum();
        [path, path + user].map(|n| n as f64 / self.requests.max(1) as f64)
    }

    /// Share of the busiest CPU in the instructions.
    pub fn busiest_share(&self) -> f64 {
        let each = self.by_cpu.iter().map(|cpu| cpu.path + cpu.user);
        let all: u64 = each.clone().sum();
        each.max().unwrap_or(0) as f64 / all.max(1) as f64
    }

    /// For the model: the transfers of the replay, shared among the CPUs as they were as run.
    pub fn work(&self) -> Vec<Work> {
        let as_run: u64 = self.by_cpu.iter().map(|cpu| cpu.transfers).sum();
        let replayed = self.transfers[0] * self.requests as f64;
        self.by_cpu
            .iter()
            .map(|cpu| Work {
                insns: (cpu.path + cpu.user) as f64,
                transfers: replayed * cpu.transfers as f64 / as_run.max(1) as f64,
            })
            .collect()
    }

    /// Two rounds as one.
    fn and(self, other: &Self) -> Self {
        let all = self.requests + other.requests;
        let share = other.requests as f64 / all.max(1) as f64;
        let mean = |a: f64, b: f64| a + (b - a) * share;
        let [a, b] = [self.transfers, other.transfers];
        let mut functions: BTreeMap<String, Function> = BTreeMap::new();
        for (from, share) in [(&self.functions, 1.0 - share), (&other.functions, share)] {
            for function in from {
                let sum = functions.entry(function.name.clone()).or_default();
                sum.insns += share * function.insns;
                sum.conflicts += share * function.conflicts;
                sum.transfers += share * function.transfers;
            }
        }
        Self {
            requests: all,
            retransmitted: self.retransmitted + other.retransmitted,
            packets: self.packets + other.packets,
            by_cpu: self
                .by_cpu
                .iter()
                .zip(&other.by_cpu)
                .map(|(a, b)| Cpu {
                    path: a.path + b.path,
                    user: a.user + b.user,
                    transfers: a.transfers + b.transfers,
                })
                .collect(),
            conflicts: mean(self.conflicts, other.conflicts),
            transfers: [mean(a[0], b[0]), a[1].min(b[1]), a[2].max(b[2])],
            transfers_as_run: mean(self.transfers_as_run, other.transfers_as_run),
            user_transfers: mean(self.user_transfers, other.user_transfers),
            insns: Class::ALL
                .into_iter()
                .map(|class| {
                    let of = |point: &Self| point.insns.get(&class).copied().unwrap_or_default();
                    (class, mean(of(&self), of(other)))
                })
                .collect(),
            functions: functions
                .into_iter()
                .map(|(name, sum)| Function { name, ..sum })
                .collect(),
            ..self
        }
    }

    /// A function, by all its names.
    pub fn function(&self, names: &[&str]) -> [f64; 3] {
        let mut sum = [0.0; 3];
        for function in &self.functions {
            if names.contains(&base_name(&function.name)) {
                sum[0] += function.insns;
                sum[1] += function.conflicts;
                sum[2] += function.transfers;
            }
        }
        sum
    }
}

/// Without what the compiler appended.
fn base_name(name: &str) -> &str {
    name.split_once('.').map_or(name, |(base, _)| base)
}

/// The rounds of each case as one, in the order of the tables. A round in which a request failed
/// counts only where there is no other.
pub fn merge(points: &[Point]) -> Vec<Point> {
    let mut cases: Vec<Case> = points.iter().map(|point| point.case).collect();
    cases.sort_unstable_by_key(|case| (case.size, case.name, case.cpus));
    cases.dedup();
    cases
        .into_iter()
        .filter_map(|case| {
            let of_case = || points.iter().filter(|point| point.case == case);
            let whole: Vec<&Point> = of_case().filter(|point| point.failed == 0).collect();
            match whole.split_first() {
                Some((first, rest)) => Some(
                    rest.iter()
                        .fold((*first).clone(), |sum, point| sum.and(point)),
                ),
                None => of_case().next_back().cloned(),
            }
        })
        .collect()
}

/// A case among merged points.
pub fn find(points: &[Point], case: Case) -> Option<&Point> {
    points.iter().find(|point| point.case == case)
}

/// Cycles a request of the busiest CPU at a point beside those of one CPU in the same set-up:
/// how many times its requests.
pub fn scaling(points: &[Point], case: Case, model: Model) -> Option<f64> {
    scaling_of(points, find(points, case)?, model)
}

/// The same of one round, beside all rounds of one CPU.
pub fn scaling_of(points: &[Point], point: &Point, model: Model) -> Option<f64> {
    let cycles = |point: &Point| model.busiest(&point.work(), point.requests);
    let one = Case {
        cpus: 1,
        ..point.case
    };
    Some(cycles(find(points, one)?)? / cycles(point)?)
}

/// Where and what to measure, and how much of it.
struct Plan {
    cases: Vec<Case>,
    rounds: Option<u32>,
    requests: Option<u32>,
    quick: bool,
}

impl Plan {
    fn of(args: &Args) -> Self {
        let or = |given: &[u32], usual: &[u32]| match given {
            [] => usual.to_vec(),
            given => given.to_vec(),
        };
        let mut cases = Vec::new();
        let mut add = |names: &[Name], cpus: &[u32], sizes: &[u32]| {
            for &cpus in cpus {
                for &size in sizes {
                    for &name in names {
                        if args.setup.is_empty() || args.setup.contains(&name) {
                            cases.push(Case { cpus, size, name });
                        }
                    }
                }
            }
        };
        if args.quick {
            let names = [Name::Usual, Name::CpuBoundSkLookup];
            add(&names, &or(&args.cpus, &[4]), &or(&args.size, &[SIZE]));
        } else {
            let cpus = or(&args.cpus, &[1, 2, 4, 8]);
            if args.size.is_empty() {
                add(&Name::ALL, &cpus, &[SIZE]);
                let cpus: Vec<u32> = match args.cpus[..] {
                    [] => SIZES_AT.to_vec(),
                    _ => cpus,
                };
                add(&Name::ALL, &cpus, &SIZES);
            } else {
                add(&Name::ALL, &cpus, &args.size);
            }
        }
        Self {
            cases,
            rounds: args.rounds,
            requests: args.requests,
            quick: args.quick,
        }
    }

    /// How often.
    fn rounds(&self, case: Case) -> u32 {
        self.rounds.unwrap_or(match case.size {
            SIZE if !self.quick => 3,
            _ => 1,
        })
    }

    /// Every case, round by round.
    fn work(&self) -> Vec<(u32, Case)> {
        let most = self.cases.iter().map(|&case| self.rounds(case)).max();
        (0..most.unwrap_or(0))
            .flat_map(|round| self.cases.iter().map(move |&case| (round, case)))
            .filter(|&(round, case)| round < self.rounds(case))
            .collect()
    }

    /// Of each client.
    fn requests(&self, case: Case) -> u16 {
        let all = self.requests.unwrap_or(match case.cpus {
            _ if self.quick => 304,
            1 if case.size != SIZE => 160,
            1 => 240,
            2 => 320,
            _ => 400,
        });
        u16::try_from(all.div_ceil(CLIENTS.into())).unwrap_or(u16::MAX)
    }

    /// The more CPUs, the longer they take turns on the host's.
    fn weight(&self, case: Case) -> f64 {
        8.0 + f64::from(self.requests(case)) * (1.0 + f64::from(case.size) / 8192.0)
    }
}

/// All that a whole run measures.
pub fn whole() -> Vec<Case> {
    Plan::of(&Args::default()).cases
}

/// Run it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let host = Host::prepare(args.modules.clone(), false)?;
    let plan = Plan::of(args);
    let name = if args.quick { "quick" } else { "bench" };
    let at = |file: &str| host.checkout.join("target/results").join(file);
    let file = at(&format!("{name}.system.state"));
    let mut state = State::<Point>::open(&file, &super::key(&host)?)?;
    if args.check {
        // It is about what is there now.
        state = State::open(&file, "")?;
    }
    let problems = measure(&host, &plan, &mut state)?;

    let results = Results::update(
        &at(&format!("{name}.json")),
        [&host.kernel, &super::commit(&host)],
        |results| {
            results.system = sum_up(state.points());
        },
    )?;
    super::write_whole(
        &at(&format!("{name}.system.points.json")),
        serde_json::to_string(state.points())?.as_bytes(),
    )?;
    for problem in &problems {
        eprintln!("cpubond: error: {problem}");
    }
    if args.check {
        return Ok(gate::judge_system(&results.system, &problems));
    }
    print!("{}", report::system_table(&results.system));
    println!("\nwritten to target/results/{name}.json");
    Ok(ExitCode::from(u8::from(!problems.is_empty())))
}

/// Measure what is not there yet; what could not be measured.
fn measure(host: &Host, plan: &Plan, state: &mut State<Point>) -> Result<Vec<String>> {
    let mut labs: BTreeMap<Topology, Vec<(u32, Case)>> = BTreeMap::new();
    let mut progress = Progress::new("system");
    for (round, case) in plan.work() {
        let there = |point: &Point| (point.round, point.case, point.failed) == (round, case, 0);
        if !state.points().iter().any(there) {
            progress.plan(plan.weight(case));
            labs.entry(case.topology()).or_default().push((round, case));
        }
    }
    let mut problems = Vec::new();
    for (topology, mut todo) in labs {
        let mut failures = 0;
        while let Some(&(_, case)) = todo.first() {
            progress.say(&format!("boot for {case}"));
            let left = todo.len();
            let outcome = measure_in(host, plan, &topology, &mut todo, state, &mut progress);
            if todo.len() < left {
                failures = 0;
            }
            let (Err(error), Some(&(round, case))) = (outcome, todo.first()) else {
                continue;
            };
            failures += 1;
            let line = format!("{case}, round {}: {error:#}", round + 1);
            progress.say(&line);
            // A machine that died is booted again; what fails twice is left out.
            if failures >= 2 {
                problems.push(line);
                progress.done(plan.weight(case));
                todo.remove(0);
                failures = 0;
            }
            if problems.len() > 6 {
                bail!("too much fails; the last: {}", problems.join("; "));
            }
        }
    }
    Ok(problems)
}

/// One boot; what is done is taken from `todo`.
fn measure_in(
    host: &Host,
    plan: &Plan,
    topology: &Topology,
    todo: &mut Vec<(u32, Case)>,
    state: &mut State<Point>,
    progress: &mut Progress,
) -> Result<()> {
    let lab = Lab::boot(host, topology, machine::Accel::Tcg, false)?;
    // Emulated and counted, an answer may take longer than TCP waits; what is sent again would
    // be counted, too.
    for guest in [lab.server(), lab.peer()] {
        guest.output("sysctl -qw net.ipv4.tcp_rto_min_us=10000000", STEP)?;
    }
    // The kernel's statistics of memory are made by the clock, which goes fast here.
    lab.server().output(
        "for stat in /sys/module/damon_stat/parameters/enabled; do
            [ ! -w $stat ] || echo N >$stat
        done",
        STEP,
    )?;
    let mut clients = Clients {
        lab: &lab,
        next_port: 10_001,
    };
    let mut profiler = Profiler::of(&lab)?;
    while let Some(&(round, case)) = todo.first() {
        let point = Point {
            round,
            ..one(&lab, &mut profiler, &mut clients, case, plan.requests(case))?
        };
        progress.done(plan.weight(case));
        let insns = point.insns();
        progress.say(&format!(
            "{case}, round {}: {} requests, {:.0} insns ({:.0} in the kernel), {:.1} conflicts, {:.1} transfers \
             each, {:.1} % on the busiest CPU",
            round + 1,
            point.requests,
            insns[1],
            insns[0],
            point.conflicts,
            point.transfers[0],
            100.0 * point.busiest_share(),
        ));
        let (failed, requests) = (point.failed, point.requests);
        state.add(point)?;
        if failed > 0 {
            bail!("{failed} requests failed, {requests} did not");
        }
        todo.remove(0);
    }
    Ok(())
}

/// The clients in the peer.
struct Clients<'a> {
    lab: &'a Lab,
    /// Never one twice: the server remembers connections for a minute.
    next_port: u16,
}

impl Clients<'_> {
    /// So many from each address.
    fn ask(&mut self, requests: u16, bytes: u32) -> Result<Asked> {
        let from: Vec<Ipv4Addr> = (0..CLIENTS)
            .map(|client| Ipv4Addr::new(10, 0, 0, 11 + client))
            .collect();
        let to = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), Setup::PORT);
        let words = Ask::words(to, &from, requests, self.next_port, bytes);
        self.next_port = self
            .next_port
            .checked_add(2 * requests)
            // Below those that the kernel gives out.
            .filter(|&port| port < 32_000)
            .unwrap_or(10_001);
        let text = self
            .lab
            .peer()
            .output(&format!("cpubond bench ask {words}"), STEP)
            .context("the clients in the peer")?;
        serde_json::from_str(&text).context("what was asked")
    }
}

/// Set up, warm up, count.
fn one(
    lab: &Lab,
    profiler: &mut Profiler<'_>,
    clients: &mut Clients<'_>,
    case: Case,
    requests: u16,
) -> Result<Point> {
    let running = case.name.setup().start(lab, case.cpus, case.size)?;
    // It counts packets for the demo, on lines that all CPUs share.
    lab.server()
        .output(". /cpubond/tests/lib.sh; xmit_trace off", STEP)?;
    let warm = clients.ask(requests.div_ceil(4).max(8), case.size)?;
    if let Some(why) = warm.why {
        bail!("a request before the count failed: {why}");
    }
    let (accepted, before) = (running.accepted()?, Segments::read(lab)?);
    // It looks after its daemons by the clock, not by the request.
    lab.server()
        .output("pkill -STOP -xf 'cpubond run .*' || :", STEP)?;
    profiler.open(&Region {
        marks: STEPS.map(String::from).to_vec(),
        ..Region::packets(
            &format!("{}-{}-{}", case.name, case.cpus, case.size),
            STEPS[0],
        )
    })?;
    let asked = clients.ask(requests, case.size);
    // Closed whatever came of it, so that the next one can be opened.
    let profile = profiler.close()?;
    lab.server()
        .output("pkill -CONT -xf 'cpubond run .*' || :", STEP)?;
    let asked = asked?;
    if let Some(why) = &asked.why {
        eprintln!("cpubond: {case}: {} failed, the first: {why}", asked.failed);
    }
    let accepted = running.accepted()?.saturating_sub(accepted);
    if asked.failed == 0 && accepted != asked.complete {
        bail!(
            "the clients made {} requests, the kernel accepted {accepted} connections",
            asked.complete
        );
    }
    let segments = Segments::read(lab)?.since(&before);
    point(case, &asked, &segments, &profile)
}

/// TCP segments of the server.
struct Segments {
    received: u64,
    sent: u64,
    retransmitted: u64,
}

impl Segments {
    fn read(lab: &Lab) -> Result<Self> {
        Self::parse(&lab.server().output("cat /proc/net/snmp", STEP)?)
    }

    /// Of /proc/net/snmp: a line of names, then one of values.
    fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp: "));
        let (names, values) = (
            lines.next().unwrap_or_default(),
            lines.next().unwrap_or_default(),
        );
        let get = |wanted: &str| -> Result<u64> {
            names
                .split(' ')
                .zip(values.split(' '))
                .find(|(name, _)| *name == wanted)
                .and_then(|(_, value)| value.parse().ok())
                .with_context(|| format!("/proc/net/snmp: no {wanted}"))
        };
        Ok(Self {
            received: get("InSegs")?,
            sent: get("OutSegs")?,
            retransmitted: get("RetransSegs")?,
        })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            received: self.received.saturating_sub(before.received),
            sent: self.sent.saturating_sub(before.sent),
            retransmitted: self.retransmitted.saturating_sub(before.retransmitted),
        }
    }
}

fn point(case: Case, asked: &Asked, segments: &Segments, profile: &Profile) -> Result<Point> {
    let requests = asked.complete;
    let steps = profile.total_packets();
    // A request is at least a SYN, an ACK, the request itself, and something done with it.
    if steps < 4 * requests {
        bail!("{steps} steps counted of {requests} requests: the profiler misses some");
    }
    let each = |n: u64| n as f64 / requests.max(1) as f64;
    // The replay divides by its steps.
    let by_step = steps as f64 / requests.max(1) as f64;
    let by_cpu = (0..profile.cpus)
        .map(|cpu| {
            let path = profile.on_cpu(Class::Path, cpu);
            Cpu {
                path: path.insns,
                user: profile.on_cpu(Class::User, cpu).insns,
                transfers: path.transfers,
            }
        })
        .collect();
    let of_table = |name: &str| {
        TABLE
            .iter()
            .any(|(_, _, names)| names.contains(&base_name(name)))
    };
    let replay = &profile.replay;
    Ok(Point {
        case,
        round: 0,
        requests,
        failed: asked.failed,
        retransmitted: segments.retransmitted,
        packets: segments.received + segments.sent,
        by_cpu,
        conflicts: replay.conflicts.mean * by_step,
        transfers: [
            replay.transfers.mean,
            replay.transfers.min,
            replay.transfers.max,
        ]
        .map(|each| each * by_step),
        transfers_as_run: each(profile.total(Class::Path).transfers),
        user_transfers: replay.generator_transfers.mean * by_step,
        insns: Class::ALL
            .into_iter()
            .map(|class| (class, each(profile.total(class).insns)))
            .collect(),
        functions: profile.path_functions(requests, of_table),
    })
}

/// The points as in `bench.json`.
pub fn sum_up(points: &[Point]) -> Vec<System> {
    let points = merge(points);
    points
        .iter()
        .map(|point| {
            let case = point.case;
            System {
                setup: case.name,
                cpus: case.cpus,
                size: case.size,
                requests: point.requests,
                failed: point.failed,
                insns_per_request: point.insns()[1],
                conflict_lines_per_request: point.conflicts,
                transfers_per_request: point.transfers[0],
                busiest_cpu_share: point.busiest_share(),
                modelled_scaling: scaling(&points, case, Model::default()).unwrap_or(0.0),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(cpus: u32, failed: u64) -> Point {
        Point {
            case: Case {
                cpus,
                size: SIZE,
                name: Name::CpuBoundNat,
            },
            round: 0,
            requests: 100,
            failed,
            retransmitted: 0,
            packets: 900,
            by_cpu: vec![
                Cpu {
                    path: 300_000,
                    user: 100_000,
                    transfers: 10,
                };
                cpus as usize
            ],
            conflicts: 1.0,
            transfers: [2.0, 1.0, 3.0],
            transfers_as_run: 0.0,
            user_transfers: 0.0,
            insns: BTreeMap::new(),
            functions: Vec::new(),
        }
    }

    #[test]
    fn a_point_is_beside_its_own_single_cpu() {
        let mut one = point(1, 0);
        one.transfers = [0.0; 3];
        let mut four = point(4, 0);
        four.requests = 400;
        let rows = sum_up(&[four.clone(), one]);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].cpus, rows[0].modelled_scaling), (1, 1.0));
        assert_eq!(rows[1].insns_per_request, 4000.0);
        assert_eq!(rows[1].busiest_cpu_share, 0.25);
        // 4000 cycles; 1000, and half a transfer of a hundred.
        assert_eq!(rows[1].modelled_scaling, 4000.0 / 1050.0);
        // Nothing to hold it against.
        assert_eq!(sum_up(&[four])[0].modelled_scaling, 0.0);
    }

    #[test]
    fn a_point_is_read_as_it_was_written() {
        let mut point = point(4, 0);
        point.insns.insert(Class::Path, 1.5);
        let text = serde_json::to_string(&point).expect("JSON");
        let back: Point = serde_json::from_str(&text).expect("is read again");
        assert_eq!((back.case, back.by_cpu.len()), (point.case, 4));
        assert_eq!(back.insns, point.insns);
    }

    #[test]
    fn a_point_that_failed_counts_only_until_it_is_measured_again() {
        let rows = sum_up(&[point(1, 3)]);
        assert_eq!(rows[0].failed, 3);
        let rows = sum_up(&[point(1, 3), point(1, 0)]);
        assert_eq!((rows.len(), rows[0].failed), (1, 0));
        assert_eq!(rows[0].requests, 100);
    }

    #[test]
    fn rounds_are_one_point_by_their_requests() {
        let function = |name: &str, insns| Function {
            name: name.to_owned(),
            insns,
            ..Function::default()
        };
        let first = Point {
            functions: vec![function("both", 4.0), function("first", 4.0)],
            ..point(4, 0)
        };
        let second = Point {
            round: 1,
            requests: 300,
            transfers: [6.0, 0.5, 7.0],
            functions: vec![function("both", 8.0)],
            ..point(4, 0)
        };
        let merged = merge(&[first.clone(), second]);
        let [all] = &merged[..] else {
            panic!("{merged:?}");
        };
        assert_eq!(all.requests, 400);
        assert_eq!(all.transfers, [5.0, 0.5, 7.0]);
        // Both had the same counts, for 100 requests and for 300.
        assert_eq!(all.by_cpu[0].path, 600_000);
        assert_eq!(all.insns(), [6000.0, 8000.0]);
        assert_eq!(all.function(&["both"])[0], 7.0);
        assert_eq!(all.function(&["first"])[0], 1.0);
        // A CPU's own is beside that of all rounds.
        let one = point(1, 0);
        let points = merge(&[one, first.clone()]);
        let all = scaling(&points, first.case, Model::default());
        assert_eq!(scaling_of(&points, &first, Model::default()), all);
    }

    #[test]
    fn a_round_is_all_cases_once() {
        let plan = Plan::of(&Args::default());
        let work = plan.work();
        assert_eq!(work.len(), 3 * 4 * 7 + 2 * 4 * 7);
        let last = work.last().expect("some");
        assert_eq!((last.0, last.1.size), (2, SIZE));
        let quick = Plan::of(&Args {
            quick: true,
            ..Args::default()
        });
        assert_eq!(quick.work().len(), 2);
    }

    #[test]
    fn segments_are_found_by_their_names() {
        let text = "Ip: A\nIp: 1\nTcp: InSegs OutSegs RetransSegs X\nTcp: 9 7 1 0\n";
        let segments = Segments::parse(text).expect("parses");
        assert_eq!(
            (segments.received, segments.sent, segments.retransmitted),
            (9, 7, 1)
        );
        assert!(Segments::parse("Tcp: InSegs\nTcp: 1\n").is_err());
        assert!(Segments::parse("").is_err());
    }

    #[test]
    fn names_are_as_promised() {
        let names: Vec<String> = Name::ALL.iter().map(Name::to_string).collect();
        assert_eq!(
            names.join(", "),
            "usual, balance-rr+reuseport, balance-xor+reuseport, multiqueue+reuseport, \
             cpu_bound+nat, cpu_bound+sk_lookup, cpu_bound+reuseport"
        );
        for name in Name::ALL {
            assert_eq!(serde_json::json!(name), name.to_string());
        }
    }

    #[test]
    fn only_a_nic_of_several_queues_needs_another_lab() {
        let at = |name, cpus| {
            Case {
                cpus,
                size: 1,
                name,
            }
            .topology()
        };
        assert_eq!(at(Name::Multiqueue, 1), at(Name::Usual, 1));
        assert_eq!(at(Name::CpuBoundNat, 4), at(Name::Usual, 4));
        let several = at(Name::Multiqueue, 4);
        assert_eq!((several.nics, several.queues), (1, 4));
        for name in Name::ALL {
            for cpus in [1, 2, 8] {
                let (lab, needs) = (at(name, cpus), name.setup().topology(cpus));
                assert!(lab.nics >= needs.nics && lab.queues == needs.queues);
            }
        }
    }
}
