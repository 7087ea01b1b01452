//! What the kernel itself does with queues: passes received packets on to other CPUs (RPS, RFS),
//! steers flows by the NIC itself (aRFS), sends by queues that the driver chose (XPS).

use super::{Harm, Rival};
use crate::cpulist::CpuSet;
use crate::host::{self, Host};
use crate::link;

pub fn find(host: &Host, slave: &str) -> Vec<Rival> {
    let mut rivals = Vec::new();
    let mut push = |rival, found: String, fix: String| {
        rivals.push(Rival {
            rival,
            harm: Harm::Disturbs,
            found,
            fix,
        });
    };
    let enslaved = link::master(host, slave).is_some();
    for queue in link::rps(host, slave) {
        if queue.cpus.is_empty() {
            continue;
        }
        let found = format!(
            "queue {} of {slave} passes received packets on to CPUs {}",
            queue.queue, queue.cpus
        );
        let fix = match enslaved {
            true => format!("\"echo 0 > {}\"", queue.path.display()),
            false => {
                "cpubond turns it off and restores it; what turned it on may do so again".into()
            }
        };
        push("RPS", found, fix);
    }

    // Flow tables steer by themselves, with or without RPS. Both are needed.
    let entries = number(host, "net/core/rps_sock_flow_entries");
    let flows: u64 = host::numbered(&host.link(slave).join("queues"), "rx-")
        .into_iter()
        .filter_map(|queue| {
            let path = format!("queues/rx-{queue}/rps_flow_cnt");
            host::read_if_any(&host.link(slave).join(path))?
                .parse::<u64>()
                .ok()
        })
        .sum();
    if entries > 0 && flows > 0 {
        // The NIC's own steering follows these tables, and ends with them.
        push(
            "RFS",
            format!(
                "packets received by {slave} are passed on to where the application ran last, by \
                 the NIC itself where it can (aRFS, ntuple)"
            ),
            "\"sysctl -w net.core.rps_sock_flow_entries=0\"".into(),
        );
    }

    // Once it is a slave, XPS is ours.
    let xps = link::xps(host, slave);
    let set: CpuSet = xps
        .iter()
        .flat_map(|queue| queue.cpus.iter().collect::<Vec<_>>())
        .collect();
    if !enslaved && !set.is_empty() {
        push(
            "XPS",
            format!("{} transmit queues of {slave} have CPUs already", xps.len()),
            "cpubond replaces them and restores them; a driver that set them does so again when \
             its channels change"
                .into(),
        );
    }
    rivals
}

fn number(host: &Host, sysctl: &str) -> u64 {
    host::read_if_any(&host.proc.join("sys").join(sysctl))
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}
