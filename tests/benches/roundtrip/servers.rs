//! Who answers, in a process of its own.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use barkeep_tests::binary;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, set_parent_process_death_signal};
use tempfile::TempDir;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::worlds::{World, pin};

/// The first argument of this program when it is to become a server.
pub(crate) const START: &str = "start-server";

/// How long a server that polls asks before it waits in the kernel: longer than a client takes for its
/// next request, and short enough that it is asleep when another server has its turn.
const POLL: Duration = Duration::from_micros(1000);

/// Which server.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Answers with as many bytes as a server would, and knows nothing.
    Floor,
    /// `barkeep serve` with so many `edu`.
    Barkeep { functions: usize },
    /// The crate `vfio_user`.
    Theirs,
}

/// A server process, which ends with this value and with this process.
#[derive(Debug)]
pub(crate) struct Served {
    kind: Kind,
    child: Child,
    sockets: Vec<PathBuf>,
    _directory: TempDir,
}

/// Becomes the server that the arguments describe.
pub(crate) fn start(arguments: &[String]) {
    // Whatever happens to the one who measures, nothing stays behind.
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let [kind, cpu, polls, sockets @ ..] = arguments else { panic!("{arguments:?}") };
    pin(cpu.parse().unwrap());
    let polls = polls == "polls";
    match kind.as_str() {
        "floor" => floor(Path::new(&sockets[0]), polls),
        "theirs" => theirs(Path::new(&sockets[0])),
        _ => barkeep(sockets, polls),
    }
}

impl Served {
    /// Starts the server on the world's processor and waits until it listens.
    pub(crate) fn start(kind: Kind, world: &World) -> Self {
        let (name, functions) = match kind {
            Kind::Floor => ("floor", 1),
            Kind::Barkeep { functions } => ("barkeep", functions),
            Kind::Theirs => ("theirs", 1),
        };
        let directory = tempfile::tempdir().unwrap();
        let path = |index| directory.path().join(format!("{index}.sock"));
        let sockets: Vec<PathBuf> = (0..functions).map(path).collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([START, name, &world.server.to_string()])
            .arg(if world.polls { "polls" } else { "blocks" })
            .args(&sockets)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let served = Self { kind, child, sockets, _directory: directory };
        assert!(!ready.is_empty(), "the server does not start: {served:?}");
        served
    }

    pub(crate) fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    pub(crate) fn speaks_vfio_user(&self) -> bool {
        !matches!(self.kind, Kind::Floor)
    }

    /// What the tables call it, with what it can't do in this world.
    pub(crate) fn name(&self, world: &World) -> String {
        match self.kind {
            Kind::Floor => "raw socket".into(),
            Kind::Barkeep { .. } if world.polls && !barkeep_polls() => {
                "barkeep (does not poll)".into()
            }
            Kind::Barkeep { .. } => "barkeep".into(),
            Kind::Theirs if world.polls => "crate vfio_user (can't poll)".into(),
            Kind::Theirs => "crate vfio_user".into(),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn barkeep_polls() -> bool {
    let help = Command::new(binary::barkeep()).args(["serve", "--help"]).output().unwrap();
    String::from_utf8_lossy(&help.stdout).contains("--poll")
}

fn barkeep(sockets: &[String], polls: bool) -> ! {
    let mut command = Command::new(binary::barkeep());
    // What it fails with is on its standard error; who connects is of no interest here.
    command.env("BARKEEP_LOG", "error").arg("serve");
    for socket in sockets {
        command.args(["--socket", socket, "--device", "edu"]);
    }
    if polls && barkeep_polls() {
        command.arg("--poll").arg(POLL.as_micros().to_string());
    }
    panic!("{}", command.exec())
}

fn ready() {
    println!("ready");
}

/// The least that a server can do: one read, one write.
fn floor(path: &Path, polls: bool) {
    let listener = UnixListener::bind(path).unwrap();
    ready();
    let (mut socket, _) = listener.accept().unwrap();
    let mut request = [0; 64];
    let reply = [0; 64];
    loop {
        let count = if polls { poll(&socket, &mut request) } else { socket.read(&mut request) };
        // A read asks with 32 bytes and gets 36; a write, the other way round.
        let size = match count.unwrap() {
            0 => return,
            32 => 36,
            36 => 32,
            other => panic!("{other} bytes are no request"),
        };
        socket.write_all(&reply[..size]).unwrap();
    }
}

fn poll(socket: &UnixStream, request: &mut [u8]) -> io::Result<usize> {
    let start = Instant::now();
    while start.elapsed() < POLL {
        match recv(socket, &mut *request, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(count),
            Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut socket = socket;
    socket.read(request)
}

/// A register that is there, and forgets.
struct Register;

impl ServerBackend for Register {
    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0xed);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<std::fs::File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        _: Vec<std::fs::File>,
    ) -> io::Result<()> {
        Ok(())
    }
}

fn theirs(path: &Path) {
    let region = |index| {
        let mut region = ServerRegion {
            region_info: Default::default(),
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        region.region_info.argsz = 32;
        region.region_info.index = index;
        region.region_info.flags = 0b11;
        region.region_info.size = 8192;
        region
    };
    let irqs = vec![IrqInfo { index: 0, flags: 0b111, count: 1 }];
    let server = Server::new(path, true, irqs, (0..9).map(region).collect()).unwrap();
    ready();
    server.run(&mut Register).unwrap();
}
