//! One message of each kind, and the payloads that sessions are made of.

use barkeep_protocol::wire::{
    Command, DecodePageInfo, DecodePageQuery, DeviceFeature, DeviceFlags, DeviceInfo, DmaAccess,
    DmaLayout, DmaLogging, DmaLoggingQuery, DmaMap, DmaTransfer, DmaUnmap, DmaUnmapFlags,
    FaultAccess, FaultReport, FaultVerdict, FeatureIndex, FeatureMethods, FeatureRequest,
    InfoQuery, IoFd, IoFdKind, IoFds, IoFdsQuery, IoRegionFlags, IrqAction, IrqData, IrqInfo,
    IrqInfoFlags, LoggingRange, MigData, MigDataRead, MigDeviceState, MigrationFlags,
    MigrationState, Offer, RegionAccess, RegionData, RegionFlags, RegionInfo, RegionState,
    RegionStateQuery, RegionWrites, SetIrqs, SmallWrite, SparseArea, Version,
};

pub(crate) fn map(access: DmaAccess, address: u64, size: u64) -> Vec<u8> {
    DmaMap { access, file_offset: 0, address, size }.to_bytes()
}

pub(crate) fn unmap(flags: DmaUnmapFlags, address: u64, size: u64) -> Vec<u8> {
    DmaUnmap { flags, address, size, bitmap: None }.to_bytes()
}

pub(crate) fn irqs(
    action: IrqAction,
    data: IrqData<'_>,
    index: u32,
    start: u32,
    count: u32,
) -> Vec<u8> {
    SetIrqs { action, data, index, start, count }.to_bytes()
}

pub(crate) fn read(region: u32, offset: u64, count: u32) -> Vec<u8> {
    RegionAccess { offset, region, count }.to_bytes()
}

pub(crate) fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let count = u32::try_from(data.len()).expect("a seed is small");
    RegionData { access: RegionAccess { offset, region, count }, data }.to_bytes()
}

pub(crate) fn requests() -> Vec<(&'static str, Command, Vec<u8>)> {
    let all = DmaAccess::all();
    let none = DmaUnmapFlags::empty();
    let region = InfoQuery { index: 0, argsz: 32 };
    let fault = FaultReport { region: 2, access: FaultAccess::WRITE, offset: 0x1000, size: 0x1000 };
    let probe = FeatureRequest::Probe {
        feature: FeatureIndex::MigDeviceState,
        methods: FeatureMethods::all(),
        data: &[],
    };
    vec![
        ("version", Command::Version, Version::proposal().to_bytes()),
        ("version_all", Command::Version, Version::proposal_with(Offer::all()).to_bytes()),
        ("version_bare", Command::Version, vec![0, 0, 2, 0]),
        ("version_major", Command::Version, vec![1, 0, 0, 0, b'{', b'}', 0]),
        ("version_foreign", Command::Version, foreign_version()),
        ("dma_map", Command::DmaMap, map(all, 0x10_0000, 0x1000)),
        ("dma_map_end", Command::DmaMap, map(all, 0u64.wrapping_sub(0x1000), 0x1000)),
        ("dma_unmap", Command::DmaUnmap, unmap(none, 0x10_0000, 0x1000)),
        ("dma_unmap_all", Command::DmaUnmap, unmap(DmaUnmapFlags::ALL, 0, 0)),
        ("dma_unmap_bitmap", Command::DmaUnmap, dirty_unmap()),
        ("get_info", Command::GetInfo, InfoQuery { index: 0, argsz: 16 }.to_irq_bytes()),
        ("region_info", Command::GetRegionInfo, region.to_region_bytes()),
        ("region_io_fds", Command::GetRegionIoFds, io_fds(0, 16)),
        ("region_io_fds_spec", Command::GetRegionIoFds, io_fds(0, 16 + 4 * 40)),
        ("region_io_fds_libvfio", Command::GetRegionIoFds, io_fds(0, 16 + 4 * 48)),
        ("irq_info", Command::GetIrqInfo, InfoQuery { index: 1, argsz: 16 }.to_irq_bytes()),
        ("irqs_off", Command::SetIrqs, irqs(IrqAction::Trigger, IrqData::None, 1, 0, 0)),
        ("irqs_bool", Command::SetIrqs, irqs(IrqAction::Trigger, IrqData::Bool(&[1]), 0, 0, 1)),
        ("irqs_mask", Command::SetIrqs, irqs(IrqAction::Mask, IrqData::None, 0, 0, 1)),
        ("region_read", Command::RegionRead, read(7, 0, 64)),
        ("region_write", Command::RegionWrite, write(7, 4, &[6, 0])),
        ("dma_read", Command::DmaRead, words(&[0, 0, 64, 0])),
        ("dma_write", Command::DmaWrite, words(&[0, 0, 4, 0, 0xdead_beef])),
        ("reset", Command::Reset, Vec::new()),
        ("write_multi", Command::RegionWriteMulti, write_multi()),
        ("feature_probe", Command::DeviceFeature, feature(probe)),
        ("feature_migration", Command::DeviceFeature, feature(FeatureRequest::GetMigration)),
        ("feature_get_state", Command::DeviceFeature, feature(FeatureRequest::GetState)),
        ("feature_state", Command::DeviceFeature, set_state(MigrationState::Stop)),
        ("feature_log_start", Command::DeviceFeature, log_start(&[(0x10_0000, 0x2000)])),
        ("feature_log_stop", Command::DeviceFeature, log_stop()),
        ("feature_log_report", Command::DeviceFeature, log_report(0x10_0000, 0x2000)),
        ("mig_read", Command::MigDataRead, mig_read(4096)),
        ("mig_write", Command::MigDataWrite, mig_write(b"barkeep1")),
        ("memory_fault", Command::MemoryFault, fault.to_bytes()),
        ("region_state", Command::RegionState, RegionStateQuery { region: 0 }.to_bytes()),
        ("decode_page", Command::DecodePage, DecodePageQuery.to_bytes()),
    ]
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// As other clients write it: with members that are not ours, and others missing.
fn foreign_version() -> Vec<u8> {
    let json = br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
        "migration":{"pgsize":4096},"twin_socket":{"supported":true,"fd_index":0},
        "write_multiple":true,"pgsizes":4096,"max_dma_maps":65535,"x":[null,1.5e3,"\u00e9"]}}"#;
    [&[0, 0, 1, 0], json.as_slice(), &[0]].concat()
}

