//! Compiles the BPF programs in `bpf/`, which the kernel runs and aya loads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in fs::read_dir("bpf").into_iter().flatten() {
        let source = entry.expect("helper/bpf can be listed").path();
        if source.extension().is_some_and(|extension| extension == "c") {
            compile(
                &clang,
                &source,
                &out.join(source.with_extension("o").file_name().unwrap_or_default()),
            );
        }
    }
}

/// `-g` is for the type information (BTF) by which the kernel's structures are found.
fn compile(clang: &str, source: &Path, object: &Path) {
    let status = Command::new(clang)
        .args([
            "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-c",
        ])
        // Where Debian keeps <asm/types.h>.
        .arg("-I/usr/include/x86_64-linux-gnu")
        .arg(source)
        .arg("-o")
        .arg(object)
        .status()
        .unwrap_or_else(|error| {
            panic!("{clang} cannot be run: {error}; install clang, or name it in CLANG=")
        });
    assert!(status.success(), "{}: {clang} failed", source.display());
}
