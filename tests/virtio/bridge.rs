//! A disk that qemu-storage-daemon has and `barkeep serve` hands on.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::pci;
use barkeep_tests::virtio::{Driver, Load, Setup};
use tempfile::TempDir;

use crate::blk;
use crate::sidecar::{Sidecar, drive};

const SIZE: u64 = 2 << 20;
const DEPTH: usize = 48;
const ON: u16 = pci::MEMORY_SPACE | pci::BUS_MASTER | 1 << 10;

/// A daemon that exports an image, and ends when it is dropped as it would in a crash.
struct Daemon {
    process: Child,
    command: Vec<String>,
    ready: PathBuf,
}

impl Daemon {
    fn start(command: Vec<String>, ready: PathBuf) -> Self {
        let mut process =
            Command::new(PROGRAM).args(&command).stdin(Stdio::null()).spawn().unwrap();
        // The daemon writes its process id when it has opened everything.
        while !ready.exists() {
            assert_eq!(process.try_wait().unwrap(), None, "the daemon starts");
            std::thread::yield_now();
        }
        Self { process, command, ready }
    }

    fn killed_and_started_anew(mut self) -> Self {
        self.kill();
        std::fs::remove_file(&self.ready).unwrap();
        Self::start(std::mem::take(&mut self.command), self.ready.clone())
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

const PROGRAM: &str = "qemu-storage-daemon";

fn command(directory: &Path) -> Vec<String> {
    let at = |name: &str| directory.join(name).display().to_string();
    [
        "--blockdev".into(),
        format!("driver=file,node-name=image,filename={}", at("image")),
        "--export".into(),
        format!(
            "type=vhost-user-blk,id=disk,node-name=image,writable=on,num-queues=4,addr.type=unix,\
             addr.path={}",
            at("daemon.sock")
        ),
        "--pidfile".into(),
        at("ready"),
    ]
    .into()
}

/// An image of zeros, its daemon, and the function that this is for a VMM; `None` without the
/// daemon's program.
fn bridge() -> Option<(Sidecar, Daemon, File)> {
    if Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status().is_err() {
        barkeep_tests::skip(&format_args!("there is no {PROGRAM}"));
        return None;
    }
    let directory: TempDir = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    image.set_len(SIZE).unwrap();
    let daemon = Daemon::start(command(directory.path()), directory.path().join("ready"));
    let socket = directory.path().join("daemon.sock");
    let device = format!("vhost-user,type=blk,queues=2,socket={}", socket.display());
    Some((Sidecar::start_in(directory, &device), daemon, image))
}

fn setup() -> Setup {
    Setup { queues: 2, ..blk::setup() }
}

#[test]
fn a_disk_of_qemu_storage_daemons_holds_what_was_written_to_it() {
    let Some((sidecar, _daemon, image)) = bridge() else { return };
    let mut driver = drive(&sidecar, setup());
    assert_eq!((driver.blk_capacity(), driver.queues()), (SIZE / 512, 2));
    let mut load = Load::new(SIZE, 512, DEPTH);
    load.run(&mut driver, 4000);
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
}

#[test]
fn the_decode_page_of_a_bridged_function_follows_its_configuration_space() {
    let Some((sidecar, mut daemon, _image)) = bridge() else { return };
    let mut peer = Peer::greeted(&sidecar.socket());
    let page = peer.decode_page();
    let bars = || page.shown().unwrap().bars.into_iter().flatten().collect::<Vec<_>>();
    assert!(!bars().is_empty());
    for command in [ON, 0, ON] {
        peer.set_config_u16(pci::COMMAND, command);
        assert!(bars().iter().all(|bar| bar.decodes == (command == ON)));
    }
    // It is the function's and not the daemon's.
    daemon.kill();
    let _ = peer.config_u16(pci::COMMAND);
    assert!(bars().iter().all(|bar| bar.decodes));
    peer.set_config_u16(pci::COMMAND, 0);
    assert!(bars().iter().all(|bar| !bar.decodes));
}

#[test]
fn a_daemon_that_is_killed_under_load_loses_nothing_when_it_is_back() {
    let Some((sidecar, mut daemon, image)) = bridge() else { return };
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    for _ in 0..4 {
        load.run(&mut driver, 300);
        load.fill(&mut driver);
        daemon = daemon.killed_and_started_anew();
        load.run(&mut driver, 300);
    }
    load.finish(&mut driver);
    assert_eq!((load.failed, load.under_way()), (0, 0));
    load.verify(&image);
}

#[test]
fn toggled_bus_mastering_delays_the_daemons_requests_and_loses_none() {
    let Some((sidecar, _daemon, image)) = bridge() else { return };
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    let (enough, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let function = std::sync::Arc::clone(&driver.function);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !enough.load(Ordering::Relaxed) {
                function.set_command(ON & !pci::BUS_MASTER);
                function.set_command(ON);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let stop = Stop(&enough);
        while count.load(Ordering::Relaxed) < 200 {
            load.run(&mut driver, 100);
        }
        drop(stop);
    });
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
    // The driver is bound anew.
    let mut driver = Driver::start(&driver.function, &driver.memory, setup());
    load.run_to_end(&mut driver, 1000, &image);
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
