//! `cpubond run`: one daemon a CPU, all behind one port.

mod instance;
mod keeper;
mod signals;
mod supervisor;

pub use keeper::Keep;

use crate::config::{self, Config};
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::steer::control::Control;
use crate::steer::{self, Lock, Method, Protocol, Service, State};
use crate::topology::{self, Cpu};
use clap::Args;
use instance::Slot;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use supervisor::Supervisor;

/// Run one unmodified server program a CPU, all behind one port
#[derive(Args, Debug)]
#[command(
    long_about = "Run one unmodified server program a CPU, all behind one port, and look after them: \
        each CPU's new flows go to the daemon of that CPU.\n\n\
        The command is started once for each CPU of --cpus, pinned there with all it starts, its \
        memory from the CPU's NUMA node. In its words {cpu} becomes the CPU, {port} the port to \
        listen on, {index} 0, 1, 2…; its environment has CPUBOND_CPU, CPUBOND_PORT and \
        CPUBOND_INDEX. It must stay in the foreground or leave what it starts behind as its \
        descendants, and must listen on {port}:\n\n  \
        nat        {port} is a port of its own, --base-port plus the CPU. nftables sends \
        connections to --port there, by CPU. For any program. A firewall of yours sees the \
        daemon's port: let \"ct original proto-dst PORT\" in. Connection tracking remembers each \
        for two minutes: net.netfilter.nf_conntrack_max has to have room for as many.\n  \
        sk_lookup  {port} as for nat. A BPF program finds the listener, nothing is rewritten. \
        For any program that listens by plain TCP; no conntrack needed. Not for UDP: replies would \
        come from the daemon's own port.\n  \
        reuseport  {port} is --port itself; the program must set SO_REUSEPORT, on one socket for \
        each address (nginx: \"listen 80 reuseport\", \"worker_processes 1\"). \
        net.ipv4.tcp_migrate_req is set meanwhile, so that what a daemon that ends has not \
        accepted yet goes to another.\n\n\
        A daemon gets flows once it listens. If it ends, those of its CPU go to the nearest live \
        one until it is back: started again after 1 s, then 2, 4… up to 30 s; once it has lived \
        10 s after 1 s again. It is given up after --give-up ends in a row.\n\n\
        SIGTERM or Ctrl-C stops all: SIGTERM to every process of every daemon, SIGKILL after \
        --grace seconds, then the steering is removed. SIGHUP is passed on. If cpubond itself is \
        killed, the daemons are stopped too. Their output is passed on line by line, with \
        \"[cpu 3] \" before each.\n\n\
        Exit code: 0 if it was told to stop and all daemons ended with 0 or by that SIGTERM; else \
        that of the daemon on the lowest CPU that did not (128 + N if signal N ended it). Once \
        all have been given up, that of the last. Its own errors are 1, 2 and 4.",
    after_long_help = "Examples:\n  \
        A lighttpd a CPU, each with a configuration that says server.port = 8000, 8001…:\n    \
          cpubond run --port 80 -- lighttpd -D -f 'conf.{cpu}'\n  \
        One configuration for all (server.port = env.CPUBOND_PORT), on CPUs 0 to 7, without NAT:\n    \
          cpubond run --port 80 --cpus 0-7 --steer sk_lookup -- lighttpd -D -f lighttpd.conf\n  \
        A DNS server:\n    \
          cpubond run --port 53 --protocol udp --base-port 5300 -- unbound -d -c 'unbound.{cpu}.conf'\n  \
        As configured in /etc/cpubond/config.toml:\n    \
          cpubond run --service web\n  \
        See it, end it:\n    \
          cpubond steer list\n    \
          cpubond steer del lighttpd-80"
)]
pub struct Run {
    /// The port that clients connect to
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..), required_unless_present = "service")]
    port: Option<u16>,
    /// Transport protocol [default: tcp]
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// CPUs to run on, as a cpulist such as 0-3,8 [default: all online CPUs]
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuSet>,
    /// How flows get to their CPU's daemon [default: nat]
    #[arg(long, value_enum, value_name = "METHOD")]
    steer: Option<Method>,
    /// Take port, protocol, cpus, steer and command from this service of the configuration
    #[arg(long, value_name = "NAME", conflicts_with_all = ["port", "protocol", "cpus", "steer", "name", "command"])]
    service: Option<String>,
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = config::PATH)]
    config: PathBuf,
    /// What "cpubond steer" calls it [default: the program and the port, such as lighttpd-80]
    #[arg(long)]
    name: Option<String>,
    /// The daemon of CPU n listens on this port plus n (not under reuseport)
    #[arg(long, value_name = "PORT", default_value_t = 8000, value_parser = clap::value_parser!(u16).range(1..))]
    base_port: u16,
    /// Seconds that daemons are given to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u16,
    /// Ends in a row, none after 10 s of life, after which a daemon is given up; 0: never
    #[arg(long, value_name = "N", default_value_t = 10)]
    give_up: u32,
    /// The program and its arguments
    #[arg(last = true, required_unless_present = "service")]
    command: Vec<String>,
}

