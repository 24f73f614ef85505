//! The ioctls of a tap, each with the argument that the kernel expects for it
//! (`<linux/if_tun.h>`), and descriptors that were inherited by their number.
#![expect(unsafe_code, reason = "ioctls have no safe interface")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// `struct ifreq`: the name of an interface, and what the request is about.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Interface {
    name: [u8; 16],
    data: [u8; 24],
}

impl Interface {
    /// An interface by its name, if that can be one.
    pub(super) fn new(name: &str) -> Option<Self> {
        if name.is_empty() || name.contains('\0') {
            return None;
        }
        let mut interface = Self::default();
        // The last byte stays zero.
        let place = interface.name.get_mut(..name.len()).filter(|place| place.len() < 16)?;
        place.copy_from_slice(name.as_bytes());
        Some(interface)
    }

    /// With the flags of TUNSETIFF.
    pub(super) fn with_flags(mut self, flags: u16) -> Self {
        self.data[..2].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    /// The flags of TUNGETIFF.
    pub(super) fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.data[0], self.data[1]])
    }

    /// With an IPv4 address.
    #[cfg(test)]
    pub(super) fn with_address(mut self, address: std::net::Ipv4Addr) -> Self {
        // `struct sockaddr_in`: family, port, address.
        self.data[..2].copy_from_slice(&2_u16.to_ne_bytes());
        self.data[4..8].copy_from_slice(&address.octets());
        self
    }
}

/// A request with an [`Interface`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Named {
    /// Attaches the descriptor to an interface.
    SetInterface,
    /// Tells the interface and its flags.
    GetInterface,
    /// Attaches or detaches a queue of the interface.
    SetQueue,
    /// Sets the flags of an interface of any kind.
    #[cfg(test)]
    SetFlags,
    /// Sets its address.
    #[cfg(test)]
    SetAddress,
}

/// Does a request with an interface.
pub(super) fn interface(
    fd: BorrowedFd<'_>,
    request: Named,
    interface: &mut Interface,
) -> Result<(), Errno> {
    let request = match request {
        Named::SetInterface => libc::TUNSETIFF,
        Named::GetInterface => libc::TUNGETIFF,
        Named::SetQueue => libc::TUNSETQUEUE,
        #[cfg(test)]
        Named::SetFlags => libc::SIOCSIFFLAGS,
        #[cfg(test)]
        Named::SetAddress => libc::SIOCSIFADDR,
    };
    // SAFETY: for these requests the kernel reads and writes one `struct ifreq`, which has the size
    // of an `Interface` and any bytes for its values.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut *interface) }).map(drop)
}

const _: () = assert!(size_of::<Interface>() == size_of::<libc::ifreq>());

/// Sets the length of the header in front of a frame.
pub(super) fn set_header_size(fd: BorrowedFd<'_>, size: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the kernel reads an int.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }).map(drop)
}

/// Says what the kernel may leave undone in the frames that it gives.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: libc::c_uint) -> Result<(), Errno> {
    let offloads = libc::c_ulong::from(offloads);
    // SAFETY: for this request the kernel takes the argument for a number.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) }).map(drop)
}

/// What the kernel's taps can do: IFF_ flags.
pub(super) fn features(fd: BorrowedFd<'_>) -> Result<libc::c_uint, Errno> {
    let mut features: libc::c_uint = 0;
    // SAFETY: the kernel writes an unsigned int.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETFEATURES, &raw mut features) })?;
    Ok(features)
}

/// Lets the interface outlive its descriptors.
#[cfg(test)]
pub(super) fn set_persistent(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let yes: libc::c_ulong = 1;
    // SAFETY: for this request the kernel takes the argument for a number.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, yes) }).map(drop)
}

/// A descriptor of our own for what this process inherited under a number.
pub(super) fn inherited(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel looks the number up, and fails if it is no descriptor.
    let fd = result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn result(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
