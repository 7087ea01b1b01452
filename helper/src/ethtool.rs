//! How many channels a NIC has, by ethtool's netlink. A channel is a queue, or a pair of them, with
//! an interrupt of its own.

use crate::error::{Error, Result};
use crate::netlink::{Netlink, Refusal};
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, Nla, NlasIterator, Parseable,
    ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use serde::Serialize;

/// As `ethtool -l` shows them. What a device does not have is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Channels {
    /// Those that receive and transmit.
    pub combined: u32,
    pub combined_max: u32,
    /// Those that only receive.
    pub rx: u32,
    /// Those that only transmit.
    pub tx: u32,
}

pub struct Ethtool {
    netlink: Netlink,
    family: u16,
}

impl Ethtool {
    /// `None` if the kernel has no ethtool netlink.
    pub fn open() -> Result<Option<Self>> {
        let mut netlink = Netlink::open("generic netlink", NETLINK_GENERIC)?;
        let request = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(Message::family_name().into())],
        });
        let replies = match netlink.talk(request, NLM_F_ACK) {
            Ok(replies) => replies,
            Err(refusal) if refusal.errno == libc::ENOENT => return Ok(None),
            Err(refusal) => return Err(refusal.at("ethtool", "cannot be asked")),
        };
        let family = replies
            .iter()
            .flat_map(|reply| &reply.payload.nlas)
            .find_map(|attribute| match attribute {
                GenlCtrlAttrs::FamilyId(family) => Some(*family),
                _ => None,
            })
            .ok_or_else(|| Error::new("ethtool", "the kernel did not say its number"))?;
        Ok(Some(Self { netlink, family }))
    }

    /// `None` if the device's driver does not tell. Needs no privilege.
    pub fn channels(&mut self, link: &str) -> Result<Option<Channels>> {
        let request = Message::new(CHANNELS_GET, link, &[]);
        match self.talk(request) {
            Ok(replies) => Ok(replies.first().map(Message::channels)),
            Err(refusal) if refusal.errno == libc::EOPNOTSUPP => Ok(None),
            Err(refusal) => Err(refusal.at(link, "its channels cannot be read")),
        }
    }

    pub fn set_combined(&mut self, link: &str, count: u32) -> Result<()> {
        let request = Message::new(CHANNELS_SET, link, &[(COMBINED_COUNT, count)]);
        self.talk(request)
            .map(drop)
            .map_err(|refusal| refusal.at(link, &format!("cannot have {count} combined channels")))
    }

    fn talk(&mut self, request: Message) -> std::result::Result<Vec<Message>, Refusal> {
        let mut request = GenlMessage::from_payload(request);
        request.set_resolved_family_id(self.family);
        let replies = self.netlink.talk(request, NLM_F_ACK)?;
        Ok(replies.into_iter().map(|reply| reply.payload).collect())
    }
}

// The numbers of `linux/ethtool_netlink.h`.
const CHANNELS_GET: u8 = 17;
const CHANNELS_SET: u8 = 18;
const HEADER: u16 = 1;
const HEADER_DEV_NAME: u16 = 2;
const COMBINED_MAX: u16 = 5;
const RX_COUNT: u16 = 6;
const TX_COUNT: u16 = 7;
const COMBINED_COUNT: u16 = 9;
const NESTED: u16 = 1 << 15;

/// One message of the family, its attributes as they are on the wire.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl Message {
    fn new(command: u8, link: &str, values: &[(u16, u32)]) -> Self {
        let mut name = link.as_bytes().to_vec();
        name.push(0);
        let name = DefaultNla::new(HEADER_DEV_NAME, name);
        let mut header = vec![0; name.buffer_len()];
        name.emit(&mut header);
        let mut attributes = vec![DefaultNla::new(HEADER | NESTED, header)];
        attributes.extend(
            values
                .iter()
                .map(|(kind, value)| DefaultNla::new(*kind, value.to_ne_bytes().to_vec())),
        );
        Self {
            command,
            attributes,
        }
    }

    fn channels(&self) -> Channels {
        let number = |kind: u16| {
            self.attributes
                .iter()
                .filter(|attribute| attribute.kind() == kind && attribute.value_len() == 4)
                .map(|attribute| {
                    let mut bytes = [0; 4];
                    attribute.emit_value(&mut bytes);
                    u32::from_ne_bytes(bytes)
                })
                .next()
                .unwrap_or(0)
        };
        Channels {
            combined: number(COMBINED_COUNT),
            combined_max: number(COMBINED_MAX),
            rx: number(RX_COUNT),
            tx: number(TX_COUNT),
        }
    }
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        "ethtool"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(
        bytes: &[u8],
        header: GenlHeader,
    ) -> std::result::Result<Self, DecodeError> {
        let attributes = NlasIterator::new(bytes)
            .map(|attribute| DefaultNla::parse(&attribute?))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self {
            command: header.cmd,
            attributes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let message = Message::new(
            CHANNELS_SET,
            "eth0",
            &[(COMBINED_COUNT, 3), (COMBINED_MAX, 8)],
        );
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        // The header's attribute, in it the name's, padded to four bytes each.
        assert_eq!(bytes[..4], [16, 0, 1, 0x80]);
        assert_eq!(&bytes[4..16], b"\x09\0\x02\0eth0\0\0\0\0");
        let header = GenlHeader {
            cmd: CHANNELS_SET,
            version: 1,
        };
        let back = Message::parse_with_param(&bytes, header).unwrap();
        assert_eq!(back, message);
        let expected = Channels {
            combined: 3,
            combined_max: 8,
            rx: 0,
            tx: 0,
        };
        assert_eq!(back.channels(), expected);
        for length in 0..bytes.len() {
            // A truncated answer is an error at worst.
            let _ = Message::parse_with_param(&bytes[..length], header);
        }
    }

    /// The loopback device is on every kernel, and its driver has no channels.
    #[test]
    fn asks_this_kernel() {
        if let Some(mut ethtool) = Ethtool::open().unwrap() {
            assert_eq!(ethtool.channels("lo").unwrap(), None);
            let error = ethtool.channels("no-such-device").unwrap_err().to_string();
            assert!(error.contains("no-such-device"), "{error}");
        }
    }
}