/// What is to be run, wherever it was said.
struct Plan {
    service: Service,
    steer: Method,
    cpus: Option<CpuSet>,
    command: Vec<String>,
}

impl Run {
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let plan = self.plan()?;
        plan.steer.check(plan.service.protocol)?;
        let cpus = plan.cpus(topology::online(&host)?)?;
        let slots = plan.slots(&cpus, self.base_port)?;
        let steer = plan.steer.open(&host)?;
        let name = &plan.service.name;
        let _lock = Lock::take(&host, name)?.ok_or_else(|| {
            Error::new(format_args!("service {name}"), "runs already").fix(format_args!(
                "\"cpubond steer del {name}\" ends it, --name gives this one another name"
            ))
        })?;
        if let Some(left) = State::load(&host, name)? {
            eprintln!("cpubond: {name}: removing what its last run has left");
            steer::clean(&host, &left)?;
        }
        check_unsteered(&host, &plan.service)?;
        if plan.steer != Method::Reuseport {
            for slot in &slots {
                check_free(plan.service.protocol, slot.port)?;
            }
        }
        let control = Control::open(&host, name)?;
        Supervisor {
            host: &host,
            state: State::new(plan.service.clone(), plan.steer),
            slots,
            steer,
            control,
            grace: Duration::from_secs(self.grace.into()),
            give_up: self.give_up,
            dead: Vec::new(),
            stale: false,
        }
        .run()
        .map(ExitCode::from)
    }

    fn plan(&self) -> Result<Plan> {
        if let Some(name) = &self.service {
            let config = Config::load(&self.config)?;
            let service = config.service(name).ok_or_else(|| {
                let names: Vec<&str> = config
                    .services
                    .iter()
                    .map(|service| service.name.as_str())
                    .collect();
                Error::new(self.config.display(), format_args!("no service '{name}'"))
                    .fix(match names[..] {
                        [] => "it has none: add a [[service]]".to_string(),
                        _ => format!("it has {}", names.join(", ")),
                    })
                    .exit(Exit::Usage)
            })?;
            return Ok(Plan {
                service: Service {
                    name: name.clone(),
                    protocol: service.protocol,
                    port: service.port,
                },
                steer: service.steer,
                cpus: service.cpus.clone(),
                command: service.command.clone(),
            });
        }
        let port = self.port.unwrap_or_default();
        let name = match &self.name {
            Some(name) => name.clone(),
            None => default_name(&self.command[0], port),
        };
        steer::check_name(&name)?;
        Ok(Plan {
            service: Service {
                name,
                protocol: self.protocol.unwrap_or_default(),
                port,
            },
            steer: self.steer.unwrap_or_default(),
            cpus: self.cpus.clone(),
            command: self.command.clone(),
        })
    }
}

/// The program's file name and the port, as far as a name may have it.
fn default_name(program: &str, port: u16) -> String {
    let file = program.rsplit('/').next().unwrap_or(program);
    let mut name: String = file
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '_' {
                c
            } else {
                '-'
            }
        })
        .collect();
    name = name.trim_start_matches(['-', '_']).to_string();
    name.truncate(26);
    if name.is_empty() {
        name = "service".to_string();
    }
    format!("{name}-{port}")
}

impl Plan {
    /// The online CPUs that it is to run on, by number.
    fn cpus(&self, mut online: Vec<Cpu>) -> Result<Vec<Cpu>> {
        online.sort_by_key(|cpu| cpu.id);
        let Some(wanted) = &self.cpus else {
            return Ok(online);
        };
        let there: CpuSet = online.iter().map(|cpu| cpu.id).collect();
        let offline = wanted.difference(&there);
        if wanted.is_empty() || !offline.is_empty() {
            let found = match wanted.is_empty() {
                true => "empty".to_string(),
                false => format!("CPUs {offline} are not online"),
            };
            return Err(Error::new("--cpus", found).fix(format_args!("choose from {there}")));
        }
        online.retain(|cpu| wanted.contains(cpu.id));
        Ok(online)
    }

