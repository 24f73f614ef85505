use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

use super::*;
use crate::config::DeviceSpec;
use crate::dma::{DmaAccess, DmaTable, Iova};
use crate::irq::{EventFd, Interrupts};
use crate::pci::{BarIndex, Function, spec};

/// A device with the world that it reaches, and nothing of the wire.
struct Bench {
    device: Box<dyn Device>,
    function: Function,
    interrupts: Interrupts,
    dma: DmaTable,
    transfers: Transfers,
    pin: OwnedFd,
    message: OwnedFd,
}

impl Bench {
    fn new(text: &str) -> Self {
        let (device, _) = Registry::default().create(text.parse::<DeviceSpec>().unwrap()).unwrap();
        let function = Function::new(device.spec()).unwrap();
        let mut interrupts = Interrupts::new(1, 4);
        let fd = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (pin, message) = (fd(), fd());
        let ours = |fd: &OwnedFd| Some(EventFd::new(fd.try_clone().unwrap()).unwrap());
        interrupts.intx.set_eventfd(ours(&pin));
        interrupts.msi.set_eventfd(0, ours(&message)).unwrap();
        Self {
            device,
            function,
            interrupts,
            dma: DmaTable::new(8),
            transfers: Transfers::default(),
            pin,
            message,
        }
    }

    /// Decode and bus mastering on.
    fn enabled(text: &str) -> Self {
        let mut bench = Self::new(text);
        bench.command(0b110);
        bench
    }

    fn command(&mut self, value: u16) {
        let _ = self.function.config_write(spec::header::COMMAND, &value.to_le_bytes());
    }

    fn split(&mut self) -> (&mut dyn Device, Context<'_>) {
        let context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        (self.device.as_mut(), context)
    }

    fn enable_msi(&mut self) {
        let effects = self.function.config_write(capability(self, 0x05) + 2, &[1]);
        if let Some(level) = effects.intx {
            self.interrupts.intx.set_level(level);
        }
        let mut context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        self.device.effects_applied(&effects, &mut context);
    }

    fn read(&mut self, bar: BarIndex, offset: u64, width: usize) -> u64 {
        let mut data = [0xff; 8];
        let mut context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        self.device.bar_read(bar, offset, &mut data[..width], &mut context);
        data[width..].fill(0);
        u64::from_le_bytes(data)
    }

    fn write(&mut self, bar: BarIndex, offset: u64, value: u64, width: usize) {
        let data = value.to_le_bytes();
        let mut context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        self.device.bar_write(bar, offset, &data[..width], &mut context);
        self.work();
    }

    /// Transfers to memory that is shared, as the owner of the function does them.
    fn work(&mut self) {
        loop {
            match self.transfers.step(&self.dma, self.function.bus_master(), None) {
                Step::Done(id, result) => {
                    let mut context = Context::new(
                        &mut self.function,
                        &mut self.interrupts,
                        &self.dma,
                        &mut self.transfers,
                    );
                    self.device.dma_done(id, result, &mut context);
                }
                Step::Idle | Step::Message(_) => return,
            }
        }
    }

    fn share_memory(&mut self, iova: u64) {
        let memory = memfd_create("guest", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memory, 0x2000).unwrap();
        fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        self.dma.map(Iova(iova), 0x2000, DmaAccess::all(), Some((memory, 0))).unwrap();
    }

    /// A transfer by the DMA registers; `command` without the start bit.
    fn transfer(&mut self, source: u64, destination: u64, count: u64, command: u64) {
        for (register, value) in [(0x80, source), (0x88, destination), (0x90, count)] {
            self.write(BarIndex::BAR0, register, value, 8);
        }
        self.write(BarIndex::BAR0, 0x98, command | 1, 8);
    }
}

/// Where a capability is in configuration space.
fn capability(bench: &Bench, id: u8) -> usize {
    let byte = |at: usize| {
        let mut byte = [0];
        bench.function.config_read(at, &mut byte);
        byte[0]
    };
    let mut at = byte(0x34);
    while byte(at.into()) != id {
        at = byte(usize::from(at) + 1);
    }
    at.into()
}

