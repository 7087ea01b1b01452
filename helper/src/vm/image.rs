//! What a guest boots: the cached base archive plus an overlay with what changes
//! from build to build. The kernel unpacks one after the other.

use anyhow::{Context, Result, anyhow, bail};
use cpio::newc;
use std::env;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Where things are on this machine.
pub struct Host {
    /// The checkout: tests, scripts, target.
    pub checkout: PathBuf,
    /// Holds `vmlinuz` and `base.cpio`.
    image: PathBuf,
    /// The build root: QEMU, iproute2.
    root: PathBuf,
    /// Release of the guests' kernel.
    pub kernel: String,
    /// Our modules for the server; none: it runs stock bonding.
    modules: Option<PathBuf>,
}

/// Which end of the cables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Has our modules and runs the tests.
    Server,
    /// The stock kernel: switch and load generator.
    Peer,
}

impl Role {
    /// Host name, file name, and what `vm call run` takes.
    pub fn name(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Peer => "peer",
        }
    }
}

impl Host {
    /// Find the checkout above the current directory and make sure the guest image
    /// is there.
    pub fn prepare(modules: Option<PathBuf>, stock: bool) -> Result<Self> {
        let here = env::current_dir().context("the current directory is gone")?;
        let checkout = here
            .ancestors()
            .find(|dir| dir.join("scripts/guest-image.sh").is_file())
            .ok_or_else(|| {
                anyhow!(
                    "{}: not inside a cpubond checkout (scripts/guest-image.sh not found); cd there",
                    here.display()
                )
            })?
            .to_owned();
        // It shows its own progress and error.
        let made = Command::new(checkout.join("scripts/guest-image.sh"))
            .stderr(Stdio::inherit())
            .output()
            .context("scripts/guest-image.sh: cannot run")?;
        if !made.status.success() {
            bail!("no guest image: scripts/guest-image.sh failed");
        }
        let image = PathBuf::from(String::from_utf8(made.stdout)?.trim());
        let fact = |name: &str| -> Result<String> {
            let path = image.join(name);
            Ok(fs::read_to_string(&path)
                .with_context(|| path.display().to_string())?
                .trim()
                .to_owned())
        };
        let modules = modules.unwrap_or_else(|| checkout.join("target/modules"));
        if !stock && !modules.join("bonding.ko").is_file() {
            bail!(
                "{}: no bonding.ko there; run 'make modules', or give --stock for the stock driver",
                modules.display()
            );
        }
        Ok(Self {
            root: fact("root")?.into(),
            kernel: fact("kernel")?,
            image,
            checkout,
            modules: (!stock).then_some(modules),
        })
    }

    /// The guests' kernel.
    pub fn vmlinuz(&self) -> PathBuf {
        self.image.join("vmlinuz")
    }

    /// The modules that the server runs with, none if it runs the stock driver.
    pub fn modules(&self) -> Result<Vec<PathBuf>> {
        let Some(dir) = &self.modules else {
            return Ok(Vec::new());
        };
        let mut modules = list(dir)?;
        modules.retain(|file| file.extension().is_some_and(|ext| ext == "ko"));
        Ok(modules)
    }

    /// Logs of the machines, made when missing.
    pub fn log_dir(&self) -> Result<PathBuf> {
        let dir = self.checkout.join("target/results/vm");
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }

    /// A command line that runs a program of the build root on this host, by the
    /// root's own loader and libraries: needs no chroot, so no privilege.
    pub fn root_program(&self, program: &str) -> Vec<String> {
        let at = |path: &str| self.root.join(path).display().to_string();
        vec![
            at("usr/lib64/ld-linux-x86-64.so.2"),
            "--library-path".to_owned(),
            at("usr/lib/x86_64-linux-gnu"),
            at(program),
        ]
    }

    /// The profiler, which QEMU loads.
    pub fn profiler(&self) -> Result<PathBuf> {
        let path = self.checkout.join("target/release/libprofiler.so");
        if !path.is_file() {
            bail!("{}: not there; run 'make profiler'", path.display());
        }
        Ok(path)
    }

