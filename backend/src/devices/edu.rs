use serde::{Deserialize, Serialize};

use super::{Context, Device, Payload, RestoreError, Saved, Transfer, TransferResult};
use crate::config::{ConfigError, Parameters};
use crate::dma::Iova;
use crate::pci::{
    BarIndex, BarKind, BarSpec, ClassCode, Effects, ExpressSpec, FunctionSpec, Ids, InterruptPin,
    MsiSpec, MsiVectors, PowerSpec,
};

/// QEMU's educational device (1234:11e8, `docs/specs/edu.rst` in QEMU).
///
/// A factorial is done inside the write that starts it: the status bit that tells of unfinished work
/// is legal, but never seen set. So is DMA to memory that the client shares; with memory that it
/// moves by messages, the start bit stays set until it has.
#[derive(Debug)]
pub struct Edu {
    dma_mask: u64,
    registers: Registers,
    /// Counts what may have changed them.
    revision: u64,
}

/// All that a reset clears.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Registers {
    liveness: u32,
    factorial: u32,
    interrupt_on_factorial: bool,
    interrupt_status: u32,
    dma_source: u64,
    dma_destination: u64,
    dma_count: u64,
    dma_command: u64,
    buffer: Buffer,
}

/// "MMIO area spec": offsets in BAR0.
mod at {
    pub(super) const IDENTIFICATION: u64 = 0x00;
    pub(super) const LIVENESS: u64 = 0x04;
    pub(super) const FACTORIAL: u64 = 0x08;
    pub(super) const STATUS: u64 = 0x20;
    pub(super) const INTERRUPT_STATUS: u64 = 0x24;
    pub(super) const INTERRUPT_RAISE: u64 = 0x60;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    /// From here on, 8-byte accesses are allowed as well.
    pub(super) const DMA_SOURCE: u64 = 0x80;
    pub(super) const DMA_DESTINATION: u64 = 0x88;
    pub(super) const DMA_COUNT: u64 = 0x90;
    pub(super) const DMA_COMMAND: u64 = 0x98;
}

/// Version 1.0, and the "edu" that tells the card.
const IDENTIFICATION: u32 = 0x0100_00ed;
const STATUS_INTERRUPT_ON_FACTORIAL: u32 = 0x80;
const INTERRUPT_FACTORIAL: u32 = 0x001;
const INTERRUPT_DMA: u32 = 0x100;
const DMA_START: u64 = 1 << 0;
const DMA_TO_RAM: u64 = 1 << 1;
const DMA_INTERRUPT: u64 = 1 << 2;

const BAR_SIZE: u64 = 1 << 20;
/// Where the device's own buffer lies in its DMA address space ("DMA controller").
const BUFFER_ADDRESS: u64 = 0x40000;
const BUFFER_SIZE: usize = 4096;
/// "the device supports only 28 bits by default"
const DEFAULT_DMA_MASK: u64 = (1 << 28) - 1;

impl Edu {
    /// Creates the device: `edu[,dma_mask=MASK]`.
    ///
    /// # Errors
    /// [`ConfigError`] when a parameter is unknown or not a number.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let dma_mask = parameters.take_number("dma_mask")?.unwrap_or(DEFAULT_DMA_MASK);
        Ok(Self { dma_mask, registers: Registers::default(), revision: 0 })
    }

    fn raise(&mut self, bits: u32, context: &mut Context<'_>) {
        self.registers.interrupt_status |= bits;
        if self.registers.interrupt_status == 0 {
            return;
        }
        if context.msi_enabled() {
            context.raise_msi(0);
        } else {
            context.set_intx(true);
        }
    }

    fn acknowledge(&mut self, bits: u32, context: &mut Context<'_>) {
        self.registers.interrupt_status &= !bits;
        if self.registers.interrupt_status == 0 {
            context.set_intx(false);
        }
    }

    fn start_factorial(&mut self, n: u32, context: &mut Context<'_>) {
        self.registers.factorial = factorial(n);
        if self.registers.interrupt_on_factorial {
            self.raise(INTERRUPT_FACTORIAL, context);
        }
    }

    /// A transfer that can't be done moves nothing: the device has no register to say so.
    fn start_dma(&mut self, command: u64, context: &mut Context<'_>) {
        let registers = &mut self.registers;
        registers.dma_command = command;
        let count = registers.dma_count;
        let transfer = if command & DMA_TO_RAM == 0 {
            let target = registers.buffer.range_mut(registers.dma_destination, count);
            let address = registers.dma_source;
            target.map(|target| (address, Payload::Read(target.len())))
        } else {
            let source = registers.buffer.range_mut(registers.dma_source, count);
            let address = registers.dma_destination;
            source.map(|source| (address, Payload::Write(source.to_vec())))
        };
        match transfer {
            Some((address, payload)) => {
                let address = Iova(address & self.dma_mask);
                context.start_dma(Transfer { id: 0, address, payload });
            }
            None => self.end_dma(context),
        }
    }

    fn end_dma(&mut self, context: &mut Context<'_>) {
        self.registers.dma_command &= !DMA_START;
        if self.registers.dma_command & DMA_INTERRUPT != 0 {
            self.raise(INTERRUPT_DMA, context);
        }
    }

    fn dma_runs(&self) -> bool {
        self.registers.dma_command & DMA_START != 0
    }
}

