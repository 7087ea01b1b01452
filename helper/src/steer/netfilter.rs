//! What of netfilter `nft` cannot be asked for: to forget flows, and whether rules have changed.

use super::Protocol;
use crate::error::{Error, Result};
use crate::netlink::Netlink;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NetlinkDeserializable,
    NetlinkHeader, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

/// Delete the entries of flows to `public` that are translated to `port`, by one request for each
/// address family; the kernel filters (since 5.8). Of TCP only those that were never answered:
/// the kernel may still be sending what a daemon wrote before it ended, and needs the entry to
/// translate it.
pub fn forget(protocol: Protocol, public: u16, port: u16) -> Result<()> {
    let mut netlink = Netlink::open("conntrack", NETLINK_NETFILTER)?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        netlink
            .talk(delete(family, protocol, public, port), NLM_F_ACK)
            .map_err(|refusal| {
                refusal.at(
                    "conntrack",
                    &format!("flows to {protocol} {port} cannot be deleted"),
                )
            })?;
    }
    Ok(())
}

/// A number that is another whenever anybody has changed nftables' rules.
pub fn generation() -> Result<u32> {
    let mut netlink = Netlink::open("nftables", NETLINK_NETFILTER)?;
    let request = Message {
        kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN,
        bytes: vec![0; NFGENMSG],
    };
    netlink
        .talk(request, NLM_F_ACK)
        .map_err(|refusal| refusal.at("nftables", "the rules' generation cannot be read"))?
        .iter()
        .find_map(Message::generation)
        .ok_or_else(|| Error::new("nftables", "the answer has no generation of the rules"))
}

/// One of nfnetlink's.
#[derive(Debug)]
struct Message {
    /// Subsystem and type.
    kind: u16,
    /// `struct nfgenmsg` and the attributes.
    bytes: Vec<u8>,
}

/// Bytes of `struct nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;

// Names and numbers as in linux/netfilter/nfnetlink.h and nf_tables.h,
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETGEN: u16 = 16;
const NFTA_GEN_ID: u16 = 1;
// and nfnetlink_conntrack.h.
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_FILTER: u16 = 25;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
// What of a tuple counts; numbers as in the kernel's nf_internals.h.
const BY_PROTO_NUM: u32 = 1 << 3;
const BY_SRC_PORT: u32 = 1 << 4;
const BY_DST_PORT: u32 = 1 << 5;
const IPS_SEEN_REPLY: u32 = 1 << 1;

/// Conntrack entries that match a filter are to go.
fn delete(family: i32, protocol: Protocol, public: u16, port: u16) -> Message {
    let number = match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
    };
    // A reply's source is what the request's destination was translated to.
    let tuple = |kind, which, port: u16| {
        let proto = [
            DefaultNla::new(CTA_PROTO_NUM, vec![number as u8]),
            DefaultNla::new(which, port.to_be_bytes().to_vec()),
        ];
        nest(kind, &[nest(CTA_TUPLE_PROTO, &proto)])
    };
    let flags = |kind, flags: u32| DefaultNla::new(kind, flags.to_ne_bytes().to_vec());
    let mut attributes = vec![
        tuple(CTA_TUPLE_ORIG, CTA_PROTO_DST_PORT, public),
        tuple(CTA_TUPLE_REPLY, CTA_PROTO_SRC_PORT, port),
        nest(
            CTA_FILTER,
            &[
                flags(CTA_FILTER_ORIG_FLAGS, BY_PROTO_NUM | BY_DST_PORT),
                flags(CTA_FILTER_REPLY_FLAGS, BY_PROTO_NUM | BY_SRC_PORT),
            ],
        ),
    ];
    if protocol == Protocol::Tcp {
        let word = |kind, word: u32| DefaultNla::new(kind, word.to_be_bytes().to_vec());
        attributes.push(word(CTA_STATUS, 0));
        attributes.push(word(CTA_STATUS_MASK, IPS_SEEN_REPLY));
    }
    // Family, version 0, no resource.
    let mut bytes = vec![family as u8, 0, 0, 0];
    bytes.extend(emit(&attributes));
    Message {
        kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
        bytes,
    }
}

fn nest(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, emit(inner))
}

fn emit(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

impl Message {
    fn generation(&self) -> Option<u32> {
        NlasIterator::new(self.bytes.get(NFGENMSG..)?)
            .filter_map(std::result::Result::ok)
            .find(|attribute| attribute.kind() == NFTA_GEN_ID)
            .and_then(|attribute| Some(u32::from_be_bytes(attribute.value().try_into().ok()?)))
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(
        header: &NetlinkHeader,
        payload: &[u8],
    ) -> std::result::Result<Self, DecodeError> {
        Ok(Self {
            kind: header.message_type,
            bytes: payload.to_vec(),
        })
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kinds and values, depth first.
    fn attributes(bytes: &[u8], depth: usize) -> Vec<(usize, u16, Vec<u8>)> {
        NlasIterator::new(bytes)
            .flat_map(|attribute| {
                let attribute = attribute.unwrap();
                let mut found = vec![(depth, attribute.kind(), attribute.value().to_vec())];
                if attribute.nested_flag() {
                    found[0].2.clear();
                    found.extend(attributes(attribute.value(), depth + 1));
                }
                found
            })
            .collect()
    }

    #[test]
    fn asks_for_what_it_means() {
        let request = delete(libc::AF_INET6, Protocol::Tcp, 80, 8003);
        assert_eq!(request.bytes[..4], [10, 0, 0, 0]);
        assert_eq!(
            attributes(&request.bytes[4..], 0),
            [
                (0, 1, vec![]),
                (1, 2, vec![]),
                (2, 1, vec![6]),
                (2, 3, vec![0, 80]),
                (0, 2, vec![]),
                (1, 2, vec![]),
                (2, 1, vec![6]),
                (2, 2, vec![0x1f, 0x43]),
                (0, 25, vec![]),
                (1, 1, 0x28u32.to_ne_bytes().to_vec()),
                (1, 2, 0x18u32.to_ne_bytes().to_vec()),
                (0, 3, vec![0; 4]),
                (0, 26, vec![0, 0, 0, 2]),
            ]
        );
        // Of UDP all go, answered or not.
        let request = delete(libc::AF_INET, Protocol::Udp, 53, 5301);
        assert!(
            attributes(&request.bytes[4..], 0)
                .iter()
                .all(|(_, kind, _)| *kind != 26)
        );
    }
}
