use barkeep_shim::x86::{Bus, MAX_INSTRUCTION, Registers, Stop, Unsupported, execute, is_vector};
use iced_x86::{Decoder, DecoderOptions, Instruction, Register};

use super::frame::Frame;
use super::vectors::FrameVectors;
use crate::Shim;
use crate::device::{BarMapping, Decode};
use crate::status::Count;
use crate::system::System;

const PAGE: usize = 4096;
/// Iterations of a string instruction that are done before decoding is looked at again.
const ITERATIONS: u32 = 4096;
/// Resume flag.
const RF: u64 = 1 << 16;

/// Makes the decoder's tables, which allocates.
pub(super) fn warm_up() {
    // mov eax, [rdi]; rep movsb; vmovdqu64 zmm16, [rsi]; vmovdqu ymm0, [rsi].
    let code = b"\x8b\x07\xf3\xa4\x62\xe1\xfe\x48\x6f\x06\xc5\xfe\x6f\x06";
    for instruction in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        let _ = is_vector(&instruction);
        let _ = instruction.memory_size().size();
    }
}

/// Completes the instruction that the thread was interrupted at, which accesses a BAR that does not
/// decode: reads are all ones, writes are dropped. Of a repeated string instruction, as much as is worth
/// it; the thread goes on with the rest.
///
/// # Errors
/// For an instruction that is not known, or needs what can't be done here. Nothing of the frame has
/// changed then.
pub(super) fn complete<S: System>(
    shim: &Shim<S>,
    frame: &mut Frame,
    mapping: &BarMapping,
) -> Result<(), Unsupported> {
    if !frame.is_64_bit() {
        return Err(Unsupported("not in 64-bit mode"));
    }
    let mut code = [0; MAX_INSTRUCTION];
    let code = read_code(shim, frame.rip(), &mut code);
    let instruction = Decoder::with_ip(64, code, frame.rip(), DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return Err(Unsupported("no valid instruction"));
    }
    if uses_segment(&instruction) {
        return Err(Unsupported("an address relative to FS or GS"));
    }
    let vectors = is_vector(&instruction).then(|| FrameVectors::load(&frame.area()?)).flatten();
    let (general, rip, flags) = (frame.general(), frame.rip(), frame.flags());
    let mut registers = Registers { general, rip, flags, fs_base: 0, gs_base: 0, vectors };
    let mut bus = Host { shim, off: mapping, touched: false };
    for done in 0..ITERATIONS {
        let before = (registers.general, registers.flags);
        registers.rip = instruction.next_ip();
        bus.touched = false;
        match execute(&mut registers, &instruction, &mut bus) {
            Ok(()) if bus.touched => {}
            // What is left of it is none of ours.
            Ok(()) if done > 0 => break,
            Ok(()) => return Err(Unsupported("an instruction that accesses no BAR")),
            Err(_) if done > 0 => {
                (registers.general, registers.flags) = before;
                registers.rip = rip;
                break;
            }
            Err(Stop::Unsupported(what)) => return Err(Unsupported(what)),
            Err(Stop::Halt) => return Err(Unsupported("HLT")),
            Err(Stop::Bus(Unreachable)) => return Err(Unsupported("memory that can't be reached")),
        }
        if registers.rip != rip {
            break;
        }
    }
    frame.set_general(&registers.general);
    frame.set_rip(registers.rip);
    frame.set_flags(registers.flags & !RF);
    if let (Some(vectors), Some(mut area)) = (registers.vectors, frame.area()) {
        vectors.store(&mut area);
    }
    Ok(())
}

/// The bytes of the next instruction, and some more, but none of a page that it may not reach into.
fn read_code<'a, S: System>(shim: &Shim<S>, rip: u64, code: &'a mut [u8]) -> &'a [u8] {
    let Ok(start) = usize::try_from(rip) else { return &[] };
    if shim.system.read_memory(start, code).is_ok() {
        return code;
    }
    let len = code.len().min(PAGE - start % PAGE);
    let code = &mut code[..len];
    if shim.system.read_memory(start, code).is_ok() { code } else { &[] }
}

fn uses_segment(instruction: &Instruction) -> bool {
    matches!(instruction.memory_segment(), Register::FS | Register::GS)
}

