//! Writes the committed corpus: real messages, as the clients that there are send them.
//!
//! `cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds`

use std::path::Path;

use barkeep_fuzz::script::{GREETED, Script};
use barkeep_protocol::wire::limits::HEADER_SIZE_U32;
use barkeep_protocol::wire::{
    Command, DeviceFlags, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags, Errno,
    FaultAccess, FaultReport, FaultVerdict, Header, InfoQuery, IrqAction, IrqData, IrqInfo,
    IrqInfoFlags, MessageId, MessageKind, RegionAccess, RegionData, RegionFlags, RegionInfo,
    RegionState, RegionStateQuery, SetIrqs, SparseArea, Version,
};

/// Kinds of descriptors, as the session target has them.
const SHARED: u8 = 0;
const SEALED: u8 = 1;
const EVENTFD: u8 = 2;
const HUGE: u8 = 4;
const READ_ONLY: u8 = 5;

const EDU: u8 = 0;
const IVSHMEM: u8 = 1;

fn main() {
    let requests = requests();
    for (name, command, body) in &requests {
        save("codec", name, &message(*command, MessageKind::Command { no_reply: false }, body));
    }
    for (name, command, body) in replies() {
        save("codec", name, &message(command, MessageKind::Reply { error: None }, &body));
    }
    let refused = MessageKind::Reply { error: Some(Errno::INVAL) };
    save("codec", "reply_error", &message(Command::DmaMap, refused, &[]));

    for (name, command, body) in &requests {
        let script = Script::new(GREETED).message(&[], command.code(), 0, body);
        save("session", name, &script.done());
    }
    sessions();
    config_space();
}

fn save(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder).expect("a writable tree");
    std::fs::write(folder.join(name), bytes).expect("a writable tree");
}

fn message(command: Command, kind: MessageKind, body: &[u8]) -> Vec<u8> {
    let body_size = u32::try_from(body.len()).expect("a seed is small");
    let header = Header { id: MessageId(0x4201), command: command.code(), body_size, kind };
    [&header.to_bytes()[..], body].concat()
}

fn map(access: DmaAccess, address: u64, size: u64) -> Vec<u8> {
    DmaMap { access, file_offset: 0, address, size }.to_bytes()
}

fn unmap(flags: DmaUnmapFlags, address: u64, size: u64) -> Vec<u8> {
    DmaUnmap { flags, address, size }.to_bytes()
}

fn irqs(action: IrqAction, data: IrqData<'_>, index: u32, start: u32, count: u32) -> Vec<u8> {
    SetIrqs { action, data, index, start, count }.to_bytes()
}

fn read(region: u32, offset: u64, count: u32) -> Vec<u8> {
    RegionAccess { offset, region, count }.to_bytes()
}

fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let count = u32::try_from(data.len()).expect("a seed is small");
    RegionData { access: RegionAccess { offset, region, count }, data }.to_bytes()
}

fn requests() -> Vec<(&'static str, Command, Vec<u8>)> {
    let all = DmaAccess::all();
    let none = DmaUnmapFlags::empty();
    let region = InfoQuery { index: 0, argsz: 32 };
    let fault = FaultReport { region: 2, access: FaultAccess::WRITE, offset: 0x1000, size: 0x1000 };
    vec![
        ("version", Command::Version, Version::proposal().to_bytes()),
        ("version_bare", Command::Version, vec![0, 0, 2, 0]),
        ("version_major", Command::Version, vec![1, 0, 0, 0, b'{', b'}', 0]),
        ("version_foreign", Command::Version, foreign_version()),
        ("dma_map", Command::DmaMap, map(all, 0x10_0000, 0x1000)),
        ("dma_map_end", Command::DmaMap, map(all, 0u64.wrapping_sub(0x1000), 0x1000)),
        ("dma_unmap", Command::DmaUnmap, unmap(none, 0x10_0000, 0x1000)),
        ("dma_unmap_all", Command::DmaUnmap, unmap(DmaUnmapFlags::ALL, 0, 0)),
        ("dma_unmap_bitmap", Command::DmaUnmap, dirty_unmap()),
        ("get_info", Command::GetInfo, InfoQuery { index: 0, argsz: 16 }.to_irq_bytes()),
        ("region_info", Command::GetRegionInfo, region.to_region_bytes()),
        ("region_io_fds", Command::GetRegionIoFds, words(&[32, 0, 0, 0])),
        ("irq_info", Command::GetIrqInfo, InfoQuery { index: 1, argsz: 16 }.to_irq_bytes()),
        ("irqs_off", Command::SetIrqs, irqs(IrqAction::Trigger, IrqData::None, 1, 0, 0)),
        ("irqs_bool", Command::SetIrqs, irqs(IrqAction::Trigger, IrqData::Bool(&[1]), 0, 0, 1)),
        ("irqs_mask", Command::SetIrqs, irqs(IrqAction::Mask, IrqData::None, 0, 0, 1)),
        ("region_read", Command::RegionRead, read(7, 0, 64)),
        ("region_write", Command::RegionWrite, write(7, 4, &[6, 0])),
        ("dma_read", Command::DmaRead, words(&[0, 0, 64, 0])),
        ("dma_write", Command::DmaWrite, words(&[0, 0, 4, 0, 0xdead_beef])),
        ("reset", Command::Reset, Vec::new()),
        ("write_multi", Command::RegionWriteMulti, words(&[1, 0, 4, 0, 7, 4, 6, 0])),
        ("feature_probe", Command::DeviceFeature, words(&[16, 1 | 1 << 18, 0, 0])),
        ("feature_state", Command::DeviceFeature, words(&[16, 2 | 1 << 17, 1, 0])),
        ("mig_read", Command::MigDataRead, words(&[8, 4096])),
        ("mig_write", Command::MigDataWrite, words(&[12, 4, 0])),
        ("memory_fault", Command::MemoryFault, fault.to_bytes()),
        ("region_state", Command::RegionState, RegionStateQuery { region: 0 }.to_bytes()),
    ]
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// As other clients write it: with members that are not ours, and others missing.
fn foreign_version() -> Vec<u8> {
    let json = br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
        "migration":{"pgsize":4096},"twin_socket":{"supported":true,"fd_index":0},
        "write_multiple":true,"pgsizes":4096,"max_dma_maps":65535,"x":[null,1.5e3,"\u00e9"]}}"#;
    [&[0, 0, 1, 0], json.as_slice(), &[0]].concat()
}

