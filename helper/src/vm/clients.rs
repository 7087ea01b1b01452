//! Clients in the peer: `ApacheBench` from eight addresses at once, as in the paper, with a
//! new connection for each request.

use super::lab::Lab;
use anyhow::{Result, anyhow};
use std::time::{Duration, Instant};

/// Clients, each with an address of its own.
const CLIENTS: u64 = 8;
const LIMIT: Duration = Duration::from_secs(900);

/// How they fared.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Requests that were to be made: those wanted, and what it takes for each client to
    /// make as many.
    pub asked: u64,
    pub complete: u64,
    pub failed: u64,
    /// In the host's time.
    pub seconds: f64,
}

/// Make requests to 10.0.0.1, each client so many of them at once; of the ports, the first
/// client takes the first, and so on around.
///
/// With several at once a client opens a few connections more than it has requests, and
/// leaves them at its end.
pub fn load(lab: &Lab, requests: u64, at_once: u32, ports: &[u16]) -> Result<Load> {
    let each = requests.div_ceil(CLIENTS);
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    // Each client writes its own report; all are shown when all have ended.
    let clients = format!(
        "ports=({ports})
        for i in {{0..{last}}}; do
            ab -q -n {each} -c {at_once} -B 10.0.0.$((11 + i)) \
                http://10.0.0.1:${{ports[i % {count}]}}/ >/tmp/ab-$i 2>&1 &
            pids[i]=$!
        done
        rc=0
        for i in {{0..{last}}}; do
            wait ${{pids[i]}} || {{ rc=$?; echo \"10.0.0.$((11 + i)):\" $(tail -n 1 /tmp/ab-$i) >&2; }}
            cat /tmp/ab-$i
        done
        exit $rc",
        last = CLIENTS - 1,
        count = ports.len(),
        ports = ports.join(" "),
    );
    let start = Instant::now();
    let text = lab
        .peer()
        .output(&clients, LIMIT)
        .map_err(|error| anyhow!("the load in the peer failed: {error:#}"))?;
    let (complete, failed) = parse(&text);
    Ok(Load {
        asked: each * CLIENTS,
        complete,
        failed,
        seconds: start.elapsed().as_secs_f64(),
    })
}

impl Load {
    /// What is wrong with it.
    pub fn problem(&self) -> Option<String> {
        (self.complete != self.asked || self.failed != 0).then(|| {
            format!(
                "of {} requests, {} were complete and {} failed",
                self.asked, self.complete, self.failed
            )
        })
    }
}

/// Sums over the reports of all clients: complete, failed.
fn parse(text: &str) -> (u64, u64) {
    let sum = |label: &str| -> u64 {
        text.lines()
            .filter_map(|line| line.strip_prefix(label)?.trim().parse::<u64>().ok())
            .sum()
    };
    (
        sum("Complete requests:"),
        sum("Failed requests:") + sum("Non-2xx responses:"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_clients_are_summed() {
        let text = "Complete requests:      300\nFailed requests:        0\n\
            Complete requests:      300\nFailed requests:        2\nNon-2xx responses:      1\n";
        assert_eq!(parse(text), (600, 3));
    }

    #[test]
    fn too_few_or_failed_is_a_problem() {
        let load = |complete, failed| Load {
            asked: 600,
            complete,
            failed,
            seconds: 1.0,
        };
        assert_eq!(load(600, 0).problem(), None);
        assert!(load(599, 0).problem().is_some());
        assert!(load(600, 1).problem().is_some());
    }
}
