//! `barkeep demo`, as a user runs it.

use std::process::{Command, Output, Stdio};

use barkeep_shim::hypervisor::kvm::Kvm;
use barkeep_tests::{binary, skip};
use serde_json::Value;

use crate::sidecar::{kill, serving_children};

fn demo(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary::barkeep());
    command.args(["--log", "error", "demo"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn object(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.lines().count(), 1, "one object: {text}");
    println!("{text}");
    serde_json::from_str(&text).unwrap()
}

fn check_passed(hypervisor: &str) {
    let arguments = ["--json", "--cycles", "300", "--devices", "2", "--hypervisor", hypervisor];
    let output = demo(&arguments).output().unwrap();
    let result = object(&output);
    assert!(output.status.success(), "{result}");
    assert_eq!(result["hypervisor"], hypervisor);
    for (key, value) in [("cycles", 300), ("vcpus", 3), ("devices", 2), ("wrong_values", 0)] {
        assert_eq!(result[key], value, "{key}");
    }
    assert_eq!(result["vm_alive"], true);
    let number = |key: &str| result[key].as_u64().unwrap_or_else(|| panic!("{key}: {result}"));
    assert_eq!(number("writes_applied") + number("writes_dropped"), number("writes"));
    for key in ["reads", "reads_ur", "writes_dropped", "mmio_p50_ns", "mmio_p99_ns"] {
        assert!(number(key) > 0, "{key}");
    }
    assert!(number("mmio_p50_ns") <= number("mmio_p99_ns"));
    assert!(result["seconds"].as_f64().unwrap() > 0.0);
    assert!(result["memory_faults"].is_u64());
}

#[test]
fn the_demo_passes_on_the_model() {
    check_passed("model");
}

#[test]
fn the_demo_passes_on_kvm() {
    match Kvm::probe() {
        Ok(()) => check_passed("kvm"),
        Err(reason) => skip(&reason),
    }
}

#[test]
fn the_table_tells_the_hypervisor_and_the_result() {
    let output = demo(&["--cycles", "20", "--hypervisor", "model"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let row = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(row("hypervisor").ends_with("model"), "{text}");
    assert!(row("result").ends_with("passed"), "{text}");
}

#[test]
fn a_sidecar_that_dies_is_a_violation_and_the_vm_lives_on() {
    let mut demo = demo(&["--json", "--cycles", "3000", "--hypervisor", "model"]).spawn().unwrap();
    // The sidecar is there before the VM starts; it dies at some point of the run, or before it.
    let sidecar = loop {
        if let Some(process) = serving_children(demo.id()).pop() {
            break process;
        }
        assert!(demo.try_wait().unwrap().is_none(), "the demo is at work");
        std::thread::yield_now();
    };
    wait_for_the_vm(demo.id());
    kill(sidecar);
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let result = object(&output);
    assert_eq!(result["vm_alive"], true, "{result}");
    assert!(!result["violations"].as_array().unwrap().is_empty());
}

/// Until the vCPUs of the demo's VM run: everything is attached then.
fn wait_for_the_vm(demo: u32) {
    let children = format!("/proc/{demo}/task/{demo}/children");
    let runs = |id: &str| {
        let threads = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
        let mut names = threads.map(|thread| std::fs::read_to_string(thread.path().join("comm")));
        names.any(|name| name.is_ok_and(|name| name.trim() == "vcpu0"))
    };
    while !std::fs::read_to_string(&children).unwrap().split_whitespace().any(runs) {
        std::thread::yield_now();
    }
}
