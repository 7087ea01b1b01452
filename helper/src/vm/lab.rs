//! Two machines and the cables between them.

use super::guest::{Calls, Guest};
use super::image::{Host, Role};
use super::machine::{Accel, Cable, Machine};
use super::topology::Topology;
use super::wire::Stream;
use crate::bench::profile::Exchange;
use anyhow::{Context, Result, anyhow, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Emulated, on a busy host, with another build going on.
const BOOT: Duration = Duration::from_secs(180);
/// For `reset.sh` and `peer.sh`.
const SETUP: Duration = Duration::from_secs(90);

/// A running lab.
pub struct Lab {
    machines: Arc<Machines>,
    consoles: Vec<super::console::Console>,
    server: Arc<Guest>,
    peer: Arc<Guest>,
    topology: Topology,
    profile: Option<Arc<Exchange>>,
    dir: TempDir,
    _wiring: Option<Wiring>,
}

/// What calls from the guests act on.
struct Machines {
    server: Machine,
    peer: Machine,
}

/// The machines, the server's agent, the peer's.
type Parts = (Weak<Machines>, Arc<Guest>, Arc<Guest>);

impl Lab {
    /// Boot both machines and wait for their agents.
    pub fn boot(host: &Host, topology: &Topology, accel: Accel, shell: bool) -> Result<Self> {
        Self::boot_once(host, topology, accel, shell).or_else(|error| {
            // The stock kernel now and then dies early under emulation on a busy host. That is
            // no verdict on anything of ours, which is loaded later; twice in a row might be.
            eprintln!("cpubond: {error:#}; booting once more, the consoles are kept as *.first");
            for role in [Role::Server, Role::Peer] {
                let console = host.log_dir()?.join(format!("{}.console", role.name()));
                let _ = std::fs::rename(&console, console.with_extension("console.first"));
            }
            Self::boot_once(host, topology, accel, shell)
        })
    }

    fn boot_once(host: &Host, topology: &Topology, accel: Accel, shell: bool) -> Result<Self> {
        // The profiler sees what is emulated.
        let accel = if topology.profiler { Accel::Tcg } else { accel };
        // A short path: names of unix sockets end at 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("cpubond-")
            .tempdir_in("/tmp")
            .context("/tmp: cannot make a directory for sockets")?;
        let (cable, wiring) = if topology.queues > 1 {
            let wiring = Wiring::make(host, topology)?;
            (Cable::Taps(wiring.enter()), Some(wiring))
        } else {
            (Cable::Sockets(dir.path().to_owned()), None)
        };

        // The guests can call before both are up; what they act on is filled in then.
        // Weak: the lab alone keeps the machines running.
        let parts: Arc<OnceLock<Parts>> = Arc::default();
        let for_calls = Arc::clone(&parts);
        let profile = topology.profiler.then(|| {
            Arc::new(Exchange::new(
                super::machine::profile_dir(dir.path()),
                topology.cpus,
            ))
        });
        let for_profile = profile.clone();
        let calls: Arc<Calls> = Arc::new(move |args, show| {
            let (machines, server, peer) = for_calls
                .get()
                .ok_or_else(|| anyhow!("the other machine is not up yet"))?;
            let machines = machines
                .upgrade()
                .ok_or_else(|| anyhow!("the lab is ending"))?;
            serve_call(args, &machines, server, peer, for_profile.as_deref(), show)
        });

        let start = |role| Machine::start(host, role, topology, accel, &cable, dir.path(), shell);
        let (mut server_machine, server_wire) = start(Role::Server)?;
        let (mut peer_machine, peer_wire) = start(Role::Peer)?;
        let (server_up, server_hello) = mpsc::channel();
        let (peer_up, peer_hello) = mpsc::channel();
        let server = Guest::attach("server", server_wire, server_up, Arc::clone(&calls))?;
        let peer = Guest::attach("peer", peer_wire, peer_up, calls)?;

        let end = Instant::now() + BOOT;
        for (machine, hello) in [
            (&mut server_machine, server_hello),
            (&mut peer_machine, peer_hello),
        ] {
            loop {
                match hello.recv_timeout(Duration::from_millis(200)) {
                    Ok(_) => break,
                    Err(RecvTimeoutError::Timeout) => {}
                    // QEMU hung up: give it the moment it needs to end.
                    Err(RecvTimeoutError::Disconnected) => {
                        thread::sleep(Duration::from_millis(200));
                    }
                }
                machine.check_alive()?;
                if Instant::now() > end {
                    bail!(
                        "the {} VM did not come up in {} s; see {}",
                        machine.role.name(),
                        BOOT.as_secs(),
                        machine.console.path.display()
                    );
                }
            }
        }

        // Read by now. A run that is killed cannot clean up, so it leaves little behind.
        for role in [Role::Server, Role::Peer] {
            let _ = std::fs::remove_file(dir.path().join(format!("{}.cpio", role.name())));
        }
        let consoles = [&server_machine, &peer_machine]
            .map(|machine| super::console::Console::new(machine.console.path.clone()))
            .into();
        let machines = Arc::new(Machines {
            server: server_machine,
            peer: peer_machine,
        });
        // Set once, here.
        let _ = parts.set((
            Arc::downgrade(&machines),
            Arc::clone(&server),
            Arc::clone(&peer),
        ));
        Ok(Self {
            machines,
            consoles,
            server,
            peer,
            topology: topology.clone(),
            profile,
            dir,
            _wiring: wiring,
        })
    }

    /// The server's agent.
    pub fn server(&self) -> &Guest {
        &self.server
    }

    /// The peer's agent.
    pub fn peer(&self) -> &Guest {
        &self.peer
    }

    /// What was booted.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What the profiler is told and tells, where the server runs under it.
    pub fn profile(&self) -> Option<&Exchange> {
        self.profile.as_deref()
    }

    /// The socket of a machine's shell.
    pub fn shell_socket(&self, role: Role) -> PathBuf {
        self.dir.path().join(format!("{}.shell", role.name()))
    }

    /// Put both machines back to what they were after boot, then make the peer's bond: a
    /// mode, and what may follow it in the arguments of `peer.sh`.
    pub fn reset(&self, peer_mode: &str) -> Result<()> {
        for nic in 0..self.topology.nics {
            self.machines.set_link(nic, true)?;
        }
        let reset = |guest: &Guest| guest.output("/cpubond/guest/reset.sh", SETUP);
        thread::scope(|scope| {
            let peer = scope.spawn(|| reset(&self.peer));
            reset(&self.server)?;
            peer.join()
                .map_err(|_| anyhow!("resetting the peer panicked"))?
        })?;
        self.make_peer(peer_mode)
    }

    /// Make the peer's bond. All that machines just booted need.
    pub fn make_peer(&self, mode: &str) -> Result<()> {
        self.peer
            .output(&format!("/cpubond/guest/peer.sh {mode}"), SETUP)?;
        Ok(())
    }

    /// What the kernels complained of since the last call, with the machine's name.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (console, name) in self.consoles.iter_mut().zip(["server", "peer"]) {
            all.extend(
                console
                    .complaints()?
                    .into_iter()
                    .map(|line| format!("{name}: {line}")),
            );
        }
        Ok(all)
    }
}

