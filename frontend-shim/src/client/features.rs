//! Device features: migration, and the log of dirty pages ("VFIO_USER_DEVICE_FEATURE").

use barkeep_protocol::wire::{
    Command, DeviceFeature, DmaLogging, DmaLoggingQuery, FeatureIndex, FeatureMethods,
    FeatureRequest, LoggingRange, MigData, MigDataRead, MigDeviceState, MigrationFlags,
    MigrationState, WireError,
};

use super::{Client, ClientError};

impl Client {
    /// Whether the device has a feature, with all of these methods.
    ///
    /// # Errors
    /// [`ClientError`], as for every request, but for a refusal, which says no.
    pub fn has_feature(
        &self,
        feature: FeatureIndex,
        methods: FeatureMethods,
    ) -> Result<bool, ClientError> {
        match self.feature(FeatureRequest::Probe { feature, methods, data: &[] }, |_| Ok(())) {
            Ok(()) => Ok(true),
            Err(ClientError::Refused(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The ways of migration that the device knows.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn migration(&self) -> Result<MigrationFlags, ClientError> {
        self.feature(FeatureRequest::GetMigration, MigrationFlags::parse_reply)
    }

    /// The state of migration that the device is in.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn migration_state(&self) -> Result<MigrationState, ClientError> {
        self.feature(FeatureRequest::GetState, MigDeviceState::parse_reply).map(|state| state.state)
    }

    /// Brings the device into a state of migration.
    ///
    /// # Errors
    /// [`ClientError`], as for every request; after a refusal, [`migration_state`](Self::migration_state)
    /// tells which state it is in.
    pub fn set_migration_state(&self, state: MigrationState) -> Result<(), ClientError> {
        self.feature(FeatureRequest::SetState(MigDeviceState::new(state)), |_| Ok(()))
    }

    /// Reads the next bytes of the device's state, and appends them; how many there were. Fewer than
    /// asked for are the last ones.
    ///
    /// # Errors
    /// [`ClientError::TooLarge`] for more than one transfer takes, and as for every request.
    pub fn migration_data_read(
        &self,
        size: u32,
        state: &mut Vec<u8>,
    ) -> Result<usize, ClientError> {
        if size > self.transfer_size {
            return Err(ClientError::TooLarge(size as usize));
        }
        let read = MigDataRead { size };
        let body = |out: &mut Vec<u8>| read.write_to(out);
        self.call_with_fds(Command::MigDataRead, body, Vec::new(), |reply| {
            let MigData { data } = read.parse_reply(reply.body)?;
            state.extend_from_slice(data);
            Ok(data.len())
        })
    }

    /// Hands the device the next bytes of a state that was read elsewhere.
    ///
    /// # Errors
    /// [`ClientError::TooLarge`] for more than one transfer takes, and as for every request.
    pub fn migration_data_write(&self, data: &[u8]) -> Result<(), ClientError> {
        if data.len() > self.transfer_size as usize {
            return Err(ClientError::TooLarge(data.len()));
        }
        let data = MigData { data };
        self.call(Command::MigDataWrite, |out| data.write_to(out), |_| Ok(()))
    }

    /// Starts to log which pages the device writes, in `ranges` or, without any, everywhere. Returns
    /// the page size that the device took, in bytes; `page_size` is the one that is wished for.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn start_dma_logging(
        &self,
        page_size: u64,
        ranges: &[LoggingRange],
    ) -> Result<u64, ClientError> {
        let logging = DmaLogging { page_size, ranges };
        self.feature(FeatureRequest::StartLogging(logging), |body| logging.parse_reply(body))
    }

    /// Stops the log.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn stop_dma_logging(&self) -> Result<(), ClientError> {
        self.feature(FeatureRequest::StopLogging { data: &[] }, |_| Ok(()))
    }

    /// The pages that the device has written since the last report: their numbers, in units of the
    /// query's page size from its address on.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn dirty_pages(&self, query: &DmaLoggingQuery) -> Result<Vec<usize>, ClientError> {
        self.feature(FeatureRequest::ReportLogging(*query), |body| {
            Ok(query.parse_reply(body)?.pages().collect())
        })
    }

    fn feature<T>(
        &self,
        request: FeatureRequest<'_>,
        parse: impl Fn(&[u8]) -> Result<T, WireError>,
    ) -> Result<T, ClientError> {
        let request = DeviceFeature::new(request).map_err(ClientError::Request)?;
        self.call(Command::DeviceFeature, |out| request.write_to(out), parse)
    }
}
