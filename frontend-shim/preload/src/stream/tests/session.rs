use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use barkeep_protocol::wire::{
    BarkeepExtensions, Command, FaultAccess, FaultVerdict, Header, RegionAccess, RegionData,
    Version,
};
use rustix::fs::fstat;
use rustix::io::Errno;

use super::server::{BAR_SIZE, BAR_START, Habits, Server};
use super::{ASK, CONTROL, Vmm, YES, message, version};
use crate::device::{BarAddress, Decode, DeviceId, Placement, Source};
use crate::status::Count;
use crate::stream::introduce::Facts;
use crate::stream::outgoing::Configured;

const GET_INFO: u16 = Command::GetInfo as u16;

/// A VMM that has had its answer to VERSION and sent its next command, as QEMU does.
fn session(habits: Habits) -> (Vmm, Server) {
    session_after(habits, |_| {})
}

/// The same with something before it.
fn session_after(habits: Habits, before: impl FnOnce(&Vmm)) -> (Vmm, Server) {
    let (vmm, socket) = Vmm::new();
    before(&vmm);
    let server = Server::start(socket, habits);
    let hello = version(7);
    assert_eq!(vmm.send(&hello), Ok(hello.len()));
    let welcome = vmm.message();
    let said = Version::parse(&welcome[16..]).unwrap();
    assert_eq!(said.capabilities.barkeep, None);
    assert_eq!(vmm.receive(100), Err(Errno::AGAIN));
    assert_eq!(vmm.send(&message(8, GET_INFO, ASK, &[0; 16])), Ok(32));
    assert_eq!(vmm.message(), message(8, GET_INFO, YES, &[]));
    (vmm, server)
}

fn device(vmm: &Vmm, server: &Server) -> DeviceId {
    let (device, bar, offset) = bar_file(vmm, server, BAR_START + 5).expect("the file of a BAR");
    assert_eq!((bar, offset), (2, 5));
    device
}

fn bar_file(vmm: &Vmm, server: &Server, offset: u64) -> Option<(DeviceId, u8, u64)> {
    let stat = fstat(&server.bar).unwrap();
    vmm.shim.user_bar_file((stat.st_dev, stat.st_ino), offset)
}

/// The commands that the server has got since, up to one of the VMM's with this id.
fn commands_until(server: &Server, id: u16) -> Vec<Header> {
    let headers = server.commands.iter().map(|(header, _)| header);
    headers.take_while(|header| header.id.0 != id).collect()
}

#[test]
fn a_device_says_what_it_is_before_the_vmms_second_message() {
    let (vmm, server) = session(Habits::default());
    device(&vmm, &server);
    assert!(vmm.shim.has_user_bar_files());
    assert_eq!(bar_file(&vmm, &server, BAR_START - 1), None);
    assert_eq!(bar_file(&vmm, &server, BAR_START + BAR_SIZE), None);
    assert_eq!(vmm.shim.user_decode(0, 2), Decode::Off);
    assert_eq!(vmm.shim.user_decode(0, 1), Decode::Unknown);
    let placement = Placement { size: BAR_SIZE, address: 0xe000_0000, live: 0xe000_0000 };
    assert_eq!(vmm.shim.user_placements(0).unwrap()[2], placement);
    let asked: Vec<u16> = commands_until(&server, 8).iter().map(|header| header.command).collect();
    assert_eq!(asked, [1, 5, 5, 5, 5, 5, 5, 0x8003]);
    assert!(vmm.shim.system.received.lock().unwrap().is_empty());
}

#[test]
fn the_backend_answers_for_a_bar_that_does_not_decode() {
    let (vmm, server) = session(Habits::default());
    let device = device(&vmm, &server);
    let mut data = [0; 4];
    vmm.shim.complete(device, 2, 8, &mut data, false);
    assert_eq!(data, [0xff; 4]);
    vmm.shim.complete(device, 2, 8, &mut [1, 2], true);
    let verdict = vmm.shim.verdict(device, 2, 0x1000, FaultAccess::READ);
    assert_eq!(verdict, Some(FaultVerdict::UnsupportedRequest { epoch: 9 }));
    let status = &vmm.shim.status;
    let counts = [Count::Forwarded, Count::UrReads, Count::UrWrites].map(|it| status.get(it));
    assert_eq!(counts, [3, 1, 1]);
    assert_eq!(vmm.send(&message(9, GET_INFO, ASK, &[0; 16])), Ok(32));
    let asked = commands_until(&server, 9);
    let last: Vec<u16> = asked.iter().rev().take(3).map(|header| header.command).collect();
    assert_eq!(last, [0x8001, 10, 9]);
    assert_eq!(vmm.message(), message(9, GET_INFO, YES, &[]));
}

