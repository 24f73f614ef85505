//! `barkeep run` under a service manager: what it says, and what comes back when it is started anew.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use barkeep_tests::edu::{self, at};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::irq;
use barkeep_tests::service_manager::{Service, ServiceManager};
use barkeep_tests::{binary, memory};
use rustix::process::Signal;

use crate::process::socket;

const MEMORY: u64 = 0x10_0000;
const PAGE: u64 = 4096;

/// `barkeep run` with functions on sockets.
pub(crate) fn run(functions: &[(&Path, &str)]) -> Vec<String> {
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(crate::process::arguments(functions));
    arguments
}

fn start(manager: &ServiceManager, functions: &[(&Path, &str)]) -> Service {
    let mut service = manager.start(binary::barkeep(), &run(functions));
    manager.wait_for("READY=1");
    for (path, spec) in functions {
        assert_eq!(service.line(), format!("serving {spec} on {}\n", path.display()));
    }
    service
}

/// A client of an edu that has set up everything, with its memory and interrupt.
pub(crate) struct Client {
    pub(crate) peer: Peer,
    memory: std::fs::File,
    interrupt: EventCounter,
    turn: u32,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let mut peer = Peer::greeted(path);
        edu::enable(&mut peer);
        let memory = memory::sealed(PAGE);
        peer.map(3, MEMORY, PAGE, std::os::fd::AsFd::as_fd(&memory));
        let interrupt = EventCounter::new();
        peer.set_eventfd(irq::INTX, 0, std::os::fd::AsFd::as_fd(&interrupt));
        peer.write_u32(0, at::LIVENESS, 0x1000);
        Self { peer, memory, interrupt, turn: 0x1000 }
    }

    /// Registers, memory and interrupts are as they were, and go on.
    pub(crate) fn check(&mut self) {
        assert_eq!(self.peer.read_u32(0, at::LIVENESS), !self.turn, "a register of the device");
        self.turn += 1;
        self.peer.write_u32(0, at::LIVENESS, self.turn);
        let text = self.turn.to_le_bytes();
        rustix::io::pwrite(&self.memory, &text, 16).expect("memory");
        edu::copy(&mut self.peer, MEMORY + 16, MEMORY + 64, 4);
        assert_eq!(memory::bytes_at(&self.memory, 64, 4), text, "the client's memory");
        let _ = self.interrupt.take();
        edu::raise(&mut self.peer);
        assert!(self.interrupt.take() > 0, "the client's interrupt");
        edu::acknowledge(&mut self.peer);
        let flags = irq::DATA_NONE | irq::ACTION_UNMASK;
        let _ = self.peer.set_irqs(flags, irq::INTX, 0, 1).success();
    }
}

#[test]
fn readiness_is_told_when_clients_can_connect() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let service = start(&manager, &[(&path, "edu")]);
    drop(Peer::greeted(&path));
    service.signal(Signal::HUP);
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
    service.signal(Signal::TERM);
    manager.wait_for("STOPPING=1");
}

#[test]
fn the_watchdog_hears_that_the_event_loop_lives() {
    let (_directory, path) = socket();
    let mut manager = ServiceManager::new();
    manager.set_watchdog(Duration::from_millis(50));
    let service = start(&manager, &[(&path, "edu")]);
    manager.wait_for("WATCHDOG=1");
    manager.wait_for("WATCHDOG=1");
    // What is on its way when it stops comes still, and then no more.
    service.signal(Signal::STOP);
    rustix::process::waitpid(Some(service.pid()), rustix::process::WaitOptions::UNTRACED)
        .expect("our child");
    let manager_heard = || manager.said().iter().filter(|said| *said == "WATCHDOG=1").count();
    let mut before = manager_heard();
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(200));
        let now = manager_heard();
        if now == before {
            return;
        }
        before = now;
    }
    unreachable!("a stopped event loop is not alive");
}

#[test]
fn everything_is_held_as_it_comes_and_forgotten_as_it_goes() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let _service = start(&manager, &[(&path, "edu,id=a:b")]);
    let always = ["a%3ab/listener", "a%3ab/state"];
    manager.wait_until_held(&always);
    let mut client = Client::connect(&path);
    client.check();
    let held = manager.held();
    assert!(held.contains(&"a%3ab/client".to_owned()), "{held:?}");
    assert!(held.len() >= 5, "the memory and the interrupt as well: {held:?}");
    drop(client);
    manager.wait_until_held(&always);
}

