//! What a server that is no barkeep decodes: its configuration space says, whenever it may have changed.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::introduce::BARS;
use super::outgoing::Configured;
use crate::device::config::{HEADER, addresses, decode, power_register};
use crate::device::{Decode, Placement};

/// Bytes of the configuration space that are looked at: those with the capabilities of old.
pub(super) const CONFIG_SPACE: usize = 256;

/// How long all looks at a device together may take.
const BUDGET: Duration = Duration::from_secs(5);
/// One that takes no longer does not count: there are as many as the guest likes.
const AT_ONCE: Duration = Duration::from_millis(20);

/// Where a device's BARs are, as far as is known. What a signal handler may see are single words.
#[derive(Debug, Default)]
pub(super) struct Shadow {
    /// How often the VMM has changed something.
    changes: AtomicU64,
    /// The value of `changes` when the device was looked at, and 1. 0 if it never was.
    looked: AtomicU64,
    /// Memory has been enabled since the BARs were last written to.
    enabled: AtomicBool,
    /// A bit for each BAR.
    decodes: AtomicU32,
    /// Likewise: it is a memory BAR.
    there: AtomicU32,
    placements: Mutex<[Placement; BARS]>,
    /// How often a look showed something.
    looks: AtomicU64,
    /// Nanoseconds of the budget that are spent.
    spent: AtomicU64,
    /// For who looks. The others wait for what they would look for themselves.
    looking: Mutex<()>,
}

impl Shadow {
    /// For another device.
    pub(super) fn clear(&self, sizes: &[u64; BARS]) {
        self.looked.store(0, Ordering::Release);
        self.enabled.store(false, Ordering::Release);
        self.spent.store(0, Ordering::Release);
        let placements = sizes.map(|size| Placement { size, ..Placement::default() });
        *self.lock() = placements;
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The VMM has sent something that may change what the device decodes.
    pub(super) fn configured(&self, configured: Configured) {
        if configured.moves {
            self.enabled.store(false, Ordering::Release);
        }
        if configured.enables {
            self.enabled.store(true, Ordering::Release);
        }
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Changes whenever something here may have.
    pub(super) fn epoch(&self) -> u64 {
        self.changes().wrapping_add(self.looks.load(Ordering::Acquire))
    }

    /// Safe in a signal handler.
    pub(super) fn decode(&self, bar: u8) -> Decode {
        let bit = 1_u32.checked_shl(u32::from(bar)).unwrap_or(0);
        if !self.is_fresh() || self.there.load(Ordering::Acquire) & bit == 0 {
            Decode::Unknown
        } else if self.decodes.load(Ordering::Acquire) & bit != 0 {
            Decode::On
        } else {
            Decode::Off
        }
    }

    /// The placements, as of the last look.
    pub(super) fn placements(&self) -> [Placement; BARS] {
        *self.lock()
    }

    /// Whether another look is to be had: something has changed, and the server has not kept us waiting too
    /// long.
    pub(super) fn wants_look(&self) -> bool {
        !self.is_fresh() && !self.is_given_up()
    }

    /// Whether the server has kept us waiting for too long. What the device decodes is not known then.
    pub(super) fn is_given_up(&self) -> bool {
        self.left().is_zero()
    }

    /// Looks once more if that is wanted. `look` reads configuration space, until a deadline; that takes
    /// long, so nobody may wait here who holds a lock of others.
    pub(super) fn look(&self, look: impl FnOnce(Instant) -> Option<[u8; CONFIG_SPACE]>) {
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.wants_look() {
            return;
        }
        let changes = self.changes();
        let begin = Instant::now();
        let space = look(begin + self.left());
        self.spend(begin.elapsed());
        if let Some(space) = space {
            self.update(&space);
            self.looked.store(changes + 1, Ordering::Release);
            self.looks.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn left(&self) -> Duration {
        BUDGET.saturating_sub(Duration::from_nanos(self.spent.load(Ordering::Acquire)))
    }

    fn spend(&self, time: Duration) {
        if time > AT_ONCE {
            let time = u64::try_from(time.min(BUDGET).as_nanos()).unwrap_or(u64::MAX);
            self.spent.fetch_add(time, Ordering::AcqRel);
        }
    }

    fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    fn is_fresh(&self) -> bool {
        self.looked.load(Ordering::Acquire) == self.changes() + 1
    }

    fn update(&self, space: &[u8; CONFIG_SPACE]) {
        let Some(header) = space.first_chunk::<HEADER>() else { return };
        let word = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let power = power_register(header, |at| space.get(usize::from(at)).copied());
        let power = power.filter(|at| *at < 0xff).map(|at| word(usize::from(at)));
        let on = decode(word(4), power) == Decode::On;
        let decoded = on || self.enabled.load(Ordering::Acquire);
        let mut there = 0;
        let mut placements = self.lock();
        for ((bar, placement), address) in (0..).zip(placements.iter_mut()).zip(addresses(header)) {
            let Some(address) = address.filter(|_| placement.size != 0) else {
                *placement = Placement { size: placement.size, ..Placement::default() };
                continue;
            };
            there |= 1_u32 << bar;
            placement.address = address;
            if decoded {
                placement.live = address;
            }
        }
        self.there.store(there, Ordering::Release);
        self.decodes.store(if on { there } else { 0 }, Ordering::Release);
    }

    /// Whether somebody has one of its locks.
    pub(super) fn is_held(&self) -> bool {
        self.placements.try_lock().is_err() || self.looking.try_lock().is_err()
    }

    fn lock(&self) -> MutexGuard<'_, [Placement; BARS]> {
        self.placements.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_lets_us_wait_is_not_asked_for_ever() {
        let shadow = Shadow::default();
        shadow.clear(&[0; BARS]);
        for _ in 0..1000 {
            shadow.spend(AT_ONCE);
        }
        shadow.spend(BUDGET / 2);
        let mut left = Vec::new();
        for _ in 0..2 {
            let begin = Instant::now();
            shadow.look(|deadline| {
                left.push(deadline - begin);
                None
            });
            shadow.spend(BUDGET / 2);
        }
        assert!(left.len() == 1 && left[0] >= BUDGET / 2 && left[0] < BUDGET, "{left:?}");
        assert!(shadow.is_given_up() && !shadow.wants_look());
        assert_eq!(shadow.decode(2), Decode::Unknown);
        // Another session begins anew.
        shadow.clear(&[0; BARS]);
        assert!(shadow.wants_look());
    }
}
