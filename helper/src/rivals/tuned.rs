//! tuned, if its active profile has plugins that move interrupts or remake queues. It does so
//! when it starts and when the profile changes.

use super::{Harm, Rival, ini, pids};
use crate::host::{self, Host};

pub fn find(host: &Host) -> Vec<Rival> {
    if pids(host, "tuned").is_empty() {
        return Vec::new();
    }
    let active = host::read_if_any(&host.root.join("etc/tuned/active_profile")).unwrap_or_default();
    let mut entries = Vec::new();
    let mut seen = Vec::new();
    for profile in active.split_whitespace() {
        read(host, profile, &mut seen, &mut entries);
    }
    // Later ones override.
    let option = |plugin: &str, key: &str| {
        let mut found = entries.iter().rev().filter(|option| {
            option.plugin == plugin && option.key == key && !option.value.is_empty()
        });
        found.next().map(|option| option.value.as_str())
    };
    let mut options = Vec::new();
    let mut push = |plugin: &str, key: &str, does, fix: &str| {
        if let Some(value) = option(plugin, key) {
            options.push((format!("[{plugin}] {key}={value}"), does, fix.to_string()));
        }
    };
    let off = ["0", "no", "n", "false", "off"];
    let processes = option("scheduler", "irq_process").unwrap_or("true");
    if !off.contains(&processes.to_ascii_lowercase().as_str()) {
        push(
            "scheduler",
            "isolated_cores",
            "moves all interrupts",
            "set irq_process=false in [scheduler]",
        );
    }
    push(
        "irq",
        "affinity",
        "moves interrupts",
        "give it devices= without the slaves'",
    );
    push(
        "irqbalance",
        "banned_cpus",
        "restarts irqbalance, which then forgets what it was told",
        "\"cpubond apply\" afterwards",
    );
    push(
        "net",
        "channels",
        "makes queues and interrupts anew",
        "give it devices= without the slaves",
    );
    options
        .into_iter()
        .map(|(option, does, fix)| Rival {
            rival: "tuned",
            harm: Harm::Disturbs,
            found: format!("{option} of profile {active} {does} when tuned starts"),
            fix: format!("{fix} in a profile of your own, or use another profile"),
        })
        .collect()
}

struct Setting {
    plugin: String,
    key: String,
    value: String,
}

/// The options of a profile, after those of the profiles it includes.
fn read(host: &Host, profile: &str, seen: &mut Vec<String>, entries: &mut Vec<Setting>) {
    // A name becomes part of a path; and profiles may include each other.
    if profile.contains('/') || profile.starts_with('.') || seen.iter().any(|name| name == profile)
    {
        return;
    }
    seen.push(profile.to_string());
    // The user's go before the system's; both moved down a directory in tuned 2.23.
    let dirs = [
        "etc/tuned/profiles",
        "etc/tuned",
        "usr/lib/tuned/profiles",
        "usr/lib/tuned",
    ];
    let Some(text) = dirs
        .iter()
        .find_map(|dir| host::read_if_any(&host.root.join(dir).join(profile).join("tuned.conf")))
    else {
        return;
    };
    let lines = ini(&text);
    for (section, key, value) in &lines {
        if section == "main" && key == "include" {
            for included in value.split([',', ' ']).filter(|name| !name.is_empty()) {
                read(host, included, seen, entries);
            }
        }
    }
    for (section, key, value) in &lines {
        // A section may have any name if it says its plugin.
        let plugin = lines
            .iter()
            .find(|(other, key, _)| other == section && key == "type")
            .map_or(section.clone(), |(_, _, plugin)| plugin.clone());
        entries.push(Setting {
            plugin,
            key: key.clone(),
            value: value.clone(),
        });
    }
}
