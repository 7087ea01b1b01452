//! The daemons of one service, looked after, and the steering kept in step with those that live.
//!
//! One thread, one loop: what has ended is noticed, what is due is started, who listens is seen,
//! the kernel's table follows, requests are answered. Only the daemons' output has threads.

use super::instance::Slot;
use super::keeper::pid;
use super::signals::Signals;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::listeners;
use crate::steer::control::{Asker, Control, Request};
use crate::steer::{self, Daemon, Instance, State, Steer};
use crate::topology;
use rustix::process::{Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Between looks at who listens: while a daemon starts, and otherwise. That one has ended is
/// noticed at once.
const SOON: Duration = Duration::from_millis(100);
const OFTEN: Duration = Duration::from_secs(1);
/// What keepers get beyond the daemons' own time to stop.
const SLACK: Duration = Duration::from_secs(2);

pub struct Supervisor<'a> {
    pub host: &'a Host,
    pub state: State,
    pub slots: Vec<Slot>,
    pub steer: Box<dyn Steer>,
    pub control: Control,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Failures in a row after which a daemon is given up; 0: never.
    pub give_up: u32,
    /// Dead instances whose flows are to be let go of once the table is without them.
    pub dead: Vec<Instance>,
    /// The kernel's table may not be the state's.
    pub stale: bool,
}

