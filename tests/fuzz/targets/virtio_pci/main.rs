//! A virtio function behind a session, and a guest that writes its registers, its configuration space
//! and its rings as it likes, while its VMM takes memory away, resets the function and moves it.
//! Every request is answered and the session goes on; a device that needs a reset says so until it
//! gets one; memory that was taken back is left alone; a function that moves reads as before.
#![no_main]

mod client;

use barkeep_fuzz::Input;
use barkeep_fuzz::requests::{self, Table};
use libfuzzer_sys::fuzz_target;

use self::client::Client;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut run =
        Run { client: Client::new(input.u8()), available: [0; 4], moves: 0, failed: false };
    run.client.map();
    run.client.connect_interrupts();
    run.enable();
    if input.u8() & 1 == 0 {
        run.set_up(&mut input);
    }
    while !input.is_empty() {
        run.step(&mut input);
        run.check();
    }
});

struct Run {
    client: Client,
    /// Available indices of the rings that this set up.
    available: [u16; 4],
    moves: u32,
    /// Whether the device said that it needs a reset.
    failed: bool,
}

const SIZE: u16 = 16;
const CONFIG: u32 = 7;
const BAR0: u32 = 0;
const STATUS: u64 = 0x14;
const NEEDS_RESET: u8 = 64;
const NOTIFY: u64 = 0x4000;
const COMMAND: u64 = 4;
/// Each takes the time of many other steps.
const MAX_MOVES: u32 = 4;

/// Offset and width of the fields of the common configuration (4.1.4.3).
const FIELDS: [(u64, usize); 20] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (STATUS, 1),
    (0x15, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1e, 2),
    (0x20, 8),
    (0x28, 8),
    (0x30, 8),
    (0x20, 4),
    (0x24, 4),
    (0x38, 2),
    (0x3a, 2),
];

