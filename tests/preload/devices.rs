//! A VMM with a vfio-user device: what QEMU as it is shipped gets wrong, and what is right with the library.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use barkeep_tests::backend::Backend;
use barkeep_tests::binary;

use crate::wrapped::{With, has_kvm, run, scenario, text};

const ONES: &str = "4294967295";

fn run_with(name: &str, socket: &Path, arguments: &[&str], with: With) -> Output {
    let socket = socket.display().to_string();
    let mut all = vec![socket.as_str()];
    all.extend_from_slice(arguments);
    run(name, &all, with)
}

/// What a scenario says with the library, and that it came to its end.
#[track_caller]
fn said(name: &str, socket: &Path, arguments: &[&str], with: With) -> String {
    let output = run_with(name, socket, arguments, with);
    let (text, stderr) = (text(&output), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {with:?}: {}\n{text}{stderr}", output.status);
    assert!(!text.contains("trouble: Some"), "{name} {with:?}:\n{text}");
    text
}

/// Every value after a word, as in `off: Ok((0, 1))`.
fn values(text: &str, word: &str) -> Vec<String> {
    let start = format!("{word}: ");
    text.lines().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect()
}

#[test]
fn the_vmm_hears_nothing_of_a_second_speaker() {
    let backend = Backend::serve(&["ivshmem,size=64K", "edu"]);
    for function in 0..2 {
        let socket = backend.socket_of(function);
        let plain = said("session", socket, &[], With::Nothing);
        let wrapped = said("session", socket, &[], With::Library);
        assert_eq!(wrapped, plain, "with the library (left) and without");
    }
}

#[test]
fn a_mapped_bar_that_does_not_decode_reads_all_ones_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let plain = said("switched", backend.socket(), &["2"], With::Nothing);
    assert_eq!(values(&plain, "off"), ["Ok((0, 1))"; 3], "as shipped:\n{plain}");
    let wrapped = said("switched", backend.socket(), &["2"], With::Library);
    let ones = format!("Ok(({ONES}, 0))");
    assert_eq!(values(&wrapped, "off"), [ones.as_str(); 3], "{wrapped}");
    assert_eq!(values(&wrapped, "off again"), [ones.as_str(); 3], "{wrapped}");
    assert_eq!(values(&wrapped, "on"), ["Ok((305419896, 0))"; 4], "{wrapped}");
    // The window is somewhere else then, and what is there is the VMM's.
    assert_eq!(values(&wrapped, "being sized"), ["Ok((0, 1))"], "{wrapped}");
    assert_eq!(values(&wrapped, "back"), [ones.as_str()], "{wrapped}");
    // The backend has answered all of them: six reads as Unsupported Requests.
    assert_eq!(values(&wrapped, "a BAR's counters"), ["Ok([0, 0, 6, 0, 0])"], "{wrapped}");
}

#[test]
fn a_trapped_bar_that_does_not_decode_reads_all_ones_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["edu"]);
    let plain = said("switched", backend.socket(), &["0"], With::Nothing);
    assert_eq!(values(&plain, "off"), ["Ok((0, 1))"; 3], "as shipped:\n{plain}");
    let wrapped = said("switched", backend.socket(), &["0"], With::Library);
    let ones = format!("Ok(({ONES}, 0))");
    assert_eq!(values(&wrapped, "off"), [ones.as_str(); 3], "{wrapped}");
    assert_eq!(values(&wrapped, "on"), ["Ok((16777453, 1))"; 4], "the VMM is asked:\n{wrapped}");
    assert_eq!(values(&wrapped, "a BAR's counters"), ["Ok([4, 0, 6, 0, 0])"], "{wrapped}");
}

#[test]
fn writes_to_a_bar_that_does_not_decode_are_dropped_and_counted_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let wrapped = said("written", backend.socket(), &["2"], With::Library);
    assert_eq!(values(&wrapped, "off"), ["(Ok((2, 0)), 1)", "(Ok((3, 0)), 1)", "(Ok((4, 0)), 1)"]);
    assert_eq!(values(&wrapped, "on"), ["(Ok((1, 0)), 1)", "(Ok((5, 0)), 5)"], "{wrapped}");
    assert_eq!(values(&wrapped, "a BAR's counters"), ["Ok([0, 0, 0, 3, 0])"], "{wrapped}");
}

#[test]
fn no_read_is_zero_while_another_toggles_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let wrapped = said("toggled", backend.socket(), &["2", "300"], With::Library);
    assert_eq!(values(&wrapped, "guests"), ["Ok(())"], "{wrapped}");
    assert_eq!(values(&wrapped, "zeros"), ["0"], "{wrapped}");
    assert_eq!(values(&wrapped, "others"), ["0"], "{wrapped}");
    assert_eq!(values(&wrapped, "live and ones were seen"), ["(true, true)"], "{wrapped}");
}

#[test]
fn the_vmms_own_requests_go_on_between_those_of_the_library_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let wrapped = said("crowd", backend.socket(), &["2"], With::Library);
    assert_eq!(values(&wrapped, "good"), ["[500, 500, 500, 500]"], "{wrapped}");
    assert_eq!(values(&wrapped, "values"), [format!("[Ok({ONES})]")], "{wrapped}");
}

/// A file for the memory of an `ivshmem`.
fn shared_file() -> (tempfile::TempDir, PathBuf, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("memory");
    std::fs::write(&path, vec![0; 64 << 10]).expect("a file");
    let spec = format!("ivshmem,path={},size=64K", path.display());
    (directory, path, spec)
}