impl Machines {
    /// A pulled cable is out at both ends. Not at the same time, though: the server's is
    /// the last to come back, so that it sends nothing into a cable that ends nowhere.
    fn set_link(&self, nic: u32, up: bool) -> Result<()> {
        let mut ends = [&self.server, &self.peer];
        if up {
            ends.reverse();
        }
        ends.into_iter().try_for_each(|end| end.set_link(nic, up))
    }
}

/// `cpubond vm call …` of a guest.
fn serve_call(
    args: &[String],
    machines: &Machines,
    server: &Guest,
    peer: &Guest,
    profile: Option<&Exchange>,
    show: &mut dyn FnMut(Stream, &str),
) -> Result<i32> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["run", vm, cmd] => {
            let guest = match vm {
                "server" => server,
                "peer" => peer,
                _ => bail!("run {vm}: there are only server and peer"),
            };
            // The caller's own timeout ends this one too, by ending the lab.
            guest.exec(cmd, Duration::from_secs(3600), show)
        }
        ["link", nic, state] => {
            let number = nic
                .strip_prefix("eth")
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| anyhow!("link {nic}: want ethK"))?;
            let up = match state {
                "on" => true,
                "off" => false,
                _ => bail!("link {nic} {state}: want on or off"),
            };
            machines.set_link(number, up)?;
            Ok(0)
        }
        ["profile", what, arg] => {
            let profile = profile.ok_or_else(|| {
                anyhow!("the server does not run under the profiler ('# vm: profiler=1')")
            })?;
            match what {
                "arm" => profile.arm(server, &serde_json::from_str(arg)?)?,
                "symbols" => profile.put_symbols(arg)?,
                "status" => profile.status(arg)?,
                "show" => {
                    let mut json = serde_json::to_string(&profile.read(arg)?)?;
                    json.push('\n');
                    show(Stream::Out, &json);
                }
                _ => bail!(
                    "profile {what}: want arm REGION, symbols TEXT, status WHAT, or show LABEL"
                ),
            }
            Ok(0)
        }
        _ => bail!(
            "want: run server|peer CMD, link ethK on|off, or profile arm|symbols|status|show ARG"
        ),
    }
}

