use std::collections::BTreeMap;
use std::str::FromStr;

use super::ConfigError;

/// A parsed `name,key=value,...`. A comma inside a value is written `,,`, as in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Which device.
    pub name: String,
    /// Its parameters.
    pub parameters: Parameters,
}

/// Parameters that have not been used yet. A device takes those that it knows; what is left over
/// in the end is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(BTreeMap<String, String>);

impl FromStr for DeviceSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut fields = split_fields(text).into_iter();
        let name = fields.next().filter(|name| !name.is_empty()).ok_or(ConfigError::NoName)?;
        let mut parameters = BTreeMap::new();
        for field in fields {
            let Some((key, value)) = field.split_once('=') else {
                return Err(ConfigError::NotKeyValue(field));
            };
            if parameters.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(ConfigError::Duplicate(key.to_owned()));
            }
        }
        Ok(Self { name, parameters: Parameters(parameters) })
    }
}

/// Splits at single commas; a double comma is one comma of the field.
fn split_fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("there is always a last field");
        match character {
            ',' if characters.next_if_eq(&',').is_some() => field.push(','),
            ',' => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

impl Parameters {
    /// Takes a parameter as it is written.
    pub fn take_string(&mut self, key: &'static str) -> Option<String> {
        self.0.remove(key)
    }

    /// Takes a number: decimal, or hexadecimal after `0x`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when it is none.
    pub fn take_number(&mut self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        self.0
            .remove(key)
            .map(|text| {
                let error = || ConfigError::invalid(key, format!("'{text}' is no number"));
                parse_number(&text).ok_or_else(error)
            })
            .transpose()
    }

    /// Takes a size in bytes: a number, or one with a suffix `K`, `M`, `G` or `T` (powers of 1024).
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when it is none or does not fit into 64 bits.
    pub fn take_size(&mut self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        self.0.remove(key).map(|text| parse_size(key, &text)).transpose()
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// [`ConfigError::UnknownParameter`] with a parameter that nobody took.
    pub fn finish(self) -> Result<(), ConfigError> {
        match self.0.into_keys().next() {
            Some(key) => Err(ConfigError::UnknownParameter(key)),
            None => Ok(()),
        }
    }
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn parse_size(key: &'static str, text: &str) -> Result<u64, ConfigError> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    parse_number(digits)
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| ConfigError::invalid(key, format!("'{text}' is no size such as 4M")))
}
