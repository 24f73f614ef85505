use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::window::{Window, WindowInfo};
use super::{DmaAccess, DmaError, Iova};

/// Windows by their first address, none overlapping another.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows(BTreeMap<Iova, Arc<Window>>);

/// A window's share of a range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share<'a> {
    pub(super) window: &'a Window,
    /// Where it starts.
    pub(super) address: u64,
    /// The same place, from the start of the window on.
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Windows {
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// All of them, in order of addresses.
    pub(super) fn infos(&self) -> impl Iterator<Item = WindowInfo<'_>> {
        self.0.iter().map(|(iova, window)| window.info(*iova))
    }

    pub(super) fn insert(&mut self, iova: Iova, window: Window) {
        self.0.insert(iova, Arc::new(window));
    }

    /// Takes out the windows that start in a range and that `gone` agrees to.
    pub(super) fn extract(
        &mut self,
        starts: RangeInclusive<Iova>,
        mut gone: impl FnMut(Iova, &Window) -> bool,
    ) -> Vec<Arc<Window>> {
        let extracted = self.0.extract_if(starts, |start, window| gone(*start, window));
        extracted.map(|(_, window)| window).collect()
    }

    /// Whether a window has an address of the range.
    pub(super) fn overlap(&self, first: u64, last: u64) -> bool {
        let below = self.0.range(..=Iova(last)).next_back();
        below.is_some_and(|(start, window)| start.0 + (window.size() - 1) >= first)
    }

    /// Whether a window starts in the range.
    pub(super) fn any_start(&self, first: u64, last: u64) -> bool {
        self.0.range(Iova(first)..=Iova(last)).next().is_some()
    }

    /// Whether a window starts below `address` and reaches it.
    pub(super) fn bisects(&self, address: u64) -> bool {
        let below = self.0.range(..Iova(address)).next_back();
        below.is_some_and(|(start, window)| address - start.0 < window.size())
    }

    /// The window that covers `address`, and its share of the `len` bytes from there on.
    pub(super) fn share(&self, address: u64, len: u64) -> Result<Share<'_>, DmaError> {
        let below = self.0.range(..=Iova(address)).next_back();
        let (start, window) = below
            .filter(|(start, window)| address - start.0 < window.size())
            .ok_or(DmaError::Unmapped(address))?;
        let offset = address - start.0;
        Ok(Share { window, address, offset, len: len.min(window.size() - offset) })
    }

    /// The shares of every window in a range, in order of addresses; the last item is an error if
    /// there is a hole.
    pub(super) fn shares(&self, iova: Iova, len: u64) -> Shares<'_> {
        Shares { windows: self, next: Some(iova.0), left: len }
    }

    /// Whether windows cover the whole range and allow the access.
    ///
    /// # Errors
    /// [`DmaError::Unmapped`], [`DmaError::Denied`], or [`DmaError::Overflow`] when it wraps.
    pub(super) fn check(&self, iova: Iova, len: u64, access: DmaAccess) -> Result<(), DmaError> {
        for share in self.shares(iova, len) {
            let share = share?;
            if !share.window.allows(access) {
                return Err(DmaError::Denied(share.address));
            }
        }
        Ok(())
    }
}

/// See [`Windows::shares`].
#[derive(Clone, Debug)]
pub(super) struct Shares<'a> {
    windows: &'a Windows,
    /// `None` past the last address there is.
    next: Option<u64>,
    left: u64,
}

impl<'a> Iterator for Shares<'a> {
    type Item = Result<Share<'a>, DmaError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let share = self.next.ok_or(DmaError::Overflow);
        let share = share.and_then(|next| self.windows.share(next, self.left));
        match &share {
            Ok(share) => {
                self.left -= share.len;
                self.next = share.address.checked_add(share.len);
            }
            Err(_) => self.left = 0,
        }
        Some(share)
    }
}