/// DMA_UNMAP with room for the bitmap of its pages.
fn dirty_unmap() -> Vec<u8> {
    let mut bytes = unmap(DmaUnmapFlags::DIRTY_BITMAP, 0x10_0000, 0x1000);
    bytes.extend(words(&[4096, 0, 8, 0]));
    bytes
}

fn replies() -> Vec<(&'static str, Command, Vec<u8>)> {
    let device =
        DeviceInfo { flags: DeviceFlags::RESET | DeviceFlags::PCI, num_regions: 9, num_irqs: 5 };
    let irq = IrqInfo { flags: IrqInfoFlags::EVENTFD, index: 1, count: 1 };
    let flags = RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP;
    let area = |offset| SparseArea { offset, size: 0x1000 };
    let region = RegionInfo {
        flags,
        index: 0,
        size: 1 << 16,
        file_offset: 0,
        sparse: vec![area(0), area(0x2000)],
    };
    let state = RegionState { decode: 1, epoch: 3, reads: 1, ..RegionState::default() };
    let verdict = FaultVerdict::Map { epoch: 3 };
    vec![
        ("reply_version", Command::Version, Version::proposal().to_bytes()),
        ("reply_info", Command::GetInfo, device.to_bytes()),
        ("reply_irq_info", Command::GetIrqInfo, irq.to_bytes()),
        ("reply_region_info", Command::GetRegionInfo, region.to_bytes(u32::MAX)),
        ("reply_region_cut", Command::GetRegionInfo, region.to_bytes(32)),
        ("reply_region_read", Command::RegionRead, write(7, 0, &[0x34, 0x12, 0xe8, 0x11])),
        ("reply_verdict", Command::MemoryFault, verdict.to_bytes()),
        ("reply_state", Command::RegionState, state.to_bytes()),
    ]
}

