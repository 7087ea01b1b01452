//! A bond's options by the names that users, sysfs and `config.toml` have for them, and the
//! kernel's numbers.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Bonding modes; `CpuBound` is the patched driver's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    BalanceRr = 0,
    ActiveBackup = 1,
    BalanceXor = 2,
    Broadcast = 3,
    #[value(name = "802.3ad")]
    #[serde(rename = "802.3ad")]
    Lacp = 4,
    BalanceTlb = 5,
    BalanceAlb = 6,
    #[default]
    #[value(name = "cpu_bound")]
    #[serde(rename = "cpu_bound")]
    CpuBound = 7,
}

/// How balance-xor and 802.3ad (and, but for `CpuBound`, balance-tlb) pick a slave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum HashPolicy {
    #[serde(rename = "layer2")]
    Layer2 = 0,
    #[value(name = "layer3+4")]
    #[serde(rename = "layer3+4")]
    Layer34 = 1,
    #[value(name = "layer2+3")]
    #[serde(rename = "layer2+3")]
    Layer23 = 2,
    #[value(name = "encap2+3")]
    #[serde(rename = "encap2+3")]
    Encap23 = 3,
    #[value(name = "encap3+4")]
    #[serde(rename = "encap3+4")]
    Encap34 = 4,
    #[value(name = "vlan+srcmac")]
    #[serde(rename = "vlan+srcmac")]
    VlanSrcMac = 5,
    #[value(name = "cpu_bound")]
    #[serde(rename = "cpu_bound")]
    CpuBound = 6,
}

/// How often an 802.3ad bond asks its partner to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LacpRate {
    Slow = 0,
    Fast = 1,
}

/// Whose slave a packet takes (`bonding/cpu_bound_follow`): that of the CPU that transmits, or of
/// the CPU that last received for its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Follow {
    Cpu,
    Flow,
}

impl Mode {
    /// Whether the mode picks slaves by this hash policy.
    pub fn uses(self, policy: HashPolicy) -> bool {
        match self {
            Self::Lacp | Self::BalanceXor => true,
            Self::BalanceTlb => policy != HashPolicy::CpuBound,
            _ => false,
        }
    }
}

/// An option's value as the command line and the bond's files in sysfs spell it.
pub fn name(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_string())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Debug;

    /// One name on the command line, in `config.toml` and in the journal.
    fn same_names<T: ValueEnum + Serialize + Debug>() {
        for value in T::value_variants() {
            let serde = serde_json::to_value(value).unwrap();
            assert_eq!(serde.as_str(), Some(name(value.clone()).as_str()));
        }
    }

    #[test]
    fn a_value_has_one_name() {
        same_names::<Mode>();
        same_names::<HashPolicy>();
        same_names::<LacpRate>();
        same_names::<Follow>();
    }
}
