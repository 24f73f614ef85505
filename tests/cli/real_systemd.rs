//! The unit files of docs/systemd in the hands of systemd itself, where that can run.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use barkeep_tests::{binary, skip};
use rustix::event::{Timespec, poll};
use tempfile::TempDir;

use crate::systemd::Client;

const DEADLINE: Duration = Duration::from_secs(30);
/// How often something is asked for that nobody tells.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// systemd as process 1 of namespaces of its own; ends when it is dropped.
struct Machine {
    script: Child,
    pid: String,
    _directory: TempDir,
}

impl Machine {
    /// Boots it with these instances and their options; `None`, told as skipped, where that can't be.
    fn boot(instances: &[(&str, &str)]) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let configuration = directory.path().join("etc/barkeep");
        let drop_in = directory.path().join("etc/systemd/system/barkeep@.service.d");
        for folder in [&configuration, &drop_in] {
            std::fs::create_dir_all(folder).expect("a fresh directory");
        }
        for (name, options) in instances {
            let line = format!("BARKEEP_OPTIONS=\"{options}\"\n");
            std::fs::write(configuration.join(format!("{name}.conf")), line).expect("a file");
        }
        std::fs::write(drop_in.join("test.conf"), "[Service]\nWatchdogSec=1\n").expect("a file");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/systemd");
        let mut script = Command::new(script)
            .arg(binary::barkeep())
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a script of ours");
        let mut line = String::new();
        let mut stdout = BufReader::new(script.stdout.take().expect("a pipe"));
        stdout.read_line(&mut line).expect("a pipe");
        if let Some(reason) = line.strip_prefix("skipped ") {
            skip(&reason.trim_end());
            let _ = script.wait();
            return None;
        }
        let pid = line.strip_prefix("ready ").expect("ready or skipped").trim_end().to_owned();
        Some(Self { script, pid, _directory: directory })
    }

    fn try_systemctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &self.pid, "systemctl", "--no-pager"]).args(arguments);
        command.stdin(Stdio::null()).output().expect("nsenter starts")
    }

    fn systemctl(&self, arguments: &[&str]) -> String {
        let output = self.try_systemctl(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "systemctl {arguments:?}: {}{}\n{}",
            text(&output.stderr),
            text(&output.stdout),
            text(&self.try_systemctl(&["status", "barkeep@*"]).stdout),
        );
        text(&output.stdout).trim_end().to_owned()
    }

    fn property(&self, unit: &str, property: &str) -> String {
        self.systemctl(&["show", unit, "--value", "--property", property])
    }

    /// Waits until a unit runs in another process than this one.
    fn wait_for_another(&self, unit: &str, process: &str) {
        self.wait_until(&format!("{unit} does not come back"), || {
            self.property(unit, "ActiveState") == "active"
                && self.property(unit, "MainPID") != process
        });
    }

    fn wait_until(&self, failure: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done() {
            let log = || self.systemctl(&["status", "barkeep@*"]);
            assert!(Instant::now() < deadline, "{failure}:\n{}", log());
            let _ = poll(&mut [], Some(&PAUSE));
        }
    }

    /// A path in there, for this process.
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

#[test]
fn a_client_does_not_notice_what_systemd_does_to_the_service() {
    let Some(machine) = Machine::boot(&[("vm", "--device edu,id=edu")]) else { return };
    let unit = "barkeep@vm.service";
    machine.systemctl(&["start", unit]);
    assert_eq!(machine.property(unit, "StatusText"), "serving edu");
    let mut client = Client::connect(&machine.path("/run/barkeep/vm/edu.sock"));
    client.check();
    let held = || machine.property(unit, "NFileDescriptorStore");
    let before = held();
    assert!(before.parse::<u32>().is_ok_and(|count| count >= 5), "{before} are held");

    for kill in [&["--kill-who=main"][..], &["--kill-who=all"]] {
        let process = machine.property(unit, "MainPID");
        machine.systemctl(&[&["kill", "--signal=KILL", unit], kill].concat());
        machine.wait_for_another(unit, &process);
        client.check();
        assert_eq!(held(), before, "{kill:?}");
    }

    machine.systemctl(&["restart", unit]);
    client.check();
    assert_eq!(held(), before, "restart");

    let process = machine.property(unit, "MainPID");
    machine.systemctl(&["reload", unit]);
    assert_eq!(machine.property(unit, "MainPID"), process, "an upgrade is the same process");
    client.check();
    assert_eq!(held(), before, "upgrade");

    // The event loop hangs: the watchdog ends it.
    machine.systemctl(&["kill", "--signal=STOP", "--kill-who=main", unit]);
    machine.wait_for_another(unit, &process);
    client.check();
    assert_eq!(held(), before, "watchdog");

    machine.systemctl(&["stop", unit]);
    client.peer.expect_closed();
    machine.systemctl(&["start", unit]);
    barkeep_tests::edu::assert_served(&machine.path("/run/barkeep/vm/edu.sock"));
}

#[test]
fn systemd_starts_the_service_for_its_first_client() {
    let Some(machine) = Machine::boot(&[("vm", "--device edu,id=disk")]) else { return };
    machine.systemctl(&["start", "barkeep@vm.socket"]);
    let (unit, socket) = ("barkeep@vm.service", machine.path("/run/barkeep/vm-disk.sock"));
    assert_eq!(machine.property(unit, "ActiveState"), "inactive");
    let waiting = UnixStream::connect(&socket).expect("systemd listens");
    machine.wait_until("nothing starts", || machine.property(unit, "ActiveState") == "active");
    drop(waiting);
    let mut client = Client::connect(&socket);
    client.check();
    let process = machine.property(unit, "MainPID");
    machine.systemctl(&["kill", "--signal=KILL", unit]);
    machine.wait_for_another(unit, &process);
    client.check();
}
