//! The devices, and the host's end of each.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use barkeep_backend::config::DeviceSpec;
use barkeep_backend::devices::virtio::{Core, models};
use barkeep_fuzz::guest::Memory;
use barkeep_fuzz::requests::Kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};

pub(crate) struct Device {
    pub(crate) core: Box<dyn Core<Memory>>,
    pub(crate) kind: Kind,
    host: Host,
}

enum Host {
    Image { file: &'static File, size: u64 },
    Frames(UnixDatagram),
    Terminal(Option<UnixStream>),
    Nobody,
}

const IMAGE: u64 = 1 << 16;
/// What a read-only image holds.
const CONTENT: u8 = 0x5a;

impl Device {
    pub(crate) fn new(kind: u8) -> Self {
        let block = |options: &str, read_only| {
            let file = image();
            file.set_len(IMAGE).expect("room for a memfd");
            file.write_all_at(&vec![CONTENT; IMAGE as usize], 0).expect("room for a memfd");
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let core = create(&format!("virtio-blk,path={path}{options}"));
            let host = Host::Image { file, size: IMAGE };
            Self { core, kind: Kind::Block { read_only }, host }
        };
        let net = |options: &str| {
            let (ours, theirs) = UnixDatagram::pair().expect("a pair");
            ours.set_nonblocking(true).expect("a socket");
            let core = create(&format!("virtio-net,fd={}{options}", theirs.as_raw_fd()));
            Self { core, kind: Kind::Net, host: Host::Frames(ours) }
        };
        match kind % 10 {
            0 => block(",aio=sync", false),
            1 => block(",queues=2", false),
            2 => block(",aio=sync,queues=2,logical-block-size=4096,discard=off", false),
            3 => block(",aio=sync,readonly=on", true),
            4 => block(",aio=sync,cache=writethrough,iops=1000000,bps=1T", false),
            5 => net(",mac=52:54:00:00:00:01"),
            6 => net(",queues=2,mtu=1500"),
            7 => Self { core: create("virtio-rng"), kind: Kind::Entropy, host: Host::Nobody },
            8 => {
                let core = create("virtio-rng,max-bytes=64,period=1");
                Self { core, kind: Kind::Entropy, host: Host::Nobody }
            }
            _ => {
                let core = create(&format!("virtio-console,socket={}", console().display()));
                Self { core, kind: Kind::Console, host: Host::Terminal(None) }
            }
        }
    }

    /// The host's end sends something.
    pub(crate) fn host_says(&mut self, bytes: &[u8]) {
        match &mut self.host {
            Host::Frames(socket) => _ = socket.send(bytes),
            Host::Terminal(terminal @ None) => {
                let stream = UnixStream::connect(console()).expect("it listens");
                stream.set_nonblocking(true).expect("a socket");
                *terminal = Some(stream);
            }
            Host::Terminal(Some(stream)) => _ = stream.write(bytes),
            Host::Image { .. } | Host::Nobody => {}
        }
    }

    /// The host's end takes what is there, or leaves.
    pub(crate) fn host_listens(&mut self) {
        let mut bytes = vec![0; 70_000];
        match &mut self.host {
            Host::Frames(socket) => while socket.recv(&mut bytes).is_ok() {},
            Host::Terminal(terminal) => {
                let heard = terminal.as_mut().map(|stream| stream.read(&mut bytes));
                if !matches!(heard, Some(Ok(1..))) {
                    *terminal = None;
                }
            }
            Host::Image { .. } | Host::Nobody => {}
        }
    }

    /// Gives an image another size, in blocks of 512 bytes.
    pub(crate) fn resize(&mut self, blocks: u8) {
        if let (Kind::Block { read_only: false }, Host::Image { file, size }) =
            (self.kind, &mut self.host)
        {
            *size = u64::from(blocks) * 512;
            file.set_len(*size).expect("room for a memfd");
        }
    }

    /// Whether what it took comes back without a driver's or a host's help.
    pub(crate) fn gives_everything_back(&self) -> bool {
        matches!(self.kind, Kind::Block { .. })
    }

    pub(crate) fn readable_wakes(&self) -> Vec<bool> {
        self.poll(&Timespec::default())
    }

    /// Waits until something wakes it.
    pub(crate) fn await_wake(&self) {
        let readable = self.poll(&Timespec { tv_sec: 5, tv_nsec: 0 });
        assert!(readable.contains(&true), "nothing wakes it");
    }

    fn poll(&self, limit: &Timespec) -> Vec<bool> {
        let wakes = self.core.wakes();
        let mut fds: Vec<_> = wakes.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut fds, Some(limit)).expect("descriptors that can be polled");
        fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect()
    }

    pub(crate) fn check(&self) {
        let (Kind::Block { read_only }, Host::Image { file, size }) = (self.kind, &self.host)
        else {
            return;
        };
        assert_eq!(file.metadata().expect("a file").len(), *size, "a disk keeps its size");
        if read_only {
            let mut bytes = vec![0; IMAGE as usize];
            file.read_exact_at(&mut bytes, 0).expect("a file");
            assert!(bytes.iter().all(|byte| *byte == CONTENT), "it is read-only");
        }
    }
}

fn create(spec: &str) -> Box<dyn Core<Memory>> {
    let DeviceSpec { name, mut parameters } = spec.parse().expect("a specification");
    let constructor = models::constructor(&name).expect("a device of this name");
    let core = constructor(&mut parameters).expect("a device");
    parameters.finish().expect("no parameter too much");
    core
}

fn image() -> &'static File {
    static IMAGE: OnceLock<File> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let file: OwnedFd = memfd_create("image", MemfdFlags::CLOEXEC).expect("a memfd");
        file.into()
    })
}

/// Where consoles listen, one at a time. Whoever runs this removes the directory.
fn console() -> PathBuf {
    std::env::temp_dir().join(format!("barkeep-fuzz-{}.sock", std::process::id()))
}
