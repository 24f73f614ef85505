//! Another program in place of a running `barkeep run`.

use std::fs::{copy, rename, write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use barkeep_tests::binary;
use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::pci;
use barkeep_tests::service_manager::{Service, ServiceManager};
use barkeep_tests::virtio::requests::{BlkData, blk};
use barkeep_tests::virtio::{DATA, Driver, Function, Memory, Setup};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::process::socket;
use crate::systemd::{Client, run};

/// A program of the test's own to replace.
struct Installed {
    directory: TempDir,
}

impl Installed {
    fn new() -> Self {
        let installed = Self { directory: tempfile::tempdir().expect("a temporary directory") };
        installed.replace_by(&binary::barkeep());
        installed
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("barkeep")
    }

    /// As a package manager does it: under another name first.
    fn replace_by(&self, program: &Path) {
        let fresh = self.directory.path().join("barkeep.new");
        copy(program, &fresh).expect("the program can be copied");
        rename(&fresh, self.path()).expect("a file can be replaced");
    }

    fn replace_by_script(&self, script: &str) {
        let text = self.directory.path().join("script");
        write(&text, format!("#!/bin/sh\n{script}\n")).expect("a file");
        std::fs::set_permissions(&text, PermissionsExt::from_mode(0o755)).expect("our file");
        self.replace_by(&text);
    }
}

fn upgrade(pid: Pid) -> Output {
    let mut command = Command::new(binary::barkeep());
    command.args(["upgrade", "--pid", &pid.as_raw_nonzero().to_string()]);
    command.output().expect("barkeep starts")
}

fn assert_upgraded(service: &Service) {
    let output = upgrade(service.pid());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The program that a process runs: device and inode.
fn program(pid: Pid) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(format!("/proc/{pid}/exe")).expect("a process");
    (file.dev(), file.ino())
}

#[test]
fn a_client_does_not_notice_that_the_program_is_replaced() {
    let (_directory, path) = socket();
    let (_other_directory, other) = socket();
    let installed = Installed::new();
    let manager = ServiceManager::new();
    let functions: [(&Path, &str); 2] = [(&path, "edu"), (&other, "edu,id=other")];
    let service = manager.start(installed.path(), &run(&functions));
    manager.wait_for("READY=1");
    let (mut one, mut two) = (Client::connect(&path), Client::connect(&other));
    for _ in 0..3 {
        let before = (program(service.pid()), service.workers());
        one.check();
        two.check();
        installed.replace_by(&binary::barkeep());
        assert_upgraded(&service);
        manager.wait_for("READY=1");
        one.check();
        two.check();
        let after = (program(service.pid()), service.workers());
        assert_ne!(before.0, after.0, "the supervisor runs the new program");
        let stayed: Vec<_> = after.1.iter().filter(|pid| before.1.contains(pid)).collect();
        assert!(stayed.is_empty() && !after.1.is_empty(), "so do the workers: {stayed:?}");
        assert!(after.1.iter().all(|worker| program(*worker) == after.0));
    }
    drop(one);
    edu::assert_served(&path);
    service.signal(Signal::TERM);
}

#[test]
fn what_the_service_manager_holds_after_an_upgrade_is_what_it_held_before() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let service = manager.start(binary::barkeep(), &run(&[(&path, "edu")]));
    manager.wait_for("READY=1");
    let mut client = Client::connect(&path);
    client.check();
    let before = manager.held();
    assert_upgraded(&service);
    manager.wait_for("READY=1");
    assert_eq!(manager.held(), before);
    client.check();
    service.kill();
    let _service = manager.start(binary::barkeep(), &run(&[(&path, "edu")]));
    manager.wait_for("READY=1");
    client.check();
}

#[test]
fn a_program_that_cannot_go_on_replaces_nothing() {
    let (_directory, path) = socket();
    let installed = Installed::new();
    let manager = ServiceManager::new();
    let service = manager.start(installed.path(), &run(&[(&path, "edu")]));
    manager.wait_for("READY=1");
    let mut client = Client::connect(&path);
    let workers = service.workers();
    let scripts = [
        (
            "echo 'barkeep: --device edu: unknown device' >&2; exit 2",
            "--device edu: unknown device",
        ),
        ("echo \"error: unrecognized subcommand '$1'\" >&2; exit 2", "'upgrade-check'"),
        ("kill -SEGV $$", "signal"),
    ];
    for (script, reason) in scripts {
        installed.replace_by_script(script);
        let output = upgrade(service.pid());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(reason) && stderr.matches('\n').count() == 1, "{stderr}");
        // Whoever sends the signal himself gets no further.
        service.signal(Signal::USR2);
        client.check();
    }
    std::fs::remove_file(installed.path()).expect("our file");
    service.signal(Signal::USR2);
    client.check();
    // What is asked about the upgrade may still be a child beside them.
    let now = service.workers();
    assert!(workers.iter().all(|worker| now.contains(worker)), "nobody was disturbed");
    installed.replace_by(&binary::barkeep());
    assert_upgraded(&service);
    client.check();
}