/// DMA_UNMAP with room for the bitmap of its pages.
fn dirty_unmap() -> Vec<u8> {
    DmaUnmap::with_bitmap(0x10_0000, 0x1000, 4096).expect("a range").to_bytes()
}

pub(crate) fn io_fds(region: u32, argsz: u32) -> Vec<u8> {
    written(|out| IoFdsQuery { region, argsz }.write_to(out))
}

/// Decode on, and three writes to the edu or to the ivshmem's doorbell.
pub(crate) fn write_multi() -> Vec<u8> {
    let write = |region, offset, data: &[u8]| SmallWrite::new(region, offset, data).expect("short");
    let writes = [
        write(7, 4, &[6, 0]),
        write(0, 4, &[1, 2, 3, 4]),
        write(0, 12, &[0; 4]),
        write(0, 0x80, &[0; 8]),
    ];
    written(|out| RegionWrites { writes: &writes }.write_to(out))
}

fn feature(request: FeatureRequest<'_>) -> Vec<u8> {
    let feature = DeviceFeature::new(request).expect("within the limits");
    written(|out| feature.write_to(out))
}

pub(crate) fn set_state(state: MigrationState) -> Vec<u8> {
    feature(FeatureRequest::SetState(MigDeviceState::new(state)))
}

pub(crate) fn log_start(ranges: &[(u64, u64)]) -> Vec<u8> {
    let ranges: Vec<_> =
        ranges.iter().map(|(address, size)| LoggingRange::new(*address, *size)).collect();
    feature(FeatureRequest::StartLogging(DmaLogging { page_size: 4096, ranges: &ranges }))
}

pub(crate) fn log_stop() -> Vec<u8> {
    feature(FeatureRequest::StopLogging { data: &[] })
}

pub(crate) fn log_report(address: u64, size: u64) -> Vec<u8> {
    feature(FeatureRequest::ReportLogging(DmaLoggingQuery { address, size, page_size: 4096 }))
}

pub(crate) fn mig_read(size: u32) -> Vec<u8> {
    written(|out| MigDataRead { size }.write_to(out))
}

pub(crate) fn mig_write(data: &[u8]) -> Vec<u8> {
    written(|out| MigData { data }.write_to(out))
}

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes);
    bytes
}

