//! `barkeep run`: workers come and go, clients stay.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::Peer;
use barkeep_tests::{binary, skip};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use crate::process::{Sidecar, arguments, assert_refused_by, socket};

/// What has not happened by then never does.
const DEADLINE: Duration = Duration::from_secs(10);
const DEADLINE_SECONDS: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A value for edu's liveness register, which reads back inverted: who has lost it reads zeros.
const ALIVE: u32 = 0x1234_5678;

fn supervise(functions: &[(&Path, &str)], options: &[&str]) -> Sidecar {
    Sidecar::supervise(functions, options, Stdio::piped())
}

/// A client whose device knows [`ALIVE`].
fn client(path: &Path) -> Peer {
    let mut client = Peer::greeted(path);
    edu::enable(&mut client);
    client.write_u32(0, at::LIVENESS, ALIVE);
    client
}

fn assert_alive(client: &mut Peer) {
    assert_eq!(client.read_u32(0, at::LIVENESS), !ALIVE);
}

/// `count` sockets in a directory.
fn sockets(count: usize) -> (TempDir, Vec<std::path::PathBuf>) {
    let (directory, path) = socket();
    let paths = (0..count).map(|index| path.with_extension(index.to_string())).collect();
    (directory, paths)
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let asked = Instant::now();
    while !done() {
        assert!(asked.elapsed() < DEADLINE, "never: {what}");
        std::thread::yield_now();
    }
}

/// Waits for the end of a process that may not be our child.
fn wait_for(process: Pid) {
    let pidfd = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(errno) => return assert_eq!(errno, Errno::SRCH),
    };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&DEADLINE_SECONDS));
    assert_eq!(ended, Ok(1), "{process:?} does not end");
}

/// The worker, if there is one function.
fn worker(sidecar: &Sidecar) -> Pid {
    let workers = sidecar.children();
    assert_eq!(workers.len(), 1);
    workers[0]
}

/// Kills a worker, and waits until there is another one.
fn replace(sidecar: &Sidecar, signal: Signal) {
    let worker = worker(sidecar);
    kill_process(worker, signal).expect("it is there");
    wait_until("another worker", || matches!(sidecar.children()[..], [next] if next != worker));
}

#[test]
fn a_client_keeps_its_device_when_the_worker_is_killed() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &[]);
    let mut client = client(&path);
    for signal in [Signal::KILL, Signal::ABORT, Signal::TERM] {
        replace(&sidecar, signal);
        assert_alive(&mut client);
    }
}

#[test]
fn a_worker_that_is_stopped_is_replaced() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &["--watchdog", "1"]);
    let mut client = client(&path);
    replace(&sidecar, Signal::STOP);
    assert_alive(&mut client);
}

#[test]
fn an_upgrade_signal_replaces_all_workers_under_their_clients() {
    let (_directory, paths) = sockets(2);
    let sidecar = supervise(&[(&paths[0], "edu"), (&paths[1], "edu")], &[]);
    let mut clients = [client(&paths[0]), client(&paths[1])];
    let before = sidecar.children();
    sidecar.signal(Signal::USR2);
    clients.iter_mut().for_each(assert_alive);
    let after = || sidecar.children();
    wait_until("new workers", || {
        after().len() == 2 && !after().iter().any(|id| before.contains(id))
    });
    clients.iter_mut().for_each(assert_alive);
}

#[test]
fn a_function_has_a_worker_of_its_own_or_its_groups() {
    let (_directory, paths) = sockets(5);
    let specs = ["edu,group=a", "edu", "edu,group=a", "edu,group=b", "edu,id=e"];
    let functions: Vec<_> = paths.iter().map(|path| &**path).zip(specs).collect();
    let sidecar = supervise(&functions, &[]);
    assert_eq!(sidecar.children().len(), 4);
    let mut clients: Vec<_> = paths.iter().map(|path| client(path)).collect();
    for worker in sidecar.children() {
        kill_process(worker, Signal::KILL).expect("it is there");
    }
    clients.iter_mut().for_each(assert_alive);
}

#[test]
fn one_client_after_the_other_is_served() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &[]);
    for _ in 0..3 {
        edu::assert_served(&path);
    }
    let mut first = client(&path);
    let mut waiting = Peer::connect(&path);
    assert!(waiting.hears_nothing());
    replace(&sidecar, Signal::KILL);
    assert_alive(&mut first);
    drop(first);
    waiting.greet();
    edu::enable(&mut waiting);
    assert_eq!(waiting.read_u32(0, at::LIVENESS), 0, "the device was reset");
}

