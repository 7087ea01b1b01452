//! One QEMU: its command line, its process, its monitor.

use super::agent::PORT;
use super::console::Console;
use super::image::{Host, Role};
use super::topology::Topology;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The peer only has to keep up with what the server sends.
const PEER_CPUS: u32 = 2;

/// What emulates the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The host's CPU, where the host lets us.
    Kvm,
    /// Translation, anywhere.
    Tcg,
}

/// How the NICs of the two machines are cabled.
pub enum Cable {
    /// A pair of unix datagram sockets a cable, in this directory. No privilege,
    /// one queue.
    Sockets(PathBuf),
    /// Tap devices `ROLE-K` in a network namespace that commands enter with these
    /// words in front.
    Taps(Vec<String>),
}

/// A running machine. Dropping it kills it.
pub struct Machine {
    pub role: Role,
    pub console: Console,
    process: Child,
    log: PathBuf,
    monitor: Mutex<Monitor>,
}

struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// Try KVM by booting: a device node that opens may still not run a guest.
pub fn probe(host: &Host) -> Accel {
    match std::env::var("CPUBOND_ACCEL").as_deref() {
        Ok("kvm") => return Accel::Kvm,
        Ok("tcg") => return Accel::Tcg,
        _ => {}
    }
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Accel::Tcg;
    }
    let mut command = qemu(host, Accel::Kvm, &[]);
    command
        .args(["-m", "256", "-no-reboot", "-append", "panic=-1"])
        .arg("-kernel")
        .arg(host.vmlinuz())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else {
        return Accel::Tcg;
    };
    // With no initramfs the kernel panics at once, and QEMU ends well: that is the
    // whole way through a boot.
    let end = Instant::now() + Duration::from_secs(15);
    while Instant::now() < end {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Accel::Kvm,
            Ok(None) => thread::sleep(Duration::from_millis(50)),
            _ => return Accel::Tcg,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    Accel::Tcg
}

/// `before` goes in front of the command, to enter a network namespace.
fn qemu(host: &Host, accel: Accel, before: &[String]) -> Command {
    let mut words = before.to_vec();
    // Whatever ends this process, the machines go with it.
    words.extend(["setpriv", "--pdeathsig", "KILL"].map(String::from));
    words.extend(host.root_program("usr/bin/qemu-system-x86_64"));
    for dir in host.firmware() {
        words.extend(["-L".to_owned(), dir]);
    }
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command.args(["-M", "q35", "-nodefaults", "-nographic"]);
    match accel {
        Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        // la57: a rare early splat on sanitizer kernels.
        Accel::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]),
    };
    command
}

/// Where a lab with sockets in `dir` exchanges files with the profiler.
pub fn profile_dir(dir: &Path) -> PathBuf {
    dir.join("profile")
}

/// The MAC of a NIC: fixed, so that tests can name it.
fn mac(role: Role, nic: u32) -> String {
    let machine = match role {
        Role::Server => 1,
        Role::Peer => 2,
    };
    format!("52:54:00:00:{machine:02x}:{nic:02x}")
}