impl Device for Edu {
    fn spec(&self) -> FunctionSpec {
        FunctionSpec {
            bars: vec![BarSpec {
                index: BarIndex::BAR0,
                kind: BarKind::Memory32 { prefetchable: false },
                size: BAR_SIZE,
            }],
            interrupt_pin: Some(InterruptPin::A),
            msi: Some(MsiSpec { vectors: MsiVectors::One, per_vector_masking: false }),
            power: Some(PowerSpec { no_soft_reset: true }),
            express: Some(ExpressSpec { function_level_reset: true, aer: true }),
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0x11e8,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
                revision: 0x10,
                class: ClassCode { base: 0x00, sub: 0xff, interface: 0x00 },
            })
        }
    }

    fn bar_read(&mut self, _bar: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        if !width_allowed(offset, data.len()) {
            return;
        }
        let registers = &self.registers;
        let value = match offset {
            at::IDENTIFICATION => IDENTIFICATION.into(),
            at::LIVENESS => registers.liveness.into(),
            at::FACTORIAL => registers.factorial.into(),
            at::STATUS if registers.interrupt_on_factorial => STATUS_INTERRUPT_ON_FACTORIAL.into(),
            at::STATUS => 0,
            at::INTERRUPT_STATUS => registers.interrupt_status.into(),
            at::DMA_SOURCE => registers.dma_source,
            at::DMA_DESTINATION => registers.dma_destination,
            at::DMA_COUNT => registers.dma_count,
            at::DMA_COMMAND => registers.dma_command,
            _ => return,
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>) {
        if !width_allowed(offset, data.len()) {
            return;
        }
        self.revision += 1;
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let wide = u64::from_le_bytes(bytes);
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if offset >= at::DMA_SOURCE && self.dma_runs() {
            // The transfer under way is described by these.
            return;
        }
        let registers = &mut self.registers;
        match offset {
            at::LIVENESS => registers.liveness = !word,
            at::FACTORIAL => self.start_factorial(word, context),
            at::STATUS => {
                registers.interrupt_on_factorial = word & STATUS_INTERRUPT_ON_FACTORIAL != 0;
            }
            at::INTERRUPT_RAISE => self.raise(word, context),
            at::INTERRUPT_ACKNOWLEDGE => self.acknowledge(word, context),
            at::DMA_SOURCE => registers.dma_source = wide,
            at::DMA_DESTINATION => registers.dma_destination = wide,
            at::DMA_COUNT => registers.dma_count = wide,
            at::DMA_COMMAND if wide & DMA_START != 0 => self.start_dma(wide, context),
            _ => {}
        }
    }

    /// The interrupt changes sides when the driver switches between the pin and MSI.
    fn effects_applied(&mut self, effects: &Effects, context: &mut Context<'_>) {
        if let Some(msi) = effects.msi.enabled {
            context.set_intx(!msi && self.registers.interrupt_status != 0);
        }
    }

    fn dma_done(&mut self, _id: u64, result: TransferResult, context: &mut Context<'_>) {
        self.revision += 1;
        let registers = &mut self.registers;
        if registers.dma_command & DMA_TO_RAM == 0
            && let Ok(data) = result
            && let Some(target) =
                registers.buffer.range_mut(registers.dma_destination, data.len() as u64)
        {
            target.copy_from_slice(&data);
        }
        self.end_dma(context);
    }

    fn reset(&mut self) {
        self.revision += 1;
        self.registers = Registers::default();
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        Some(self)
    }
}

/// The registers, in the order of their declaration: the first version of the state.
#[derive(Serialize, Deserialize)]
enum State {
    V1(Registers),
}

impl Saved for Edu {
    fn save(&self) -> Vec<u8> {
        postcard::to_allocvec(&State::V1(self.registers.clone())).expect("plain data serialises")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.reset();
        match postcard::from_bytes(state) {
            Ok(State::V1(registers)) if registers.buffer.is_whole() => {
                self.registers = registers;
                Ok(())
            }
            _ => Err(RestoreError),
        }
    }

    fn revision(&self) -> Option<u64> {
        Some(self.revision)
    }

    fn resume(&mut self, context: &mut Context<'_>) {
        if self.dma_runs() {
            self.start_dma(self.registers.dma_command, context);
        }
    }
}

/// "Only size == 4 accesses are allowed for addresses < 0x80. size == 4 or size == 8 for the rest."
fn width_allowed(offset: u64, width: usize) -> bool {
    width == 4 || (width == 8 && offset >= at::DMA_SOURCE)
}

/// `n!` modulo 2^32. From 34 on the product holds 32 factors of two, so the loop can stop there:
/// the guest chooses `n`, and 4 billion rounds would stop every function of this process.
fn factorial(n: u32) -> u32 {
    if n >= 34 { 0 } else { (1..=n).fold(1, u32::wrapping_mul) }
}

/// [`BUFFER_SIZE`] bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Buffer(Vec<u8>);

impl Default for Buffer {
    fn default() -> Self {
        Self(vec![0; BUFFER_SIZE])
    }
}

impl Buffer {
    fn is_whole(&self) -> bool {
        self.0.len() == BUFFER_SIZE
    }

    /// The part of the buffer at device addresses `address..address + count`.
    fn range_mut(&mut self, address: u64, count: u64) -> Option<&mut [u8]> {
        let start = usize::try_from(address.checked_sub(BUFFER_ADDRESS)?).ok()?;
        let end = start.checked_add(usize::try_from(count).ok()?)?;
        self.0.get_mut(start..end)
    }
}
