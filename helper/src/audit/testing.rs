//! Reports for the tests of those who read them.

use super::judge::{Binding, Flow, Hop, Opened, Place, Tally};
use super::probe::{Counters, Overhead};
use super::report::Report;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

/// The JSON of so many complete connections of three packets each, all on CPU 0 and by its
/// NIC, but for some that were used on CPU 1, and others of which a packet was sent by
/// another NIC.
pub fn report(connections: u16, foreign_app: usize, foreign_tx: usize) -> String {
    const ETH0: u32 = 2;
    let hop = |cpu, slave| Hop {
        first: Some(Place { cpu, slave }),
        total: 3,
        ..Hop::default()
    };
    let local = SocketAddr::from(([10, 0, 0, 1], 80));
    let binding = Binding {
        bound: [(0, [ETH0].into())].into(),
        ..Binding::default()
    };
    let mut tally = Tally::new(0);
    for port in 0..connections {
        let number = usize::from(port);
        let mut flow = Flow {
            local,
            remote: SocketAddr::from(([10, 0, 0, 11], port)),
            socket: Some(local),
            opened: Some(Opened::Incoming),
            closed: true,
            rx: hop(0, Some(ETH0)),
            app: hop(0, None),
            tx: hop(0, Some(ETH0)),
            rps: 0,
        };
        if number < foreign_app {
            flow.app = hop(1, None);
        } else if number < foreign_app + foreign_tx {
            flow.tx.other_slave = 1;
        }
        tally.add(flow, &binding);
    }
    let sent = 3 * u64::from(connections);
    let report = Report::new(
        Duration::from_secs(1),
        true,
        &[],
        &[(ETH0, "eth0".to_string())].into(),
        &mut tally,
        Counters {
            rx_packets: sent,
            tx_packets: sent,
            flows: connections.into(),
            ..Counters::default()
        },
        Overhead {
            map_bytes: 0,
            probes: Vec::new(),
            ns_per_packet: None,
            cpu_share: None,
        },
        None,
        BTreeSet::new(),
    );
    serde_json::to_string(&report).expect("a report")
}
