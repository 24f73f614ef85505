//! `test-crash`: registers that end the process, each in its own way.

use std::process::abort;

use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use super::{Context, Device, RestoreError, Saved};
use crate::pci::{BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids};

/// A device for tests of what comes after a crash.
///
/// | offset in BAR 0 | a read | a write |
/// |---|---|---|
/// | 0x00 | panics | |
/// | 0x08 | aborts | |
/// | 0x10 | | never ends |
/// | 0x18 | stops the process (SIGSTOP), then 0 | |
/// | 0x20 | what was written | |
/// | 0x28 | how often it was written | counts |
#[derive(Debug, Default)]
pub struct TestCrash {
    registers: Registers,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Registers {
    value: u64,
    writes: u64,
}

#[derive(Serialize, Deserialize)]
enum State {
    V1(Registers),
}

mod at {
    pub(super) const PANIC: u64 = 0x00;
    pub(super) const ABORT: u64 = 0x08;
    pub(super) const LOOP: u64 = 0x10;
    pub(super) const STOP: u64 = 0x18;
    pub(super) const VALUE: u64 = 0x20;
    pub(super) const WRITES: u64 = 0x28;
}

const BAR_SIZE: u64 = 0x1000;

impl Device for TestCrash {
    fn spec(&self) -> FunctionSpec {
        let kind = BarKind::Memory32 { prefetchable: false };
        FunctionSpec {
            bars: vec![BarSpec { index: BarIndex::BAR0, kind, size: BAR_SIZE }],
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0x11fe,
                subsystem_vendor: 0x1234,
                subsystem: 0x11fe,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    #[expect(clippy::panic, reason = "that is what it is for")]
    fn bar_read(&mut self, _: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        let value = match offset {
            at::PANIC => panic!("the guest has read the register that panics"),
            at::ABORT => abort(),
            at::STOP => {
                let _ = kill_process(getpid(), Signal::STOP);
                0
            }
            at::VALUE => self.registers.value,
            at::WRITES => self.registers.writes,
            _ => return,
        };
        if let Some(part) = value.to_le_bytes().get(..data.len()) {
            data.copy_from_slice(part);
        }
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], _: &mut Context<'_>) {
        match offset {
            at::LOOP => loop {
                std::hint::spin_loop();
            },
            at::VALUE => {
                let mut bytes = [0; 8];
                let length = data.len().min(bytes.len());
                bytes[..length].copy_from_slice(&data[..length]);
                self.registers.value = u64::from_le_bytes(bytes);
            }
            at::WRITES => self.registers.writes += 1,
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        Some(self)
    }
}

impl Saved for TestCrash {
    fn save(&self) -> Vec<u8> {
        postcard::to_allocvec(&State::V1(self.registers.clone())).expect("plain data serialises")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.registers = Registers::default();
        let State::V1(registers) = postcard::from_bytes(state).map_err(|_| RestoreError)?;
        self.registers = registers;
        Ok(())
    }
}
