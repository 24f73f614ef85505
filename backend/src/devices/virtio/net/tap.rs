use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use tracing::warn;

use super::frame::Frame;
use super::ioctl::{self, Interface, Named};
use super::link::Received;
use super::spec::{feature, header};

/// A tap: an interface of the host whose wire is in this process. Each of its queues is a port.
#[derive(Debug)]
pub(super) struct Tap {
    queues: Vec<Queue>,
    /// The feature bits that its kernel allows.
    offloads: u64,
}

#[derive(Debug)]
struct Queue {
    file: File,
    /// Whether the kernel gives frames to it.
    attached: bool,
    /// Whether it was told that the queue can't be read.
    reported: bool,
}

/// The clone device of taps.
const TUN: &str = "/dev/net/tun";

/// What a tap must be able to do: `<linux/if_tun.h>`.
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What the kernel may leave to the driver, and the feature that allows it. Each needs those above.
const RECEIVE_OFFLOADS: [(libc::c_uint, u64); 5] = [
    (libc::TUN_F_CSUM, feature::GUEST_CSUM),
    (libc::TUN_F_TSO4, feature::GUEST_TSO4),
    (libc::TUN_F_TSO6, feature::GUEST_TSO6),
    (libc::TUN_F_TSO_ECN, feature::GUEST_ECN),
    (libc::TUN_F_UFO, feature::GUEST_UFO),
];

/// What the kernel does for the driver if it does the same in the other direction.
const TRANSMIT_OFFLOADS: [(u64, u64); 5] = [
    (feature::GUEST_CSUM, feature::CSUM),
    (feature::GUEST_TSO4, feature::HOST_TSO4),
    (feature::GUEST_TSO6, feature::HOST_TSO6),
    (feature::GUEST_ECN, feature::HOST_ECN),
    (feature::GUEST_UFO, feature::HOST_UFO),
];

impl Tap {
    /// Attaches to the tap of this name, which must be there, with so many queues.
    ///
    /// # Errors
    /// Why not, in one line.
    pub(super) fn open(name: &str, queues: u16) -> Result<Self, String> {
        let interface =
            Interface::new(name).ok_or_else(|| format!("'{name}' is no name of an interface"))?;
        let told = |reason: String| format!("{name}: {reason}");
        // The kernel would make a new one, if it is allowed to.
        exists(name).map_err(told)?;
        let files = match queues {
            1 => match attach(interface, false) {
                // One with several queues, perhaps.
                Err(Refused::Kind) => attach(interface, true).map(|file| vec![file]),
                file => file.map(|file| vec![file]),
            },
            _ => (0..queues).map(|_| attach(interface, true)).collect(),
        };
        let files = files.map_err(|refused| told(refused.told(queues)))?;
        Self::new(files).map_err(|errno| told(errno.to_string()))
    }

    /// Takes over a tap that somebody attached.
    ///
    /// # Errors
    /// Why not, in one line.
    pub(super) fn inherited(fd: OwnedFd) -> Result<Self, String> {
        let mut interface = Interface::default();
        ioctl::interface(fd.as_fd(), Named::GetInterface, &mut interface)
            .map_err(|_| "neither a tap nor a UNIX datagram socket".to_owned())?;
        let flags = libc::c_int::from(interface.flags());
        if flags & TAP_FLAGS != TAP_FLAGS {
            return Err("the tap is not of the kind IFF_TAP, IFF_NO_PI, IFF_VNET_HDR".to_owned());
        }
        fcntl_getfl(&fd)
            .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .and_then(|()| Self::new(vec![File::from(fd)]))
            .map_err(|errno| errno.to_string())
    }

    fn new(files: Vec<File>) -> Result<Self, Errno> {
        let queue = |file| Queue { file, attached: true, reported: false };
        let mut tap = Self { queues: files.into_iter().map(queue).collect(), offloads: 0 };
        let fd = tap.control();
        ioctl::set_header_size(fd, header::SIZE.try_into().unwrap_or(libc::c_int::MAX))?;
        tap.offloads = probe(fd);
        tap.negotiated(0);
        tap.set_pairs(1);
        Ok(tap)
    }

    /// The feature bits of offloads that the kernel knows.
    pub(super) fn offloads(&self) -> u64 {
        self.offloads
    }

