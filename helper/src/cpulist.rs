//! Sets of CPUs, read and written as the kernel's cpulist (`0-3,8`) or, where sysfs insists on
//! it, as its hexadecimal mask (`00000001,0000010f`).

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The kernel's largest `NR_CPUS`; a bound so that a typing error cannot ask for 2^32 entries.
const MAX_CPUS: u32 = 8192;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }

    pub fn insert(&mut self, cpu: u32) {
        self.0.insert(cpu);
    }

    pub fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }

    pub fn difference(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }

    /// Parse `xps_cpus` and `rps_cpus`: groups of up to eight hexadecimal digits, the highest
    /// CPUs first.
    pub fn from_mask(mask: &str) -> Result<Self, String> {
        let mut cpus = BTreeSet::new();
        for (group, digits) in mask.trim().rsplit(',').enumerate() {
            let bits = u32::from_str_radix(digits, 16)
                .ok()
                .filter(|_| digits.len() <= 8)
                .ok_or_else(|| format!("'{digits}' is no hexadecimal CPU mask"))?;
            let base = u32::try_from(group).unwrap_or(u32::MAX).saturating_mul(32);
            if bits != 0 && base >= MAX_CPUS {
                return Err(format!("the mask has CPUs above {MAX_CPUS}"));
            }
            cpus.extend(
                (0..32)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| base + bit),
            );
        }
        Ok(Self(cpus))
    }

    pub fn to_mask(&self) -> String {
        let groups = self.0.last().map_or(1, |last| last / 32 + 1);
        let group = |index: u32| {
            self.0
                .range(index * 32..(index + 1) * 32)
                .fold(0u32, |bits, cpu| bits | 1 << (cpu % 32))
        };
        let mut mask = format!("{:x}", group(groups - 1));
        for index in (0..groups - 1).rev() {
            mask.push_str(&format!(",{:08x}", group(index)));
        }
        mask
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let mut cpus = BTreeSet::new();
        let number = |text: &str| {
            text.parse::<u32>()
                .ok()
                .filter(|cpu| *cpu < MAX_CPUS)
                .ok_or_else(|| format!("'{text}' is no CPU number below {MAX_CPUS}"))
        };
        // An empty list is an empty set: files that hold "nothing" hold an empty line.
        for range in list.trim().split(',').filter(|_| !list.trim().is_empty()) {
            match range.split_once('-') {
                None => {
                    cpus.insert(number(range)?);
                }
                Some((low, high)) => {
                    let (low, high) = (number(low)?, number(high)?);
                    if low > high {
                        return Err(format!("'{range}' runs backwards"));
                    }
                    cpus.extend(low..=high);
                }
            }
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut separator = "";
        while let Some(low) = cpus.next() {
            let mut high = low;
            while let Some(next) = cpus.next_if_eq(&(high + 1)) {
                high = next;
            }
            match high - low {
                0 => write!(f, "{separator}{low}")?,
                _ => write!(f, "{separator}{low}-{high}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let set: CpuSet = "0-2,5,8-9\n".parse().unwrap();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 1, 2, 5, 8, 9]);
        assert_eq!(set.to_string(), "0-2,5,8-9");
        assert_eq!("\n".parse(), Ok(CpuSet::default()));
        assert_eq!(CpuSet::from_mask("00000001,0000010f\n"), "0-3,8,32".parse());
        assert_eq!(CpuSet::from_mask("0").unwrap(), CpuSet::default());
        assert_eq!(CpuSet::default().to_mask(), "0");
    }

    #[test]
    fn refuses_what_it_cannot_mean() {
        for bad in [
            "a",
            "1-",
            "-1",
            "3-1",
            "1,,2",
            "1 2",
            "99999",
            "0-4294967295",
        ] {
            assert!(bad.parse::<CpuSet>().is_err(), "{bad}");
        }
        for bad in ["", "g", "123456789", "1,,2"] {
            assert!(CpuSet::from_mask(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn list_and_mask_round_trip(cpus in prop::collection::btree_set(0u32..MAX_CPUS, 0..64)) {
            let set = CpuSet(cpus);
            prop_assert_eq!(&set.to_string().parse::<CpuSet>().unwrap(), &set);
            prop_assert_eq!(&CpuSet::from_mask(&set.to_mask()).unwrap(), &set);
        }

        #[test]
        fn parsing_never_panics(text in "\\PC{0,24}") {
            let _ = text.parse::<CpuSet>();
            let _ = CpuSet::from_mask(&text);
        }
    }
}
