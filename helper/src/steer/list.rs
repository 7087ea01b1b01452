//! `cpubond steer list`. Writes nothing.

use super::{Daemon, Lock, Phase, State};
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use serde::Serialize;
use std::fmt;

const SCHEMA: u32 = 1;

#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    services: Vec<ServiceReport>,
}

#[derive(Debug, Serialize)]
struct ServiceReport {
    name: String,
    protocol: super::Protocol,
    port: u16,
    steer: super::Method,
    /// `null` if it has ended without tidying up.
    supervisor: Option<u32>,
    daemons: Vec<DaemonReport>,
    /// What the kernel has that is not as it should be.
    differences: Vec<String>,
}

#[derive(Debug, Serialize)]
struct DaemonReport {
    #[serde(flatten)]
    daemon: Daemon,
    /// The CPUs whose new flows it takes.
    takes: CpuSet,
}

pub fn run(host: &Host, name: Option<&str>, json: bool) -> Result<()> {
    let names = match name {
        Some(name) => vec![name.to_string()],
        None => State::names(host),
    };
    let mut services = Vec::new();
    for service in names {
        match State::load(host, &service)? {
            Some(state) => services.push(ServiceReport::new(host, &state)),
            // It may have ended since its name was read.
            None if name.is_none() => {}
            None => {
                return Err(
                    Error::new(service, "no such service").fix("\"cpubond steer list\" lists them")
                );
            }
        }
    }
    let drifted = services
        .iter()
        .find(|service| !service.differences.is_empty())
        .map(|service| service.name.clone());
    let report = Report {
        schema: SCHEMA,
        services,
    };
    if json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| Error::new("cpubond steer list", error))?;
        println!("{json}");
    } else {
        print!("{report}");
    }
    match drifted {
        None => Ok(()),
        Some(name) => Err(Error::new(
            format_args!("service {name}"),
            "not everything is as it should be",
        )
        .fix("see its warnings")
        .exit(Exit::Drift)),
    }
}

impl ServiceReport {
    fn new(host: &Host, state: &State) -> Self {
        let alive = Lock::is_held(host, &state.service.name);
        let mut differences = match state.steer.open(host) {
            Ok(mut steer) => steer
                .differences(&state.service, &state.table)
                .unwrap_or_else(|error| vec![format!("not compared: {error}")]),
            Err(error) => vec![format!("not compared: {error}")],
        };
        if !alive {
            differences.push(format!(
                "its \"cpubond run\" (process {}) has ended and left this behind",
                state.supervisor
            ));
        }
        let daemons = state
            .daemons
            .iter()
            .map(|daemon| DaemonReport {
                daemon: daemon.clone(),
                takes: state
                    .table
                    .iter()
                    .filter(|(_, instance)| instance.cpu == daemon.cpu)
                    .map(|(cpu, _)| *cpu)
                    .collect(),
            })
            .collect();
        Self {
            name: state.service.name.clone(),
            protocol: state.service.protocol,
            port: state.service.port,
            steer: state.steer,
            supervisor: alive.then_some(state.supervisor),
            daemons,
            differences,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.services.is_empty() {
            writeln!(f, "no services")?;
        }
        for service in &self.services {
            write!(
                f,
                "{}: {} port {} by {}",
                service.name, service.protocol, service.port, service.steer
            )?;
            match service.supervisor {
                Some(pid) => writeln!(f, ", process {pid}")?,
                None => writeln!(f)?,
            }
            writeln!(f, "  CPU   port     pid  state     restarts  takes CPUs")?;
            for report in &service.daemons {
                let daemon = &report.daemon;
                let pid = daemon
                    .pid
                    .map_or_else(|| "-".to_string(), |pid| pid.to_string());
                let takes = match report.takes.is_empty() {
                    true => "-".to_string(),
                    false => report.takes.to_string(),
                };
                writeln!(
                    f,
                    "{:>5}  {:>5}  {:>6}  {:<8}  {:>8}  {takes}",
                    daemon.cpu, daemon.port, pid, daemon.phase, daemon.restarts
                )?;
            }
            for line in &service.differences {
                writeln!(f, "  warning: {line}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Draining => "draining",
            Self::Down => "down",
            Self::GivenUp => "given up",
        })
    }
}