/// A network namespace of our own, in which each cable is a bridge between two taps.
struct Wiring {
    /// Holds the namespace open.
    holder: Child,
    private_user: bool,
}

impl Wiring {
    fn make(host: &Host, topology: &Topology) -> Result<Self> {
        // Only root may make a network namespace by itself; others need a user
        // namespace around it.
        let private_user = !rustix::process::geteuid().is_root();
        let holder = Command::new("unshare")
            .args(private_user.then_some("--map-root-user"))
            .args([
                "--net",
                "setpriv",
                "--pdeathsig",
                "KILL",
                "sleep",
                "infinity",
            ])
            .stdin(Stdio::null())
            .spawn()
            .context("unshare: cannot run (util-linux is needed)")?;
        let wiring = Self {
            holder,
            private_user,
        };
        // Until unshare has become sleep, the namespace may not be there yet.
        let name = PathBuf::from(format!("/proc/{}/comm", wiring.holder.id()));
        let end = Instant::now() + Duration::from_secs(5);
        while !is_sleep(&name) {
            if Instant::now() > end {
                bail!("a network namespace cannot be made here; multiqueue NICs need one");
            }
            thread::sleep(Duration::from_millis(10));
        }
        let ip = |words: &str| wiring.ip(host, words);
        for nic in 0..topology.nics {
            ip(&format!("link add cable{nic} type bridge"))?;
            ip(&format!("link set cable{nic} up"))?;
            for (role, queues) in [(Role::Server, topology.queues), (Role::Peer, 1)] {
                let tap = format!("{}-{nic}", role.name());
                let multi = if queues > 1 { " multi_queue" } else { "" };
                let header = if topology.offload { " vnet_hdr" } else { "" };
                ip(&format!("tuntap add dev {tap} mode tap{multi}{header}"))?;
                ip(&format!("link set {tap} master cable{nic} up"))?;
                // A bridge keeps LACP to itself unless a port is told to pass it on.
                ip(&format!(
                    "link set {tap} type bridge_slave group_fwd_mask 4"
                ))?;
            }
        }
        Ok(wiring)
    }

    fn enter(&self) -> Vec<String> {
        let mut words = vec!["nsenter".to_owned()];
        if self.private_user {
            words.extend(["--user", "--preserve-credentials"].map(String::from));
        }
        words.extend([
            "--net".to_owned(),
            "--target".to_owned(),
            self.holder.id().to_string(),
        ]);
        words
    }

    fn ip(&self, host: &Host, words: &str) -> Result<()> {
        let mut command = self.enter();
        command.extend(host.root_program("usr/sbin/ip"));
        let output = Command::new(&command[0])
            .args(&command[1..])
            .args(words.split(' '))
            .output()
            .context("nsenter: cannot run (util-linux is needed)")?;
        if !output.status.success() {
            bail!(
                "multiqueue NICs need tap devices and a bridge on this host: 'ip {words}': {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

fn is_sleep(comm: &Path) -> bool {
    std::fs::read_to_string(comm).is_ok_and(|name| name.trim() == "sleep")
}

impl Drop for Wiring {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
