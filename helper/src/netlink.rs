//! What is changed by rtnetlink, with the kernel's own words (extended ack) in the errors.

use crate::error::{Error, Exit, Result};
use crate::link::Mac;
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use std::net::Ipv4Addr;

pub struct Rtnetlink(Netlink);

/// A netlink socket of any family, to which requests are sent one at a time.
pub struct Netlink {
    /// For errors: "rtnetlink", …
    family: &'static str,
    socket: Socket,
    sequence: u32,
}

/// A request the kernel refused.
pub struct Refusal {
    /// 0 if it was no number of the kernel's.
    pub errno: i32,
    /// From the extended ack, if the kernel had more to say.
    message: Option<String>,
}

impl Rtnetlink {
    pub fn open() -> Result<Self> {
        Netlink::open("rtnetlink", NETLINK_ROUTE).map(Self)
    }

    /// With an index of our choice, so that it is known before there is a bond.
    pub fn create_bond(&mut self, bond: &str, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![
            LinkAttribute::IfName(bond.to_string()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bond)]),
        ];
        self.request(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|refusal| {
            let unsupported = [libc_errno::EOPNOTSUPP, libc_errno::EPROTONOSUPPORT];
            let error = refusal.at(bond, "cannot be created");
            match unsupported.contains(&refusal.errno) {
                true => error
                    .exit(Exit::Unsupported)
                    .fix("load the patched bonding.ko and bond_cpu_bound.ko (--module-dir)"),
                false => error,
            }
        })
    }

    /// A device of a kind that needs no more than that, with a hardware address of our choice.
    pub fn create(&mut self, link: &str, kind: InfoKind, mac: Mac) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(link.to_string()),
            LinkAttribute::Address(mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
        ];
        self.request(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|refusal| refusal.at(link, "cannot be created"))
    }

    /// Another hardware address than its own.
    pub fn set_mac(&mut self, link: &str, mac: Mac) -> Result<()> {
        let mut message = self.link_message(link)?;
        message
            .attributes
            .push(LinkAttribute::Address(mac.0.to_vec()));
        self.request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|refusal| refusal.at(link, &format!("cannot have the address {mac}")))
    }

    /// Who is where on the link, for good.
    pub fn set_neighbour(&mut self, link: &str, address: Ipv4Addr, mac: Mac) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = self.index(link)?;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        self.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(|refusal| refusal.at(link, &format!("cannot have neighbour {address}")))
    }

    pub fn delete(&mut self, link: &str) -> Result<()> {
        let message = self.link_message(link)?;
        self.request(RouteNetlinkMessage::DelLink(message), 0)
            .map_err(|refusal| refusal.at(link, "cannot be deleted"))
    }

    pub fn set_up(&mut self, link: &str, up: bool) -> Result<()> {
        let mut message = self.link_message(link)?;
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up {
            LinkFlags::Up
        } else {
            LinkFlags::empty()
        };
        let verb = if up {
            "cannot be brought up"
        } else {
            "cannot be taken down"
        };
        self.request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|refusal| refusal.at(link, verb))
    }

    /// Enslave, or release with no master.
    pub fn set_master(&mut self, link: &str, master: Option<&str>) -> Result<()> {
        let mut message = self.link_message(link)?;
        let index = match master {
            Some(master) => self.index(master)?,
            None => 0,
        };
        message.attributes.push(LinkAttribute::Controller(index));
        self.request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|refusal| match master {
                Some(master) => refusal.at(link, &format!("cannot be enslaved to {master}")),
                None => refusal.at(link, "cannot be released"),
            })
    }

    pub fn add_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        let mut message = self.address_message(link, address)?;
        if let IpNet::V4(v4) = address
            && v4.prefix_len() < 31
        {
            message
                .attributes
                .push(AddressAttribute::Broadcast(v4.broadcast()));
        }
        self.request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|refusal| refusal.at(link, &format!("cannot have address {address}")))
    }

    pub fn delete_address(&mut self, link: &str, address: IpNet) -> Result<()> {
        let message = self.address_message(link, address)?;
        self.request(RouteNetlinkMessage::DelAddress(message), 0)
            .map_err(|refusal| refusal.at(link, &format!("cannot lose address {address}")))
    }

    fn address_message(&mut self, link: &str, address: IpNet) -> Result<AddressMessage> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = address.prefix_len();
        message.header.index = self.index(link)?;
        message.attributes = vec![
            AddressAttribute::Local(address.addr()),
            AddressAttribute::Address(address.addr()),
        ];
        Ok(message)
    }

    /// Addresses somebody gave the link; those the kernel makes by itself (link-local) are left
    /// out.
    pub fn addresses(&mut self, link: &str) -> Result<Vec<IpNet>> {
        let index = self.index(link)?;
        let replies = self
            .0
            .talk(
                RouteNetlinkMessage::GetAddress(AddressMessage::default()),
                NLM_F_DUMP,
            )
            .map_err(|refusal| refusal.at(link, "addresses cannot be read"))?;
        let mut addresses = Vec::new();
        for reply in replies {
            let RouteNetlinkMessage::NewAddress(message) = reply else {
                continue;
            };
            if message.header.index != index {
                continue;
            }
            let attributes = message.attributes.iter();
            let address = attributes.clone().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = address.or_else(|| {
                attributes.clone().find_map(|attribute| match attribute {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                })
            });
            let local = |address: &std::net::IpAddr| match address {
                std::net::IpAddr::V4(_) => false,
                std::net::IpAddr::V6(v6) => v6.is_unicast_link_local(),
            };
            if let Some(address) = address.filter(|address| !local(address))
                && let Ok(address) = IpNet::new(address, message.header.prefix_len)
            {
                addresses.push(address);
            }
        }
        Ok(addresses)
    }

    pub fn index(&mut self, link: &str) -> Result<u32> {
        Ok(self.find(link)?.header.index)
    }

    /// See `Kernel::permanent_mac`.
    pub fn permanent_mac(&mut self, link: &str) -> Result<Option<Mac>> {
        let found = self.find(link)?;
        Ok(found
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::PermAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
                _ => None,
            }))
    }

    fn find(&mut self, link: &str) -> Result<LinkMessage> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(link.to_string())];
        let replies = self
            .0
            .talk(RouteNetlinkMessage::GetLink(message), NLM_F_ACK)
            .map_err(|refusal| refusal.at(link, "cannot be found"))?;
        replies
            .into_iter()
            .find_map(|reply| match reply {
                RouteNetlinkMessage::NewLink(message) => Some(message),
                _ => None,
            })
            .ok_or_else(|| Error::new(link, "the kernel did not say which device this is"))
    }

    fn link_message(&mut self, link: &str) -> Result<LinkMessage> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(link)?;
        Ok(message)
    }

    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> std::result::Result<(), Refusal> {
        self.0.talk(message, flags | NLM_F_ACK).map(drop)
    }
}

