//! The whole system under load, beside what is usual: where each request was received,
//! served and answered.

use super::counts::{Counts, PerCpu, close};
use super::{LOCAL, REQUESTS};
use crate::show::table;
use crate::vm::clients::{self, Load};
use crate::vm::lab::Lab;
use crate::vm::setup::{Audit, Running, Setup, Shares};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Size of the file that is asked for, as in the paper.
const BYTES: u32 = 128;
/// Enough for each NIC to have had some.
const WARM_UP: u64 = 160;
const PROGRESS: Duration = Duration::from_secs(5);

/// As in `demo.json`. Each request is a connection of its own, and the shares are of
/// requests.
#[derive(Debug, Serialize)]
pub struct SetupRun {
    setup: &'static str,
    steer: String,
    server: &'static str,
    requests: u64,
    failed: u64,
    /// That `cpubond audit` followed from SYN to end.
    connections: u64,
    tx_packets: u64,
    rx_local: f64,
    app_local: f64,
    tx_local: f64,
    all_local: f64,
    /// Why requests were not local, and how many.
    reasons: BTreeMap<String, u64>,
    /// Of packets, as in the runs of modes.
    per_cpu: Vec<PerCpu>,
    #[serde(skip)]
    seconds: f64,
}

/// What was counted of one run, each in its own way.
struct Evidence {
    load: Load,
    audit: Audit,
    /// Connections that the kernel accepted.
    accepted: u64,
    counts: Counts,
}

impl SetupRun {
    /// From nothing; also what is wrong with its result.
    pub fn make(lab: &Lab, setup: Setup, requests: u64) -> Result<(Self, Vec<String>)> {
        let cpus = lab.topology().cpus;
        let label = format!("{}, {}", setup.name(), setup.steer());
        eprintln!("cpubond: {label}: {requests} requests");
        let running = setup.start(lab, cpus, BYTES)?;
        // An interrupt that was bound to a CPU moves there when it next fires: each has by then.
        clients::load(lab, WARM_UP, 1, &[Setup::PORT])?;
        let before = Counts::read(lab.server())?;
        let accepted = running.accepted()?;
        running.audit()?;
        let load = told(&label, &running, accepted, || {
            clients::load(lab, requests, 1, &[Setup::PORT])
        })
        .inspect_err(|_| match running.open() {
            Ok(open) => eprintln!("cpubond: {label}: open in the server:\n{open}"),
            Err(error) => eprintln!("cpubond: {label}: {error:#}"),
        })?;
        let evidence = Evidence {
            load,
            audit: running.audited()?,
            accepted: running.accepted()?.saturating_sub(accepted),
            counts: Counts::read(lab.server())?.since(&before),
        };
        running.stop()?;
        for warning in &evidence.audit.warnings {
            eprintln!("cpubond: {label}: audit: {warning}");
        }
        let run = Self::new(setup, &evidence, cpus);
        let problems = run.problems(setup, &evidence);
        Ok((run, problems))
    }

    fn new(setup: Setup, evidence: &Evidence, cpus: u32) -> Self {
        let Evidence {
            load,
            audit,
            counts,
            ..
        } = evidence;
        let Shares {
            rx_local,
            app_local,
            tx_local,
            all_local,
        } = audit.totals.shares;
        // Of no connections none was local.
        let share = |share: Option<f64>| share.unwrap_or(0.0);
        Self {
            setup: setup.name(),
            steer: setup.steer(),
            server: setup.server(),
            requests: load.complete,
            failed: load.failed,
            connections: audit.totals.complete,
            tx_packets: counts.sent_in_all(),
            rx_local: share(rx_local),
            app_local: share(app_local),
            tx_local: share(tx_local),
            all_local: share(all_local),
            reasons: audit.totals.reasons.clone(),
            per_cpu: counts.per_cpu(cpus),
            seconds: load.seconds,
        }
    }

