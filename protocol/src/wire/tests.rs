use proptest::prelude::*;

use super::limits::MAX_DATA_XFER_SIZE;
use super::*;

mod dma;
mod feature;
mod hostile;
mod io_fds;
mod region;
mod version;

fn errno_of(code: u16, body: &[u8]) -> Option<Errno> {
    Request::parse(code, body).err().map(|error| error.errno())
}

/// Words in host order, as most payloads are built of u32s.
fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Long words in host order.
fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// What one of the writers appends, behind something that is there already and stays.
fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0xaa; 3];
    write(&mut out);
    assert_eq!(out[..3], [0xaa; 3]);
    out.split_off(3)
}

#[test]
fn a_header_has_the_layout_of_the_specification() {
    let header = Header {
        id: MessageId(0x1234),
        command: 9,
        body_size: 16,
        kind: MessageKind::Command { no_reply: true },
    };
    let bytes = header.to_bytes();
    assert_eq!(bytes[0..2], 0x1234u16.to_ne_bytes());
    assert_eq!(bytes[2..4], 9u16.to_ne_bytes());
    assert_eq!(bytes[4..8], 32u32.to_ne_bytes());
    assert_eq!(bytes[8..12], 0x10u32.to_ne_bytes());
    assert_eq!(bytes[12..16], [0; 4]);
    assert_eq!(Header::parse(&bytes), Ok(header));
}

#[test]
fn an_error_reply_without_a_number_is_still_an_error() {
    let reply = Header {
        id: MessageId(1),
        command: 2,
        body_size: 0,
        kind: MessageKind::Reply { error: Some(Errno::NOENT) },
    };
    let mut bytes = reply.to_bytes();
    assert_eq!(Header::parse(&bytes), Ok(reply));
    for garbage in [0, 5000, u32::MAX] {
        bytes[12..16].copy_from_slice(&garbage.to_ne_bytes());
        let kind = Header::parse(&bytes).unwrap().kind;
        assert_eq!(kind, MessageKind::Reply { error: Some(Errno::IO) });
    }
}

#[test]
fn malformed_requests_have_the_errno_of_the_protocol() {
    let map = |argsz, flags| [words(&[argsz, flags]), vec![0; 24]].concat();
    let rows: &[(&str, u16, Vec<u8>, Errno)] = &[
        ("command 0", 0, vec![], Errno::INVAL),
        ("retired command 14", 14, vec![], Errno::INVAL),
        ("command of the future", 999, vec![0; 4], Errno::INVAL),
        ("a server's command", 11, vec![0; 16], Errno::NOTSUP),
        ("short VERSION", 1, vec![0; 3], Errno::INVAL),
        ("foreign flag in DMA_MAP", 2, map(32, 4), Errno::INVAL),
        ("argsz below DMA_MAP", 2, map(31, 3), Errno::INVAL),
        ("long DMA_MAP", 2, vec![32; 33], Errno::INVAL),
        ("empty GET_INFO", 4, vec![], Errno::INVAL),
        ("argsz below GET_INFO", 4, words(&[15, 0, 0, 0]), Errno::INVAL),
        ("argsz below GET_REGION_INFO", 5, words(&[31, 0, 0, 0, 0, 0, 0, 0]), Errno::INVAL),
        ("SET_IRQS without action", 8, words(&[20, 1, 0, 0, 1]), Errno::INVAL),
        ("SET_IRQS with two actions", 8, words(&[20, 0x31, 0, 0, 1]), Errno::INVAL),
        ("SET_IRQS with two data types", 8, words(&[20, 0x23, 0, 0, 1]), Errno::INVAL),
        ("SET_IRQS with missing bools", 8, words(&[20, 0x22, 0, 0, 9]), Errno::INVAL),
        ("REGION_READ above the limit", 9, words(&[0, 0, 0, MAX_DATA_XFER_SIZE + 1]), Errno::INVAL),
        ("REGION_WRITE without its data", 10, words(&[0, 0, 0, 4]), Errno::INVAL),
        ("REGION_WRITE with more data", 10, words(&[0, 0, 0, 4, 0, 0]), Errno::INVAL),
        ("RESET with a payload", 13, vec![0], Errno::INVAL),
        ("argsz below DECODE_PAGE", 0x8003, words(&[15, 0]), Errno::INVAL),
        ("flag in DECODE_PAGE", 0x8003, words(&[16, 1]), Errno::INVAL),
        ("short DECODE_PAGE", 0x8003, words(&[16]), Errno::INVAL),
        ("long DECODE_PAGE", 0x8003, words(&[16, 0, 0]), Errno::INVAL),
    ];
    for (what, code, body, errno) in rows {
        assert_eq!(errno_of(*code, body), Some(*errno), "{what}");
    }
}

