//! The page on which a client sees what its function decodes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use barkeep_protocol::page::decode::{self, Counters, DecodeState, DecodeWriter, LENGTH, Space};
use barkeep_protocol::wire::RegionState;

use super::served::Served;
use crate::pci::{Bar, BarKind};
use crate::state::{Heirs, SharedPage};

/// One client's page, which is there once the client has asked for it. Nothing is ever read from it
/// that matters to anybody else.
#[derive(Debug)]
pub(super) struct ClientPage {
    heirs: Heirs,
    writer: Option<DecodeWriter<SharedPage>>,
}

impl ClientPage {
    /// None yet.
    pub(super) fn new(heirs: Heirs) -> Self {
        Self { heirs, writer: None }
    }

    /// That of a predecessor, who may have been in the middle of writing it.
    pub(super) fn adopt(file: OwnedFd) -> io::Result<Self> {
        let writer = DecodeWriter::new(SharedPage::adopt(file, LENGTH)?);
        Ok(Self { heirs: Heirs::Holder, writer: Some(writer.ok_or(io::ErrorKind::InvalidData)?) })
    }

    /// A descriptor to read it with.
    pub(super) fn open(&mut self, function: &dyn Served) -> io::Result<OwnedFd> {
        if self.writer.is_none() {
            let page = SharedPage::new("barkeep-decode", LENGTH, self.heirs)?;
            self.writer = DecodeWriter::new(page);
        }
        self.show(function);
        let page = self.writer.as_ref().map(DecodeWriter::words);
        page.ok_or(io::ErrorKind::InvalidData)?.reader()
    }

    /// Brings it up to date.
    pub(super) fn show(&mut self, function: &dyn Served) {
        if let Some(writer) = &mut self.writer {
            writer.count(function.completions());
            writer.show(&function.decode_state(), SharedPage::before_store);
        }
    }

    /// Readers find nothing until a successor shows something, if it knows how.
    pub(super) fn suspend(&mut self) {
        self.writer.iter_mut().for_each(DecodeWriter::suspend);
    }

    /// The client does not get it.
    pub(super) fn discard(&mut self) {
        self.writer = None;
    }

    /// Its file, for a successor.
    pub(super) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.writer.as_ref().map(|writer| writer.words().as_fd())
    }
}

/// A state with these BARs, of which each decodes or not.
pub(super) fn state(epoch: u64, bars: impl IntoIterator<Item = (Bar, bool)>) -> DecodeState {
    let mut state = DecodeState { epoch, ..DecodeState::default() };
    for (bar, decodes) in bars {
        let Bar { index, kind, size, address } = bar;
        let space = match kind {
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => Space::Memory,
            BarKind::Io => Space::Io,
        };
        state.bars[usize::from(index)] = Some(decode::Bar { address, size, space, decodes });
    }
    state
}

/// What was completed in all regions.
pub(super) fn counters(regions: &[RegionState]) -> Counters {
    regions.iter().fold(Counters::default(), |sum, region| Counters {
        reads_ur: sum.reads_ur.wrapping_add(region.reads_ur),
        writes_dropped: sum.writes_dropped.wrapping_add(region.writes_dropped),
        memory_faults: sum.memory_faults.wrapping_add(region.memory_faults),
    })
}
