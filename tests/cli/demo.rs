//! Processes that end with each other.

use std::process::{Command, Stdio};

use barkeep_tests::binary;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::process::{arguments, socket};

/// Until a process has a child that runs `barkeep vmm`.
fn wait_for_the_vmm(demo: &mut std::process::Child) {
    let id = demo.id();
    let is_vmm = |id: &str| {
        let arguments = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|argument| argument == b"vmm")
    };
    let children = format!("/proc/{id}/task/{id}/children");
    while !std::fs::read_to_string(&children).expect("procfs").split_whitespace().any(is_vmm) {
        assert!(demo.try_wait().expect("our child").is_none(), "the demo is at work");
        std::thread::yield_now();
    }
}

#[test]
fn a_demo_that_is_interrupted_says_so_and_leaves_nothing_behind() {
    for signal in [Signal::TERM, Signal::INT] {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let mut demo = Command::new(binary::barkeep())
            .args(["--log", "error", "demo", "--json", "--hypervisor", "model"])
            .args(["--cycles", "1000000000"])
            .env("TMPDIR", scratch.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("barkeep starts");
        wait_for_the_vmm(&mut demo);
        kill_process(Pid::from_child(&demo), signal).expect("it is our child");
        let output = demo.wait_with_output().expect("it is our child");
        let text = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{signal:?}: {text}{stderr}");
        let outcome: Value = serde_json::from_str(&text).expect("one object");
        let violations = outcome["violations"].as_array().expect("a list");
        assert!(violations.contains(&"interrupted".into()), "{text}");
        let left = std::fs::read_dir(scratch.path()).expect("it is there").count();
        assert_eq!(left, 0, "{signal:?}");
    }
}

#[test]
fn a_process_that_was_started_by_one_that_has_ended_does_not_serve() {
    let (_directory, path) = socket();
    // The kernel's own kthreadd, which is never the parent of a test's child.
    let output = Command::new(binary::barkeep())
        .args(["--die-with-parent", "2", "serve"])
        .args(arguments(&[(&path, "edu")]))
        .stdin(Stdio::null())
        .output()
        .expect("barkeep starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty() && !path.exists());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("has ended"), "the last line is written: {stderr}");
}
