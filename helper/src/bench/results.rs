//! `target/results/bench.json`: the figures, for other tools to read. Its schema is fixed.

use super::load::Generator;
use super::peer::Peer;
use super::system::Name;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Changes with the meaning of any key.
pub const SCHEMA: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Release of the guests' kernel.
    pub kernel: String,
    /// Of the sources that measured last, as `git describe --always --dirty` has it; empty
    /// where there is no git.
    #[serde(default)]
    pub commit: String,
    /// The transmit path, where there are as many slaves as CPUs.
    #[serde(default)]
    pub tx: Vec<Tx>,
    /// The same with more CPUs than queues a NIC: 8 CPUs, 4 NICs of 2 queues.
    #[serde(default)]
    pub tx_few_queues: Vec<Tx>,
    /// The whole system.
    #[serde(default)]
    pub system: Vec<System>,
}

/// The queues of the slaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slaves {
    /// One each.
    SingleQueue,
    /// More than one; in `tx` one for every CPU.
    Multiqueue,
}

impl Slaves {
    /// As in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleQueue => "single-queue",
            Self::Multiqueue => "multiqueue",
        }
    }
}

/// A peer under a generator: figures a packet, over all rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tx {
    /// What sent.
    pub peer: Peer,
    /// By what.
    pub slaves: Slaves,
    /// Who made the packets.
    pub generator: Generator,
    /// CPUs that sent, all at once.
    pub cpus: u32,
    /// Packets, over all rounds.
    pub packets: u64,
    /// Instructions of the packet's way through the kernel; the generator's own, waiting for
    /// locks, scheduler, timers and interrupts not among them.
    pub insns_per_packet: f64,
    /// Instructions from entry of the bond's transmit function to that of the slave's
    /// `__dev_queue_xmit`; 0 without a bond.
    pub select_insns: f64,
    /// Lines that another CPU wrote or touched in between; mean over the orders of the replay,
    /// median of the rounds.
    pub conflict_lines_per_packet: f64,
    /// Lines that moved between CPUs; mean over the orders of the replay, median of the rounds.
    pub transfers_per_packet: f64,
    /// In the best order of the best round.
    pub transfers_min: f64,
    /// In the worst order of the worst round.
    pub transfers_max: f64,
}

/// The whole system in one set-up: figures a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// Which one.
    pub setup: Name,
    /// Of the server.
    pub cpus: u32,
    /// Bytes of the file.
    pub size: u32,
    /// That were answered, each over a connection of its own.
    pub requests: u64,
    /// That were not; then the other figures are worth nothing.
    pub failed: u64,
    /// Instructions of the requests' way through the kernel and of the server program; waiting
    /// for locks, scheduler, timers and interrupts not among them.
    pub insns_per_request: f64,
    /// In the kernel: lines that another CPU wrote or touched in between; mean over the orders of
    /// the replay.
    pub conflict_lines_per_request: f64,
    /// In the kernel: lines that moved between CPUs; mean over the orders of the replay.
    pub transfers_per_request: f64,
    /// Of the instructions.
    pub busiest_cpu_share: f64,
    /// Requests a time beside those of one CPU in the same set-up, as the model has it; 0 when
    /// that was not measured.
    pub modelled_scaling: f64,
}

impl Results {
    /// Of a file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let results: Self =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if results.schema != SCHEMA {
            bail!(
                "{}: schema {}, want {SCHEMA}: made by another version; run it again",
                path.display(),
                results.schema
            );
        }
        Ok(results)
    }

    /// Change a part of a file, if it is there and can be read; the parts may be measured side by
    /// side. Returns what is in it now.
    pub fn update(
        path: &Path,
        [kernel, commit]: [&str; 2],
        change: impl FnOnce(&mut Self),
    ) -> Result<Self> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut results = Self::load(path).unwrap_or_default();
        results.schema = SCHEMA;
        kernel.clone_into(&mut results.kernel);
        commit.clone_into(&mut results.commit);
        change(&mut results);
        results.save(path)?;
        Ok(results)
    }

    /// To a file, whole or not at all.
    fn save(&self, path: &Path) -> Result<()> {
        let mut json = serde_json::to_string_pretty(self)?;
        json.push('\n');
        super::write_whole(path, json.as_bytes())
    }

    /// The figures of a peer in `tx`.
    pub fn find(&self, peer: Peer, slaves: Slaves, generator: Generator, cpus: u32) -> Option<&Tx> {
        self.tx.iter().find(|tx| {
            tx.peer == peer && tx.slaves == slaves && tx.generator == generator && tx.cpus == cpus
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_changed_and_the_rest_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("bench.json");
        let made = Results::update(&path, ["1", "a"], |results| results.system = vec![system()]);
        assert_eq!(made.expect("is made").schema, SCHEMA);
        let both = Results::update(&path, ["2", "b"], |results| results.tx = Vec::new())
            .expect("is there");
        assert_eq!((both.kernel.as_str(), both.system.len()), ("2", 1));
        assert_eq!(both.commit, "b");
        assert_eq!(Results::load(&path).expect("is written"), both);
    }

    fn system() -> System {
        System {
            setup: Name::CpuBoundSkLookup,
            cpus: 8,
            size: 128,
            requests: 400,
            failed: 0,
            insns_per_request: 1.5,
            conflict_lines_per_request: 0.5,
            transfers_per_request: 0.25,
            busiest_cpu_share: 0.125,
            modelled_scaling: 8.0,
        }
    }

    #[test]
    fn the_schema_is_as_promised() {
        let results = Results {
            schema: SCHEMA,
            kernel: "7.3.4".to_owned(),
            tx: vec![Tx {
                peer: Peer::LacpCpuBound,
                slaves: Slaves::SingleQueue,
                generator: Generator::Pktgen,
                cpus: 4,
                packets: 12,
                insns_per_packet: 1.5,
                select_insns: 100.0,
                conflict_lines_per_packet: 0.5,
                transfers_per_packet: 0.25,
                transfers_min: 0.0,
                transfers_max: 1.0,
            }],
            ..Results::default()
        };
        let json = serde_json::to_value(&results).expect("JSON");
        assert_eq!(json["schema"], 1);
        assert_eq!(json["system"], serde_json::json!([]));
        let tx = json["tx"][0].as_object().expect("an object");
        let keys: Vec<&str> = tx.keys().map(String::as_str).collect();
        let mut promised = [
            "peer",
            "slaves",
            "generator",
            "cpus",
            "packets",
            "insns_per_packet",
            "select_insns",
            "conflict_lines_per_packet",
            "transfers_per_packet",
            "transfers_min",
            "transfers_max",
        ];
        promised.sort_unstable();
        let mut found = keys.clone();
        found.sort_unstable();
        assert_eq!(found, promised);
        assert_eq!(tx["peer"], "802.3ad+cpu_bound");
        assert_eq!(tx["slaves"], "single-queue");
        assert_eq!(tx["generator"], "pktgen");
        let system = serde_json::to_value(system()).expect("JSON");
        assert_eq!(
            system,
            serde_json::json!({
                "setup": "cpu_bound+sk_lookup", "cpus": 8, "size": 128, "requests": 400, "failed": 0,
                "insns_per_request": 1.5, "conflict_lines_per_request": 0.5,
                "transfers_per_request": 0.25, "busiest_cpu_share": 0.125, "modelled_scaling": 8.0
            })
        );
        let back: Results = serde_json::from_value(json).expect("is read again");
        assert_eq!(back, results);
    }
}
