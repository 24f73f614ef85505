//! One message: a header and a body. Whatever they are, nothing panics, and what parses comes back
//! from its own bytes as it was.
#![no_main]

use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{
    Command, DeviceInfo, FaultVerdict, Header, IrqInfo, RegionData, RegionFlags, RegionInfo,
    RegionState, Request, Version,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let Some((header, body)) = message.split_first_chunk::<HEADER_SIZE>() else { return };
    let Ok(header) = Header::parse(header) else { return };
    assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    request(header.command, body);
    replies(body);
});

/// As the server takes a message.
fn request(code: u16, body: &[u8]) {
    let Ok(request) = Request::parse(code, body) else { return };
    assert!(Command::try_from(code).is_ok_and(|command| command.code() == code));
    let bytes = match &request {
        Request::Version(version) => version.to_bytes(),
        Request::DmaMap(map) => map.to_bytes(),
        Request::DmaUnmap(unmap) => unmap.to_bytes(),
        Request::GetInfo => body.to_vec(),
        Request::GetRegionInfo(query) => query.to_region_bytes(),
        Request::GetIrqInfo(query) => query.to_irq_bytes(),
        Request::SetIrqs(set) => set.to_bytes(),
        Request::RegionRead(access) => access.to_bytes(),
        Request::RegionWrite(write) => write.to_bytes(),
        Request::Reset => Vec::new(),
        Request::MemoryFault(report) => report.to_bytes(),
        Request::RegionState(query) => query.to_bytes(),
    };
    assert_eq!(Request::parse(code, &bytes).as_ref(), Ok(&request));
    if let Request::Version(version) = &request
        && let Ok(answer) = version.answer()
    {
        assert_eq!(Version::parse(&answer.to_bytes()), Ok(answer));
    }
}

/// As the client takes one: any reply may be to anything.
fn replies(body: &[u8]) {
    if let Ok(version) = Version::parse(body) {
        let again = Version::parse(&version.to_bytes());
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
    if let Ok(state) = RegionState::parse(body) {
        let again = RegionState::parse(&state.to_bytes()).expect("whole");
        assert_eq!(RegionState { argsz: state.argsz, ..again }, state);
    }
}