impl Netlink {
    pub fn open(family: &'static str, protocol: isize) -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_ext_ack(true)?;
            // Acks then carry the request's header only, which puts the extended ack at a fixed
            // offset.
            socket.set_cap_ack(true)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| Error::new(format_args!("{family} socket"), error))?;
        Ok(Self {
            family,
            socket,
            sequence: 0,
        })
    }

    /// Send one request and read until its ack or the end of its dump.
    pub fn talk<M>(&mut self, message: M, flags: u16) -> std::result::Result<Vec<M>, Refusal>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket
            .send(&bytes, 0)
            .map_err(|error| self.failed(&error))?;

        let mut replies = Vec::new();
        loop {
            let (datagram, _) = self
                .socket
                .recv_from_full()
                .map_err(|error| self.failed(&error))?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let reply = NetlinkMessage::<M>::deserialize(rest).map_err(|error| Refusal {
                    errno: 0,
                    message: Some(format!("answer not understood: {error}")),
                })?;
                let length = usize::try_from(reply.header.length).unwrap_or(usize::MAX);
                // Messages are aligned to four bytes; one shorter than its header would not end.
                let (bytes, after) =
                    rest.split_at(length.next_multiple_of(4).clamp(16, rest.len()));
                rest = after;
                if reply.header.sequence_number != self.sequence {
                    continue;
                }
                match reply.payload {
                    NetlinkPayload::InnerMessage(message) => replies.push(message),
                    NetlinkPayload::Done(_) => return Ok(replies),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(replies),
                        Some(code) => {
                            return Err(Refusal {
                                errno: code.get().saturating_neg(),
                                message: extended_ack(bytes),
                            });
                        }
                    },
                    _ => {}
                }
            }
        }
    }
}

impl Netlink {
    fn failed(&self, error: &io::Error) -> Refusal {
        Refusal {
            errno: error.raw_os_error().unwrap_or(0),
            message: Some(format!("{} socket: {error}", self.family)),
        }
    }
}

/// The few error numbers that mean something to us, as in `asm-generic/errno.h`.
mod libc_errno {
    pub const EPERM: i32 = 1;
    pub const ENODEV: i32 = 19;
    pub const EPROTONOSUPPORT: i32 = 93;
    pub const EOPNOTSUPP: i32 = 95;
}

impl Refusal {
    pub fn at(&self, place: &str, what: &str) -> Error {
        let reason = match (&self.message, self.errno) {
            (Some(message), _) => message.clone(),
            (None, errno) => io::Error::from_raw_os_error(errno).to_string(),
        };
        let error = Error::new(place, format_args!("{what}: {reason}"));
        match self.errno {
            libc_errno::EPERM if self.message.is_none() => error.fix("run as root"),
            libc_errno::ENODEV => error.fix("\"ip link\" lists the network devices"),
            _ => error,
        }
    }
}

fn family(address: IpNet) -> AddressFamily {
    match address {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    }
}

/// `NLMSGERR_ATTR_MSG` of a capped error message: after its own header (16 bytes), the error
/// number (4) and the request's header (16). The packet crates leave these attributes raw.
fn extended_ack(message: &[u8]) -> Option<String> {
    const NLM_F_ACK_TLVS: u16 = 0x200;
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let half = |at: usize| {
        Some(u16::from_ne_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    if half(6)? & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let mut at = 36;
    loop {
        let (length, kind) = (usize::from(half(at)?), half(at + 2)?);
        let value = message.get(at + 4..at + length)?;
        if kind == NLMSGERR_ATTR_MSG {
            let text = value.split(|byte| *byte == 0).next()?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        at += length.next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_kernels_words() {
        let mut message = vec![0; 36];
        message[6..8].copy_from_slice(&0x300u16.to_ne_bytes());
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        message.extend(attribute(2, &[1, 0, 0, 0]));
        message.extend(attribute(1, b"no module\0"));
        assert_eq!(extended_ack(&message).as_deref(), Some("no module"));
        for length in 0..message.len() {
            // Truncated answers are no reason to fall over.
            let _ = extended_ack(&message[..length]);
        }
        message[6] = 0;
        message[7] = 0;
        assert_eq!(extended_ack(&message), None);
    }
}