#[test]
fn the_answer_to_version_may_be_read_by_another_thread_at_once() {
    for _ in 0..40 {
        let (vmm, socket) = Vmm::new();
        let _server = Server::start(socket, Habits::default());
        let vmm = Arc::new(vmm);
        let reader = thread::spawn({
            let vmm = Arc::clone(&vmm);
            move || vmm.message()
        });
        let hello = version(7);
        assert_eq!(vmm.send(&hello), Ok(hello.len()));
        let said = Version::parse(&reader.join().unwrap()[16..]).unwrap();
        assert_eq!(said.capabilities.barkeep, None);
        assert_eq!(vmm.send(&message(8, GET_INFO, ASK, &[0; 16])), Ok(32));
        assert_eq!(vmm.message(), message(8, GET_INFO, YES, &[]));
        assert!(vmm.shim.has_user_bar_files());
    }
}

#[test]
fn a_version_that_can_not_be_sent_begins_nothing() {
    let (vmm, socket) = Vmm::new();
    drop(socket);
    assert_eq!(vmm.send(&version(7)), Err(Errno::PIPE));
    assert_eq!(vmm.shim.descriptors.get(vmm.fd), None);
    assert!(vmm.shim.connection_of(vmm.fd).is_none());
}

#[test]
fn what_decoded_before_is_told_with_the_whole_answer_to_a_write_of_configuration() {
    let (vmm, _server) = session(Habits::default());
    let (_, connection) = vmm.shim.connection_of(vmm.fd).unwrap();
    let system = &vmm.shim.system;
    let access = RegionAccess { offset: 4, region: 7, count: 2 };
    let bytes = message(30, 10, ASK, &RegionData { access, data: &[0, 0] }.to_bytes());
    system.place(0, &bytes);
    let begun = super::whole(0, bytes.len());
    let mut writer = connection.writer();
    let (sent, configured) = connection.send(system, &mut writer, vmm.fd, &begun, 0, || Decode::On);
    drop(writer);
    assert_eq!((sent, configured), (Ok(bytes.len()), Some(Configured::default())));
    vmm.wait();
    let mut told = Vec::new();
    for len in [16, 10, 6] {
        let room = super::whole(super::ROOM, len);
        let (got, configured) = connection.receive(system, vmm.fd, &room, 0).unwrap();
        assert_eq!(got.count, len);
        told.push(configured);
    }
    assert_eq!(told, [None, None, Some(Decode::On)]);
}

#[test]
fn many_threads_ask_while_the_vmm_talks_and_reads() {
    let (vmm, server) = session(Habits::default());
    let device = device(&vmm, &server);
    let vmm = Arc::new(vmm);
    let over = Arc::new(AtomicBool::new(false));
    let askers: Vec<_> = (0..4)
        .map(|_| {
            let (vmm, over) = (Arc::clone(&vmm), Arc::clone(&over));
            thread::spawn(move || {
                let mut asked = 0;
                while !over.load(Ordering::Relaxed) || asked < 20 {
                    let mut data = [0; 8];
                    vmm.shim.complete(device, 2, 0, &mut data, false);
                    assert_eq!(data, [0xff; 8]);
                    asked += 1;
                }
                asked
            })
        })
        .collect();
    for id in 100..400 {
        let ask = message(id, Command::MigDataWrite.code(), ASK, &[3; 100]);
        assert_eq!(vmm.send(&ask), Ok(ask.len()));
        assert_eq!(vmm.message(), message(id, Command::MigDataWrite.code(), YES, &[]));
    }
    over.store(true, Ordering::Relaxed);
    let asked: u64 = askers.into_iter().map(|asker| asker.join().unwrap()).sum();
    assert_eq!(vmm.shim.status.get(Count::Forwarded), asked);
    assert_eq!(vmm.receive(1), Err(Errno::AGAIN));
}

#[test]
fn a_silent_server_is_waited_for_once_and_asked_again_when_it_speaks() {
    let (vmm, server) = session(Habits::default());
    let device = device(&vmm, &server);
    server.habits.lock().unwrap().ignores = vec![Command::RegionRead];
    let connection = vmm.shim.connection_of(vmm.fd).unwrap().1;
    let soon = std::time::Instant::now();
    assert!(connection.ask(Command::RegionRead, &[0; 16], soon).is_none());
    assert!(connection.pending().silent);
    // Without waiting.
    let mut data = [0; 4];
    vmm.shim.complete(device, 2, 8, &mut data, false);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 0);
    // The VMM hears of it, and then so may we.
    server.habits.lock().unwrap().ignores.clear();
    assert_eq!(vmm.send(&message(9, GET_INFO, ASK, &[0; 16])), Ok(32));
    assert_eq!(vmm.message(), message(9, GET_INFO, YES, &[]));
    vmm.shim.complete(device, 2, 8, &mut data, false);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 1);
}

