//! `config.toml`: the bonds, and the services on them, that a machine should have.
//!
//! Parsing and checking are pure; `resolve` looks the slaves up on the machine. Every error says
//! file, line and key, what was found and what is allowed.

use crate::change::Kernel;
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::{self, Host};
use crate::link::{self, Mac};
use crate::options::{Follow, HashPolicy, LacpRate, Mode};
use crate::steer::{self, Method, Protocol};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where the configuration is unless `--config` says otherwise.
pub const PATH: &str = "/etc/cpubond/config.toml";

/// All of it. Names of bonds, and of services, are unique; so are the slaves as they are written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(rename = "bond", default)]
    pub bonds: Vec<Bond>,
    #[serde(rename = "service", default)]
    pub services: Vec<Service>,
}

/// One bond, its slaves in the order in which they take their shares of the CPUs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Bond {
    pub name: String,
    #[serde(default)]
    pub mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xmit_hash_policy: Option<HashPolicy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lacp_rate: Option<LacpRate>,
    /// Milliseconds between link checks, never 0.
    #[serde(default = "default_miimon")]
    pub miimon: u32,
    /// `None`: the driver's default is left alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follow: Option<Follow>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    /// CPUs to share out; `None`: all that are online.
    #[serde(
        default,
        deserialize_with = "cpulist",
        skip_serializing_if = "Option::is_none"
    )]
    pub cpus: Option<CpuSet>,
    #[serde(rename = "slave", default, skip_serializing_if = "Vec::is_empty")]
    pub slaves: Vec<Slave>,
}

/// One slave; exactly one of `name`, `mac` and `pci` is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Slave {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<Mac>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci: Option<Pci>,
    /// `None`: a share of the bond's CPUs (`shares`).
    #[serde(
        default,
        deserialize_with = "cpulist",
        skip_serializing_if = "Option::is_none"
    )]
    pub cpus: Option<CpuSet>,
    /// Combined channels to set, never 0; `None`: left as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<u32>,
    /// Also write `bonding_slave/cpus`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub set_cpus: bool,
}

/// How a slave is told from other devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlaveId<'a> {
    Name(&'a str),
    /// The permanent address: a slave's own is not its own.
    Mac(Mac),
    Pci(&'a Pci),
}

/// A program that `cpubond run` starts once a CPU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// As [`steer::is_name`] wants it.
    pub name: String,
    pub port: u16,
    #[serde(default)]
    pub protocol: Protocol,
    /// `None`: all CPUs that are online.
    #[serde(default, deserialize_with = "cpulist")]
    pub cpus: Option<CpuSet>,
    #[serde(default)]
    pub steer: Method,
    /// The program and its arguments, with `{cpu}`, `{port}` and `{index}` to be filled in.
    pub command: Vec<String>,
}

/// An address that an interface can have, with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Address(pub IpNet);

/// A PCI device, `DOMAIN:BUS:DEVICE.FUNCTION` as in `/sys/bus/pci/devices`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pci(String);

fn default_miimon() -> u32 {
    100
}

impl Config {
    /// Read and check a file. Nonsense in it exits with 2, a file that cannot be read with 1.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let fix = match error.kind() {
                std::io::ErrorKind::NotFound => {
                    "write it (\"cpubond plan\" proposes one), or name another with --config"
                }
                std::io::ErrorKind::PermissionDenied => "run as root",
                _ => "see whether it is a text file in UTF-8",
            };
            Error::new(path.display(), format_args!("cannot be read: {error}")).fix(fix)
        })?;
        Self::parse(path, &text)
    }

    /// `path` is for the errors only.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let source = Source::new(path, text)?;
        let config: Self =
            toml::from_str(text).map_err(|error| source.error(error.span(), error.message()))?;
        match config.check() {
            Ok(()) => Ok(config),
            Err(nonsense) => Err(source.nonsense(&nonsense)),
        }
    }

    /// What no single value tells.
    fn check(&self) -> std::result::Result<(), Nonsense> {
        for (index, bond) in self.bonds.iter().enumerate() {
            bond.check().map_err(|error| error.below("bond", index))?;
            if self.bonds[..index]
                .iter()
                .any(|other| other.name == bond.name)
            {
                return Err(twice("name", &bond.name).below("bond", index));
            }
            let earlier = |end: usize| {
                self.bonds[..index]
                    .iter()
                    .flat_map(|bond| &bond.slaves)
                    .chain(&bond.slaves[..end])
            };
            for (place, slave) in bond.slaves.iter().enumerate() {
                let id = slave.id();
                if earlier(place).any(|other| other.id() == id) {
                    return Err(twice(id.key(), id)
                        .below("slave", place)
                        .below("bond", index));
                }
            }
        }
        for (index, service) in self.services.iter().enumerate() {
            service
                .check()
                .map_err(|error| error.below("service", index))?;
            let earlier = &self.services[..index];
            if earlier.iter().any(|other| other.name == service.name) {
                return Err(twice("name", &service.name).below("service", index));
            }
            let same =
                |other: &&Service| (other.port, other.protocol) == (service.port, service.protocol);
            if let Some(other) = earlier.iter().find(same) {
                let nonsense = Nonsense::new(
                    "port",
                    format!("{} is the port of service '{}'", service.port, other.name),
                    "a port of its own for each service",
                );
                return Err(nonsense.below("service", index));
            }
        }
        Ok(())
    }

    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|service| service.name == name)
    }
}

