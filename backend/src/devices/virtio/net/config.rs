use std::fmt;
use std::str::FromStr;

use super::spec::config;

/// The configuration as the driver reads it (5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    /// The device's address.
    pub(super) mac: MacAddress,
    /// How many pairs of queues there are.
    pub(super) max_pairs: u16,
    /// The largest IP packet in bytes, if the operator set one.
    pub(super) mtu: Option<u16>,
}

impl Config {
    /// Reads from `offset` on, as far as there are fields.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let [a, b, c, d, e, f] = self.mac.0;
        // There is always somebody at the other end as far as a driver can tell.
        let [status, status_high] = config::LINK_UP.to_le_bytes();
        let [pairs, pairs_high] = self.max_pairs.to_le_bytes();
        let [mtu, mtu_high] = self.mtu.unwrap_or(0).to_le_bytes();
        let bytes = [a, b, c, d, e, f, status, status_high, pairs, pairs_high, mtu, mtu_high];
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset)) {
            *to = *from;
        }
    }
}

/// The address of one interface: neither of several, nor none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address with these bytes, if they are one.
    pub(super) fn new(bytes: [u8; 6]) -> Option<Self> {
        let several = bytes[0] & 1 != 0;
        (!several && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The address that random bytes make: locally administered.
    pub(super) fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    /// Its bytes.
    pub(super) fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = String;

    /// Six pairs of hexadecimal digits with colons between them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            *byte = pairs
                .next()
                .filter(|pair| pair.len() == 2 && pair.bytes().all(|c| c.is_ascii_hexdigit()))
                .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                .ok_or_else(|| format!("'{text}' is not of the form 52:54:00:12:34:56"))?;
        }
        if pairs.next().is_some() {
            return Err(format!("'{text}' is not of the form 52:54:00:12:34:56"));
        }
        Self::new(bytes).ok_or_else(|| format!("'{text}' is not the address of one interface"))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
