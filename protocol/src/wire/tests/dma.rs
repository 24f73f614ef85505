use super::*;

const READ: DmaTransfer = DmaTransfer { address: 0x1000, count: 6 };

#[test]
fn dma_messages_have_the_layout_that_the_client_has() {
    let fill = |data: &mut [u8]| data.copy_from_slice(b"abcdef");
    assert_eq!(written(|out| READ.write_to(out)), longs(&[0x1000, 6]));
    let spec = written(|out| READ.write_data(DmaLayout::Spec, out, fill));
    assert_eq!(spec, [longs(&[0x1000, 6]), b"abcdef".to_vec()].concat());
    let qemu = written(|out| READ.write_data(DmaLayout::Qemu, out, fill));
    let expected = [longs(&[0x1000]), words(&[6]), b"abcdef\0\0\0\0".to_vec()].concat();
    assert_eq!(qemu, expected);

    let write = DmaData { transfer: READ, data: b"abcdef" };
    assert_eq!(ServerRequest::parse(12, &spec), Ok(ServerRequest::DmaWrite(write)));
    let read = written(|out| READ.write_to(out));
    assert_eq!(ServerRequest::parse(11, &read), Ok(ServerRequest::DmaRead(READ)));
}

#[test]
fn a_dma_read_is_taken_in_the_layout_that_its_reply_proves() {
    let reply = |layout, data: &[u8; 6]| {
        written(|out| READ.write_data(layout, out, |room| room.copy_from_slice(data)))
    };
    let (spec, qemu) = (DmaLayout::Spec, DmaLayout::Qemu);
    for (sent, data, believed, proven) in [
        (spec, b"abcdef", qemu, Some(spec)),
        (qemu, b"abcdef", spec, Some(qemu)),
        (spec, b"\0\0\0\0\0f", qemu, Some(spec)),
        (qemu, b"a\0\0\0\0\0", spec, Some(qemu)),
        (spec, b"ab\0\0\0\0", spec, None),
        (qemu, b"\0\0\0\0ef", qemu, None),
        (qemu, b"\0\0\0\0\0\0", spec, None),
    ] {
        let body = reply(sent, data);
        let parsed = READ.parse_read_reply(&body, believed);
        assert_eq!(parsed, Ok(DmaReadReply { data, proven }), "{sent:?} {data:?}");
    }
    let unpadded = &reply(qemu, b"abcdef")[..18];
    let expected = DmaReadReply { data: b"abcdef", proven: Some(qemu) };
    assert_eq!(READ.parse_read_reply(unpadded, spec), Ok(expected));

    let small = DmaTransfer { address: 0x1000, count: 1 };
    for layout in [spec, qemu] {
        let body = written(|out| small.write_data(layout, out, |data| data[0] = 7));
        let expected = DmaReadReply { data: &[7], proven: Some(layout) };
        assert_eq!(small.parse_read_reply(&body, spec), Ok(expected));
    }
}

#[test]
fn a_reply_to_another_transfer_is_refused() {
    let good = longs(&[0x1000, 6]);
    assert_eq!(READ.check_write_reply(&good), Ok(DmaLayout::Spec));
    assert_eq!(READ.check_write_reply(&good[..12]), Ok(DmaLayout::Spec));
    assert_eq!(READ.check_write_reply(&[]), Ok(DmaLayout::Qemu));
    let data = [1; 6];
    let rows: &[(&str, Vec<u8>)] = &[
        ("another address", [longs(&[0x1001, 6]), data.to_vec()].concat()),
        ("another count", [longs(&[0x1000, 5]), data.to_vec()].concat()),
        ("a count of 4 GiB and 6", [longs(&[0x1000, (1 << 32) + 6]), data.to_vec()].concat()),
        ("nothing", vec![]),
        ("half of the fixed part", longs(&[0x1000])),
        ("no data", good.clone()),
        ("less data", [good.clone(), vec![1; 5]].concat()),
        ("more data", [good.clone(), vec![1; 7]].concat()),
    ];
    for (what, body) in rows {
        assert!(READ.parse_read_reply(body, DmaLayout::Spec).is_err(), "{what}");
        if !body.is_empty() && *body != good {
            assert!(READ.check_write_reply(body).is_err(), "{what}");
        }
    }
}

#[test]
fn a_server_can_ask_only_for_what_a_client_can_give() {
    let errno = |code, body: &[u8]| ServerRequest::parse(code, body).map_err(|e| e.errno()).err();
    let limit = u64::from(MAX_DATA_XFER_SIZE);
    assert_eq!(errno(11, &longs(&[u64::MAX - limit + 1, limit])), None);
    assert_eq!(errno(11, &longs(&[u64::MAX, 0])), None);
    let rows: &[(&str, u16, Vec<u8>, Errno)] = &[
        ("a client's command", 9, vec![0; 16], Errno::NOTSUP),
        ("no command", 14, vec![0; 16], Errno::INVAL),
        ("short", 11, longs(&[0]), Errno::INVAL),
        ("a read with data", 11, longs(&[0, 8, 0]), Errno::INVAL),
        ("above the limit", 11, longs(&[0, limit + 1]), Errno::INVAL),
        ("4 GiB", 11, longs(&[0, 1 << 32]), Errno::INVAL),
        ("behind the last address", 11, longs(&[u64::MAX, 2]), Errno::INVAL),
        ("a write without its data", 12, longs(&[0, 8]), Errno::INVAL),
        ("a write with less data", 12, longs(&[0, 9, 0]), Errno::INVAL),
        ("a write with more data", 12, longs(&[0, 7, 0]), Errno::INVAL),
    ];
    for (what, code, body, expected) in rows {
        assert_eq!(errno(*code, body), Some(*expected), "{what}");
    }
}

