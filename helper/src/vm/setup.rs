//! The server of the lab, set up as in the paper or as is usual: started, followed,
//! stopped. What is done in the guest is in `guest/setup.sh`.

use super::lab::Lab;
use super::topology::Topology;
use crate::steer::Method;
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);

/// How the server is set up. Outside there is one address and one port in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// One NIC, whose interrupt is on one CPU; one listener; a worker for each CPU, which
    /// runs where the scheduler has it.
    Usual,
    /// A bond in a stock mode with a NIC for each CPU; pinned servers that share the port
    /// by `SO_REUSEPORT`.
    Balance(&'static str),
    /// One NIC with a queue for each CPU, and a server pinned on each, which gets what its
    /// CPU receives: what is best without a bond.
    Multiqueue,
    /// A bond with a NIC for each CPU, and a server pinned on each.
    CpuBound(Method),
}

impl Setup {
    /// Those of the demo.
    pub const ALL: [Self; 4] = [
        Self::Usual,
        Self::CpuBound(Method::Nat),
        Self::CpuBound(Method::SkLookup),
        Self::CpuBound(Method::Reuseport),
    ];
    /// The public port.
    pub const PORT: u16 = 80;

    /// As in `demo.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usual => "usual",
            Self::Balance(mode) => mode,
            Self::Multiqueue => "multiqueue",
            Self::CpuBound(_) => "cpu_bound",
        }
    }

    /// As in `demo.json`: how connections get to their CPU's server.
    pub fn steer(self) -> String {
        match self {
            Self::Usual | Self::Balance(_) => "none".to_string(),
            Self::Multiqueue => Method::Reuseport.to_string(),
            Self::CpuBound(method) => method.to_string(),
        }
    }

    /// The program. lighttpd has no way to set `SO_REUSEPORT`.
    pub fn server(self) -> &'static str {
        match self {
            Self::Usual | Self::CpuBound(Method::Nat | Method::SkLookup) => "lighttpd",
            Self::Balance(_) | Self::Multiqueue | Self::CpuBound(Method::Reuseport) => "nginx",
        }
    }

    /// NICs it has, on so many CPUs.
    fn nics(self, cpus: u32) -> u32 {
        match self {
            Self::Usual | Self::Multiqueue => 1,
            Self::Balance(_) | Self::CpuBound(_) => cpus,
        }
    }

    /// Queues that each of them has.
    fn queues(self, cpus: u32) -> u32 {
        match self {
            Self::Multiqueue => cpus,
            _ => 1,
        }
    }

    /// The machines that it needs.
    pub fn topology(self, cpus: u32) -> Topology {
        Topology {
            cpus,
            nics: self.nics(cpus),
            queues: self.queues(cpus),
            ..Topology::default()
        }
    }

    /// Start it on the first `cpus` CPUs, with a file of `bytes`. Both machines are put
    /// back first.
    pub fn start(self, lab: &Lab, cpus: u32, bytes: u32) -> Result<Running<'_>> {
        let (nics, there) = (self.nics(cpus), lab.topology());
        let queues = self.queues(cpus);
        if cpus == 0 || cpus > there.cpus || nics > there.nics || queues != there.queues {
            bail!(
                "a server with {cpus} CPUs and {nics} NICs of {queues} queues does not fit the \
                 lab's, which has {}, {} and {}",
                there.cpus,
                there.nics,
                there.queues
            );
        }
        lab.reset(&format!("balance-xor layer3+4 {nics}"))?;
        let running = Running { lab };
        running.call(&format!(
            "start {} {} {cpus} {bytes}",
            self.name(),
            self.steer()
        ))?;
        Ok(running)
    }
}

/// A server that runs. It ends when it is stopped, or when the lab is put back.
pub struct Running<'a> {
    lab: &'a Lab,
}

impl Running<'_> {
    fn call(&self, what: &str) -> Result<String> {
        let command = format!("/cpubond/guest/setup.sh {what}");
        self.lab.server().output(&command, STEP)
    }

    /// Connections that the kernel has accepted since boot.
    pub fn accepted(&self) -> Result<u64> {
        let text = self.call("accepted")?;
        text.trim()
            .parse()
            .map_err(|_| anyhow!("PassiveOpens: not a number: '{text}'"))
    }

    /// Follow each connection from here on.
    pub fn audit(&self) -> Result<()> {
        self.call("audit").map(drop)
    }

    /// Once all connections are closed: where they were.
    pub fn audited(&self) -> Result<Audit> {
        Audit::parse(&self.call("audited")?)
    }

    /// Connections that are open, as `ss` tells of them.
    pub fn open(&self) -> Result<String> {
        self.call("open")
    }

    /// Take it down again.
    pub fn stop(self) -> Result<()> {
        self.call("stop").map(drop)
    }
}

/// What is taken of the report of `cpubond audit -j`.
#[derive(Clone, Debug, Deserialize)]
pub struct Audit {
    schema: u32,
    pub totals: Totals,
    pub warnings: Vec<String>,
}

/// Of all connections.
#[derive(Clone, Debug, Deserialize)]
pub struct Totals {
    /// Judged.
    pub connections: u64,
    /// Of these, seen from SYN to end.
    pub complete: u64,
    /// Not judged: no room in the kernel's map.
    pub lost: u64,
    /// Not judged: no socket here sent for them.
    pub no_socket: u64,
    /// Packets that the slaves sent.
    pub seen_tx_packets: u64,
    /// Shares of the connections.
    #[serde(flatten)]
    pub shares: Shares,
    /// Why connections are not local, and how many.
    pub reasons: BTreeMap<String, u64>,
}

/// Shares of connections that were local, at each hop and all along; `None` if there were
/// no connections.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Shares {
    pub rx_local: Option<f64>,
    pub app_local: Option<f64>,
    pub tx_local: Option<f64>,
    pub all_local: Option<f64>,
}

impl Audit {
    /// From the JSON.
    pub fn parse(json: &str) -> Result<Self> {
        let audit: Self = serde_json::from_str(json).context("the report of cpubond audit")?;
        match audit.schema {
            1 => Ok(audit),
            other => bail!("the report of cpubond audit: schema {other}, want 1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_schema_is_refused() {
        let json = r#"{"schema":2,"warnings":[],"totals":{"connections":0,"complete":0,"lost":0,
            "no_socket":0,"seen_tx_packets":0,"reasons":{},
            "rx_local":null,"app_local":null,"tx_local":null,"all_local":null}}"#;
        let error = Audit::parse(json).expect_err("schema 2");
        assert!(error.to_string().contains("schema 2"), "{error}");
        let audit = Audit::parse(&json.replace(":2", ":1")).expect("schema 1");
        assert_eq!(audit.totals.shares.rx_local, None);
        assert!(Audit::parse("{}").is_err());
    }
}
