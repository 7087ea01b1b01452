//! What one virtual CPU has done in the open region.

use crate::block::Meaning;
use crate::lines::{Lines, Map};
use crate::session::Session;
use profiler_model::class::Class;
use profiler_model::context::Task;
use profiler_model::counts::{Count, RangeCount};
use profiler_model::line::Access;
use profiler_model::region::Window;
use profiler_model::trace::{Record, Stream};
use std::mem;

const CLASSES: usize = Class::ALL.len();
/// A CPU that has no marks is put between those that have, in pieces of so many path
/// instructions.
const PIECE: u64 = 20_000;

/// Where the counts of a function in a class are.
pub fn row(function: u32, class: Class) -> usize {
    function as usize * CLASSES + class as usize
}

/// State of a CPU.
#[derive(Default)]
pub struct Cpu {
    number: usize,
    /// Number of the region; none is open.
    region: Option<u16>,
    window: Window,
    /// User addresses that are counted line by line, and the function of the first line.
    watch: Option<(u64, u64, u32)>,
    task: Task,
    /// Of the block that runs: its row and class. None until one begins in the region.
    now: Option<(usize, Class)>,
    /// By row, since the last mark; and which rows are not zero.
    pending: Vec<Count>,
    touched: Vec<usize>,
    /// By row, what counts.
    done: Vec<Count>,
    marks: u64,
    /// Path instructions since the region was opened, and at the last mark.
    path_insns: u64,
    at_mark: u64,
    at_piece: u64,
    packet_insns: Vec<u32>,
    interrupts: u64,
    ranges: Vec<Range>,
    trace: Stream,
    /// Lines by the packet in which they were last kept, and what of it.
    kept: Map<(u64, u8)>,
}

#[derive(Default)]
struct Range {
    /// Path instructions and interrupts at the entry of the first function.
    begun: Option<(u64, u64)>,
    count: RangeCount,
}

/// Where a CPU is in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    From(usize),
    To(usize),
}

/// What a CPU hands over when a region is closed.
pub struct Finished {
    /// By [`row`].
    pub rows: Vec<Count>,
    pub marks: u64,
    pub packet_insns: Vec<u32>,
    pub ranges: Vec<RangeCount>,
    pub trace: Stream,
}

impl Cpu {
    /// Begin a region.
    pub fn open(number: usize, session: &Session) -> Self {
        Self {
            number,
            region: Some(session.number),
            window: session.region.window,
            watch: session.watch(),
            ranges: session
                .region
                .ranges
                .iter()
                .map(|(from, to)| Range {
                    begun: None,
                    count: RangeCount {
                        from: from.clone(),
                        to: to.clone(),
                        ..RangeCount::default()
                    },
                })
                .collect(),
            ..Self::default()
        }
    }

    /// Number of the open region.
    pub fn region(&self) -> Option<u16> {
        self.region
    }

    /// A block begins.
    pub fn run(&mut self, meaning: Meaning, insns: u64, points: &[Point]) {
        let depth = self.task.depth();
        let class = self.task.enter(meaning.place, meaning.class);
        self.interrupts += u64::from(self.task.depth() > depth);
        if class == Class::Path {
            if meaning.mark {
                self.mark();
            } else if self.path_insns - self.at_piece > PIECE
                && (self.marks == 0 || self.window == Window::Region)
            {
                self.at_piece = self.path_insns;
                self.trace.end_packet();
            }
            for &point in points {
                self.point(point);
            }
            self.path_insns += insns;
        }
        let row = row(meaning.function, class);
        self.count(row).insns += insns;
        self.now = Some((row, class));
    }

