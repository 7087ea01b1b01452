//! One daemon: started, listened for, started again when it ends.

use super::keeper::{code_of, pid};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::listeners;
use crate::steer::{Daemon, Instance, Phase};
use rustix::process::{Signal, kill_process};
use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long one waits before the first restart; doubled for each that follows.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// A daemon that has lived this long starts anew with the shortest wait.
const LIVED: Duration = Duration::from_secs(10);
/// After this it is said that a daemon does not listen.
const SLOW: Duration = Duration::from_secs(5);
/// Lines that are longer are cut in pieces of this many bytes.
const LONGEST_LINE: u64 = 64 << 10;

/// One of the daemons of a service.
pub struct Slot {
    pub cpu: u32,
    pub node: Option<u32>,
    pub port: u16,
    /// The command, placeholders filled in.
    pub words: Vec<String>,
    pub environment: Vec<(&'static str, String)>,
    /// By `cpubond steer drain`.
    pub drained: bool,
    /// Where it listens now.
    pub listens: Option<Instance>,
    /// All sockets that listened on its port when its own were last looked for.
    seen: BTreeSet<u64>,
    keeper: Option<Child>,
    logs: Vec<JoinHandle<()>>,
    started: Instant,
    told_slow: bool,
    restarts: u32,
    /// Ends in a row without having lived long.
    failures: u32,
    restart_at: Option<Instant>,
    given_up: bool,
    /// Of the last that ended.
    pub code: Option<u8>,
}

impl Slot {
    pub fn new(
        cpu: u32,
        node: Option<u32>,
        port: u16,
        words: Vec<String>,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        Self {
            cpu,
            node,
            port,
            words,
            environment,
            drained: false,
            listens: None,
            seen: BTreeSet::new(),
            keeper: None,
            logs: Vec::new(),
            started: Instant::now(),
            told_slow: false,
            restarts: 0,
            failures: 0,
            restart_at: Some(Instant::now()),
            given_up: false,
            code: None,
        }
    }

    pub fn is_running(&self) -> bool {
        self.keeper.is_some()
    }

    pub fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// The keeper's process.
    pub fn keeper(&self) -> Option<u32> {
        self.keeper.as_ref().map(Child::id)
    }

    pub fn daemon(&self, host: &Host) -> Daemon {
        let phase = match (&self.keeper, &self.listens) {
            _ if self.given_up => Phase::GivenUp,
            (None, _) => Phase::Down,
            (Some(_), None) => Phase::Starting,
            (Some(_), Some(_)) if self.drained => Phase::Draining,
            (Some(_), Some(_)) => Phase::Live,
        };
        Daemon {
            cpu: self.cpu,
            port: self.port,
            // The one that listens, or the one that is to become it.
            pid: match &self.listens {
                Some(instance) => Some(instance.pid),
                None => self
                    .keeper()
                    .and_then(|keeper| listeners::descendants(host, keeper).first().copied()),
            },
            phase,
            restarts: self.restarts,
        }
    }

    /// The instance that may take new flows.
    pub fn live(&self) -> Option<&Instance> {
        self.listens.as_ref().filter(|_| !self.drained)
    }

    /// When it is to be started again, if it is.
    pub fn due(&self) -> Option<Instant> {
        self.restart_at
    }

    /// Whether it is still awaited to listen.
    pub fn is_starting(&self) -> bool {
        self.keeper.is_some() && self.listens.is_none()
    }

