//! What a process costs that nobody needs.

use std::time::{Duration, Instant};

use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::pci;

use crate::process::{Sidecar, socket};

/// One that goes on polling for this long does so for ever.
const DEADLINE: Duration = Duration::from_secs(10);

/// `epoll_wait` and `epoll_pwait` on x86-64.
const WAITS: [&str; 2] = ["232", "281"];

/// Whether a line of /proc/PID/syscall tells of a wait for events without a timeout.
fn sleeps(call: &str) -> bool {
    let mut fields = call.split_whitespace();
    let number = fields.next().unwrap_or_default();
    let timeout = fields.nth(3).unwrap_or_default();
    WAITS.contains(&number) && timeout.ends_with("ffffffff")
}

#[test]
fn a_process_that_polls_sleeps_when_its_clients_have_nothing_to_ask() {
    let (_directory, path) = socket();
    let sidecar =
        Sidecar::start_with(&[(&path, "edu")], &["--poll", "200"], std::process::Stdio::piped());
    if sidecar.system_call().is_none() {
        return barkeep_tests::skip(&"the kernel does not tell what a process waits for");
    }
    let mut client = Peer::greeted(&path);
    edu::enable(&mut client);
    for _ in 0..10_000 {
        client.config_u16(pci::COMMAND);
    }
    let asked = Instant::now();
    while !sidecar.system_call().is_some_and(|call| sleeps(&call)) {
        assert!(asked.elapsed() < DEADLINE, "still awake: {:?}", sidecar.system_call());
        std::thread::yield_now();
    }
    // It is there all the same.
    assert_eq!(client.config_u16(pci::COMMAND), 0b110);
}
