//! A client that says and hands over what it likes, and a real session with a real function.
//!
//! Every command that wants a reply gets exactly one, in order and of a sane length, as long as the
//! session lives; the server's own commands come in between, about memory that the client announced
//! and no other. The session ends only for a reason that is in the bytes. A function that moves reads
//! as before. No descriptor stays behind.
#![no_main]

mod client;
mod descriptors;
mod expected;
mod message;
mod migration;

use barkeep_backend::devices::Registry;
use barkeep_backend::server::{HostedFunction, ServedFunction};
use barkeep_fuzz::Input;
use barkeep_fuzz::script::{ANSWERS, DEVICE, GREETED, LIKE_QEMU, Step, WITH_TWIN, What};
use libfuzzer_sys::fuzz_target;

use self::client::Client;
use self::descriptors::Descriptors;
use self::expected::Socket;
use self::message::{message, version};
use self::migration::migrate;

const DEVICES: [&str; 4] = [
    "edu",
    "ivshmem,size=64K",
    "ivshmem,size=64K,vectors=4",
    "edu,dma_mask=0xffffffffffffffff,decode=always",
];

/// Each takes the time of many messages.
const MAX_MIGRATIONS: u32 = 4;

fuzz_target!(|bytes: &[u8]| {
    let descriptors = Descriptors::get();
    let before = descriptors::open();
    run(Input::new(bytes), descriptors);
    descriptors.restore();
    assert_eq!(descriptors::open(), before, "descriptors stay behind");
});

fn run(mut input: Input<'_>, descriptors: &Descriptors) {
    let kind = input.u8();
    let mut function = function(kind);
    let mut client = Client::new(&function, kind & ANSWERS != 0);
    if kind & GREETED != 0 {
        let version = version(kind & WITH_TWIN != 0, kind & LIKE_QEMU != 0);
        client.send(Socket::Main, &version, &[], &mut function);
    }
    let (mut id, mut migrations) = (0, 0);
    while client.settle(&mut function).is_continue()
        && let Some(step) = Step::take(&mut input)
    {
        match step {
            Step::Send { twin, fds, what } => {
                let fds: Vec<_> = fds.iter().map(|kind| descriptors.of_kind(*kind)).collect();
                let socket = if twin && client.has_twin() { Socket::Twin } else { Socket::Main };
                match what {
                    What::Message { command, flags, length, body } => {
                        id += 1;
                        let message = message(id, command, flags, length, body);
                        client.send(socket, &message, &fds, &mut function);
                    }
                    What::Raw(bytes) => client.send(socket, bytes, &fds, &mut function),
                }
            }
            Step::Answer { how, byte } => {
                let fd = descriptors.of_kind(byte);
                let _ = client.answer(how, byte, Some(fd), &mut function);
            }
            Step::Migrate { at, flip } if migrations < MAX_MIGRATIONS => {
                migrate(&mut client, at, flip, &mut function);
                migrations += 1;
            }
            Step::Migrate { .. } => {}
            Step::Truncate { pages } => descriptors.truncate(pages),
            Step::HangUp => client.hang_up(),
        }
    }
    client.leave(&mut function);
    // The next client of the same function is served.
    let mut next = Client::new(&function, false);
    next.send(Socket::Main, &version(false, false), &[], &mut function);
    assert!(next.settle(&mut function).is_continue());
    next.leave(&mut function);
}

fn function(kind: u8) -> ServedFunction {
    let name = DEVICES[usize::from(kind & DEVICE) % DEVICES.len()];
    let spec = name.parse().expect("a device specification");
    let (device, options) = Registry::default().create(spec).expect("a device");
    let function = HostedFunction::with_options(name, device, options);
    function.expect("a function that can exist").into()
}