#[test]
fn the_vmms_own_accesses_to_a_bar_that_is_gone_complete_while_it_does_not_decode_on_kvm() {
    if !has_kvm() {
        return;
    }
    let (_directory, path, spec) = shared_file();
    let backend = Backend::serve(&[&spec]);
    let file = path.display().to_string();
    let plain = run_with("truncated", backend.socket(), &["2", &file], With::Nothing);
    assert!(!plain.status.success(), "as shipped it dies:\n{}", text(&plain));
    std::fs::write(&path, vec![0; 64 << 10]).expect("a file");
    let wrapped = said("truncated", backend.socket(), &["2", &file], With::Library);
    // As fatal as it was.
    assert_eq!(values(&wrapped, "while it decodes"), ["Ok(Signal(7))"], "{wrapped}");
    assert_eq!(values(&wrapped, "in a child"), ["Ok(Exit(1))"], "{wrapped}");
    assert_eq!(values(&wrapped, "read"), [ONES], "{wrapped}");
    assert_eq!(values(&wrapped, "16 bytes"), [u128::MAX.to_string()], "{wrapped}");
    assert_eq!(values(&wrapped, "copied"), [format!("{:?}", [255; 32])], "{wrapped}");
    assert_eq!(values(&wrapped, "written"), ["0"], "the write was dropped:\n{wrapped}");
}

/// A `barkeep serve` or `run` of its own, killed when dropped.
struct Sidecar {
    process: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Sidecar {
    fn start(command: &str, device: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("function.sock");
        let mut barkeep = Command::new(binary::barkeep());
        barkeep.arg(command).arg("--socket").arg(&socket).args(["--device", device]);
        barkeep.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = barkeep.spawn().expect("barkeep starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a pipe");
        assert!(line.starts_with("serving"), "{line}");
        Self { process, socket, _directory: directory }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_backend_with_a_worker_answers_as_one_without_on_kvm() {
    if !has_kvm() {
        return;
    }
    let sidecar = Sidecar::start("run", "ivshmem,size=64K");
    let wrapped = said("switched", &sidecar.socket, &["2"], With::Library);
    let ones = format!("Ok(({ONES}, 0))");
    assert_eq!(values(&wrapped, "off"), [ones.as_str(); 3], "{wrapped}");
    assert_eq!(values(&wrapped, "on"), ["Ok((305419896, 0))"; 4], "{wrapped}");
    assert_eq!(values(&wrapped, "a BAR's counters"), ["Ok([0, 0, 6, 0, 0])"], "{wrapped}");
}

#[test]
fn a_backend_that_is_gone_hangs_nobody_on_kvm() {
    if !has_kvm() {
        return;
    }
    let mut sidecar = Sidecar::start("serve", "ivshmem,size=64K");
    let socket = sidecar.socket.display().to_string();
    let mut command = scenario("deserted", &[&socket, "2"], With::Library);
    let mut vmm = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut stdout = BufReader::new(vmm.stdout.take().expect("a pipe"));
    let mut said = String::new();
    while !said.contains("ready") {
        assert_ne!(stdout.read_line(&mut said).expect("a pipe"), 0, "{said}");
    }
    sidecar.process.kill().expect("it is our child");
    sidecar.process.wait().expect("it is our child");
    vmm.stdin.take().expect("a pipe").write_all(b"g").expect("it reads");
    stdout.read_to_string(&mut said).expect("a pipe");
    assert!(vmm.wait().expect("it is our child").success(), "{said}");
    assert_eq!(values(&said, "off"), [format!("Ok({ONES})")], "{said}");
    assert_eq!(values(&said, "alone"), [format!("Ok({ONES})")], "{said}");
    assert_eq!(values(&said, "and again"), [format!("Ok({ONES})")], "{said}");
    assert_eq!(values(&said, "refused"), ["true"], "the VMM hears of it:\n{said}");
}

#[test]
fn a_vmm_that_goes_to_the_background_has_its_device_there_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let plain = said("daemonized", backend.socket(), &[], With::Nothing);
    assert_eq!(values(&plain, "off"), ["Ok((0, 1))"], "as shipped:\n{plain}");
    let wrapped = said("daemonized", backend.socket(), &[], With::Library);
    assert_eq!(values(&wrapped, "hears of barkeep"), ["false"], "{wrapped}");
    assert_eq!(values(&wrapped, "on"), ["Ok((305419896, 0))"], "{wrapped}");
    assert_eq!(values(&wrapped, "off"), [format!("Ok(({ONES}, 0))")], "{wrapped}");
    assert_eq!(values(&wrapped, "trouble"), ["None"], "{wrapped}");
}

#[test]
fn a_thread_that_is_cancelled_gets_through_what_the_library_does_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K", "edu"]);
    let other = backend.socket_of(1).display().to_string();
    let wrapped = said("cancelled", backend.socket_of(0), &[&other], With::Library);
    let seen = format!("Ok((Ok(({ONES}, 0)), true, Err({}), Ok(0)))", nix::libc::EAGAIN);
    assert_eq!(values(&wrapped, "seen"), [seen], "{wrapped}");
}

#[test]
fn a_vmm_that_waits_for_no_signal_looks_up_while_its_guest_hammers_on_kvm() {
    if !has_kvm() {
        return;
    }
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let wrapped = said("hammered", backend.socket(), &["2"], With::Library);
    // Behind the instruction that reads, with what it has read, and nothing is asked of KVM any more.
    let seen = vec![format!("(3, {ONES}, false)"); 3];
    assert_eq!(values(&wrapped, "looks up"), seen, "{wrapped}");
    let wrapped = said("hammered", backend.socket(), &["2", "repeats"], With::Library);
    let repeated = values(&wrapped, "looks up");
    assert_eq!(repeated.len(), 3, "{wrapped}");
    assert!(repeated.iter().all(|seen| seen.ends_with("false)")), "{wrapped}");
}