#[test]
fn a_client_does_not_notice_that_all_processes_of_the_service_are_killed() {
    let (_directory, path) = socket();
    let (_other_directory, other) = socket();
    let functions: [(&Path, &str); 2] = [(&path, "edu"), (&other, "edu,id=other")];
    let manager = ServiceManager::new();
    let mut service = start(&manager, &functions);
    let (mut one, mut two) = (Client::connect(&path), Client::connect(&other));
    for _ in 0..3 {
        one.check();
        two.check();
        service.kill();
        service = start(&manager, &functions);
    }
    one.check();
    two.check();
    drop(one);
    edu::assert_served(&path);
}

#[test]
fn a_client_does_not_notice_an_orderly_restart() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let mut service = start(&manager, &[(&path, "edu")]);
    let mut client = Client::connect(&path);
    for _ in 0..3 {
        client.check();
        service.signal(Signal::TERM);
        assert_eq!(service.wait(), Some(0));
        assert!(path.exists(), "the next one serves it");
        service = start(&manager, &[(&path, "edu")]);
    }
    client.check();
}

#[test]
fn clients_that_connect_while_nobody_serves_are_served_later() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    start(&manager, &[(&path, "edu")]).kill();
    let mut waiting = Peer::connect(&path);
    let _service = start(&manager, &[(&path, "edu")]);
    waiting.greet();
}

#[test]
fn a_client_is_gone_when_the_service_is_stopped_for_good() {
    let (_directory, path) = socket();
    let manager = ServiceManager::new();
    let mut service = start(&manager, &[(&path, "edu")]);
    let mut client = Client::connect(&path);
    service.signal(Signal::TERM);
    assert_eq!(service.wait(), Some(0));
    manager.release();
    client.peer.expect_closed();
    let _service = start(&manager, &[(&path, "edu")]);
    edu::assert_served(&path);
}

#[test]
fn a_function_that_is_not_there_any_more_is_forgotten() {
    let (_directory, path) = socket();
    let (_other_directory, other) = socket();
    let manager = ServiceManager::new();
    let functions: [(&Path, &str); 2] = [(&path, "edu,id=a"), (&other, "edu,id=b")];
    let service = start(&manager, &functions);
    let mut client = Client::connect(&path);
    let mut gone = Client::connect(&other);
    service.kill();
    let _service = start(&manager, &functions[..1]);
    gone.peer.expect_closed();
    client.check();
    drop(client);
    manager.wait_until_held(&["a/listener", "a/state"]);
}

#[test]
fn a_socket_of_the_service_managers_is_served_by_the_function_of_its_name() {
    let (_directory, path) = socket();
    let (_other_directory, other) = socket();
    let mut manager = ServiceManager::new();
    manager.open("b", UnixListener::bind(&other).expect("a fresh path"));
    // The path of the second is that of the socket, whatever the command line says.
    let unused = path.with_file_name("unused.sock");
    let arguments = run(&[(&path, "edu,id=a"), (&unused, "edu,id=b")]);
    let mut waiting = Peer::connect(&other);
    let mut service = manager.start(binary::barkeep(), &arguments);
    manager.wait_for("READY=1");
    waiting.greet();
    drop(waiting);
    manager.wait_until_held(&["a/listener", "a/state", "b/state"]);
    let mut client = Client::connect(&other);
    client.check();
    service.signal(Signal::TERM);
    assert_eq!(service.wait(), Some(0));
    assert!(other.exists(), "it is not ours to remove");
    let _service = manager.start(binary::barkeep(), &arguments);
    manager.wait_for("READY=1");
    client.check();
    assert!(!unused.exists());
}

#[test]
fn workers_know_nothing_of_the_service_manager() {
    let (_directory, path) = socket();
    let mut manager = ServiceManager::new();
    manager.set_watchdog(Duration::from_secs(10));
    start(&manager, &[(&path, "edu")]).kill();
    let service = start(&manager, &[(&path, "edu")]);
    let workers = service.workers();
    assert!(!workers.is_empty());
    for worker in workers {
        let environment = std::fs::read(format!("/proc/{worker}/environ")).expect("our child's");
        let environment = String::from_utf8_lossy(&environment);
        for variable in ["NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_"] {
            assert!(!environment.contains(variable), "{environment}");
        }
    }
}
