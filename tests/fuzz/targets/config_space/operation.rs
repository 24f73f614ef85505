//! What is done to a function.

use barkeep_backend::pci::{
    BarIndex, BarOwner, BarPiece, Effects, ErrorMessage, Function, MsiOutcome, RequestKind,
    ResetKind, UnsupportedRequest, spec,
};
use barkeep_fuzz::Input;

use crate::observed::Observed;

#[derive(Clone, Debug)]
pub(crate) enum Operation<'a> {
    ConfigWrite { offset: usize, data: &'a [u8] },
    BarWrite { bar: BarIndex, offset: u64, data: &'a [u8] },
    BarRead { bar: BarIndex, offset: u64, length: usize },
    Intx(bool),
    Msi(u8),
    Msix(u16),
    UnsupportedRequest(UnsupportedRequest),
    Reset(ResetKind),
}

/// What an operation brings.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) effects: Effects,
    pub(crate) intx: Option<bool>,
    raised: Option<MsiOutcome>,
    message: Option<ErrorMessage>,
    read: Vec<u8>,
}

/// What a read holds where nobody answers.
const ONES: u8 = 0xff;

impl<'a> Operation<'a> {
    /// Takes the next operation; `None` is saving and restoring.
    pub(crate) fn take(input: &mut Input<'a>, function: &Function) -> Option<Self> {
        let op = input.u8();
        let length = usize::from(op & 0x3f) + 1;
        Some(match op {
            0..0x40 => {
                let offset = usize::from(input.u16());
                // Most of what there is lies in the first 256 bytes.
                let offset = if offset & 0x8000 == 0 { offset & 0xff } else { offset & 0x1fff };
                Self::ConfigWrite { offset, data: input.bytes(length) }
            }
            0x40..0x80 => {
                let (bar, offset) = place(input);
                Self::BarWrite { bar, offset, data: input.bytes(length) }
            }
            0x80..0xa0 => {
                let (bar, offset) = place(input);
                Self::BarRead { bar, offset, length: usize::from(op & 0x1f) * 67 }
            }
            0xa0..0xb0 => Self::Msix(u16::from(input.u8()) | u16::from(op & 1) << 8),
            0xb0..0xc0 => Self::UnsupportedRequest(UnsupportedRequest {
                kind: [
                    RequestKind::MemoryRead,
                    RequestKind::MemoryWrite,
                    RequestKind::IoRead,
                    RequestKind::IoWrite,
                ][usize::from(op & 3)],
                address: u64::from(input.u16()) << (op & 0xc) << (op & 0xc),
                length: input.u16().into(),
            }),
            0xc0..0xd0 => Self::Intx(input.u8() & 1 != 0),
            0xd0..0xe0 => Self::Msi(input.u8()),
            0xe0..0xe8 => return None,
            0xe8..0xf0 => shortcut(op, function),
            _ => Self::Reset(
                [ResetKind::Soft, ResetKind::FunctionLevel, ResetKind::Hot, ResetKind::Device]
                    [usize::from(op & 3)],
            ),
        })
    }

    pub(crate) fn apply(&self, function: &mut Function) -> Outcome {
        let mut outcome = Outcome::default();
        match *self {
            Self::ConfigWrite { offset, data } => {
                outcome.effects = function.config_write(offset, data);
            }
            Self::BarWrite { bar, offset, data } => {
                for BarPiece { owner, offset, data: part } in
                    pieces(function, bar, offset, data.len())
                {
                    if owner == BarOwner::MsixTable {
                        let mut effects = function.msix_table_write(offset, &data[part]);
                        assert!(outcome.effects.is_empty(), "a BAR has one table");
                        std::mem::swap(&mut outcome.effects, &mut effects);
                    }
                }
            }
            Self::BarRead { bar, offset, length } => {
                outcome.read = vec![ONES; length];
                for BarPiece { owner, offset, data } in pieces(function, bar, offset, length) {
                    let part = &mut outcome.read[data];
                    match owner {
                        BarOwner::MsixTable => function.msix_table_read(offset, part),
                        BarOwner::MsixPending => function.msix_pending_read(offset, part),
                        BarOwner::Device => {}
                    }
                }
            }
            Self::Intx(asserted) => outcome.intx = function.set_intx(asserted),
            Self::Msi(vector) => outcome.raised = Some(function.raise_msi(vector)),
            Self::Msix(vector) => outcome.raised = Some(function.raise_msix(vector)),
            Self::UnsupportedRequest(request) => {
                outcome.message = function.record_unsupported_request(&request);
            }
            Self::Reset(kind) => outcome.effects = function.reset(kind),
        }
        outcome
    }

