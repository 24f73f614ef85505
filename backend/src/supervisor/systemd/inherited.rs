//! What another process has left for this one (`sd_listen_fds(3)`).

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::process;

use rustix::io::Errno;
use thiserror::Error;

use super::fd_name::{FdName, What, unescape};
use crate::state::FdKey;
use crate::supervisor::inheritance;

/// The first descriptor that a service manager leaves open: `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;
/// What it calls those that have no name.
const NAMELESS: &str = "unknown";

/// Descriptors of a former supervisor, which a service manager or that supervisor itself has kept, and
/// sockets that the service manager has opened.
#[derive(Debug, Default)]
pub struct Inherited {
    functions: BTreeMap<String, HeldFunction>,
    /// What has no place: names under which something is still held elsewhere.
    strangers: Vec<String>,
}

/// What was held for a function.
#[derive(Debug, Default)]
pub struct HeldFunction {
    /// The socket on which its clients connect.
    pub listener: Option<Listener>,
    /// The memory in which its state outlives its worker.
    pub state: Option<OwnedFd>,
    /// The socket of the client that it serves.
    pub client: Option<OwnedFd>,
    /// What its worker has asked to be held.
    pub fds: BTreeMap<FdKey, OwnedFd>,
}

/// A listening socket of somebody else's making.
#[derive(Debug)]
pub enum Listener {
    /// A former supervisor's: its place in the file system is ours to remove in the end.
    Held(OwnedFd),
    /// The service manager's: it stays when the service ends.
    Activated(OwnedFd),
}

/// Why what was left can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InheritError {
    /// A variable of the environment says something else than it should.
    #[error("{0} is garbled")]
    Garbled(&'static str),
    /// A descriptor that was promised is not there.
    #[error("descriptor {0}: {1}")]
    Missing(RawFd, Errno),
}

impl Inherited {
    /// Takes what the service manager has left, if it did. To be called before anything else opens a
    /// descriptor that programs inherit.
    ///
    /// # Errors
    /// [`InheritError`] when its word can't be believed.
    pub fn from_service_manager() -> Result<Self, InheritError> {
        let variable = |name: &str| std::env::var(name).ok();
        let descriptors = announced(process::id(), variable)?;
        Self::take(descriptors)
    }

    /// Takes descriptors by name and number.
    pub(in crate::supervisor) fn take(
        descriptors: impl IntoIterator<Item = (String, RawFd)>,
    ) -> Result<Self, InheritError> {
        let mut inherited = Self::default();
        for (name, number) in descriptors {
            let fd =
                inheritance::take(number).map_err(|errno| InheritError::Missing(number, errno))?;
            inherited.add(&name, fd);
        }
        Ok(inherited)
    }

    fn add(&mut self, name: &str, fd: OwnedFd) {
        let Some(FdName { function, what }) = FdName::parse(name) else {
            // A socket unit calls a listener after its function, or after itself.
            match unescape(name).filter(|name| FdName::suits(name)) {
                Some(function) => {
                    let listener = Some(Listener::Activated(fd));
                    self.functions.entry(function).or_default().listener = listener;
                }
                None => self.strangers.push(name.to_owned()),
            }
            return;
        };
        let held = self.functions.entry(function).or_default();
        match what {
            What::Listener if held.listener.is_none() => held.listener = Some(Listener::Held(fd)),
            // The service manager's own comes first.
            What::Listener => {}
            What::State => held.state = Some(fd),
            What::Client => held.client = Some(fd),
            What::Fd(key) => drop(held.fds.insert(key, fd)),
        }
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty() && self.strangers.is_empty()
    }

    /// What was held for a function; nothing, if it is new. A client or descriptors without the state
    /// that knows of them are closed.
    pub fn function(&mut self, name: &str) -> HeldFunction {
        let mut held = self.functions.remove(name).unwrap_or_default();
        if held.state.is_none() {
            let listener = held.listener.take();
            self.strangers.extend(held.names(name));
            held = HeldFunction { listener, ..HeldFunction::default() };
        }
        held
    }

    /// The names of all that no function has asked for, which is closed.
    #[must_use]
    pub fn leftovers(self) -> Vec<String> {
        let names = self.functions.iter().flat_map(|(function, held)| held.names(function));
        names.chain(self.strangers.iter().cloned()).collect()
    }
}

