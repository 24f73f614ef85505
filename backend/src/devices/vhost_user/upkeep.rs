//! The daemon comes and goes.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::bridge::{Bridge, Link};
use super::daemon::Daemon;
use super::exchange::{Arrived, DaemonError};
use super::rings::Ring;
use super::wakes::Wake;
use crate::devices::virtio::pci::World;

/// How long to wait before a daemon is tried again: at first, and after many failures.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A daemon that accepts connections and then says nothing costs everybody its patience each time.
const SILENCE_FACTOR: u32 = 8;
/// How often what the daemon asks is read before others have their turn.
const CHANNEL_READS: usize = 16;

impl Bridge {
    /// There is a daemon; its connection is watched.
    pub(super) fn welcome(&mut self, daemon: Daemon) -> Result<(), DaemonError> {
        if let Some(channel) = daemon.exchange.channel() {
            self.wakes.watch(channel, Wake::Channel)?;
        }
        self.link = Link::Up(Box::new(daemon));
        self.up_since = Instant::now();
        Ok(())
    }

    /// The daemon is gone, and is waited for. What it had of the driver's requests is with its
    /// memory of them, or with nobody.
    pub(super) fn lost(&mut self, error: DaemonError) {
        self.rings.iter_mut().for_each(Ring::lose);
        self.shadow = None;
        self.has_inflight = false;
        let stable = matches!(self.link, Link::Up(_)) && self.up_since.elapsed() > LONGEST_PAUSE;
        self.pause = match error {
            _ if stable => FIRST_PAUSE,
            DaemonError::Silent => self.options.patience * SILENCE_FACTOR,
            _ => (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
        };
        if matches!(self.link, Link::Up(_)) {
            self.complain(error);
        }
        self.link = Link::Down;
        self.wakes.set_timer(self.pause);
    }

    fn complain(&mut self, error: DaemonError) {
        let socket = self.options.socket.display();
        if let Some(suppressed) = self.log.admit() {
            warn!(%socket, suppressed, "requests wait for a daemon that can serve them: {error}");
        }
    }

    /// The time has come to try whether the daemon is back.
    pub(super) fn try_again(&mut self) {
        if !matches!(self.link, Link::Down) {
            return;
        }
        let greeted = Daemon::greet(&self.options.socket, self.options.patience);
        let watched = greeted.and_then(|exchange| {
            self.wakes.watch(exchange.socket(), Wake::Daemon)?;
            Ok(exchange)
        });
        match watched {
            Ok(exchange) => self.link = Link::Greeted(exchange),
            Err(error) => self.lost(error),
        }
    }

    /// Something happened on the connection. Returns whether the daemon is there anew.
    pub(super) fn look_at_daemon(&mut self, world: &mut World<'_>) -> bool {
        let (arrived, expected) = match &self.link {
            Link::Up(daemon) => (daemon.exchange.peek(), false),
            Link::Greeted(exchange) => (exchange.peek(), true),
            Link::Down => return false,
        };
        match arrived {
            Ok(Arrived::Nothing) => false,
            Ok(Arrived::Something) if expected => self.come_back(world),
            Ok(Arrived::Something) => {
                self.lost(DaemonError::Unsolicited);
                false
            }
            Err(error) => {
                self.lost(error);
                false
            }
        }
    }

    /// A daemon answered the greeting.
    fn come_back(&mut self, world: &mut World<'_>) -> bool {
        let Link::Greeted(exchange) = std::mem::replace(&mut self.link, Link::Down) else {
            return false;
        };
        let (kind, requests) = (self.options.kind, self.options.requests);
        let result = Daemon::negotiate(exchange, kind, requests).and_then(|mut daemon| {
            let changed = self.config.refresh(&mut daemon)?;
            self.welcome(daemon)?;
            Ok(changed)
        });
        match result {
            Ok(changed) => {
                let socket = self.options.socket.display();
                if let Some(suppressed) = self.log.admit() {
                    info!(%socket, suppressed, "the daemon is back");
                }
                if changed {
                    world.interrupt_config();
                }
                true
            }
            Err(error) => {
                self.complain(error);
                self.lost(error);
                false
            }
        }
    }

    /// Serves what the daemon asks.
    pub(super) fn serve_channel(&mut self) {
        let Link::Up(daemon) = &mut self.link else { return };
        if (0..CHANNEL_READS).all(|_| daemon.exchange.serve_channel()) {
            self.wakes.again();
        }
    }
}