#[test]
fn a_program_that_cannot_be_executed_leaves_the_old_one_with_its_clients() {
    let (_directory, path) = socket();
    let installed = Installed::new();
    let manager = ServiceManager::new();
    let service = manager.start(installed.path(), &run(&[(&path, "edu")]));
    manager.wait_for("READY=1");
    let mut client = Client::connect(&path);
    client.check();
    let workers = service.workers();
    // It passes the check, and takes itself away then.
    installed.replace_by_script("rm -f \"$0\"");
    service.signal(Signal::USR2);
    while workers.iter().any(|worker| service.workers().contains(worker)) {
        std::thread::yield_now();
    }
    client.check();
    drop(client);
    edu::assert_served(&path);
}

#[test]
fn only_a_barkeep_run_is_asked() {
    let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleep starts");
    let pid = Pid::from_child(&sleeper);
    let refused = upgrade(pid);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("not a 'barkeep run'"));
    assert!(sleeper.try_wait().expect("our child").is_none(), "it is not ended by the signal");
    sleeper.kill().expect("our child");
    sleeper.wait().expect("our child");
    let gone = upgrade(pid);
    assert_eq!(gone.status.code(), Some(1));
    let output = Command::new(binary::barkeep()).args(["upgrade", "--pid", "0"]).output();
    assert_eq!(output.expect("barkeep starts").status.code(), Some(2));
}

/// Writes blocks with numbers of their own, more of them at once than one turn of a worker takes.
#[test]
fn requests_of_a_disk_that_are_under_way_are_finished_by_the_next_program() {
    const REQUESTS: usize = 32;
    const SIZE: u32 = 4096;
    let (directory, path) = socket();
    let image = directory.path().join("image");
    let file = std::fs::File::create_new(&image).expect("a fresh file");
    file.set_len(REQUESTS as u64 * u64::from(SIZE)).expect("a sparse file");
    let spec = format!("virtio-blk,path={}", image.display());
    let manager = ServiceManager::new();
    let service = manager.start(binary::barkeep(), &run(&[(&path, &spec)]));
    manager.wait_for("READY=1");

    let function = Arc::new(Function::connect(&path));
    function.enable();
    let memory = Arc::new(Memory::new(1 << 20));
    memory.map(&function.client);
    let mut driver = Driver::start(&function, &memory, Setup::default());
    for round in 1..=5_u8 {
        for slot in 0..REQUESTS {
            let address = DATA + slot as u64 * u64::from(SIZE);
            memory
                .data
                .write(address, &vec![round ^ u8::try_from(slot).expect("few"); SIZE as usize]);
            let sector = slot as u64 * u64::from(SIZE) / blk::SECTOR;
            driver.send_blk(0, slot, blk::T_OUT, sector, BlkData::Out(address, SIZE));
        }
        assert_upgraded(&service);
        for _ in 0..REQUESTS {
            driver.next_used(0);
        }
        for slot in 0..REQUESTS {
            assert_eq!(driver.blk_status(slot), blk::S_OK, "request {slot} of round {round}");
        }
        assert_eq!(driver.blk(blk::T_FLUSH, 0, BlkData::None), blk::S_OK);
        let bytes = std::fs::read(&image).expect("the image");
        for (slot, block) in bytes.chunks_exact(SIZE as usize).enumerate() {
            let expected = round ^ u8::try_from(slot).expect("few");
            assert!(block.iter().all(|byte| *byte == expected), "block {slot} of round {round}");
        }
    }
}

#[test]
fn shared_memory_stays_where_its_client_has_mapped_it() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let service = manager.start(binary::barkeep(), &run(&[(&path, "ivshmem,size=4K")]));
    manager.wait_for("READY=1");
    let mut peer = Peer::greeted(&path);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    peer.write_u32(2, 64, 0x600d_da7a);
    assert_upgraded(&service);
    assert_eq!(peer.read_u32(2, 64), 0x600d_da7a);
    service.kill();
    let _service = manager.start(binary::barkeep(), &run(&[(&path, "ivshmem,size=4K")]));
    manager.wait_for("READY=1");
    assert_eq!(peer.read_u32(2, 64), 0x600d_da7a);
}