impl HeldFunction {
    /// The names under which a service manager holds this.
    fn names(&self, function: &str) -> Vec<String> {
        let what = [
            matches!(self.listener, Some(Listener::Held(_))).then_some(What::Listener),
            self.state.as_ref().map(|_| What::State),
            self.client.as_ref().map(|_| What::Client),
        ];
        let what = what.into_iter().flatten().chain(self.fds.keys().copied().map(What::Fd));
        what.map(|what| FdName { function: function.to_owned(), what }.to_string()).collect()
    }
}

/// Names and numbers of the descriptors that the environment announces to this process.
fn announced(
    us: u32,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(String, RawFd)>, InheritError> {
    let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
        return Ok(Vec::new());
    };
    // Meant for a process that started us and did not clean up.
    if pid.parse() != Ok(us) {
        return Ok(Vec::new());
    }
    let garbled = InheritError::Garbled;
    let count: u16 = count.parse().map_err(|_| garbled("LISTEN_FDS"))?;
    let numbers = FIRST..FIRST + RawFd::from(count);
    let names: Vec<String> = match variable("LISTEN_FDNAMES") {
        Some(names) if count > 0 => names.split(':').map(str::to_owned).collect(),
        _ => vec![NAMELESS.to_owned(); count.into()],
    };
    if names.len() != usize::from(count) {
        return Err(garbled("LISTEN_FDNAMES"));
    }
    Ok(names.into_iter().zip(numbers).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn inherit(names: &[&str]) -> Inherited {
        let mut inherited = Inherited::default();
        for name in names {
            inherited.add(name, fd());
        }
        inherited
    }

    #[test]
    fn descriptors_come_back_to_the_functions_that_they_were_held_for() {
        let mut inherited = inherit(&[
            "a/state",
            "b/1",
            "a/client",
            "a/listener",
            "a/4294967296",
            "b/state",
            "a/2",
        ]);
        let HeldFunction { listener, state, client, fds } = inherited.function("a");
        assert!(matches!(listener, Some(Listener::Held(_))) && state.is_some() && client.is_some());
        assert_eq!(fds.into_keys().collect::<Vec<_>>(), [FdKey(2), FdKey(1 << 32)]);
        let b = inherited.function("b");
        assert!(b.listener.is_none() && b.client.is_none() && b.fds.len() == 1);
        assert!(inherited.is_empty());
    }

    #[test]
    fn what_has_no_state_is_not_gone_on_with() {
        let mut inherited = inherit(&["a/listener", "a/client", "a/1"]);
        let held = inherited.function("a");
        assert!(held.listener.is_some() && held.client.is_none() && held.fds.is_empty());
        assert_eq!(inherited.leftovers(), ["a/client", "a/1"]);
    }

    #[test]
    fn a_socket_that_the_service_manager_opened_comes_before_one_that_it_held() {
        for names in [["disk", "disk/listener"], ["disk/listener", "disk"]] {
            let held = inherit(&names).function("disk");
            assert!(matches!(held.listener, Some(Listener::Activated(_))), "{names:?}");
        }
    }

    #[test]
    fn what_nobody_asks_for_is_told() {
        let mut inherited = inherit(&["old/state", "old/client", "old/3", "x/y/z", "disk/state"]);
        inherited.function("disk");
        let mut leftovers = inherited.leftovers();
        leftovers.sort();
        assert_eq!(leftovers, ["old/3", "old/client", "old/state", "x/y/z"]);
    }

    #[test]
    fn what_the_service_manager_announces_is_found() {
        let find = |pid: &str, count: &str, names: Option<&str>| {
            announced(7, |variable| match variable {
                "LISTEN_PID" => Some(pid.to_owned()),
                "LISTEN_FDS" => Some(count.to_owned()),
                "LISTEN_FDNAMES" => names.map(str::to_owned),
                _ => None,
            })
        };
        let named = |name: &str, number| (name.to_owned(), number);
        let both = Ok(vec![named("a/state", 3), named("b", 4)]);
        assert_eq!(find("7", "2", Some("a/state:b")), both);
        assert_eq!(find("7", "1", None), Ok(vec![named("unknown", 3)]));
        // Of a service that was started without any, and of another process.
        assert_eq!(find("7", "0", Some("")), Ok(vec![]));
        assert_eq!(find("8", "2", Some("a/state:b")), Ok(vec![]));
        assert_eq!(announced(7, |_| None), Ok(vec![]));
        for (count, names) in [("2", "a"), ("1", "a:b")] {
            let garbled = Err(InheritError::Garbled("LISTEN_FDNAMES"));
            assert_eq!(find("7", count, Some(names)), garbled);
        }
        for count in ["", "-1", "many", "70000"] {
            assert_eq!(find("7", count, None), Err(InheritError::Garbled("LISTEN_FDS")));
        }
    }
}
