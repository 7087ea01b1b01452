use super::*;
use crate::converge::Goal;
use crate::ethtool::Channels;
use crate::journal::By;
use crate::testing::{Fake, FakeKernel, cpus};
use clap::Parser;
use proptest::prelude::*;
use std::fs;
use std::path::Path;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    plan: Plan,
}

fn plan(arguments: &str) -> Plan {
    let line = format!("plan {arguments}");
    Line::try_parse_from(line.split_whitespace()).unwrap().plan
}

/// CPUs numbered as on most machines: first one thread of every core, node by node. `nodes` 0: the
/// kernel knows of none.
fn machine(nodes: u32, cores: u32, threads: u32) -> Fake {
    let fake = Fake::new();
    let all = nodes.max(1) * cores;
    for cpu in 0..all * threads {
        let core = cpu % all;
        let siblings: Vec<String> = (0..threads)
            .map(|thread| (core + thread * all).to_string())
            .collect();
        let node = (nodes > 0).then_some(core / cores);
        fake.cpu(cpu, node, &siblings.join(","));
    }
    let list = format!("0-{}\n", all * threads - 1);
    fake.file("sys/devices/system/cpu/online", &list);
    fake.file("sys/devices/system/cpu/possible", &list);
    fake
}

/// A NIC that is up, with this many queues, on this node.
fn nic(fake: &Fake, kernel: &mut FakeKernel, name: &str, node: i32, queues: u32) {
    let number: u32 = natural(name)[0].1.try_into().unwrap();
    let irqs: Vec<(u32, String)> = (0..queues)
        .map(|queue| (1000 + number * 100 + queue, format!("virtio-input.{queue}")))
        .collect();
    let named: Vec<(u32, &str)> = irqs
        .iter()
        .map(|(irq, name)| (*irq, name.as_str()))
        .collect();
    fake.nic(name, &named);
    let host = fake.host();
    let pci = link::pci(&host, name).unwrap();
    let dir = format!("sys/devices/pci0000:00/{pci}");
    fake.file(&format!("{dir}/numa_node"), &format!("{node}\n"));
    fake.file(&format!("sys/class/net/{name}/flags"), "0x1003\n");
    fake.file(&format!("sys/class/net/{name}/speed"), "1000\n");
    for queue in 0..queues {
        fake.file(
            &format!("sys/class/net/{name}/queues/rx-{queue}/rps_cpus"),
            "0\n",
        );
        fake.file(
            &format!("sys/class/net/{name}/queues/tx-{queue}/xps_cpus"),
            "0\n",
        );
    }
    let mac = format!("02:00:00:00:00:{number:02x}").parse().unwrap();
    kernel.permanent.insert(name.to_string(), mac);
    kernel.channels.insert(
        name.to_string(),
        Channels {
            combined: queues,
            combined_max: queues,
            ..Channels::default()
        },
    );
}

/// The proposal; that it writes nothing, is the same again, is read back as what it is, and is
/// taken by `apply`, holds of each.
fn propose(plan: &Plan, fake: &Fake, kernel: &mut FakeKernel) -> Proposal {
    let (before, writes) = (fake.snapshot(), kernel.writes);
    let host = fake.host();
    let proposal = plan.propose(&host, kernel).unwrap();
    let text = proposal.to_string();
    assert_eq!(plan.propose(&host, kernel).unwrap().to_string(), text);
    assert_eq!((fake.snapshot(), kernel.writes), (before, writes));

    let config = parse(&text);
    let bond = &proposal.bonds[0];
    let read = config.bonds.iter().find(|read| read.name == bond.bond.name);
    assert_eq!(read, Some(&whole(bond)), "{text}");
    let journal = Journal::read(&host).unwrap();
    if !proposal
        .warnings
        .iter()
        .any(|line| line.contains("cannot be applied"))
    {
        Goal::new(&host, kernel, &journal, &config.bonds, By::Apply).unwrap();
    }
    proposal
}

