//! One message: a header and a body. Whatever they are, nothing panics, and what parses comes back
//! from its own bytes as it was.
#![no_main]

use barkeep_protocol::wire::limits::{HEADER_SIZE, MAX_DATA_XFER_SIZE, MAX_MESSAGE_FDS};
use barkeep_protocol::wire::{
    BitmapRequest, Command, DecodePageInfo, DeviceInfo, DmaLayout, DmaLogging, DmaLoggingQuery,
    DmaTransfer, DmaUnmap, DmaUnmapFlags, FaultVerdict, Header, IoFdLayout, IoFds, IoFdsQuery,
    IoFdsReply, IrqInfo, MigData, MigDataRead, MigDeviceState, MigrationFlags, Offer, PageBitmap,
    RegionData, RegionFlags, RegionInfo, RegionState, RegionWrites, Request, ServerRequest,
    SmallWrite, Version,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let Some((header, body)) = message.split_first_chunk::<HEADER_SIZE>() else { return };
    let Ok(header) = Header::parse(header) else { return };
    assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    request(header.command, body);
    server_request(header.command, body);
    replies(body);
    // What a reply is compared with is taken from the reply, or it would hardly ever fit; the id
    // stands for what is not in there.
    let number = header.id.0;
    unmap_reply(body);
    dma_replies(body);
    io_fds_reply(body, usize::from(number % 20));
    feature_replies(body);
    migration_reply(body, number.into());
    write_multi_reply(body, usize::from(number % 64));
});

/// As the server takes a message.
fn request(code: u16, body: &[u8]) {
    let Ok(request) = Request::parse(code, body) else { return };
    assert!(Command::try_from(code).is_ok_and(|command| command.code() == code));
    assert!(request.max_fds() <= MAX_MESSAGE_FDS);
    let mut bytes = Vec::new();
    match &request {
        Request::Version(version) => bytes = version.to_bytes(),
        Request::DmaMap(map) => bytes = map.to_bytes(),
        Request::DmaUnmap(unmap) => unmap.write_to(&mut bytes),
        Request::GetInfo => bytes = body.to_vec(),
        Request::GetRegionInfo(query) => bytes = query.to_region_bytes(),
        Request::GetRegionIoFds(query) => query.write_to(&mut bytes),
        Request::GetIrqInfo(query) => bytes = query.to_irq_bytes(),
        Request::SetIrqs(set) => bytes = set.to_bytes(),
        Request::RegionRead(access) => bytes = access.to_bytes(),
        Request::RegionWrite(write) => bytes = write.to_bytes(),
        Request::Reset => {}
        Request::RegionWriteMulti(writes) => writes.write_to(&mut bytes),
        Request::DeviceFeature(feature) => feature.write_to(&mut bytes),
        Request::MigDataRead(read) => read.write_to(&mut bytes),
        Request::MigDataWrite(data) => data.write_to(&mut bytes),
        Request::MemoryFault(report) => bytes = report.to_bytes(),
        Request::RegionState(query) => bytes = query.to_bytes(),
        Request::DecodePage(query) => bytes = query.to_bytes(),
    }
    assert_eq!(Request::parse(code, &bytes).as_ref(), Ok(&request));
    match &request {
        Request::Version(version) => negotiate(version),
        Request::RegionWriteMulti(writes) => {
            assert!(writes.writes.len() <= RegionWrites::MAX_WRITES);
            for write in writes.writes {
                let access = write.access();
                assert_eq!(write.data().len(), access.count as usize);
                let again = SmallWrite::new(access.region, access.offset, write.data());
                let again = again.expect("as many bytes as it had");
                assert_eq!((again.access(), again.data()), (access, write.data()));
            }
        }
        _ => {}
    }
}

fn negotiate(version: &Version) {
    for offer in [Offer::empty(), Offer::all()] {
        let Ok(answer) = version.answer_with(offer) else { continue };
        assert_eq!(Version::parse(&answer.to_bytes()).as_ref(), Ok(&answer));
        let both = offer & version.capabilities.offer();
        assert_eq!(answer.capabilities.offer(), both);
        assert!(answer.minor <= version.minor);
        let twin = answer.capabilities.twin_socket_fd(1);
        assert_eq!(twin, Ok(both.contains(Offer::TWIN_SOCKET).then_some(0)));
    }
    let capabilities = &version.capabilities;
    assert!(capabilities.message_fds() <= MAX_MESSAGE_FDS);
    assert!(capabilities.data_xfer_size() <= MAX_DATA_XFER_SIZE);
    let _layout = DmaLayout::expected_of(version);
}

/// As the client takes a server's command.
fn server_request(code: u16, body: &[u8]) {
    let mut bytes = Vec::new();
    match ServerRequest::parse(code, body) {
        Ok(ServerRequest::DmaRead(read)) => read.write_to(&mut bytes),
        Ok(ServerRequest::DmaWrite(write)) => {
            write.transfer.write_data(DmaLayout::Spec, &mut bytes, |data| {
                data.copy_from_slice(write.data);
            });
        }
        Err(_) => return,
    }
    assert_eq!(bytes, body);
}

