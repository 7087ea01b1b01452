//! The ratios that must hold, whatever the figures are: a regression gate for `make test`.

use super::load::Generator;
use super::peer::Peer;
use super::results::{Results, Slaves, System, Tx};
use super::system::Name;
use std::process::ExitCode;

/// Who has to be measured for it.
pub const PEERS: [Peer; 8] = [
    Peer::RawPrivate,
    Peer::BalanceRr,
    Peer::BalanceXor,
    Peer::ActiveBackup,
    Peer::TeamHash,
    Peer::TeamCpu,
    Peer::QueueId,
    Peer::CpuBound,
];
/// The lines that a packet over `cpu_bound` may move more than over a bare NIC of the CPU's
/// own: the kernel's housekeeping that falls among few packets. Others move 13 and more.
const SLACK: f64 = 1.0;
/// Instructions that the choice may cost more than a bond's that has none.
const CHOICE: f64 = 30.0;
/// What is told apart has to be this much apart.
const APART: f64 = 3.0;
/// The same of a request's lines.
const LINES: f64 = 2.0;
/// How much busier than the mean the busiest CPU may be, for a few hundred requests.
const UNEVEN: f64 = 1.25;

/// A statement about two figures, whether it holds, and the figures.
struct Verdict {
    what: String,
    holds: bool,
    figures: String,
}

/// KTAP of those of the transmit path, on standard output.
pub fn judge(results: &Results, problems: &[String]) -> ExitCode {
    let packets: u64 = results.tx.iter().map(|tx| tx.packets).sum();
    let mut verdicts = verdicts(results);
    verdicts.push(Verdict {
        what: "all peers could be measured".to_owned(),
        holds: problems.is_empty() && packets > 0,
        figures: format!(
            "{} peers, {packets} packets; {} problems {}",
            results.tx.len(),
            problems.len(),
            problems.join("; ")
        ),
    });
    show(&verdicts)
}

/// KTAP of those of the whole system.
pub fn judge_system(rows: &[System], problems: &[String]) -> ExitCode {
    show(&system_verdicts(rows, problems))
}

fn show(verdicts: &[Verdict]) -> ExitCode {
    let mut text = format!("KTAP version 1\n1..{}\n", verdicts.len());
    for (number, verdict) in (1..).zip(verdicts) {
        let result = if verdict.holds { "ok" } else { "not ok" };
        text += &format!(
            "# {}\n{result} {number} - {}\n",
            verdict.figures, verdict.what
        );
    }
    // At once: two may be judged side by side.
    print!("{text}");
    ExitCode::from(u8::from(verdicts.iter().any(|verdict| !verdict.holds)))
}

fn system_verdicts(rows: &[System], problems: &[String]) -> Vec<Verdict> {
    let find = |name| rows.iter().find(|row| row.setup == name);
    let figures = rows
        .iter()
        .map(|row| {
            format!(
                "{}: {} requests, {} failed, {:.0} insns, {:.1} conflicts, {:.1} transfers each, \
                 {:.3} on the busiest of {} CPUs",
                row.setup,
                row.requests,
                row.failed,
                row.insns_per_request,
                row.conflict_lines_per_request,
                row.transfers_per_request,
                row.busiest_cpu_share,
                row.cpus
            )
        })
        .collect::<Vec<_>>()
        .join("; ");
    // What was not measured cannot hold.
    let (usual, ours) = (find(Name::Usual), find(Name::CpuBoundSkLookup));
    let holds = |what: String, holds: &dyn Fn(&System, &System) -> bool| Verdict {
        what,
        holds: usual
            .zip(ours)
            .is_some_and(|(usual, ours)| holds(usual, ours)),
        figures: figures.clone(),
    };
    let mut all = vec![
        holds(
            format!("a request moves {LINES} times the lines in the usual set-up, and more"),
            &|usual, ours| {
                usual.transfers_per_request > LINES * ours.transfers_per_request
                    && usual.conflict_lines_per_request > LINES * ours.conflict_lines_per_request
            },
        ),
        holds("the work is on all CPUs alike".to_owned(), &|_, ours| {
            ours.busiest_cpu_share * f64::from(ours.cpus) < UNEVEN
        }),
        holds(
            "the usual set-up has one CPU that is busier than that".to_owned(),
            &|usual, ours| usual.busiest_cpu_share > ours.busiest_cpu_share,
        ),
    ];
    let [answered, failed] = [|row: &System| row.requests, |row: &System| row.failed]
        .map(|of| rows.iter().map(of).sum::<u64>());
    all.push(Verdict {
        what: "all requests were answered".to_owned(),
        holds: problems.is_empty() && rows.len() == 2 && answered > 0 && failed == 0,
        figures: format!(
            "{answered} answered, {failed} not; {} problems {}",
            problems.len(),
            problems.join("; ")
        ),
    });
    all
}

