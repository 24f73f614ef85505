//! Who asks: bytes made by hand, or a client library.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use barkeep_shim::client::Client;
use barkeep_tests::peer::message::{COMMAND, command, message, u32_at};
use barkeep_tests::peer::requests::{CONFIG, access, pci, write};
use barkeep_tests::peer::version_body;

use crate::servers::Served;

/// The registers of `edu` that are accessed: identification, and liveness.
const READ_AT: u64 = 0;
const WRITE_AT: u64 = 4;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Access {
    Read,
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "REGION_READ",
            Self::Write => "REGION_WRITE",
        })
    }
}

/// Something that accesses a register of 4 bytes, and waits for the answer.
pub(crate) trait Measured {
    fn perform(&mut self, access: Access);
}

/// The least that a client can do: one write, one read, no look at what it reads.
#[derive(Debug)]
pub(crate) struct Raw {
    socket: UnixStream,
    read: Vec<u8>,
    write: Vec<u8>,
}

/// Sizes of the answers: header, fixed part, and the data of a read.
const READ_REPLY: usize = 16 + 16 + 4;
const WRITE_REPLY: usize = 16 + 16;

impl Raw {
    /// Connects to function `index`. A client that polls asks its socket again and again.
    pub(crate) fn connect(served: &Served, index: usize, polls: bool) -> Self {
        let mut socket = UnixStream::connect(served.socket(index)).unwrap();
        if served.speaks_vfio_user() {
            let json = r#"{"capabilities":{"max_msg_fds":16}}"#;
            call(&mut socket, command::VERSION, &version_body(0, 1, json));
            let enable = write(CONFIG, pci::COMMAND, &pci::MEMORY_SPACE.to_le_bytes());
            call(&mut socket, command::REGION_WRITE, &enable);
        }
        socket.set_nonblocking(polls).unwrap();
        let read = message(1, command::REGION_READ, COMMAND, &access(0, READ_AT, 4));
        let write = message(2, command::REGION_WRITE, COMMAND, &write(0, WRITE_AT, &[1, 2, 3, 4]));
        Self { socket, read, write }
    }
}

impl Measured for Raw {
    fn perform(&mut self, access: Access) {
        let (request, size) = match access {
            Access::Read => (&self.read, READ_REPLY),
            Access::Write => (&self.write, WRITE_REPLY),
        };
        self.socket.write_all(request).unwrap();
        let mut reply = [0; 64];
        let mut filled = 0;
        while filled < size {
            match self.socket.read(&mut reply[filled..]) {
                Ok(0) => panic!("the server is gone"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(filled, size);
    }
}

/// One request on the way to what is measured, which must succeed.
fn call(socket: &mut UnixStream, command: u16, body: &[u8]) {
    socket.write_all(&message(9, command, COMMAND, body)).unwrap();
    let mut header = [0; 16];
    socket.read_exact(&mut header).unwrap();
    assert_eq!(u32_at(&header, 8), 1, "command {command} failed");
    let mut body = vec![0; u32_at(&header, 4) as usize - header.len()];
    socket.read_exact(&mut body).unwrap();
}

/// The client that a VMM embeds.
#[derive(Debug)]
pub(crate) struct Shim(Client);

impl Shim {
    pub(crate) fn connect(served: &Served, index: usize) -> Self {
        let client = Client::connect(served.socket(index), Duration::from_secs(5)).unwrap();
        client.region_write(CONFIG, pci::COMMAND, &pci::MEMORY_SPACE.to_le_bytes()).unwrap();
        Self(client)
    }
}

impl Measured for Shim {
    fn perform(&mut self, access: Access) {
        match access {
            Access::Read => self.0.region_read(0, READ_AT, &mut [0; 4]).unwrap(),
            Access::Write => self.0.region_write(0, WRITE_AT, &[1, 2, 3, 4]).unwrap(),
        }
    }
}

/// The client of the crate `vfio_user`.
pub(crate) struct Their(vfio_user::Client);

impl Their {
    pub(crate) fn connect(served: &Served, index: usize) -> Self {
        let mut client = vfio_user::Client::new(served.socket(index)).unwrap();
        client.region_write(CONFIG, pci::COMMAND, &pci::MEMORY_SPACE.to_le_bytes()).unwrap();
        Self(client)
    }
}

impl Measured for Their {
    fn perform(&mut self, access: Access) {
        match access {
            Access::Read => self.0.region_read(0, READ_AT, &mut [0; 4]).unwrap(),
            Access::Write => self.0.region_write(0, WRITE_AT, &[1, 2, 3, 4]).unwrap(),
        }
    }
}