/// As the client takes replies: any may be to anything.
fn replies(body: &[u8]) {
    if let Ok(version) = Version::parse(body) {
        let again = Version::parse(&version.to_bytes());
        let fd = version.capabilities.twin_socket_fd(2);
        assert!(!matches!(fd, Ok(Some(2..))));
        // A foreign major version has members of its own, which are not looked at.
        assert_eq!(again, Ok(version));
    }
    if let Ok(info) = DeviceInfo::parse(body) {
        assert_eq!(DeviceInfo::parse(&info.to_bytes()), Ok(info));
    }
    if let Ok(info) = IrqInfo::parse(body) {
        assert_eq!(IrqInfo::parse(&info.to_bytes()), Ok(info));
    }
    if let Ok((mut info, needed)) = RegionInfo::parse(body) {
        assert!(info.sparse.len() * 16 <= body.len(), "no area without its bytes");
        assert!(info.sparse.is_empty() || needed as usize <= body.len());
        // The flag goes with the areas, wherever it came from.
        info.flags.set(RegionFlags::CAPS, !info.sparse.is_empty());
        let whole = info.to_bytes(u32::MAX);
        let length = u32::try_from(whole.len()).expect("not longer than it came");
        assert_eq!(RegionInfo::parse(&whole), Ok((info.clone(), length)));
        let fixed = info.to_bytes(RegionInfo::FIXED_SIZE);
        let (cut, needed) = RegionInfo::parse(&fixed).expect("the fixed part");
        assert_eq!((cut.size, cut.index, needed), (info.size, info.index, length));
        assert!(info.sparse.is_empty() || fixed.len() < whole.len());
    }
    if let Ok(data) = RegionData::parse(body) {
        assert_eq!(data.data.len(), data.access.count as usize);
        assert_eq!(data.to_bytes(), body);
    }
    if let Ok(verdict) = FaultVerdict::parse(body) {
        assert_eq!(FaultVerdict::parse(&verdict.to_bytes()), Ok(verdict));
    }
    if let Ok(page) = DecodePageInfo::parse(body) {
        assert_eq!(DecodePageInfo::parse(&page.to_bytes()), Ok(page));
    }
    if let Ok(state) = RegionState::parse(body) {
        let again = RegionState::parse(&state.to_bytes()).expect("whole");
        assert_eq!(RegionState { argsz: state.argsz, ..again }, state);
    }
}

/// DMA_UNMAP, with and without a bitmap.
fn unmap_reply(body: &[u8]) {
    let (Some(address), Some(size)) = (u64_at(body, 8), u64_at(body, 16)) else { return };
    let plain = DmaUnmap::range(address, size);
    assert_eq!(plain.parse_reply(body), Ok(None));
    let (Some(page_size), Some(bitmap_size)) = (u64_at(body, 24), u64_at(body, 32)) else { return };
    let bitmap = BitmapRequest { page_size, size: bitmap_size };
    let unmap =
        DmaUnmap { flags: DmaUnmapFlags::DIRTY_BITMAP, address, size, bitmap: Some(bitmap) };
    let mut sent = Vec::new();
    // Only what could have been asked for.
    if PageBitmap::size_for(address, size, page_size).is_err()
        || bitmap_size > u64::from(PageBitmap::MAX_SIZE)
    {
        return;
    }
    unmap.write_to(&mut sent);
    if Request::parse(Command::DmaUnmap.code(), &sent) != Ok(Request::DmaUnmap(unmap)) {
        return;
    }
    let Ok(Some(dirty)) = unmap.parse_reply(body) else { return };
    bitmap_pages(dirty);
    let mut again = Vec::new();
    unmap.write_reply(&mut again, |mut room| room.bytes().copy_from_slice(dirty.bytes()));
    assert_eq!(unmap.parse_reply(&again), Ok(Some(dirty)));
}

fn bitmap_pages(bitmap: PageBitmap<'_>) {
    let bits = bitmap.bytes().iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
    assert_eq!(bitmap.pages().count(), bits);
    assert!(!bitmap.contains(bitmap.bytes().len() * 8));
}

/// DMA_READ and DMA_WRITE, as the server takes the answers to its own commands.
fn dma_replies(body: &[u8]) {
    let (Some(address), Some(count)) = (u64_at(body, 0), u32_at(body, 8)) else {
        let transfer = DmaTransfer { address: 0, count: 0 };
        assert_eq!(transfer.check_write_reply(body).is_ok(), body.is_empty());
        return;
    };
    let transfer = DmaTransfer { address, count: count.into() };
    let other = DmaTransfer { address: !address, ..transfer };
    assert!(other.parse_read_reply(body, DmaLayout::Spec).is_err());
    assert!(other.check_write_reply(body).is_err());
    if transfer.check_write_reply(body).is_ok() {
        let mut bytes = Vec::new();
        transfer.write_to(&mut bytes);
        assert_eq!(transfer.check_write_reply(&bytes), Ok(DmaLayout::Spec));
    }
    for expected in [DmaLayout::Spec, DmaLayout::Qemu] {
        let Ok(reply) = transfer.parse_read_reply(body, expected) else { continue };
        assert_eq!(reply.data.len(), count as usize);
        for layout in [DmaLayout::Spec, DmaLayout::Qemu] {
            let mut bytes = Vec::new();
            let fill = |room: &mut [u8]| room.copy_from_slice(reply.data);
            transfer.write_data(layout, &mut bytes, fill);
            let again = transfer.parse_read_reply(&bytes, layout).expect("its own bytes");
            assert_eq!(again.data, reply.data);
            assert!(again.proven.is_none_or(|proven| proven == layout));
        }
    }
}

