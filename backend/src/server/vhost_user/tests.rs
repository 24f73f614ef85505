use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd as Event;

use super::*;
use crate::devices::virtio::spec::{DeviceType, feature};
use crate::devices::virtio::{DeviceError, Io};

/// What a core was told.
type Told = Arc<Mutex<Vec<String>>>;

/// A device with two queues that writes down what it is told.
struct Recorder {
    told: Told,
    /// It panics at a kick, as if it had a bug.
    buggy: bool,
}

impl Recorder {
    fn note(&self, what: &str) {
        self.told.lock().unwrap().push(what.to_owned());
    }
}

impl Core<SharedMemory> for Recorder {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }

    fn features(&self) -> u64 {
        1
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn start(&mut self, features: u64) {
        self.note(&format!("start {features:#x}"));
    }

    fn kicked(&mut self, queue: u16, io: &mut dyn Io<SharedMemory>) -> Result<(), DeviceError> {
        let served = if io.queue(queue).is_some() { "kicked" } else { "kicked in vain" };
        self.note(&format!("{served} {queue}"));
        assert!(!self.buggy, "the bug that this test is about");
        Ok(())
    }

    fn quiesce(&mut self) {
        self.note("quiesce");
    }

    fn queue_stopped(&mut self, queue: u16) {
        self.note(&format!("stopped {queue}"));
    }

    fn reset(&mut self) {
        self.note("reset");
    }
}

/// A server in a thread of the test, which it ends with.
struct Running {
    stop: UnixStream,
    thread: Option<thread::JoinHandle<io::Result<()>>>,
    directory: tempfile::TempDir,
    told: Told,
}

impl Running {
    fn start(buggy: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = SocketPath::claim(&directory.path().join("socket")).unwrap();
        let told = Told::default();
        let core = Recorder { told: Arc::clone(&told), buggy };
        let mut server = VhostUserServer::new().unwrap();
        server.add(socket, "recorder".into(), Box::new(core)).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let (_open, never) = UnixStream::pair().unwrap();
            server.run(stopped.as_fd(), never.as_fd())
        });
        Self { stop, thread: Some(thread), directory, told }
    }

    /// A front-end that has set features and memory.
    fn connect(&self) -> Frontend {
        let path = self.directory.path().join("socket");
        let mut front_end = Frontend::connect(Path::new(&path), 2).unwrap();
        front_end.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(front_end.get_features().unwrap() & 1, 1);
        let offered = front_end.get_protocol_features().unwrap();
        front_end.set_protocol_features(offered).unwrap();
        front_end.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        front_end.set_features(1 | feature::VERSION_1 | protocol).unwrap();
        set_memory(&front_end);
        front_end
    }

    /// What the core was told since the last time.
    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.told.lock().unwrap())
    }

    /// Waits until the core is told something.
    fn wait_for(&self, what: &str) -> Vec<String> {
        let mut told = Vec::new();
        while !told.iter().any(|line| line == what) {
            thread::yield_now();
            told.extend(self.told());
        }
        told
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::io::Write::write_all(&mut self.stop, &[0]);
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

fn set_memory(front_end: &Frontend) {
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x10000).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 0x10000,
        userspace_addr: 0x7000_0000,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&file),
    };
    front_end.set_mem_table(&[region]).unwrap();
}

fn start_ring(front_end: &mut Frontend, index: usize, size: u16, kick: &Event) {
    let at = 0x7000_0000 + 0x1000 * u64::try_from(index).unwrap();
    let data = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: at,
        used_ring_addr: at + 0x800,
        avail_ring_addr: at + 0x400,
        log_addr: None,
    };
    front_end.set_vring_num(index, size).unwrap();
    front_end.set_vring_addr(index, &data).unwrap();
    front_end.set_vring_base(index, 0).unwrap();
    front_end.set_vring_kick(index, kick).unwrap();
    front_end.set_vring_enable(index, true).unwrap();
}

#[test]
fn a_core_is_started_once_and_told_of_rings_and_memory() {
    let server = Running::start(false);
    let mut front_end = server.connect();
    assert!(!server.told().iter().any(|line| line.starts_with("start")));
    let kicks = [(); 2].map(|()| Event::new(0).unwrap());
    start_ring(&mut front_end, 0, 16, &kicks[0]);
    let start = format!("start {:#x}", 1 | feature::VERSION_1);
    assert_eq!(server.wait_for("kicked 0"), [start.as_str(), "kicked 0"]);
    start_ring(&mut front_end, 1, 8, &kicks[1]);
    assert_eq!(server.wait_for("kicked 1"), ["kicked 1"]);

    set_memory(&front_end);
    let told = server.told();
    assert_eq!(told.first().unwrap(), "quiesce");
    assert_eq!(told[told.len() - 2..], ["kicked 0", "kicked 1"], "what was not told before");

    front_end.get_vring_base(0).unwrap();
    let told = server.told();
    let stopped = told.iter().position(|line| line == "stopped 0").unwrap();
    assert_eq!(told[0], "quiesce");
    assert_eq!(told[stopped + 1..], ["kicked 1"]);
    drop(front_end);
    let told = server.wait_for("reset");
    assert_eq!(told.last().unwrap(), "reset");
}

#[test]
fn a_ring_larger_than_the_devices_is_not_served() {
    let server = Running::start(false);
    let mut front_end = server.connect();
    let kick = Event::new(0).unwrap();
    server.told();
    start_ring(&mut front_end, 1, 16, &kick);
    assert_eq!(server.wait_for("quiesce"), ["quiesce"]);
}

#[test]
fn a_device_with_a_bug_costs_its_client_the_session_and_nobody_else() {
    let server = Running::start(true);
    for _ in 0..2 {
        let mut front_end = server.connect();
        let kick = Event::new(0).unwrap();
        start_ring(&mut front_end, 0, 16, &kick);
        server.wait_for("kicked 0");
        // The session may last until the next message.
        while front_end.set_vring_enable(0, true).is_ok() {}
        assert_eq!(server.wait_for("reset").last().unwrap(), "reset");
    }
}
