//! Requests beyond those that every VMM makes.

use std::os::fd::OwnedFd;

use barkeep_protocol::wire::{
    DeviceFeature, DmaAccess, DmaLogging, DmaLoggingQuery, FeatureIndex, FeatureMethods,
    FeatureRequest, IoFd, IoFdKind, IoFds, LoggingRange, MigData, MigDeviceState, MigrationFlags,
    MigrationState, Offer, RegionWrites, Request, SmallWrite,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

fn offering(offer: Offer) -> Version {
    Version { minor: 1, ..Version::proposal_with(offer) }
}

/// Answers each request with what `answer` appends, or its errno.
fn serving(
    name: &str,
    version: Version,
    mut answer: impl FnMut(Request<'_>, &mut Vec<u8>) -> Result<Vec<OwnedFd>, Errno> + Send + 'static,
) -> (Script, Client) {
    let script = serve(name, move |server| {
        server.answer_version(&version);
        while let Some(frame) = server.request() {
            let request = Request::parse(frame.header.command, &frame.body).unwrap();
            let mut body = Vec::new();
            let answer = answer(request, &mut body);
            if frame.header.kind == (MessageKind::Command { no_reply: true }) {
                continue;
            }
            let header = frame.header;
            server.send(match answer {
                Ok(fds) => Frame::reply(&header, body).with_fds(fds),
                Err(errno) => Frame::error(header.id, header.command, errno),
            });
        }
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    (script, client)
}

#[test]
fn posted_writes_arrive_before_what_the_same_thread_asks_for_later() {
    let mut written = Vec::new();
    let (script, client) = serving("posted", plain(), move |request, out| {
        match request {
            Request::RegionWrite(write) => written.push(write.data[0]),
            Request::RegionRead(access) => {
                access.write_reply(out, |data| data[0] = *written.last().unwrap())
            }
            other => panic!("{other:?}"),
        }
        Ok(Vec::new())
    });
    for round in 1..=20 {
        client.region_write_posted(0, 0, &[round]).unwrap();
        let mut count = [0];
        client.region_read(0, 0, &mut count).unwrap();
        assert_eq!(count, [round]);
    }
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn several_writes_travel_together_to_a_server_that_offers_it() {
    let writes: Vec<_> = (0..3).map(|n| SmallWrite::new(0, 8 * n, &[7; 4]).unwrap()).collect();
    let (script, client) =
        serving("multi", offering(Offer::WRITE_MULTIPLE), |request, out| match request {
            Request::RegionWriteMulti(RegionWrites { writes }) => {
                assert_eq!(
                    writes.iter().map(|w| w.access().offset).collect::<Vec<_>>(),
                    [0, 8, 16]
                );
                RegionWrites::write_reply(out, 2);
                Ok(Vec::new())
            }
            other => panic!("{other:?}"),
        });
    assert_eq!(client.region_write_multi(&writes).unwrap(), 2);
    drop(client);
    script.thread.join().unwrap();

    let (script, client) = serving("not-multi", plain(), |request, _| panic!("{request:?}"));
    assert!(matches!(client.region_write_multi(&writes), Err(ClientError::NotOffered(_))));
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_devices_state_moves_in_pieces() {
    let mut state = MigrationState::Running;
    let mut left: Vec<u8> = (0..10).collect();
    let (script, client) =
        serving("state", offering(Offer::MIGRATION), move |request, out| match request {
            Request::DeviceFeature(feature) => {
                match feature.request {
                    FeatureRequest::Probe { feature: FeatureIndex::MigDeviceState, .. } => {
                        feature.write_to(out);
                    }
                    FeatureRequest::GetMigration => MigrationFlags::STOP_COPY.write_reply(out),
                    FeatureRequest::GetState => MigDeviceState::new(state).write_reply(out),
                    FeatureRequest::SetState(wanted)
                        if wanted.state == MigrationState::StopCopy =>
                    {
                        state = wanted.state;
                        feature.write_to(out);
                    }
                    _ => return Err(Errno::INVAL),
                }
                Ok(Vec::new())
            }
            Request::MigDataRead(read) => {
                let rest = left.split_off(left.len().min(read.size as usize));
                MigData { data: &std::mem::replace(&mut left, rest) }.write_to(out);
                Ok(Vec::new())
            }
            Request::MigDataWrite(data) if data.data == [1, 2] => Ok(Vec::new()),
            other => panic!("{other:?}"),
        });
    let methods = FeatureMethods::GET | FeatureMethods::SET;
    assert!(client.has_feature(FeatureIndex::MigDeviceState, methods).unwrap());
    assert!(!client.has_feature(FeatureIndex::DmaLoggingStart, FeatureMethods::SET).unwrap());
    assert_eq!(client.migration().unwrap(), MigrationFlags::STOP_COPY);
    assert_eq!(client.migration_state().unwrap(), MigrationState::Running);
    let refused = client.set_migration_state(MigrationState::Resuming);
    assert!(matches!(refused, Err(ClientError::Refused(Errno::INVAL))));
    client.set_migration_state(MigrationState::StopCopy).unwrap();
    assert_eq!(client.migration_state().unwrap(), MigrationState::StopCopy);
    let mut bytes = Vec::new();
    while client.migration_data_read(4, &mut bytes).unwrap() == 4 {}
    assert_eq!(bytes, (0..10).collect::<Vec<_>>());
    client.migration_data_write(&[1, 2]).unwrap();
    let oversized = client.migration_data_write(&vec![0; (1 << 20) + 1]);
    assert!(matches!(oversized, Err(ClientError::TooLarge(_))));
    assert!(!client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn dirty_pages_are_told_by_the_log_and_with_the_end_of_a_window() {
    let (script, client) = serving("dirty", plain(), |request, out| {
        match request {
            Request::DmaMap(_) => {}
            Request::DmaUnmap(unmap) => unmap.write_reply(out, |mut bitmap| bitmap.set(3)),
            Request::DeviceFeature(feature) => match feature.request {
                FeatureRequest::StartLogging(logging) => {
                    let request =
                        FeatureRequest::StartLogging(DmaLogging { page_size: 8192, ..logging });
                    DeviceFeature { request, ..feature }.write_to(out);
                }
                FeatureRequest::ReportLogging(query) => query
                    .write_reply(out, |mut bitmap| {
                        bitmap.set(0);
                        bitmap.set(9);
                    })
                    .unwrap(),
                FeatureRequest::StopLogging { .. } => feature.write_to(out),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
        Ok(Vec::new())
    });
    let (address, size, page_size) = (0x10_0000, 0x10_0000, 4096);
    let ranges = [LoggingRange::new(address, size)];
    assert_eq!(client.start_dma_logging(page_size, &ranges).unwrap(), 8192);
    let query = DmaLoggingQuery { address, size, page_size };
    assert_eq!(client.dirty_pages(&query).unwrap(), [0, 9]);
    client.stop_dma_logging().unwrap();
    let access = DmaAccess::READ | DmaAccess::WRITE;
    client.dma_map(&DmaMap { access, file_offset: 0, address, size }, None).unwrap();
    assert_eq!(client.dma_unmap_dirty(address, size, page_size).unwrap(), [3]);
    let impossible = client.dma_unmap_dirty(0, 1 << 60, page_size);
    assert!(matches!(impossible, Err(ClientError::Request(_))));
    assert!(!client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn doorbells_come_with_their_eventfds() {
    let (script, client) = serving("bells", plain(), |request, out| match request {
        Request::GetRegionIoFds(query) if query.region == 2 => {
            let entry = |offset, fd_index, kind| IoFd { offset, size: 4, fd_index, kind };
            let event = |datamatch, pio| IoFdKind::Eventfd { datamatch, pio };
            let entries = vec![
                entry(0, Some(1), event(Some(5), false)),
                entry(4, Some(0), event(None, false)),
                entry(8, Some(0), event(None, true)),
                entry(12, None, event(None, false)),
                entry(16, Some(0), IoFdKind::Other(9)),
            ];
            assert!(IoFds { region: 2, entries }.write_to(&query, out));
            let file = || rustix::fs::memfd_create("bell", rustix::fs::MemfdFlags::empty());
            Ok(vec![file().unwrap(), file().unwrap()])
        }
        Request::GetRegionIoFds(_) => Err(Errno::NOTSUP),
        other => panic!("{other:?}"),
    });
    let found = client.doorbells(2).unwrap();
    let places: Vec<_> = found.iter().map(|bell| (bell.offset, bell.size, bell.value)).collect();
    assert_eq!(places, [(0, 4, Some(5)), (4, 4, None)]);
    assert!(matches!(client.doorbells(0), Err(ClientError::Refused(Errno::NOTSUP))));
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn many_doorbells_are_asked_for_again_and_endless_ones_are_left() {
    let (script, client) = serving("belfry", plain(), |request, out| match request {
        Request::GetRegionIoFds(query) => {
            let kind = IoFdKind::Eventfd { datamatch: None, pio: false };
            let entry = |offset| IoFd { offset, size: 4, fd_index: Some(0), kind };
            let count = if query.region == 0 { 70 } else { 10_000 };
            let whole = IoFds { region: query.region, entries: (0..count).map(entry).collect() }
                .write_to(&query, out);
            let file = || rustix::fs::memfd_create("bell", rustix::fs::MemfdFlags::empty());
            Ok(whole.then(|| file().unwrap()).into_iter().collect())
        }
        other => panic!("{other:?}"),
    });
    assert_eq!(client.doorbells(0).unwrap().len(), 70);
    assert!(client.doorbells(2).unwrap().is_empty());
    assert!(!client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

/// A server need not have an answer to it: libvfio-user sends a header alone.
#[test]
fn an_access_to_nothing_is_not_sent() {
    let (script, client) = serving("nothing", plain(), |request, _| panic!("{request:?}"));
    client.region_read(0, 0, &mut []).unwrap();
    client.region_write(0, 0, &[]).unwrap();
    client.region_write_posted(0, 0, &[]).unwrap();
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_deadline_beyond_all_time_is_as_good_as_none() {
    for deadline in [Duration::MAX, Duration::from_secs(u64::MAX / 2), Duration::from_secs(1 << 40)]
    {
        let script = serve("patient", |server| {
            server.answer_version(&plain());
            let request = server.request().unwrap();
            server.echo(&request);
            server.drain();
        });
        let client = Client::connect(&script.path, deadline).unwrap();
        assert_eq!(read(&client).unwrap(), 0);
        client.region_write_posted(0, 0, &[1]).unwrap();
        drop(client);
        script.thread.join().unwrap();
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let script = serve("unasked", |server| {
        server.answer_version(&plain());
        let request = server.request().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let writers = |count| (0..count).map(|_| writer.try_clone().unwrap()).collect();
        let command = Frame::command(MessageId(1), Command::DmaRead, vec![0; 16]);
        server.send(command.with_fds(writers(5)));
        server.request().unwrap();
        let mut body = request.body.clone();
        body.extend_from_slice(&[0; 4]);
        server.send(Frame::reply(&request.header, body).with_fds(writers(5)));
        let request = server.request().unwrap();
        let header = request.header;
        let mut refusal = Frame::error(header.id, header.command, Errno::INVAL);
        refusal.fds = writers(5);
        server.send(refusal);
        // By the next request, the client is done with all of them.
        server.request().unwrap();
        drop(writer);
        let mut polled = [PollFd::new(&reader, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).unwrap();
        assert!(polled[0].revents().contains(PollFlags::HUP), "the last writer has gone");
    });
    let client = connect(&script);
    assert_eq!(read(&client).unwrap(), 0);
    assert!(matches!(read(&client), Err(ClientError::Refused(Errno::INVAL))));
    assert!(matches!(read(&client), Err(ClientError::Lost | ClientError::Gone)));
    script.thread.join().unwrap();
}

#[test]
fn an_id_that_is_in_flight_is_given_out_to_nobody_else() {
    const POSTED: u32 = 70_000;
    let script = serve("wraps", |server| {
        server.answer_version(&plain());
        let held = server.request().unwrap();
        for _ in 0..POSTED {
            assert_ne!(server.request().unwrap().header.id, held.header.id);
        }
        server.echo(&held);
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(read(&client).unwrap(), 0));
        while client.connection.try_read().is_some() {
            std::thread::yield_now();
        }
        (0..POSTED).for_each(|_| client.region_write_posted(0, 0, &[1]).unwrap());
    });
    drop(client);
    script.thread.join().unwrap();
}