    /// The block that runs accesses memory.
    pub fn access(&mut self, lines: &Lines, virt: u64, phys: u64, size: u64, access: Access) {
        let Some((mut row, class)) = self.now else {
            return;
        };
        if class == Class::User
            && let Some((first, end, function)) = self.watch
            && (first..end).contains(&virt)
        {
            let line = (virt >> 6) - (first >> 6);
            row = self::row(function + line as u32, class);
        }
        let line = phys >> 6;
        // Where the rest is on another page, its physical address is not known.
        let two = (virt & 63) + size > 64 && (virt & 4095) + size <= 4096;
        for line in line..=line + u64::from(two) {
            let cost = lines.access(line, self.number, access);
            if cost.conflict || cost.transfer {
                let count = self.count(row);
                count.conflicts += u64::from(cost.conflict);
                count.transfers += u64::from(cost.transfer);
            }
            if matches!(class, Class::Path | Class::Generator | Class::User) {
                self.keep(line, access, class);
            }
        }
    }

    /// The task is switched out.
    pub fn switch_out(&mut self) -> Task {
        mem::take(&mut self.task)
    }

    /// Another one is switched in.
    pub fn switch_in(&mut self, task: Task) {
        self.task = task;
    }

    /// The region is closed.
    pub fn close(mut self) -> Finished {
        if self.marks == 0 || self.window == Window::Region {
            self.commit();
            self.trace.end_packet();
            self.trace.counted_from = 0;
            self.trace.counted_to = self.trace.packets();
        }
        // Else what comes after the last mark is no whole packet.
        Finished {
            rows: self.done,
            marks: self.marks,
            packet_insns: self.packet_insns,
            ranges: self.ranges.into_iter().map(|range| range.count).collect(),
            trace: self.trace,
        }
    }

    /// A row, to be added to.
    fn count(&mut self, row: usize) -> &mut Count {
        if row >= self.pending.len() {
            self.pending.resize(row + CLASSES, Count::default());
        }
        let count = &mut self.pending[row];
        if *count == Count::default() {
            self.touched.push(row);
        }
        count
    }

    /// A packet begins, so one has ended.
    fn mark(&mut self) {
        let ended = self.trace.end_packet();
        if self.marks == 0 && self.window == Window::Packets {
            // What came before was set-up.
            for row in self.touched.drain(..) {
                self.pending[row] = Count::default();
            }
            self.trace.counted_from = ended;
        } else {
            self.commit();
        }
        if self.marks > 0 {
            let insns = self.path_insns - self.at_mark;
            self.packet_insns
                .push(u32::try_from(insns).unwrap_or(u32::MAX));
        }
        self.trace.counted_to = ended;
        self.at_mark = self.path_insns;
        self.at_piece = self.path_insns;
        self.marks += 1;
    }

    fn commit(&mut self) {
        self.done.resize(self.pending.len(), Count::default());
        for row in self.touched.drain(..) {
            self.done[row] += mem::take(&mut self.pending[row]);
        }
    }

    fn point(&mut self, point: Point) {
        match point {
            Point::From(number) => {
                self.ranges[number].begun = Some((self.path_insns, self.interrupts));
            }
            Point::To(number) => {
                let Range { begun, count } = &mut self.ranges[number];
                if let Some((insns, interrupts)) = begun.take() {
                    if interrupts == self.interrupts {
                        let insns = self.path_insns - insns;
                        count.add(&RangeCount {
                            times: 1,
                            insns,
                            min: insns,
                            max: insns,
                            ..RangeCount::default()
                        });
                    } else {
                        count.interrupted += 1;
                    }
                }
            }
        }
    }

    /// Of a packet's accesses to a line, the first read and the first write matter.
    fn keep(&mut self, line: u64, access: Access, class: Class) {
        let packet = self.trace.packets();
        let kept = self.kept.entry(line).or_insert((packet, 0));
        if kept.0 != packet {
            *kept = (packet, 0);
        }
        let what = u8::from(access.reads()) | u8::from(access.writes()) << 1;
        if kept.1 & what != what {
            kept.1 |= what;
            self.trace.push(Record {
                line,
                access,
                class,
            });
        }
    }
}