    /// What the demo promises and did not keep. Of the usual set-up only that it serves all,
    /// and that all is counted.
    fn problems(&self, setup: Setup, evidence: &Evidence) -> Vec<String> {
        let Evidence {
            load,
            audit,
            accepted,
            counts,
        } = evidence;
        let totals = &audit.totals;
        let ours = matches!(setup, Setup::CpuBound(_));
        let mut problems: Vec<String> = load.problem().into_iter().collect();
        if load.complete < REQUESTS {
            problems.push(format!(
                "{} requests are too few: at least {REQUESTS} are promised",
                load.complete
            ));
        }
        if *accepted != load.complete {
            problems.push(format!(
                "the clients made {} requests, the kernel accepted {accepted} connections",
                load.complete
            ));
        }
        let followed = [
            totals.connections,
            totals.complete,
            totals.lost,
            totals.no_socket,
        ];
        if followed != [load.complete, load.complete, 0, 0] {
            let [connections, complete, lost, no_socket] = followed;
            problems.push(format!(
                "the clients made {} requests, the audit saw {connections} connections, \
                 {complete} of them to their end, and {lost} that it lost and {no_socket} without a socket",
                load.complete
            ));
        }
        if !close(totals.seen_tx_packets, self.tx_packets) {
            problems.push(format!(
                "the audit saw {} packets sent, the tracepoint counted {}",
                totals.seen_tx_packets, self.tx_packets
            ));
        }
        problems.extend(counts.problems(ours));
        if ours {
            for cpu in &self.per_cpu {
                if cpu.tx_packets == 0 {
                    problems.push(format!("CPU {} sent nothing", cpu.cpu));
                }
            }
            if self.all_local < LOCAL {
                let reasons: Vec<String> = self
                    .reasons
                    .iter()
                    .map(|(reason, count)| format!("{reason} {count}"))
                    .collect();
                problems.push(format!(
                    "only {:.4} of the requests stayed on one CPU (at least {LOCAL} is promised): {}",
                    self.all_local,
                    reasons.join(", ")
                ));
            }
        }
        problems
            .into_iter()
            .map(|problem| format!("{}, {}: {problem}", self.setup, self.steer))
            .collect()
    }
}

