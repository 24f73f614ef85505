use std::path::PathBuf;
use std::time::Duration;

use super::config::Made;
use super::kinds::{KINDS, Kind, Layout};
use crate::config::{ConfigError, Parameters};
use crate::devices::virtio::spec::DeviceType;

/// What an operator says about a function that a daemon serves:
/// `vhost-user,type=TYPE,socket=PATH[,queues=N][,queue-size=N]`, and `tag=` for a file system,
/// `guest-cid=` for a socket device, `mac=` for a network, `tracking=on|off` for a disk.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) kind: &'static Kind,
    pub(super) socket: PathBuf,
    /// Request queues, for the types that have them.
    pub(super) requests: u16,
    pub(super) queue_size: u16,
    /// What of the configuration the operator decides.
    pub(super) made: Made,
    /// Whether requests of a daemon that keeps no track of them are [relayed](super::relay).
    pub(super) tracking: bool,
    /// How long the daemon may take for what is asked of it at one time.
    pub(super) patience: Duration,
}

/// A daemon that takes longer counts as gone. It is well below what a VMM waits for an answer of
/// ours, and others are served by this process too.
const PATIENCE: Duration = Duration::from_secs(2);
const QUEUE_SIZE: u16 = 256;
/// libvhost-user's limit.
const MAX_QUEUE_SIZE: u16 = 1024;
/// More than any daemon has, with room for the others below the 256 that a message can name.
const MAX_REQUESTS: u64 = 128;
/// 5.11.4
const TAG: usize = 36;

impl Options {
    pub(super) fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let name = parameters.take_string("type").ok_or(ConfigError::Missing("type"))?;
        let kind = Kind::named(&name).ok_or_else(|| {
            let known = KINDS.map(|kind| kind.name).join(", ");
            ConfigError::invalid("type", format!("'{name}' is none of {known}"))
        })?;
        let socket = parameters.take_string("socket").ok_or(ConfigError::Missing("socket"))?;
        Ok(Self {
            kind,
            socket: socket.into(),
            requests: requests(kind, parameters)?,
            queue_size: queue_size(parameters)?,
            made: made(kind, parameters)?,
            tracking: tracking(kind, parameters)?,
            patience: PATIENCE,
        })
    }
}

fn requests(kind: &Kind, parameters: &mut Parameters) -> Result<u16, ConfigError> {
    let Some(queues) = parameters.take_number("queues")? else { return Ok(1) };
    let most = match kind.layout {
        Layout::Requests { .. } => MAX_REQUESTS,
        Layout::Fixed(_) | Layout::Partly { .. } => 1,
    };
    if !(1..=most).contains(&queues) {
        let reason = match most {
            1 => format!("{queues} is not 1, and {} has no more", kind.name),
            most => format!("{queues} is not 1 to {most}"),
        };
        return Err(ConfigError::invalid("queues", reason));
    }
    Ok(u16::try_from(queues).expect("at most MAX_REQUESTS"))
}

fn queue_size(parameters: &mut Parameters) -> Result<u16, ConfigError> {
    let Some(size) = parameters.take_number("queue-size")? else { return Ok(QUEUE_SIZE) };
    let fits = u16::try_from(size).ok();
    fits.filter(|size| size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(size)).ok_or_else(
        || {
            let reason = format!("{size} is no power of two from 2 to {MAX_QUEUE_SIZE}");
            ConfigError::invalid("queue-size", reason)
        },
    )
}

fn tracking(kind: &Kind, parameters: &mut Parameters) -> Result<bool, ConfigError> {
    if !kind.resumes {
        return Ok(false);
    }
    match parameters.take_string("tracking").as_deref() {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => {
            Err(ConfigError::invalid("tracking", format!("'{other}' is neither on nor off")))
        }
    }
}

/// A parameter of another type is left, and refused with all that nobody takes.
fn made(kind: &Kind, parameters: &mut Parameters) -> Result<Made, ConfigError> {
    match kind.device_type {
        DeviceType::FS => parameters.take_string("tag").map(|tag| parse_tag(&tag)).transpose(),
        DeviceType::VSOCK => parameters.take_number("guest-cid")?.map(parse_cid).transpose(),
        DeviceType::NET => {
            let mac = parameters.take_string("mac").map(|mac| parse_mac(&mac)).transpose()?;
            return Ok(Made::Net { mac });
        }
        _ => Ok(None),
    }
    .map(|made| made.unwrap_or(Made::Nothing))
}

fn parse_tag(tag: &str) -> Result<Made, ConfigError> {
    let mut bytes = [0; TAG];
    if tag.is_empty() || tag.len() > TAG || tag.bytes().any(|byte| byte == 0) {
        let reason = format!("'{tag}' has {} bytes, not 1 to {TAG}", tag.len());
        return Err(ConfigError::invalid("tag", reason));
    }
    bytes[..tag.len()].copy_from_slice(tag.as_bytes());
    Ok(Made::Tag(bytes))
}

/// 5.10.4: 0 to 2 and the largest 32-bit number are reserved, and the upper half is zero.
fn parse_cid(cid: u64) -> Result<Made, ConfigError> {
    if !(3..u64::from(u32::MAX)).contains(&cid) {
        let reason = format!("{cid} is not 3 to {}", u32::MAX - 1);
        return Err(ConfigError::invalid("guest-cid", reason));
    }
    Ok(Made::Cid(cid))
}

fn parse_mac(text: &str) -> Result<[u8; 6], ConfigError> {
    let byte = |part: &str| {
        let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        u8::from_str_radix(part, 16).ok().filter(|_| digits)
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    // The lowest bit of the first byte makes it an address of many.
    mac.filter(|mac| mac[0] & 1 == 0).ok_or_else(|| {
        ConfigError::invalid("mac", format!("'{text}' is no address such as 52:54:00:12:34:56"))
    })
}
