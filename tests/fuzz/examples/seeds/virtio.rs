//! Queues, devices and functions that work: see the targets for their operations.

use super::save;

pub(crate) fn write_seeds() {
    virtqueues();
    devices();
    functions();
}

/// A queue with a chain of three, an indirect table and a ring that wraps.
fn virtqueues() {
    for flags in 0..4 {
        // Size 16; the table at 0, the available ring at 0x400, the used ring at 0x800.
        let mut input = vec![flags, 4, 0, 0, 0, 0, 0, 4, 0, 0, 8];
        let descriptor =
            |index: u8, page: u8, flags: u8, next: u8| [1, index, 0, 0, page, 16, flags, next];
        input.extend(descriptor(0, 0x10, 1, 1));
        input.extend(descriptor(1, 0x11, 3, 2));
        input.extend(descriptor(2, 0x12, 2, 0));
        // A table at 0x2000 with one descriptor, and the one that leads there: 16 bytes.
        input.extend([2, 0, 0, 0x20, 0, 0, 0, 0x21, 4, 2, 0]);
        input.extend([1, 3, 0, 0, 0x20, 2, 4, 0]);
        for _ in 0..20 {
            input.extend([3, 0, 3, 3, 5, 0, 5, 0, 5, 0]);
            input.extend([7, 0, 0, 0, 9, 0, 0, 0, 7, 0, 3, 0, 4, 0, 0, 0]);
            input.extend([8, 3, 8, 4, 8, 2, 8, 0, 0, 0, 3, 0, 8, 1]);
        }
        save("virtqueue", &format!("served_{flags}"), &input);
    }
}

/// Each device with requests of its own, with pauses, queue resets and moves in between.
fn devices() {
    for kind in 0..10 {
        let mut input = vec![kind];
        input.extend([0xff; 8]);
        // Every queue in its own place; a device has five at most.
        input.extend([0; 5]);
        for round in 0..12_u8 {
            for queue in 0..5 {
                input.extend([5, queue, round, 8, 0, round, round, 0, 1, 0, 0, 1, 1, 0]);
                input.extend([7, queue, 9, 0, 0xff]);
            }
            input.extend([10, 0, 60, 0]);
            input.extend([0xab; 60]);
            input.extend([11, 0]);
            match round % 4 {
                0 => input.extend([12, 0, 12, 0]),
                1 => input.extend([14, 0, 0]),
                2 => input.extend([15, 0, 1, 0, 0]),
                _ => input.extend([15, 0, 0]),
            }
        }
        save("virtio_device", &format!("served_{kind}"), &input);
    }
}

/// Each function set up, with requests, a reset of a queue and a move to itself.
fn functions() {
    for kind in 0..4 {
        let mut input = vec![kind, 0];
        input.extend([0xff; 6]);
        for round in 0..6_u8 {
            for queue in 0..4 {
                input.extend([10, queue, round, 8, 0, round, round, 0, 1, 0, 0, 1, 1, 0]);
            }
            input.extend([6, 0, 2, 7, 0, 14, 0, 1]);
            input.extend([0xab; 60]);
            match round % 3 {
                0 => input.extend([15, 0, 0, 0, 0]),
                // queue_select, queue_reset, and set up anew.
                1 => input.extend([0, 0, 8, 0, 0, 0, 0, 0, 19, 1, 0, 0, 8, 0, 1, 1, 1, 1, 1, 1]),
                _ => input.extend([13, 0, 0, 13, 0, 1]),
            }
        }
        save("virtio_pci", &format!("served_{kind}"), &input);
    }
}