/// Do something, and tell now and then how many connections there have been meanwhile.
fn told<T>(
    label: &str,
    running: &Running<'_>,
    before: u64,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(PROGRESS) == Err(RecvTimeoutError::Timeout) {
                match running.accepted() {
                    Ok(now) => eprintln!(
                        "cpubond: {label}: {} connections",
                        now.saturating_sub(before)
                    ),
                    Err(error) => eprintln!("cpubond: {label}: {error:#}"),
                }
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// All of them, for people.
pub struct Table<'a>(pub &'a [SetupRun]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![
            [
                "SETUP",
                "STEER",
                "SERVER",
                "REQUESTS",
                "FAILED",
                "REQ/S*",
                "RX LOCAL",
                "APP LOCAL",
                "TX LOCAL",
                "ALL LOCAL",
            ]
            .map(String::from),
        ];
        rows.extend(self.0.iter().map(|run| {
            // Rounded down: 100 % is all of them.
            let percent = |share: f64| format!("{:.2} %", (share * 10_000.0).floor() / 100.0);
            [
                run.setup.to_string(),
                run.steer.clone(),
                run.server.to_string(),
                run.requests.to_string(),
                run.failed.to_string(),
                format!("{:.0}", rate(run.requests, run.seconds)),
                percent(run.rx_local),
                percent(run.app_local),
                percent(run.tx_local),
                percent(run.all_local),
            ]
        }));
        table(f, &rows)?;
        writeln!(
            f,
            "  * of emulated machines that share this one's CPUs: it tells nothing about speed\n\n  \
            rx: received by one NIC on one CPU, to which that NIC's interrupt goes; app: served on\n  \
            that CPU; tx: every packet of the reply sent there, by that CPU's own NIC; all: all three"
        )
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "requests of one run are far below 2^52"
)]
fn rate(requests: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        requests as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::testing;
    use crate::steer::Method;

    const NAT: Setup = Setup::CpuBound(Method::Nat);

    /// Of 5,000 requests, so many were served on a foreign CPU, and so many answered by a
    /// foreign NIC.
    fn evidence(foreign_app: usize, foreign_tx: usize) -> Evidence {
        let audit = testing::report(5000, foreign_app, foreign_tx);
        let counts = Counts::parse(
            "own 0 eth0\nown 1 eth1\ntx eth0 7500\ntx eth1 7500\n\
             policy eth0 7500 0\npolicy eth1 7500 0\n\
             xmit 0 eth0 7500\nxmit 1 eth1 7500\n",
        );
        Evidence {
            load: Load {
                asked: 5000,
                complete: 5000,
                failed: 0,
                seconds: 25.0,
            },
            audit: Audit::parse(&audit).expect("a report"),
            accepted: 5000,
            counts: counts.expect("counts"),
        }
    }

    fn problems(setup: Setup, evidence: &Evidence) -> Vec<String> {
        SetupRun::new(setup, evidence, 2).problems(setup, evidence)
    }

    #[test]
    fn all_on_one_cpu_is_no_problem() {
        let evidence = evidence(0, 0);
        assert_eq!(problems(NAT, &evidence), Vec::<String>::new());
        let run = SetupRun::new(NAT, &evidence, 2);
        assert_eq!((run.all_local, run.connections), (1.0, 5000));
    }

    #[test]
    fn a_foreign_hop_lowers_its_share_and_that_of_all() {
        let run = SetupRun::new(NAT, &evidence(1, 0), 2);
        assert_eq!((run.rx_local, run.tx_local), (1.0, 1.0));
        assert_eq!((run.app_local, run.all_local), (0.9998, 0.9998));
        assert_eq!(run.reasons, [("app_other_cpu".to_string(), 1)].into());
        let run = SetupRun::new(NAT, &evidence(1, 2), 2);
        assert_eq!((run.app_local, run.tx_local), (0.9998, 0.9996));
        assert_eq!(run.all_local, 0.9994);
        // 100 % is only said of all.
        let text = Table(&[run]).to_string();
        assert!(text.contains("100.00 %  99.98 %"), "{text}");
    }

    #[test]
    fn locality_is_promised_of_the_paper_s_system_only() {
        let enough = evidence(25, 25);
        assert!(problems(NAT, &enough).is_empty());
        let short = evidence(26, 25);
        let found = problems(NAT, &short);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with("cpu_bound, nat: only 0.9898 of the requests"),
            "{found:?}"
        );
        assert!(
            found[0].ends_with("app_other_cpu 26, tx_several_slaves 25"),
            "{found:?}"
        );
        assert!(problems(Setup::Usual, &short).is_empty());
    }

    #[test]
    fn what_is_not_served_or_not_counted_is_a_problem() {
        type Break = fn(&mut Evidence);
        let breaks: [(Break, &str); 10] = [
            (|e| e.load.failed = 1, "1 failed"),
            (|e| e.accepted = 5001, "accepted 5001"),
            (|e| e.audit.totals.connections = 4999, "saw 4999"),
            (|e| e.audit.totals.complete = 4999, "4999 of them to"),
            (|e| e.audit.totals.lost = 1, "1 that it lost"),
            (|e| e.audit.totals.no_socket = 1, "1 without a socket"),
            (
                |e| e.audit.totals.seen_tx_packets = 14_000,
                "audit saw 14000",
            ),
            (
                |e| *e.counts.tx.entry("eth0".to_owned()).or_default() = 7000,
                "the device 7000",
            ),
            (
                |e| *e.counts.policy.entry("eth0".to_owned()).or_default() = (7000, 500),
                "policy counted 7000 local and 500 remote",
            ),
            (
                |e| {
                    e.counts.xmit.remove(&(1, "eth1".to_owned()));
                    e.counts.xmit.insert((0, "eth1".to_owned()), 7500);
                },
                "CPU 1 sent nothing",
            ),
        ];
        for (break_it, complaint) in breaks {
            let mut evidence = evidence(0, 0);
            break_it(&mut evidence);
            let found = problems(NAT, &evidence);
            assert!(
                found.iter().any(|problem| problem.contains(complaint)),
                "{complaint}: {found:?}"
            );
        }
    }

    #[test]
    fn too_few_requests_are_a_problem() {
        let mut evidence = evidence(0, 0);
        evidence.load.asked = 4992;
        evidence.load.complete = 4992;
        let found = problems(Setup::Usual, &evidence);
        assert!(found[0].contains("4992 requests are too few"), "{found:?}");
    }
}
