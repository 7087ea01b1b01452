//! The team driver's options, by generic netlink.

use crate::netlink::Netlink;
use anyhow::{Result, anyhow};
use netlink_packet_core::{
    NLM_F_ACK, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use std::convert::Infallible;

/// `linux/genetlink.h`, `linux/if_team.h`, `net/netlink.h`.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const TEAM_CMD_OPTIONS_SET: u8 = 1;
const TEAM_ATTR_TEAM_IFINDEX: u16 = 1;
const TEAM_ATTR_LIST_OPTION: u16 = 2;
const TEAM_ATTR_ITEM_OPTION: u16 = 1;
const TEAM_ATTR_OPTION_NAME: u16 = 1;
const TEAM_ATTR_OPTION_TYPE: u16 = 3;
const TEAM_ATTR_OPTION_DATA: u16 = 4;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_STRING: u8 = 5;
const NLA_BINARY: u8 = 11;

/// A generic netlink message as it is on the wire, behind its netlink header.
struct Raw {
    family: u16,
    bytes: Vec<u8>,
}

impl Raw {
    fn new(family: u16, command: u8, attributes: &[u8]) -> Self {
        // Version 1, two bytes reserved.
        let mut bytes = vec![command, 1, 0, 0];
        bytes.extend(attributes);
        Self { family, bytes }
    }
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..self.bytes.len()].copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self {
            family: header.message_type,
            bytes: payload.to_vec(),
        })
    }
}

impl From<Raw> for NetlinkPayload<Raw> {
    fn from(raw: Raw) -> Self {
        Self::InnerMessage(raw)
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // Ours are a name, a number or a program of a few instructions.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// An instruction of classic BPF.
#[derive(Clone, Copy)]
struct Instruction(u16, u8, u8, u32);

/// `linux/filter.h`
mod op {
    pub const LD_W_ABS: u16 = 0x20;
    pub const LD_H_ABS: u16 = 0x28;
    pub const ST: u16 = 0x02;
    pub const LDX_MEM: u16 = 0x61;
    pub const XOR_X: u16 = 0xac;
    pub const RSH_K: u16 = 0x74;
    pub const JEQ_K: u16 = 0x15;
    pub const RET_A: u16 = 0x16;
    pub const RET_K: u16 = 0x06;
    /// Where the kernel has what is not in the packet: the CPU.
    pub const CPU: u32 = 0xffff_f000 + 36;
}

/// Layer 3+4 of IPv4, as libteam makes it for `tx_hash`: the driver folds the four bytes.
pub fn flow_hash() -> Vec<u8> {
    program(&[
        Instruction(op::LD_H_ABS, 0, 0, 12),
        Instruction(op::JEQ_K, 1, 0, 0x0800),
        Instruction(op::RET_K, 0, 0, 0),
        Instruction(op::LD_W_ABS, 0, 0, 26),
        Instruction(op::ST, 0, 0, 0),
        Instruction(op::LD_W_ABS, 0, 0, 30),
        Instruction(op::LDX_MEM, 0, 0, 0),
        Instruction(op::XOR_X, 0, 0, 0),
        Instruction(op::ST, 0, 0, 0),
        Instruction(op::LD_W_ABS, 0, 0, 34),
        Instruction(op::LDX_MEM, 0, 0, 0),
        Instruction(op::XOR_X, 0, 0, 0),
        Instruction(op::RET_A, 0, 0, 0),
    ])
}

/// The CPU, shifted right.
pub fn cpu_hash(shift: u32) -> Vec<u8> {
    let mut all = vec![Instruction(op::LD_W_ABS, 0, 0, op::CPU)];
    if shift != 0 {
        all.push(Instruction(op::RSH_K, 0, 0, shift));
    }
    all.push(Instruction(op::RET_A, 0, 0, 0));
    program(&all)
}

fn program(instructions: &[Instruction]) -> Vec<u8> {
    instructions
        .iter()
        .flat_map(|&Instruction(code, yes, no, k)| {
            let [c0, c1] = code.to_ne_bytes();
            let [k0, k1, k2, k3] = k.to_ne_bytes();
            [c0, c1, yes, no, k0, k1, k2, k3]
        })
        .collect()
}

/// Have a team without ports balance its load by this hash.
pub fn load_balance(index: u32, hash: &[u8]) -> Result<()> {
    let mut netlink = Netlink::open("generic netlink", NETLINK_GENERIC)?;
    let ask = attribute(CTRL_ATTR_FAMILY_NAME, b"team\0");
    let replies = netlink
        .talk(Raw::new(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &ask), NLM_F_ACK)
        .map_err(|refusal| refusal.at("team", "the driver does not answer"))?;
    let family = replies
        .iter()
        .find_map(|reply| {
            find(reply.bytes.get(4..)?, CTRL_ATTR_FAMILY_ID)?
                .try_into()
                .ok()
        })
        .map(u16::from_ne_bytes)
        .ok_or_else(|| anyhow!("team: the kernel does not say which netlink family it has"))?;
    for (name, kind, value) in [
        ("mode", NLA_STRING, &b"loadbalance\0"[..]),
        ("bpf_hash_func", NLA_BINARY, hash),
    ] {
        let mut option = attribute(TEAM_ATTR_OPTION_NAME, &[name.as_bytes(), &[0]].concat());
        option.extend(attribute(TEAM_ATTR_OPTION_TYPE, &[kind]));
        option.extend(attribute(TEAM_ATTR_OPTION_DATA, value));
        let item = attribute(TEAM_ATTR_ITEM_OPTION | NLA_F_NESTED, &option);
        let mut all = attribute(TEAM_ATTR_TEAM_IFINDEX, &index.to_ne_bytes());
        all.extend(attribute(TEAM_ATTR_LIST_OPTION | NLA_F_NESTED, &item));
        match netlink.talk(Raw::new(family, TEAM_CMD_OPTIONS_SET, &all), NLM_F_ACK) {
            Ok(_) => {}
            // It is set, and nobody heard of it: the driver's last step is to tell teamd.
            Err(refusal) if refusal.errno == libc::ESRCH => {}
            Err(refusal) => {
                return Err(refusal.at("team", &format!("option {name} refused")).into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let mut bytes = attribute(7, b"odd");
        bytes.extend(attribute(9, &[1, 2]));
        assert_eq!(find(&bytes, 7), Some(&b"odd"[..]));
        assert_eq!(find(&bytes, 9), Some(&[1, 2][..]));
        assert_eq!(find(&bytes, 8), None);
        for length in 0..bytes.len() {
            // What was cut short is not there, and no reason to fall over.
            let _ = find(&bytes[..length], 8);
        }
    }

    #[test]
    fn programs_are_whole_instructions() {
        assert_eq!(cpu_hash(0).len(), 2 * 8);
        assert_eq!(cpu_hash(1).len(), 3 * 8);
        assert_eq!(flow_hash().len() % 8, 0);
    }
}
