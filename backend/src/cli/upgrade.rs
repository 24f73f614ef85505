//! `barkeep upgrade`, and what a running program asks the one that is to take its place.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use barkeep_backend::supervisor::upgrade::{Handover, Program, VARIABLE};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::log::say;
use crate::{Command, usage_error};

/// What the workers may take to end and the new program to start.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often the process is looked at meanwhile.
const INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// The signal's bit in `/proc/PID/status`.
const ASKED: u64 = 1 << (libc::SIGUSR2 - 1);

/// The program at the path by which it was started replaces the running one. Its workers finish what they
/// do and end, new ones go on with the same clients.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Process ID of the 'barkeep run'
    #[arg(long, value_name = "PID")]
    pid: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckArguments {
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Exits with success when the new program runs.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let id = arguments.pid;
    let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) else {
        return usage_error(&format!("--pid {id}: not a process ID"));
    };
    match upgrade(pid) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&format!("barkeep: process {id}: {message}"));
            ExitCode::FAILURE
        }
    }
}

fn upgrade(pid: Pid) -> Result<(), String> {
    let told = |failure: io::Error| failure.to_string();
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| errno.to_string())?;
    let program = Program::of_process(pid).map_err(told)?;
    // Any other program would be ended by the signal.
    if !is_run(program.arguments()) || !expects_the_signal(pid).map_err(told)? {
        return Err("not a 'barkeep run'".into());
    }
    // It does so itself, but can't say it here.
    program.check(None).map_err(|refusal| refusal.to_string())?;
    let before = announcement(pid).map_err(told)?;
    pidfd_send_signal(&process, Signal::USR2).map_err(|errno| errno.to_string())?;
    let deadline = Instant::now() + PATIENCE;
    while announcement(pid).map_err(told)? == before {
        if Instant::now() > deadline {
            return Err("no upgrade; its log says why".into());
        }
        if poll(&mut [PollFd::new(&process.as_fd(), PollFlags::IN)], Some(&INTERVAL)) == Ok(1) {
            return Err("has ended".into());
        }
    }
    Ok(())
}

fn is_run(arguments: &[OsString]) -> bool {
    let command = OsStr::new("run");
    arguments.iter().any(|argument| argument == command)
}

fn expects_the_signal(pid: Pid) -> io::Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Ok(caught.is_some_and(|mask| mask & ASKED != 0))
}

/// What the program of a process was told when it was executed: another one each time.
fn announcement(pid: Pid) -> io::Result<Option<Vec<u8>>> {
    let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()))?;
    let mut lines = environment.split(|byte| *byte == 0);
    let ours = lines.find(|line| {
        line.strip_prefix(VARIABLE.as_bytes()).is_some_and(|rest| rest.starts_with(b"="))
    });
    Ok(ours.map(<[u8]>::to_vec))
}

/// Says whether this program understands the arguments of another one, and the handover on standard
/// input if there is one.
pub(crate) fn check(arguments: &CheckArguments) -> ExitCode {
    match understands(&arguments.arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => usage_error(&message),
    }
}

fn understands(arguments: &[OsString]) -> Result<(), String> {
    let words = [OsString::from("barkeep")].into_iter().chain(arguments.iter().cloned());
    let parsed = crate::Arguments::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        text.lines().next().unwrap_or_default().to_owned()
    })?;
    let Command::Run(run) = parsed.command else {
        return Err("only 'barkeep run' can be upgraded".into());
    };
    run.check()?;
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(|failure| failure.to_string())?;
    let metadata = std::fs::File::from(input);
    match metadata.metadata() {
        Ok(file) if file.is_file() && file.len() > 0 => {
            Handover::from_file(&metadata.into()).map(|_| ()).map_err(|error| error.to_string())
        }
        _ => Ok(()),
    }
}
