//! A device of one's own: a counter that a guest reads, sets and watches overflow.
//!
//! ```text
//! cargo run --example own_device -- /tmp/counter.sock
//! qemu-system-x86_64 ... -device '{"driver":"vfio-user-pci","socket":{"path":"/tmp/counter.sock","type":"unix"}}'
//! ```
//!
//! BAR0, 4 KiB, 4-byte registers: 0x0 the counter, 0x4 add to it (write-only). INTA is asserted from
//! an overflow until the counter is written.

use std::os::unix::net::UnixStream;
use std::{error::Error, os::fd::AsFd, path::Path};

use barkeep_backend::devices::{Context, Device};
use barkeep_backend::pci::{
    BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids, InterruptPin,
};
use barkeep_backend::server::{HostedFunction, Server, SocketPath};

#[derive(Default)]
struct Counter {
    value: u32,
}

impl Device for Counter {
    fn spec(&self) -> FunctionSpec {
        let kind = BarKind::Memory32 { prefetchable: false };
        FunctionSpec {
            bars: vec![BarSpec { index: BarIndex::BAR0, kind, size: 4096 }],
            interrupt_pin: Some(InterruptPin::A),
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0xc0de,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 1,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    // `data` is all ones already: the answer to what this device does not define.
    fn bar_read(&mut self, _: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        if (offset, data.len()) == (0, 4) {
            data.copy_from_slice(&self.value.to_le_bytes());
        }
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>) {
        let Ok(data) = data.try_into().map(u32::from_le_bytes) else { return };
        let (value, overflow) = match offset {
            0 => (data, false),
            4 => self.value.overflowing_add(data),
            _ => return,
        };
        self.value = value;
        if overflow || offset == 0 {
            context.set_intx(overflow);
        }
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: own_device SOCKET")?;
    let mut server = Server::new()?;
    let function = HostedFunction::new("counter", Box::new(Counter::default()))?;
    server.add(SocketPath::claim(Path::new(&path))?, function)?;
    // Serves until the other end is closed or written to; here, until the process is ended.
    let (stop, _keep) = UnixStream::pair()?;
    Ok(server.run(stop.as_fd())?)
}
