use std::os::fd::BorrowedFd;

use super::frame::Frame;
use super::socket::Socket;
use super::tap::Tap;

/// The other end of the device's wire. It has ports, from each of which one pair of queues receives;
/// pairs beyond the last port only transmit.
#[derive(Debug)]
pub(super) enum Link {
    /// An interface of the host.
    Tap(Tap),
    /// Another process.
    Socket(Socket),
}

/// What came of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// A frame.
    Frame,
    /// Something that is no frame; there may be more behind it.
    Unusable,
    /// There is nothing until the port wakes.
    Nothing,
}

impl Link {
    /// The feature bits of offloads that it allows.
    pub(super) fn offloads(&self) -> u64 {
        match self {
            Self::Tap(tap) => tap.offloads(),
            // What goes through a socket is as on a wire.
            Self::Socket(_) => 0,
        }
    }

    /// Its ports as descriptors that become readable.
    pub(super) fn ports(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => tap.ports(),
            Self::Socket(socket) => vec![socket.port()],
        }
    }

    /// Takes the next frame of a port.
    pub(super) fn receive(&mut self, port: usize, frame: &mut Frame) -> Received {
        match self {
            Self::Tap(tap) => tap.receive(port, frame),
            Self::Socket(socket) if port == 0 => socket.receive(frame),
            Self::Socket(_) => Received::Nothing,
        }
    }

    /// Sends a frame of a pair of queues. Returns whether it is on its way: like a network, the link
    /// loses what it can't take at once.
    pub(super) fn transmit(&mut self, pair: usize, frame: &Frame) -> bool {
        match self {
            Self::Tap(tap) => tap.transmit(pair, frame),
            Self::Socket(socket) => socket.transmit(frame),
        }
    }

    /// The driver agreed to these features.
    pub(super) fn negotiated(&mut self, features: u64) {
        if let Self::Tap(tap) = self {
            tap.negotiated(features);
        }
    }

    /// Only the first so many pairs receive.
    pub(super) fn set_pairs(&mut self, pairs: u16) {
        if let Self::Tap(tap) = self {
            tap.set_pairs(pairs);
        }
    }
}