/// GET_REGION_IO_FDS, in both layouts.
fn io_fds_reply(body: &[u8], fds: usize) {
    let (Some(argsz), Some(region)) = (u32_at(body, 0), u32_at(body, 8)) else { return };
    let query = IoFdsQuery { region, argsz };
    match IoFds::parse_reply(&query, body, fds) {
        Ok(IoFdsReply::Complete(answer)) => {
            for entry in &answer.entries {
                assert!(entry.fd_index.is_none_or(|index| (index as usize) < fds));
            }
            for layout in [IoFdLayout::Spec, IoFdLayout::Libvfio] {
                io_fds_again(&answer, layout, fds);
            }
        }
        Ok(IoFdsReply::TooSmall { argsz: needed }) => assert!(needed > argsz),
        Err(_) => {}
    }
}

fn io_fds_again(answer: &IoFds, layout: IoFdLayout, fds: usize) {
    let count = u32::try_from(answer.entries.len()).expect("not longer than it came");
    let argsz = IoFdsQuery::FIXED_SIZE + count * layout.entry_size();
    let query = IoFdsQuery { region: answer.region, argsz };
    let mut bytes = Vec::new();
    // Room that is whole in both layouts is taken for the other one's.
    if answer.write_to(&query, &mut bytes) {
        let again = IoFds::parse_reply(&query, &bytes, fds);
        assert_eq!(again.as_ref(), Ok(&IoFdsReply::Complete(answer.clone())));
    }
    if count > 0 {
        let short = IoFdsQuery { region: answer.region, argsz: IoFdsQuery::FIXED_SIZE };
        bytes.clear();
        assert!(!answer.write_to(&short, &mut bytes));
        let needed = IoFdsQuery::FIXED_SIZE + count * IoFdLayout::Spec.entry_size();
        let again = IoFds::parse_reply(&short, &bytes, 0);
        assert_eq!(again, Ok(IoFdsReply::TooSmall { argsz: needed }));
    }
}

/// DEVICE_FEATURE.
fn feature_replies(body: &[u8]) {
    let mut bytes = Vec::new();
    if let Ok(flags) = MigrationFlags::parse_reply(body) {
        flags.write_reply(&mut bytes);
        assert_eq!(MigrationFlags::parse_reply(&bytes), Ok(flags));
    }
    bytes.clear();
    if let Ok(state) = MigDeviceState::parse_reply(body) {
        state.write_reply(&mut bytes);
        assert_eq!(MigDeviceState::parse_reply(&bytes), Ok(state));
    }
    let logging = DmaLogging { page_size: 4096, ranges: &[] };
    if let Ok(page_size) = logging.parse_reply(body) {
        assert!(page_size.is_power_of_two());
    }
    let [Some(address), Some(size), Some(page_size)] = [8, 16, 24].map(|at| u64_at(body, at))
    else {
        return;
    };
    let query = DmaLoggingQuery { address, size, page_size };
    if let Ok(bitmap) = query.parse_reply(body) {
        bitmap_pages(bitmap);
        bytes.clear();
        let fill = |mut room: barkeep_protocol::wire::PageBitmapMut<'_>| {
            bitmap.pages().for_each(|page| room.set(page));
        };
        assert_eq!(query.write_reply(&mut bytes, fill), Ok(()));
        assert_eq!(query.parse_reply(&bytes), Ok(bitmap));
    }
}

/// MIG_DATA_READ.
fn migration_reply(body: &[u8], size: u32) {
    let query = MigDataRead { size };
    if let Ok(MigData { data }) = query.parse_reply(body) {
        assert!(data.len() <= size as usize);
        let mut bytes = Vec::new();
        MigData { data }.write_to(&mut bytes);
        assert_eq!(query.parse_reply(&bytes), Ok(MigData { data }));
    }
}

/// REGION_WRITE_MULTI.
fn write_multi_reply(body: &[u8], count: usize) {
    let writes = vec![SmallWrite::new(0, 0, &[]).expect("it is short"); count];
    let request = RegionWrites { writes: &writes };
    if let Ok(completed) = request.parse_reply(body) {
        assert!(completed <= count);
        let mut bytes = Vec::new();
        RegionWrites::write_reply(&mut bytes, completed);
        assert_eq!(request.parse_reply(&bytes), Ok(completed));
    }
}

fn u32_at(body: &[u8], at: usize) -> Option<u32> {
    body.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(body: &[u8], at: usize) -> Option<u64> {
    body.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}