/// Whole sessions, with everything that can be set up.
fn sessions() {
    let proposal = Version::proposal().to_bytes();
    let command = MessageKind::Command { no_reply: false };
    let version = message(Command::Version, command, &proposal);
    let reset = message(Command::Reset, command, &[]);
    let all = DmaAccess::all();
    let none = DmaUnmapFlags::empty();
    let code = Command::code;
    let set_eventfd = |index| irqs(IrqAction::Trigger, IrqData::Eventfd, index, 0, 1);
    let register = |offset: u64, value: u64| write(0, offset, &value.to_le_bytes());
    let info = InfoQuery { index: 2, argsz: 64 }.to_region_bytes();
    let write_code = code(Command::RegionWrite);

    // A driver of the edu: windows, interrupts and a transfer in each direction.
    let mut driver = Script::new(EDU)
        .raw(&[], &version)
        .message(&[SEALED], code(Command::DmaMap), 0, &map(all, 0, 0x1_0000))
        .message(&[SHARED], code(Command::DmaMap), 0, &map(all, 0x1_0000, 0x1000))
        .message(&[READ_ONLY], code(Command::DmaMap), 0, &map(DmaAccess::READ, 0x2_0000, 0x1000))
        .message(&[], code(Command::DmaMap), 0, &map(all, 0x3_0000, 0x1000))
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &set_eventfd(0))
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &set_eventfd(1))
        .message(&[], write_code, 0, &write(7, 4, &[6, 0]));
    for (source, target, start) in
        [(0, 0x40000, 1), (0x40000, 0x1_0800, 7), (0x3_0000, 0x40000, 1), (0x40000, 0x3_0000, 3)]
    {
        let registers = [(0x80, source), (0x88, target), (0x90, 64), (0x98, start)];
        for (offset, value) in registers {
            driver = driver.message(&[], write_code, 0, &register(offset, value));
        }
    }
    let driver = driver
        .message(&[], write_code, 0, &write(0, 0x60, &[1, 0, 0, 0]))
        .message(&[], write_code, 0, &write(0, 0x64, &[1, 0, 0, 0]))
        .message(&[], code(Command::RegionRead), 0, &read(0, 0, 4))
        .message(&[], code(Command::DmaUnmap), 0, &unmap(none, 0, 0x2_0000))
        .message(&[], code(Command::Reset), 0, &[]);
    save("session", "driver", &driver.done());

    let plain = Script::new(IVSHMEM)
        .raw(&[], &version)
        .message(&[], code(Command::GetRegionInfo), 0, &info)
        .message(&[], write_code, 0, &write(7, 4, &[2, 0]))
        .message(&[], write_code, 0, &write(2, 0xfff0, &[1; 16]))
        .message(&[], code(Command::RegionRead), 0, &read(2, 0, 0x1_0000));
    save("session", "shared_memory", &plain.done());

    let pieces = Script::new(EDU)
        .raw(&[], &version[..3])
        .raw(&[], &version[3..20])
        .raw(&[], &version[20..])
        .raw(&[SHARED], &reset[..8])
        .raw(&[], &reset[8..]);
    save("session", "in_pieces", &pieces.done());

    let fds = [SHARED; 14];
    let flood = Script::new(GREETED)
        .message(&fds, code(Command::SetIrqs), 0, &set_eventfd(1))
        .raw(&fds, &reset[..8])
        .raw(&fds, &reset[8..]);
    save("session", "descriptors", &flood.done());

    let huge = Script::new(GREETED)
        .message(&[HUGE], code(Command::DmaMap), 0, &map(all, 0, 1 << 40))
        .message(&[], code(Command::DmaUnmap), 0, &unmap(none, 0, 1 << 40));
    save("session", "huge", &huge.done());

    let silent = Script::new(GREETED)
        .message(&[], code(Command::Reset), 0x10, &[])
        .message(&[], code(Command::RegionRead), 0x10, &read(9, 0, 4))
        .message(&[], code(Command::RegionRead), 0, &read(0, 0, 1 << 20))
        .message(&[], code(Command::RegionRead), 1, &[]);
    save("session", "no_reply", &silent.done());

    let mut oversized = reset.clone();
    oversized[4..8].copy_from_slice(&(HEADER_SIZE_U32 + (2 << 20)).to_ne_bytes());
    save("session", "oversized", &Script::new(GREETED).raw(&[SHARED], &oversized).done());
    oversized[4..8].copy_from_slice(&15_u32.to_ne_bytes());
    save("session", "undersized", &Script::new(GREETED).raw(&[], &oversized).done());
}

/// Sequences of writes and of what the function does: see the target for the operations.
fn config_space() {
    let write = |offset: u16, data: &[u8]| {
        let length = u8::try_from(data.len() - 1).expect("at most 64 bytes");
        [&[length], &offset.to_le_bytes()[..], data].concat()
    };
    let ones = [0xff; 64];
    for function in [0, 1, 2, 3, 0x82] {
        // BARs sized and placed, decode on; everything written with ones, dword by dword and in
        // one; errors and interrupts in between; resets.
        let mut input = vec![function];
        for bar in 0..6 {
            input.extend(write(0x10 + 4 * bar, &ones[..4]));
            input.extend(write(0x10 + 4 * bar, &[0, 0, 0xfe, 0xfe]));
        }
        input.extend(write(4, &[7, 4]));
        input.extend([0xc0, 1, 0xd0, 0, 0xe0, 0xe8, 0xd0, 3]);
        save("config_space", &format!("bars_{function:02x}"), &input);

        let mut input = vec![function];
        for offset in (0..0x100).step_by(4) {
            input.extend(write(offset, &ones[..4]));
        }
        save("config_space", &format!("ones_{function:02x}"), &input);

        let mut input = vec![function];
        for offset in (0x40..0x100).step_by(64) {
            input.extend(write(offset, &ones));
            input.extend([0xd0, 0, 0xd0, 31, 0xe8]);
            input.extend(write(offset, &[0; 64]));
        }
        input.extend([0xf0, 0xf1, 0xf2]);
        save("config_space", &format!("blocks_{function:02x}"), &input);

        let mut input = vec![function];
        for offset in (0x40..0xc0).step_by(4) {
            input.extend(write(offset, &[0x03]));
            input.extend(write(offset + 1, &[0x80, 0x81]));
            input.extend(write(offset, &[0]));
        }
        save("config_space", &format!("bytes_{function:02x}"), &input);
    }
    save("config_space", "extended", &[&[2][..], &write(0x8ffe, &ones[..8])].concat());
}