#[test]
fn a_late_answer_to_us_never_reaches_the_vmm() {
    let (vmm, mut server) = session(Habits::default());
    device(&vmm, &server);
    server.habits.lock().unwrap().ignores = vec![Command::RegionRead];
    let connection = vmm.shim.connection_of(vmm.fd).unwrap().1;
    commands_until(&server, 8);
    let soon = std::time::Instant::now();
    assert!(connection.ask(Command::RegionRead, &[0; 16], soon).is_none());
    let (late, _) = server.commands.recv().unwrap();
    server.socket.write_all(&message(late.id.0, late.command, YES, &[0; 20])).unwrap();
    connection.look();
    assert!(!connection.pending().silent);
    assert_eq!(vmm.send(&message(9, GET_INFO, ASK, &[0; 16])), Ok(32));
    assert_eq!(vmm.message(), message(9, GET_INFO, YES, &[]));
    assert!(!connection.pending().owes_us());
}

#[test]
fn an_answer_about_another_place_is_none() {
    let (vmm, server) = session(Habits { misreads: true, ..Habits::default() });
    let mut data = [0; 4];
    vmm.shim.complete(device(&vmm, &server), 2, 8, &mut data, false);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn an_error_of_the_connection_is_the_vmms_to_hear_of() {
    let (vmm, socket) = Vmm::new();
    let hello = version(7);
    assert_eq!(vmm.send(&hello), Ok(hello.len()));
    // With something that was not read.
    drop(socket);
    let (_, connection) = vmm.shim.connection_of(vmm.fd).unwrap();
    connection.look();
    assert_eq!(vmm.receive(16), Err(Errno::CONNRESET));
    assert_eq!(vmm.receive(16), Ok(Vec::new()));
}

#[test]
fn a_server_that_ends_holds_nobody_up() {
    let (vmm, server) = session(Habits::default());
    let device = device(&vmm, &server);
    server.habits.lock().unwrap().ignores = vec![Command::RegionRead];
    let vmm = Arc::new(vmm);
    let asker = thread::spawn({
        let vmm = Arc::clone(&vmm);
        move || {
            let mut data = [0; 4];
            vmm.shim.complete(device, 2, 8, &mut data, false);
            data
        }
    });
    commands_until(&server, 8);
    server.commands.recv().unwrap();
    server.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(asker.join().unwrap(), [0xff; 4]);
    assert_eq!(vmm.receive(16), Ok(Vec::new()));
}

#[test]
fn of_a_server_that_is_no_barkeep_only_the_files_are_known() {
    let (vmm, server) = session(Habits { extensions: None, ..Habits::default() });
    let device = device(&vmm, &server);
    assert_eq!(vmm.shim.verdict(device, 2, 0, FaultAccess::empty()), None);
    let mut data = [0; 2];
    vmm.shim.complete(device, 2, 0, &mut data, false);
    assert_eq!(data, [0xff; 2]);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 0);
    assert_eq!(vmm.shim.status.get(Count::UrReads), 1);
}

/// Writes to configuration space, as the VMM does it and as the server has it.
fn configure(vmm: &Vmm, server: &Server, offset: usize, data: &[u8]) {
    server.habits.lock().unwrap().config[offset..offset + data.len()].copy_from_slice(data);
    let count = u32::try_from(data.len()).unwrap();
    let access = RegionAccess { offset: offset as u64, region: 7, count };
    let write = message(20, 10, ASK, &RegionData { access, data }.to_bytes());
    assert_eq!(vmm.send(&write), Ok(write.len()));
    vmm.message();
}