#[test]
fn a_window_goes_with_the_bitmap_that_was_asked_for() {
    let unmap = DmaUnmap::with_bitmap(0x10000, 65 * 4096, 4096).unwrap();
    let request = unmap.to_bytes();
    assert_eq!(request, [words(&[56, 1]), longs(&[0x10000, 65 * 4096, 4096, 16])].concat());
    assert_eq!(Request::parse(3, &request), Ok(Request::DmaUnmap(unmap)));

    let reply = written(|out| {
        unmap.write_reply(out, |mut bitmap| {
            [0, 9, 64, 128].into_iter().for_each(|page| bitmap.set(page));
            assert_eq!(bitmap.bytes().len(), 16);
        });
    });
    assert_eq!(reply, [request, longs(&[1 | 1 << 9, 1])].concat());
    let bitmap = unmap.parse_reply(&reply).unwrap().unwrap();
    assert_eq!(bitmap.pages().collect::<Vec<_>>(), [0, 9, 64]);
    assert!(bitmap.contains(9) && !bitmap.contains(10) && !bitmap.contains(usize::MAX));
    assert!(unmap.parse_reply(&reply[..55]).is_err());
    assert!(DmaUnmap::with_bitmap(0, 65 * 4096, 4096).unwrap().parse_reply(&reply).is_err());

    let plain = DmaUnmap::range(0x10000, 65 * 4096);
    let bytes = written(|out| plain.write_reply(out, |_| unreachable!("no bitmap was asked for")));
    assert_eq!(bytes, plain.to_bytes());
    assert_eq!(plain.parse_reply(&bytes), Ok(None));
}

#[test]
fn malformed_unmaps_are_refused() {
    let unmap = |argsz, flags, rest: &[u64]| [words(&[argsz, flags]), longs(rest)].concat();
    assert!(Request::parse(3, &DmaUnmap::all().to_bytes()).is_ok());
    assert!(Request::parse(3, &unmap(64, 1, &[0, 4096, 4096, 24])).is_ok());
    let rows: &[(&str, Vec<u8>)] = &[
        ("argsz below the structure", unmap(23, 0, &[0, 4096])),
        ("an unknown flag", unmap(24, 4, &[0, 4096])),
        ("a bitmap of everything", unmap(56, 3, &[0, 0, 4096, 8])),
        ("all with an address", unmap(24, 2, &[4096, 0])),
        ("all with a size", unmap(24, 2, &[0, 4096])),
        ("a bitmap nobody asked for", unmap(56, 0, &[0, 4096, 4096, 8])),
        ("no bitmap structure", unmap(56, 1, &[0, 4096])),
        ("half a bitmap structure", unmap(56, 1, &[0, 4096, 4096])),
        ("more than a bitmap structure", unmap(56, 1, &[0, 4096, 4096, 8, 0])),
        ("no page size", unmap(56, 1, &[0, 4096, 0, 8])),
        ("an odd page size", unmap(56, 1, &[0, 4096, 4095, 8])),
        ("a bitmap of nothing", unmap(56, 1, &[0, 0, 4096, 8])),
        ("a bitmap behind the end", unmap(56, 1, &[u64::MAX, 4096, 4096, 8])),
        ("a bitmap too small", unmap(56, 1, &[0, 65 * 4096, 4096, 15])),
        ("a huge bitmap", unmap(u32::MAX, 1, &[0, 4096, 4096, u64::MAX])),
        ("a bitmap above the limit", unmap(u32::MAX, 1, &[0, u64::MAX, 4096, 1 << 20])),
        ("no room for the bitmap", unmap(47, 1, &[0, 4096, 4096, 8])),
    ];
    for (what, body) in rows {
        assert_eq!(errno_of(3, body), Some(Errno::INVAL), "{what}");
    }
}

#[test]
fn a_bitmap_is_whole_words_and_bounded() {
    let page = 4096;
    assert_eq!(PageBitmap::size_for(0, 1, page), Ok(8));
    assert_eq!(PageBitmap::size_for(0, 64 * page, page), Ok(8));
    assert_eq!(PageBitmap::size_for(0, 64 * page + 1, page), Ok(16));
    assert_eq!(PageBitmap::size_for(u64::MAX, 1, 1 << 63), Ok(8));
    let most = u64::from(PageBitmap::MAX_SIZE) * 8 * page;
    assert_eq!(PageBitmap::size_for(0, most, page), Ok(PageBitmap::MAX_SIZE));
    assert!(PageBitmap::size_for(0, most + 1, page).is_err());
    assert!(PageBitmap::size_for(0, u64::MAX, 1).is_err());
}

proptest! {
    #[test]
    fn transfers_round_trip(
        address in 0u64..1 << 63, data in prop::collection::vec(any::<u8>(), 0..40), qemu: bool,
    ) {
        let layout = if qemu { DmaLayout::Qemu } else { DmaLayout::Spec };
        let transfer = DmaTransfer { address, count: data.len() as u64 };
        let fill = |room: &mut [u8]| room.copy_from_slice(&data);
        let body = written(|out| transfer.write_data(layout, out, fill));
        let reply = transfer.parse_read_reply(&body, layout).unwrap();
        prop_assert_eq!(reply.data, &data[..]);
        prop_assert!(reply.proven.is_none_or(|proven| proven == layout));
    }
}
