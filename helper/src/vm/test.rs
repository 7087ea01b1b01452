//! `cpubond vm test`: run guest tests, show their KTAP, give one verdict.

use super::image::Host;
use super::ktap::{Outcome, Reader};
use super::lab::Lab;
use super::machine::{self, Accel};
use super::topology::Wanted;
use super::wire::Stream;
use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Run guest tests in the lab.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cpubond vm test                          all of tests/*.sh
  cpubond vm test tests/lab_smoke.sh       one
  cpubond vm test --filter irq             those with 'irq' in the name

The result is 'N passed, N failed, N skipped' and exit code 0 or 1. A crash or a
kernel warning in either VM, a missing or short plan and a timeout are failures.
Consoles are kept in target/results/vm/.")]
pub struct Args {
    /// Tests to run (default: all of tests/*.sh)
    files: Vec<PathBuf>,
    /// Only tests with this in the name
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run the server on the stock bonding driver
    #[arg(long)]
    stock: bool,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR", conflicts_with = "stock")]
    modules: Option<PathBuf>,
    /// Show the result as JSON in place of KTAP
    #[arg(short, long)]
    json: bool,
}

struct Test {
    name: String,
    wanted: Wanted,
}

/// Versioned: a reader checks `schema` first.
#[derive(Serialize)]
struct Report {
    schema: u32,
    kernel: String,
    passed: usize,
    failed: usize,
    skipped: usize,
    tests: Vec<TestReport>,
}

#[derive(Serialize)]
struct TestReport {
    test: String,
    seconds: f64,
    passed: usize,
    failed: usize,
    skipped: usize,
    /// The failed cases, and what was wrong with the test as a whole.
    failures: Vec<String>,
}

/// Run what was asked for.
pub fn run(args: &Args) -> Result<ExitCode> {
    let host = Host::prepare(args.modules.clone(), args.stock)?;
    let tests = find(&host.checkout, args)?;
    let accel = machine::probe(&host);
    let say = |text: &str| {
        if !args.json {
            println!("{text}");
        }
    };
    say(&format!("KTAP version 1\n1..{}", tests.len()));

    let mut lab: Option<Lab> = None;
    let mut report = Report {
        schema: 1,
        kernel: host.kernel.clone(),
        passed: 0,
        failed: 0,
        skipped: 0,
        tests: Vec::new(),
    };
    for (number, test) in (1..).zip(&tests) {
        say(&format!("# {}", test.name));
        let result = one(&host, accel, &mut lab, test, &say);
        let verdict = match (result.failed, result.passed) {
            (0, 0) => format!("ok {number} - {} # SKIP", test.name),
            (0, _) => format!("ok {number} - {}", test.name),
            _ => format!("not ok {number} - {}", test.name),
        };
        say(&format!("{verdict}\n#   {:.1} s", result.seconds));
        report.passed += result.passed;
        report.failed += result.failed;
        report.skipped += result.skipped;
        report.tests.push(result);
    }
    for test in &report.tests {
        for failure in &test.failures {
            say(&format!("# failed: {}: {failure}", test.test));
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{} passed, {} failed, {} skipped",
            report.passed, report.failed, report.skipped
        );
    }
    Ok(ExitCode::from(u8::from(report.failed > 0)))
}

/// Read the tests' headers; order them so that machines are booted seldom.
fn find(checkout: &Path, args: &Args) -> Result<Vec<Test>> {
    let dir = checkout.join("tests");
    let mut names = Vec::new();
    if args.files.is_empty() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".sh") && name != "lib.sh" {
                names.push(name);
            }
        }
    } else {
        for file in &args.files {
            // What runs is the copy in the image, so it must be one of those.
            let name = file
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .filter(|name| dir.join(name).is_file())
                .ok_or_else(|| anyhow!("{}: not in {}", file.display(), dir.display()))?;
            names.push(name);
        }
    }
    if let Some(filter) = &args.filter {
        names.retain(|name| name.contains(filter.as_str()));
    }
    let mut tests = names
        .into_iter()
        .map(|name| {
            let path = dir.join(&name);
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let wanted = Wanted::parse(&text).with_context(|| path.display().to_string())?;
            Ok(Test { name, wanted })
        })
        .collect::<Result<Vec<_>>>()?;
    if tests.is_empty() {
        bail!("{}: no test matches", dir.display());
    }
    tests.sort_by(|a, b| (&a.wanted.topology, &a.name).cmp(&(&b.wanted.topology, &b.name)));
    Ok(tests)
}

/// Run one test. Whatever goes wrong is a failure of this test, and costs the lab.
fn one(
    host: &Host,
    accel: Accel,
    lab: &mut Option<Lab>,
    test: &Test,
    say: &dyn Fn(&str),
) -> TestReport {
    let start = Instant::now();
    let mut reader = Reader::default();
    let outcome = in_lab(host, accel, lab, test, &mut reader, say);
    let (results, mut wrong) = match &outcome {
        Ok(ran) => {
            let (results, mut wrong) = reader.finish(ran.exit);
            wrong.extend(ran.complaints.iter().cloned());
            (results, wrong)
        }
        // Its plan and exit code mean nothing any more.
        Err(error) => (reader.finish(0).0, vec![format!("{error:#}")]),
    };
    if outcome.map_or(true, |ran| !ran.complaints.is_empty()) {
        *lab = None;
    }
    for problem in &wrong {
        say(&format!("# {}: {problem}", test.name));
    }
    let count = |which| {
        results
            .iter()
            .filter(|(outcome, _)| *outcome == which)
            .count()
    };
    let (passed, skipped) = (count(Outcome::Passed), count(Outcome::Skipped));
    // What is wrong with the test as a whole counts once.
    let failed = count(Outcome::Failed) + usize::from(!wrong.is_empty());
    let mut failures: Vec<String> = results
        .into_iter()
        .filter(|(outcome, _)| *outcome == Outcome::Failed)
        .map(|(_, name)| name)
        .collect();
    failures.append(&mut wrong);
    TestReport {
        test: test.name.clone(),
        seconds: start.elapsed().as_secs_f64(),
        passed,
        failed,
        skipped,
        failures,
    }
}

struct Ran {
    exit: i32,
    complaints: Vec<String>,
}

fn in_lab(
    host: &Host,
    accel: Accel,
    slot: &mut Option<Lab>,
    test: &Test,
    reader: &mut Reader,
    say: &dyn Fn(&str),
) -> Result<Ran> {
    let topology = &test.wanted.topology;
    // A lab that cannot be put back is replaced, once.
    let usable = slot
        .take_if(|lab| lab.topology() == topology)
        .filter(|lab| match lab.reset(&test.wanted.peer) {
            Ok(()) => true,
            Err(error) => {
                say(&format!("#   boot again: {error:#}"));
                false
            }
        });
    // The old machines must be gone before new ones take their logs.
    *slot = None;
    let lab = match usable {
        Some(lab) => lab,
        None => {
            let start = Instant::now();
            let lab = Lab::boot(host, topology, accel, false)?;
            lab.make_peer(&test.wanted.peer)?;
            say(&format!(
                "#   booted server ({} CPUs, {} NICs of {} queues) and peer in {:.1} s ({accel:?})",
                topology.cpus,
                topology.nics,
                topology.queues,
                start.elapsed().as_secs_f64()
            ));
            lab
        }
    };
    let lab = slot.insert(lab);

    let cmd = format!("exec /cpubond/tests/{}", test.name);
    let mut show = |stream, text: &str| {
        let line = text.strip_suffix('\n').unwrap_or(text);
        if stream == Stream::Out {
            reader.line(line);
            say(&format!("    {line}"));
        } else {
            say(&format!("    # {line}"));
        }
    };
    let ran = lab.server().exec(&cmd, test.wanted.timeout, &mut show);
    let complaints = lab.complaints()?;
    match ran {
        Ok(exit) => Ok(Ran { exit, complaints }),
        // Why it died says more than that it died.
        Err(error) => Err(match complaints.first() {
            Some(complaint) => error.context(complaint.clone()),
            None => error,
        }),
    }
}
