//! Who listens: sockets by sock_diag, the processes that hold them from `/proc`.

use crate::error::Result;
use crate::host::{self, Host};
use crate::netlink::Netlink;
use crate::steer::Protocol;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Every port with its listening sockets' inode numbers, of IPv4 and IPv6, on any address. For
/// UDP, which does not listen, sockets that are bound and not connected.
pub fn of_machine(protocol: Protocol) -> Result<BTreeMap<u16, BTreeSet<u64>>> {
    let mut netlink = Netlink::open("sock_diag", NETLINK_SOCK_DIAG)?;
    let mut listeners: BTreeMap<u16, BTreeSet<u64>> = BTreeMap::new();
    let (number, states) = match protocol {
        Protocol::Tcp => (IPPROTO_TCP, StateFlags::LISTEN),
        Protocol::Udp => (IPPROTO_UDP, StateFlags::CLOSE),
    };
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = InetRequest {
            family,
            protocol: number,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id,
        };
        let replies = netlink
            .talk(SockDiagMessage::InetRequest(request), NLM_F_DUMP)
            .map_err(|refusal| {
                let error = refusal.at(
                    "sock_diag",
                    &format!("the {protocol} sockets cannot be listed"),
                );
                match refusal.errno {
                    libc::ENOENT => error.fix(format_args!("\"modprobe {protocol}_diag\"")),
                    _ => error,
                }
            })?;
        for reply in replies {
            if let SockDiagMessage::InetResponse(socket) = reply {
                listeners
                    .entry(socket.header.socket_id.source_port)
                    .or_default()
                    .insert(socket.header.inode.into());
            }
        }
    }
    Ok(listeners)
}

/// Inode numbers of the sockets that a process holds; none if it has ended.
pub fn sockets(host: &Host, pid: u32) -> BTreeSet<u64> {
    let fds = host.proc.join(pid.to_string()).join("fd");
    host::names(&fds)
        .into_iter()
        .filter_map(|fd| fs::read_link(fds.join(fd)).ok())
        .filter_map(|target| {
            let inode = target.to_str()?.strip_prefix("socket:[")?;
            inode.strip_suffix(']')?.parse().ok()
        })
        .collect()
}

/// The processes that descend from `pid`, parents before their children, without itself. They
/// come and go: who wants to be sure to have met all asks again.
pub fn descendants(host: &Host, pid: u32) -> Vec<u32> {
    let mut found = children(host, pid);
    let mut at = 0;
    while at < found.len() {
        let more = children(host, found[at]);
        found.extend(more);
        at += 1;
    }
    found
}

/// A process's children; the kernel lists them by the thread that made them.
pub fn children(host: &Host, pid: u32) -> Vec<u32> {
    let tasks = host.proc.join(pid.to_string()).join("task");
    host::names(&tasks)
        .into_iter()
        .filter_map(|task| host::read_if_any(&tasks.join(task).join("children")))
        .flat_map(|pids| {
            pids.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn finds_its_own_sockets() {
        let host = Host::default();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let held = sockets(&host, std::process::id());
        for (protocol, port) in [
            (Protocol::Tcp, tcp.local_addr().unwrap().port()),
            (Protocol::Udp, udp.local_addr().unwrap().port()),
        ] {
            let listening = &of_machine(protocol).unwrap()[&port];
            assert_eq!(listening.len(), 1);
            assert!(listening.is_subset(&held), "{protocol}");
        }
        let port = tcp.local_addr().unwrap().port();
        drop(tcp);
        assert!(!of_machine(Protocol::Tcp).unwrap().contains_key(&port));
    }

    #[test]
    fn finds_children_of_children() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo started; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(shell.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        let found = descendants(&Host::default(), std::process::id());
        let at = found.iter().position(|pid| *pid == shell.id()).unwrap();
        let below = descendants(&Host::default(), shell.id());
        assert_eq!(below.len(), 1);
        assert!(found[at..].contains(&below[0]), "{found:?}");
        let sleep = rustix::process::Pid::from_raw(below[0].cast_signed()).unwrap();
        rustix::process::kill_process(sleep, rustix::process::Signal::KILL).unwrap();
        shell.wait().unwrap();
    }
}
