//! Accesses of each CPU, packet by packet: what the plugin writes and the replay reads.
//!
//! Between two marks a CPU is taken to run alone, so of its accesses to a line in that
//! time only the first read and the first write matter; no others are kept.

use crate::class::Class;
use crate::line::Access;
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"cpubtrc1";

/// One kept access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The physical line: address / 64.
    pub line: u64,
    /// What it did.
    pub access: Access,
    /// What it was part of.
    pub class: Class,
}

/// What one CPU did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    records: Vec<u64>,
    /// Where each packet ends in `records`.
    ends: Vec<u64>,
    /// Packets before this one are set-up: replayed, but first and not counted.
    pub counted_from: u64,
    /// From this one on nothing is replayed.
    pub counted_to: u64,
}

impl Record {
    fn pack(self) -> u64 {
        let access = match self.access {
            Access::Read => 0,
            Access::Write => 1,
            Access::Update => 2,
        };
        self.line << 5 | (self.class as u64) << 2 | access
    }

    fn unpack(word: u64) -> Option<Self> {
        Some(Self {
            line: word >> 5,
            access: match word & 3 {
                0 => Access::Read,
                1 => Access::Write,
                2 => Access::Update,
                _ => return None,
            },
            class: *Class::ALL.get((word >> 2 & 7) as usize)?,
        })
    }
}

impl Stream {
    /// Append an access to the packet that is being made.
    pub fn push(&mut self, record: Record) {
        self.records.push(record.pack());
    }

    /// The packet ends here. Returns how many there are now.
    pub fn end_packet(&mut self) -> u64 {
        self.ends.push(self.records.len() as u64);
        self.ends.len() as u64
    }

    /// How many packets have ended.
    pub fn packets(&self) -> u64 {
        self.ends.len() as u64
    }

    /// Accesses of one packet.
    pub fn packet(&self, number: u64) -> impl Iterator<Item = Record> {
        let number = number as usize;
        let begin = match number {
            0 => 0,
            _ => self.ends.get(number - 1).map_or(0, |&end| end as usize),
        };
        let end = self.ends.get(number).map_or(begin, |&end| end as usize);
        self.records[begin..end]
            .iter()
            .filter_map(|&word| Record::unpack(word))
    }
}

/// Write the streams of all CPUs.
pub fn write(out: &mut impl Write, cpus: &[&Stream]) -> io::Result<()> {
    out.write_all(MAGIC)?;
    let mut word = |n: u64| out.write_all(&n.to_le_bytes());
    word(cpus.len() as u64)?;
    for stream in cpus {
        for n in [
            stream.counted_from,
            stream.counted_to,
            stream.ends.len() as u64,
            stream.records.len() as u64,
        ] {
            word(n)?;
        }
        stream.ends.iter().try_for_each(|&n| word(n))?;
        stream.records.iter().try_for_each(|&n| word(n))?;
    }
    Ok(())
}

/// Read them back. Whatever is wrong with the file is an error.
pub fn read(from: &mut impl Read) -> io::Result<Vec<Stream>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut magic = [0; 8];
    from.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(bad("not a trace of this version of the profiler"));
    }
    let mut word = || -> io::Result<u64> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let cpus = word()?;
    let mut streams = Vec::new();
    for _ in 0..cpus {
        let (counted_from, counted_to, packets, records) = (word()?, word()?, word()?, word()?);
        // Not allocated ahead: a broken count runs into the end of the file.
        let ends = (0..packets)
            .map(|_| word())
            .collect::<io::Result<Vec<_>>>()?;
        let records = (0..records)
            .map(|_| word())
            .collect::<io::Result<Vec<_>>>()?;
        if !ends.is_sorted()
            || ends.last().is_some_and(|&end| end > records.len() as u64)
            || counted_to > packets
            || records.iter().any(|&word| Record::unpack(word).is_none())
        {
            return Err(bad("the trace contradicts itself"));
        }
        streams.push(Stream {
            records,
            ends,
            counted_from,
            counted_to,
        });
    }
    Ok(streams)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut stream = Stream::default();
        let records: Vec<_> = (0..30)
            .map(|n| Record {
                line: n * 1_000_003,
                access: [Access::Read, Access::Write, Access::Update][(n % 3) as usize],
                class: Class::ALL[(n % 6) as usize],
            })
            .collect();
        for part in records.chunks(7) {
            part.iter().for_each(|&record| stream.push(record));
            stream.end_packet();
        }
        stream.counted_from = 1;
        stream.counted_to = 4;
        let mut file = Vec::new();
        write(&mut file, &[&stream, &Stream::default()]).expect("memory");
        let back = read(&mut file.as_slice()).expect("reads");
        assert_eq!(back, [stream.clone(), Stream::default()]);
        let all: Vec<_> = (0..stream.packets())
            .flat_map(|n| stream.packet(n).collect::<Vec<_>>())
            .collect();
        assert_eq!(all, records);
        assert_eq!(stream.packet(99).count(), 0);

        file.truncate(file.len() - 1);
        assert!(read(&mut file.as_slice()).is_err());
        assert!(read(&mut &b"something else"[..]).is_err());
    }
}
