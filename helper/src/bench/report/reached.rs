//! The transmit path: cpu_bound beside the floor, and who is beside or below it.

use crate::bench::peer::Peer;
use crate::bench::results::{Results, Slaves, Tx};
use std::fmt::Write;

/// What was to be reached, row by row, and what beat cpu_bound.
pub fn section(results: &Results) -> String {
    let mut text = "### Beside the floor, and what beat cpu_bound\n\n\
         The floor is *raw-private*: no bond, each CPU by a NIC or a queue of its own. What is written as \
         *lower* has fewer transfers than cpu_bound; with an asterisk, its highest is below \
         cpu_bound's lowest, so it is no matter of rounds and orders.\n\n\
         | CPUs | NICs | generator | transfers, floor | cpu_bound | conflict lines, floor | cpu_bound | \
         spread flows, all above | lower |\n|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    let (mut rows, mut excess) = (0, Vec::new());
    for (few, table) in [(false, &results.tx), (true, &results.tx_few_queues)] {
        let mut keys: Vec<_> = table
            .iter()
            .map(|tx| (tx.slaves, tx.cpus, tx.generator))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let here: Vec<&Tx> = table
                .iter()
                .filter(|tx| (tx.slaves, tx.cpus, tx.generator) == key)
                .collect();
            let get = |peer| here.iter().find(|tx| tx.peer == peer).copied();
            let (Some(ours), Some(floor)) = (get(Peer::CpuBound), get(Peer::RawPrivate)) else {
                continue;
            };
            let (slaves, cpus, generator) = key;
            // Nothing moves where there is nobody to have it.
            if cpus == 1 {
                continue;
            }
            let kind = match (few, slaves) {
                (true, _) => "4 of 2 queues",
                (false, slaves) => slaves.name(),
            };
            let _ = writeln!(
                text,
                "| {cpus} | {kind} | {generator} | {} | {} | {:.2} | {:.2} | {} | {} |",
                range(floor),
                range(ours),
                floor.conflict_lines_per_packet,
                ours.conflict_lines_per_packet,
                spreading(&here, ours),
                lower(&here, ours)
            );
            rows += 1;
            if few || slaves == Slaves::SingleQueue {
                excess.push(ours.transfers_per_packet - floor.transfers_per_packet);
            }
        }
    }
    if rows == 0 {
        return String::new();
    }
    let most = excess.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = excess.iter().copied().fold(f64::INFINITY, f64::min);
    if !excess.is_empty() {
        let _ = write!(
            text,
            "\nWith single-queue NICs, and with more CPUs than queues, cpu_bound has {least:+.2} to {most:+.2} \
             transfers a packet beside the floor. Neither a bare NIC nor a policy that only reads what is \
             this CPU's has lines of its own to move: what there is on both sides, and what differs between \
             them, is what goes by the clock (by TCP, the time itself: `ktime_get_seconds`, `jiffies` in \
             `ip_finish_output2`), far too often beside the packets under emulation, and memory that was \
             another CPU's before (`clear_highpages_kasan_tagged`, `kfree`). By TCP, the connections are such as \
             come in on the CPU that sends. The other end of the cables chooses by addresses (layer2+3), as a \
             switch chooses in its own way. Had it the hash and the order of slaves of the server's bond, what \
             comes in by a NIC would leave by it, and *balance-xor* and *802.3ad* would move as little as \
             cpu_bound does. *team-cpu* and *queue_id-bpf* choose by \
             CPU number as cpu_bound does by interrupt, so they move as little; they follow no interrupt, \
             and the first has no LACP. Where each NIC has a queue for every CPU, these two still send by one NIC \
             a CPU, and cpu_bound, to which all NICs are the CPU's own, shares a CPU's flows among them."
        );
    }
    text
}

/// Mean, lowest and highest.
fn range(tx: &Tx) -> String {
    format!(
        "{:.2} ({:.2} to {:.2})",
        tx.transfers_per_packet, tx.transfers_min, tx.transfers_max
    )
}

/// Whether every peer that spreads flows moves more, whatever the round and order.
fn spreading(here: &[&Tx], ours: &Tx) -> String {
    let all: Vec<&&Tx> = here.iter().filter(|tx| tx.peer.spreads_flows()).collect();
    let not: Vec<String> = all
        .iter()
        .filter(|tx| tx.transfers_min <= ours.transfers_max)
        .map(|tx| format!("{} {:.2}", tx.peer, tx.transfers_per_packet))
        .collect();
    match (all.len(), not.is_empty()) {
        (0, _) => "–".to_owned(),
        (all, true) => format!("yes, {all} of {all}"),
        (_, false) => format!("no: {}", not.join(", ")),
    }
}

/// Peers with fewer transfers, the floor not among them.
fn lower(here: &[&Tx], ours: &Tx) -> String {
    let lower: Vec<String> = here
        .iter()
        .filter(|tx| tx.peer != Peer::RawPrivate && !tx.peer.is_ours())
        .filter(|tx| tx.transfers_per_packet < ours.transfers_per_packet)
        .map(|tx| {
            let sure = if tx.transfers_max < ours.transfers_min {
                "*"
            } else {
                ""
            };
            format!("{} {:.2}{sure}", tx.peer, tx.transfers_per_packet)
        })
        .collect();
    if lower.is_empty() {
        "none".to_owned()
    } else {
        lower.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Generator;

    fn tx(peer: Peer, transfers: [f64; 3]) -> Tx {
        Tx {
            peer,
            slaves: Slaves::SingleQueue,
            generator: Generator::Pktgen,
            cpus: 8,
            packets: 100,
            insns_per_packet: 1.0,
            select_insns: 1.0,
            conflict_lines_per_packet: 0.5,
            transfers_per_packet: transfers[0],
            transfers_min: transfers[1],
            transfers_max: transfers[2],
        }
    }

    #[test]
    fn who_is_below_is_named_and_whether_that_is_sure() {
        let results = Results {
            tx: vec![
                tx(Peer::RawPrivate, [0.1, 0.1, 0.2]),
                tx(Peer::CpuBound, [0.3, 0.25, 0.5]),
                tx(Peer::TeamCpu, [0.2, 0.1, 0.24]),
                tx(Peer::QueueId, [0.2, 0.1, 0.4]),
                tx(Peer::BalanceRr, [20.0, 10.0, 30.0]),
            ],
            ..Results::default()
        };
        let text = section(&results);
        assert!(
            text.contains("| yes, 1 of 1 | team-cpu 0.20*, queue_id-bpf 0.20 |"),
            "{text}"
        );
        assert!(text.contains("+0.20 to +0.20"), "{text}");
        // One round of a peer that was near.
        let mut near = results.clone();
        near.tx.push(tx(Peer::TeamHash, [9.0, 0.4, 30.0]));
        assert!(section(&near).contains("| no: team-hash 9.00 |"));
        // Without a floor there is nothing to be beside.
        near.tx.remove(0);
        assert_eq!(section(&near), "");
    }
}
