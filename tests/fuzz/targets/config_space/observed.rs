//! What can be seen of a function.

use barkeep_backend::pci::{Decode, Function, PowerState, Register, spec};

/// Registers that software can't write and that the function changes as a write completes: what is
/// unmasked is delivered, and pending no more.
const FOLLOW_A_WRITE: [&str; 1] = ["Pending Bits"];

/// Per byte of configuration space, its bits of one kind.
pub(crate) struct Masks {
    pub(crate) writable: Vec<u8>,
    pub(crate) clearable: Vec<u8>,
    pub(crate) followers: Vec<u8>,
    pub(crate) retained: Vec<u8>,
    pub(crate) sticky: Vec<u8>,
}

impl Masks {
    pub(crate) fn of(function: &Function) -> Self {
        let follows = |register: &Register| FOLLOW_A_WRITE.contains(&register.name);
        Self {
            writable: bits(function, |register| register.read_write),
            clearable: bits(function, |register| register.write_one_to_clear),
            followers: bits(function, |register| if follows(register) { u32::MAX } else { 0 }),
            retained: bits(function, |register| register.reset_retains),
            sticky: bits(function, |register| register.sticky),
        }
    }
}

/// What an operation may change, as it was before or after one.
#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) image: Vec<u8>,
    pub(crate) table: Vec<u8>,
    pub(crate) pending: Vec<u8>,
    pub(crate) addresses: Vec<u64>,
    pub(crate) rom: Option<u32>,
    pub(crate) decode: Decode,
    pub(crate) bus_master: bool,
    pub(crate) intx: bool,
    pub(crate) msi: bool,
    pub(crate) msix: bool,
    pub(crate) power: PowerState,
    pub(crate) epoch: u64,
}

impl Observed {
    pub(crate) fn of(function: &Function) -> Self {
        let mut image = vec![0; function.config_size()];
        function.config_read(0, &mut image);
        let vectors = function.spec().msix.map(|msix| msix.vectors);
        let mut table = vec![0; vectors.map_or(0, |vectors| vectors.table_length())];
        function.msix_table_read(0, &mut table);
        let mut pending = vec![0; vectors.map_or(0, |vectors| vectors.pending_length())];
        function.msix_pending_read(0, &mut pending);
        Self {
            image,
            table,
            pending,
            addresses: function.bars().map(|bar| bar.address).collect(),
            rom: function.rom().map(|rom| rom.address),
            decode: function.decode(),
            bus_master: function.bus_master(),
            intx: function.intx_line(),
            msi: function.msi_enabled(),
            msix: function.msix_enabled(),
            power: function.power_state(),
            epoch: function.epoch(),
        }
    }

    /// What software can read.
    pub(crate) fn registers(&self) -> (&[u8], &[u8], &[u8]) {
        (&self.image, &self.table, &self.pending)
    }

    pub(crate) fn is_pending(&self, vector: u16) -> bool {
        self.pending[usize::from(vector / 8)] & 1 << (vector % 8) != 0
    }

    /// Reserved bits are clear, and what may be sent does not wait.
    pub(crate) fn check_msix(&self, function: &Function) {
        let Some(msix) = function.spec().msix else { return };
        for entry in self.table.chunks(spec::msix::ENTRY_LENGTH) {
            assert_eq!((entry[0] & 0b11, entry[12] & !1, &entry[13..]), (0, 0, &[0; 3][..]));
        }
        for (at, byte) in self.pending.iter().enumerate() {
            let there = usize::from(msix.vectors.count()).saturating_sub(8 * at).min(8);
            assert_eq!(u16::from(*byte) >> there, 0, "byte {at}");
        }
        let control = function.registers().iter().find(|register| {
            register.name == "Message Control"
                && self.image[register.offset - spec::msix::MESSAGE_CONTROL]
                    == spec::msix::CAPABILITY_ID
        });
        let control = control.expect("MSI-X has one").offset;
        let control = u16::from_le_bytes([self.image[control], self.image[control + 1]]);
        assert_eq!(control & spec::msix::CONTROL_ENABLE != 0, self.msix);
        if self.msix && self.bus_master && control & spec::msix::CONTROL_FUNCTION_MASK == 0 {
            for vector in 0..msix.vectors.count() {
                let at = usize::from(vector) * spec::msix::ENTRY_LENGTH;
                let masked = self.table[at + spec::msix::ENTRY_VECTOR_CONTROL] & 1 != 0;
                assert!(masked || !self.is_pending(vector), "vector {vector} waits");
            }
        }
    }
}

/// The bytes in which two images differ, by their place.
pub(crate) fn differences(one: &[u8], other: &[u8]) -> impl Iterator<Item = (usize, u8, u8)> {
    const CHUNK: usize = 64;
    let chunks = one.chunks(CHUNK).zip(other.chunks(CHUNK)).enumerate();
    chunks.filter(|(_, (one, other))| one != other).flat_map(|(chunk, (one, other))| {
        let bytes = one.iter().zip(other).enumerate();
        bytes
            .map(move |(at, (one, other))| (chunk * CHUNK + at, *one, *other))
            .filter(|(_, one, other)| one != other)
    })
}

/// Per byte of configuration space, the bits that `mask` picks from its register.
fn bits(function: &Function, mask: impl Fn(&Register) -> u32) -> Vec<u8> {
    let mut bits = vec![0; function.config_size()];
    for register in function.registers() {
        let width = register.width.bytes();
        bits[register.offset..][..width].copy_from_slice(&mask(register).to_le_bytes()[..width]);
    }
    bits
}