#[test]
fn a_server_that_is_no_barkeep_is_asked_for_its_configuration_when_that_may_have_changed() {
    let (vmm, server) = session(Habits { extensions: None, ..Habits::default() });
    let placed = |live| Placement { size: BAR_SIZE, address: 0xe000_0000, live };
    let seen = || {
        vmm.shim.user_look(0);
        (vmm.shim.user_placements(0).unwrap()[2], vmm.shim.user_decode(0, 2))
    };
    // BAR 2 at an address where it has never decoded.
    let epoch = vmm.shim.user_epoch(0);
    configure(&vmm, &server, 0x18, &0xe000_0000_u32.to_le_bytes());
    assert_ne!(vmm.shim.user_epoch(0), epoch);
    assert_eq!(vmm.shim.user_decode(0, 2), Decode::Unknown);
    assert_eq!(seen(), (placed(0), Decode::Off));
    // It decodes, and nobody looks before it does not any more.
    configure(&vmm, &server, 4, &[2, 0]);
    configure(&vmm, &server, 4, &[0, 0]);
    assert_eq!(seen(), (placed(0xe000_0000), Decode::Off));
    configure(&vmm, &server, 4, &[2, 0]);
    assert_eq!(seen(), (placed(0xe000_0000), Decode::On));
    // Its size is asked for, and it is moved.
    configure(&vmm, &server, 4, &[0, 0]);
    configure(&vmm, &server, 0x18, &0xffff_0000_u32.to_le_bytes());
    let sizing = Placement { address: 0xffff_0000, ..placed(0xe000_0000) };
    assert_eq!(seen(), (sizing, Decode::Off));
    // What did not change is not asked for again.
    let epoch = vmm.shim.user_epoch(0);
    while server.commands.try_recv().is_ok() {}
    assert_eq!(seen(), (sizing, Decode::Off));
    assert_eq!(vmm.shim.user_epoch(0), epoch);
    assert!(server.commands.try_recv().is_err());
    assert_eq!(vmm.shim.user_decode(0, 1), Decode::Unknown);
}

#[test]
fn nobody_waits_with_a_lock_for_a_server_that_is_no_barkeep() {
    let (vmm, mut server) = session(Habits { extensions: None, ..Habits::default() });
    let device = device(&vmm, &server);
    configure(&vmm, &server, 0x18, &0xe000_0000_u32.to_le_bytes());
    configure(&vmm, &server, 4, &[2, 0]);
    while server.commands.try_recv().is_ok() {}
    // With the lock of a VM's slots, and in a QEMU its big one.
    vmm.shim.belongs(device, 0);
    assert!(server.commands.try_recv().is_err(), "nothing is asked");
    server.habits.lock().unwrap().ignores = vec![Command::RegionRead];
    let vmm = Arc::new(vmm);
    let exit = thread::spawn({
        let vmm = Arc::clone(&vmm);
        move || vmm.shim.window_at(0, 0xe000_0010)
    });
    let (asked, body) = server.commands.recv().unwrap();
    vmm.shim.belongs(device, 0);
    // The answer, now that this was not held up.
    let config = server.habits.lock().unwrap().config;
    let answer = message(asked.id.0, asked.command, YES, &[&body[..16], &config].concat());
    server.socket.write_all(&answer).unwrap();
    assert_eq!(exit.join().unwrap(), Some(BarAddress { device, bar: 2, offset: 0x10 }));
    assert_eq!(vmm.shim.decode(device, 2), Decode::On);
}

#[test]
fn a_fault_asks_a_server_that_is_no_barkeep_what_decodes() {
    let (vmm, server) = session(Habits { extensions: None, ..Habits::default() });
    let device = device(&vmm, &server);
    for (command, decode) in [(2, Decode::On), (0, Decode::Off)] {
        configure(&vmm, &server, 4, &[command, 0]);
        assert_eq!(vmm.shim.verdict(device, 2, 0, FaultAccess::empty()), None);
        assert_eq!(vmm.shim.user_decode(0, 2), decode);
    }
}

#[test]
fn a_page_that_could_shrink_is_not_looked_at() {
    let (vmm, _server) = session(Habits { unsealed: true, ..Habits::default() });
    assert!(vmm.shim.system.pages.lock().unwrap().is_empty());
}

#[test]
fn an_extension_that_the_server_has_not_is_not_used() {
    let extensions = BarkeepExtensions { region_state: true, ..BarkeepExtensions::default() };
    let (vmm, server) = session(Habits { extensions: Some(extensions), ..Habits::default() });
    let device = device(&vmm, &server);
    assert_eq!(vmm.shim.verdict(device, 2, 0, FaultAccess::READ), None);
    assert!(vmm.shim.system.pages.lock().unwrap().is_empty());
    assert!(commands_until(&server, 8).iter().all(|header| header.command < 0x8000));
}