    fn slots(&self, cpus: &[Cpu], base_port: u16) -> Result<Vec<Slot>> {
        let public = self.service.port;
        let usage =
            |found: String, fix: &str| Error::new("--base-port", found).fix(fix).exit(Exit::Usage);
        if cpus.len() > 1 && !self.command.iter().any(|word| has_placeholder(word)) {
            eprintln!(
                "cpubond: {}: the command has no {{cpu}}, {{port}} or {{index}}: every daemon gets \
                 the same words, and must listen on the port in its environment's CPUBOND_PORT",
                self.service.name
            );
        }
        (0..)
            .zip(cpus)
            .map(|(index, cpu): (u32, _)| {
                let port = match self.steer {
                    Method::Reuseport => public,
                    Method::Nat | Method::SkLookup => u16::try_from(cpu.id)
                        .ok()
                        .and_then(|cpu| base_port.checked_add(cpu))
                        .ok_or_else(|| {
                            usage(
                                format!("{base_port} plus CPU {} is no port", cpu.id),
                                "use a lower one",
                            )
                        })?,
                };
                if port == public && self.steer != Method::Reuseport {
                    return Err(usage(
                        format!("CPU {} would get port {public}, the public one", cpu.id),
                        "use another, so that each daemon has a port of its own",
                    ));
                }
                let fill = |word: &String| {
                    word.replace("{cpu}", &cpu.id.to_string())
                        .replace("{port}", &port.to_string())
                        .replace("{index}", &index.to_string())
                };
                Ok(Slot::new(
                    cpu.id,
                    cpu.node,
                    port,
                    self.command.iter().map(fill).collect(),
                    vec![
                        ("CPUBOND_CPU", cpu.id.to_string()),
                        ("CPUBOND_PORT", port.to_string()),
                        ("CPUBOND_INDEX", index.to_string()),
                    ],
                ))
            })
            .collect()
    }
}

fn has_placeholder(word: &str) -> bool {
    ["{cpu}", "{port}", "{index}"]
        .iter()
        .any(|placeholder| word.contains(placeholder))
}

/// No other service has the port.
fn check_unsteered(host: &Host, service: &Service) -> Result<()> {
    for name in State::names(host) {
        if let Some(other) = State::load(host, &name)?
            && (other.service.protocol, other.service.port) == (service.protocol, service.port)
        {
            return Err(Error::new(
                format_args!("{} port {}", service.protocol, service.port),
                format_args!("service {name} has it"),
            )
            .fix(format_args!("\"cpubond steer del {name}\" ends that")));
        }
    }
    Ok(())
}

/// Nobody listens on the port, over IPv4 or IPv6.
fn check_free(protocol: Protocol, port: u16) -> Result<()> {
    let any: [SocketAddr; 2] = [
        (Ipv4Addr::UNSPECIFIED, port).into(),
        (Ipv6Addr::UNSPECIFIED, port).into(),
    ];
    for address in any {
        let bound = match protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        match bound {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                return Err(Error::new(
                    format_args!("{protocol} port {port}"),
                    "another program listens on it",
                )
                .fix("choose another --base-port"));
            }
            // Without IPv6 there is nothing to be in use.
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(id: u32) -> Cpu {
        Cpu {
            id,
            node: None,
            llc: id,
            core: id,
        }
    }

    fn plan(steer: Method, command: &[&str]) -> Plan {
        Plan {
            service: Service {
                name: "web".to_string(),
                protocol: Protocol::Tcp,
                port: 8002,
            },
            steer,
            cpus: None,
            command: command.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn fills_placeholders_in_anywhere() {
        let plan = plan(
            Method::Nat,
            &["x", "a{cpu}b{port}", "{index}{index}", "{}{other}"],
        );
        let slots = plan.slots(&[cpu(4), cpu(6)], 9000).unwrap();
        assert_eq!(slots[1].words, ["x", "a6b9006", "11", "{}{other}"]);
        assert_eq!(
            slots[0].environment,
            [
                ("CPUBOND_CPU", "4".to_string()),
                ("CPUBOND_PORT", "9004".to_string()),
                ("CPUBOND_INDEX", "0".to_string())
            ]
        );
    }

    #[test]
    fn gives_ports() {
        let ports = |steer, base| -> Result<Vec<u16>> {
            let slots = plan(steer, &["x{cpu}"]).slots(&[cpu(1), cpu(2)], base)?;
            Ok(slots.iter().map(|slot| slot.port).collect())
        };
        assert_eq!(ports(Method::Nat, 8100).unwrap(), [8101, 8102]);
        assert_eq!(ports(Method::Reuseport, 8100).unwrap(), [8002, 8002]);
        // The public port, and none at all.
        for base in [8000, 65534] {
            let error = ports(Method::SkLookup, base).unwrap_err();
            assert_eq!(error.exit, Exit::Usage);
        }
    }

    #[test]
    fn refuses_cpus_that_are_not_there() {
        let mut plan = plan(Method::Nat, &["x"]);
        for (wanted, good) in [("0-1", true), ("1-2", false), ("", false)] {
            plan.cpus = Some(wanted.parse().unwrap());
            assert_eq!(plan.cpus(vec![cpu(1), cpu(0)]).is_ok(), good, "{wanted}");
        }
    }

    #[test]
    fn names_itself() {
        assert_eq!(default_name("/usr/sbin/lighttpd", 80), "lighttpd-80");
        for program in ["python3.11", "-", "", "ä", &"x".repeat(99)] {
            let name = default_name(program, 65535);
            assert!(steer::is_name(&name), "{name}");
        }
    }

    #[test]
    fn notices_that_a_port_is_taken() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        assert!(check_free(Protocol::Tcp, port).is_err());
        drop(tcp);
        check_free(Protocol::Tcp, port).unwrap();
    }
}
