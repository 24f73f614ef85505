//! The host's side of QEMU's own `ivshmem-doorbell`: hands the shared memory and an eventfd for
//! each vector to one client (QEMU's docs/specs/ivshmem-spec.rst, "Client-Server protocol").

use std::fs::OpenOptions;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::Result;

const VERSION: i64 = 0;
const SHARED_MEMORY: i64 = -1;
const OWN_ID: i64 = 7;

/// Serves one client until it leaves.
///
/// # Errors
/// A path can't be used, or the client leaves early.
pub(crate) fn serve(socket: &str, memory: &str, vectors: usize) -> Result<()> {
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let listener = UnixListener::bind(socket)?;
    let (mut client, _) = listener.accept()?;
    send(&client, VERSION, None)?;
    send(&client, OWN_ID, None)?;
    send(&client, SHARED_MEMORY, Some(memory.as_fd()))?;
    for _ in 0..vectors {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        send(&client, OWN_ID, Some(event.as_fd()))?;
    }
    // A client sends nothing: this returns when it has gone.
    client.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn send(client: &UnixStream, message: i64, fd: Option<BorrowedFd<'_>>) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(fd) = &fd {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
    }
    let bytes = message.to_le_bytes();
    sendmsg(client, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty())?;
    Ok(())
}
