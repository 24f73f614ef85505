//! Our client, their server: what usbvfiod and others are built on.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceFlags, DmaAccess, DmaMap, DmaUnmap, Errno, IrqAction, IrqData,
    IrqInfoFlags, RegionFlags, SetIrqs, SparseArea,
};
use barkeep_shim::client::{Client, ClientError};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, sealed};
use std::os::fd::AsFd;
use tempfile::TempDir;
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags as TheirUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion,
};

const DEADLINE: Duration = Duration::from_secs(5);
const BAR0: u32 = 0;
const BAR2: u32 = 2;
const SIZE: u64 = 8192;

/// A device that remembers what it was told.
#[derive(Default)]
struct Notebook {
    bytes: HashMap<(u32, u64), u8>,
    windows: Vec<(u64, u64)>,
    eventfds: Vec<File>,
    resets: usize,
}

struct Backend(Arc<Mutex<Notebook>>);

impl Backend {
    fn notebook(&self) -> std::sync::MutexGuard<'_, Notebook> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if offset + data.len() as u64 > SIZE {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.notebook().bytes.get(&(region, offset)).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.notebook().bytes.extend((offset..).map(|at| (region, at)).zip(data.iter().copied()));
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        assert!(fd.is_some());
        self.notebook().windows.push((address, size));
        Ok(())
    }

    fn dma_unmap(&mut self, _: TheirUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.notebook().windows.retain(|window| *window != (address, size));
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.notebook().resets += 1;
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, fds: Vec<File>) -> io::Result<()> {
        self.notebook().eventfds = fds;
        Ok(())
    }
}

struct Theirs {
    path: PathBuf,
    notebook: Arc<Mutex<Notebook>>,
    memory: File,
    thread: JoinHandle<()>,
    _directory: TempDir,
}

/// Serves one client. `sparse` are the parts of BAR2 that may be mapped.
fn serve(sparse: &[(u64, u64)]) -> Theirs {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("theirs.sock");
    let memory = sealed(SIZE);
    let mut regions: Vec<ServerRegion> = (0..9)
        .map(|index| {
            let mut region = ServerRegion {
                region_info: Default::default(),
                sparse_areas: Vec::new(),
                mmap_fd: None,
            };
            region.region_info.argsz = 32;
            region.region_info.index = index;
            region.region_info.flags = 0b11;
            region.region_info.size = SIZE;
            region
        })
        .collect();
    let bar2 = &mut regions[BAR2 as usize];
    bar2.region_info.flags |= 1 << 2;
    bar2.mmap_fd = Some(memory.as_raw_fd());
    let mut area = vfio_user_area();
    for (offset, size) in sparse {
        (area.area.offset, area.area.size) = (*offset, *size);
        bar2.sparse_areas.push(area);
    }
    let irqs = vec![IrqInfo { index: 0, flags: 0b111, count: 1 }];
    let server = Server::new(&path, true, irqs, regions).expect("a socket");
    let notebook = Arc::<Mutex<Notebook>>::default();
    let mut backend = Backend(Arc::clone(&notebook));
    let thread = std::thread::spawn(move || server.run(&mut backend).expect("a session"));
    Theirs { path, notebook, memory, thread, _directory: directory }
}

/// The crate's type for an area holds one of `vfio-bindings`, which only inference can name here.
fn vfio_user_area() -> vfio_user::SparseArea {
    vfio_user::SparseArea { area: Default::default() }
}

impl Theirs {
    fn connect(&self) -> Client {
        Client::connect(&self.path, DEADLINE).expect("a session")
    }

    fn notebook(&self) -> std::sync::MutexGuard<'_, Notebook> {
        self.notebook.lock().expect("nobody panics with it")
    }

    /// Their server ends with its client.
    fn finish(self, client: Client) {
        drop(client);
        self.thread.join().expect("their server ends well");
    }
}

