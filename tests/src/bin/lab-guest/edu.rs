//! A driver for the `edu` function (QEMU's docs/specs/edu.rst).

use std::thread;
use std::time::{Duration, Instant};

use crate::mmio::Mapping;
use crate::{Result, ensure};

/// Vendor and device id.
pub(crate) const ID: (u64, u64) = (0x1234, 0x11e8);

/// What the identification register reads: version 1.0 and the signature.
pub(crate) const IDENTIFICATION_VALUE: u32 = 0x0100_00ed;

/// Registers of BAR0.
pub(crate) mod register {
    pub(crate) const IDENTIFICATION: usize = 0x00;
    pub(crate) const LIVENESS: usize = 0x04;
    pub(crate) const FACTORIAL: usize = 0x08;
    pub(crate) const STATUS: usize = 0x20;
    pub(crate) const INTERRUPT_STATUS: usize = 0x24;
    pub(crate) const INTERRUPT_RAISE: usize = 0x60;
    pub(crate) const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
    pub(crate) const DMA_SOURCE: usize = 0x80;
    pub(crate) const DMA_DESTINATION: usize = 0x88;
    pub(crate) const DMA_COUNT: usize = 0x90;
    pub(crate) const DMA_COMMAND: usize = 0x98;
}

/// Where the function's own DMA buffer of 4096 bytes lies in its DMA address space.
const DMA_BUFFER: u64 = 0x4_0000;

const STATUS_COMPUTING: u32 = 1;
const DMA_START: u64 = 1;
const DMA_TO_RAM: u64 = 2;
const DMA_INTERRUPT: u64 = 4;

/// Fails unless the registers are as after power-on.
pub(crate) fn expect_power_on(edu: &Edu) -> Result<()> {
    let narrow = [register::LIVENESS, register::INTERRUPT_STATUS, register::STATUS];
    for register in narrow {
        let value = edu.read(register);
        ensure!(value == 0, "register {register:#x} reads {value:#x} at power-on");
    }
    let wide = [register::DMA_SOURCE, register::DMA_DESTINATION, register::DMA_COUNT];
    for register in wide.into_iter().chain([register::DMA_COMMAND]) {
        let value: u64 = edu.bar.read(register);
        ensure!(value == 0, "register {register:#x} reads {value:#x} at power-on");
    }
    Ok(())
}

/// The function, through a mapping of its BAR0.
#[derive(Debug)]
pub(crate) struct Edu {
    pub(crate) bar: Mapping,
}

impl Edu {
    pub(crate) fn read(&self, register: usize) -> u32 {
        self.bar.read(register)
    }

    pub(crate) fn write(&self, register: usize, value: u32) {
        self.bar.write(register, value);
    }

    /// Writes the liveness register and says what it reads then.
    pub(crate) fn liveness_of(&self, value: u32) -> u32 {
        self.write(register::LIVENESS, value);
        self.read(register::LIVENESS)
    }

    /// Lets the function compute a factorial.
    ///
    /// # Errors
    /// It never finishes.
    pub(crate) fn factorial(&self, of: u32) -> Result<u32> {
        self.write(register::FACTORIAL, of);
        poll("the factorial", || self.read(register::STATUS) & STATUS_COMPUTING == 0)?;
        Ok(self.read(register::FACTORIAL))
    }

    /// Copies `len` bytes at bus address `address` into the function's buffer.
    ///
    /// # Errors
    /// The transfer never finishes.
    pub(crate) fn dma_from_ram(&self, address: u64, len: u64) -> Result<()> {
        self.dma(address, DMA_BUFFER, len, DMA_START)
    }

    /// Copies the first `len` bytes of the function's buffer to bus address `address`.
    ///
    /// # Errors
    /// The transfer never finishes.
    pub(crate) fn dma_to_ram(&self, address: u64, len: u64) -> Result<()> {
        self.dma(DMA_BUFFER, address, len, DMA_START | DMA_TO_RAM)
    }

    /// As [`Self::dma_to_ram`], but does not wait: the function raises interrupt 0x100 when it is
    /// done.
    pub(crate) fn start_dma_to_ram(&self, address: u64, len: u64) {
        self.start_dma(DMA_BUFFER, address, len, DMA_START | DMA_TO_RAM | DMA_INTERRUPT);
    }

    fn dma(&self, source: u64, destination: u64, len: u64, command: u64) -> Result<()> {
        self.start_dma(source, destination, len, command);
        poll("the DMA transfer", || self.bar.read::<u64>(register::DMA_COMMAND) & DMA_START == 0)
    }

    fn start_dma(&self, source: u64, destination: u64, len: u64, command: u64) {
        self.bar.write(register::DMA_SOURCE, source);
        self.bar.write(register::DMA_DESTINATION, destination);
        self.bar.write(register::DMA_COUNT, len);
        self.bar.write(register::DMA_COMMAND, command);
    }
}

/// Polls the function as a driver does; the bound only turns a hang into a failed check.
fn poll(what: &str, done: impl Fn() -> bool) -> Result<()> {
    const BOUND: Duration = Duration::from_secs(10);
    let start = Instant::now();
    while !done() {
        ensure!(start.elapsed() < BOUND, "{what} is not finished after {BOUND:?}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
