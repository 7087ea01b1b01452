//! The binary itself: exit codes and one-line errors. Nothing here gets as far as a write.

use assert_cmd::Command;

/// Run, and give back the exit code and what was said on stderr.
fn cpubond(arguments: &str) -> (Option<i32>, String) {
    let output = Command::cargo_bin("cpubond")
        .expect("the binary is built with its tests")
        .args(arguments.split_whitespace())
        .output()
        .expect("the binary runs");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn usage_errors_exit_with_2() {
    for arguments in [
        "",
        "frobnicate",
        "up",
        "up bond0",
        "up bond0 eth0 --mode lacp",
        "up bond0 eth0 --address 192.0.2.1",
        "up bond0 eth0 --address 127.0.0.1/8",
        "up bond0 eth0 --address 192.0.2.1/33",
        "up bond0 eth0 --cpus 3-1",
        "up bond0 eth0 --cpus 0x3",
        "up bond0 eth0 eth0",
        "up bond0 bond0",
        "up bond0 eth0 --lacp-rate fast",
        "up bond0 eth0 --xmit-hash-policy layer2",
        "down",
        "down ../bond0",
        "apply --rollback-after 0s",
        "apply --rollback-after 60s --check",
        "apply extra",
        "undo bond0",
        "plan bond0 --mode lacp",
        "plan bond0 --cpus 0x3",
        "plan bond/0",
    ] {
        let (code, errors) = cpubond(arguments);
        assert_eq!(code, Some(2), "cpubond {arguments}: {errors}");
    }
}

#[test]
fn our_own_errors_are_one_line_with_the_fix() {
    let (_, errors) = cpubond("up bond0 eth0 eth0");
    assert_eq!(
        errors,
        "cpubond: cpubond up: 'eth0' is there twice; allowed: each one once\n"
    );
    let (code, errors) = cpubond("show no-such-bond");
    assert_eq!(code, Some(1));
    assert_eq!(
        errors,
        "cpubond: no-such-bond: no such bond; \"cpubond show\" lists them\n"
    );
}

#[test]
fn help_has_examples() {
    for subcommand in [
        "plan", "apply", "confirm", "rollback", "verify", "undo", "up", "show", "down",
    ] {
        let output = Command::cargo_bin("cpubond")
            .expect("the binary is built with its tests")
            .args([subcommand, "--help"])
            .output()
            .expect("the binary runs");
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            help.matches(&format!("cpubond {subcommand}")).count() > 1 && help.contains("Example"),
            "{help}"
        );
    }
}

#[test]
fn every_visible_subcommand_has_a_manual_page() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (code, errors) = cpubond(&format!("man {}", dir.path().display()));
    assert_eq!(code, Some(0), "{errors}");
    let help = Command::cargo_bin("cpubond")
        .expect("the binary is built with its tests")
        .arg("--help")
        .output()
        .expect("the binary runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let subcommands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // Continued descriptions are indented further.
        .filter_map(|line| {
            line.strip_prefix("  ")?
                .split_whitespace()
                .next()
                .filter(|_| !line.starts_with("   "))
        })
        .filter(|name| *name != "help")
        .collect();
    assert!(subcommands.contains(&"up"), "{help}");
    for name in subcommands {
        let page = dir.path().join(format!("cpubond-{name}.8"));
        let text = std::fs::read_to_string(&page).expect("has a page");
        assert!(
            text.contains(".SH DESCRIPTION"),
            "{}: {text}",
            page.display()
        );
    }
}

#[test]
fn a_config_error_has_file_line_key_and_what_is_allowed() {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut file, b"[[bond]]\nname = \"bond0\"\nmode = \"lacp\"\n")
        .expect("it can be written");
    let path = file.path().display();
    for arguments in ["apply --check", "apply", "verify"] {
        let (code, errors) = cpubond(&format!("{arguments} --config {path}"));
        assert_eq!(code, Some(2), "{errors}");
        assert!(
            errors.starts_with(&format!(
                "cpubond: {path}:3: bond.mode: unknown variant `lacp`"
            )) && errors.contains("`802.3ad`")
                && errors.lines().count() == 1,
            "{errors}"
        );
    }
    let (code, errors) = cpubond("apply --config /nonexistent/c.toml");
    assert_eq!(code, Some(1));
    assert!(errors.contains("cpubond plan"), "{errors}");
}
