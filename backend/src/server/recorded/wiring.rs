//! What a client has set up around a function, as plain data.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use barkeep_protocol::wire::{
    Command, DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags, FeatureRequest, IrqAction, IrqData,
    PciIrq, Request, SetIrqs,
};
use serde::{Deserialize, Serialize};

use super::windows::{Window, Windows};
use crate::server::request_error::RequestError;
use crate::server::served::{Reply, Served};
use crate::state::{FdKey, SectionId};

/// Windows of memory, eventfds and dirty logging: what a successor asks of its function again in the
/// client's name. It knows requests that were successful, and no function: so it is the same for all
/// kinds of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wiring {
    /// Recorded apart.
    #[serde(skip)]
    windows: Windows,
    /// Eventfds to signal, by interrupt index and vector.
    irqs: BTreeMap<(u32, u32), u64>,
    /// The eventfd that unmasks INTx.
    unmask: Option<u64>,
    /// The client has masked INTx.
    masked: bool,
    /// The payload of the request that started to log dirty pages.
    logging: Option<Vec<u8>>,
    /// Something besides the windows has changed since it was recorded.
    #[serde(skip)]
    changed: bool,
}

/// Whether a request with this number can change the wiring.
fn concerns(command: u16) -> bool {
    [Command::DmaMap, Command::DmaUnmap, Command::SetIrqs, Command::DeviceFeature]
        .iter()
        .any(|concerned| concerned.code() == command)
}

impl Wiring {
    /// With the windows as they were recorded.
    pub(super) fn with(self, windows: Windows) -> Self {
        Self { windows, ..self }
    }

    pub(super) fn windows(&self) -> &Windows {
        &self.windows
    }

    /// What is to be recorded anew.
    pub(super) fn take_changes(&mut self) -> Vec<(SectionId, Vec<u8>)> {
        let own = std::mem::take(&mut self.changed).then(|| {
            (SectionId::Wiring, postcard::to_allocvec(self).expect("plain data serialises"))
        });
        own.into_iter().chain(self.windows.take_changes()).collect()
    }

    /// Notes a request that was successful. `keys` are those of its descriptors; those that are not
    /// needed any more are appended to `unused`.
    pub(super) fn note(
        &mut self,
        command: u16,
        body: &[u8],
        keys: &[FdKey],
        unused: &mut Vec<FdKey>,
    ) {
        if !concerns(command) {
            return;
        }
        self.changed |= match Request::parse(command, body) {
            Ok(Request::DmaMap(map)) => {
                self.map(&map, keys.first());
                false
            }
            Ok(Request::DmaUnmap(unmap)) => {
                self.unmap(&unmap, unused);
                false
            }
            Ok(Request::SetIrqs(set)) => self.set_irqs(&set, keys, unused),
            Ok(Request::DeviceFeature(feature)) => match feature.request {
                FeatureRequest::StartLogging(_) => {
                    self.logging = Some(body.to_vec());
                    true
                }
                FeatureRequest::StopLogging { .. } => self.logging.take().is_some(),
                _ => false,
            },
            _ => false,
        };
    }

    /// INTx was unmasked by its eventfd.
    pub(super) fn unmasked(&mut self) {
        self.changed |= std::mem::take(&mut self.masked);
    }

    /// The keys of all descriptors that it refers to.
    pub(super) fn keys(&self) -> impl Iterator<Item = FdKey> {
        self.windows.keys().chain(self.eventfds())
    }

    pub(super) fn refers_to(&self, key: FdKey) -> bool {
        self.windows.uses(key) > 0 || self.eventfds().any(|referred| referred == key)
    }

    fn eventfds(&self) -> impl Iterator<Item = FdKey> {
        self.irqs.values().copied().chain(self.unmask).map(FdKey)
    }

