//! What a service manager calls the descriptors that it holds for us.

use std::fmt::{self, Write};

use crate::state::FdKey;

/// The longest name that systemd takes: `FDNAME_MAX`.
const MAX_NAME: usize = 255;
/// Room for the slash and the longest of what follows it, a key.
const MAX_FUNCTION: usize = MAX_NAME - 1 - 20;

/// Separates a function from what is held for it. No function has it in its name: it names a file.
const SEPARATOR: char = '/';
const LISTENER: &str = "listener";
const STATE: &str = "state";
const CLIENT: &str = "client";

/// What is held for a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// The socket on which its clients connect.
    Listener,
    /// The memory in which its state outlives its worker.
    State,
    /// The socket of the client that it serves.
    Client,
    /// What its worker has asked to be held.
    Fd(FdKey),
}

/// A descriptor in a service manager's hands: `disk/state`, `disk/17`.
///
/// systemd allows printable ASCII without a colon, `:`, which separates names in `LISTEN_FDNAMES`. All
/// else in a function's name becomes `%XX`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdName {
    /// The name of the function.
    pub function: String,
    /// What it is for the function.
    pub what: What,
}

impl FdName {
    /// Whether descriptors of a function with this name can be held.
    #[must_use]
    pub fn suits(function: &str) -> bool {
        !function.is_empty()
            && !function.contains(SEPARATOR)
            && escape(function).len() <= MAX_FUNCTION
    }

    /// The name of something that was held, from what [`Display`](fmt::Display) made of it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (function, what) = text.split_once(SEPARATOR)?;
        let what = match what {
            LISTENER => What::Listener,
            STATE => What::State,
            CLIENT => What::Client,
            key => What::Fd(FdKey(key.parse().ok()?)),
        };
        Some(Self { function: unescape(function)?, what })
    }
}

impl fmt::Display for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{SEPARATOR}", escape(&self.function))?;
        match self.what {
            What::Listener => f.write_str(LISTENER),
            What::State => f.write_str(STATE),
            What::Client => f.write_str(CLIENT),
            What::Fd(FdKey(key)) => write!(f, "{key}"),
        }
    }
}

/// What a listener is called that a service manager has opened for a function.
pub(super) fn activated(function: &str) -> String {
    escape(function)
}

/// A function's name in the characters that a service manager takes.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b':' | b'%') {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02x}");
        }
    }
    escaped
}

/// The function's name of which [`escape`] made this.
pub(super) fn unescape(escaped: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        rest = tail;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
    }
    String::from_utf8(bytes).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rule of systemd's own (`fdname_is_valid`).
    fn systemd_takes(name: &str) -> bool {
        let characters = name.bytes().all(|byte| (b' '..127).contains(&byte) && byte != b':');
        characters && !name.is_empty() && name.len() <= MAX_NAME
    }

    fn name(function: &str, what: What) -> FdName {
        FdName { function: function.into(), what }
    }

    #[test]
    fn names_can_be_read_by_an_operator() {
        assert_eq!(name("disk", What::State).to_string(), "disk/state");
        assert_eq!(name("disk", What::Listener).to_string(), "disk/listener");
        assert_eq!(name("edu0", What::Client).to_string(), "edu0/client");
        assert_eq!(name("a:b", What::Fd(FdKey(17))).to_string(), "a%3ab/17");
    }

    #[test]
    fn names_of_others_mean_nothing() {
        for text in [
            "",
            "disk",
            "/state",
            "disk/",
            "disk/other",
            "disk/-1",
            "disk/1/2",
            "%zz/state",
            "%/1",
            "%é/1",
        ] {
            assert_eq!(FdName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn functions_without_a_name_that_can_be_held_are_told() {
        assert!(FdName::suits("disk") && FdName::suits(&"x".repeat(MAX_FUNCTION)));
        for function in ["", "a/b", &"x".repeat(MAX_FUNCTION + 1), &"é".repeat(40)] {
            assert!(!FdName::suits(function), "{function}");
        }
    }

    proptest! {
        #[test]
        fn every_name_is_taken_by_systemd_and_comes_back(function in ".{1,30}", key: u64) {
            prop_assume!(FdName::suits(&function));
            for what in [What::Listener, What::State, What::Client, What::Fd(FdKey(key))] {
                let name = name(&function, what);
                prop_assert!(systemd_takes(&name.to_string()), "{name}");
                prop_assert_eq!(FdName::parse(&name.to_string()), Some(name));
            }
        }
    }
}
