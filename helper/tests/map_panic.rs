//! The map runs on every packet: the compiler must find no path to a panic in it, even where the
//! kernel is built with overflow checks.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles `source` as the kernel would, and says whether the object calls the panic machinery.
fn can_panic(name: &str, edition: &str, source: &str) -> bool {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let file = dir.join(format!("{name}-{edition}.rs"));
    let object = file.with_extension("o");

    std::fs::write(&file, source).expect("write the source");

    let output = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", edition, "--crate-type=rlib", "--emit=obj"])
        .args(["-Copt-level=2", "-Coverflow-checks=on", "-Cpanic=abort"])
        .arg("-o")
        .args([&object, &file])
        .output()
        .expect("start rustc");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    // Every entry to the panic machinery is a function in core::panicking, and the object names
    // what it calls.
    std::fs::read(&object)
        .expect("read the object")
        .windows(b"panicking".len())
        .any(|bytes| bytes == b"panicking")
}

#[test]
#[cfg_attr(miri, ignore = "Miri starts no other program")]
fn the_map_has_no_panic_path() {
    let map = Path::new(env!("CARGO_MANIFEST_DIR")).join("../module/map.rs");
    // The compiler leaves generic and small functions to their callers: those here are kept.
    let source = format!(
        r#"#![no_std]
        #[path = {map:?}]
        pub mod map;
        #[unsafe(no_mangle)]
        pub fn build(
            input: &map::Input<'_>,
            scratch: &mut map::Scratch<'_>,
            out: &mut dyn FnMut(u32, map::Entry, map::Reason),
        ) {{
            map::build(input, scratch, |cpu, entry, reason| out(cpu, entry, reason));
        }}
        #[unsafe(no_mangle)]
        pub fn select(entry: map::Entry, hash: u32) -> (map::Choice, Option<u32>) {{
            (entry.choice(), entry.spread(hash))
        }}"#
    );

    // The kernel compiles it with the first, cargo with the second.
    for edition in ["2021", "2024"] {
        assert!(!can_panic("map", edition, &source), "edition {edition}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri starts no other program")]
fn a_panic_path_would_be_found() {
    assert!(can_panic(
        "control",
        "2021",
        "#![no_std] #[unsafe(no_mangle)] pub fn first(bytes: &[u8]) -> u8 { bytes[0] }"
    ));
}
