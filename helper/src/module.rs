//! The kernel modules: which bonding driver is loaded, and loading what is missing.

use crate::bond;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use std::fs;
use std::path::Path;
use std::process::Command;

const POLICY: &str = "bond_cpu_bound";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    Absent,
    Stock,
    Patched,
}

/// The bonding driver the running kernel has.
pub fn driver(host: &Host) -> Driver {
    if !is_loaded(host, "bonding") {
        return Driver::Absent;
    }
    // Every bond of the patched driver has the file. Without a bond to look at, ask for the
    // function that would show it.
    let patched = match bond::all(host).first() {
        Some(bond) => bond::option(host, bond, "cpu_bound_map").is_some(),
        None => knows_map(host),
    };
    if patched {
        Driver::Patched
    } else {
        Driver::Stock
    }
}

/// Looks the function up in the driver's type information, or, where that was not built, among the
/// kernel's symbols, which are many more to go through.
fn knows_map(host: &Host) -> bool {
    const NAME: &str = "cpu_bound_map";
    match fs::read(host.sys.join("kernel/btf/bonding")) {
        Ok(types) => types
            .windows(NAME.len())
            .any(|bytes| bytes == NAME.as_bytes()),
        Err(_) => fs::read_to_string(host.proc.join("kallsyms")).is_ok_and(|symbols| {
            symbols
                .lines()
                .any(|line| line.contains(NAME) && !line.ends_with("[bond_cpu_bound]"))
        }),
    }
}

fn is_loaded(host: &Host, module: &str) -> bool {
    host.sys.join("module").join(module).exists()
}

/// Modules this run has loaded, first to last.
#[derive(Debug, Default)]
pub struct Loaded(Vec<&'static str>);

/// Fail early if the loaded driver will not do; changes nothing.
pub fn check(host: &Host, needs_policy: bool) -> Result<()> {
    match driver(host) {
        Driver::Stock if needs_policy => Err(Error::new(
            "bonding",
            "the loaded driver is the stock one, without transmit policies",
        )
        .fix("delete its bonds, \"rmmod bonding\", and try again with the patched bonding.ko installed or --module-dir")
        .exit(Exit::Unsupported)),
        _ => Ok(()),
    }
}

/// Load what is missing: from `dir` if given, else what `modprobe` finds. What is loaded already
/// has passed `check`.
pub fn load(host: &Host, dir: Option<&Path>, needs_policy: bool) -> Result<Loaded> {
    let mut loaded = Loaded::default();
    match loaded.load(host, dir, needs_policy) {
        Ok(()) => Ok(loaded),
        Err(error) => {
            loaded.unload();
            Err(error)
        }
    }
}

impl Loaded {
    fn load(&mut self, host: &Host, dir: Option<&Path>, needs_policy: bool) -> Result<()> {
        if !is_loaded(host, "bonding") {
            // Without max_bonds=0 the driver greets us with a bond0 nobody asked for.
            match dir {
                None => run("modprobe", &["bonding", "max_bonds=0"])?,
                Some(dir) => {
                    // What bonding.ko needs; built in, or not needed, if modprobe has none.
                    let _ = run("modprobe", &["tls"]);
                    insmod(&dir.join("bonding.ko"), &["max_bonds=0"])?;
                }
            }
            self.0.push("bonding");
            if needs_policy && driver(host) == Driver::Stock {
                return Err(Error::new(
                    "bonding",
                    "the driver that would be loaded is the stock one, without transmit policies",
                )
                .fix("install the patched bonding.ko, or name its directory with --module-dir")
                .exit(Exit::Unsupported));
            }
        }
        if needs_policy && !is_loaded(host, POLICY) {
            match dir {
                None => run("modprobe", &[POLICY])?,
                Some(dir) => insmod(&dir.join(format!("{POLICY}.ko")), &[])?,
            }
            self.0.push(POLICY);
        }
        Ok(())
    }

    /// Only for the run that loaded them: removing the driver deletes every bond there is, and
    /// later there may be bonds of others, in network namespaces we don't see.
    pub fn unload(self) {
        for module in self.0.iter().rev() {
            let _ = run("rmmod", &[module]);
        }
    }
}

fn insmod(module: &Path, options: &[&str]) -> Result<()> {
    let path = module
        .to_str()
        .filter(|_| module.is_file())
        .ok_or_else(|| {
            Error::new(module.display(), "no such module")
                .fix("\"make modules\" builds it; --module-dir names the directory it is in")
                .exit(Exit::Unsupported)
        })?;
    let mut arguments = vec![path];
    arguments.extend(options);
    run("insmod", &arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let place = format!("{program} {}", arguments.join(" "));
    // Root's PATH need not have them where cpubond is run by a service or by sudo.
    let output = ["/usr/sbin", "/sbin", ""]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find_map(|path| Command::new(path).args(arguments).output().ok())
        .ok_or_else(|| {
            Error::new(&place, "cannot be run")
                .fix("install kmod")
                .exit(Exit::Unsupported)
        })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let reason = message.lines().last().unwrap_or("failed").trim();
    Err(Error::new(&place, reason)
        .fix("build and install the modules, or name their directory with --module-dir; dmesg may say more")
        .exit(Exit::Unsupported))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn tells_stock_from_patched() {
        let fake = Fake::new();
        let host = fake.host();
        assert_eq!(driver(&host), Driver::Absent);

        fake.file("sys/module/bonding/refcnt", "0\n");
        fake.file(
            "proc/kallsyms",
            "0 t bonding_show_mode\t[bonding]\n0 t x_cpu_bound_map\t[bond_cpu_bound]\n",
        );
        assert_eq!(driver(&host), Driver::Stock);
        assert_eq!(check(&host, true).unwrap_err().exit, Exit::Unsupported);
        assert!(check(&host, false).is_ok());

        fake.file(
            "proc/kallsyms",
            "0 t bonding_show_cpu_bound_map\t[bonding]\n",
        );
        assert_eq!(driver(&host), Driver::Patched);

        fake.file("sys/kernel/btf/bonding", "bonding_show_mode\0");
        assert_eq!(driver(&host), Driver::Stock);
        fake.file(
            "sys/kernel/btf/bonding",
            "bonding_show_mode\0cpu_bound_map_read\0",
        );
        fake.file("proc/kallsyms", "");
        assert_eq!(driver(&host), Driver::Patched);

        // With a bond to look at, its files decide.
        fake.file("sys/class/net/bonding_masters", "bond9\n");
        assert_eq!(driver(&host), Driver::Stock);
        fake.file("sys/class/net/bond9/bonding/cpu_bound_map", "");
        assert_eq!(driver(&host), Driver::Patched);
    }

    #[test]
    fn a_missing_module_is_named() {
        let fake = Fake::new();
        fake.file("sys/module/bonding/refcnt", "0\n");
        fake.file(
            "proc/kallsyms",
            "0 t bonding_show_cpu_bound_map\t[bonding]\n",
        );
        let error = load(&fake.host(), Some(Path::new("/nonexistent")), true).unwrap_err();
        assert_eq!(error.exit, Exit::Unsupported);
        assert!(error.to_string().contains("/nonexistent/bond_cpu_bound.ko"));
    }
}