#[test]
fn a_stop_signal_ends_all_workers_and_is_a_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let (_directory, paths) = sockets(2);
        let sidecar = supervise(&[(&paths[0], "edu"), (&paths[1], "virtio-rng")], &[]);
        let mut client = Peer::greeted(&paths[0]);
        let workers = sidecar.children();
        assert_eq!(workers.len(), 2);
        for signal in [signal, Signal::TERM, Signal::INT] {
            sidecar.signal(signal);
        }
        assert_eq!(sidecar.wait(), Some(0), "{signal:?}");
        client.expect_closed();
        assert!(!paths[0].exists() && !paths[1].exists(), "{signal:?}");
        for worker in workers {
            assert!(pidfd_open(worker, PidfdFlags::empty()).is_err(), "a process was left behind");
        }
    }
}

#[test]
fn a_stopped_worker_does_not_keep_the_supervisor_from_its_end() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &["--watchdog", "0"]);
    let worker = worker(&sidecar);
    kill_process(worker, Signal::STOP).expect("it is there");
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    assert!(!path.exists());
}

#[test]
fn a_terminals_signals_are_the_supervisors_alone() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &[]);
    let ours = rustix::process::getpgid(None).expect("a group");
    for worker in sidecar.children() {
        assert_ne!(rustix::process::getpgid(Some(worker)).expect("a group"), ours);
    }
}

#[test]
fn a_client_keeps_its_device_when_the_supervisor_is_killed() {
    let (_directory, path) = socket();
    let sidecar = supervise(&[(&path, "edu")], &[]);
    let mut client = client(&path);
    let worker = worker(&sidecar);
    // Killed and waited for.
    drop(sidecar);
    assert_alive(&mut client);
    // The next one takes the socket's place.
    let next = supervise(&[(&path, "edu")], &[]);
    edu::assert_served(&path);
    assert_alive(&mut client);
    drop(client);
    wait_for(worker);
    let workers = next.children();
    drop(next);
    workers.into_iter().for_each(wait_for);
}

#[test]
fn only_pci_functions_are_supervised() {
    let (_directory, path) = socket();
    let mut arguments = arguments(&[(&path, "virtio-rng")]);
    arguments.extend(["--transport".into(), "vhost-user".into()]);
    assert_refused_by("run", &arguments, &["--transport vhost-user: not with 'barkeep run'"]);
    assert!(!path.exists());
}

#[test]
fn names_and_groups_that_cant_be_are_told() {
    let (_directory, paths) = sockets(2);
    let named = |first, second| arguments(&[(&paths[0], first), (&paths[1], second)]);
    assert_refused_by("run", &named("edu,id=a", "edu,id=a"), &["two devices are called 'a'"]);
    assert_refused_by("run", &named("edu,group=", "edu"), &["--device edu,group=: ", "'group'"]);
    assert_refused_by("serve", &named("edu", "edu,group=a"), &["'group': only with 'barkeep run'"]);
}

#[test]
fn the_first_mistake_of_several_is_told_once() {
    let (_directory, paths) = sockets(3);
    let devices = ["edu", "nvme", "floppy"];
    let functions: Vec<_> = paths.iter().map(|path| &**path).zip(devices).collect();
    assert_refused_by("run", &arguments(&functions), &["--device nvme: unknown device"]);
}

/// A shell that starts `barkeep run` with a limit of open files.
fn limited(limit: u32, path: &Path, option: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("ulimit -{option}n {limit} && exec \"$0\" \"$@\""));
    shell.arg(binary::barkeep()).arg("run").args(arguments(&[(path, "edu")]));
    shell.env_remove("BARKEEP_LOG").stdin(Stdio::null()).stdout(Stdio::piped());
    shell.stderr(Stdio::piped());
    shell
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_told() {
    let (_directory, path) = socket();
    let output = limited(60, &path, "").output().expect("a shell");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the limit of open files (60) is too low"), "{stderr}");
    assert!(output.stdout.is_empty() && !path.exists());
}

#[test]
fn all_open_files_that_are_allowed_are_used() {
    let (_directory, path) = socket();
    let mut child = limited(200, &path, "S").spawn().expect("a shell");
    let mut first = [0];
    child.stdout.take().expect("a pipe").read_exact(&mut first).expect("it serves");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).expect("procfs");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
    let fields: Vec<_> = line.split_whitespace().collect();
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).expect("it is our child");
    assert!(child.wait().expect("it is our child").success());
    if fields[4] == "200" {
        return skip(&"the hard limit is as low");
    }
    assert_eq!(fields[3], fields[4], "{line}");
}
