use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits::{
    DEFAULT_MESSAGE_FDS, MAX_DATA_XFER_SIZE, MAX_DMA_MAPS, MAX_MESSAGE_FDS, MAX_VERSION_DATA,
    PAGE_SIZES,
};
use super::{PageBitmap, WireError};

/// A proposal or an answer of "VFIO_USER_VERSION".
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    /// Major version: incompatible when it differs.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// The `capabilities` object of the version data. Names that are not known are ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// File descriptors that the sender takes in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// Bytes of data that the sender takes in one transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// DMA windows that may be valid at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes of DMA windows, or'ed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Whether REGION_WRITE_MULTI is understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// How dirty pages are told. Not in the specification: QEMU, libvfio-user and the `vfio_user`
    /// crate have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationCapability>,
    /// A second socket for the server's own commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// barkeep's extensions; only ever answered to a peer that proposed them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub barkeep: Option<BarkeepExtensions>,
}

/// The `migration` object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationCapability {
    /// Page size of dirty bitmaps, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// The largest dirty bitmap that the sender handles, in bytes. Only QEMU has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bitmap_size: Option<u64>,
}

bitflags! {
    /// What one side has beside the commands that everybody has. It is offered only to a peer that
    /// knows its name.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offer: u32 {
        /// REGION_WRITE_MULTI.
        const WRITE_MULTIPLE = 1 << 0;
        /// The function can be migrated: the `migration` object.
        const MIGRATION = 1 << 1;
        /// The server's own commands on a socket of their own. A server that offers it has created
        /// that socket: it is descriptor [`TwinSocket::FD_INDEX`] of its reply, and the only one.
        const TWIN_SOCKET = 1 << 2;
    }
}

/// The `twin_socket` object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// Whether the sender supports it.
    pub supported: bool,
    /// Which of the reply's file descriptors is the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// The `barkeep` object: one member for each extension (docs/protocol.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BarkeepExtensions {
    /// Memory faults on BARs may be forwarded.
    pub memory_fault: bool,
    /// Decode, epoch and counters of a region may be asked for.
    pub region_state: bool,
    /// A page of memory may be had that shows what the function decodes. Named only where it is: clients
    /// from before it named two members, and get two.
    #[serde(skip_serializing_if = "is_false")]
    pub decode_page: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

impl BarkeepExtensions {
    /// All of them.
    #[must_use]
    pub fn all() -> Self {
        Self { memory_fault: true, region_state: true, decode_page: true }
    }
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct VersionData {
    capabilities: Capabilities,
}

impl Version {
    /// The protocol version that barkeep speaks: 0.2 and everything below.
    pub const MAJOR: u16 = 0;
    /// See [`Version::MAJOR`].
    pub const MINOR: u16 = 2;

    /// What a barkeep client proposes that has nothing to [`Offer`].
    #[must_use]
    pub fn proposal() -> Self {
        Self::proposal_with(Offer::empty())
    }

    /// What a barkeep client proposes.
    #[must_use]
    pub fn proposal_with(offer: Offer) -> Self {
        let has = |what| offer.contains(what);
        let twin_socket = TwinSocket { supported: true, fd_index: None };
        Self {
            major: Self::MAJOR,
            minor: Self::MINOR,
            capabilities: Capabilities {
                barkeep: Some(BarkeepExtensions::all()),
                write_multiple: has(Offer::WRITE_MULTIPLE).then_some(true),
                migration: has(Offer::MIGRATION).then(MigrationCapability::ours),
                twin_socket: has(Offer::TWIN_SOCKET).then_some(twin_socket),
                ..Capabilities::ours()
            },
        }
    }

    /// A barkeep server's answer to `self` when it has nothing to [`Offer`].
    ///
    /// # Errors
    /// See [`answer_with`](Self::answer_with).
    pub fn answer(&self) -> Result<Self, WireError> {
        self.answer_with(Offer::empty())
    }

    /// A barkeep server's answer to `self`: the lower minor version, our limits, and of the
    /// extensions and of what is offered that which both sides have. It has no name beyond our limits
    /// that the client did not send: "the capability list must be a subset of those proposed", and
    /// QEMU warns.
    ///
    /// # Errors
    /// [`WireError::MajorVersion`] when the peer speaks an incompatible protocol.
    pub fn answer_with(&self, offer: Offer) -> Result<Self, WireError> {
        if self.major != Self::MAJOR {
            return Err(WireError::MajorVersion(self.major));
        }
        let both = offer & self.capabilities.offer();
        let has = |what| both.contains(what);
        let theirs = self.capabilities.migration.unwrap_or_default();
        let twin_socket = TwinSocket { supported: true, fd_index: Some(TwinSocket::FD_INDEX) };
        Ok(Self {
            major: Self::MAJOR,
            minor: self.minor.min(Self::MINOR),
            capabilities: Capabilities {
                // We have all that there are.
                barkeep: self.capabilities.barkeep,
                write_multiple: has(Offer::WRITE_MULTIPLE).then_some(true),
                migration: has(Offer::MIGRATION).then(|| theirs.answer()),
                twin_socket: has(Offer::TWIN_SOCKET).then_some(twin_socket),
                ..Capabilities::ours()
            },
        })
    }

