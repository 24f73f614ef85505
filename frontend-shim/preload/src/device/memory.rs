//! What the VMM maps and unmaps: mappings of BARs come, move and go.

use super::mappings::{self, Writing};
use super::{BarMapping, DeviceId};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::system::{Answer, Mmap, Mremap, System};

const PAGE: usize = 4096;

/// What a descriptor that is mapped is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Bar { device: DeviceId, bar: u8, offset: u64 },
    Vcpu,
}

/// Mappings that were taken out because the kernel is about to, and our turn until it has.
struct Taken<'a> {
    mappings: Vec<BarMapping>,
    writing: Writing<'a>,
}

impl<S: System> Shim<S> {
    /// `mmap`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn mmap(&self, request: Mmap) -> Answer<usize> {
        let backing = self.shielded(|| self.backing(&request)).flatten();
        let over = (request.flags & libc::MAP_FIXED != 0).then_some(request.address);
        let taken = self.shielded(|| self.take(over?, request.len)).flatten();
        let answer = self.system.mmap(request);
        self.shielded(|| match answer {
            Ok(start) => self.mapped(start, &request, backing, taken),
            Err(_) => self.put_back(taken),
        });
        answer
    }

    /// `munmap`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn munmap(&self, start: usize, len: usize) -> Answer<()> {
        let taken = self.shielded(|| self.take(start, len)).flatten();
        let answer = self.system.munmap(start, len);
        self.shielded(|| match answer {
            Ok(()) => self.drop_taken(taken),
            Err(_) => self.put_back(taken),
        });
        answer
    }

    /// `mremap`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn mremap(&self, request: Mremap) -> Answer<usize> {
        let taken = self.shielded(|| self.take_for_move(&request)).flatten();
        let answer = self.system.mremap(request);
        self.shielded(|| match answer {
            Ok(start) => self.moved(start, &request, taken),
            Err(_) => self.put_back(taken),
        });
        answer
    }

    fn backing(&self, request: &Mmap) -> Option<Backing> {
        let &Mmap { flags, fd, .. } = request;
        if flags & libc::MAP_ANONYMOUS != 0 || fd < 0 {
            return None;
        }
        let offset = u64::try_from(request.offset).ok()?;
        let bar = |(device, bar, offset)| Backing::Bar { device, bar, offset };
        match self.descriptors.get(fd) {
            Some(Descriptor::Device(device)) => self.region_at(DeviceId(device), offset).map(bar),
            Some(Descriptor::Vcpu(_)) => (offset == 0).then_some(Backing::Vcpu),
            Some(_) => None,
            // A private mapping is a copy.
            None if flags & libc::MAP_SHARED == 0 || !self.has_user_bar_files() => None,
            None => {
                let identity = self.system.identity(fd).ok()?;
                self.user_bar_file(identity, offset).map(bar)
            }
        }
    }

    fn region_at(&self, device: DeviceId, offset: u64) -> Option<(DeviceId, u8, u64)> {
        let (bar, inside) = self.devices.table.get(device)?.bar_at(offset)?;
        Some((device, bar, inside))
    }

    /// Takes mappings out of a range before the kernel does: from then on the memory may be anything.
    fn take(&self, start: usize, len: usize) -> Option<Taken<'_>> {
        let len = pages(start, len)?;
        self.unmapped(start, len);
        if !self.devices.mappings.overlaps(start, len) || self.elsewhere() {
            return None;
        }
        let writing = self.devices.hold();
        let mappings = self.take_mappings(start, len, &writing);
        Some(Taken { mappings, writing })
    }

    fn take_for_move(&self, request: &Mremap) -> Option<Taken<'_>> {
        let &Mremap { address, len, new_len, flags, new_address } = request;
        let from = pages(address, len);
        let to = pages(new_address, new_len).filter(|_| flags & libc::MREMAP_FIXED != 0);
        let ranges = [from.map(|len| (address, len)), to.map(|len| (new_address, len))];
        for (start, len) in ranges.into_iter().flatten() {
            self.unmapped(start, len);
        }
        let overlaps = |(start, len)| self.devices.mappings.overlaps(start, len);
        if !ranges.into_iter().flatten().any(overlaps) || self.elsewhere() {
            return None;
        }
        let writing = self.devices.hold();
        let mut mappings = Vec::new();
        for (start, len) in ranges.into_iter().flatten() {
            mappings.extend(self.take_mappings(start, len, &writing));
        }
        Some(Taken { mappings, writing })
    }

    fn put_back(&self, taken: Option<Taken<'_>>) {
        let Some(Taken { mappings, writing }) = taken else { return };
        for mapping in &mappings {
            self.put_mapping(mapping, &writing);
        }
    }

    fn drop_taken(&self, taken: Option<Taken<'_>>) {
        let Some(Taken { writing, .. }) = taken else { return };
        self.retire(&writing);
    }

    fn mapped(
        &self,
        start: usize,
        request: &Mmap,
        backing: Option<Backing>,
        taken: Option<Taken<'_>>,
    ) {
        let Some(len) = pages(start, request.len) else { return };
        let is_bar = matches!(backing, Some(Backing::Bar { .. }));
        // Nothing of ours can be where the kernel found room, unless it went without our seeing it.
        let stale = self.devices.mappings.overlaps(start, len);
        if (taken.is_some() || is_bar || stale) && !self.elsewhere() {
            let writing = taken.map_or_else(|| self.devices.hold(), |taken| taken.writing);
            self.take_mappings(start, len, &writing);
            if let Some(Backing::Bar { device, bar, offset }) = backing {
                self.put_part(&BarMapping { device, bar, start, len, offset }, &writing);
            }
            self.retire(&writing);
        }
        if backing == Some(Backing::Vcpu) {
            self.vcpu_mapped(request.fd, start, len);
        }
    }

    fn moved(&self, start: usize, request: &Mremap, taken: Option<Taken<'_>>) {
        let Some(new_len) = pages(start, request.new_len) else { return };
        // Of a length of 0 the kernel makes a second mapping of the same.
        let second = if request.len == 0 { self.mapping_at(request.address) } else { None };
        let stale = self.devices.mappings.overlaps(start, new_len);
        if taken.is_none() && second.is_none() && !stale || self.elsewhere() {
            return;
        }
        let (taken, writing) = match taken {
            Some(taken) => (taken.mappings, taken.writing),
            None => (Vec::new(), self.devices.hold()),
        };
        self.take_mappings(start, new_len, &writing);
        let old_len = pages(request.address, request.len).unwrap_or(0);
        for piece in &taken {
            let Some(old) = mappings::overlap(piece, request.address, old_len) else { continue };
            if request.flags & libc::MREMAP_DONTUNMAP != 0 {
                self.put_mapping(&old, &writing);
            }
            let before = old.start - request.address;
            let grows = before + old.len == old_len && new_len > old_len;
            let len =
                if grows { new_len - before } else { old.len.min(new_len.saturating_sub(before)) };
            self.put_part(&BarMapping { start: start + before, len, ..old }, &writing);
        }
        if let Some(old) = second {
            let offset = old.offset + (request.address - old.start) as u64;
            self.put_part(&BarMapping { start, len: new_len, offset, ..old }, &writing);
        }
        self.retire(&writing);
    }

    /// Adds as much of a mapping as lies in its BAR, if it is known how long that is.
    fn put_part(&self, mapping: &BarMapping, writing: &Writing<'_>) {
        let placements = self.placements(mapping.device).unwrap_or_default();
        let size = placements.get(usize::from(mapping.bar)).map_or(0, |bar| bar.size);
        let room = match size {
            0 => u64::MAX,
            size => whole_pages(size).saturating_sub(mapping.offset),
        };
        let len = usize::try_from(room).unwrap_or(usize::MAX).min(mapping.len);
        if len > 0 {
            self.put_mapping(&BarMapping { len, ..*mapping }, writing);
        }
    }
}

/// The length of a range in whole pages. `None` for what the kernel refuses.
fn pages(start: usize, len: usize) -> Option<usize> {
    let len = len.checked_next_multiple_of(PAGE).filter(|len| *len > 0)?;
    let end = start.checked_add(len);
    (start.is_multiple_of(PAGE) && end.is_some()).then_some(len)
}

/// A BAR's size may be whatever a device or backend says.
fn whole_pages(size: u64) -> u64 {
    size.checked_next_multiple_of(PAGE as u64).unwrap_or(u64::MAX)
}
