//! Operators' mistakes.

use std::path::Path;

use crate::process::{COMMANDS, arguments, assert_refused, run, socket};

#[test]
fn a_device_that_cant_be_made_is_named_with_the_reason() {
    let (directory, path) = socket();
    let small = directory.path().join("small");
    std::fs::write(&small, [0; 4096]).expect("a file");
    let file = |size: &str, path: &Path| format!("ivshmem,size={size},path={}", path.display());
    let too_small = file("8K", &small);
    let missing = file("4K", &directory.path().join("missing"));
    let no_file = file("4K", directory.path());
    for (spec, reason) in [
        ("", "name is missing"),
        (",size=4K", "name is missing"),
        ("nvme", "unknown device 'nvme' (known: edu, ivshmem, vhost-user, virtio-"),
        ("EDU", "unknown device 'EDU'"),
        ("edu,size=4K", "unknown parameter 'size'"),
        ("edu,dma_mask=lots", "'dma_mask': 'lots' is no number"),
        ("edu,dma_mask=-1", "'dma_mask': '-1' is no number"),
        ("edu,dma_mask", "'dma_mask' is not of the form key=value"),
        ("edu,", "not of the form key=value"),
        ("ivshmem", "'size' is missing"),
        ("ivshmem,size=", "'size': '' is no size"),
        ("ivshmem,size=3M", "power of two"),
        ("ivshmem,size=2K", "power of two from 4096"),
        ("ivshmem,size=0", "power of two"),
        ("ivshmem,size=2T", "power of two"),
        ("ivshmem,size=99999999999999999999", "is no size"),
        ("ivshmem,size=16777216T", "is no size"),
        ("ivshmem,size=4M,size=4M", "'size' is given twice"),
        ("ivshmem,size=4K,vectors=65", "'vectors': 65 is more than 64"),
        ("edu,decode=never", "'decode': 'never' is neither strict nor always"),
        ("edu,romfile=/nonexistent", "'romfile': /nonexistent: No such file"),
        (&too_small, "smaller than size=8192"),
        (&missing, "No such file or directory"),
        (&no_file, "'path'"),
    ] {
        let words = [&*format!("--device {spec}: "), reason];
        assert_refused(&arguments(&[(&path, spec)]), &words);
        assert!(!path.exists(), "{spec}");
    }
}

#[test]
fn a_bad_device_behind_a_good_one_serves_neither() {
    let (directory, path) = socket();
    let other = directory.path().join("other.sock");
    assert_refused(&arguments(&[(&path, "edu"), (&other, "nvme")]), &["--device nvme"]);
    assert!(!path.exists() && !other.exists());
}

#[test]
fn options_that_dont_pair_up_are_counted() {
    let (_directory, path) = socket();
    let mut more_sockets = arguments(&[(&path, "edu")]);
    more_sockets.extend(["--socket".into(), "/tmp/other.sock".into()]);
    assert_refused(&more_sockets, &["--socket", "--device", "2 sockets", "1 devices"]);
    let mut more_devices = arguments(&[(&path, "edu")]);
    more_devices.extend(["--device".into(), "edu".into()]);
    assert_refused(&more_devices, &["--socket", "--device", "1 sockets", "2 devices"]);
    assert!(!path.exists());
}

#[test]
fn a_path_that_cant_be_listened_on_is_named_with_the_reason() {
    let (directory, _) = socket();
    let directory = directory.path();
    std::fs::write(directory.join("file"), "precious").expect("a file");
    std::fs::create_dir(directory.join("folder")).expect("a directory");
    let long = "x".repeat(120);
    for (name, reason) in [
        ("missing/function.sock", "No such file or directory"),
        ("file/function.sock", "Not a directory"),
        ("file", "exists and is not a socket"),
        ("folder", "exists and is not a socket"),
        (&long, "too long"),
    ] {
        let path = directory.join(name);
        let words = [&*format!("--socket {}: ", path.display()), reason];
        assert_refused(&arguments(&[(&path, "edu")]), &words);
    }
    assert_eq!(std::fs::read(directory.join("file")).expect("still there"), b"precious");
}

#[test]
fn a_bad_socket_behind_a_good_one_leaves_nothing_behind() {
    let (directory, path) = socket();
    let missing = directory.path().join("missing/function.sock");
    assert_refused(&arguments(&[(&path, "edu"), (&missing, "edu")]), &["missing/function.sock"]);
    assert!(!path.exists());
    assert_refused(&arguments(&[(&path, "edu"), (&path, "edu")]), &["--socket", "in use"]);
    assert!(!path.exists());
}

#[test]
fn a_log_filter_that_is_none_is_named() {
    let (_directory, path) = socket();
    let mut filtered = arguments(&[(&path, "edu")]);
    filtered.extend(["--log".into(), "barkeep=loudest".into()]);
    assert_refused(&filtered, &["--log"]);
    assert!(!path.exists());
}

/// clap's own answers have several lines.
#[test]
fn missing_and_unknown_options_are_usage_errors() {
    let (_directory, path) = socket();
    let path = path.display().to_string();
    for (arguments, word) in [
        (vec![], "--socket"),
        (vec!["--socket".into(), path.clone()], "--device"),
        (vec!["--device".into(), "edu".into()], "--socket"),
        (vec!["--sockets".into(), path], "--sockets"),
    ] {
        for command in COMMANDS {
            let output = run(command, &arguments);
            assert_eq!(output.status.code(), Some(2), "{command} {arguments:?}");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains(word), "{command} {arguments:?}");
            assert!(output.stdout.is_empty());
        }
    }
}
