//! The program that has bonding's `queue_id` follow the CPU.

use crate::steer::bpf::refused;
use anyhow::{Context, Result, anyhow};
use aya::programs::links::FdLink;
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{EbpfLoader, include_bytes_aligned};
use std::{fs, io};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/queue_id.bpf.o"));

/// Keeps it attached when we have ended.
const LINK: &str = "/sys/fs/bpf/cpubond-bench-queue_id";

/// Detach it, if it is attached.
pub fn detach() -> Result<()> {
    match fs::remove_file(LINK) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(LINK),
        _ => Ok(()),
    }
}

/// Attach it to the way out of a bond; CPUs shifted right are slaves.
pub fn attach(bond: &str, shift: u32) -> Result<()> {
    let mut bpf = EbpfLoader::new()
        .override_global("shift", &shift, true)
        .load(OBJECT)
        .map_err(|error| refused("queue_id", &error))?;
    let program: &mut SchedClassifier = bpf
        .program_mut("cpubond_queue_id")
        .ok_or_else(|| anyhow!("queue_id: the object has no such program"))?
        .try_into()?;
    program
        .load()
        .map_err(|error| refused("queue_id", &error))?;
    let link = program
        .attach(bond, TcAttachType::Egress)
        .map_err(|error| refused(bond, &error))?;
    let link = program
        .take_link(link)
        .map_err(|error| refused(bond, &error))?;
    let link: FdLink = link.try_into().map_err(|error| refused(bond, &error))?;
    link.pin(LINK).map_err(|error| refused(LINK, &error))?;
    Ok(())
}
