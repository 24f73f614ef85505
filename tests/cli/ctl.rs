//! `barkeep ctl wrap-status`: what the library says of a process, and what a hostile one may say.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use barkeep_protocol::page::wrap::{Count, LENGTH, NAME, Page, WORDS};
use barkeep_tests::binary;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::wrap::wrap_with_library;

const FORMATS: [&str; 3] = ["text", "json", "prometheus"];

fn wrap_status(pid: u32, format: &str) -> Output {
    let mut command = Command::new(binary::barkeep());
    command.args(["ctl", "wrap-status", &pid.to_string(), "--format", format]);
    command.output().expect("barkeep starts")
}

fn answer(pid: u32, format: &str) -> String {
    let output = wrap_status(pid, format);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn json(pid: u32) -> serde_json::Value {
    let answer = answer(pid, "json");
    assert_eq!(answer.matches('\n').count(), 1, "one line");
    serde_json::from_str(&answer).expect("JSON")
}

fn assert_no_answer(pid: u32, reason: &str) {
    for format in FORMATS {
        let output = wrap_status(pid, format);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(output.stdout.is_empty(), "{format}");
        assert_eq!(stderr, format!("barkeep: process {pid}: {reason}\n"));
    }
}

/// A program that waits for the end of its input; killed when dropped.
struct Waiting(Child);

impl Waiting {
    /// It runs when this comes back: it has answered with a line.
    fn start(mut command: Command) -> Self {
        let stdio = || Stdio::piped();
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn();
        let mut waiting = Self(child.expect("the program starts"));
        let input = waiting.0.stdin.as_mut().expect("a pipe");
        input.write_all(b"ready\n").expect("a pipe");
        assert_eq!(waiting.line(), "ready");
        waiting
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        // One line is there, and no second one.
        BufReader::new(self.0.stdout.as_mut().expect("a pipe"))
            .read_line(&mut line)
            .expect("a pipe");
        line.trim_end().to_owned()
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_wrapped_process_is_told_of_in_three_formats() {
    let mut command = wrap_with_library();
    command.arg("cat");
    let cat = Waiting::start(command);
    let text = answer(cat.pid(), "text");
    for line in Count::ALL.map(Count::text).into_iter().chain(["VMs", "devices"]) {
        let found = text.lines().filter(|found| found.starts_with(line)).count();
        assert_eq!(found, 1, "{line}: {text}");
    }
    assert!(text.starts_with(&format!("process {} ", cat.pid())), "{text}");
    assert!(text.contains("cat, wrapped by barkeep 0."), "{text}");

    let json = json(cat.pid());
    assert_eq!(json["pid"], cat.pid());
    assert_eq!(json["command"], "cat");
    assert_eq!((&json["vms"], &json["vms_ever"]), (&0.into(), &0.into()));
    assert_eq!(
        (json["devices"].to_string(), json["fail_opens"].to_string()),
        ("[]".into(), "[]".into())
    );
    for count in Count::ALL {
        assert_eq!(json["counts"][count.name()], 0, "{}", count.name());
    }

    let prometheus = answer(cat.pid(), "prometheus");
    for count in Count::ALL.into_iter().filter(|count| *count != Count::FailOpens) {
        let sample = format!("barkeep_wrap_{}_total{{pid=\"{}\"}} 0", count.name(), cat.pid());
        assert!(prometheus.lines().any(|line| line == sample), "{sample}: {prometheus}");
    }
}

#[test]
fn a_child_has_a_page_of_its_own() {
    let mut command = wrap_with_library();
    // The first one becomes another program; the subshell is a fork that does not.
    command.args(["sh", "-c", "read line; exec 3<&0; { read more <&3; } & echo $line; wait"]);
    let shell = Waiting::start(command);
    let children = format!("/proc/{0}/task/{0}/children", shell.pid());
    let children = std::fs::read_to_string(children).expect("a process");
    let child = children.trim().parse().expect("one child");
    for pid in [shell.pid(), child] {
        assert_eq!(json(pid)["pid"], pid);
    }
    let file = |pid: u32| {
        let folder = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("our child");
        let mut links = folder.map(|entry| entry.expect("our child").path());
        let page = links.find(|path| {
            std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains(NAME))
        });
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(page.expect("a page")).expect("our child").ino()
    };
    assert_ne!(file(shell.pid()), file(child));
}

#[test]
fn a_process_without_the_library_has_nothing_to_tell() {
    let cat = Waiting::start(Command::new("cat"));
    assert_no_answer(cat.pid(), "not wrapped: it has no page of libbarkeep_preload.so");
}

#[test]
fn a_process_that_has_ended_has_nothing_to_tell() {
    let mut child = Command::new("true").spawn().expect("true starts");
    let pid = child.id();
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(Pid::from_child(&child)), options).expect("our child");
    assert_no_answer(pid, "has ended");
    child.wait().expect("our child");
    assert_no_answer(pid, "there is no such process");
    assert_no_answer(0, "there is no such process");
    assert_no_answer(u32::MAX, "there is no such process");
}

/// A memfd of this very process that is called what a page is called.
fn memfd(contents: &[u8]) -> OwnedFd {
    let fd = memfd_create(NAME, MemfdFlags::CLOEXEC).expect("a memfd");
    std::fs::File::from(fd.try_clone().expect("a descriptor")).write_all(contents).expect("memory");
    fd
}

fn page(pid: u32, fill: impl FnOnce(&Page<&[AtomicU64]>)) -> Vec<u8> {
    let words: Vec<_> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
    let page = Page::new(&*words).expect("enough words");
    page.publish(pid, "9.9", ["a reason"]);
    fill(&page);
    words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
}

/// All in one test: the process under test is the one that runs it.
#[test]
fn a_hostile_page_is_refused_or_harmless() {
    let pid = std::process::id();
    assert_no_answer(pid, "not wrapped: it has no page of libbarkeep_preload.so");
    let good = page(pid, |_| {});
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    for (contents, reason) in [
        (Vec::new(), "the page is too short"),
        (good[..LENGTH - 1].to_vec(), "the page is too short"),
        (with(0, 0), "not a page of the library's"),
        (vec![0xff; LENGTH], "not a page of the library's"),
        (with(8, 2), "the page has layout 2, and this program knows 1"),
        (page(0, |_| {}), "the page names no process"),
        (page(1, |_| {}), "not wrapped: its page is that of process 1"),
    ] {
        let _page = memfd(&contents);
        assert_no_answer(pid, reason);
    }
    {
        // More of them than anybody looks at.
        let _pages: Vec<_> = (0..100).map(|_| memfd(b"")).collect();
        assert_no_answer(pid, "the page is too short");
    }
    let _bad = memfd(b"");
    let hostile = page(pid, |page| {
        page.device_came(0, "\x1b[2J\"\\\n}");
        page.add(Count::UrReads, u64::MAX);
        page.leave(0);
    });
    let _page = memfd(&hostile);
    let told = json(pid);
    assert_eq!(told["devices"][0], "?[2J\"\\?}");
    assert_eq!(told["counts"]["ur_reads"], u64::MAX);
    assert_eq!(told["fail_opens"][0]["reason"], "a reason");
    let text = answer(pid, "text");
    assert!(text.chars().all(|shown| shown == '\n' || !shown.is_control()), "{text:?}");
    let prometheus = answer(pid, "prometheus");
    assert!(prometheus.contains("device=\"?[2J\\\"\\\\?}\"} 1\n"), "{prometheus}");
    assert!(prometheus.contains("reason=\"a reason\"} 1\n"), "{prometheus}");
}

#[test]
fn what_is_no_question_is_a_usage_error() {
    for arguments in [
        &["ctl"][..],
        &["ctl", "wrap-status"],
        &["ctl", "wrap-status", "-1"],
        &["ctl", "wrap-status", "x"],
    ] {
        let output = Command::new(binary::barkeep()).args(arguments).output();
        assert_eq!(output.expect("barkeep starts").status.code(), Some(2), "{arguments:?}");
    }
}
