//! Servers in processes of their own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::image::Image;

/// A process that serves the image; it ends with this value.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Server {
    /// `barkeep serve`, built as this program is.
    pub(crate) fn barkeep(image: &Image, transport: &str) -> Self {
        let socket = image.directory.path().join(format!("{transport}.sock"));
        let mut command = Command::new(barkeep_tests::binary::barkeep());
        // Nobody else writes here: two servers on one image are what the lock is against.
        let path = image.directory.path().join(format!("{transport}.image"));
        std::fs::copy(&image.path, &path).unwrap();
        command.args(["--log", "warn", "serve", "--transport", transport, "--socket"]);
        command.arg(&socket).arg("--device").arg(format!("virtio-blk,path={}", path.display()));
        let mut child = on_the_servers_cpu(command.stdout(Stdio::piped()));
        let ready = BufReader::new(child.stdout.take().unwrap()).lines().take(1).count();
        assert_eq!(ready, 1, "barkeep starts");
        Self { child, socket }
    }

    /// QEMU's storage daemon, if there is one.
    pub(crate) fn storage_daemon(image: &Image) -> Option<Self> {
        let daemon = std::env::var_os("BARKEEP_STORAGE_DAEMON")?;
        let socket = image.directory.path().join("storage-daemon.sock");
        let path = image.directory.path().join("storage-daemon.image");
        std::fs::copy(&image.path, &path).unwrap();
        let file = format!("driver=file,node-name=disk,aio=io_uring,filename={}", path.display());
        let export = format!(
            "type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut command = Command::new(daemon);
        command.args(["--blockdev", &file, "--export", &export]);
        let child = on_the_servers_cpu(&mut command);
        wait_for(&socket);
        Some(Self { child, socket })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for(socket: &Path) {
    let start = Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < Duration::from_secs(10), "no {}", socket.display());
        std::thread::yield_now();
    }
}

/// Starts a process that inherits the second processor, or the only one.
fn on_the_servers_cpu(command: &mut Command) -> Child {
    let before = sched_getaffinity(None).unwrap();
    pin(*cpus().last().unwrap());
    let child = command.spawn().unwrap();
    sched_setaffinity(None, &before).unwrap();
    child
}

/// Pins this thread to the first processor.
pub(crate) fn pin_client() {
    pin(cpus()[0]);
}

/// The first two processors that this process may use.
fn cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).take(2).collect()
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).unwrap();
}