    /// What holds for this operation beside what holds for all of them.
    pub(crate) fn check(
        &self,
        outcome: &Outcome,
        function: &Function,
        before: &Observed,
        now: &Observed,
    ) {
        match *self {
            Self::BarWrite { bar, offset, data } => {
                assert_eq!(now.image, before.image);
                let mut expected = before.table.clone();
                for piece in pieces(function, bar, offset, data.len()) {
                    if piece.owner == BarOwner::MsixTable {
                        write_table(&mut expected, piece.offset, &data[piece.data]);
                    }
                }
                assert_eq!(now.table, expected);
                let delivered = outcome.effects.msix.deliver.iter().count();
                let pending = |observed: &Observed| {
                    observed.pending.iter().map(|byte| byte.count_ones() as usize).sum::<usize>()
                };
                assert_eq!(pending(before), pending(now) + delivered);
            }
            Self::BarRead { bar, offset, length } => {
                assert_eq!(now.registers(), before.registers());
                let mut expected = vec![ONES; length];
                for BarPiece { owner, offset, data } in pieces(function, bar, offset, length) {
                    let start = usize::try_from(offset).expect("inside of it");
                    let structure = match owner {
                        BarOwner::Device => continue,
                        BarOwner::MsixTable => &now.table,
                        BarOwner::MsixPending => &now.pending,
                    };
                    expected[data.clone()].copy_from_slice(&structure[start..][..data.len()]);
                }
                assert_eq!(outcome.read, expected);
            }
            Self::Msi(vector) => {
                let may = now.msi && now.bus_master && vector < function.msi_vectors();
                assert_eq!(outcome.raised != Some(MsiOutcome::Dropped), may, "{outcome:?}");
                assert_eq!((&now.table, &now.pending), (&before.table, &before.pending));
            }
            Self::Msix(vector) => {
                let count = function.spec().msix.map_or(0, |msix| msix.vectors.count());
                let may = now.msix && now.bus_master && vector < count;
                assert_eq!(outcome.raised != Some(MsiOutcome::Dropped), may, "{outcome:?}");
                let pending = outcome.raised == Some(MsiOutcome::Pending);
                assert!(!pending || now.is_pending(vector));
                assert_eq!((&now.image, &now.table), (&before.image, &before.table));
            }
            Self::Intx(_) | Self::UnsupportedRequest(_) => {
                assert_eq!((&now.table, &now.pending), (&before.table, &before.pending));
            }
            Self::ConfigWrite { .. } | Self::Reset(_) => {}
        }
    }
}

/// Mostly where something is.
fn place(input: &mut Input<'_>) -> (BarIndex, u64) {
    let place = u64::from(input.u16());
    let bar = BarIndex::ALL[usize::try_from(place % 6).expect("below 6")];
    let offset = u64::from(input.u16());
    let offset = if place & 0x8000 == 0 { offset & 0x3fff } else { offset << (place >> 8 & 0x3f) };
    (bar, offset)
}

/// The pieces of an access: they cover what is in the BAR, without a gap, each by another owner than
/// the last.
fn pieces(function: &Function, bar: BarIndex, offset: u64, length: usize) -> Vec<BarPiece> {
    let pieces: Vec<_> = function.bar_pieces(bar, offset, length).collect();
    let mut covered = 0;
    for piece in &pieces {
        assert_eq!(piece.data.start, covered);
        assert!(!piece.data.is_empty());
        covered = piece.data.end;
    }
    assert!(pieces.windows(2).all(|pair| pair[0].owner != pair[1].owner));
    let size = function.bar(bar).map_or(0, |bar| bar.size);
    let inside = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
    assert_eq!(covered, length.min(inside));
    pieces
}

/// The table's rules, once more.
fn write_table(table: &mut [u8], offset: u64, data: &[u8]) {
    let offset = usize::try_from(offset).expect("inside of it");
    for (at, value) in (offset..).zip(data) {
        let mask = match at % spec::msix::ENTRY_LENGTH {
            0 => 0xfc,
            12 => 1,
            13.. => 0,
            _ => 0xff,
        };
        table[at] = table[at] & !mask | value & mask;
    }
}

/// Writes that would be long in coming otherwise.
fn shortcut<'a>(op: u8, function: &Function) -> Operation<'a> {
    let (capability, register, data): (u8, usize, &[u8]) = match op & 7 {
        0 => (spec::power::CAPABILITY_ID, spec::power::PMCSR, &[3]),
        1 => (spec::power::CAPABILITY_ID, spec::power::PMCSR, &[0]),
        2 => (spec::express::CAPABILITY_ID, spec::express::DEVICE_CONTROL + 1, &[0x80]),
        3 => (spec::express::CAPABILITY_ID, spec::express::DEVICE_CONTROL, &[0x0f]),
        4 => (spec::msix::CAPABILITY_ID, spec::msix::MESSAGE_CONTROL + 1, &[0x80]),
        5 => (spec::msix::CAPABILITY_ID, spec::msix::MESSAGE_CONTROL + 1, &[0xc0]),
        6 => (spec::msi::CAPABILITY_ID, spec::msi::MESSAGE_CONTROL, &[0x71]),
        _ => (0, 0, &[7, 1]),
    };
    let offset = find(function, capability).map_or(spec::header::COMMAND, |at| at + register);
    Operation::ConfigWrite { offset, data }
}

/// Where the capability with this ID is.
fn find(function: &Function, id: u8) -> Option<usize> {
    let byte = |at: usize| {
        let mut byte = [0];
        function.config_read(at, &mut byte);
        byte[0]
    };
    let mut at = usize::from(byte(spec::header::CAPABILITIES_POINTER));
    // There is no room for more of them.
    for _ in 0..64 {
        if at == 0 || byte(at) == id {
            break;
        }
        at = byte(at + 1).into();
    }
    (at != 0).then_some(at)
}
