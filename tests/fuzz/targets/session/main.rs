//! A client that says and hands over what it likes, and a real session with a real function.
//!
//! Every command that wants a reply gets exactly one, in order and of a sane length, as long as the
//! session lives; it ends only for a reason that is in the bytes; no descriptor stays behind.
#![no_main]

mod client;
mod descriptors;
mod expected;

use barkeep_backend::devices;
use barkeep_backend::server::fuzzing::Connection;
use barkeep_backend::server::{HostedFunction, ServedFunction};
use barkeep_fuzz::Input;
use barkeep_fuzz::script::{GREETED, Step, What};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use self::client::Client;
use self::descriptors::Descriptors;
use self::expected::{message, version};

const DEVICES: [&str; 2] = ["edu", "ivshmem,size=64K"];

fuzz_target!(|bytes: &[u8]| {
    let descriptors = Descriptors::get();
    let before = descriptors::open();
    run(Input::new(bytes), descriptors);
    assert_eq!(descriptors::open(), before, "descriptors stay behind");
});

fn run(mut input: Input<'_>, descriptors: &Descriptors) {
    let kind = input.u8();
    let mut function = function(kind);
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    let mut client = Client::new(ours, Connection::new(theirs));
    if kind & GREETED != 0 {
        client.send(&version(), &[], &mut function);
    }
    let mut id = 0;
    while let Some(Step { fds, what }) = Step::take(&mut input) {
        let fds: Vec<_> = fds.iter().map(|kind| descriptors.of_kind(*kind)).collect();
        match what {
            What::Message { command, flags, length, body } => {
                id += 1;
                client.send(&message(id, command, flags, length, body), &fds, &mut function);
            }
            What::Raw(bytes) => client.send(bytes, &fds, &mut function),
        }
        if client.settle(&mut function).is_break() {
            break;
        }
    }
    client.leave(&mut function);
    // The next client of the same function is served.
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    let mut next = Client::new(ours, Connection::new(theirs));
    next.send(&version(), &[], &mut function);
    assert!(next.settle(&mut function).is_continue());
    next.leave(&mut function);
}

fn function(kind: u8) -> ServedFunction {
    let spec = DEVICES[usize::from(kind & !GREETED) % DEVICES.len()];
    let device = devices::create(spec.parse().expect("a device specification")).expect("a device");
    HostedFunction::new(spec, device).expect("a function that can exist").into()
}
