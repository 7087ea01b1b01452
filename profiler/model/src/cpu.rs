//! What one virtual CPU has done in the open region.

use crate::block::Meaning;
use crate::class::Class;
use crate::context::Task;
use crate::counts::{Count, Counts, FunctionCount, RangeCount};
use crate::line::Access;
use crate::lines::{Lines, Map};
use crate::region::Window;
use crate::session::Session;
use crate::trace::{Record, Stream};
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
    /// At the entry of the first function of the range with that number.
    From(usize),
    /// At the entry of its second.
    To(usize),
}

/// What a CPU hands over when a region is closed.
pub struct Finished {
    /// By [`row`].
    pub rows: Vec<Count>,
    /// Packets that began.
    pub marks: u64,
    /// Path instructions of each whole packet.
    pub packet_insns: Vec<u32>,
    /// By the region's ranges.
    pub ranges: Vec<RangeCount>,
    /// For the replay.
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
        let class = self.task.enter(meaning.place, meaning.step());
        self.interrupts += u64::from(self.task.depth() > depth);
        // What an interrupt sends is no packet of the load's.
        if class != Class::Irq {
            if meaning.mark {
                self.mark();
            }
            for &point in points {
                self.point(point);
            }
        }
        if class == Class::Path {
            if self.path_insns - self.at_piece > PIECE
                && (self.marks == 0 || self.window == Window::Region)
            {
                self.at_piece = self.path_insns;
                self.trace.end_packet();
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

/// Put the CPUs' counts together, by function and class.
pub fn gather(session: &Session, finished: &[Finished]) -> Counts {
    let region = &session.region;
    let mut rows = Vec::new();
    for (number, (name, module)) in session.functions().into_iter().enumerate() {
        for class in Class::ALL {
            let row = row(number as u32, class);
            let cpus: Vec<_> = finished
                .iter()
                .map(|cpu| cpu.rows.get(row).copied().unwrap_or_default())
                .collect();
            if cpus.iter().any(|count| *count != Default::default()) {
                rows.push(FunctionCount {
                    name: name.clone(),
                    module: module.clone(),
                    class,
                    cpus,
                });
            }
        }
    }
    let mut ranges: Vec<RangeCount> = Vec::new();
    for cpu in finished {
        for (number, range) in cpu.ranges.iter().enumerate() {
            match ranges.get_mut(number) {
                Some(sum) => sum.add(range),
                None => ranges.push(range.clone()),
            }
        }
    }
    Counts {
        label: region.label.clone(),
        window: region.window,
        functions: rows,
        ranges,
        packet_insns: finished
            .iter()
            .map(|cpu| cpu.packet_insns.clone())
            .collect(),
        marks: finished.iter().map(|cpu| cpu.marks).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Block;
    use crate::region::Region;
    use proptest::prelude::*;

    const SYMBOLS: &str = "\
ffffffff81000000 T _stext
ffffffff81000100 T bond_start_xmit
ffffffff81000200 T __dev_queue_xmit
ffffffff81000300 T asm_sysvec_apic_timer_interrupt
ffffffff81000400 T common_interrupt_return
ffffffff81000500 T elsewhere
ffffffffc0001000 t mod_cur_headers\t[pktgen]
";
    const BOND: u64 = 0xffff_ffff_8100_0100;
    const QUEUE: u64 = BOND + 0x100;
    const TIMER: u64 = BOND + 0x200;
    const RETURN: u64 = BOND + 0x300;
    const ELSEWHERE: u64 = BOND + 0x400;
    const PKTGEN: u64 = 0xffff_ffff_c000_1000;

    struct Bench {
        session: Session,
        lines: Lines,
        cpus: Vec<Cpu>,
    }

    impl Bench {
        fn new(region: Region) -> Self {
            let session = Session::new(region, SYMBOLS, 1).expect("opens");
            Self {
                lines: Lines::default(),
                cpus: (0..2).map(|cpu| Cpu::open(cpu, &session)).collect(),
                session,
            }
        }

        /// A block of ten instructions.
        fn run(&mut self, cpu: usize, pc: u64) {
            let block = Block::new(pc, 10, pc == RETURN);
            let meaning = self.session.meaning(&block);
            self.cpus[cpu].run(meaning, block.insns, self.session.points(pc));
        }

        fn write(&mut self, cpu: usize, at: u64) {
            self.cpus[cpu].access(&self.lines, at, at, 8, Access::Write);
        }

        fn finish(self) -> (Counts, Vec<Stream>) {
            let finished: Vec<_> = self.cpus.into_iter().map(Cpu::close).collect();
            let counts = gather(&self.session, &finished);
            (counts, finished.into_iter().map(|cpu| cpu.trace).collect())
        }
    }

    fn region(window: Window) -> Region {
        Region {
            window,
            ranges: vec![("bond_start_xmit".to_owned(), "__dev_queue_xmit".to_owned())],
            ..Region::packets("test", "bond_start_xmit")
        }
    }

    fn total(counts: &Counts, name: &str, class: Class) -> Count {
        counts
            .functions
            .iter()
            .filter(|row| row.name == name && row.class == class)
            .map(FunctionCount::total)
            .sum()
    }

    #[test]
    fn whole_packets_count_and_neither_setup_nor_end() {
        let mut bench = Bench::new(region(Window::Packets));
        bench.run(0, ELSEWHERE);
        for _ in 0..3 {
            bench.run(0, BOND);
            bench.run(0, QUEUE);
        }
        bench.run(0, ELSEWHERE);
        // A CPU with no packets counts as it is.
        bench.run(1, ELSEWHERE);
        let (counts, traces) = bench.finish();
        assert_eq!(counts.marks, [3, 0]);
        assert_eq!(counts.packet_insns, [vec![20, 20], vec![]]);
        assert_eq!(total(&counts, "bond_start_xmit", Class::Path).insns, 20);
        assert_eq!(total(&counts, "__dev_queue_xmit", Class::Path).insns, 20);
        assert_eq!(total(&counts, "elsewhere", Class::Path).insns, 10);
        assert_eq!((traces[0].counted_from, traces[0].counted_to), (1, 3));
        assert_eq!((traces[1].counted_from, traces[1].counted_to), (0, 1));
    }

    #[test]
    fn a_whole_region_counts_it_all() {
        let mut bench = Bench::new(region(Window::Region));
        bench.run(0, ELSEWHERE);
        bench.run(0, BOND);
        bench.run(0, ELSEWHERE);
        let (counts, traces) = bench.finish();
        assert_eq!(total(&counts, "elsewhere", Class::Path).insns, 20);
        assert_eq!((traces[0].counted_from, traces[0].counted_to), (0, 2));
    }

    #[test]
    fn a_cpu_without_packets_is_cut_into_pieces() {
        let mut bench = Bench::new(region(Window::Packets));
        for _ in 0..PIECE / 2 {
            bench.run(1, ELSEWHERE);
        }
        let (_, traces) = bench.finish();
        assert_eq!(traces[1].counted_to, 5);
    }

    #[test]
    fn a_range_with_an_interrupt_in_it_is_left_out() {
        let mut bench = Bench::new(region(Window::Packets));
        bench.run(0, BOND);
        bench.run(0, ELSEWHERE);
        bench.run(0, QUEUE);
        bench.run(0, BOND);
        bench.run(0, TIMER);
        bench.run(0, RETURN);
        bench.run(0, QUEUE);
        // Without its beginning it is none.
        bench.run(0, QUEUE);
        let (counts, _) = bench.finish();
        let range = &counts.ranges[0];
        assert_eq!((range.times, range.interrupted), (1, 1));
        assert_eq!((range.insns, range.min, range.max), (20, 20, 20));
        assert_eq!(range.mean(), Some(20.0));
    }

    #[test]
    fn an_interrupts_lines_are_in_its_class_and_not_replayed() {
        let mut bench = Bench::new(region(Window::Region));
        bench.run(0, ELSEWHERE);
        bench.write(0, 0x1000);
        bench.run(1, TIMER);
        bench.write(1, 0x1000);
        bench.run(1, RETURN);
        let (counts, traces) = bench.finish();
        let name = "asm_sysvec_apic_timer_interrupt";
        assert_eq!(total(&counts, name, Class::Path), Count::default());
        assert_eq!(
            total(&counts, name, Class::Irq),
            Count {
                insns: 10,
                conflicts: 1,
                transfers: 1
            }
        );
        assert_eq!(traces[0].packet(0).count(), 1);
        assert_eq!(traces[1].packet(0).count(), 0);
    }

    #[test]
    fn a_generators_packet_begins_in_the_generator() {
        let mut bench = Bench::new(Region::packets("test", "pktgen:mod_cur_headers"));
        for _ in 0..3 {
            bench.run(0, PKTGEN);
            bench.run(0, ELSEWHERE);
            bench.run(0, BOND);
            bench.run(0, ELSEWHERE);
        }
        let (counts, _) = bench.finish();
        assert_eq!(counts.marks, [3, 0]);
        assert_eq!(counts.packet_insns[0], [20, 20]);
        assert_eq!(total(&counts, "elsewhere", Class::Generator).insns, 20);
        assert_eq!(total(&counts, "elsewhere", Class::Path).insns, 20);
    }

    #[test]
    fn repeated_accesses_in_a_packet_are_kept_once() {
        let mut bench = Bench::new(region(Window::Region));
        bench.run(0, ELSEWHERE);
        for _ in 0..5 {
            bench.write(0, 0x1000);
            bench.cpus[0].access(&bench.lines, 0x1008, 0x1008, 8, Access::Read);
        }
        bench.run(0, BOND);
        bench.write(0, 0x1000);
        let (_, traces) = bench.finish();
        assert_eq!(traces[0].packet(0).count(), 2);
        assert_eq!(traces[0].packet(1).count(), 1);
    }

    #[test]
    fn an_access_over_the_end_of_a_line_is_two() {
        let mut bench = Bench::new(region(Window::Region));
        for cpu in 0..2 {
            bench.run(cpu, ELSEWHERE);
            bench.write(cpu, 0x103c);
        }
        let (counts, traces) = bench.finish();
        assert_eq!(total(&counts, "elsewhere", Class::Path).transfers, 2);
        assert_eq!(traces[1].packet(0).count(), 2);
    }

    #[test]
    fn watched_lines_have_rows_of_their_own() {
        let mut bench = Bench::new(Region {
            watch: Some((0x10_0000, 0x10_0080)),
            ..region(Window::Region)
        });
        for cpu in 0..2 {
            bench.run(cpu, 0x40_0000);
            bench.write(cpu, 0x10_0040);
            bench.write(cpu, 0x10_0080);
        }
        let (counts, _) = bench.finish();
        assert_eq!(total(&counts, "line:1", Class::User).conflicts, 1);
        assert_eq!(total(&counts, "line:0", Class::User).conflicts, 0);
        assert_eq!(total(&counts, "user", Class::User).conflicts, 1);
        assert_eq!(total(&counts, "user", Class::User).insns, 20);
    }

    #[test]
    fn a_switched_out_task_keeps_its_interrupt() {
        let mut bench = Bench::new(region(Window::Region));
        bench.run(0, TIMER);
        let preempted = bench.cpus[0].switch_out();
        bench.run(0, ELSEWHERE);
        bench.cpus[1].switch_in(preempted);
        bench.run(1, QUEUE);
        bench.run(1, RETURN);
        bench.run(1, QUEUE);
        let (counts, _) = bench.finish();
        assert_eq!(total(&counts, "elsewhere", Class::Path).insns, 10);
        assert_eq!(total(&counts, "__dev_queue_xmit", Class::Irq).insns, 10);
        assert_eq!(total(&counts, "__dev_queue_xmit", Class::Path).insns, 10);
    }

    #[test]
    fn a_function_that_is_not_there_is_an_error() {
        let Err(error) = Session::new(Region::packets("test", "no_such"), SYMBOLS, 1) else {
            panic!("opened");
        };
        assert!(error.contains("no function 'no_such'"), "{error}");
        assert!(Session::new(Region::packets("a/b", "elsewhere"), SYMBOLS, 1).is_err());
    }

    proptest! {
        /// Where the CPUs did run round robin, the replay of the few accesses that are
        /// kept costs what all of them did.
        #[test]
        fn the_replay_of_what_ran_in_turns_costs_the_same(
            packets in prop::collection::vec(
                prop::collection::vec((0..5_u64, 0..3_usize), 0..12), 0..20)
        ) {
            let mut bench = Bench::new(Region {
                window: Window::Region,
                ..Region::packets("test", "elsewhere")
            });
            // Both CPUs have the same number.
            for (number, packet) in packets.iter().take(packets.len() & !1).enumerate() {
                let cpu = number % 2;
                bench.run(cpu, ELSEWHERE);
                for &(line, access) in packet {
                    let access = [Access::Read, Access::Write, Access::Update][access];
                    bench.cpus[cpu].access(&bench.lines, line * 64, line * 64, 8, access);
                }
            }
            let (counts, traces) = bench.finish();
            let ran = total(&counts, "elsewhere", Class::Path);
            let replayed = crate::replay::replay(&traces, 1);
            prop_assert_eq!(replayed.round_robin, ran.transfers as f64);
        }
    }
}