impl Supervisor<'_> {
    /// Until told to stop, or until every daemon has been given up. The exit code is that of the
    /// daemon that did not stop as it should, lowest CPU first, or that failed last; 0 if all is
    /// well.
    pub fn run(&mut self) -> Result<u8> {
        // Before the first child: none may end unnoticed.
        let signals = Signals::catch(&[SIGCHLD, SIGTERM, SIGINT, SIGHUP])
            .map_err(|error| Error::new("signal handler", error))?;
        // What a keeper leaves that is killed itself becomes ours.
        set_child_subreaper(Some(getpid()))
            .map_err(|error| Error::new("prctl", io::Error::from(error)))?;
        let (result, asker) = match self.serve(&signals) {
            Ok((code, asker)) => (Ok(code), asker),
            Err(error) => (Err(error), None),
        };
        let stopped = self.stop(&signals);
        let cleaned = steer::clean(self.host, &self.state);
        if let Some(asker) = asker {
            asker.answer(cleaned.as_ref().map(drop).map_err(ToString::to_string));
        }
        let failed = result?;
        let stopped = stopped?;
        cleaned?;
        Ok(failed.unwrap_or(stopped))
    }

    /// Until it is to stop: `Some` exit code if all have been given up, who asked for it if
    /// somebody did.
    fn serve(&mut self, signals: &Signals) -> Result<(Option<u8>, Option<Asker>)> {
        // There must be a table before there is a daemon, or its first users would be refused.
        self.state.save(self.host)?;
        self.steer.route(&self.state.service, &self.state.table)?;
        loop {
            let failed = self.reap()?;
            if self.slots.iter().all(Slot::is_given_up) {
                return Ok((failed.or(Some(1)), None));
            }
            self.start_due()?;
            self.look()?;
            self.watch();
            self.follow();
            while let Some((request, asker)) = self.control.next() {
                match request {
                    Request::Stop => return Ok((None, Some(asker))),
                    Request::Drain(cpu) => asker.answer(self.drain(cpu, true)),
                    Request::Undrain(cpu) => asker.answer(self.drain(cpu, false)),
                }
            }
            if signals.came(SIGTERM) | signals.came(SIGINT) {
                return Ok((None, None));
            }
            if signals.came(SIGHUP) {
                self.signal_all(Signal::HUP);
            }
            signals
                .wait(Some(self.pause()), Some(self.control.listener().as_fd()))
                .map_err(|error| Error::new("poll", error))?;
        }
    }

    fn say(&self, text: impl std::fmt::Display) {
        eprintln!("cpubond: {}: {text}", self.state.service.name);
    }

    /// Notice what has ended: daemons, and what a keeper that was killed has left. The exit code
    /// of the last daemon that was given up.
    fn reap(&mut self) -> Result<Option<u8>> {
        let mut failed = None;
        let mut lines = Vec::new();
        for slot in &mut self.slots {
            let listened = slot.listens.clone();
            let ended = slot
                .ended(self.give_up)
                .map_err(|error| Error::new(format_args!("cpu {}", slot.cpu), error))?;
            let Some(code) = ended else { continue };
            self.dead.extend(listened);
            let cpu = slot.cpu;
            lines.push(match slot.wait() {
                Some(wait) => format!(
                    "cpu {cpu}: ended with exit code {code}, is started again in {} s",
                    wait.as_secs()
                ),
                None => {
                    failed = Some(code);
                    format!(
                        "cpu {cpu}: ended with exit code {code}, {} times in a row, and is given up",
                        self.give_up
                    )
                }
            });
        }
        if !lines.is_empty() {
            // The kernel's table first: it leads to a port where nobody listens.
            self.follow();
        }
        for line in lines {
            self.say(line);
        }
        self.reap_strays(false);
        Ok(failed)
    }

    /// Children that are no keepers once were a keeper's: kill and bury them. `wait` until none
    /// is left.
    fn reap_strays(&self, wait: bool) {
        let keepers: Vec<u32> = self.slots.iter().filter_map(Slot::keeper).collect();
        loop {
            // Children only: what descends from a keeper is the keeper's, and may be new.
            let strays: Vec<u32> = listeners::children(self.host, std::process::id())
                .into_iter()
                .filter(|child| !keepers.contains(child))
                .collect();
            for stray in &strays {
                for process in listeners::descendants(self.host, *stray) {
                    kill(process);
                }
                kill(*stray);
                // If it has not ended yet, the next round buries it.
                let _ = pid(*stray).map(|stray| waitpid(Some(stray), WaitOptions::NOHANG));
            }
            if strays.is_empty() || !wait {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn start_due(&mut self) -> Result<()> {
        let now = Instant::now();
        for slot in &mut self.slots {
            if slot.due().is_some_and(|due| due <= now) {
                slot.start(self.grace)?;
            }
        }
        Ok(())
    }

    /// See who listens.
    fn look(&mut self) -> Result<()> {
        let listening = listeners::of_machine(self.state.service.protocol)?;
        let mut lines = Vec::new();
        for slot in &mut self.slots {
            let before = slot.listens.is_some();
            let sockets = listening.get(&slot.port).cloned().unwrap_or_default();
            let slow = slot.look(self.host, &sockets, |held| {
                listening
                    .iter()
                    .filter(|(_, sockets)| !sockets.is_disjoint(held))
                    .map(|(port, _)| *port)
                    .collect()
            });
            lines.extend(slow);
            match (before, &slot.listens) {
                (false, Some(instance)) => lines.push(format!(
                    "cpu {}: process {} listens on port {}",
                    slot.cpu, instance.pid, slot.port
                )),
                (true, None) => lines.push(format!(
                    "cpu {}: no longer listens on port {}",
                    slot.cpu, slot.port
                )),
                _ => {}
            }
        }
        for line in lines {
            self.say(line);
        }
        Ok(())
    }

    /// See whether somebody else has changed the kernel's table.
    fn watch(&mut self) {
        if self.stale {
            return;
        }
        match self
            .steer
            .is_disturbed(&self.state.service, &self.state.table)
        {
            Ok(false) => {}
            Ok(true) => {
                self.say("somebody has changed the steering; it is set up again");
                self.stale = true;
            }
            Err(error) => self.say(error),
        }
    }

    /// Make the state and the kernel's table what the daemons now are. An error is told and tried
    /// again with the next look.
    fn follow(&mut self) {
        let live: Vec<Instance> = self.slots.iter().filter_map(Slot::live).cloned().collect();
        let result = topology::possible(self.host).and_then(|cpus| {
            let table = steer::table(&cpus, &live);
            let daemons: Vec<Daemon> = self
                .slots
                .iter()
                .map(|slot| slot.daemon(self.host))
                .collect();
            if self.state.table != table {
                self.state.table = table;
                self.stale = true;
            }
            if self.stale {
                // The table is on record before the kernel has it; that a daemon takes flows is
                // not: who waits for "live" may connect at once.
                self.state.daemons = steer::before_routing(&self.state.daemons, &daemons);
                self.state.save(self.host)?;
                self.steer.route(&self.state.service, &self.state.table)?;
                self.stale = false;
            }
            if self.state.daemons != daemons {
                self.state.daemons = daemons;
                self.state.save(self.host)?;
            }
            while let Some(dead) = self.dead.last() {
                self.steer.forget(&self.state.service, dead)?;
                self.dead.pop();
            }
            Ok(())
        });
        if let Err(error) = result {
            self.say(format_args!("{error}; tried again"));
        }
    }

    fn drain(&mut self, cpu: u32, drained: bool) -> std::result::Result<(), String> {
        let others = self
            .slots
            .iter()
            .any(|slot| slot.cpu != cpu && slot.live().is_some());
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.cpu == cpu) else {
            return Err(format!("has no daemon on CPU {cpu}"));
        };
        if drained && !others {
            return Err(format!(
                "no daemon but that of CPU {cpu} is live; new flows would be refused"
            ));
        }
        slot.drained = drained;
        self.follow();
        match self.stale {
            true => Err("could not be steered yet; it is tried again".to_string()),
            false => Ok(()),
        }
    }

    fn pause(&self) -> Duration {
        let starting = self.slots.iter().any(Slot::is_starting);
        let look = if starting { SOON } else { OFTEN };
        let now = Instant::now();
        self.slots
            .iter()
            .filter_map(Slot::due)
            .map(|due| due.saturating_duration_since(now))
            .fold(look, Duration::min)
    }

    fn signal_all(&self, signal: Signal) {
        for slot in &self.slots {
            slot.signal(signal);
        }
    }

    /// Stop every daemon; the steering stays meanwhile, for what they still have to send goes
    /// through it. The exit code of the first that did not stop as it should.
    fn stop(&mut self, signals: &Signals) -> Result<u8> {
        const TERMINATED: u8 = 128 + 15;
        let before: BTreeMap<u32, bool> = self
            .slots
            .iter()
            .map(|slot| (slot.cpu, slot.is_running()))
            .collect();
        self.signal_all(Signal::TERM);
        let mut deadline = Instant::now() + self.grace + SLACK;
        let mut ended = Ok(());
        while self.slots.iter().any(Slot::is_running) {
            if signals.came(SIGTERM) | signals.came(SIGINT) {
                // Asked twice.
                deadline = Instant::now();
            }
            let now = Instant::now();
            if deadline <= now {
                // What they leave are strays.
                self.signal_all(Signal::KILL);
                deadline = now + OFTEN;
            }
            for slot in &mut self.slots {
                if let Err(error) = slot.ended(0) {
                    ended = Err(Error::new(format_args!("cpu {}", slot.cpu), error));
                }
            }
            if ended.is_err() || self.slots.iter().all(|slot| !slot.is_running()) {
                break;
            }
            signals
                .wait(Some(deadline.saturating_duration_since(now)), None)
                .map_err(|error| Error::new("poll", error))?;
        }
        self.reap_strays(true);
        for slot in &mut self.slots {
            slot.join_logs();
        }
        ended?;
        Ok(self
            .slots
            .iter()
            .filter(|slot| before[&slot.cpu])
            .filter_map(|slot| slot.code)
            .find(|code| ![0, TERMINATED].contains(code))
            .unwrap_or(0))
    }
}

fn kill(process: u32) {
    if let Some(process) = pid(process) {
        // One that has just ended needs no signal.
        let _ = kill_process(process, Signal::KILL);
    }
}
