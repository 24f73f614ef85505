//! REGION_READ and REGION_WRITE.

use barkeep_protocol::wire::{PciRegion, RegionAccess};
use tracing::info;

use super::{HostedFunction, Target};
use crate::pci::{BarIndex, BarKind, BarOffset, BarOwner, RequestKind, UnsupportedRequest};
use crate::server::request_error::RequestError;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// `data` has the length that `access` says.
pub(super) fn read(
    hosted: &mut HostedFunction,
    access: &RegionAccess,
    data: &mut [u8],
) -> Result<(), RequestError> {
    let target = hosted.checked(access)?;
    // A bus has no access of no bytes.
    if data.is_empty() {
        return Ok(());
    }
    match target {
        Target::Config => {
            let offset = offset_in_config(access.offset);
            hosted.read_through_window(offset, data.len());
            hosted.function.config_read(offset, data);
        }
        Target::Bar(bar) => {
            data.fill(0xff);
            if !hosted.claims(bar) {
                hosted.unsupported(access, Direction::Read);
                return Ok(());
            }
            for piece in hosted.function.bar_pieces(bar, access.offset, data.len()) {
                let part = &mut data[piece.data];
                match piece.owner {
                    BarOwner::Device => {
                        let (device, mut context) = hosted.split();
                        device.bar_read(bar, piece.offset, part, &mut context);
                    }
                    BarOwner::MsixTable => hosted.function.msix_table_read(piece.offset, part),
                    BarOwner::MsixPending => hosted.function.msix_pending_read(piece.offset, part),
                }
            }
            hosted.counters(access.region).reads += 1;
            hosted.do_transfers();
        }
        Target::Rom => {
            data.fill(0xff);
            if hosted.migration.is_running() && hosted.function.claims_rom() {
                let image = hosted.rom.as_deref().unwrap_or_default();
                let start = usize::try_from(access.offset).unwrap_or(usize::MAX);
                let present = image.get(start..).unwrap_or_default();
                data.iter_mut().zip(present).for_each(|(byte, &value)| *byte = value);
                hosted.counters(access.region).reads += 1;
            } else {
                hosted.unsupported(access, Direction::Read);
            }
        }
    }
    Ok(())
}

/// `data` has the length that `access` says.
pub(super) fn write(
    hosted: &mut HostedFunction,
    access: &RegionAccess,
    data: &[u8],
) -> Result<(), RequestError> {
    let target = hosted.checked(access)?;
    if data.is_empty() {
        return Ok(());
    }
    match target {
        Target::Config => {
            let offset = offset_in_config(access.offset);
            let delivered = hosted.function.can_send_msix();
            let effects = hosted.function.config_write(offset, data);
            hosted.apply(&effects);
            if hosted.function.can_send_msix() != delivered {
                hosted.rewired();
            }
            hosted.write_through_window(offset, data.len());
        }
        Target::Bar(bar) => {
            if !hosted.claims(bar) {
                hosted.unsupported(access, Direction::Write);
                return Ok(());
            }
            for piece in hosted.function.bar_pieces(bar, access.offset, data.len()) {
                let part = &data[piece.data];
                match piece.owner {
                    BarOwner::Device => {
                        let (device, mut context) = hosted.split();
                        device.bar_write(bar, piece.offset, part, &mut context);
                    }
                    BarOwner::MsixTable => {
                        let effects = hosted.function.msix_table_write(piece.offset, part);
                        hosted.apply(&effects);
                        hosted.rewired();
                    }
                    // "Software should never write" it (PCI 6.8.2.10): dropped.
                    BarOwner::MsixPending => {}
                }
            }
            hosted.counters(access.region).writes += 1;
        }
        // Nothing in a ROM can be written; where it is claimed, the write is dropped in silence.
        Target::Rom if hosted.migration.is_running() && hosted.function.claims_rom() => {
            hosted.counters(access.region).writes += 1;
        }
        Target::Rom => hosted.unsupported(access, Direction::Write),
    }
    hosted.do_transfers();
    Ok(())
}

impl HostedFunction {
    /// Does the BAR access that a read of the window's data register stands for, if it does.
    fn read_through_window(&mut self, offset: usize, length: usize) {
        if let Some((access, length)) = self.through_window(offset, length) {
            let mut value = [0xff; 4];
            // Past the end of a BAR there is nothing, not even a BAR that decodes.
            let _ = read(self, &access, &mut value[..length]);
            let mut data = self.function.window_data();
            data[..length].copy_from_slice(&value[..length]);
            self.function.set_window_data(data);
        }
    }

    /// Likewise for a write, which came first.
    fn write_through_window(&mut self, offset: usize, length: usize) {
        if let Some((access, length)) = self.through_window(offset, length) {
            let data = self.function.window_data();
            let _ = write(self, &access, &data[..length]);
        }
    }

    /// An access to a BAR, never to configuration space: it can't lead back here.
    fn through_window(&self, offset: usize, length: usize) -> Option<(RegionAccess, usize)> {
        let (BarOffset { bar, offset }, length) = self.function.window_access(offset, length)?;
        let count = u32::try_from(length).ok()?;
        Some((RegionAccess { offset, region: bar.get().into(), count }, length))
    }

    /// Counts, records and logs an access to a BAR or ROM that does not decode.
    fn unsupported(&mut self, access: &RegionAccess, direction: Direction) {
        let RegionAccess { offset, region, count } = *access;
        let length = count as usize;
        let counters = self.counters(region);
        let what = match direction {
            Direction::Read => {
                counters.reads_ur += 1;
                "read"
            }
            Direction::Write => {
                counters.writes_dropped += 1;
                "write"
            }
        };
        let (base, io) = self.placed(region);
        let kind = match (direction, io) {
            (Direction::Read, false) => RequestKind::MemoryRead,
            (Direction::Write, false) => RequestKind::MemoryWrite,
            (Direction::Read, true) => RequestKind::IoRead,
            (Direction::Write, true) => RequestKind::IoWrite,
        };
        let address = base.wrapping_add(offset);
        self.function.record_unsupported_request(&UnsupportedRequest { kind, address, length });
        if let Some(suppressed) = self.log.admit() {
            info!(
                function = self.name,
                suppressed,
                "Unsupported Request: {what} of {count} bytes at {}+{offset:#x}, which does not decode",
                region_name(region)
            );
        }
    }

    /// Where the driver placed a region, and whether that is in I/O space.
    fn placed(&self, region: u32) -> (u64, bool) {
        let bar = match PciRegion::from_index(region) {
            Some(PciRegion::Bar(bar)) => BarIndex::new(bar).and_then(|bar| self.function.bar(bar)),
            _ => return (self.function.rom().map_or(0, |rom| rom.address.into()), false),
        };
        bar.map_or((0, false), |bar| (bar.address, bar.kind == BarKind::Io))
    }
}

fn region_name(region: u32) -> String {
    match PciRegion::from_index(region) {
        Some(PciRegion::Bar(bar)) => format!("BAR{bar}"),
        _ => "the ROM".into(),
    }
}

/// Configuration space is at most 4096 bytes, and the access was checked against it.
fn offset_in_config(offset: u64) -> usize {
    usize::try_from(offset).expect("checked against the size of configuration space")
}