#[test]
fn our_client_speaks_plain_vfio_user_with_it() {
    let theirs = serve(&[]);
    let client = theirs.connect();
    assert_eq!(client.extensions(), BarkeepExtensions::default());
    assert!(matches!(client.region_state(0), Err(ClientError::NotOffered(_))));
    let info = client.device_info().expect("info");
    assert_eq!(info.flags, DeviceFlags::RESET | DeviceFlags::PCI);
    assert_eq!((info.num_regions, info.num_irqs), (9, 1));
    let irq = client.irq_info(0).expect("INTx");
    let flags = IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE | IrqInfoFlags::AUTOMASKED;
    assert_eq!((irq.count, irq.flags), (1, flags));

    for data in [&b"x"[..], b"four", b"a block of bytes"] {
        client.region_write(BAR0, 0x100, data).expect("a write");
        let mut back = vec![0; data.len()];
        client.region_read(BAR0, 0x100, &mut back).expect("a read");
        assert_eq!(back, data);
    }
    client.reset().expect("a reset");
    assert_eq!(theirs.notebook().resets, 1);
    theirs.finish(client);
}

#[test]
fn memory_and_interrupts_reach_it() {
    let theirs = serve(&[]);
    let client = theirs.connect();
    let map = DmaMap { access: DmaAccess::READ, file_offset: 0, address: 0x1000, size: SIZE };
    let file: OwnedFd = sealed(SIZE).into();
    client.dma_map(&map, Some(file)).expect("a window");
    assert_eq!(theirs.notebook().windows, [(0x1000, SIZE)]);
    let unmap = DmaUnmap::range(0x1000, SIZE);
    client.dma_unmap(&unmap).expect("the window");
    assert!(theirs.notebook().windows.is_empty());

    let counter = EventCounter::new();
    let eventfd = counter.as_fd().try_clone_to_owned().expect("a descriptor");
    let set = SetIrqs {
        action: IrqAction::Trigger,
        data: IrqData::Eventfd,
        index: 0,
        start: 0,
        count: 1,
    };
    client.set_irqs(&set, vec![eventfd]).expect("INTx");
    let given = std::mem::take(&mut theirs.notebook().eventfds);
    assert_eq!(rustix::io::write(&given[0], &1u64.to_ne_bytes()), Ok(8));
    assert_eq!(counter.take(), 1);
    theirs.finish(client);
}

#[test]
fn a_request_that_it_refuses_is_an_error_and_the_session_goes_on() {
    let theirs = serve(&[]);
    let client = theirs.connect();
    let refused = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused(errno)) => errno,
        other => unreachable!("it refuses: {other:?}"),
    };
    assert_eq!(refused(client.region_info(9).map(|_| ())), Errno::INVAL);
    // A backend's errno does not travel: the error bit comes with the number 0.
    assert_eq!(refused(client.region_read(BAR0, SIZE, &mut [0; 4])), Errno::IO);
    assert!(!client.is_dead());
    client.region_read(BAR0, 0, &mut [0; 4]).expect("a read");
    theirs.finish(client);
}

#[test]
fn a_region_with_sparse_areas_comes_with_its_file() {
    let theirs = serve(&[(0, 4096), (4096, 4096)]);
    let client = theirs.connect();
    let (info, file) = client.region_info(BAR2).expect("BAR2");
    assert!(info.flags.contains(RegionFlags::MMAP));
    let areas = [SparseArea { offset: 0, size: 4096 }, SparseArea { offset: 4096, size: 4096 }];
    assert_eq!(info.sparse, areas);
    let file = File::from(file.expect("the file to map"));
    file.write_all_at(b"shared", 4096).expect("room");
    assert_eq!(bytes_at(&theirs.memory, 4096, 6), b"shared");
    theirs.finish(client);
}

/// "When this flag is set, the reply will include a file descriptor": theirs leaves it out unless
/// the region has sparse areas. Our client must live with a region that claims to be mappable.
#[test]
fn a_region_without_sparse_areas_comes_without_its_file() {
    let theirs = serve(&[]);
    let client = theirs.connect();
    let (info, file) = client.region_info(BAR2).expect("BAR2");
    assert!(info.flags.contains(RegionFlags::MMAP));
    assert!(info.sparse.is_empty());
    assert!(file.is_none());
    theirs.finish(client);
}
