//! A QEMU TCG plugin that counts, in regions the guest opens and closes, instructions and
//! the cache lines that move between CPUs.
//!
//! Arguments: `dir=DIR`. There the helper leaves what to count (`region.json`, `symbols`)
//! before the guest opens a region by a marker instruction; there the counts are left when
//! the guest closes it. Each block and each access of memory calls in here; while no region
//! is open that is one test of a flag. What is counted, and how, is in `profiler-model`.

use profiler_model::block::Block;
use profiler_model::context::Task;
use profiler_model::cpu::{Cpu, Finished, gather};
use profiler_model::instruction::{self, Kind};
use profiler_model::line::{Access, MAX_CPUS};
use profiler_model::lines::Lines;
use profiler_model::region::{Region, STATUS_FILE};
use profiler_model::session::Session;
use profiler_model::trace;
use qemu_plugin::install::{Args, Info};
use qemu_plugin::plugin::{HasCallbacks, Register};
use qemu_plugin::{MemRW, MemoryInfo, PluginId, TranslationBlock, VCPUIndex};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

static PROFILER: OnceLock<Profiler> = OnceLock::new();
/// Outside of the rest: it is tested at each block and each access.
static OPEN: AtomicBool = AtomicBool::new(false);

struct Profiler {
    dir: PathBuf,
    cpus: Vec<Mutex<Cpu>>,
    lines: Lines,
    /// Tasks that are switched out, by where they keep their stack pointer.
    tasks: Mutex<HashMap<u64, Task>>,
    session: RwLock<Option<Arc<Session>>>,
    /// How many regions there were.
    opened: Mutex<u16>,
}

/// A thread that panicked took QEMU with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Plugin;

qemu_plugin::register!(Plugin);

impl Register for Plugin {
    fn register(&mut self, _: PluginId, args: &Args, info: &Info) -> qemu_plugin::Result<()> {
        // The crate panics on an error from here, which tells less.
        let refuse = |why: &str| -> ! {
            eprintln!("profiler: {why}");
            std::process::exit(1);
        };
        let Some(dir) = args.raw.iter().find_map(|arg| arg.strip_prefix("dir=")) else {
            refuse("want dir=DIR, the directory to exchange files in");
        };
        let cpus = info.system.as_ref().map_or(0, |system| system.max_vcpus);
        let cpus = usize::try_from(cpus).unwrap_or(0);
        if !(1..=MAX_CPUS).contains(&cpus) {
            refuse(&format!("{cpus} CPUs: want a system of 1 to {MAX_CPUS}"));
        }
        // Registered once, so it is the first.
        let _ = PROFILER.set(Profiler {
            dir: dir.into(),
            cpus: (0..cpus).map(|_| Mutex::default()).collect(),
            lines: Lines::default(),
            tasks: Mutex::default(),
            session: RwLock::default(),
            opened: Mutex::new(0),
        });
        Ok(())
    }
}

impl HasCallbacks for Plugin {
    fn on_translation_block_translate(
        &mut self,
        _: PluginId,
        tb: TranslationBlock,
    ) -> qemu_plugin::Result<()> {
        let Some(profiler) = PROFILER.get() else {
            return Ok(());
        };
        let user = tb.vaddr() >> 63 == 0;
        let mut iret = false;
        for insn in tb.instructions() {
            let mut bytes = [0; 16];
            let length = insn.read_data(&mut bytes).min(bytes.len());
            match instruction::kind(&bytes[..length], user) {
                Kind::Plain => insn.register_memory_access_callback(
                    |cpu, info, addr| {
                        if OPEN.load(Ordering::Relaxed) {
                            let access = if info.is_store() {
                                Access::Write
                            } else {
                                Access::Read
                            };
                            profiler.access(cpu, &info, addr, access);
                        }
                    },
                    MemRW::QEMU_PLUGIN_MEM_RW,
                ),
                // Where QEMU makes two accesses of it, the store is the one that counts.
                Kind::Atomic => insn.register_memory_access_callback(
                    |cpu, info, addr| {
                        if OPEN.load(Ordering::Relaxed) && info.is_store() {
                            profiler.access(cpu, &info, addr, Access::Update);
                        }
                    },
                    MemRW::QEMU_PLUGIN_MEM_RW,
                ),
                Kind::SwitchOut => insn.register_memory_access_callback(
                    |cpu, info, addr| {
                        if OPEN.load(Ordering::Relaxed) {
                            profiler.access(cpu, &info, addr, Access::Write);
                            profiler.switch_out(cpu, addr);
                        }
                    },
                    MemRW::QEMU_PLUGIN_MEM_RW,
                ),
                Kind::SwitchIn => insn.register_memory_access_callback(
                    |cpu, info, addr| {
                        if OPEN.load(Ordering::Relaxed) {
                            profiler.access(cpu, &info, addr, Access::Read);
                            profiler.switch_in(cpu, addr);
                        }
                    },
                    MemRW::QEMU_PLUGIN_MEM_RW,
                ),
                Kind::InterruptReturn => iret = true,
                Kind::Open => insn.register_execute_callback(|_| profiler.open()),
                Kind::Close => insn.register_execute_callback(|_| profiler.close()),
            }
        }
        // QEMU gives no notice when a block goes, so it stays.
        let block: &'static Block =
            Box::leak(Box::new(Block::new(tb.vaddr(), tb.size() as u64, iret)));
        tb.register_execute_callback(move |cpu| {
            if OPEN.load(Ordering::Relaxed) {
                profiler.run(cpu, block);
            }
        });
        Ok(())
    }
}