impl Bond {
    /// With everything else as in a file that says no more.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_string(),
            mode: Mode::default(),
            xmit_hash_policy: None,
            lacp_rate: None,
            miimon: default_miimon(),
            follow: None,
            addresses: Vec::new(),
            cpus: None,
            slaves: Vec::new(),
        }
    }

    /// What the command line and the file have in common: whether the values go together.
    pub fn check(&self) -> std::result::Result<(), Nonsense> {
        if !link::is_device_name(&self.name) {
            return Err(no_device_name("name", &self.name));
        }
        if self.slaves.is_empty() {
            return Err(Nonsense::new(
                "slave",
                "the bond has no slaves",
                "at least one [[bond.slave]]",
            ));
        }
        for (index, slave) in self.slaves.iter().enumerate() {
            slave.check().map_err(|error| error.below("slave", index))?;
            let id = slave.id();
            if id == SlaveId::Name(&self.name) {
                return Err(Nonsense::new(
                    "name",
                    format!("'{}' is named as bond and as slave", self.name),
                    "a name of its own for the bond, which is new",
                )
                .below("slave", index));
            }
            if self.slaves[..index].iter().any(|other| other.id() == id) {
                return Err(twice(id.key(), id).below("slave", index));
            }
        }
        for (index, address) in self.addresses.iter().enumerate() {
            if self.addresses[..index].contains(address) {
                return Err(twice("addresses", address));
            }
        }
        if self.lacp_rate.is_some() && self.mode != Mode::Lacp {
            return Err(Nonsense::new(
                "lacp_rate",
                "only 802.3ad has LACP",
                "none, or mode 802.3ad",
            ));
        }
        if self
            .xmit_hash_policy
            .is_some_and(|policy| !self.mode.uses(policy))
        {
            return Err(Nonsense::new(
                "xmit_hash_policy",
                "this mode does not use this policy",
                "none, or mode 802.3ad or balance-xor",
            ));
        }
        if self.follow.is_some() && !self.needs_policy() {
            return Err(Nonsense::new(
                "follow",
                "only mode or xmit_hash_policy cpu_bound follows anything",
                "none, or mode cpu_bound",
            ));
        }
        if self.miimon == 0 {
            return Err(Nonsense::new(
                "miimon",
                "0 turns link checks off, and dead slaves would be sent through",
                "1 or more, such as 100",
            ));
        }
        if self.cpus.as_ref().is_some_and(CpuSet::is_empty) {
            return Err(Nonsense::new("cpus", "empty", CPULIST));
        }
        Ok(())
    }

    /// The hash policy in force: `cpu_bound` where the mode has one and none is named.
    pub fn hash_policy(&self) -> Option<HashPolicy> {
        match self.mode {
            Mode::Lacp | Mode::BalanceXor => {
                Some(self.xmit_hash_policy.unwrap_or(HashPolicy::CpuBound))
            }
            _ => self.xmit_hash_policy,
        }
    }

    /// Whether the bond asks the module which slave to send through.
    pub fn needs_policy(&self) -> bool {
        self.mode == Mode::CpuBound || self.hash_policy() == Some(HashPolicy::CpuBound)
    }
}