fn signals(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

const BUFFER: u64 = 0x40000;
const TO_RAM: u64 = 2;

#[test]
fn edu_registers_are_as_specified() {
    let mut edu = Bench::enabled("edu");
    assert_eq!(edu.read(BarIndex::BAR0, 0, 4), 0x0100_00ed);
    edu.write(BarIndex::BAR0, 4, 0x1234_5678, 4);
    assert_eq!(edu.read(BarIndex::BAR0, 4, 4), 0xedcb_a987);
    edu.write(BarIndex::BAR0, 0x80, 0x1122_3344_5566_7788, 8);
    assert_eq!(edu.read(BarIndex::BAR0, 0x80, 8), 0x1122_3344_5566_7788);
    assert_eq!(edu.read(BarIndex::BAR0, 0x80, 4), 0x5566_7788);
}

#[test]
fn edu_answers_all_ones_to_widths_and_offsets_it_does_not_define() {
    let mut edu = Bench::enabled("edu");
    for (offset, width) in [(0, 1), (0, 2), (0, 8), (4, 8), (0x80, 1), (0x80, 2), (2, 4), (0x30, 4)]
    {
        let ones = u64::MAX >> (64 - 8 * width);
        assert_eq!(edu.read(BarIndex::BAR0, offset, width), ones, "{offset:#x} width {width}");
    }
    edu.write(BarIndex::BAR0, 4, 0, 2);
    assert_eq!(edu.read(BarIndex::BAR0, 4, 4), 0, "a narrow write is dropped");
}

#[test]
fn edu_computes_factorials_modulo_2_to_the_32() {
    let mut edu = Bench::enabled("edu");
    let rows = [(0, 1), (1, 1), (5, 120), (10, 3_628_800), (13, 1_932_053_504), (33, 0x8000_0000)];
    for (n, result) in rows {
        edu.write(BarIndex::BAR0, 8, n, 4);
        assert_eq!(edu.read(BarIndex::BAR0, 8, 4), result, "{n}!");
    }
    edu.write(BarIndex::BAR0, 8, u64::from(u32::MAX), 4);
    assert_eq!(edu.read(BarIndex::BAR0, 8, 4), 0, "and does not take for ever");
}

#[test]
fn edu_raises_the_pin_until_every_bit_is_acknowledged() {
    let mut edu = Bench::enabled("edu");
    edu.write(BarIndex::BAR0, 0x60, 0b11, 4);
    assert_eq!((signals(&edu.pin), edu.read(BarIndex::BAR0, 0x24, 4)), (1, 0b11));
    edu.write(BarIndex::BAR0, 0x64, 0b01, 4);
    edu.interrupts.intx.unmask();
    assert_eq!(signals(&edu.pin), 1, "one bit is left: the level stays");
    edu.write(BarIndex::BAR0, 0x64, 0b10, 4);
    edu.interrupts.intx.unmask();
    assert_eq!((signals(&edu.pin), signals(&edu.message)), (0, 0));
}

#[test]
fn edu_uses_msi_when_the_driver_does_and_takes_the_pin_back() {
    let mut edu = Bench::enabled("edu");
    edu.write(BarIndex::BAR0, 0x60, 1, 4);
    assert_eq!(signals(&edu.pin), 1);
    edu.enable_msi();
    edu.interrupts.intx.unmask();
    assert_eq!(signals(&edu.pin), 0, "the pin is silent under MSI");
    edu.write(BarIndex::BAR0, 0x60, 1, 4);
    assert_eq!((signals(&edu.pin), signals(&edu.message)), (0, 1));
}

#[test]
fn without_bus_master_enable_no_message_leaves_and_no_memory_is_touched() {
    let mut edu = Bench::enabled("edu");
    edu.share_memory(0);
    edu.enable_msi();
    edu.command(0b010);
    edu.dma.write(Iova(0), b"secret").unwrap();
    edu.transfer(0, BUFFER, 6, 4);
    edu.transfer(BUFFER, 0x1000, 6, TO_RAM | 4);
    edu.write(BarIndex::BAR0, 0x60, 1, 4);
    assert_eq!(signals(&edu.message), 0);

    edu.command(0b110);
    edu.transfer(BUFFER, 0x1000, 6, TO_RAM);
    let mut back = [1; 6];
    edu.dma.read(Iova(0x1000), &mut back).unwrap();
    assert_eq!(back, [0; 6], "the buffer never saw the memory");
}

#[test]
fn edu_copies_both_ways_and_tells_by_interrupt() {
    let mut edu = Bench::enabled("edu");
    edu.share_memory(0x10000);
    edu.dma.write(Iova(0x10123), b"a hundred bytes").unwrap();
    edu.transfer(0x10123, BUFFER + 7, 15, 4);
    assert_eq!((signals(&edu.pin), edu.read(BarIndex::BAR0, 0x24, 4)), (1, 0x100));
    edu.transfer(BUFFER + 7, 0x11000, 15, TO_RAM);
    let mut back = [0; 15];
    edu.dma.read(Iova(0x11000), &mut back).unwrap();
    assert_eq!(&back, b"a hundred bytes");
    assert_eq!(edu.read(BarIndex::BAR0, 0x98, 4) & 1, 0, "done");
}

#[test]
fn edu_refuses_transfers_that_leave_its_buffer() {
    let mut edu = Bench::enabled("edu");
    edu.share_memory(0);
    edu.dma.write(Iova(0), &[0xaa; 64]).unwrap();
    let bad = [
        (BUFFER - 1, 8),
        (BUFFER + 4090, 8),
        (BUFFER, 4097),
        (BUFFER + 4096, 1),
        (0, 8),
        (u64::MAX, 8),
        (BUFFER, u64::MAX),
    ];
    for (address, count) in bad {
        edu.transfer(0, address, count, 0);
        edu.transfer(address, 0x1000, count, TO_RAM);
    }
    let mut back = [0xee; 64];
    edu.dma.read(Iova(0x1000), &mut back).unwrap();
    assert_eq!(back, [0; 64]);
}

#[test]
fn edu_reaches_only_what_its_mask_lets_it() {
    let mut edu = Bench::enabled("edu,dma_mask=0xffff");
    edu.share_memory(0);
    edu.dma.write(Iova(0x100), b"masked").unwrap();
    edu.transfer(0xabc_0000_0100, BUFFER, 6, 0);
    edu.transfer(BUFFER, 0x1000, 6, TO_RAM);
    let mut back = [0; 6];
    edu.dma.read(Iova(0x1000), &mut back).unwrap();
    assert_eq!(&back, b"masked");
}

#[test]
fn a_reset_clears_everything_in_edu() {
    let mut edu = Bench::enabled("edu");
    edu.write(BarIndex::BAR0, 4, 5, 4);
    edu.write(BarIndex::BAR0, 0x60, 5, 4);
    edu.write(BarIndex::BAR0, 0x20, 0x80, 4);
    edu.write(BarIndex::BAR0, 0x80, 5, 8);
    edu.device.reset();
    for register in [4, 8, 0x20, 0x24, 0x80, 0x88, 0x90, 0x98] {
        assert_eq!(edu.read(BarIndex::BAR0, register, 4), 0, "{register:#x}");
    }
}

#[test]
fn ivshmem_memory_is_sealed_and_the_same_by_either_way() {
    let mut ivshmem = Bench::enabled("ivshmem,size=64K");
    ivshmem.write(BarIndex::BAR2, 0xfff8, 0x1122_3344_5566_7788, 8);
    let mapping = ivshmem.device.mapping(BarIndex::BAR2).unwrap();
    let mut data = [0; 8];
    rustix::io::pread(mapping.file, &mut data, mapping.offset + 0xfff8).unwrap();
    assert_eq!(u64::from_le_bytes(data), 0x1122_3344_5566_7788);
    assert!(fcntl_get_seals(mapping.file).unwrap().contains(SealFlags::SHRINK | SealFlags::SEAL));
    assert!(ivshmem.device.mapping(BarIndex::BAR0).is_none());
}

#[test]
fn ivshmem_memory_survives_a_reset_and_its_registers_do_not() {
    let mut ivshmem = Bench::enabled("ivshmem,size=4K");
    ivshmem.write(BarIndex::BAR0, 0, 1, 4);
    ivshmem.write(BarIndex::BAR2, 0, 7, 1);
    ivshmem.device.reset();
    assert_eq!(ivshmem.read(BarIndex::BAR0, 0, 4), 0);
    assert_eq!(ivshmem.read(BarIndex::BAR2, 0, 1), 7);
    assert_eq!(ivshmem.read(BarIndex::BAR0, 8, 4), 0, "IVPosition");
    assert_eq!(ivshmem.read(BarIndex::BAR0, 12, 4), 0xffff_ffff, "the doorbell is write-only");
}

#[test]
fn a_truncated_shared_file_reads_as_all_ones() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8192).unwrap();
    let spec = format!("ivshmem,size=8K,path={}", file.path().display());
    let mut ivshmem = Bench::enabled(&spec);
    ivshmem.write(BarIndex::BAR2, 4096, 5, 4);
    assert_eq!(ivshmem.read(BarIndex::BAR2, 4096, 4), 5);
    file.as_file().set_len(4096).unwrap();
    assert_eq!(ivshmem.read(BarIndex::BAR2, 4096, 4), 0xffff_ffff);
}

