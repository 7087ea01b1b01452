//! The guest's end: runs commands for the host, and takes calls of the guest's own
//! programs to the host.

use super::wire::{self, Reply, Stream, ToGuest, ToHost};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::Duration;

/// Name of the virtio-serial port, on both sides.
pub const PORT: &str = "cpubond.agent";
/// Where `cpubond vm call` finds the agent.
const SOCKET: &str = "/run/cpubond.sock";
/// How long output is still waited for after a command has ended: a daemon it left
/// behind may hold its pipes open for ever.
const DRAIN: Duration = Duration::from_millis(300);

struct Agent {
    host: Mutex<File>,
    /// Process groups of running commands.
    running: Mutex<HashMap<u64, Pid>>,
    /// Guest programs that wait for an answer from the host.
    callers: Mutex<HashMap<u64, UnixStream>>,
}

/// A thread that panicked has reported it; the data is still good to tidy up with.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Serve the host until it hangs up.
pub fn run() -> Result<ExitCode> {
    let port = find_port()?;
    let host = File::options()
        .read(true)
        .write(true)
        .open(&port)
        .with_context(|| format!("{}: cannot open", port.display()))?;
    let mut from_host = BufReader::new(host.try_clone()?);
    let agent = Arc::new(Agent {
        host: Mutex::new(host),
        running: Mutex::default(),
        callers: Mutex::default(),
    });

    let listener = UnixListener::bind(SOCKET).with_context(|| format!("{SOCKET}: cannot bind"))?;
    let for_calls = Arc::clone(&agent);
    thread::spawn(move || for_calls.take_calls(&listener));

    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    agent.tell(&ToHost::Hello {
        kernel: kernel.trim().to_owned(),
    });
    while let Some(message) = wire::receive(&mut from_host)? {
        match message {
            ToGuest::Exec { id, cmd } => {
                let agent = Arc::clone(&agent);
                thread::spawn(move || agent.exec(id, &cmd));
            }
            ToGuest::Kill { id } => {
                if let Some(&group) = lock(&agent.running).get(&id) {
                    // Gone already is as good as killed.
                    let _ = kill_process_group(group, Signal::KILL);
                }
            }
            ToGuest::Answer { id, reply } => agent.answer(id, &reply),
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Agent {
    /// A host that no longer listens is found out by the main loop's read.
    fn tell(&self, message: &ToHost) {
        let _ = wire::send(&mut *lock(&self.host), message);
    }

    fn exec(self: &Arc<Self>, id: u64, cmd: &str) {
        let code = self.exec_inner(id, cmd).unwrap_or_else(|error| {
            self.text(id, Stream::Err, format!("agent: {error:#}\n"));
            127
        });
        self.tell(&ToHost::Exec {
            id,
            reply: Reply::Exit(code),
        });
    }

    fn exec_inner(self: &Arc<Self>, id: u64, cmd: &str) -> Result<i32> {
        let mut child = Command::new("bash")
            .args(["-c", cmd])
            .current_dir("/cpubond")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("bash: cannot start")?;
        if let Some(group) = Pid::from_raw(child.id().cast_signed()) {
            lock(&self.running).insert(id, group);
        }
        let (done, drained) = mpsc::channel();
        if let Some(out) = child.stdout.take() {
            self.pump(id, Stream::Out, out, done.clone());
        }
        if let Some(err) = child.stderr.take() {
            self.pump(id, Stream::Err, err, done);
        }
        let status = child.wait()?;
        lock(&self.running).remove(&id);
        while drained.recv_timeout(DRAIN).is_ok() {}
        Ok(exit_code(status))
    }

    /// Hand on output as it comes, whole lines where there are any. `done` is
    /// dropped at the end of the stream.
    fn pump(
        self: &Arc<Self>,
        id: u64,
        stream: Stream,
        from: impl Read + Send + 'static,
        done: mpsc::Sender<()>,
    ) {
        let agent = Arc::clone(self);
        thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while matches!(from.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                agent.text(id, stream, String::from_utf8_lossy(&line).into_owned());
                line.clear();
                // Each line puts the end of the wait off.
                let _ = done.send(());
            }
        });
    }

    fn text(&self, id: u64, stream: Stream, text: String) {
        self.tell(&ToHost::Exec {
            id,
            reply: Reply::Text { stream, text },
        });
    }

    fn take_calls(&self, listener: &UnixListener) {
        let next = AtomicU64::new(1);
        for connection in listener.incoming() {
            let Ok(connection) = connection else { continue };
            let Ok(reader) = connection.try_clone() else {
                continue;
            };
            if let Ok(Some(args)) = wire::receive(&mut BufReader::new(reader)) {
                let id = next.fetch_add(1, Ordering::Relaxed);
                lock(&self.callers).insert(id, connection);
                self.tell(&ToHost::Call { id, args });
            }
        }
    }

    fn answer(&self, id: u64, reply: &Reply) {
        let mut callers = lock(&self.callers);
        let gone = match callers.get_mut(&id) {
            Some(caller) => wire::send(caller, reply).is_err(),
            None => false,
        };
        if gone || matches!(reply, Reply::Exit(_)) {
            callers.remove(&id);
        }
    }
}

/// `cpubond vm call ARG…`: ask the host, show what it answers.
pub fn call(args: &[impl AsRef<str>]) -> Result<ExitCode> {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let mut agent = UnixStream::connect(SOCKET)
        .with_context(|| format!("{SOCKET}: no agent here; `vm call` works in a guest only"))?;
    wire::send(&mut agent, &args)?;
    let mut agent = BufReader::new(agent);
    while let Some(reply) = wire::receive(&mut agent)? {
        match reply {
            Reply::Text { stream, text } => match stream {
                Stream::Out => io::stdout().write_all(text.as_bytes())?,
                Stream::Err => io::stderr().write_all(text.as_bytes())?,
            },
            Reply::Exit(code) => return Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
        }
    }
    bail!("the host hung up during the call");
}

/// A shell's view of how a process ended.
fn exit_code(status: std::process::ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// No udev in the guest, so no link by name in /dev/virtio-ports.
fn find_port() -> Result<PathBuf> {
    let class = Path::new("/sys/class/virtio-ports");
    for entry in fs::read_dir(class).context("this machine has no virtio-serial port")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("{}: no port is named {PORT}", class.display());
}