#[test]
fn a_server_that_does_not_introduce_itself_serves_the_vmm_as_before() {
    let habits = Habits { ignores: vec![Command::GetRegionInfo], ..Habits::default() };
    let (vmm, server) = session(habits);
    assert_eq!(bar_file(&vmm, &server, BAR_START), None);
    assert_eq!(vmm.shim.status.get(Count::FailOpens), 1);
}

#[test]
fn a_closed_connection_is_let_go() {
    let (vmm, server) = session(Habits::default());
    device(&vmm, &server);
    vmm.shim.stream_closed(0);
    vmm.shim.descriptors.clear(vmm.fd);
    assert!(!vmm.shim.has_user_bar_files());
    assert_eq!(bar_file(&vmm, &server, BAR_START), None);
    assert_eq!(vmm.shim.user_decode(0, 2), Decode::Unknown);
    drop(vmm);
    // Its last descriptor is gone: the server hears the end.
    assert_eq!(server.commands.iter().last().unwrap().0.id.0, 8);
}

#[test]
fn a_forked_child_leaves_connections_alone() {
    let (vmm, server) = session(Habits::default());
    let device = device(&vmm, &server);
    vmm.shim.streams.forked(&vmm.shim.system);
    let mut data = [0; 4];
    vmm.shim.complete(device, 2, 8, &mut data, false);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 0);
    assert_eq!(vmm.send(&message(9, GET_INFO, ASK, &[0; 16])), Ok(32));
    assert_eq!(vmm.message(), message(9, GET_INFO, YES, &[]));
    // What it has mapped is still a BAR, and the page is still there.
    assert_eq!(vmm.shim.user_decode(0, 2), Decode::Off);
    assert_eq!(bar_file(&vmm, &server, BAR_START).map(|(_, bar, _)| bar), Some(2));
    vmm.shim.stream_closed(0);
    assert_eq!(vmm.shim.user_decode(0, 2), Decode::Off);
}

#[test]
fn a_connection_that_is_closed_while_it_is_introduced_leaves_nothing_behind() {
    let (vmm, server) = session(Habits::default());
    let place = vmm.shim.streams.place(0).unwrap();
    let connection = vmm.shim.streams.connection(0).unwrap();
    assert!(place.begin_introduction(&connection));
    vmm.shim.stream_closed(0);
    // Another connection may not be here yet.
    assert!(place.taken.load(Ordering::SeqCst));
    vmm.shim.introduced(0, &connection, &Facts::default());
    assert!(place.end_introduction());
    assert!(!place.begin_introduction(&connection));
    drop(server);
}

/// As the child is that a VMM becomes a daemon in.
#[test]
fn a_forked_child_has_connections_of_its_own() {
    let (vmm, server) = session_after(Habits::default(), |vmm| {
        let streams = &vmm.shim.streams;
        // Another thread of the parent has it for ever.
        std::mem::forget(streams.place(0).unwrap().files());
        std::mem::forget(streams.place(1).unwrap().connection());
        streams.forked(&vmm.shim.system);
    });
    let device = device(&vmm, &server);
    assert_eq!(vmm.shim.source(device), Some(Source::VfioUser(2)));
    vmm.shim.complete(device, 2, 8, &mut [0; 4], false);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 1);
    vmm.shim.stream_closed(2);
    assert_eq!(bar_file(&vmm, &server, BAR_START), None);
}

#[test]
fn a_vmm_that_answers_to_unseen_commands_is_not_asked_for_more() {
    let (vmm, mut server) = session(Habits::default());
    let device = device(&vmm, &server);
    server.socket.write_all(&message(77, GET_INFO, YES, &[])).unwrap();
    assert_eq!(vmm.message(), message(77, GET_INFO, YES, &[]));
    vmm.shim.complete(device, 2, 0, &mut [0; 4], false);
    assert_eq!(vmm.shim.status.get(Count::Forwarded), 0);
    assert_eq!(vmm.shim.status.get(Count::FailOpens), 1);
}

#[test]
fn descriptors_of_the_vmm_travel_both_ways() {
    let (vmm, mut server) = session(Habits::default());
    let ask = message(9, Command::DmaMap.code(), ASK, &[0; 32]);
    assert_eq!(vmm.send_message(&ask, CONTROL), Ok(ask.len()));
    assert_eq!(vmm.message(), message(9, Command::DmaMap.code(), YES, &[]));
    let fd = server.bar.try_clone().unwrap();
    let reply = message(1, Command::DmaRead.code(), ASK, &[0; 16]);
    super::server::send(&mut server.socket, &reply, Some(fd));
    assert_eq!(vmm.message(), reply);
    assert_eq!(vmm.shim.system.received.lock().unwrap().len(), 1);
}