impl Slave {
    pub fn named(name: &str) -> Self {
        Self {
            name: Some(name.to_string()),
            ..Self::default()
        }
    }

    pub fn with_mac(mac: Mac) -> Self {
        Self {
            mac: Some(mac),
            ..Self::default()
        }
    }

    pub fn at_pci(pci: Pci) -> Self {
        Self {
            pci: Some(pci),
            ..Self::default()
        }
    }

    pub fn set_cpus(self, set_cpus: bool) -> Self {
        Self { set_cpus, ..self }
    }

    pub fn id(&self) -> SlaveId<'_> {
        match (&self.name, self.mac, &self.pci) {
            (_, Some(mac), _) => SlaveId::Mac(mac),
            (_, _, Some(pci)) => SlaveId::Pci(pci),
            (name, ..) => SlaveId::Name(name.as_deref().unwrap_or_default()),
        }
    }

    fn check(&self) -> std::result::Result<(), Nonsense> {
        let ids = [self.name.is_some(), self.mac.is_some(), self.pci.is_some()];
        let allowed = "exactly one of name, mac and pci";
        match ids.iter().filter(|there| **there).count() {
            0 => {
                return Err(Nonsense::new(
                    "",
                    "nothing says which device it is",
                    allowed,
                ));
            }
            1 => {}
            _ => return Err(Nonsense::new("", "named in more than one way", allowed)),
        }
        if let Some(name) = &self.name
            && !link::is_device_name(name)
        {
            return Err(no_device_name("name", name));
        }
        if self.channels == Some(0) {
            return Err(Nonsense::new("channels", "0", "1 or more"));
        }
        if self.cpus.as_ref().is_some_and(CpuSet::is_empty) {
            return Err(Nonsense::new("cpus", "empty", CPULIST));
        }
        Ok(())
    }

    /// The device's name now; `None` if it is not there. Fails if more than one fits.
    pub fn resolve(&self, host: &Host, kernel: &mut dyn Kernel) -> Result<Option<String>> {
        let links = host::names(&host.sys.join("class/net")).into_iter();
        let mut found: Vec<String> = match self.id() {
            SlaveId::Name(name) => links.filter(|link| link == name).collect(),
            SlaveId::Pci(pci) => links
                .filter(|link| link::pci(host, link).as_deref() == Some(&pci.0))
                .collect(),
            SlaveId::Mac(mac) => {
                let mut found = Vec::new();
                // `bonding_masters` is no device. What is stacked on a NIC has no permanent
                // address, and slaves of a bond have one address, but not one permanent address.
                for link in links.filter(|link| link::index(host, link).is_some()) {
                    if kernel.permanent_mac(&link)? == Some(mac) {
                        found.push(link);
                    }
                }
                found
            }
        };
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(Error::new(
                self.id(),
                format_args!("more than one network device is that: {}", found.join(", ")),
            )
            .fix("use name")),
        }
    }

    /// The error for one that is not there.
    pub fn missing(&self) -> Error {
        Error::new(self.id(), "no such network device").fix(match self.id() {
            SlaveId::Name(_) => "\"ip link\" lists them",
            SlaveId::Mac(_) => {
                "\"ip -d link\" shows permanent addresses (permaddr; link/ether if that is it)"
            }
            SlaveId::Pci(_) => "\"ls -l /sys/class/net\" shows PCI devices",
        })
    }
}

impl Service {
    fn check(&self) -> std::result::Result<(), Nonsense> {
        if !steer::is_name(&self.name) {
            return Err(Nonsense::new(
                "name",
                format!("'{}' is no name of a service", self.name),
                steer::NAME,
            ));
        }
        if self.port == 0 {
            return Err(Nonsense::new("port", "0", "1 to 65535"));
        }
        if self.cpus.as_ref().is_some_and(CpuSet::is_empty) {
            return Err(Nonsense::new("cpus", "empty", CPULIST));
        }
        if self.command.first().is_none_or(String::is_empty) {
            return Err(Nonsense::new(
                "command",
                "no program",
                "a program and its arguments",
            ));
        }
        Ok(())
    }
}

