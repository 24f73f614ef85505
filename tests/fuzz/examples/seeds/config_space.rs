//! Sequences of operations: see the target for their codes.

use super::save;

/// Sequences of writes and of what the function does: see the target for the operations.
pub(crate) fn write_seeds() {
    let write = |offset: u16, data: &[u8]| {
        let length = u8::try_from(data.len() - 1).expect("at most 64 bytes");
        [&[length], &offset.to_le_bytes()[..], data].concat()
    };
    let ones = [0xff; 64];
    for function in [0, 1, 2, 3, 4, 5, 0x44, 0x84] {
        // BARs sized and placed, decode on; everything written with ones, dword by dword and in
        // one; errors and interrupts in between; resets.
        let mut input = vec![function];
        for bar in 0..6 {
            input.extend(write(0x10 + 4 * bar, &ones[..4]));
            input.extend(write(0x10 + 4 * bar, &[0, 0, 0xfe, 0xfe]));
        }
        input.extend(write(4, &[7, 4]));
        input.extend([0xc0, 1, 0xd0, 0, 0xb0, 0x10, 0, 4, 0, 0xe0, 0xb1, 1, 1, 1, 1, 0xd0, 3]);
        save("config_space", &format!("bars_{function:02x}"), &input);

        let mut input = vec![function];
        for offset in (0..0x100).step_by(4) {
            input.extend(write(offset, &ones[..4]));
        }
        save("config_space", &format!("ones_{function:02x}"), &input);

        let mut input = vec![function];
        for offset in (0x40..0x100).step_by(64) {
            input.extend(write(offset, &ones));
            input.extend([0xd0, 0, 0xd0, 31, 0xb3, 1, 0, 4, 0]);
            input.extend(write(offset, &[0; 64]));
        }
        input.extend([0xf0, 0xf1, 0xf2, 0xf3]);
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
    msix();
    power_and_errors();
}

/// Vectors raised, masked and unmasked, by their own bits and the function's; saved in between.
fn msix() {
    for (function, bar, at) in [(1_u8, 1_u16, 0_u16), (4, 1, 0x1800), (5, 1, 0x7f8)] {
        let vector = |vector: u16, entry: [u8; 16]| {
            let [bar, offset] = [bar.to_le_bytes(), (at + 16 * vector).to_le_bytes()];
            [&[0x40 + 15][..], &bar, &offset, &entry].concat()
        };
        let entry = |masked| [0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 1, 0, 0, 0, masked, 0, 0, 0];
        let mut power_on = [0; 16];
        power_on[12] = 1;
        let read = [&[0x9f][..], &bar.to_le_bytes(), &(at & 0x3f00).to_le_bytes()].concat();
        let mut input = vec![function, 0xef, 0xec, 0xa0, 0];
        input.extend(vector(0, entry(1)));
        input.extend([0xa0, 0, 0xe0]);
        input.extend(&read);
        input.extend(vector(0, power_on));
        input.extend([0xe0, 0xa0, 2]);
        input.extend(vector(2, entry(0)));
        input.extend([0xed, 0xa0, 2, 0xe0, 0xec, 0xe0]);
        input.extend(vector(0, entry(0)));
        input.extend(&read);
        input.push(0xf1);
        save("config_space", &format!("msix_{function:02x}"), &input);
    }
}

/// Every power state and reset with something to lose, and errors in each.
fn power_and_errors() {
    let errors = [[0xb0, 0, 0xe0, 4, 0], [0xb1, 0, 0xe0, 4, 0], [0xb6, 0, 1, 1, 0]].concat();
    for function in [0, 2, 4, 0x84, 0xc4] {
        let mut input = vec![function, 0xef, 0xeb, 0xee];
        input.extend(&errors);
        input.extend([0xe8]);
        input.extend(&errors);
        input.extend([0xe0, 0xe9, 0xef, 0xea, 0xef, 0xe0]);
        // Severity and masks of Advanced Error Reporting, if it has that.
        for (offset, value) in [(0x10c_u16, 0xff), (0x108, 0), (0x104, 0xff), (0x110, 0xff)] {
            input.push(3);
            input.extend((0x8000 | offset).to_le_bytes());
            input.extend([value; 4]);
            input.extend(&errors);
        }
        input.extend([0xf0, 0xf2, 0xf3]);
        save("config_space", &format!("errors_{function:02x}"), &input);
    }
}