impl Profiler {
    fn cpu(&self, cpu: VCPUIndex) -> Option<MutexGuard<'_, Cpu>> {
        self.cpus.get(cpu as usize).map(lock)
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.session
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn run(&self, cpu: VCPUIndex, block: &Block) {
        let Some(mut cpu) = self.cpu(cpu) else { return };
        let Some(number) = cpu.region() else { return };
        let mut session = None;
        let meaning = block.meaning(number, |block| {
            session = self.session();
            session.as_ref().map(|session| session.meaning(block))
        });
        // None: closed just now.
        let Some(meaning) = meaning else { return };
        if meaning.range {
            if let Some(session) = session.or_else(|| self.session()) {
                cpu.run(meaning, block.insns, session.points(block.pc));
            }
        } else {
            cpu.run(meaning, block.insns, &[]);
        }
    }

    fn access(&self, cpu: VCPUIndex, info: &MemoryInfo<'_>, virt: u64, access: Access) {
        let Some(place) = info.hwaddr(virt) else {
            return;
        };
        // Device registers are in nobody's cache.
        if !place.is_io()
            && let Some(mut cpu) = self.cpu(cpu)
        {
            let size = 1 << info.size_shift();
            cpu.access(&self.lines, virt, place.hwaddr(), size, access);
        }
    }

    fn switch_out(&self, cpu: VCPUIndex, task: u64) {
        if let Some(mut cpu) = self.cpu(cpu) {
            lock(&self.tasks).insert(task, cpu.switch_out());
        }
    }

    fn switch_in(&self, cpu: VCPUIndex, task: u64) {
        if let Some(mut cpu) = self.cpu(cpu) {
            let task = lock(&self.tasks).remove(&task).unwrap_or_default();
            cpu.switch_in(task);
        }
    }

    /// The guest executed a marker; it waits for the answer, in [`STATUS_FILE`].
    fn open(&self) {
        self.tell(self.try_open());
    }

    fn close(&self) {
        self.tell(self.try_close());
    }

    fn tell(&self, result: Result<(), String>) {
        let text = result.err().unwrap_or_default();
        if let Err(error) = fs::write(self.dir.join(STATUS_FILE), &text) {
            eprintln!("profiler: {}: {error} ({text})", self.dir.display());
        }
    }

    fn try_open(&self) -> Result<(), String> {
        let mut opened = lock(&self.opened);
        if OPEN.load(Ordering::Relaxed) {
            return Err("a region is open already".to_owned());
        }
        *opened = opened
            .checked_add(1)
            .ok_or("too many regions in one boot")?;
        let session = Session::read(&self.dir, *opened)?;
        self.lines.clear();
        lock(&self.tasks).clear();
        for (number, cpu) in self.cpus.iter().enumerate() {
            *lock(cpu) = Cpu::open(number, &session);
        }
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(session));
        OPEN.store(true, Ordering::Release);
        Ok(())
    }

    fn try_close(&self) -> Result<(), String> {
        let _opened = lock(&self.opened);
        if !OPEN.swap(false, Ordering::AcqRel) {
            return Err("no region is open".to_owned());
        }
        let session = self
            .session
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .ok_or("no region is open")?;
        // A CPU that is in a callback right now ends it before its state is taken.
        let finished: Vec<Finished> = self
            .cpus
            .iter()
            .map(|cpu| std::mem::take(&mut *lock(cpu)).close())
            .collect();
        let label = &session.region.label;
        let counts = gather(&session, &finished);

        let path = Region::trace_file(&self.dir, label);
        let traces: Vec<_> = finished.iter().map(|cpu| &cpu.trace).collect();
        let save = || -> std::io::Result<()> {
            let mut out = BufWriter::new(File::create(&path)?);
            trace::write(&mut out, &traces)?;
            out.flush()
        };
        save().map_err(|error| format!("{}: {error}", path.display()))?;
        let path = Region::counts_file(&self.dir, label);
        let save = || -> std::io::Result<()> {
            let mut out = BufWriter::new(File::create(&path)?);
            serde_json::to_writer(&mut out, &counts)?;
            out.flush()
        };
        save().map_err(|error| format!("{}: {error}", path.display()))
    }
}