impl SlaveId<'_> {
    pub fn key(self) -> &'static str {
        match self {
            Self::Name(_) => "name",
            Self::Mac(_) => "mac",
            Self::Pci(_) => "pci",
        }
    }
}

impl fmt::Display for SlaveId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Mac(mac) => write!(f, "mac {mac}"),
            Self::Pci(pci) => write!(f, "pci {}", pci.0),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let address: IpNet = text.parse().map_err(|_| {
            format!("'{text}' is not an address with a prefix length, such as 192.0.2.1/24")
        })?;
        let host = address.addr();
        match host.is_loopback() || host.is_multicast() || host.is_unspecified() {
            true => Err(format!("'{text}' is no address for a network interface")),
            false => Ok(Self(address)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl FromStr for Pci {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let hex = |text: &str, digits: usize| {
            text.len() == digits && text.chars().all(|c| c.is_ascii_hexdigit())
        };
        // lspci leaves domain 0 out.
        let full = match text.matches(':').count() {
            1 => format!("0000:{text}"),
            _ => text.to_string(),
        };
        let parts: Vec<&str> = full.split([':', '.']).collect();
        match parts[..] {
            [domain, bus, device, function]
                if domain.len() >= 4
                    && hex(domain, domain.len())
                    && hex(bus, 2)
                    && hex(device, 2)
                    && hex(function, 1) =>
            {
                Ok(Self(full.to_ascii_lowercase()))
            }
            _ => Err(format!(
                "'{text}' is no PCI device; allowed: as in lspci, such as 0000:03:00.1"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Pci {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

const CPULIST: &str = "a cpulist such as \"0-3,8\"";

fn cpulist<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<CpuSet>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map(Some)
        .map_err(|error: String| de::Error::custom(format_args!("{error}; allowed: {CPULIST}")))
}

/// Values that are all right each, but not together: where, what was found, what is allowed.
#[derive(Debug)]
pub struct Nonsense {
    /// Keys and, before each but the last, which of the tables of that name.
    tables: Vec<(&'static str, usize)>,
    pub key: &'static str,
    pub found: String,
    pub allowed: &'static str,
}

impl Nonsense {
    fn new(key: &'static str, found: impl Into<String>, allowed: &'static str) -> Self {
        Self {
            tables: Vec::new(),
            key,
            found: found.into(),
            allowed,
        }
    }

    /// As an error in the arguments of a command whose options are named as the keys are.
    pub fn of_command(self, command: &str) -> Error {
        let place = match self.key {
            "" | "name" | "slave" => command.to_string(),
            "addresses" => "--address".to_string(),
            key => format!("--{}", key.replace('_', "-")),
        };
        Error::new(place, self.found)
            .fix(format_args!("allowed: {}", self.allowed))
            .exit(Exit::Usage)
    }

    fn below(mut self, table: &'static str, index: usize) -> Self {
        self.tables.insert(0, (table, index));
        self
    }
}

fn twice(key: &'static str, value: impl fmt::Display) -> Nonsense {
    Nonsense::new(key, format!("'{value}' is there twice"), "each one once")
}

fn no_device_name(key: &'static str, name: &str) -> Nonsense {
    Nonsense::new(
        key,
        format!("'{name}' is no name of a network device"),
        "1 to 15 characters without spaces, '/' and ':'",
    )
}

/// The text with its keys' places, for errors.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
    root: Spanned<DeTable<'a>>,
}

impl<'a> Source<'a> {
    fn new(path: &'a Path, text: &'a str) -> Result<Self> {
        match DeTable::parse(text) {
            Ok(root) => Ok(Self { path, text, root }),
            Err(error) => {
                let line = line_of(text, error.span().map_or(0, |span| span.start));
                Err(usage(path, line, "", error.message()))
            }
        }
    }

    /// An error of the parser's: its message has what was found and what is allowed.
    fn error(&self, span: Option<Range<usize>>, message: &str) -> Error {
        let span = span.unwrap_or(0..0);
        let key = key_at(self.root.get_ref(), &span);
        usage(
            self.path,
            line_of(self.text, span.start),
            &key.unwrap_or_default(),
            message,
        )
    }

    fn nonsense(&self, nonsense: &Nonsense) -> Error {
        let mut table = self.root.get_ref();
        let mut start = 0;
        let mut path = String::new();
        for (name, index) in &nonsense.tables {
            path.push_str(name);
            path.push('.');
            if let Some(found) = table
                .get(*name)
                .and_then(|value| value.get_ref().get(*index))
            {
                start = found.span().start;
                if let DeValue::Table(inner) = found.get_ref() {
                    table = inner;
                }
            }
        }
        if let Some((key, _)) = table.get_key_value(nonsense.key) {
            start = key.span().start;
        }
        path.push_str(nonsense.key);
        let message = format!("{}; allowed: {}", nonsense.found, nonsense.allowed);
        usage(
            self.path,
            line_of(self.text, start),
            path.trim_end_matches('.'),
            &message,
        )
    }
}

fn usage(path: &Path, line: usize, key: &str, message: &str) -> Error {
    let place = format!("{}:{line}", path.display());
    let message = message.trim().replace('\n', ", ");
    let found = match key {
        "" => message,
        key => format!("{key}: {message}"),
    };
    Error::new(place, found).exit(Exit::Usage)
}

/// Counted from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
}

/// The dotted keys down to the innermost value that holds this part of the text.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let key = key.get_ref();
        let below = |table| key_at(table, span).map(|below| format!("{key}.{below}"));
        let is_here = |value: &Spanned<DeValue<'_>>| {
            value.span().start <= span.start && span.end <= value.span().end
        };
        let deeper = match value.get_ref() {
            DeValue::Table(inner) => below(inner),
            DeValue::Array(values) => values.iter().find_map(|value| {
                let inner = value.get_ref().as_table().and_then(below);
                // The place of a table in an array of tables is its header.
                inner.or_else(|| is_here(value).then(|| key.to_string()))
            }),
            _ => None,
        };
        deeper.or_else(|| is_here(value).then(|| key.to_string()))
    })
}

/// A slave on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The device's name now.
    pub link: String,
    pub slave: Slave,
}

