//! `cpubond`: one CPU and one NIC for every flow, receive to transmit.

mod cli;
mod vm;

fn main() -> std::process::ExitCode {
    cli::run()
}
