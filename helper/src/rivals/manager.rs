//! Network managers that think a slave is theirs. Each writes down which devices it manages, by
//! index.

use super::{Harm, Rival, ini};
use crate::host::{self, Host};
use crate::link;

pub fn find(host: &Host, slave: &str) -> Vec<Rival> {
    let Some(index) = link::index(host, slave) else {
        return Vec::new();
    };
    let state = |path: String| {
        host::read_if_any(&host.root.join(path))
            .map(|text| ini(&text))
            .unwrap_or_default()
    };
    let has = |entries: &[(String, String, String)], wanted: (&str, &str, &str)| {
        entries
            .iter()
            .any(|(section, key, value)| (section.as_str(), key.as_str(), value.as_str()) == wanted)
    };
    let mut rivals = Vec::new();
    let manager = |rival, fix| Rival {
        rival,
        harm: Harm::Disturbs,
        found: format!("manages {slave} and may take it down, or out of the bond"),
        fix,
    };
    if has(
        &state(format!("run/NetworkManager/devices/{index}")),
        ("device", "managed", "true"),
    ) {
        rivals.push(manager(
            "NetworkManager",
            format!("\"nmcli device set {slave} managed no\", and unmanaged-devices= in its configuration"),
        ));
    }
    // Without a .network file it would be "unmanaged".
    let networkd = state(format!("run/systemd/netif/links/{index}"));
    let theirs = ["configured", "configuring", "pending", "initialized"];
    if theirs
        .iter()
        .any(|state| has(&networkd, ("", "ADMIN_STATE", state)))
    {
        rivals.push(manager(
            "systemd-networkd",
            format!("[Link] Unmanaged=yes in a .network file that matches {slave}"),
        ));
    }
    rivals
}
