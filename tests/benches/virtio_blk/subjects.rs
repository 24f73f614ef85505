//! Who does the requests.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use barkeep_tests::virtio::requests::{BlkData, blk};
use barkeep_tests::virtio::{DATA, Driver, Event, Function, Memory, Setup};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::Kind;
use crate::image::{BLOCK, Image, Places};
use crate::servers::Server;

/// The most requests at once.
const DEPTH: usize = 32;

/// Does requests, so many at once.
pub(crate) trait Subject {
    fn perform(&mut self, kind: Kind, depth: usize, requests: usize);
}

/// The kernel alone: each request is one read or write of this process.
#[derive(Debug)]
pub(crate) struct Floor {
    file: File,
    data: Vec<u8>,
}

impl Floor {
    pub(crate) fn new(image: &Image) -> Self {
        Self { file: image.open(), data: vec![0; BLOCK] }
    }
}

impl Subject for Floor {
    fn perform(&mut self, kind: Kind, _: usize, requests: usize) {
        let mut places = Places::new();
        for _ in 0..requests {
            let place = places.next();
            match kind {
                Kind::Read => self.file.read_exact_at(&mut self.data, place).unwrap(),
                Kind::Write => self.file.write_all_at(&self.data, place).unwrap(),
            }
        }
    }
}

/// Over vfio-user, by the tests' own driver.
#[derive(Debug)]
pub(crate) struct VfioUser(Driver);

impl VfioUser {
    pub(crate) fn connect(server: &Server) -> Self {
        let function = Arc::new(Function::connect(&server.socket));
        let memory = Arc::new(Memory::new((DEPTH * BLOCK) as u64));
        memory.map(&function.client);
        // Without FLUSH, every write would have to be durable.
        let setup = Setup::default();
        let features = setup.features | blk::ALL;
        Self(Driver::start(&function, &memory, Setup { features, ..setup }))
    }

    fn send(&mut self, kind: Kind, slot: usize, place: u64) -> u16 {
        let length = u32::try_from(BLOCK).unwrap();
        let data = DATA + (slot * BLOCK) as u64;
        let (request, data) = match kind {
            Kind::Read => (blk::T_IN, BlkData::In(data, length)),
            Kind::Write => (blk::T_OUT, BlkData::Out(data, length)),
        };
        self.0.send_blk(0, slot, request, place / blk::SECTOR, data)
    }
}

impl Subject for VfioUser {
    fn perform(&mut self, kind: Kind, depth: usize, requests: usize) {
        let mut places = Places::new();
        let mut slots = vec![0; 256];
        for slot in 0..depth {
            let head = self.send(kind, slot, places.next());
            slots[usize::from(head)] = slot;
        }
        for done in 0..requests {
            let Event::Used(_, used) = self.0.wait() else { unreachable!("nothing else happens") };
            let slot = slots[usize::from(used.head)];
            assert_eq!(self.0.blk_status(slot), blk::S_OK);
            if done + depth < requests {
                let head = self.send(kind, slot, places.next());
                slots[usize::from(head)] = slot;
            }
        }
    }
}

/// Over vhost-user, by the crate `virtio-driver`.
pub(crate) struct VhostUser {
    queue: VirtioBlkQueue<'static, usize>,
    done: Arc<EventFd>,
    room: Vec<u8>,
    _data: File,
    transport: Box<VirtioBlkTransport>,
}

impl VhostUser {
    pub(crate) fn connect(server: &Server) -> Self {
        let features = VirtioFeatureFlags::VERSION_1
            | VirtioFeatureFlags::RING_EVENT_IDX
            | VirtioFeatureFlags::RING_INDIRECT_DESC;
        let features = features.bits() | VirtioBlkFeatureFlags::all().bits();
        let socket = server.socket.to_str().unwrap();
        let transport = virtio_driver::VhostUser::new(socket, features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let room = vec![0; DEPTH * BLOCK];
        let data = File::from(memfd_create("barkeep-bench", MemfdFlags::CLOEXEC).unwrap());
        data.set_len(room.len() as u64).unwrap();
        let address = room.as_ptr().addr();
        transport.map_mem_region(address, room.len(), data.as_raw_fd(), 0).unwrap();
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, 128).unwrap();
        let mut queue = queues.remove(0);
        queue.set_used_notif_enabled(true);
        let done = transport.get_completion_fd(0);
        Self { queue, done, room, _data: data, transport }
    }

    fn send(&mut self, kind: Kind, slot: usize, place: u64) {
        let room = &mut self.room[slot * BLOCK..(slot + 1) * BLOCK];
        match kind {
            Kind::Read => self.queue.read(place, room, slot).unwrap(),
            Kind::Write => self.queue.write(place, room, slot).unwrap(),
        }
    }

    fn kick(&mut self) {
        if self.queue.avail_notif_needed() {
            self.transport.get_submission_notifier(0).notify().unwrap();
        }
    }
}

impl Subject for VhostUser {
    fn perform(&mut self, kind: Kind, depth: usize, requests: usize) {
        let mut places = Places::new();
        for slot in 0..depth {
            self.send(kind, slot, places.next());
        }
        self.kick();
        let (mut sent, mut done) = (depth, 0);
        let mut free = Vec::with_capacity(depth);
        while done < requests {
            free.extend(self.queue.completions().map(|done| {
                assert_eq!(done.ret, 0);
                done.context
            }));
            done += free.len();
            if free.is_empty() {
                poll(&mut [PollFd::from_borrowed_fd(self.done.as_fd(), PollFlags::IN)], None)
                    .unwrap();
                self.done.read().unwrap();
            }
            for slot in free.drain(..) {
                if sent < requests {
                    self.send(kind, slot, places.next());
                    sent += 1;
                }
            }
            self.kick();
        }
    }
}
