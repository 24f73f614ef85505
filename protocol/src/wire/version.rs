use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::WireError;
use super::limits::{
    DEFAULT_MESSAGE_FDS, MAX_DATA_XFER_SIZE, MAX_DMA_MAPS, MAX_MESSAGE_FDS, MAX_VERSION_DATA,
    PAGE_SIZES,
};

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
    /// A second socket for the server's own commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// barkeep's extensions; only ever answered to a peer that proposed them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub barkeep: Option<BarkeepExtensions>,
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

    /// What a barkeep client proposes.
    #[must_use]
    pub fn proposal() -> Self {
        let extensions = BarkeepExtensions { memory_fault: true, region_state: true };
        Self {
            major: Self::MAJOR,
            minor: Self::MINOR,
            capabilities: Capabilities { barkeep: Some(extensions), ..Capabilities::ours() },
        }
    }

    /// A barkeep server's answer to `self`: the lower minor version, our limits, and of the
    /// extensions those that both sides have.
    ///
    /// # Errors
    /// [`WireError::MajorVersion`] when the peer speaks an incompatible protocol.
    pub fn answer(&self) -> Result<Self, WireError> {
        if self.major != Self::MAJOR {
            return Err(WireError::MajorVersion(self.major));
        }
        let barkeep = self.capabilities.barkeep.map(|theirs| BarkeepExtensions {
            memory_fault: theirs.memory_fault,
            region_state: theirs.region_state,
        });
        Ok(Self {
            major: Self::MAJOR,
            minor: self.minor.min(Self::MINOR),
            capabilities: Capabilities { barkeep, ..Capabilities::ours() },
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
    let value: Value = serde_json::from_slice(json).map_err(invalid)?;
    // Where an object belongs, serde would also take an array of its members.
    let capabilities = value.get("capabilities");
    let member = |name| capabilities.and_then(|capabilities| capabilities.get(name));
    let objects = [Some(&value), capabilities, member("twin_socket"), member("barkeep")];
    if !objects.into_iter().flatten().all(|object| object.is_object() || object.is_null()) {
        return Err(WireError::VersionData("an object is missing".into()));
    }
    serde_json::from_value(value).map_err(invalid)
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
