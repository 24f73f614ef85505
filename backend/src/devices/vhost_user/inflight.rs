use std::os::fd::{AsFd, OwnedFd};

use vhost::vhost_user::message::FrontendReq;

use super::daemon::Daemon;
use super::exchange::DaemonError;

/// The memory in which a daemon keeps track of what it is doing ("Inflight I/O tracking"). It
/// outlives the daemon here, and the next one begins anew what it finds there.
///
/// It is the daemon's: nothing of it is read or mapped here.
#[derive(Debug)]
pub(super) struct Inflight {
    file: OwnedFd,
    description: [u8; DESCRIPTION],
}

/// "Inflight description": sizes of the area and where it starts, queues and their size, with the
/// padding that a C compiler puts behind it.
const DESCRIPTION: usize = 24;

impl Inflight {
    /// Asks a daemon for memory for so many queues of this size.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn new(
        daemon: &mut Daemon,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, DaemonError> {
        const REQUEST: FrontendReq = FrontendReq::GET_INFLIGHT_FD;
        let mut description = [0; DESCRIPTION];
        description[16..18].copy_from_slice(&queues.to_ne_bytes());
        description[18..20].copy_from_slice(&queue_size.to_ne_bytes());
        let asked = description;
        daemon.exchange.send_request(REQUEST, &asked)?;
        let file = daemon.exchange.receive_fd(REQUEST, &mut description)?;
        if description[..8] == [0; 8] || description[16..20] != asked[16..20] {
            return Err(DaemonError::Malformed(REQUEST));
        }
        Ok(Self { file, description })
    }

    /// Gives the memory to a daemon: the one it is from, or a later one.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn hand_over(&self, daemon: &mut Daemon) -> Result<(), DaemonError> {
        let fds = [self.file.as_fd()];
        daemon.exchange.tell(FrontendReq::SET_INFLIGHT_FD, &self.description, &fds)
    }
}
