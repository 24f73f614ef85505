//! Whole sessions, with everything that can be set up.

use barkeep_fuzz::script::{ANSWERS, GREETED, How, LIKE_QEMU, Script, WITH_TWIN};
use barkeep_protocol::wire::{
    Command, DecodePageQuery, DmaAccess, DmaUnmapFlags, InfoQuery, IrqAction, IrqData, MessageKind,
    MigrationState, Version,
};

use super::messages::{
    io_fds, irqs, log_report, log_start, log_stop, map, mig_read, mig_write, read, set_state,
    unmap, write, write_multi,
};
use super::{message, save, with_size};

/// Kinds of descriptors, as the session target has them.
const SHARED: u8 = 0;
const SEALED: u8 = 1;
const EVENTFD: u8 = 2;
const HUGE: u8 = 4;
const READ_ONLY: u8 = 5;

/// Devices, likewise.
const EDU: u8 = 0;
const IVSHMEM: u8 = 1;
const DOORBELL: u8 = 2;
const EDU_ALWAYS: u8 = 3;

const COMMAND: MessageKind = MessageKind::Command { no_reply: false };

pub(crate) fn write_seeds() {
    let proposal = Version::proposal().to_bytes();
    let version = message(Command::Version, COMMAND, &proposal);
    let reset = message(Command::Reset, COMMAND, &[]);
    let all = DmaAccess::all();
    let none = DmaUnmapFlags::empty();
    let code = Command::code;
    let set_eventfd = |index| irqs(IrqAction::Trigger, IrqData::Eventfd, index, 0, 1);
    let register = |offset: u64, value: u64| write(0, offset, &value.to_le_bytes());
    let info = InfoQuery { index: 2, argsz: 64 }.to_region_bytes();
    let write_code = code(Command::RegionWrite);

    messages();
    migration();
    memory();
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

    let page = code(Command::DecodePage);
    let mut shown =
        Script::new(EDU).raw(&[], &version).message(&[], page, 0, &DecodePageQuery.to_bytes());
    for value in [2, 0, 6] {
        shown = shown
            .message(&[], write_code, 0, &write(7, 4, &[value, 0]))
            .message(&[], code(Command::RegionRead), 0, &read(0, 0, 4))
            .message(&[], page, 0x10, &DecodePageQuery.to_bytes());
    }
    let shown = shown.message(&[], code(Command::Reset), 0, &[]).message(
        &[],
        page,
        0,
        &DecodePageQuery.to_bytes(),
    );
    save("session", "decode_page", &shown.done());

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

    let oversized = with_size(reset.clone(), 2 << 20);
    save("session", "oversized", &Script::new(GREETED).raw(&[SHARED], &oversized).done());
    let undersized = with_size(reset, u32::MAX);
    save("session", "undersized", &Script::new(GREETED).raw(&[], &undersized).done());
}

/// Memory that only the client can reach, and how it may answer.
fn messages() {
    let answers = [
        ("spec", &[(How::Spec, 1), (How::Spec, 2)][..]),
        ("qemu", &[(How::Qemu, 1), (How::Qemu, 2), (How::Qemu, 3)]),
        ("error", &[(How::Error, 5), (How::Error, 0)]),
        ("never", &[(How::Never, 0), (How::Never, 0)]),
        ("other_id", &[(How::OtherId, 0)]),
        ("other_address", &[(How::OtherAddress, 0)]),
        ("short", &[(How::Short, 0)]),
        ("descriptor", &[(How::Descriptor, EVENTFD)]),
    ];
    for (name, answers) in answers {
        for (kind, bits) in [("plain", 0), ("twin", WITH_TWIN), ("like_qemu", LIKE_QEMU)] {
            let mut script = window(EDU | GREETED | bits);
            for start in [1, 7] {
                script = transfer(script, start);
                for (how, byte) in answers {
                    script = script.answer(*how, *byte);
                }
            }
            save("session", &format!("message_{name}_{kind}"), &script.done());
        }
    }
    let late = transfer(window(EDU_ALWAYS | GREETED), 1)
        .message(&[], Command::Reset.code(), 0, &[])
        .answer(How::Spec, 0)
        .message(&[], Command::DmaUnmap.code(), 0, &unmap(DmaUnmapFlags::ALL, 0, 0));
    save("session", "message_late", &transfer(late, 3).answer(How::Qemu, 9).done());
    let at_once = transfer(window(EDU | GREETED | ANSWERS), 7).migrate(0, 0);
    save("session", "message_at_once", &transfer(at_once, 3).done());
    let twin = transfer(window(EDU | GREETED | WITH_TWIN), 7)
        .twin(&[], &message(Command::Reset, COMMAND, &[]))
        .migrate(0, 0)
        .hang_up();
    save("session", "message_hang_up", &twin.done());
    let reply = message(Command::DmaRead, MessageKind::Reply { error: None }, &[0; 16]);
    let unasked = window(EDU | GREETED | WITH_TWIN).twin(&[], &reply);
    save("session", "message_unasked", &unasked.done());
}

/// A window without a file, and a driver that may master the bus.
fn window(kind: u8) -> Script {
    let code = Command::code;
    Script::new(kind)
        .message(&[], code(Command::DmaMap), 0, &map(DmaAccess::all(), 0, 0x10_0000))
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &eventfd(0, 1))
        .message(&[], code(Command::RegionWrite), 0, &write(7, 4, &[6, 0]))
}