    /// Parses the payload of a request or reply.
    ///
    /// # Errors
    /// [`WireError`] when it is short, or its JSON is not terminated, not JSON or of other types.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        let short = WireError::Length { expected: 4, actual: body.len() };
        let (numbers, data) = body.split_first_chunk::<4>().ok_or(short)?;
        let [a, b, c, d] = *numbers;
        let major = u16::from_ne_bytes([a, b]);
        let minor = u16::from_ne_bytes([c, d]);
        // A foreign major version may have another layout behind the numbers.
        let capabilities = if data.is_empty() || major != Self::MAJOR {
            Capabilities::default()
        } else {
            parse_data(data)?.capabilities
        };
        Ok(Self { major, minor, capabilities })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.major.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.minor.to_ne_bytes());
        let data = VersionData { capabilities: self.capabilities.clone() };
        serde_json::to_writer(&mut bytes, &data).expect("plain data always serialises");
        bytes.push(0);
        bytes
    }
}

fn parse_data(data: &[u8]) -> Result<VersionData, WireError> {
    if data.len() > MAX_VERSION_DATA {
        return Err(WireError::VersionData(format!("longer than {MAX_VERSION_DATA} bytes")));
    }
    let Some((0, json)) = data.split_last() else {
        return Err(WireError::VersionData("not terminated by NUL".into()));
    };
    let invalid = |error: serde_json::Error| WireError::VersionData(error.to_string());
    // Of a member that is there twice, a `Value` would keep the last; here it is an error.
    let data = serde_json::from_slice(json).map_err(invalid)?;
    let value: Value = serde_json::from_slice(json).map_err(invalid)?;
    // Where an object belongs, serde would also take an array of its members.
    let capabilities = value.get("capabilities");
    let member = |name| capabilities.and_then(|capabilities| capabilities.get(name));
    let members = ["twin_socket", "migration", "barkeep"].map(member);
    let objects = [Some(&value), capabilities].into_iter().chain(members);
    if !objects.flatten().all(|object| object.is_object() || object.is_null()) {
        return Err(WireError::VersionData("an object is missing".into()));
    }
    Ok(data)
}

impl TwinSocket {
    /// Which descriptor of a barkeep server's answer the socket is.
    pub const FD_INDEX: u64 = 0;
}

impl MigrationCapability {
    /// What this implementation has.
    #[must_use]
    pub fn ours() -> Self {
        Self { pgsize: Some(PAGE_SIZES), max_bitmap_size: Some(u64::from(PageBitmap::MAX_SIZE)) }
    }

    /// Our page size and the smaller bitmap, of these what `self` names.
    fn answer(self) -> Self {
        let largest = u64::from(PageBitmap::MAX_SIZE);
        Self {
            pgsize: self.pgsize.and(Some(PAGE_SIZES)),
            max_bitmap_size: self.max_bitmap_size.map(|theirs| theirs.min(largest)),
        }
    }
}

impl Capabilities {
    /// The limits of this implementation.
    #[must_use]
    pub fn ours() -> Self {
        Self {
            max_msg_fds: Some(MAX_MESSAGE_FDS as u64),
            max_data_xfer_size: Some(u64::from(MAX_DATA_XFER_SIZE)),
            max_dma_maps: Some(MAX_DMA_MAPS as u64),
            pgsizes: Some(PAGE_SIZES),
            ..Self::default()
        }
    }

    /// What the sender of these capabilities has.
    #[must_use]
    pub fn offer(&self) -> Offer {
        let mut offer = Offer::empty();
        offer.set(Offer::WRITE_MULTIPLE, self.write_multiple == Some(true));
        offer.set(Offer::MIGRATION, self.migration.is_some());
        let twin_socket = self.twin_socket.as_ref().is_some_and(|twin| twin.supported);
        offer.set(Offer::TWIN_SOCKET, twin_socket);
        offer
    }

    /// For a client that proposed a twin socket: which of the `fds` descriptors of this answer it is,
    /// or `None` if the server uses the one socket for everything.
    ///
    /// # Errors
    /// [`WireError::FdIndex`] when the server has one that did not come with its answer: the session
    /// can't go on.
    pub fn twin_socket_fd(&self, fds: usize) -> Result<Option<usize>, WireError> {
        let Some(twin) = self.twin_socket.as_ref().filter(|twin| twin.supported) else {
            return Ok(None);
        };
        let index = twin.fd_index.unwrap_or(u64::MAX);
        match usize::try_from(index) {
            Ok(index) if index < fds => Ok(Some(index)),
            _ => Err(WireError::FdIndex(index)),
        }
    }

    /// File descriptors that the sender of these capabilities takes in one message.
    #[must_use]
    pub fn message_fds(&self) -> usize {
        self.max_msg_fds
            .map_or(DEFAULT_MESSAGE_FDS, |n| usize::try_from(n).unwrap_or(usize::MAX))
            .min(MAX_MESSAGE_FDS)
    }

    /// Bytes of data that both sides take in one transfer.
    #[must_use]
    pub fn data_xfer_size(&self) -> u32 {
        self.max_data_xfer_size
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(MAX_DATA_XFER_SIZE)
            .min(MAX_DATA_XFER_SIZE)
    }
}