impl Run {
    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        let queue = u16::from(input.u8()) % 4;
        match kind % 16 {
            0 | 1 => {
                let (offset, width) = FIELDS[usize::from(input.u8()) % FIELDS.len()];
                // Queues are numbered from 0; addresses lie in memory.
                let value = u64::from(input.u16() & 0x3fff);
                let value = if input.u8() & 0xf0 == 0xf0 { !value } else { value };
                self.write_common(offset, &value.to_le_bytes()[..width]);
            }
            2 => {
                let (offset, width) = (u64::from(input.u8() % 0x40), usize::from(input.u8() % 9));
                let _ = self.client.read(BAR0, offset, width);
            }
            3 => {
                let (bar, offset) = (u32::from(input.u8() & 2), u64::from(input.u16()));
                let length = input.u8() % 16;
                self.client.write(bar, offset, input.bytes(length.into()));
                self.failed = false;
            }
            4 => {
                let (bar, offset) = (u32::from(input.u8() & 2), u64::from(input.u16()));
                let _ = self.client.read(bar, offset, usize::from(input.u8() % 16));
            }
            5 => {
                let offset = u64::from(input.u8());
                let length = input.u8() % 5;
                self.client.write(CONFIG, offset, input.bytes(length.into()));
                self.failed = false;
            }
            6 => self.client.write(CONFIG, COMMAND, &[input.u8() & 7]),
            7 => self.enable(),
            8 => self.set_up(input),
            9 => {
                let (offset, length) = (u64::from(input.u16() & 0x3fff), input.u8() % 64);
                self.client.store(offset, input.bytes(length.into()));
            }
            10 | 11 => {
                let table = Table { address: ring(queue), size: SIZE };
                let (kind, client) = (self.client.kind, &self.client);
                let head = requests::write(kind, queue, table, input, |at, bytes| {
                    client.store(at, bytes);
                });
                self.make_available(queue, head);
                self.notify(queue);
            }
            12 => {
                self.make_available(queue, input.u16() & 0x1f);
                self.notify(u16::from(input.u8() % 8));
            }
            13 => match input.u8() % 4 {
                0 => self.client.unmap(),
                1 => self.client.map(),
                2 => self.client.connect_interrupts(),
                _ => self.client.disconnect_interrupts(),
            },
            14 => match input.u8() % 4 {
                0 => {
                    self.client.reset();
                    self.failed = false;
                    self.enable();
                }
                _ => self.client.host_says(input.bytes(60)),
            },
            _ if self.moves < MAX_MOVES => {
                self.moves += 1;
                self.move_it(input.u16(), input.u8());
            }
            _ => {}
        }
    }

    fn enable(&mut self) {
        self.client.write(CONFIG, COMMAND, &[6, 4]);
        // Message control of MSI-X: enabled.
        self.client.write(CONFIG, self.client.msix + 3, &[0x80]);
    }

    /// What a driver does (3.1.1).
    fn set_up(&mut self, input: &mut Input<'_>) {
        let features = u64::from(input.u32()) | u64::from(input.u16()) << 32 | 1 << 32;
        self.write_common(STATUS, &[0]);
        self.write_common(STATUS, &[3]);
        for half in 0..2_u8 {
            self.write_common(0x00, &[half, 0, 0, 0]);
            self.write_common(0x08, &[half, 0, 0, 0]);
            let offered = self.client.read(BAR0, 0x04, 4);
            let wanted = (features >> (32 * half)).to_le_bytes();
            let accepted: Vec<u8> = offered.iter().zip(wanted).map(|(a, b)| a & b).collect();
            self.write_common(0x0c, &accepted);
        }
        self.write_common(STATUS, &[11]);
        for queue in 0..4_u16 {
            self.available[usize::from(queue)] = 0;
            self.client.store(ring(queue) + 0x200, &[0; 0x200]);
            self.write_common(0x16, &queue.to_le_bytes());
            self.write_common(0x18, &SIZE.to_le_bytes());
            self.write_common(0x1a, &(queue + 1).to_le_bytes());
            for (register, part) in [(0x20, 0), (0x28, 0x200), (0x30, 0x300)] {
                self.write_common(register, &(ring(queue) + part).to_le_bytes());
            }
            self.write_common(0x1c, &[1, 0]);
        }
        self.write_common(STATUS, &[15]);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        self.client.write(BAR0, offset, data);
        if offset == STATUS && data == [0] {
            self.failed = false;
        }
    }

    fn make_available(&mut self, queue: u16, head: u16) {
        let index = &mut self.available[usize::from(queue)];
        let slot = ring(queue) + 0x204 + 2 * u64::from(*index % SIZE);
        *index = index.wrapping_add(1);
        let bytes = index.to_le_bytes();
        self.client.store(slot, &head.to_le_bytes());
        self.client.store(ring(queue) + 0x202, &bytes);
    }

    fn notify(&mut self, queue: u16) {
        self.client.write(BAR0, NOTIFY + 0x1000 * u64::from(queue), &queue.to_le_bytes());
    }

    /// Its state goes out and in again, perhaps not as it was.
    fn move_it(&mut self, at: u16, flip: u8) {
        let before = self.registers();
        let Some(mut state) = self.client.save() else { return };
        let at = usize::from(at) % state.len();
        state[at] ^= flip;
        if !self.client.restore(&state) {
            assert_ne!(flip, 0, "it takes its own state");
            self.client.reset();
            self.failed = false;
            return self.enable();
        }
        if flip == 0 {
            // It may have failed since.
            let mut now = self.registers();
            now.0 &= !NEEDS_RESET | before.0;
            assert_eq!(now, before, "it reads as before");
        } else {
            self.failed = false;
        }
    }

    /// The device's status, and what else is in the common configuration.
    fn registers(&mut self) -> (u8, Vec<Vec<u8>>) {
        let read = |(offset, width)| self.client.read(BAR0, offset, width);
        let mut fields: Vec<_> = FIELDS.into_iter().map(read).collect();
        (std::mem::take(&mut fields[6])[0], fields)
    }

    fn check(&mut self) {
        let status = self.client.read(BAR0, STATUS, 1)[0];
        // All ones where nothing decodes.
        if status == 0xff {
            return;
        }
        assert_eq!(status & 0x30, 0, "bits that nothing defines");
        assert!(status & 4 == 0 || status & 8 != 0, "DRIVER_OK without FEATURES_OK");
        assert!(!self.failed || status & NEEDS_RESET != 0, "it was not reset");
        self.failed = status & NEEDS_RESET != 0;
    }
}

/// Where the rings of a queue are.
fn ring(queue: u16) -> u64 {
    u64::from(queue) * 0x400
}
