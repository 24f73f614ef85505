//! What the loop is asked to do. What goes over the socket is tested in the `tests` crate.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::devices::{Context, Device};
use crate::pci::{BarIndex, ClassCode, FunctionSpec, Ids};

/// A device that tells of reloads and does nothing else.
struct Reloaded(std::sync::mpsc::Sender<()>);

impl Device for Reloaded {
    fn spec(&self) -> FunctionSpec {
        FunctionSpec::new(Ids {
            vendor: 1,
            device: 1,
            subsystem_vendor: 0,
            subsystem: 0,
            revision: 0,
            class: ClassCode { base: 0xff, sub: 0, interface: 0 },
        })
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, _: &mut [u8], _: &mut Context<'_>) {}

    fn bar_write(&mut self, _: BarIndex, _: u64, _: &[u8], _: &mut Context<'_>) {}

    fn reload(&mut self, _: &mut Context<'_>) -> Result<(), String> {
        self.0.send(()).map_err(|error| error.to_string())
    }

    fn reset(&mut self) {}
}

#[test]
fn every_function_reloads_as_often_as_it_is_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::new().unwrap();
    let told: Vec<_> = (0..2)
        .map(|index| {
            let (tell, told) = std::sync::mpsc::channel();
            let function = HostedFunction::new("test", Box::new(Reloaded(tell))).unwrap();
            let socket = SocketPath::claim(&directory.path().join(index.to_string())).unwrap();
            server.add(socket, function).unwrap();
            told
        })
        .collect();
    let (mut ask, asked) = UnixStream::pair().unwrap();
    server.set_reload(asked).unwrap();
    let (mut stop, stopped) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || server.run(stopped.as_fd()).unwrap());
    for _ in 0..3 {
        ask.write_all(&[0; 100]).unwrap();
        told.iter().for_each(|told| told.recv().unwrap());
    }
    // Nobody who could ask any more is no reason for anything.
    drop(ask);
    stop.write_all(&[0]).unwrap();
    thread.join().unwrap();
    assert!(told.iter().all(|told| told.try_recv().is_err()));
}