#[test]
fn an_interrupt_has_the_clients_eventfd_for_its_route_while_the_message_could_be_sent() {
    let mut bench = Bench::enabled("ivshmem,size=4K,vectors=4");
    let route = |bench: &mut Bench, vector| {
        let (_, context) = bench.split();
        context.msix_route(vector).cloned()
    };
    let control = capability(&bench, 0x11) + 2;
    let _ = bench.function.config_write(control, &0x8000_u16.to_le_bytes());
    assert!(route(&mut bench, 1).is_none(), "nothing is connected");

    let client = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let ours = EventFd::new(client.try_clone().unwrap()).unwrap();
    bench.interrupts.msix.set_eventfd(1, Some(ours)).unwrap();
    route(&mut bench, 1).unwrap().signal();
    assert_eq!(signals(&client), 1);
    assert!(route(&mut bench, 2).is_none(), "another vector");

    bench.command(0b010);
    assert!(route(&mut bench, 1).is_none(), "bus mastering is off");
    bench.command(0b110);
    let (_, context) = bench.split();
    assert!(context.running(false).msix_route(1).is_none(), "stopped");
    let _ = bench.function.config_write(control, &0xc000_u16.to_le_bytes());
    assert!(route(&mut bench, 1).is_none(), "masked");
}

#[test]
fn windows_are_seen_whether_the_function_masters_the_bus_or_not() {
    let mut bench = Bench::new("edu");
    bench.dma.keep_files(1);
    bench.share_memory(0x4000);
    let (_, context) = bench.split();
    let windows: Vec<_> = context.windows().map(|window| (window.iova, window.size)).collect();
    assert_eq!(windows, [(Iova(0x4000), 0x2000)]);
    assert!(context.windows().all(|window| window.file.is_some()));
}