    /// Its queues.
    pub(super) fn ports(&self) -> Vec<BorrowedFd<'_>> {
        self.queues.iter().map(|queue| queue.file.as_fd()).collect()
    }

    /// Takes the next frame of a queue.
    pub(super) fn receive(&mut self, port: usize, frame: &mut Frame) -> Received {
        let Some(queue) = self.queues.get_mut(port) else {
            return Received::Nothing;
        };
        match frame.fill(|bytes| queue.file.read(bytes)) {
            Ok(true) => Received::Frame,
            Ok(false) => Received::Unusable,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Received::Nothing,
            Err(error) => {
                if !std::mem::replace(&mut queue.reported, true) {
                    warn!("tap: nothing can be received: {error}");
                }
                Received::Nothing
            }
        }
    }

    /// Sends a frame. What the kernel can't take is lost.
    pub(super) fn transmit(&mut self, pair: usize, frame: &Frame) -> bool {
        // A tap that was inherited has one queue for all of them.
        let queue = pair % self.queues.len();
        (&self.queues[queue].file).write(frame.bytes()).is_ok()
    }

    /// The driver takes frames that the kernel did not finish, as far as these features go.
    pub(super) fn negotiated(&mut self, features: u64) {
        let mut offloads = 0;
        if features & feature::GUEST_CSUM != 0 {
            let wanted = RECEIVE_OFFLOADS.iter().filter(|(_, bit)| features & bit != 0);
            offloads = wanted.fold(0, |offloads, (offload, _)| offloads | offload);
            if offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
                // The kernel refuses it alone.
                offloads &= !libc::TUN_F_TSO_ECN;
            }
        }
        if let Err(errno) = ioctl::set_offloads(self.control(), offloads) {
            // Frames that the driver does not take will be dropped.
            warn!("tap: its offloads can't be set: {errno}");
        }
    }

    /// Lets the kernel spread frames over the first so many queues.
    pub(super) fn set_pairs(&mut self, pairs: u16) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let attached = index < usize::from(pairs);
            if attached != queue.attached {
                let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
                let mut request = Interface::default().with_flags(flag_bits(flags));
                match ioctl::interface(queue.file.as_fd(), Named::SetQueue, &mut request) {
                    Ok(()) => queue.attached = attached,
                    Err(errno) => warn!("tap: queue {index} can't be switched: {errno}"),
                }
            }
        }
    }

    /// A descriptor for what concerns all queues.
    fn control(&self) -> BorrowedFd<'_> {
        self.queues.first().expect("a tap has at least one queue").file.as_fd()
    }
}

/// Why the kernel did not attach a descriptor to a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    /// There is no clone device, or it can't be opened.
    Clone(Errno),
    /// The kernel's taps are too old.
    Old,
    /// It is no tap, or its number of queues is of the other kind.
    Kind,
    /// Something else.
    Other(Errno),
}

impl Refused {
    /// One line for the operator.
    fn told(self, queues: u16) -> String {
        match self {
            Self::Clone(errno) => format!("{TUN}: {errno}"),
            Self::Old => "this kernel's taps have no IFF_VNET_HDR".to_owned(),
            Self::Kind if queues > 1 => "no tap with several queues (multi_queue)".to_owned(),
            Self::Kind => "no tap".to_owned(),
            Self::Other(Errno::BUSY) => "in use by another process".to_owned(),
            Self::Other(Errno::PERM) => "not permitted: the tap belongs to another user".to_owned(),
            Self::Other(errno) => errno.to_string(),
        }
    }
}

fn exists(name: &str) -> Result<(), String> {
    let any = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    match any.and_then(|socket| netdevice::name_to_index(socket, name)) {
        Ok(_) => Ok(()),
        Err(Errno::NODEV) => Err("there is no such interface".to_owned()),
        Err(errno) => Err(errno.to_string()),
    }
}

fn attach(interface: Interface, several_queues: bool) -> Result<File, Refused> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open(TUN, flags, Mode::empty()).map_err(Refused::Clone)?;
    let known = ioctl::features(fd.as_fd()).map_err(Refused::Other)?;
    if known & libc::IFF_VNET_HDR.cast_unsigned() == 0 {
        return Err(Refused::Old);
    }
    let flags = if several_queues { TAP_FLAGS | libc::IFF_MULTI_QUEUE } else { TAP_FLAGS };
    let mut request = interface.with_flags(flag_bits(flags));
    match ioctl::interface(fd.as_fd(), Named::SetInterface, &mut request) {
        Ok(()) => Ok(File::from(fd)),
        Err(Errno::INVAL) => Err(Refused::Kind),
        Err(errno) => Err(Refused::Other(errno)),
    }
}

/// Which features the kernel supports, found by trying.
fn probe(fd: BorrowedFd<'_>) -> u64 {
    let mut accepted = 0;
    let mut features = 0;
    for (offload, bit) in RECEIVE_OFFLOADS {
        if ioctl::set_offloads(fd, accepted | offload).is_ok() {
            accepted |= offload;
            features |= bit;
        } else if bit == feature::GUEST_CSUM {
            return 0;
        }
    }
    let both = TRANSMIT_OFFLOADS.iter().filter(|(receive, _)| features & receive != 0);
    both.fold(features, |features, (_, transmit)| features | transmit)
}

/// Flags of interfaces are 16 bits wide.
fn flag_bits(flags: libc::c_int) -> u16 {
    let [low, high, ..] = flags.to_le_bytes();
    u16::from_le_bytes([low, high])
}