/// The process's memory: BARs that do not decode, and what can be read and written as it is.
struct Host<'a, S> {
    shim: &'a Shim<S>,
    /// One that does not decode.
    off: &'a BarMapping,
    /// Whether such a BAR was accessed.
    touched: bool,
}

/// Memory that is neither.
struct Unreachable;

impl<S: System> Host<'_, S> {
    fn is_off(&self, address: usize) -> bool {
        if address.wrapping_sub(self.off.start) < self.off.len {
            return true;
        }
        let other = self.shim.mapping_at(address);
        other.is_some_and(|BarMapping { device, bar, .. }| {
            (device, bar) == (self.off.device, self.off.bar)
                || self.shim.decode(device, bar) == Decode::Off
        })
    }

    /// Whether all of an access is to a BAR that does not decode. Anything else that is read and written
    /// at once would have to be atomic.
    fn modified(&mut self, address: u64, len: usize) -> Result<(), Stop<Unreachable>> {
        let start = usize::try_from(address).map_err(|_| Stop::Bus(Unreachable))?;
        let last = start.checked_add(len - 1).ok_or(Stop::Bus(Unreachable))?;
        if !self.is_off(start) || !self.is_off(last) {
            return Err(Stop::Unsupported("a read-modify-write that is not of one BAR"));
        }
        self.touched = true;
        self.shim.status.count(Count::UrReads);
        self.shim.status.count(Count::UrWrites);
        Ok(())
    }
}

impl<S: System> Bus for Host<'_, S> {
    type Error = Unreachable;

    fn read(&mut self, address: u64, len: usize) -> Result<u64, Stop<Unreachable>> {
        let mut data = [0; 8];
        self.read_bytes(address, &mut data[..len])?;
        Ok(u64::from_le_bytes(data))
    }

    fn write(&mut self, address: u64, len: usize, value: u64) -> Result<(), Stop<Unreachable>> {
        self.write_bytes(address, &value.to_le_bytes()[..len])
    }

    fn read_bytes(&mut self, address: u64, data: &mut [u8]) -> Result<(), Stop<Unreachable>> {
        let mut unsupported = false;
        for (start, range) in pieces(address, data.len()) {
            let part = &mut data[range];
            if self.is_off(start) {
                part.fill(0xff);
                unsupported = true;
            } else {
                let read = self.shim.system.read_memory(start, part);
                read.map_err(|_| Stop::Bus(Unreachable))?;
            }
        }
        if unsupported {
            self.touched = true;
            self.shim.status.count(Count::UrReads);
        }
        Ok(())
    }

    fn write_bytes(&mut self, address: u64, data: &[u8]) -> Result<(), Stop<Unreachable>> {
        let mut unsupported = false;
        for (start, range) in pieces(address, data.len()) {
            if self.is_off(start) {
                unsupported = true;
            } else {
                let written = self.shim.system.write_memory(start, &data[range]);
                written.map_err(|_| Stop::Bus(Unreachable))?;
            }
        }
        if unsupported {
            self.touched = true;
            self.shim.status.count(Count::UrWrites);
        }
        Ok(())
    }

    fn modify(
        &mut self,
        address: u64,
        len: usize,
        _locked: bool,
        mut update: impl FnMut(u64) -> u64,
    ) -> Result<u64, Stop<Unreachable>> {
        self.modified(address, len)?;
        let ones = u64::MAX >> (64 - 8 * len);
        update(ones);
        Ok(ones)
    }

    fn modify_16(
        &mut self,
        address: u64,
        update: impl FnOnce(u128) -> u128,
    ) -> Result<u128, Stop<Unreachable>> {
        self.modified(address, 16)?;
        update(u128::MAX);
        Ok(u128::MAX)
    }

    fn port_read(&mut self, _port: u16, _len: usize) -> Result<u64, Stop<Unreachable>> {
        Err(Stop::Unsupported("a port"))
    }

    fn port_write(
        &mut self,
        _port: u16,
        _len: usize,
        _value: u64,
    ) -> Result<(), Stop<Unreachable>> {
        Err(Stop::Unsupported("a port"))
    }
}

/// Cuts an access at the ends of pages: mappings end there.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = usize::try_from(address).ok()?.wrapping_add(at);
        let range = at..at + (len - at).min(PAGE - start % PAGE);
        at = range.end;
        (!range.is_empty()).then_some((start, range))
    })
}
