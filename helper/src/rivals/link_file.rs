//! systemd's `.link` files: udev applies one to a device whenever it adds the device, or is
//! triggered to. Which one it was is in its database.

use super::{Harm, Rival, ini};
use crate::host::{self, Host};
use crate::link;
use std::path::PathBuf;

/// Keys of `[Link]` that touch what cpubond sets, and what they do. `IRQAffinityPolicy=` came
/// after systemd 257, `ReceivePacketSteeringCPUMask=` with 256.
const KEYS: [(&str, &str); 7] = [
    ("IRQAffinity", "moves its interrupts"),
    ("IRQAffinityPolicy", "moves its interrupts"),
    ("ReceivePacketSteeringCPUMask", "sets RPS"),
    ("CombinedChannels", "makes its queues and interrupts anew"),
    ("RxChannels", "makes its queues and interrupts anew"),
    ("TxChannels", "makes its queues and interrupts anew"),
    ("NTupleFilter", "lets flows be steered to other queues"),
];

pub fn find(host: &Host, slave: &str) -> Vec<Rival> {
    let mut rivals = Vec::new();
    for path in files(host, slave) {
        // It may have been deleted since.
        let text = host::read_if_any(&path).unwrap_or_default();
        for (section, key, value) in ini(&text) {
            let known = KEYS.iter().find(|(name, _)| *name == key);
            let Some((_, does)) = known.filter(|_| section == "Link" && !value.is_empty()) else {
                continue;
            };
            if key == "NTupleFilter" && !is_true(&value) {
                continue;
            }
            rivals.push(Rival {
                rival: "systemd .link",
                harm: Harm::Disturbs,
                found: format!(
                    "{key}={value} {does} whenever udev adds {slave}: {}",
                    path.display()
                ),
                fix: format!("take the line out, or have the file not match {slave}"),
            });
        }
    }
    rivals
}

/// The `.link` file that udev applied, and its drop-ins.
fn files(host: &Host, slave: &str) -> Vec<PathBuf> {
    let Some(index) = link::index(host, slave) else {
        return Vec::new();
    };
    let entry = host::read_if_any(&host.root.join(format!("run/udev/data/n{index}")));
    let property = |name: &str| {
        entry.as_deref()?.lines().find_map(|line| {
            line.strip_prefix("E:")?
                .strip_prefix(name)?
                .strip_prefix('=')
        })
    };
    let file = property("ID_NET_LINK_FILE").into_iter();
    let dropins = property("ID_NET_LINK_FILE_DROPINS").into_iter();
    file.chain(dropins.flat_map(|dropins| dropins.split(':')))
        .filter(|path| !path.is_empty())
        .map(|path| host.root.join(path.trim_start_matches('/')))
        .collect()
}

fn is_true(value: &str) -> bool {
    ["1", "yes", "y", "true", "t", "on"].contains(&value.to_ascii_lowercase().as_str())
}
