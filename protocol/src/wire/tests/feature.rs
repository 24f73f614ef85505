use super::*;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

fn request(request: FeatureRequest<'_>) -> (DeviceFeature<'_>, Vec<u8>) {
    let feature = DeviceFeature::new(request).unwrap();
    (feature, written(|out| feature.write_to(out)))
}

#[test]
fn device_features_round_trip_in_the_layout_of_vfio() {
    let state = MigDeviceState { state: MigrationState::StopCopy, data_fd: u32::MAX };
    let ranges = [LoggingRange::new(0x1000, 0x2000), LoggingRange::new(u64::MAX, 1)];
    let logging = DmaLogging { page_size: 4096, ranges: &ranges };
    let query = DmaLoggingQuery { address: 0x1000, size: 0x2000, page_size: 4096 };
    let methods = FeatureMethods::all();
    let probe = FeatureRequest::Probe { feature: FeatureIndex::MigDeviceState, methods, data: &[] };
    let rows: &[(FeatureRequest<'_>, Vec<u8>)] = &[
        (probe, words(&[8, PROBE | GET | SET | 2])),
        (FeatureRequest::GetMigration, words(&[16, GET | 1])),
        (FeatureRequest::GetState, words(&[16, GET | 2])),
        (FeatureRequest::SetState(state), words(&[16, SET | 2, 3, u32::MAX])),
        (
            FeatureRequest::StartLogging(logging),
            [
                words(&[56, SET | 6]),
                longs(&[4096]),
                words(&[2, 0]),
                longs(&[0x1000, 0x2000, u64::MAX, 1]),
            ]
            .concat(),
        ),
        (FeatureRequest::StopLogging { data: &[] }, words(&[8, SET | 7])),
        (
            FeatureRequest::ReportLogging(query),
            [words(&[40, GET | 8]), longs(&[0x1000, 0x2000, 4096])].concat(),
        ),
    ];
    for (asked, expected) in rows {
        let (feature, bytes) = request(*asked);
        assert_eq!(&bytes, expected, "{asked:?}");
        assert_eq!(Request::parse(16, &bytes), Ok(Request::DeviceFeature(feature)), "{asked:?}");
    }
}

#[test]
fn probes_and_stops_are_repeated_with_what_came_behind_them() {
    for flags in [PROBE | 6, PROBE | GET | 1, SET | 7] {
        let bytes = words(&[100, flags, 1, 2, 3, 4]);
        let Ok(Request::DeviceFeature(feature)) = Request::parse(16, &bytes) else { panic!() };
        assert_eq!(written(|out| feature.write_to(out)), bytes);
    }
    // A client may send its whole buffer to get something.
    assert!(Request::parse(16, &words(&[16, GET | 1, 7, 7])).is_ok());
}

#[test]
fn features_that_are_not_there_and_methods_that_they_have_not_are_told_apart() {
    let report = |argsz, values: &[u64]| [words(&[argsz, GET | 8]), longs(values)].concat();
    let start = |page_size, count, ranges: &[u64]| {
        [words(&[999, SET | 6]), longs(&[page_size]), words(&[count, 0]), longs(ranges)].concat()
    };
    assert!(Request::parse(16, &start(4096, 0, &[])).is_ok());
    let rows: &[(&str, Vec<u8>, Errno)] = &[
        ("feature 0", words(&[99, GET]), Errno::NOTTY),
        ("VFIO's PCI_VF_TOKEN is none", words(&[99, SET | 3, 0, 0]), Errno::NOTTY),
        ("MIG_DATA_SIZE is none", words(&[99, GET | 9, 0, 0]), Errno::NOTTY),
        ("probe of none", words(&[99, PROBE | 0xffff]), Errno::NOTTY),
        ("short", words(&[8]), Errno::INVAL),
        ("unknown flag", words(&[99, 1 << 19 | GET | 1]), Errno::INVAL),
        ("unknown flag in a probe", words(&[99, 1 << 31 | PROBE | 1]), Errno::INVAL),
        ("no method", words(&[99, 1]), Errno::INVAL),
        ("both methods", words(&[99, GET | SET | 2, 2, 0]), Errno::INVAL),
        ("set MIGRATION", words(&[99, SET | 1, 0, 0]), Errno::INVAL),
        ("get START", words(&[99, GET | 6, 0, 0]), Errno::INVAL),
        ("set REPORT", words(&[99, SET | 8, 0, 0]), Errno::INVAL),
        ("probe to set MIGRATION", words(&[99, PROBE | SET | 1]), Errno::INVAL),
        ("no room to get MIGRATION", words(&[15, GET | 1]), Errno::INVAL),
        ("no room to get the state", words(&[8, GET | 2]), Errno::INVAL),
        ("no room to set the state", words(&[15, SET | 2, 2, 0]), Errno::INVAL),
        ("no room for a probe", words(&[7, PROBE | 1]), Errno::INVAL),
        ("no state", words(&[99, SET | 2]), Errno::INVAL),
        ("half a state", words(&[99, SET | 2, 2]), Errno::INVAL),
        ("more than a state", words(&[99, SET | 2, 2, 0, 0]), Errno::INVAL),
        ("into ERROR", words(&[99, SET | 2, 0, 0]), Errno::INVAL),
        ("into no state", words(&[99, SET | 2, 8, 0]), Errno::INVAL),
        ("start without data", words(&[99, SET | 6]), Errno::INVAL),
        ("start without a page size", start(0, 0, &[]), Errno::INVAL),
        ("start with an odd page size", start(4097, 0, &[]), Errno::INVAL),
        ("start with fewer ranges", start(4096, 2, &[0, 1]), Errno::INVAL),
        ("start with more ranges", start(4096, 0, &[0, 1]), Errno::INVAL),
        ("start with 4 Gi ranges", start(4096, u32::MAX, &[0, 1]), Errno::INVAL),
        ("start with half a range", start(4096, 1, &[0]), Errno::INVAL),
        ("start with an empty range", start(4096, 1, &[0, 0]), Errno::INVAL),
        ("start behind the last address", start(4096, 1, &[u64::MAX, 2]), Errno::INVAL),
        ("report of half a query", report(99, &[0, 4096]), Errno::INVAL),
        ("report without a page size", report(99, &[0, 4096, 0]), Errno::INVAL),
        ("report with an odd page size", report(99, &[0, 4096, 12]), Errno::INVAL),
        ("report of nothing", report(99, &[0, 0, 4096]), Errno::INVAL),
        ("report behind the end", report(99, &[u64::MAX, 4096, 4096]), Errno::INVAL),
        ("report above the limit", report(u32::MAX, &[0, u64::MAX, 1]), Errno::INVAL),
        ("no room for the report", report(39, &[0, 4096, 4096]), Errno::INVAL),
    ];
    for (what, body, errno) in rows {
        assert_eq!(errno_of(16, body), Some(*errno), "{what}");
    }
}

#[test]
fn what_is_got_comes_behind_the_request() {
    let flags = MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY;
    let reply = written(|out| flags.write_reply(out));
    assert_eq!(reply, [words(&[16, GET | 1]), longs(&[5])].concat());
    assert_eq!(MigrationFlags::parse_reply(&reply), Ok(flags));
    assert!(MigDeviceState::parse_reply(&reply).is_err());

    let state = MigDeviceState::new(MigrationState::Error);
    let reply = written(|out| state.write_reply(out));
    assert_eq!(reply, words(&[16, GET | 2, 0, 0]));
    assert_eq!(MigDeviceState::parse_reply(&reply), Ok(state));
    assert!(MigDeviceState::parse_reply(&words(&[16, GET | 2, 8, 0])).is_err());

    let query = DmaLoggingQuery { address: 0x10_0000, size: 65 * 4096, page_size: 4096 };
    let reply = written(|out| {
        let marked = query
            .write_reply(out, |mut bitmap| [3, 64].into_iter().for_each(|page| bitmap.set(page)));
        assert!(marked.is_ok());
    });
    let fixed = [words(&[48, GET | 8]), longs(&[0x10_0000, 65 * 4096, 4096])].concat();
    assert_eq!(reply, [fixed, longs(&[8, 1])].concat());
    let bitmap = query.parse_reply(&reply).unwrap();
    assert_eq!(bitmap.pages().collect::<Vec<_>>(), [3, 64]);
    assert!(query.parse_reply(&reply[..47]).is_err());
    let other = DmaLoggingQuery { address: 0, ..query };
    assert_eq!(other.parse_reply(&reply), Err(WireError::Mismatch));
    let endless = DmaLoggingQuery { size: u64::MAX, page_size: 1, ..query };
    assert!(endless.write_reply(&mut Vec::new(), |_| ()).is_err());

    let asked = DmaLogging { page_size: 1 << 21, ranges: &[] };
    let taken = FeatureRequest::StartLogging(DmaLogging { page_size: 4096, ..asked });
    assert_eq!(asked.parse_reply(&request(taken).1), Ok(4096));
}

#[test]
fn migration_goes_the_shortest_way_without_passing_a_saving_state() {
    use MigrationState::{
        Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
    };
    let way = |from: MigrationState, target, pre_copy| {
        let mut states = vec![from];
        while *states.last()? != target {
            states.push(states.last()?.step_towards(target, pre_copy)?);
        }
        Some(states)
    };
    assert_eq!(way(Running, StopCopy, true), Some(vec![Running, Stop, StopCopy]));
    assert_eq!(way(PreCopy, Resuming, true), Some(vec![PreCopy, Running, Stop, Resuming]));
    assert_eq!(way(Resuming, PreCopy, true), Some(vec![Resuming, Stop, Running, PreCopy]));
    assert_eq!(way(PreCopy, StopCopy, true), Some(vec![PreCopy, StopCopy]));
    assert_eq!(way(StopCopy, PreCopy, true), None);
    let used = [Stop, Running, StopCopy, Resuming];
    for (from, target) in used.into_iter().flat_map(|from| used.map(|target| (from, target))) {
        let states = way(from, target, false).unwrap();
        let inside = &states[1..states.len().max(2) - 1];
        assert!(!inside.contains(&StopCopy) && !inside.contains(&Resuming), "{states:?}");
        assert_eq!(way(from, target, true), Some(states));
        assert_eq!(way(from, PreCopy, false), None);
    }
    for out in [Error, RunningP2p, PreCopyP2p] {
        assert_eq!((way(Running, out, true), way(out, Running, true)), (None, None));
    }
    for code in 0..8 {
        assert_eq!(MigrationState::try_from(code).unwrap().code(), code);
    }
}

proptest! {
    #[test]
    fn logging_ranges_round_trip(
        ranges in prop::collection::vec((0u64..1 << 62, 1u64..1 << 62), 0..6), shift in 0u32..64,
    ) {
        let ranges: Vec<_> = ranges.iter().map(|(a, size)| LoggingRange::new(*a, *size)).collect();
        let logging = DmaLogging { page_size: 1 << shift, ranges: &ranges };
        let (feature, bytes) = request(FeatureRequest::StartLogging(logging));
        prop_assert_eq!(Request::parse(16, &bytes), Ok(Request::DeviceFeature(feature)));
    }

    #[test]
    fn bitmaps_round_trip(pages in prop::collection::btree_set(0usize..200, 0..40), shift in 0u32..40) {
        let page_size = 1u64 << shift;
        let query = DmaLoggingQuery { address: 0, size: 200 * page_size, page_size };
        let mut reply = Vec::new();
        query.write_reply(&mut reply, |mut bitmap| pages.iter().for_each(|page| bitmap.set(*page))).unwrap();
        let bitmap = query.parse_reply(&reply).unwrap();
        prop_assert_eq!(bitmap.pages().collect::<Vec<_>>(), Vec::from_iter(pages));
    }
}