fn verdicts(results: &Results) -> Vec<Verdict> {
    // What was not measured cannot hold.
    let find = |peer| results.find(peer, Slaves::SingleQueue, Generator::Pktgen, 4);
    let check = |peer, against, what: String, holds: &dyn Fn(&Tx, &Tx) -> bool| {
        let (Some(a), Some(b)) = (find(peer), find(against)) else {
            return Verdict {
                what,
                holds: false,
                figures: "not measured".to_owned(),
            };
        };
        let show = |tx: &Tx| {
            format!(
                "{} {:.2} transfers, {:.2} conflicts, select {:.1}",
                tx.peer, tx.transfers_per_packet, tx.conflict_lines_per_packet, tx.select_insns
            )
        };
        Verdict {
            what,
            holds: holds(a, b),
            figures: format!("a packet: {}; {}", show(a), show(b)),
        }
    };
    let mut all = vec![
        check(
            Peer::CpuBound,
            Peer::RawPrivate,
            "cpu_bound moves no more lines than a NIC of the CPU's own".to_owned(),
            &|ours, floor| ours.transfers_per_packet <= floor.transfers_per_packet + SLACK,
        ),
        check(
            Peer::CpuBound,
            Peer::RawPrivate,
            "cpu_bound has no more conflicts than a NIC of the CPU's own".to_owned(),
            &|ours, floor| {
                ours.conflict_lines_per_packet <= floor.conflict_lines_per_packet + SLACK
            },
        ),
        check(
            Peer::CpuBound,
            Peer::ActiveBackup,
            format!("cpu_bound chooses within {CHOICE} instructions of a bond without a choice"),
            &|ours, fixed| ours.select_insns <= fixed.select_insns + CHOICE,
        ),
    ];
    for peer in PEERS {
        if peer.spreads_flows() {
            all.push(check(
                Peer::CpuBound,
                peer,
                format!("{peer} moves {APART} times the lines of cpu_bound, and more"),
                &|ours, theirs| {
                    theirs.transfers_per_packet >= APART * ours.transfers_per_packet.max(SLACK)
                },
            ));
        }
        if peer.entry().is_some() && !peer.is_ours() && peer != Peer::ActiveBackup {
            all.push(check(
                Peer::CpuBound,
                peer,
                format!("cpu_bound chooses in fewer instructions than {peer}"),
                &|ours, theirs| ours.select_insns < theirs.select_insns,
            ));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::SCHEMA;

    /// As it should be.
    fn good() -> Results {
        let tx = PEERS.map(|peer| Tx {
            peer,
            slaves: Slaves::SingleQueue,
            generator: Generator::Pktgen,
            cpus: 4,
            packets: 1000,
            insns_per_packet: 2000.0,
            select_insns: match peer {
                Peer::RawPrivate => 0.0,
                Peer::ActiveBackup => 80.0,
                Peer::CpuBound => 100.0,
                _ => 200.0,
            },
            conflict_lines_per_packet: if peer.spreads_flows() { 20.0 } else { 0.2 },
            transfers_per_packet: if peer.spreads_flows() { 15.0 } else { 0.1 },
            transfers_min: 0.0,
            transfers_max: 20.0,
        });
        Results {
            schema: SCHEMA,
            tx: tx.to_vec(),
            ..Results::default()
        }
    }

    fn failures(change: impl Fn(&mut Tx)) -> usize {
        let mut results = good();
        results.tx.iter_mut().for_each(change);
        verdicts(&results)
            .iter()
            .filter(|verdict| !verdict.holds)
            .count()
    }

    #[test]
    fn each_regression_is_seen() {
        assert_eq!(failures(|_| {}), 0);
        let ours = |tx: &Tx| tx.peer == Peer::CpuBound;
        // Packets of all CPUs by all NICs.
        assert!(
            failures(|tx| tx.transfers_per_packet = if ours(tx) {
                15.0
            } else {
                tx.transfers_per_packet
            }) > 1
        );
        assert_eq!(
            failures(|tx| tx.conflict_lines_per_packet += if ours(tx) { 2.0 } else { 0.0 }),
            1
        );
        // A choice that takes long.
        assert_eq!(
            failures(|tx| tx.select_insns += if ours(tx) { 15.0 } else { 0.0 }),
            1
        );
        assert!(failures(|tx| tx.select_insns += if ours(tx) { 150.0 } else { 0.0 }) > 4);
        // A profiler that sees nothing.
        assert!(failures(|tx| tx.transfers_per_packet = 0.0) > 0);
    }

    fn system(name: Name) -> System {
        let ours = name != Name::Usual;
        System {
            setup: name,
            cpus: 4,
            size: 128,
            requests: 300,
            failed: 0,
            insns_per_request: 90_000.0,
            conflict_lines_per_request: if ours { 30.0 } else { 400.0 },
            transfers_per_request: if ours { 20.0 } else { 300.0 },
            busiest_cpu_share: if ours { 0.26 } else { 0.5 },
            modelled_scaling: 0.0,
        }
    }

    #[test]
    fn a_system_that_shares_is_seen() {
        let failed = |change: &dyn Fn(&mut System), problems: &[String]| {
            let mut rows = [Name::Usual, Name::CpuBoundSkLookup].map(system);
            change(&mut rows[1]);
            system_verdicts(&rows, problems)
                .iter()
                .filter(|verdict| !verdict.holds)
                .count()
        };
        assert_eq!(failed(&|_| {}, &[]), 0);
        assert_eq!(failed(&|row| row.transfers_per_request = 160.0, &[]), 1);
        assert_eq!(
            failed(&|row| row.conflict_lines_per_request = 250.0, &[]),
            1
        );
        assert_eq!(failed(&|row| row.busiest_cpu_share = 0.32, &[]), 1);
        assert_eq!(failed(&|row| row.busiest_cpu_share = 0.5, &[]), 2);
        assert_eq!(failed(&|row| row.failed = 1, &[]), 1);
        assert_eq!(failed(&|_| {}, &["a VM died".to_owned()]), 1);
        // Not there at all.
        assert_eq!(failed(&|row| row.setup = Name::CpuBoundNat, &[]), 3);
        assert!(
            system_verdicts(&[], &[])
                .iter()
                .all(|verdict| !verdict.holds)
        );
    }

    #[test]
    fn what_is_missing_fails() {
        let mut results = good();
        results.tx.retain(|tx| tx.peer != Peer::TeamCpu);
        assert_eq!(verdicts(&results).iter().filter(|v| !v.holds).count(), 1);
        assert!(verdicts(&Results::default()).iter().all(|v| !v.holds));
    }
}
