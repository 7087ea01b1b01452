//! Forget flows that are translated to a port where nobody listens any more.

use super::Protocol;
use crate::error::Result;
use crate::netlink::Netlink;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NetlinkDeserializable,
    NetlinkHeader, NetlinkPayload, NetlinkSerializable,
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
            .talk(Delete::new(family, protocol, public, port), NLM_F_ACK)
            .map_err(|refusal| {
                refusal.at(
                    "conntrack",
                    &format!("flows to {protocol} {port} cannot be deleted"),
                )
            })?;
    }
    Ok(())
}

/// `IPCTNL_MSG_CT_DELETE` with a filter. Names and numbers as in
/// `linux/netfilter/nfnetlink_conntrack.h`.
#[derive(Debug)]
struct Delete {
    /// `struct nfgenmsg` and the attributes.
    bytes: Vec<u8>,
}

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

impl Delete {
    fn new(family: i32, protocol: Protocol, public: u16, port: u16) -> Self {
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
        Self { bytes }
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

impl NetlinkSerializable for Delete {
    fn message_type(&self) -> u16 {
        const NFNL_SUBSYS_CTNETLINK: u16 = 1;
        const IPCTNL_MSG_CT_DELETE: u16 = 2;
        NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Delete {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> std::result::Result<Self, DecodeError> {
        Ok(Self {
            bytes: payload.to_vec(),
        })
    }
}

impl From<Delete> for NetlinkPayload<Delete> {
    fn from(delete: Delete) -> Self {
        Self::InnerMessage(delete)
    }
}
