//! The machines a test asks for, in its `# vm:` line.

use anyhow::{Result, anyhow, bail};
use std::time::Duration;

/// What has to be booted. Tests that want the same share machines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Topology {
    /// CPUs of the server.
    pub cpus: u32,
    /// Cables.
    pub nics: u32,
    /// Queue pairs of each server NIC.
    pub queues: u32,
    /// Whether NICs of several queues compute checksums and cut long packets, as those of one
    /// queue cannot.
    pub offload: bool,
    /// CPU sockets of the server, each a NUMA node.
    pub sockets: u32,
    /// Whether the server runs under the profiler.
    pub profiler: bool,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            cpus: 4,
            nics: 4,
            queues: 1,
            offload: true,
            sockets: 1,
            profiler: false,
        }
    }
}

/// A test's `# vm:` line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The machines.
    pub topology: Topology,
    /// Mode of the peer's bond, or `none`.
    pub peer: String,
    /// After which the test has failed.
    pub timeout: Duration,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            topology: Topology::default(),
            peer: "balance-xor".to_owned(),
            timeout: Duration::from_secs(120),
        }
    }
}

impl Wanted {
    /// From the text of a test. No `# vm:` line means the usual machines.
    pub fn parse(script: &str) -> Result<Self> {
        let mut wanted = Self::default();
        let line = script
            .lines()
            .take_while(|line| line.starts_with('#') || line.is_empty())
            .find_map(|line| line.strip_prefix("# vm:"));
        for word in line.unwrap_or_default().split_whitespace() {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| anyhow!("'# vm:' line: '{word}' is not KEY=VALUE"))?;
            let number = |max: u32| -> Result<u32> {
                value
                    .parse()
                    .ok()
                    .filter(|n| (1..=max).contains(n))
                    .ok_or_else(|| anyhow!("'# vm:' line: {key}={value}: want 1 to {max}"))
            };
            let flag = || match value {
                "0" => Ok(false),
                "1" => Ok(true),
                _ => bail!("'# vm:' line: {key}={value}: want 0 or 1"),
            };
            let topology = &mut wanted.topology;
            match key {
                "cpus" => topology.cpus = number(64)?,
                // Slots of the root bus.
                "nics" => topology.nics = number(24)?,
                "queues" => topology.queues = number(16)?,
                "sockets" => topology.sockets = number(8)?,
                "offload" => topology.offload = flag()?,
                "profiler" => topology.profiler = flag()?,
                "timeout" => wanted.timeout = Duration::from_secs(number(3600)?.into()),
                "peer" => match value {
                    "balance-xor" | "802.3ad" | "none" => value.clone_into(&mut wanted.peer),
                    _ => bail!("'# vm:' line: peer={value}: want balance-xor, 802.3ad or none"),
                },
                _ => bail!("'# vm:' line: no such key: {key}"),
            }
        }
        let Topology { cpus, sockets, .. } = wanted.topology;
        if cpus.checked_rem(sockets) != Some(0) {
            bail!("'# vm:' line: {cpus} CPUs do not divide into {sockets} sockets");
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_with_no_line_gets_the_usual_machines() {
        let wanted = Wanted::parse("#!/bin/bash\necho hello\n").expect("parses");
        assert_eq!(wanted, Wanted::default());
    }

    #[test]
    fn each_key_is_read() {
        let wanted = Wanted::parse(
            "#!/bin/bash\n# About.\n# vm: cpus=8 nics=2 queues=4 offload=0 sockets=2 profiler=1 peer=none timeout=9\n",
        )
        .expect("parses");
        assert_eq!(
            wanted.topology,
            Topology {
                cpus: 8,
                nics: 2,
                queues: 4,
                offload: false,
                sockets: 2,
                profiler: true
            }
        );
        assert_eq!(wanted.peer, "none");
        assert_eq!(wanted.timeout, Duration::from_secs(9));
    }

    #[test]
    fn a_bad_line_says_what_is_wrong() {
        for (line, complaint) in [
            ("cpus", "KEY=VALUE"),
            ("cpus=0", "want 1 to 64"),
            ("nics=many", "want 1 to 24"),
            ("profiler=yes", "want 0 or 1"),
            ("offload=on", "want 0 or 1"),
            ("colour=red", "no such key"),
            ("peer=rr", "want balance-xor"),
            ("cpus=3 sockets=2", "do not divide"),
        ] {
            let error = Wanted::parse(&format!("# vm: {line}\n")).expect_err(line);
            assert!(error.to_string().contains(complaint), "{line}: {error}");
        }
    }

    #[test]
    fn a_line_below_the_code_is_not_a_header() {
        let wanted = Wanted::parse("#!/bin/bash\ntrue\n# vm: cpus=9\n").expect("parses");
        assert_eq!(wanted, Wanted::default());
    }
}