#[test]
fn a_decode_page_is_asked_for_and_described_as_documented() {
    let query = DecodePageQuery.to_bytes();
    assert_eq!(query, words(&[16, 0]));
    let request = Request::parse(0x8003, &query).unwrap();
    assert_eq!(request, Request::DecodePage(DecodePageQuery));
    assert_eq!((request.max_fds(), Command::DecodePage.max_reply_fds()), (0, 1));

    let info = DecodePageInfo { length: 4096 };
    assert_eq!(info.to_bytes(), [words(&[16, 0]), longs(&[4096])].concat());
    let longer = [info.to_bytes(), vec![1]].concat();
    assert_eq!(DecodePageInfo::parse(&longer), Ok(info));
    assert!(DecodePageInfo::parse(&longer[..15]).is_err());
}

#[test]
fn region_info_that_does_not_fit_tells_what_it_needs() {
    let info = RegionInfo {
        flags: RegionFlags::READ | RegionFlags::MMAP,
        index: 2,
        size: 0x10000,
        file_offset: 0x1000,
        sparse: vec![
            SparseArea { offset: 0x1000, size: 0x2000 },
            SparseArea { offset: 0x8000, size: 0x1000 },
        ],
    };
    let whole = info.to_bytes(1000);
    assert_eq!(whole.len(), 32 + 16 + 2 * 16);
    let (parsed, argsz) = RegionInfo::parse(&whole).unwrap();
    assert_eq!(argsz as usize, whole.len());
    assert_eq!(parsed, RegionInfo { flags: info.flags | RegionFlags::CAPS, ..info.clone() });

    let cut = info.to_bytes(RegionInfo::FIXED_SIZE);
    assert_eq!(cut.len(), 32);
    let (parsed, argsz) = RegionInfo::parse(&cut).unwrap();
    assert_eq!((argsz as usize, parsed.sparse.len()), (whole.len(), 0));
    assert!(parsed.flags.contains(RegionFlags::CAPS));
}

#[test]
fn a_looping_capability_chain_from_a_server_is_refused() {
    let mut bytes = words(&[48, 0x8, 0, 32, 0, 0, 0, 0]);
    bytes.extend_from_slice(&words(&[0x0001_0007, 32, 0, 0]));
    assert!(RegionInfo::parse(&bytes).is_err());
}

proptest! {
    #[test]
    fn headers_round_trip(id: u16, command: u16, body_size in 0u32..u32::MAX - 16, no_reply: bool) {
        let kind = MessageKind::Command { no_reply };
        let header = Header { id: MessageId(id), command, body_size, kind };
        prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }

    #[test]
    fn dma_windows_round_trip(address: u64, size: u64, file_offset: u64, bits in 0u32..4) {
        let access = DmaAccess::from_bits(bits).unwrap();
        let map = DmaMap { access, file_offset, address, size };
        let bytes = map.to_bytes();
        prop_assert_eq!(Request::parse(2, &bytes), Ok(Request::DmaMap(map)));
        let unmap = DmaUnmap::range(address, size);
        let bytes = unmap.to_bytes();
        prop_assert_eq!(Request::parse(3, &bytes), Ok(Request::DmaUnmap(unmap)));
    }

    #[test]
    fn region_writes_round_trip(
        offset: u64, region: u32, data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let access = RegionAccess { offset, region, count: u32::try_from(data.len()).unwrap() };
        let write = RegionData { access, data: &data };
        let bytes = write.to_bytes();
        prop_assert_eq!(Request::parse(10, &bytes), Ok(Request::RegionWrite(write)));
    }
}