#[test]
fn edu_tells_of_each_access_that_may_have_changed_its_state() {
    let mut bench = Bench::enabled("edu");
    let state = |bench: &mut Bench| {
        let saved = bench.device.saved().unwrap();
        (saved.revision().unwrap(), saved.save())
    };
    let before = state(&mut bench);
    bench.read(BarIndex::BAR0, 0x80, 8);
    bench.read(BarIndex::BAR0, 0x24, 4);
    assert_eq!(state(&mut bench), before);
    let writes = [(0x04, 5), (0x08, 5), (0x20, 0x80), (0x60, 7), (0x64, 7), (0x80, 5), (0x88, 5)];
    for (offset, value) in writes.into_iter().chain([(0x90, 5), (0x98, 2 | 1)]) {
        let before = state(&mut bench);
        bench.write(BarIndex::BAR0, offset, value, 4);
        let after = state(&mut bench);
        assert!(after.1 != before.1, "{offset:#x}");
        assert!(after.0 != before.0, "{offset:#x}");
    }
    // The end of a transfer is a change of its own.
    bench.share_memory(0x4000);
    for (register, value) in [(0x80, 0x4000), (0x88, BUFFER), (0x90, 4)] {
        bench.write(BarIndex::BAR0, register, value, 8);
    }
    let (device, mut context) = bench.split();
    device.bar_write(BarIndex::BAR0, 0x98, &[1, 0, 0, 0], &mut context);
    let before = state(&mut bench);
    bench.work();
    let after = state(&mut bench);
    assert!(after.1 != before.1, "the transfer is over");
    assert!(after.0 != before.0);
    let before = state(&mut bench);
    bench.device.reset();
    assert_ne!(state(&mut bench).0, before.0);
    bench.device.saved().unwrap().restore(&before.1).unwrap();
    assert_eq!(state(&mut bench).1, before.1);
}