/// The devices that a bond's slaves are now, in the same order, and an error for each that is not
/// there; two that are one device are an error. What other bonds have is for the caller to see.
pub fn resolve(
    host: &Host,
    kernel: &mut dyn Kernel,
    bond: &Bond,
) -> Result<(Vec<Resolved>, Vec<Error>)> {
    let mut resolved: Vec<Resolved> = Vec::new();
    let mut missing = Vec::new();
    for slave in &bond.slaves {
        let Some(link) = slave.resolve(host, kernel)? else {
            missing.push(slave.missing());
            continue;
        };
        if let Some(other) = resolved.iter().find(|other| other.link == link) {
            return Err(Error::new(
                format_args!("{}: {}", bond.name, slave.id()),
                format_args!("is {link}, as {} is", other.slave.id()),
            )
            .fix("name each slave once")
            .exit(Exit::Usage));
        }
        resolved.push(Resolved {
            link,
            slave: slave.clone(),
        });
    }
    Ok((resolved, missing))
}

/// The file to use: what `--config` named, or the usual one.
pub fn path(option: Option<&Path>) -> PathBuf {
    option.map_or_else(|| PATH.into(), Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeKernel, cpus};

    const FULL: &str = r#"
[[bond]]
name = "bond0"
mode = "cpu_bound"
miimon = 50
follow = "flow"
addresses = ["192.0.2.10/24", "2001:db8::10/64"]
cpus = "0-7"

[[bond.slave]]
name = "eth0"
cpus = "0-3"
channels = 4

[[bond.slave]]
mac = "52:54:00:00:00:01"
set_cpus = true

[[bond.slave]]
pci = "0000:03:00.1"

[[bond]]
name = "bond1"
mode = "802.3ad"
lacp_rate = "fast"
[[bond.slave]]
name = "eth4"

[[service]]
name = "web"
port = 80
steer = "sk_lookup"
command = ["lighttpd", "-D", "-f", "conf.{cpu}"]
"#;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(Path::new("c.toml"), text)
    }

    /// What the guide says is what the program reads.
    #[test]
    fn the_guide_shows_a_configuration() {
        let guide = include_str!("../../docs/guide.md");
        let blocks: Vec<&str> = guide
            .split("```toml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next())
            .collect();
        assert_eq!(blocks.len(), 1);
        let config = Config::parse(Path::new("guide.md"), blocks[0]).unwrap();
        assert_eq!(config.bonds[0].slaves.len(), 2);
        assert_eq!(config.services[0].name, "web");
    }

    #[test]
    fn reads_all_of_it() {
        let config = parse(FULL).unwrap();
        let [bond0, bond1] = &config.bonds[..] else {
            panic!("{config:?}")
        };
        assert_eq!((bond0.mode, bond0.miimon), (Mode::CpuBound, 50));
        assert_eq!(bond0.follow, Some(Follow::Flow));
        assert_eq!(bond0.addresses.len(), 2);
        assert_eq!(bond0.cpus, Some(cpus("0-7")));
        let [a, b, c] = &bond0.slaves[..] else {
            panic!("{bond0:?}")
        };
        assert_eq!(a.id(), SlaveId::Name("eth0"));
        assert_eq!((&a.cpus, a.channels), (&Some(cpus("0-3")), Some(4)));
        assert_eq!(b.id().to_string(), "mac 52:54:00:00:00:01");
        assert!(b.set_cpus && !a.set_cpus);
        assert_eq!(c.id().to_string(), "pci 0000:03:00.1");
        assert_eq!(bond1.hash_policy(), Some(HashPolicy::CpuBound));
        assert_eq!((bond1.miimon, bond1.follow), (100, None));
        let web = config.service("web").unwrap();
        assert_eq!((web.protocol, web.steer), (Protocol::Tcp, Method::SkLookup));
        assert_eq!(parse("").unwrap().bonds, []);
    }

    /// Replaces `from` in the full text, which must then be refused at `line` with all of `words`.
    fn refused(from: &str, to: &str, line: usize, words: &[&str]) {
        assert!(FULL.contains(from), "{from}");
        let error = parse(&FULL.replacen(from, to, 1)).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        let text = error.to_string();
        assert!(text.starts_with(&format!("c.toml:{line}: ")), "{text}");
        assert!(!text.contains('\n'), "{text}");
        for word in words {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
    }

    #[test]
    fn errors_say_line_key_found_and_allowed() {
        refused(
            "\"cpu_bound\"",
            "\"lacp\"",
            4,
            &["bond.mode", "`lacp`", "`802.3ad`"],
        );
        refused(
            "miimon = 50",
            "miimon = \"x\"",
            5,
            &["bond.miimon", "\"x\"", "u32"],
        );
        refused(
            "miimon = 50",
            "miimon = 0",
            5,
            &["bond.miimon", "link checks", "100"],
        );
        refused("miimon", "miimom", 5, &["`miimom`", "`miimon`"]);
        refused(
            "\"flow\"",
            "\"thread\"",
            6,
            &["bond.follow", "`thread`", "`cpu`"],
        );
        refused(
            "\"192.0.2.10/24\"",
            "\"192.0.2.10\"",
            7,
            &["bond.addresses", "prefix"],
        );
        refused(
            "\"192.0.2.10/24\"",
            "\"127.0.0.1/8\"",
            7,
            &["bond.addresses", "127.0.0.1/8"],
        );
        refused(
            "2001:db8::10/64",
            "192.0.2.10/24",
            7,
            &["bond.addresses", "twice"],
        );
        refused("\"0-7\"", "\"7-0\"", 8, &["bond.cpus", "'7-0'", "such as"]);
        refused("\"0-7\"", "\"\"", 8, &["bond.cpus", "empty", "such as"]);
        refused(
            "\"eth0\"",
            "\"eth 0\"",
            11,
            &["bond.slave.name", "'eth 0'", "15 characters"],
        );
        refused(
            "\"eth0\"",
            "\"bond0\"",
            11,
            &["bond.slave.name", "bond and as slave"],
        );
        refused(
            "channels = 4",
            "channels = 0",
            13,
            &["bond.slave.channels", "1 or more"],
        );
        refused(
            "channels = 4",
            "pci = \"01:00.0\"",
            10,
            &["bond.slave", "exactly one of"],
        );
        refused(
            "mac = \"52:54:00:00:00:01\"",
            "",
            15,
            &["bond.slave", "exactly one of"],
        );
        refused(
            "52:54:00:00:00:01",
            "52:54:00:01",
            16,
            &["bond.slave.mac", "52:54:00:01"],
        );
        refused(
            "0000:03:00.1",
            "3:0.1",
            20,
            &["bond.slave.pci", "3:0.1", "0000:03:00.1"],
        );
        refused(
            "\"bond1\"",
            "\"bond0\"",
            23,
            &["bond.name", "'bond0' is there twice"],
        );
        refused(
            "name = \"bond1\"",
            "",
            22,
            &["bond", "missing field `name`"],
        );
        refused(
            "\"802.3ad\"",
            "\"balance-rr\"",
            25,
            &["bond.lacp_rate", "802.3ad"],
        );
        refused(
            "lacp_rate = \"fast\"",
            "follow = \"cpu\"\nxmit_hash_policy = \"layer2\"",
            25,
            &["bond.follow"],
        );
        refused(
            "\"802.3ad\"\nlacp_rate = \"fast\"",
            "\"balance-rr\"\nxmit_hash_policy = \"layer2\"",
            25,
            &["bond.xmit_hash_policy"],
        );
        refused(
            "\"eth4\"",
            "\"eth0\"",
            27,
            &["bond.slave.name", "'eth0' is there twice"],
        );
        refused(
            "[[bond.slave]]\nname = \"eth4\"",
            "",
            22,
            &["bond", "no slaves"],
        );
        refused(
            "\"web\"",
            "\"../web\"",
            30,
            &["service.name", "'../web'", "letters"],
        );
        refused("port = 80", "port = 0", 31, &["service.port", "1 to 65535"]);
        refused(
            "port = 80",
            "port = 80000",
            31,
            &["service.port", "80000", "u16"],
        );
        refused(
            "\"sk_lookup\"",
            "\"magic\"",
            32,
            &["service.steer", "`magic`", "`nat`"],
        );
        refused(
            "\"lighttpd\", \"-D\", \"-f\", \"conf.{cpu}\"",
            "",
            33,
            &["service.command", "program"],
        );
        refused("[[service]]", "[[service]", 29, &["]"]);
        let two = format!("{FULL}\n[[service]]\nname = \"b\"\nport = 80\ncommand = [\"b\"]\n");
        let error = parse(&two).unwrap_err().to_string();
        assert!(
            error.starts_with("c.toml:37: service.port: 80 is the port of service 'web'"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/c.toml")).unwrap_err();
        assert_eq!(error.exit, Exit::Failed);
        assert!(
            error.to_string().starts_with("/nonexistent/c.toml: "),
            "{error}"
        );
    }

    #[test]
    fn slaves_are_found_by_name_address_and_place() {
        let fake = Fake::with_cpus(2);
        fake.nic("eth0", &[]);
        fake.nic("eth1", &[]);
        let mut kernel = FakeKernel::new(&fake);
        let mac = "02:00:00:00:00:01".parse().unwrap();
        kernel.permanent.insert("eth1".into(), mac);
        let host = fake.host();
        let mut find = |slave: &str| {
            let text = format!(
                "[[bond]]\nname = \"b\"\n[[bond.slave]]\nname = \"eth0\"\n[[bond.slave]]\n{slave}\n"
            );
            let config = parse(&text).unwrap();
            let (slaves, mut missing) =
                resolve(&host, &mut kernel, &config.bonds[0]).map_err(|error| error.to_string())?;
            match missing.pop() {
                Some(error) => Err(error.to_string()),
                None => Ok(slaves[1].link.clone()),
            }
        };
        assert_eq!(find("name = \"eth1\"").unwrap(), "eth1");
        assert_eq!(find("mac = \"02:00:00:00:00:01\"").unwrap(), "eth1");
        let pci = |nic: &str| link::pci(&host, nic).unwrap();
        assert_eq!(find(&format!("pci = \"{}\"", pci("eth1"))).unwrap(), "eth1");
        let same = find(&format!("pci = \"{}\"", pci("eth0"))).unwrap_err();
        assert!(same.contains("is eth0, as eth0 is"), "{same}");
        assert!(find("name = \"eth9\"").unwrap_err().contains("no such"));
        assert!(
            find("mac = \"02:00:00:00:00:02\"")
                .unwrap_err()
                .contains("02:00:00:00:00:02")
        );
        assert!(
            find("pci = \"ffff:00:00.0\"")
                .unwrap_err()
                .contains("ffff:00:00.0")
        );
    }
}
