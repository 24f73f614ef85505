//! A vfio-user client as QEMU has one: a socket that does not wait, a thread that reads whatever comes,
//! a header by one `recvmsg` and the rest by others, and callers that wait for their reply.

use std::collections::HashMap;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::raw::{self, Answer, Errno};

pub(crate) const VERSION: u16 = 1;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const GET_REGION_INFO: u16 = 5;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
pub(crate) const REGION_STATE: u16 = 0x8002;
/// Configuration space.
pub(crate) const CONFIG: u32 = 7;

/// What QEMU 11 proposes.
const CAPABILITIES: &str = r#"{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "max_msg_fds": 8, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;

/// A reply: the errno that it carries, or payload and descriptors.
pub(crate) type Reply = Result<(Vec<u8>, Vec<i32>), Errno>;

#[derive(Debug, Default)]
struct Waiting {
    replies: HashMap<u16, Reply>,
    expected: HashMap<u16, u16>,
    broken: Option<String>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) fd: i32,
    next: AtomicU16,
    sending: Mutex<()>,
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Proxy {
    /// Connects, agrees on a version, and leaves the reading to a thread. Returns the connection and
    /// the server's capabilities.
    pub(crate) fn connect(path: &str) -> Answer<(Arc<Self>, String)> {
        let socket =
            UnixStream::connect(path).map_err(|error| error.raw_os_error().unwrap_or(0))?;
        socket.set_nonblocking(true).map_err(|_| 0)?;
        let proxy = Arc::new(Self {
            fd: socket.into_raw_fd(),
            next: AtomicU16::new(0),
            sending: Mutex::default(),
            waiting: Mutex::default(),
            arrived: Condvar::new(),
        });
        let reader = Arc::clone(&proxy);
        std::thread::spawn(move || reader.read_all());
        let mut body = vec![0, 0, 0, 0];
        body.extend_from_slice(CAPABILITIES.as_bytes());
        body.push(0);
        let (reply, _) = proxy.call(VERSION, &body, &[])?;
        let text = reply.get(4..).unwrap_or_default();
        Ok((proxy, String::from_utf8_lossy(text).into_owned()))
    }

    /// Sends a command and waits for its reply. A connection that broke is EPIPE.
    pub(crate) fn call(&self, command: u16, body: &[u8], fds: &[i32]) -> Reply {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let size = u32::try_from(16 + body.len()).map_err(|_| libc::EMSGSIZE)?;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&id.to_le_bytes());
        message.extend_from_slice(&command.to_le_bytes());
        message.extend_from_slice(&size.to_le_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(body);
        self.lock().expected.insert(id, command);
        self.send(&message, fds)?;
        let deadline = Duration::from_secs(10);
        let arrived =
            |waiting: &mut Waiting| !waiting.replies.contains_key(&id) && waiting.broken.is_none();
        let (mut waiting, _) = self
            .arrived
            .wait_timeout_while(self.lock(), deadline, arrived)
            .unwrap_or_else(PoisonError::into_inner);
        waiting.replies.remove(&id).unwrap_or(Err(libc::EPIPE))
    }

    fn send(&self, message: &[u8], fds: &[i32]) -> Answer<()> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sent = 0;
        while sent < message.len() {
            // The descriptors go with the first piece.
            let fds = if sent == 0 { fds } else { &[] };
            match raw::sendmsg(self.fd, &[&message[sent..]], fds) {
                Ok(count) => sent += count,
                Err(libc::EAGAIN | libc::EINTR) => raw::poll(self.fd, libc::POLLOUT)?,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Why the reader gave up, if it did.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_all(&self) {
        loop {
            if let Err(trouble) = self.read_one() {
                self.lock().broken = Some(trouble);
                self.arrived.notify_all();
                return;
            }
        }
    }

    /// As strict as QEMU: a header comes in one piece, and replies are to what was asked.
    fn read_one(&self) -> Result<(), String> {
        let mut header = [0; 16];
        let (count, fds) = self.receive(&mut header)?;
        match count {
            16 => {}
            0 => return Err("end of file".into()),
            short => return Err(format!("a header of {short} bytes")),
        }
        let word =
            |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or_default());
        let id = u16::from_le_bytes([header[0], header[1]]);
        let command = u16::from_le_bytes([header[2], header[3]]);
        let (size, flags, errno) = (word(4), word(8), word(12));
        let mut body = vec![0; (size as usize).saturating_sub(16)];
        let mut filled = 0;
        while filled < body.len() {
            let (count, more) = self.receive(&mut body[filled..])?;
            if count == 0 {
                return Err("end of file inside a message".into());
            }
            if !more.is_empty() {
                return Err("descriptors inside a message".into());
            }
            filled += count;
        }
        if flags & 0xf == 0 {
            return self.answer_request(id, command, &body);
        }
        let mut waiting = self.lock();
        if waiting.expected.remove(&id) != Some(command) {
            return Err(format!("unexpected reply {id} to {command:#x}"));
        }
        let reply = if flags & 0x20 == 0 { Ok((body, fds)) } else { Err(errno.cast_signed()) };
        waiting.replies.insert(id, reply);
        self.arrived.notify_all();
        Ok(())
    }

    /// The server's own commands: DMA is repeated without its data.
    fn answer_request(&self, id: u16, command: u16, body: &[u8]) -> Result<(), String> {
        let body = body.get(..16).unwrap_or(body);
        let size = u32::try_from(16 + body.len()).unwrap_or(16);
        let mut message = [id.to_le_bytes(), command.to_le_bytes()].concat();
        for word in [size, 1, 0] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(body);
        self.send(&message, &[]).map_err(|errno| format!("errno {errno} in a reply"))
    }

    fn receive(&self, data: &mut [u8]) -> Result<(usize, Vec<i32>), String> {
        loop {
            match raw::recvmsg(self.fd, data, 0) {
                Ok(received) => return Ok(received),
                Err(libc::EAGAIN | libc::EINTR) => {
                    raw::poll(self.fd, libc::POLLIN).map_err(|errno| format!("poll {errno}"))?;
                }
                Err(errno) => return Err(format!("errno {errno}")),
            }
        }
    }

    pub(crate) fn read(&self, region: u32, offset: u64, len: u32) -> Answer<Vec<u8>> {
        let (body, _) = self.call(REGION_READ, &access(region, offset, len), &[])?;
        Ok(body.get(16..).unwrap_or_default().to_vec())
    }

    pub(crate) fn read_u32(&self, region: u32, offset: u64) -> Answer<u32> {
        let data = self.read(region, offset, 4)?;
        data.try_into().map(u32::from_le_bytes).map_err(|_| libc::EPROTO)
    }

    pub(crate) fn write(&self, region: u32, offset: u64, data: &[u8]) -> Answer<()> {
        let mut body = access(region, offset, u32::try_from(data.len()).unwrap_or(0));
        body.extend_from_slice(data);
        self.call(REGION_WRITE, &body, &[]).map(drop)
    }
}

fn access(region: u32, offset: u64, len: u32) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend_from_slice(&region.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body
}

/// Words, as most payloads are.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