fn parse(text: &str) -> Config {
    Config::parse(Path::new("c.toml"), text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn whole(bond: &BondProposal) -> config::Bond {
    config::Bond {
        slaves: bond
            .slaves
            .iter()
            .map(|slave| slave.slave.clone())
            .collect(),
        ..bond.bond.clone()
    }
}

/// `DEVICE CPUS CHANNELS` of each slave.
fn slaves(proposal: &Proposal) -> Vec<String> {
    proposal.bonds[0]
        .slaves
        .iter()
        .map(|SlaveProposal { device, slave, .. }| {
            format!(
                "{} {} {}",
                device.as_deref().unwrap_or("-"),
                slave.cpus.clone().unwrap_or_default(),
                slave.channels.map_or("-".into(), |count| count.to_string())
            )
        })
        .collect()
}

fn map(proposal: &Proposal) -> Vec<String> {
    proposal
        .map
        .iter()
        .map(|line| format!("{} {} {}", line.cpu, line.slaves.join(","), line.reason))
        .collect()
}

/// Make it so, as `cpubond apply` does.
fn apply(fake: &Fake, kernel: &mut FakeKernel, text: &str) {
    let host = fake.host();
    let mut journal = Journal::open(&host).unwrap();
    let goal = Goal::new(&host, kernel, &journal, &parse(text).bonds, By::Apply).unwrap();
    journal.begin(&host, kernel, None).unwrap();
    goal.reach(&host, kernel, &mut journal, 0, &|| Ok(()))
        .unwrap();
    journal.commit(&host).unwrap();
}

/// Without its comments.
fn bare(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .collect();
    lines.join("\n")
}

#[test]
fn a_nic_for_each_cpu() {
    let fake = machine(0, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    for name in ["eth0", "eth1", "eth2", "eth3"] {
        nic(&fake, &mut kernel, name, -1, 1);
    }
    let proposal = propose(&plan("--address 192.0.2.1/24"), &fake, &mut kernel);
    assert_eq!(
        slaves(&proposal),
        ["eth0 0 1", "eth1 1 1", "eth2 2 1", "eth3 3 1"]
    );
    assert_eq!(
        map(&proposal),
        ["0 eth0 irq", "1 eth1 irq", "2 eth2 irq", "3 eth3 irq"]
    );
    assert_eq!(proposal.warnings, [] as [&str; 0]);
    let text = proposal.to_string();
    assert!(
        text.contains("\naddresses = [\"192.0.2.1/24\"]\n"),
        "{text}"
    );
    assert!(
        text.contains("[[bond.slave]]\n# its permanent address:"),
        "{text}"
    );
    assert!(text.contains("\nmac = \"02:00:00:00:00:03\"\n"), "{text}");
    assert!(text.contains("\n#   3 eth3 irq\n"), "{text}");
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
}

#[test]
fn a_second_plan_is_the_first() {
    let fake = machine(2, 2, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", 1, 4);
    nic(&fake, &mut kernel, "eth1", 0, 4);
    let first = propose(
        &plan("bond7 --mode 802.3ad --address 192.0.2.1/24"),
        &fake,
        &mut kernel,
    );
    assert_eq!(slaves(&first), ["eth0 2-3 2", "eth1 0-1 2"]);
    apply(&fake, &mut kernel, &first.to_string());
    assert_eq!(kernel.channels["eth0"].combined, 2);
    // The mode is the user's to say; the address is the bond's by now.
    let second = propose(&plan("bond7 --mode 802.3ad"), &fake, &mut kernel);
    assert_eq!(bare(&second.to_string()), bare(&first.to_string()));
    assert_eq!(second.map, first.map);
    assert_eq!(second.warnings, [] as [&str; 0]);
    // The made-up driver has the same map.
    assert_eq!(bond::map(&fake.host(), "bond7").unwrap(), first.map);
}

#[test]
fn slaves_that_the_bond_has_keep_their_order() {
    let fake = machine(0, 3, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", -1, 1);
    nic(&fake, &mut kernel, "eth1", -1, 1);
    let first = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(map(&first), ["0 eth0 irq", "1 eth0,eth1 any", "2 eth1 irq"]);
    apply(&fake, &mut kernel, &first.to_string());
    let second = propose(&plan("bond0 eth1 eth0"), &fake, &mut kernel);
    assert_eq!(
        map(&second),
        ["0 eth1 irq", "1 eth0,eth1 any", "2 eth0 irq"]
    );
    apply(&fake, &mut kernel, &second.to_string());
    assert_eq!(bond::map(&fake.host(), "bond0").unwrap(), second.map);
    // A new mode needs them all out, and in again.
    let third = propose(&plan("bond0 eth1 eth0 --mode 802.3ad"), &fake, &mut kernel);
    assert_eq!(map(&third)[1], "1 eth1,eth0 any");
    apply(&fake, &mut kernel, &third.to_string());
    assert_eq!(bond::map(&fake.host(), "bond0").unwrap(), third.map);
}

/// Two nodes of four cores with two threads each, two NICs on each node.
fn big(queues: u32) -> Fake {
    let fake = machine(2, 4, 2);
    fake.file("queues", &queues.to_string());
    fake
}

fn big_nics(fake: &Fake, kernel: &mut FakeKernel) {
    let queues = fake.text("queues").parse().unwrap();
    for (name, node) in [("eth0", 0), ("eth1", 0), ("eth2", 1), ("eth10", 1)] {
        nic(fake, kernel, name, node, queues);
    }
}

#[test]
fn nics_get_whole_cores_of_their_node() {
    let fake = big(8);
    let mut kernel = FakeKernel::new(&fake);
    big_nics(&fake, &mut kernel);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(
        slaves(&proposal),
        [
            "eth0 0-1,8-9 4",
            "eth1 2-3,10-11 4",
            "eth2 4-5,12-13 4",
            "eth10 6-7,14-15 4"
        ]
    );
    assert!(map(&proposal).iter().all(|line| line.ends_with(" irq")));
    let why = &proposal.bonds[0].slaves[3].why;
    assert_eq!(
        why["cpus"],
        "4 of 16, its part among 4 NICs; all on its own node 1; all threads of each core"
    );
    assert_eq!(why["channels"], "one for each CPU (8 at most)");
}

#[test]
fn few_queues_go_to_different_cores() {
    let fake = big(2);
    let mut kernel = FakeKernel::new(&fake);
    big_nics(&fake, &mut kernel);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal)[0], "eth0 0-1,8-9 2");
    let map = map(&proposal);
    assert_eq!(
        (map[0].as_str(), map[1].as_str()),
        ("0 eth0 irq", "1 eth0 irq")
    );
    assert_eq!(
        (map[8].as_str(), map[9].as_str()),
        ("8 eth0 smt", "9 eth0 smt")
    );
    assert!(
        proposal.bonds[0].slaves[0].why["channels"]
            .contains("interrupts go to 0-1, and 8-9 will send"),
        "{:?}",
        proposal.bonds[0].slaves[0].why
    );
}

#[test]
fn all_nics_on_one_node_share_both() {
    let fake = machine(2, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    for name in ["eth0", "eth1", "eth2", "eth3"] {
        nic(&fake, &mut kernel, name, 0, 8);
    }
    let proposal = propose(&plan(""), &fake, &mut kernel);
    let bond = whole(&proposal.bonds[0]);
    let shares: Vec<u32> = bond
        .slaves
        .iter()
        .flat_map(|slave| slave.cpus.as_ref().unwrap().iter())
        .collect();
    assert_eq!(shares.len(), 8);
    assert_eq!(shares.into_iter().collect::<CpuSet>(), cpus("0-7"));
    let texts: Vec<&str> = proposal.bonds[0]
        .slaves
        .iter()
        .map(|slave| slave.why["cpus"].as_str())
        .collect();
    assert!(
        texts
            .iter()
            .any(|why| why.contains("on nodes 0,1, queues on 0, its own, first")),
        "{texts:?}"
    );
}

#[test]
fn more_nics_than_cpus_share_them() {
    let fake = machine(0, 2, 1);
    let mut kernel = FakeKernel::new(&fake);
    for name in ["eth0", "eth1", "eth2"] {
        nic(&fake, &mut kernel, name, -1, 2);
    }
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 0 1", "eth1 0 1", "eth2 1 1"]);
    assert_eq!(map(&proposal), ["0 eth0,eth1 irq", "1 eth2 irq"]);
    assert!(
        proposal.bonds[0].slaves[0].why["cpus"].starts_with("shared with eth1: there are more"),
    );
    assert_eq!(
        proposal.warnings,
        ["3 NICs for 2 CPUs: some share a CPU; fewer NICs would do"]
    );
}

#[test]
fn a_nic_on_no_known_node_takes_what_is_left() {
    let fake = machine(2, 2, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", -1, 2);
    nic(&fake, &mut kernel, "eth1", 0, 2);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 2-3 2", "eth1 0-1 2"]);
    assert_eq!(proposal.warnings.len(), 1, "{:?}", proposal.warnings);
    assert!(
        proposal.warnings[0].starts_with("eth0: the firmware does not say"),
        "{:?}",
        proposal.warnings
    );
}

#[test]
fn what_is_in_use_is_left_out_and_said() {
    let fake = machine(0, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    for name in ["eth0", "eth1", "eth2", "eth3", "wlan4"] {
        nic(&fake, &mut kernel, name, -1, 1);
    }
    fake.file("sys/class/net/wlan4/phy80211/name", "phy0\n");
    fake.file(
        "proc/net/route",
        "Iface Destination\neth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n",
    );
    kernel.addresses = vec![
        ("eth0".into(), "192.0.2.7/24".parse().unwrap()),
        ("eth1".into(), "192.0.2.8/24".parse().unwrap()),
    ];
    for (file, text) in [("type", "1"), ("ifindex", "99"), ("flags", "0x1003")] {
        fake.file(&format!("sys/class/net/docker0/{file}"), text);
        fake.file(
            &format!("sys/class/net/lo/{file}"),
            if file == "type" { "772" } else { text },
        );
    }
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth2 0-1 1", "eth3 2-3 1"]);
    let text = proposal.to_string();
    for line in [
        "# Left out: eth0: it carries a default route; name it to have it in the plan\n",
        "# Left out: wlan4: wireless\n",
        "# Left out, for they are no NICs: docker0\n",
        "# WARNING: eth1: left out: busy: it has address 192.0.2.8/24",
    ] {
        assert!(text.contains(line), "{line} {text}");
    }
    assert!(!proposal.to_string().contains("addresses ="), "{proposal}");

    // Named, it is taken with its address, and what is in the way is said.
    let proposal = propose(&plan("bond0 eth0 eth2"), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 0-1 1", "eth2 2-3 1"]);
    assert_eq!(
        proposal.bonds[0].bond.addresses,
        ["192.0.2.7/24".parse().unwrap()]
    );
    let [busy, route] = &proposal.warnings[..] else {
        panic!("{:?}", proposal.warnings)
    };
    assert!(
        busy.contains("busy: it has address") && busy.contains("cannot be applied"),
        "{busy}"
    );
    assert!(route.contains("carries a default route"), "{route}");
}

#[test]
fn too_few_nics_are_said_or_refused() {
    let fake = machine(0, 2, 1);
    let mut kernel = FakeKernel::new(&fake);
    let refused = |arguments: &str, kernel: &mut FakeKernel| {
        plan(arguments).propose(&fake.host(), kernel).unwrap_err()
    };
    let error = refused("", &mut kernel).to_string();
    assert!(
        error.starts_with("cpubond plan: this machine has no NIC; name"),
        "{error}"
    );

    nic(&fake, &mut kernel, "eth0", -1, 2);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 0-1 2"]);
    assert!(
        proposal.warnings[0].starts_with("eth0: the only NIC"),
        "{:?}",
        proposal.warnings
    );

    kernel.addresses = vec![("eth0".into(), "192.0.2.8/24".parse().unwrap())];
    let error = refused("", &mut kernel).to_string();
    assert!(
        error.contains("no NIC is free (eth0: left out: busy"),
        "{error}"
    );
    let error = refused("bond0 eth9", &mut kernel).to_string();
    assert_eq!(
        error,
        "eth9: no such network device; \"ip link\" lists them"
    );
    let error = refused("eth0", &mut kernel).to_string();
    assert!(
        error.ends_with("the first argument is the bond: \"cpubond plan bond0 eth0 …\""),
        "{error}"
    );
    let error = refused("bond0 eth0 --cpus 7", &mut kernel).to_string();
    assert_eq!(error, "bond0: cpus: CPUs 7 are not online; choose from 0-1");
    let error = refused("bond0 bond0", &mut kernel);
    assert!(
        error
            .to_string()
            .starts_with("bond0: no such network device"),
        "{error}"
    );
    let error = refused("bond/0", &mut kernel);
    assert_eq!(error.exit, Exit::Usage, "{error}");
}

#[test]
fn a_configuration_is_kept_and_filled_in() {
    let fake = machine(0, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    for name in ["eth0", "eth1", "eth2", "eth3"] {
        nic(&fake, &mut kernel, name, -1, 2);
    }
    let text = "[[bond]]\nname = \"other\"\n[[bond.slave]]\nname = \"eth3\"\n\
        [[bond]]\nname = \"bond5\"\nmode = \"802.3ad\"\nlacp_rate = \"fast\"\nmiimon = 50\n\
        [[bond.slave]]\nname = \"eth1\"\ncpus = \"3\"\nset_cpus = true\n\
        [[bond.slave]]\nname = \"eth8\"\n[[bond.slave]]\nmac = \"02:00:00:00:00:00\"\n\
        [[service]]\nname = \"web\"\nport = 80\ncommand = [\"httpd\", \"-p\", \"{port}\"]\n";
    fake.file("c.toml", text);
    let path = fake.path("c.toml");
    let file = format!("--config {}", path.display());
    let proposal = propose(&plan(&format!("bond5 {file}")), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth1 3 1", "eth0 0-2 2", "-  -"]);
    assert_eq!(
        map(&proposal),
        ["0 eth0 irq", "1 eth0 irq", "2 eth1,eth0 any", "3 eth1 set"]
    );
    let (old, new) = (parse(text), parse(&proposal.to_string()));
    assert_eq!(new.services, old.services);
    assert_eq!(new.bonds[1], old.bonds[0]);
    assert_eq!(
        (new.bonds[0].miimon, new.bonds[0].lacp_rate),
        (50, old.bonds[1].lacp_rate)
    );
    assert!(new.bonds[0].slaves[0].set_cpus);
    assert!(proposal.warnings[0].starts_with("eth8: no such network device"));

    // A new bond gets what the configuration's leave.
    let proposal = propose(&plan(&format!("bond9 {file}")), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth2 0-3 2"]);
    let error = plan(&file).propose(&fake.host(), &mut kernel).unwrap_err();
    assert_eq!(error.exit, Exit::Usage);
    assert!(error.to_string().contains("several bonds"), "{error}");
    let error = plan(&format!("bond5 {file} --mode balance-rr"))
        .propose(&fake.host(), &mut kernel)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "--lacp-rate: only 802.3ad has LACP; allowed: none, or mode 802.3ad"
    );
    fs::write(
        &path,
        "[[bond]]\nname = \"b\"\n[[bond.slave]]\nname = \"eth8\"\n",
    )
    .unwrap();
    let error = plan(&file)
        .propose(&fake.host(), &mut kernel)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("eth8: no such network device"), "{error}");
}

#[test]
fn without_an_address_the_place_and_then_the_name_is_taken() {
    let fake = machine(0, 2, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", -1, 1);
    nic(&fake, &mut kernel, "eth1", -1, 1);
    // As the ports of some cards, or a hypervisor's mistake, are.
    let same = kernel.permanent["eth0"];
    kernel.permanent.insert("eth1".into(), same);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    let pci = link::pci(&fake.host(), "eth1").unwrap();
    let text = proposal.to_string();
    assert!(text.contains(&format!("\npci = \"{pci}\"\n")), "{text}");

    // A device that has neither, nor interrupts.
    for (file, text) in [("type", "1"), ("ifindex", "99"), ("flags", "0x1003")] {
        fake.file(&format!("sys/class/net/veth\"0/{file}"), text);
    }
    let proposal = propose(&plan("bond0 eth0 veth\"0"), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 0 1", "veth\"0 1 -"]);
    assert_eq!(map(&proposal), ["0 eth0 irq", "1 veth\"0 set"]);
    assert!(
        proposal.warnings[0].contains("no interrupts of its own"),
        "{:?}",
        proposal.warnings
    );
}

#[test]
fn interrupts_of_a_nic_that_is_closed_are_foreseen() {
    let fake = machine(0, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", -1, 0);
    nic(&fake, &mut kernel, "eth1", -1, 0);
    kernel.channels.insert(
        "eth0".into(),
        Channels {
            combined: 1,
            combined_max: 8,
            ..Channels::default()
        },
    );
    kernel.channels.insert(
        "eth1".into(),
        Channels {
            rx: 1,
            tx: 1,
            ..Channels::default()
        },
    );
    let proposal = propose(&plan(""), &fake, &mut kernel);
    assert_eq!(slaves(&proposal), ["eth0 0-1 2", "eth1 2-3 -"]);
    assert_eq!(
        map(&proposal),
        ["0 eth0 irq", "1 eth0 irq", "2 eth1 irq", "3 eth0,eth1 any"]
    );
    assert!(proposal.warnings[0].starts_with("eth1: has 1 receive and 1 transmit channels"));
}

#[test]
fn the_rest_of_the_machine_is_warned_of() {
    let fake = machine(0, 4, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", -1, 1);
    nic(&fake, &mut kernel, "eth1", -1, 1);
    fake.file("sys/class/net/eth1/speed", "10000\n");
    fake.file("sys/class/net/eth1/carrier", "0\n");
    fake.file("sys/devices/system/cpu/possible", "0-5\n");
    fake.file("proc/17/comm", "irqbalance\n");
    fake.file("sys/module/bonding/refcnt", "0\n");
    let proposal = propose(&plan(""), &fake, &mut kernel);
    let warnings = proposal.warnings.join("\n");
    for line in [
        "CPUs 4-5 are offline",
        "links of different speed (1000, 10000 Mb/s)",
        "eth1: no carrier",
        "bonding: the loaded driver is the stock one",
        "irqbalance: runs",
    ] {
        assert!(warnings.contains(line), "{line}: {warnings}");
    }
    assert_eq!(map(&proposal)[4..], ["4 eth0,eth1 any", "5 eth0,eth1 any"]);
    let text = proposal.to_string();
    assert!(text.contains("# WARNING: irqbalance: runs"), "{text}");

    // Modes that ask nobody have no map.
    let proposal = propose(&plan("bond0 --mode balance-rr"), &fake, &mut kernel);
    assert_eq!(proposal.map, []);
    assert!(
        proposal.to_string().contains("bond0 asks no policy"),
        "{proposal}"
    );
}

#[test]
fn json_has_its_schema() {
    let fake = machine(2, 1, 1);
    let mut kernel = FakeKernel::new(&fake);
    nic(&fake, &mut kernel, "eth0", 1, 1);
    let proposal = propose(&plan(""), &fake, &mut kernel);
    let json = serde_json::to_value(&proposal).unwrap();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["bonds", "host", "map", "schema", "warnings"]);
    assert_eq!(json["schema"], 1);
    assert_eq!(
        json["map"][1],
        serde_json::json!({"cpu": 1, "slaves": ["eth0"], "reason": "irq"})
    );
    let slave = &json["bonds"][0]["slaves"][0];
    assert_eq!(
        (&slave["device"], &slave["cpus"]),
        (&"eth0".into(), &"0-1".into())
    );
    assert_eq!(slave["mac"], "02:00:00:00:00:00");
    assert_eq!(json["bonds"][0]["mode"], "cpu_bound");
    assert_eq!(json["host"]["nodes"]["1"], "1");
    assert_eq!(json["host"]["nics"][0]["channels"]["combined_max"], 1);
    assert_eq!(json["host"]["nics"][0]["irqs"][0]["queue"], 0);
}

#[test]
fn eth2_comes_before_eth10() {
    let mut names = ["eth10", "enp3s0f1", "eth2", "enp3s0", "eth", "lo", ""];
    names.sort_by_key(|name| natural(name));
    assert_eq!(
        names,
        ["", "enp3s0", "enp3s0f1", "eth", "eth2", "eth10", "lo"]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the machine: the proposal is taken by apply (`propose` sees to that), and each CPU
    /// is in the map, by a slave that it was given to where it has an interrupt.
    #[test]
    fn any_machine_gets_a_plan_that_holds(
        nodes in 0u32..3,
        cores in 1u32..5,
        threads in 1u32..3,
        nics in prop::collection::vec((-1i32..2, 0u32..6), 1..7),
    ) {
        let fake = machine(nodes, cores, threads);
        let mut kernel = FakeKernel::new(&fake);
        for (number, (node, queues)) in nics.iter().enumerate() {
            nic(&fake, &mut kernel, &format!("eth{number}"), *node, *queues);
        }
        let proposal = propose(&plan(""), &fake, &mut kernel);
        let count = nodes.max(1) * cores * threads;
        prop_assert_eq!(proposal.map.len(), count as usize);
        for slave in &proposal.bonds[0].slaves {
            let cpus = slave.slave.cpus.clone().unwrap();
            let channels = slave.slave.channels.unwrap_or(1) as usize;
            prop_assert!(channels <= cpus.iter().count());
            let bound: Vec<u32> = proposal.map.iter()
                .filter(|line| line.is_bound() && line.slaves.contains(slave.device.as_ref().unwrap()))
                .map(|line| line.cpu)
                .collect();
            prop_assert_eq!(bound.len(), channels);
            prop_assert!(bound.iter().all(|cpu| cpus.contains(*cpu)));
        }
    }
}