impl Machine {
    /// Start it; whether it boots, its agent will tell. Sockets and the initramfs
    /// are put into `dir`, logs into the host's log directory.
    pub fn start(
        host: &Host,
        role: Role,
        topology: &Topology,
        accel: Accel,
        cable: &Cable,
        dir: &Path,
        shell: bool,
    ) -> Result<(Self, UnixStream)> {
        let name = role.name();
        let initramfs = dir.join(format!("{name}.cpio"));
        host.write_initramfs(role, &initramfs)?;
        let console = host.log_dir()?.join(format!("{name}.console"));
        let log = host.log_dir()?.join(format!("{name}.qemu"));
        let _ = fs::remove_file(&console);
        let socket = |what: &str| dir.join(format!("{name}.{what}"));

        let (cpus, sockets, queues, memory) = match role {
            Role::Server => (topology.cpus, topology.sockets, topology.queues, 1024),
            Role::Peer => (PEER_CPUS, 1, 1, 768),
        };
        let before: &[String] = match cable {
            Cable::Sockets(_) => &[],
            Cable::Taps(enter) => enter,
        };
        let mut command = qemu(host, accel, before);
        let profiled = topology.profiler && role == Role::Server;
        if profiled {
            let exchange = profile_dir(dir);
            fs::create_dir_all(&exchange).with_context(|| exchange.display().to_string())?;
            let plugin = host.profiler()?;
            command.arg("-plugin").arg(format!(
                "file={},dir={}",
                plugin.display(),
                exchange.display()
            ));
        }
        command
            .args(["-m", &memory.to_string(), "-no-reboot"])
            .arg("-smp")
            .arg(format!(
                "cpus={cpus},sockets={sockets},cores={},threads=1",
                cpus / sockets
            ))
            .arg("-kernel")
            .arg(host.vmlinuz())
            .arg("-initrd")
            .arg(&initramfs)
            .arg("-append")
            // Warnings and worse on the console, where the harness looks for them. No check
            // whether the timer interrupts in time: on a busy host it may not, and the
            // kernel would panic ("IO-APIC + timer doesn't work!").
            .arg(format!(
                "console=ttyS0 loglevel=5 panic=-1 no_timer_check cpubond.vm={name} cpubond.nics={}{}{}",
                topology.nics,
                if shell { " cpubond.shell" } else { "" },
                // The same kernel has the same addresses in each boot.
                if profiled { " nokaslr" } else { "" }
            ))
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-qmp")
            .arg(format!(
                "unix:{},server=on,wait=off",
                socket("qmp").display()
            ))
            .args(["-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=agent,path={},server=on,wait=off",
                socket("agent").display()
            ))
            .arg("-device")
            .arg(format!("virtserialport,chardev=agent,name={PORT}"));
        if shell {
            command
                .arg("-chardev")
                .arg(format!(
                    "socket,id=shell,path={},server=on,wait=off",
                    socket("shell").display()
                ))
                .args(["-device", "virtconsole,chardev=shell"]);
        }
        if sockets > 1 {
            let each = cpus / sockets;
            for node in 0..sockets {
                let first = node * each;
                command
                    .arg("-object")
                    .arg(format!(
                        "memory-backend-ram,id=ram{node},size={}M",
                        memory / sockets
                    ))
                    .arg("-numa")
                    .arg(format!(
                        "node,nodeid={node},memdev=ram{node},cpus={first}-{}",
                        first + each - 1
                    ));
            }
        }
        for nic in 0..topology.nics {
            let netdev = match cable {
                Cable::Sockets(dir) => {
                    let end = |role: Role| dir.join(format!("{}-{nic}", role.name()));
                    let far = match role {
                        Role::Server => Role::Peer,
                        Role::Peer => Role::Server,
                    };
                    format!(
                        "dgram,id=net{nic},local.type=unix,local.path={},remote.type=unix,remote.path={}",
                        end(role).display(),
                        end(far).display()
                    )
                }
                Cable::Taps(_) => format!(
                    "tap,id=net{nic},ifname={name}-{nic},script=no,downscript=no,queues={queues},vnet_hdr={}",
                    if topology.offload { "on" } else { "off" }
                ),
            };
            // LACP keeps ports of unknown speed out of the aggregate.
            let mut device = format!(
                "virtio-net-pci,id=eth{nic},netdev=net{nic},mac={},speed=1000,duplex=full,romfile=",
                mac(role, nic)
            );
            if topology.nics > 20 {
                // More than the bus has slots for: eight to a slot, from 8 on.
                let (slot, function) = (8 + nic / 8, nic % 8);
                device.push_str(&format!(",addr={slot:#x}.{function}"));
                if function == 0 {
                    device.push_str(",multifunction=on");
                }
            }
            if queues > 1 {
                // A vector for each queue's two rings, one for control, one for config.
                device.push_str(&format!(",mq=on,vectors={}", 2 * queues + 2));
            }
            command.args(["-netdev", &netdev, "-device", &device]);
        }

        let to_log = File::create(&log).with_context(|| log.display().to_string())?;
        let mut process = command
            .stdin(Stdio::null())
            .stdout(to_log.try_clone()?)
            .stderr(to_log)
            .spawn()
            .context("cannot start QEMU (setpriv of util-linux is needed too)")?;
        let connected = connect(&socket("agent"), &mut process).and_then(|agent| {
            Ok((
                agent,
                Monitor::open(connect(&socket("qmp"), &mut process)?)?,
            ))
        });
        let (agent, monitor) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                let said = fs::read_to_string(&log).unwrap_or_default();
                let said = said.lines().last().unwrap_or("QEMU said nothing");
                return Err(error.context(format!("the {name} VM did not start: {said}")));
            }
        };
        let machine = Self {
            role,
            console: Console::new(console),
            process,
            log,
            monitor: Mutex::new(monitor),
        };
        Ok((machine, agent))
    }

    /// Fails when QEMU has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.process.try_wait()? {
            bail!(
                "the {} VM ended ({status}); see {} and {}",
                self.role.name(),
                self.log.display(),
                self.console.path.display()
            );
        }
        Ok(())
    }

    /// Pull the cable of a NIC, or put it back.
    pub fn set_link(&self, nic: u32, up: bool) -> Result<()> {
        self.monitor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .execute("set_link", &json!({"name": format!("eth{nic}"), "up": up}))
            .map(drop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Already ended: nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// QEMU makes its sockets a moment after it starts.
fn connect(path: &Path, process: &mut Child) -> Result<UnixStream> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                if let Some(status) = process.try_wait()? {
                    bail!("QEMU ended: {status}");
                }
                if Instant::now() > end {
                    return Err(error).with_context(|| path.display().to_string());
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Monitor {
    fn open(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut monitor = Self {
            reader: BufReader::new(stream.try_clone()?),
            writer: stream,
        };
        // The greeting comes unasked; the answer to this skips over it.
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.writer.write_all(line.as_bytes())?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                bail!("QEMU closed its monitor");
            }
            let mut reply: Value = serde_json::from_str(&line)?;
            if let Some(error) = reply.get("error") {
                return Err(anyhow!("QEMU refused {command}: {error}"));
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            // Anything else is an event or the greeting.
        }
    }
}
