//! `cpubond`: one CPU and one NIC for every flow, receive to transmit.

mod apply;
mod audit;
mod bench;
mod bind;
mod bond;
mod change;
mod check;
mod cli;
mod config;
mod confirm;
mod converge;
mod cpulist;
mod down;
mod error;
mod ethtool;
mod host;
mod irq;
mod journal;
mod link;
mod listeners;
mod man;
mod module;
mod netlink;
mod options;
mod plan;
mod predict;
mod rivals;
mod rollback;
mod run;
mod settle;
mod shares;
mod show;
mod signals;
mod steer;
#[cfg(test)]
mod testing;
mod topology;
mod undo;
mod up;
mod verify;
mod vm;

fn main() -> std::process::ExitCode {
    cli::run()
}