/// A transfer of the edu between that window and its buffer.
fn transfer(mut script: Script, start: u64) -> Script {
    let (source, target) = if start & 2 == 0 { (0x800, 0x40000) } else { (0x40000, 0x900) };
    for (offset, value) in [(0x80, source), (0x88, target), (0x90, 64), (0x98, start)] {
        let body = write(0, offset, &u64::to_le_bytes(value));
        script = script.message(&[], Command::RegionWrite.code(), 0, &body);
    }
    script
}

/// States and their data, whole and damaged.
fn migration() {
    let state = |script: Script, state| {
        script.message(&[], Command::DeviceFeature.code(), 0, &set_state(state))
    };
    for device in [EDU, IVSHMEM, DOORBELL] {
        let script = working(device).migrate(0, 0).migrate(200, 0).migrate(8, 1);
        let script = script.message(&[], Command::Reset.code(), 0, &[]);
        let script = script.migrate(13, 1).migrate(70, 4);
        save("session", &format!("migration_{device}"), &script.done());

        let mut script = working(device);
        for (target, code, body) in [
            (MigrationState::StopCopy, Command::MigDataRead, mig_read(64)),
            (MigrationState::Running, Command::MigDataRead, mig_read(64)),
            (MigrationState::Resuming, Command::MigDataWrite, mig_write(b"barkeep1")),
            (MigrationState::Stop, Command::RegionRead, read(0, 0, 4)),
            (MigrationState::PreCopy, Command::Reset, Vec::new()),
            (MigrationState::Stop, Command::RegionWrite, write(7, 4, &[0, 4])),
            (MigrationState::Running, Command::RegionRead, read(7, 0, 64)),
        ] {
            script = state(script, target).message(&[], code.code(), 0, &body);
        }
        save("session", &format!("states_{device}"), &script.done());
    }
}

/// A device in the midst of things: with MSI-X, an interrupt under way and vectors masked again.
fn working(device: u8) -> Script {
    let code = Command::code;
    let doorbell = u32::from(device == DOORBELL);
    let mut script = Script::new(device | GREETED)
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &eventfd(2 * doorbell, 1))
        .message(&[], code(Command::RegionWriteMulti), 0, &write_multi());
    if device == DOORBELL {
        for (region, offset, data) in [
            // Enable, and one vector masked, unmasked and masked again.
            (7, MSIX_CONTROL + 1, &[0x80][..]),
            (1, 12, &[0; 4]),
            (1, 12, &[1, 0, 0, 0]),
            (0, 12, &[0; 4]),
            (1, 16, &[0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            (0, 12, &[1, 0, 0, 0]),
        ] {
            script =
                script.message(&[], code(Command::RegionWrite), 0, &write(region, offset, data));
        }
        script = script.message(&[], code(Command::RegionRead), 0, &read(1, 0, 4096));
    }
    script
}

/// Message Control of the ivshmem's MSI-X, behind its power management.
const MSIX_CONTROL: u64 = 0x4a;

fn eventfd(index: u32, count: u32) -> Vec<u8> {
    irqs(IrqAction::Trigger, IrqData::Eventfd, index, 0, count)
}

/// Windows onto files: a log of what is written, and files that shrink.
fn memory() {
    let code = Command::code;
    let logged = Script::new(EDU | GREETED)
        .message(&[SHARED], code(Command::DmaMap), 0, &map(DmaAccess::all(), 0, 0x1_0000))
        .message(&[], code(Command::RegionWrite), 0, &write(7, 4, &[6, 0]))
        .message(&[], code(Command::DeviceFeature), 0, &log_start(&[(0, 0x1_0000)]));
    let logged = transfer(logged, 3)
        .message(&[], code(Command::DeviceFeature), 0, &log_report(0, 0x1_0000))
        .message(&[], code(Command::DeviceFeature), 0, &log_stop());
    save("session", "logging", &logged.done());

    let shrunk = Script::new(EDU | GREETED)
        .message(&[SHARED], code(Command::DmaMap), 0, &map(DmaAccess::all(), 0, 0x1_0000))
        .message(&[], code(Command::RegionWrite), 0, &write(7, 4, &[6, 0]))
        .truncate(0);
    let shrunk = transfer(transfer(shrunk, 1), 3).truncate(16);
    save("session", "shrunk", &transfer(shrunk, 3).done());

    let unmask = irqs(IrqAction::Unmask, IrqData::Eventfd, 0, 0, 1);
    let unmasks_itself = Script::new(EDU | GREETED)
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &eventfd(0, 1))
        .message(&[EVENTFD], code(Command::SetIrqs), 0, &unmask)
        .message(&[], code(Command::RegionWrite), 0, &write(7, 4, &[2, 0]))
        .message(&[], code(Command::RegionWrite), 0, &write(0, 0x60, &[1, 0, 0, 0]))
        .message(&[], code(Command::RegionWrite), 0, &write(0, 0x64, &[1, 0, 0, 0]));
    save("session", "unmasks_itself", &unmasks_itself.done());

    let mut rings = working(DOORBELL);
    for argsz in [16, 16 + 4 * 40, 16 + 4 * 48, 4096] {
        rings = rings.message(&[], code(Command::GetRegionIoFds), 0, &io_fds(0, argsz));
    }
    let rings = rings.message(&[EVENTFD; 4], code(Command::SetIrqs), 0, &eventfd(2, 4)).message(
        &[],
        code(Command::RegionWrite),
        0,
        &write(0, 12, &[3, 0, 0, 0]),
    );
    save("session", "rings", &rings.done());
}
