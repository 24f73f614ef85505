//! systemd, or any service manager that speaks `sd_notify(3)` and `sd_listen_fds(3)`.
//!
//! It is told what the service does, watches over it, opens its sockets, and above all holds its
//! descriptors: whatever ends the supervisor, the next one gets them back under the names that they
//! were stored with. Without such a manager all of this does nothing.

mod fd_name;
mod inherited;
mod notifier;
mod watch;

use std::os::fd::BorrowedFd;
use std::process;
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

use self::notifier::{Message, Notifier};

pub use fd_name::{FdName, What};
pub use inherited::{HeldFunction, InheritError, Inherited, Listener};
pub(super) use watch::Watch;

/// How often and how long a service manager is waited for in the end: a second.
const LAST_TRIES: u32 = 10;
const LAST_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What a service manager, or the program before this one, says to the supervisor alone. A worker that
/// had it could speak in its place.
pub const PRIVATE_ENVIRONMENT: [&str; 8] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "FDSTORE",
    super::upgrade::VARIABLE,
];

/// The service manager that started us, if one did.
#[derive(Debug, Default)]
pub struct ServiceManager {
    notifier: Option<Notifier>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Finds it by the environment. One that is there and can't be reached is logged.
    #[must_use]
    pub fn from_environment() -> Self {
        Self::find(|variable| std::env::var(variable).ok())
    }

    fn find(variable: impl Fn(&str) -> Option<String>) -> Self {
        let notifier = variable("NOTIFY_SOCKET").and_then(|place| {
            let notifier = Notifier::connect(&place);
            notifier.inspect_err(|errno| warn!("NOTIFY_SOCKET {place}: {errno}")).ok()
        });
        let for_us = variable("WATCHDOG_PID").is_none_or(|pid| pid == process::id().to_string());
        let watchdog = variable("WATCHDOG_USEC").filter(|_| for_us);
        let watchdog = watchdog.and_then(|time| u64::from_str(&time).ok()).filter(|time| *time > 0);
        Self { notifier, watchdog: watchdog.map(Duration::from_micros) }
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.notifier.is_some()
    }

    /// What to watch for being writable, by edges; [`flush`](Self::flush) then.
    #[must_use]
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.notifier.as_ref().map(Notifier::as_fd)
    }

    /// Goes on telling what there was no room for. Returns whether all has been told.
    pub fn flush(&mut self) -> bool {
        self.notifier.as_mut().is_none_or(Notifier::flush)
    }

    /// How often it wants to hear that we are [`alive`](Self::alive): twice in the time that it waits.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.is_there()).map(|time| time / 2)
    }

    /// The loop lives.
    pub fn alive(&mut self) {
        self.say("WATCHDOG=1\n".into());
    }

    /// Clients can connect to all functions.
    pub fn ready(&mut self) {
        self.say("READY=1\n".into());
    }

    /// What the service does, in a line for its operator.
    pub fn status(&mut self, status: &str) {
        self.say(format!("STATUS={}\n", status.replace(char::is_control, "?")));
    }

    /// Something is being loaded anew; [`ready`](Self::ready) follows.
    pub fn reloading(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.say(format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\n"));
    }

    /// The service ends.
    pub fn stopping(&mut self) {
        self.say("STOPPING=1\n".into());
    }

    /// Has a descriptor held for a function, beside what is held for it already.
    pub fn store(&mut self, function: &str, what: What, fd: BorrowedFd<'_>) {
        let name = FdName { function: function.into(), what }.to_string();
        self.send(Message::Store { name, fd });
    }

    /// Has it forgotten what it holds for a function under this name.
    pub fn forget(&mut self, function: &str, what: What) {
        let name = FdName { function: function.into(), what }.to_string();
        self.send(Message::Remove { name });
    }

    /// As [`forget`](Self::forget), by the name that it is held under.
    pub fn forget_named(&mut self, name: String) {
        self.send(Message::Remove { name });
    }

    /// Tells what there was no room for so far, before this process ends or becomes another program.
    pub fn finish(&mut self) {
        for _ in 0..LAST_TRIES {
            if self.flush() {
                return;
            }
            let Some(socket) = self.as_fd() else { return };
            // Whatever it says, it is tried again.
            let _ = poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&LAST_PAUSE));
        }
        warn!("the service manager does not listen");
    }

    fn say(&mut self, text: String) {
        self.send(Message::Say(text));
    }

    fn send(&mut self, message: Message<BorrowedFd<'_>>) {
        if let Some(notifier) = &mut self.notifier {
            notifier.send(message);
        }
    }
}

#[cfg(test)]
mod tests;
