//! A device that dies of what it is told to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::devices::{Context, Device, RestoreError, Saved};
use crate::irq::EventFd;
use crate::pci::{BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids, InterruptPin};
use crate::server::{HostedFunction, ServedFunction};

/// A write here panics, from then on and for good.
pub(super) const DEADLY: u64 = 0;
/// What was written here reads back.
pub(super) const VALUE: u64 = 8;
/// A write here makes wakes panic, until a reset.
pub(super) const DEADLY_WAKES: u64 = 16;
/// Reads how often it was woken.
pub(super) const WAKES: u64 = 24;
/// A write here drives the pin.
pub(super) const PIN: u64 = 32;

/// How often a device of this test's was told to come to rest.
pub(super) static QUIESCED: AtomicUsize = AtomicUsize::new(0);

struct Fragile {
    kick: EventFd,
    registers: [u8; 3],
    savable: bool,
}

pub(super) fn savable() -> ServedFunction {
    hosted(true)
}

pub(super) fn unsavable() -> ServedFunction {
    hosted(false)
}

fn hosted(savable: bool) -> ServedFunction {
    let kick = EventFd::create().unwrap();
    let device = Fragile { kick, registers: [0; 3], savable };
    HostedFunction::new("fragile", Box::new(device)).unwrap().into()
}

impl Device for Fragile {
    fn spec(&self) -> FunctionSpec {
        let kind = BarKind::Memory32 { prefetchable: false };
        FunctionSpec {
            bars: vec![BarSpec { index: BarIndex::BAR0, kind, size: 0x1000 }],
            interrupt_pin: Some(InterruptPin::A),
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 2,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn bar_read(&mut self, _: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        data.fill(match offset {
            VALUE => self.registers[0],
            WAKES => self.registers[2],
            _ => 0,
        });
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>) {
        match offset {
            DEADLY => panic!("written"),
            VALUE => self.registers[0] = data[0],
            DEADLY_WAKES => self.registers[1] = data[0],
            PIN => context.set_intx(data[0] != 0),
            _ => {}
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.kick.as_fd()]
    }

    fn woken(&mut self, _: usize, _: &mut Context<'_>) {
        assert!(self.registers[1] == 0, "woken");
        self.registers[2] += 1;
    }

    fn quiesce(&mut self) {
        QUIESCED.fetch_add(1, Ordering::Relaxed);
    }

    fn reset(&mut self) {
        self.registers = [0; 3];
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.kick.as_fd()]
    }

    fn adopt(&mut self, mut kept: Vec<OwnedFd>) -> io::Result<()> {
        self.kick = EventFd::new(kept.remove(0)).map_err(io::Error::other)?;
        Ok(())
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        if self.savable { Some(self) } else { None }
    }
}

impl Saved for Fragile {
    fn save(&self) -> Vec<u8> {
        self.registers.to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.registers = state.try_into().map_err(|_| RestoreError)?;
        Ok(())
    }
}
