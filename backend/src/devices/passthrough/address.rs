use std::fmt;
use std::str::FromStr;

/// Where a PCI function is in the host: domain, bus, device and function number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is no address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no PCI address such as 0000:00:02.0 or 00:02.0")]
pub struct NoPciAddress(String);

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    fn from_str(text: &str) -> Result<Self, NoPciAddress> {
        parse(text).ok_or_else(|| NoPciAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.split_once('.')?;
    let mut numbers = rest.rsplitn(3, ':');
    let device = hexadecimal(numbers.next()?, 2)?;
    let bus = hexadecimal(numbers.next()?, 2)?;
    let domain = numbers.next().map_or(Some(0), |domain| hexadecimal(domain, 8))?;
    let function = hexadecimal(function, 1)?;
    (device < 32 && function < 8).then_some(PciAddress {
        domain,
        bus: u8::try_from(bus).ok()?,
        device: u8::try_from(device).ok()?,
        function: u8::try_from(function).ok()?,
    })
}

/// A number of at most `digits` digits, and of nothing but digits.
fn hexadecimal(text: &str, digits: usize) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (plain && text.len() <= digits).then(|| u32::from_str_radix(text, 16).ok())?
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}
