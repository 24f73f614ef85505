use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::rand::{GetRandomFlags, getrandom};

use super::config::MacAddress;
use super::ioctl;
use super::link::Link;
use super::socket::Socket;
use super::spec::config;
use super::tap::Tap;
use crate::config::{ConfigError, Parameters};
use crate::devices::virtio::rate_limit::Limits;

/// What an operator says about a network device.
#[derive(Debug)]
pub(super) struct Options {
    /// `tap=IFNAME`, `socket=PATH[,peer=PATH]` or `fd=N`.
    pub(super) link: Link,
    /// `mac=ADDRESS`; a random one by default.
    pub(super) mac: MacAddress,
    /// `mtu=BYTES`.
    pub(super) mtu: Option<u16>,
    /// `queues=PAIRS`; one by default.
    pub(super) pairs: u16,
    /// `queue-size=ENTRIES`.
    pub(super) queue_size: u16,
    /// `iops=FRAMES` and `bps=BYTES` a second, in each direction.
    pub(super) limits: Limits,
}

/// With the control queue, no more queues than there are bits in the masks that vhost-user servers
/// keep of them.
const MAX_PAIRS: u16 = 16;
const QUEUE_SIZE: u16 = 256;
/// The largest of the specification (2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

impl Options {
    /// Takes them, and opens the link.
    ///
    /// # Errors
    /// [`ConfigError`] with what can't be used.
    pub(super) fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let pairs = number(parameters, "queues", 1, MAX_PAIRS)?.unwrap_or(1);
        let mtu = number(parameters, "mtu", config::MIN_MTU, u16::MAX)?;
        let queue_size = number(parameters, "queue-size", 2, MAX_QUEUE_SIZE)?.unwrap_or(QUEUE_SIZE);
        if !queue_size.is_power_of_two() {
            let reason = format!("{queue_size} is no power of two");
            return Err(ConfigError::invalid("queue-size", reason));
        }
        let mac = match parameters.take_string("mac") {
            Some(text) => {
                text.parse().map_err(|reason: String| ConfigError::invalid("mac", reason))?
            }
            None => random_mac()?,
        };
        let limits = Limits::from_parameters(parameters)?;
        // Last: it leaves its trace outside of this process.
        let link = link(parameters, pairs)?;
        Ok(Self { link, mac, mtu, pairs, queue_size, limits })
    }
}

fn link(parameters: &mut Parameters, pairs: u16) -> Result<Link, ConfigError> {
    let tap = parameters.take_string("tap");
    let socket = parameters.take_string("socket");
    let fd = parameters.take_number("fd")?;
    match (tap, socket, fd) {
        (Some(name), None, None) => {
            let tap = Tap::open(&name, pairs);
            tap.map(Link::Tap).map_err(|reason| ConfigError::invalid("tap", reason))
        }
        (None, Some(path), None) => {
            let socket = Socket::bind(Path::new(&path))
                .map_err(|reason| ConfigError::invalid("socket", reason))?;
            match parameters.take_string("peer") {
                None => Ok(Link::Socket(socket)),
                Some(peer) => {
                    let socket = socket.with_peer(Path::new(&peer));
                    socket.map(Link::Socket).map_err(|reason| ConfigError::invalid("peer", reason))
                }
            }
        }
        (None, None, Some(number)) => {
            inherited(number).map_err(|reason| ConfigError::invalid("fd", reason))
        }
        _ => Err(ConfigError::invalid("tap", "a device has exactly one of tap, socket and fd")),
    }
}

fn inherited(number: u64) -> Result<Link, String> {
    // Those below are not inherited for a device.
    let number = RawFd::try_from(number)
        .ok()
        .filter(|number| *number > 2)
        .ok_or_else(|| format!("{number} is no descriptor that can be inherited"))?;
    let fd = ioctl::inherited(number).map_err(|errno| format!("{number}: {errno}"))?;
    let link = if is_datagram_socket(&fd) {
        Socket::inherited(fd).map(Link::Socket)
    } else {
        Tap::inherited(fd).map(Link::Tap)
    };
    link.map_err(|reason| format!("{number}: {reason}"))
}

fn is_datagram_socket(fd: &OwnedFd) -> bool {
    sockopt::socket_type(fd) == Ok(SocketType::DGRAM)
        && sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
}

fn number(
    parameters: &mut Parameters,
    key: &'static str,
    min: u16,
    max: u16,
) -> Result<Option<u16>, ConfigError> {
    let in_range = |number| {
        u16::try_from(number).ok().filter(|number| (min..=max).contains(number)).ok_or_else(|| {
            ConfigError::invalid(key, format!("{number} is not from {min} to {max}"))
        })
    };
    parameters.take_number(key)?.map(in_range).transpose()
}

fn random_mac() -> Result<MacAddress, ConfigError> {
    let mut bytes = [0; 6];
    // So few bytes come at once or not at all.
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|errno| ConfigError::invalid("mac", format!("no random one: {errno}")))?;
    Ok(MacAddress::local(bytes))
}
