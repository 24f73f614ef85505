//! What a server that is no barkeep decodes: its configuration space says, whenever it may have changed.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::introduce::BARS;
use super::outgoing::Configured;
use crate::device::config::{HEADER, addresses, decode, power_register};
use crate::device::{Decode, Placement};

/// Bytes of the configuration space that are looked at: those with the capabilities of old.
pub(super) const CONFIG_SPACE: usize = 256;

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
}

impl Shadow {
    /// For another device.
    pub(super) fn clear(&self, sizes: &[u64; BARS]) {
        self.looked.store(0, Ordering::Release);
        self.enabled.store(false, Ordering::Release);
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

    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
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

    /// The placements, after another look if something has changed. `look` reads configuration space.
    pub(super) fn placements(
        &self,
        look: impl FnOnce() -> Option<[u8; CONFIG_SPACE]>,
    ) -> Option<[Placement; BARS]> {
        if !self.is_fresh() {
            let changes = self.changes();
            self.update(&look()?);
            self.looked.store(changes + 1, Ordering::Release);
        }
        Some(*self.lock())
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

    /// Whether somebody is looking at the placements.
    pub(super) fn is_held(&self) -> bool {
        self.placements.try_lock().is_err()
    }

    fn lock(&self) -> MutexGuard<'_, [Placement; BARS]> {
        self.placements.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