    pub fn start(&mut self, grace: Duration) -> Result<()> {
        let mut keeper = Command::new("/proc/self/exe");
        keeper
            .arg("keep")
            .args(["--cpu", &self.cpu.to_string()])
            .args(["--parent", &std::process::id().to_string()])
            .args(["--grace", &grace.as_secs().to_string()]);
        if let Some(node) = self.node {
            keeper.args(["--node", &node.to_string()]);
        }
        keeper.arg("--").args(&self.words);
        // A group of its own: Ctrl-C is for us, who stop it in order.
        keeper.arg0("cpubond").process_group(0);
        let mut child = keeper
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                Error::new(
                    format_args!("cpu {}", self.cpu),
                    format_args!("cannot start a process: {error}"),
                )
            })?;
        // The last one's pipes are at their end: nothing of it is left.
        self.join_logs();
        let prefix = format!("[cpu {}] ", self.cpu);
        if let Some(out) = child.stdout.take() {
            let prefix = prefix.clone();
            self.logs
                .push(thread::spawn(move || forward(out, &prefix, io::stdout)));
        }
        if let Some(err) = child.stderr.take() {
            self.logs
                .push(thread::spawn(move || forward(err, &prefix, io::stderr)));
        }
        if self.restart_at.take().is_some() && self.code.is_some() {
            self.restarts += 1;
        }
        self.keeper = Some(child);
        self.started = Instant::now();
        self.told_slow = false;
        Ok(())
    }

    /// Its exit code if it has ended since it was last asked for; it is then due to be started
    /// again, or given up after `give_up` (0: never) failures in a row.
    pub fn ended(&mut self, give_up: u32) -> io::Result<Option<u8>> {
        let Some(keeper) = &mut self.keeper else {
            return Ok(None);
        };
        let Some(status) = keeper.try_wait()? else {
            return Ok(None);
        };
        let code = code_of(status);
        self.keeper = None;
        self.listens = None;
        self.code = Some(code);
        if self.started.elapsed() >= LIVED {
            self.failures = 0;
        }
        self.failures += 1;
        if give_up != 0 && self.failures >= give_up {
            self.given_up = true;
        } else {
            self.restart_at = Some(Instant::now() + backoff(self.failures));
        }
        Ok(Some(code))
    }

    /// For the log: how long until it is started again.
    pub fn wait(&self) -> Option<Duration> {
        self.restart_at.map(|_| backoff(self.failures))
    }

    /// See whether it listens, given all sockets that do so on its port. A line to tell if it has
    /// not for a long time.
    pub fn look(
        &mut self,
        host: &Host,
        listening: &BTreeSet<u64>,
        others: impl Fn(&BTreeSet<u64>) -> Vec<u16>,
    ) -> Option<String> {
        let keeper = self.keeper()?;
        // A daemon opens its sockets one after the other: as long as none comes or goes on its
        // port, no process is asked.
        let there = |instance: &Instance| host.proc.join(instance.pid.to_string()).exists();
        if self.seen == *listening && self.listens.as_ref().is_some_and(there) {
            return None;
        }
        self.seen.clone_from(listening);
        let processes = listeners::descendants(host, keeper);
        self.listens = processes.iter().find_map(|&pid| {
            let held = listeners::sockets(host, pid);
            let sockets: Vec<u64> = held.intersection(listening).copied().collect();
            (!sockets.is_empty()).then_some(Instance {
                cpu: self.cpu,
                port: self.port,
                pid,
                sockets,
            })
        });
        if self.listens.is_some() || self.told_slow || self.started.elapsed() < SLOW {
            return None;
        }
        self.told_slow = true;
        let held = processes
            .iter()
            .flat_map(|&pid| listeners::sockets(host, pid))
            .collect();
        let found = match others(&held)[..] {
            [] => "listens on no port".to_string(),
            ref ports => {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                format!("listens on {}", ports.join(", "))
            }
        };
        Some(format!(
            "cpu {}: does not listen on port {} yet, so nothing is sent to it; it {found}",
            self.cpu, self.port
        ))
    }

    /// To the keeper, which hands it on.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.keeper().and_then(pid) {
            // It has not been waited for, so it is there.
            let _ = kill_process(pid, signal);
        }
    }

    /// All that was written has been passed on. Call only when nothing of the daemon is left.
    pub fn join_logs(&mut self) {
        for log in self.logs.drain(..) {
            // One that panicked has said so.
            let _ = log.join();
        }
    }
}

fn backoff(failures: u32) -> Duration {
    let doubled = 2u32.saturating_pow(failures.saturating_sub(1));
    FIRST_BACKOFF.saturating_mul(doubled).min(LONGEST_BACKOFF)
}

/// Pass lines on with a prefix, each in one write. A line without an end gets one.
fn forward<W: Write>(from: impl Read, prefix: &str, to: impl Fn() -> W) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        line.extend(prefix.as_bytes());
        match from
            .by_ref()
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)
        {
            Ok(0) => return,
            Ok(_) => {
                if line.last() != Some(&b'\n') {
                    line.push(b'\n');
                }
                // Nobody may be reading any more; the daemon must be able to write nevertheless.
                let _ = to().write_all(&line);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn waits_longer_each_time() {
        let seconds: Vec<u64> = (1..9).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(backoff(u32::MAX), LONGEST_BACKOFF);
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn forwarded(text: &[u8]) -> Vec<u8> {
        let sink = Sink::default();
        {
            let to = sink.clone();
            forward(text, "[cpu 3] ", move || to.clone());
        }
        Arc::into_inner(sink.0).unwrap().into_inner().unwrap()
    }

    #[test]
    fn every_line_has_the_prefix_and_nothing_is_lost() {
        assert_eq!(forwarded(b""), b"");
        assert_eq!(forwarded(b"a\n\nb"), b"[cpu 3] a\n[cpu 3] \n[cpu 3] b\n");
        assert_eq!(forwarded(b"\xff\0\n"), b"[cpu 3] \xff\0\n");
        let long = vec![b'x'; 3 * LONGEST_LINE as usize + 1];
        let passed = forwarded(&long);
        assert_eq!(
            passed.iter().filter(|byte| **byte == b'x').count(),
            long.len()
        );
        assert_eq!(passed.split(|byte| *byte == b'\n').count(), 5);
    }
}
