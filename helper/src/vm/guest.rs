//! The host's view of one guest's agent: run commands, answer its calls.

use super::wire::{self, Reply, Stream, ToGuest, ToHost};
use anyhow::{Result, bail};
use std::collections::HashMap;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// One running agent.
pub struct Guest {
    name: &'static str,
    wire: Mutex<UnixStream>,
    next: AtomicU64,
    /// Who waits for which command. Emptied when the guest is gone, which ends
    /// every wait.
    waiting: Mutex<HashMap<u64, mpsc::Sender<Reply>>>,
}

/// Serves `cpubond vm call` of any guest: arguments in, output by the callback, exit
/// code back.
pub type Calls = dyn Fn(&[String], &mut dyn FnMut(Stream, &str)) -> Result<i32> + Send + Sync;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// Talk to the agent behind `wire`. `up` hears of the agent's first message.
    pub fn attach(
        name: &'static str,
        wire: UnixStream,
        up: mpsc::Sender<String>,
        calls: Arc<Calls>,
    ) -> Result<Arc<Self>> {
        let mut reader = BufReader::new(wire.try_clone()?);
        let guest = Arc::new(Self {
            name,
            wire: Mutex::new(wire),
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
        });
        let this = Arc::clone(&guest);
        thread::spawn(move || {
            while let Ok(Some(message)) = wire::receive(&mut reader) {
                match message {
                    ToHost::Hello { kernel } => {
                        let _ = up.send(kernel);
                    }
                    ToHost::Exec { id, reply } => {
                        let ended = matches!(reply, Reply::Exit(_));
                        let mut waiting = lock(&this.waiting);
                        if let Some(waiter) = waiting.get(&id) {
                            // Whoever gave up waiting needs no answer.
                            let _ = waiter.send(reply);
                        }
                        if ended {
                            waiting.remove(&id);
                        }
                    }
                    ToHost::Call { id, args } => {
                        let (this, calls) = (Arc::clone(&this), Arc::clone(&calls));
                        thread::spawn(move || this.serve(id, &args, &*calls));
                    }
                }
            }
            lock(&this.waiting).clear();
        });
        Ok(guest)
    }

    /// Run a bash command line; its output goes to `show` as it comes.
    pub fn exec(
        &self,
        cmd: &str,
        timeout: Duration,
        show: &mut dyn FnMut(Stream, &str),
    ) -> Result<i32> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, replies) = mpsc::channel();
        lock(&self.waiting).insert(id, sender);
        let cmd = cmd.to_owned();
        wire::send(&mut *lock(&self.wire), &ToGuest::Exec { id, cmd })?;
        let end = Instant::now() + timeout;
        loop {
            match replies.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Reply::Text { stream, text }) => show(stream, &text),
                Ok(Reply::Exit(code)) => return Ok(code),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the {} VM died", self.name)
                }
                Err(RecvTimeoutError::Timeout) => {
                    lock(&self.waiting).remove(&id);
                    let _ = wire::send(&mut *lock(&self.wire), &ToGuest::Kill { id });
                    bail!(
                        "no end after {} s in the {} VM",
                        timeout.as_secs(),
                        self.name
                    )
                }
            }
        }
    }

    /// Run a command line that must succeed; its standard output.
    pub fn output(&self, cmd: &str, timeout: Duration) -> Result<String> {
        let (mut out, mut err) = (String::new(), String::new());
        let code = self.exec(cmd, timeout, &mut |stream, text| match stream {
            Stream::Out => out.push_str(text),
            Stream::Err => err.push_str(text),
        })?;
        if code != 0 {
            bail!(
                "{}: '{}' gave exit code {code}: {}",
                self.name,
                cmd.lines().next().unwrap_or_default(),
                err.trim_end()
            );
        }
        Ok(out)
    }

    fn serve(&self, id: u64, args: &[String], calls: &Calls) {
        let answer = |reply| {
            // A guest that died in its own call has nobody to tell.
            let _ = wire::send(&mut *lock(&self.wire), &ToGuest::Answer { id, reply });
        };
        let mut text = |stream, text: &str| {
            answer(Reply::Text {
                stream,
                text: text.to_owned(),
            });
        };
        let code = calls(args, &mut text).unwrap_or_else(|error| {
            text(Stream::Err, &format!("vm call: {error:#}\n"));
            255
        });
        answer(Reply::Exit(code));
    }
}