    /// What the QEMU of the build root calls itself.
    pub fn qemu_version(&self) -> Result<String> {
        let words = self.root_program("usr/bin/qemu-system-x86_64");
        let output = Command::new(&words[0])
            .args(&words[1..])
            .arg("--version")
            .output()
            .context("QEMU: cannot run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or("QEMU").trim().to_owned())
    }

    /// Where QEMU finds its firmware.
    pub fn firmware(&self) -> [String; 2] {
        ["usr/share/seabios", "usr/share/qemu"]
            .map(|path| self.root.join(path).display().to_string())
    }

    /// Write the initramfs of one machine.
    pub fn write_initramfs(&self, role: Role, path: &Path) -> Result<()> {
        let what = || format!("{}: cannot write the initramfs", path.display());
        let mut out = BufWriter::new(File::create(path).with_context(what)?);
        let base = self.image.join("base.cpio");
        io::copy(
            &mut File::open(&base).with_context(|| base.display().to_string())?,
            &mut out,
        )
        .with_context(what)?;

        let mut overlay = Overlay { out };
        overlay.file("init", include_bytes!("guest/init.sh"))?;
        overlay.dir("cpubond")?;
        overlay.dir("cpubond/guest")?;
        overlay.file("cpubond/guest/reset.sh", include_bytes!("guest/reset.sh"))?;
        overlay.file("cpubond/guest/peer.sh", include_bytes!("guest/peer.sh"))?;
        overlay.file("cpubond/guest/demo.sh", include_bytes!("guest/demo.sh"))?;
        overlay.file("cpubond/guest/setup.sh", include_bytes!("guest/setup.sh"))?;
        overlay.file("cpubond/guest/pktgen.sh", include_bytes!("guest/pktgen.sh"))?;
        overlay.tree(&self.checkout.join("tests"), "cpubond/tests")?;
        overlay.tree(&self.checkout.join("dist"), "cpubond/dist")?;
        let this = env::current_exe().context("cannot find this program's own file")?;
        overlay.copy(&this, "usr/bin/cpubond")?;
        if let (Role::Server, Some(modules)) = (role, &self.modules) {
            let updates = format!("usr/lib/modules/{}/updates", self.kernel);
            overlay.dir(&updates)?;
            for module in list(modules)? {
                if let (Some(name), Some("ko")) = (
                    module.file_name().and_then(|name| name.to_str()),
                    module.extension().and_then(|ext| ext.to_str()),
                ) {
                    overlay.copy(&module, &format!("{updates}/{name}"))?;
                }
            }
        }
        overlay.finish().with_context(what)
    }
}

/// Entries of a directory, sorted, so that the same input makes the same archive.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    };
    let mut entries = read().with_context(|| dir.display().to_string())?;
    entries.sort();
    Ok(entries)
}

struct Overlay<W: Write> {
    out: W,
}

impl<W: Write> Overlay<W> {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| anyhow!("{name}: too big for an initramfs (4 GiB)"))?;
        let mut writer = newc::Builder::new(name)
            .mode(mode)
            .write(&mut self.out, size);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    }

    fn dir(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    fn file(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.entry(name, PROGRAM, data)
    }

    fn copy(&mut self, from: &Path, name: &str) -> Result<()> {
        let data = fs::read(from).with_context(|| from.display().to_string())?;
        self.file(name, &data)
    }

    fn tree(&mut self, from: &Path, name: &str) -> Result<()> {
        self.dir(name)?;
        for path in list(from)? {
            let Some(leaf) = path.file_name().and_then(|leaf| leaf.to_str()) else {
                continue;
            };
            let name = format!("{name}/{leaf}");
            if path.is_dir() {
                self.tree(&path, &name)?;
            } else {
                self.copy(&path, &name)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        newc::trailer(&mut self.out)?;
        self.out.flush()
    }
}
