//! DEVICE_FEATURE and MIG_DATA_*: migration and the log of dirty pages.

use barkeep_protocol::wire::{
    DeviceFeature, DmaLogging, FeatureIndex, FeatureRequest, MigDeviceState, MigrationFlags,
    MigrationState,
};

use super::HostedFunction;
use crate::dma::{DmaError, Iova, LoggingError};
use crate::server::migration::{Incoming, Migration, Outgoing, SavedFunction};
use crate::server::request_error::RequestError;
use crate::server::served::Reply;

pub(super) fn serve(
    hosted: &mut HostedFunction,
    feature: &DeviceFeature<'_>,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    match &feature.request {
        FeatureRequest::Probe { feature: index, .. } => {
            match index {
                FeatureIndex::Migration | FeatureIndex::MigDeviceState => movable(hosted)?,
                FeatureIndex::DmaLoggingStart
                | FeatureIndex::DmaLoggingStop
                | FeatureIndex::DmaLoggingReport => {}
            }
            feature.write_to(reply.body);
        }
        FeatureRequest::GetMigration => {
            movable(hosted)?;
            MigrationFlags::STOP_COPY.write_reply(reply.body);
        }
        FeatureRequest::GetState => {
            movable(hosted)?;
            MigDeviceState::new(hosted.migration.state()).write_reply(reply.body);
        }
        FeatureRequest::SetState(target) => {
            movable(hosted)?;
            hosted.go_to(target.state)?;
            feature.write_to(reply.body);
        }
        FeatureRequest::StartLogging(logging) => {
            let ranges: Vec<_> =
                logging.ranges.iter().map(|range| (Iova(range.address()), range.size())).collect();
            let page_size = hosted.dma.start_logging(&ranges, logging.page_size)?;
            let taken = DmaLogging { page_size, ..*logging };
            let request = FeatureRequest::StartLogging(taken);
            DeviceFeature { request, ..*feature }.write_to(reply.body);
        }
        FeatureRequest::StopLogging { .. } => {
            if !hosted.dma.is_logging() {
                return Err(DmaError::from(LoggingError::NotStarted).into());
            }
            hosted.dma.stop_logging();
            feature.write_to(reply.body);
        }
        FeatureRequest::ReportLogging(query) => {
            let (iova, size, page_size) = (Iova(query.address), query.size, query.page_size);
            query.write_reply(reply.body, |mut bitmap| {
                hosted.dma.report(iova, size, page_size, bitmap.bytes())
            })??;
        }
    }
    Ok(())
}

/// The data is shorter than `limit` only where it ends.
pub(super) fn migration_read(
    hosted: &mut HostedFunction,
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<(), RequestError> {
    let Migration::Saving(outgoing) = &mut hosted.migration else {
        return Err(RequestError::MigrationState);
    };
    let memory = hosted.device.saved().and_then(|saved| saved.memory());
    outgoing.read(limit, memory.map(|(file, _)| file), out)
}

/// After data that can't be taken, the function is in the state ERROR.
pub(super) fn migration_write(
    hosted: &mut HostedFunction,
    data: &[u8],
) -> Result<(), RequestError> {
    let Migration::Resuming(incoming) = &mut hosted.migration else {
        return Err(RequestError::MigrationState);
    };
    let memory = hosted.device.saved().and_then(|saved| saved.memory());
    let result = incoming.write(data, memory);
    if result.is_err() {
        hosted.migration = Migration::Failed;
    }
    result
}

/// A device whose state can't be saved has no migration.
fn movable(hosted: &mut HostedFunction) -> Result<(), RequestError> {
    match hosted.device.saved() {
        Some(_) => Ok(()),
        None => Err(RequestError::NoFeature),
    }
}

impl HostedFunction {
    /// Goes to a state by the way that the protocol prescribes ("Complex State Transitions").
    pub(super) fn go_to(&mut self, target: MigrationState) -> Result<(), RequestError> {
        while self.migration.state() != target {
            let next = self.migration.state().step_towards(target, false);
            self.enter(next.ok_or(RequestError::MigrationState)?)?;
        }
        Ok(())
    }

    fn enter(&mut self, next: MigrationState) -> Result<(), RequestError> {
        let present = std::mem::replace(&mut self.migration, Migration::Failed);
        self.migration = match (present, next) {
            (Migration::Running, MigrationState::Stop) => {
                self.device.quiesce();
                // What was under way is in the device's state, which begins it anew.
                self.transfers.clear(&self.dma);
                Migration::Stopped
            }
            (Migration::Stopped, MigrationState::StopCopy) => {
                Migration::Saving(Outgoing::new(&self.saved_function()?))
            }
            (Migration::Saving(_), MigrationState::Stop) => Migration::Stopped,
            (Migration::Stopped, MigrationState::Resuming) => {
                Migration::Resuming(Incoming::default())
            }
            (Migration::Resuming(incoming), MigrationState::Stop) => {
                self.restore(incoming)?;
                Migration::Stopped
            }
            (Migration::Stopped, MigrationState::Running) => {
                self.migration = Migration::Running;
                self.resume();
                return Ok(());
            }
            (present, _) => {
                self.migration = present;
                return Err(RequestError::MigrationState);
            }
        };
        Ok(())
    }

    pub(super) fn saved_function(&mut self) -> Result<SavedFunction, RequestError> {
        let function = self.function.save();
        let saved = self.device.saved().ok_or(RequestError::NoFeature)?;
        let memory = saved.memory().map_or(0, |(_, length)| length);
        Ok(SavedFunction::V1 { function, device: saved.save(), memory })
    }

    fn restore(&mut self, incoming: Incoming) -> Result<(), RequestError> {
        let SavedFunction::V1 { function, device, .. } = incoming.finish()?;
        // The device is told nothing: its own state is from the same moment.
        let _effects = self.function.restore(&function).map_err(|_| RequestError::ForeignState)?;
        let saved = self.device.saved().ok_or(RequestError::NoFeature)?;
        saved.restore(&device).map_err(|_| RequestError::ForeignState)
    }

    pub(super) fn resume(&mut self) {
        self.interrupts.intx.set_level(self.function.intx_line());
        let (device, mut context) = self.split();
        if let Some(saved) = device.saved() {
            saved.resume(&mut context);
        }
        self.rewired();
        self.reload_if_missed();
        for index in std::mem::take(&mut self.missed_wakes) {
            let (device, mut context) = self.split();
            device.woken(index, &mut context);
        }
        self.do_transfers();
    }
}