#[test]
fn ivshmem_tells_of_its_registers_and_not_of_doorbells_or_memory() {
    let mut bench = Bench::enabled("ivshmem,size=4K,vectors=1");
    let revision = |bench: &mut Bench| bench.device.saved().unwrap().revision().unwrap();
    let before = revision(&mut bench);
    bench.write(BarIndex::BAR0, 12, 0, 4);
    bench.write(BarIndex::BAR2, 0, 1, 4);
    bench.read(BarIndex::BAR0, 4, 4);
    assert_eq!(revision(&mut bench), before);
    bench.write(BarIndex::BAR0, 0, 1, 4);
    let written = revision(&mut bench);
    assert_ne!(written, before);
    bench.device.reset();
    assert_ne!(revision(&mut bench), written);
}

fn kept(bench: &Bench) -> Vec<OwnedFd> {
    bench.device.kept().iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect()
}

#[test]
fn a_successor_of_ivshmem_has_its_memory_and_is_rung_as_it_was() {
    let text = "ivshmem,size=4K,vectors=2";
    let (mut first, mut second) = (Bench::enabled(text), Bench::enabled(text));
    first.write(BarIndex::BAR2, 8, 0x1234, 4);
    second.device.adopt(kept(&first)).unwrap();
    assert_eq!(second.read(BarIndex::BAR2, 8, 4), 0x1234);
    // What a client rings, the successor is woken by; and it rings itself by them.
    let vectors = kept(&first).split_off(1);
    for (index, vector) in vectors.iter().enumerate() {
        rustix::io::write(vector, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(rustix::io::read(second.device.wakes()[index], &mut [0; 8]), Ok(8));
        second.write(BarIndex::BAR0, 12, index as u64, 4);
        assert_eq!(signals(vector), 1);
    }
    let doorbells = second.device.doorbells(BarIndex::BAR0);
    doorbells[1].eventfd.signal();
    assert_eq!(signals(&vectors[1]), 1);

    let others = ["ivshmem,size=8K,vectors=2", "ivshmem,size=4K,vectors=1", "ivshmem,size=4K"];
    for other in others {
        assert!(second.device.adopt(kept(&Bench::new(other))).is_err(), "{other}");
        assert!(Bench::new(other).device.adopt(kept(&first)).is_err(), "{other}");
    }
}

#[test]
fn ivshmem_over_a_file_keeps_nothing_but_its_vectors() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let text = format!("ivshmem,size=4K,path={},vectors=1", file.path().display());
    assert_eq!(kept(&Bench::new(&text)).len(), 1);
}
