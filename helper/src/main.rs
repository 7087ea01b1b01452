//! `cpubond`: one CPU and one NIC for every flow, receive to transmit.

mod audit;
mod bind;
mod bond;
mod change;
mod check;
mod cli;
#[expect(dead_code, reason = "apply, plan and run are to use it")]
mod config;
mod converge;
mod cpulist;
mod down;
mod error;
mod host;
mod irq;
mod journal;
mod link;
mod listeners;
mod man;
mod module;
mod netlink;
mod options;
mod rivals;
mod run;
mod settle;
mod shares;
mod show;
mod signals;
mod steer;
#[cfg(test)]
mod testing;
mod topology;
mod up;
mod vm;

fn main() -> std::process::ExitCode {
    cli::run()
}
