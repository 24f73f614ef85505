use super::*;

/// Every command, with a payload whose words are often small, huge, or a valid flag.
fn any_message() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let word = prop_oneof![
        3 => 0u32..64,
        1 => Just(u32::MAX),
        1 => (0u32..19).prop_map(|bit| 1 << bit),
        1 => (0u32..10, 16u32..19).prop_map(|(feature, method)| feature | 1 << method),
        1 => any::<u32>(),
    ];
    let structured = prop::collection::vec(word, 0..20).prop_map(|list| words(&list));
    let raw = prop::collection::vec(any::<u8>(), 0..120);
    (0u16..20, prop_oneof![structured, raw])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_payload_makes_a_parser_panic((code, body) in any_message(), count in 0u64..80, fds in 0usize..4) {
        let request = Request::parse(code, &body);
        if let Ok(request) = &request {
            prop_assert!(request.max_fds() <= limits::MAX_MESSAGE_FDS);
        }
        let _ = Request::parse(code | 0x8000, &body);
        let _ = ServerRequest::parse(code, &body);
        let _ = RegionInfo::parse(&body);
        let _ = DeviceInfo::parse(&body);
        let _ = IrqInfo::parse(&body);
        let _ = RegionData::parse(&body);
        let _ = FaultVerdict::parse(&body);
        let _ = RegionState::parse(&body);
        let _ = DecodePageInfo::parse(&body);
        let _ = MigrationFlags::parse_reply(&body);
        let _ = MigDeviceState::parse_reply(&body);
        let _ = MigDataRead { size: 16 }.parse_reply(&body);
        let _ = DmaLogging { page_size: 1, ranges: &[] }.parse_reply(&body);
        let _ = DmaLoggingQuery { address: 0, size: 64, page_size: 1 }.parse_reply(&body);
        let _ = DmaUnmap::with_bitmap(0, 64, 1).unwrap().parse_reply(&body);
        let _ = RegionWrites { writes: &[] }.parse_reply(&body);
        let query = IoFdsQuery { region: 0, argsz: 64 };
        let _ = IoFds::parse_reply(&query, &body, fds);
        // Around the header that a reply must repeat.
        for address in [0, u64::MAX] {
            let transfer = DmaTransfer { address, count };
            let reply = [longs(&[address, count]), body.clone()].concat();
            for reply in [&reply, &body] {
                let _ = transfer.parse_read_reply(reply, DmaLayout::Qemu);
                let _ = transfer.check_write_reply(reply);
            }
        }
    }

    /// What was accepted can be answered: no writer trips over a value that a parser let through.
    #[test]
    fn an_accepted_request_can_be_answered((code, body) in any_message()) {
        let mut out = Vec::new();
        match Request::parse(code, &body) {
            Ok(Request::DmaUnmap(unmap)) => unmap.write_reply(&mut out, |mut bits| bits.set(0)),
            Ok(Request::RegionRead(access)) if access.count < 4096 => {
                access.write_reply(&mut out, |data| data.fill(1));
            }
            Ok(Request::DeviceFeature(feature)) => {
                if let FeatureRequest::ReportLogging(query) = feature.request {
                    let marked = query.write_reply(&mut out, |mut bits| bits.set(0));
                    prop_assert!(marked.is_ok() && out.len() <= feature.argsz as usize);
                }
                feature.write_to(&mut out);
            }
            Ok(Request::GetRegionIoFds(query)) => {
                let entry =
                    IoFd { offset: 0, size: 0, fd_index: None, kind: IoFdKind::Other(0) };
                let _ = IoFds { region: query.region, entries: vec![entry; 3] }.write_to(&query, &mut out);
                prop_assert!(out.len() <= query.argsz as usize);
            }
            Ok(Request::RegionWriteMulti(list)) => {
                let bytes: usize = list.writes.iter().map(|one| one.data().len()).sum();
                prop_assert!(bytes <= 8 * list.writes.len());
            }
            _ => {}
        }
        prop_assert!(out.len() <= limits::MAX_MESSAGE_SIZE as usize);
    }

    #[test]
    fn no_version_data_makes_the_parser_panic(json in "\\PC{0,60}|[\\[\\]{}:,\"0-9a-z]{0,200}") {
        let body = [words(&[0]), json.into_bytes(), vec![0]].concat();
        if let Ok(version) = Version::parse(&body) {
            let _ = DmaLayout::expected_of(&version);
            prop_assert!(version.answer_with(Offer::all()).is_ok());
        }
    }
}