    /// Sets up a fresh function in the same way. A descriptor is `taken` by its key, once for each
    /// place that it has.
    ///
    /// # Errors
    /// The function refuses what its predecessor took, or a descriptor is missing. Some of the wiring
    /// may be there then.
    pub(super) fn replay(
        &self,
        function: &mut dyn Served,
        mut take: impl FnMut(FdKey) -> Option<OwnedFd>,
    ) -> Result<(), ReplayError> {
        let mut fd = |key: u64| take(FdKey(key)).ok_or(ReplayError::Missing(key));
        for (address, window) in self.windows.iter() {
            let file = window.key.map(&mut fd).transpose()?;
            let access = DmaAccess::from_bits_truncate(window.access);
            let map = DmaMap { access, file_offset: window.offset, address, size: window.size };
            function.dma_map(&map, file)?;
        }
        for (&(index, start), &key) in &self.irqs {
            set_eventfd(function, IrqAction::Trigger, index, start, fd(key)?)?;
        }
        let intx_index = PciIrq::Intx.index();
        if let Some(key) = self.unmask {
            set_eventfd(function, IrqAction::Unmask, intx_index, 0, fd(key)?)?;
        }
        if self.masked {
            let set = SetIrqs {
                action: IrqAction::Mask,
                data: IrqData::None,
                index: intx_index,
                start: 0,
                count: 1,
            };
            function.set_irqs(&set, Vec::new())?;
        }
        if let Some(body) = &self.logging
            && let Ok(Request::DeviceFeature(feature)) =
                Request::parse(Command::DeviceFeature.code(), body)
        {
            let (mut body, mut fds) = (Vec::new(), Vec::new());
            function.device_feature(&feature, &mut Reply::new(&mut body, &mut fds))?;
        }
        Ok(())
    }

    fn map(&mut self, map: &DmaMap, key: Option<&FdKey>) {
        let DmaMap { access, file_offset: offset, address, size } = *map;
        let window = Window { size, access: access.bits(), offset, key: key.map(|key| key.0) };
        self.windows.insert(address, window);
    }

    fn unmap(&mut self, unmap: &DmaUnmap, unused: &mut Vec<FdKey>) {
        let range = if unmap.flags.contains(DmaUnmapFlags::ALL) {
            0..=u64::MAX
        } else {
            // No window is split: it was successful, so it is not empty either.
            unmap.address..=unmap.address.saturating_add(unmap.size.saturating_sub(1))
        };
        self.windows.remove(range, unused);
    }

    fn set_irqs(&mut self, set: &SetIrqs<'_>, keys: &[FdKey], unused: &mut Vec<FdKey>) -> bool {
        let intx = PciIrq::from_index(set.index) == Some(PciIrq::Intx);
        if set.disables_index() {
            let all = (set.index, 0)..=(set.index, u32::MAX);
            unused.extend(self.irqs.extract_if(all, |_, _| true).map(|(_, key)| FdKey(key)));
            if intx {
                unused.extend(self.unmask.take().map(FdKey));
                self.masked = false;
            }
            return true;
        }
        match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::Eventfd) => {
                for (position, vector) in (set.start..set.start + set.count).enumerate() {
                    let before = match keys.get(position) {
                        Some(key) => self.irqs.insert((set.index, vector), key.0),
                        None => self.irqs.remove(&(set.index, vector)),
                    };
                    unused.extend(before.map(FdKey));
                }
                // A new eventfd starts unmasked.
                self.masked &= !(intx && set.count > 0);
            }
            (IrqAction::Unmask, IrqData::Eventfd) if intx && set.count > 0 => {
                let before = std::mem::replace(&mut self.unmask, keys.first().map(|key| key.0));
                unused.extend(before.map(FdKey));
            }
            (IrqAction::Mask, data) if intx && means_first(data, set.count) => self.masked = true,
            (IrqAction::Unmask, data) if intx && means_first(data, set.count) => {
                self.masked = false;
            }
            _ => return false,
        }
        true
    }
}

/// Why a function can't be set up as its predecessor was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReplayError {
    #[error("descriptor {0:#x} was not kept")]
    Missing(u64),
    #[error(transparent)]
    Refused(#[from] RequestError),
}

/// Whether the first vector of the range is meant.
fn means_first(data: IrqData<'_>, count: u32) -> bool {
    count > 0
        && match data {
            IrqData::None => true,
            IrqData::Bool(bools) => bools.first().is_some_and(|byte| *byte != 0),
            IrqData::Eventfd => false,
        }
}

fn set_eventfd(
    function: &mut dyn Served,
    action: IrqAction,
    index: u32,
    start: u32,
    eventfd: OwnedFd,
) -> Result<(), RequestError> {
    let set = SetIrqs { action, data: IrqData::Eventfd, index, start, count: 1 };
    function.set_irqs(&set, vec![eventfd])
}