pub(crate) fn replies() -> Vec<(&'static str, Command, Vec<u8>)> {
    let device =
        DeviceInfo { flags: DeviceFlags::RESET | DeviceFlags::PCI, num_regions: 9, num_irqs: 5 };
    let irq = IrqInfo { flags: IrqInfoFlags::EVENTFD, index: 1, count: 1 };
    let flags = RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP;
    let area = |offset| SparseArea { offset, size: 0x1000 };
    let region = RegionInfo {
        flags,
        index: 0,
        size: 1 << 16,
        file_offset: 0,
        sparse: vec![area(0), area(0x2000)],
    };
    let state = RegionState { decode: 1, epoch: 3, reads: 1, ..RegionState::default() };
    let verdict = FaultVerdict::Map { epoch: 3 };
    let unmap = DmaUnmap::with_bitmap(0x10_0000, 0x4_0000, 4096).expect("a range");
    let dirty = written(|out| unmap.write_reply(out, |mut bitmap| bitmap.set(3)));
    let transfer = DmaTransfer { address: 0x10_0000, count: 8 };
    let data = |layout| {
        written(|out| transfer.write_data(layout, out, |data| data.copy_from_slice(b"contents")))
    };
    let report = DmaLoggingQuery { address: 0x10_0000, size: 0x4_0000, page_size: 4096 };
    let report = written(|out| {
        report.write_reply(out, |mut bitmap| bitmap.set(5)).expect("within the limits");
    });
    let logging =
        feature(FeatureRequest::StartLogging(DmaLogging { page_size: 4096, ranges: &[] }));
    let flags = written(|out| MigrationFlags::STOP_COPY.write_reply(out));
    let in_state = MigDeviceState::new(MigrationState::StopCopy);
    let answer = Version::proposal_with(Offer::all()).answer_with(Offer::all());
    vec![
        ("reply_version", Command::Version, Version::proposal().to_bytes()),
        ("reply_version_all", Command::Version, answer.expect("ours").to_bytes()),
        ("reply_unmap", Command::DmaUnmap, dirty),
        ("reply_io_fds_spec", Command::GetRegionIoFds, doorbells(40)),
        ("reply_io_fds_libvfio", Command::GetRegionIoFds, doorbells(48)),
        ("reply_dma_read_spec", Command::DmaRead, data(DmaLayout::Spec)),
        ("reply_dma_read_qemu", Command::DmaRead, data(DmaLayout::Qemu)),
        ("reply_dma_write", Command::DmaWrite, written(|out| transfer.write_to(out))),
        ("reply_dma_write_qemu", Command::DmaWrite, Vec::new()),
        ("reply_log_start", Command::DeviceFeature, logging),
        ("reply_log_report", Command::DeviceFeature, report),
        ("reply_migration", Command::DeviceFeature, flags),
        ("reply_state", Command::DeviceFeature, written(|out| in_state.write_reply(out))),
        ("reply_mig_read", Command::MigDataRead, mig_write(b"a")),
        ("reply_write_multi", Command::RegionWriteMulti, words(&[1, 0])),
        ("reply_info", Command::GetInfo, device.to_bytes()),
        ("reply_irq_info", Command::GetIrqInfo, irq.to_bytes()),
        ("reply_region_info", Command::GetRegionInfo, region.to_bytes(u32::MAX)),
        ("reply_region_cut", Command::GetRegionInfo, region.to_bytes(32)),
        ("reply_region_read", Command::RegionRead, write(7, 0, &[0x34, 0x12, 0xe8, 0x11])),
        ("reply_verdict", Command::MemoryFault, verdict.to_bytes()),
        ("reply_region_state", Command::RegionState, state.to_bytes()),
        ("reply_decode_page", Command::DecodePage, DecodePageInfo { length: 4096 }.to_bytes()),
    ]
}

/// One ioeventfd and one of no kind that we know, in entries of this size; the first descriptor.
fn doorbells(entry_size: u32) -> Vec<u8> {
    let entry = |offset, kind, fd_index| IoFd { offset, size: 4, fd_index, kind };
    let entries = vec![
        entry(12, IoFdKind::Eventfd { datamatch: Some(1), pio: false }, Some(0)),
        entry(
            16,
            IoFdKind::IoRegion { flags: IoRegionFlags::POSTED_WRITES, user_data: 7 },
            Some(0),
        ),
        entry(20, IoFdKind::Other(2), None),
    ];
    let query = IoFdsQuery { region: 0, argsz: 16 + 3 * entry_size };
    written(|out| assert!(IoFds { region: 0, entries }.write_to(&query, out)))
}
