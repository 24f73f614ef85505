//! Where client and server run, and how they wait.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// One way to run a client and a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) name: &'static str,
    client: usize,
    pub(crate) server: usize,
    /// Whether both sides ask again and again rather than wait in the kernel.
    pub(crate) polls: bool,
}

/// The worlds that this machine has processors for.
pub(crate) fn available() -> Vec<World> {
    let allowed = sched_getaffinity(None).unwrap();
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let client = cpus.next().unwrap();
    let mut worlds = vec![World { name: "one core", client, server: client, polls: false }];
    match cpus.next() {
        Some(server) => worlds.extend([
            World { name: "two cores, blocking", client, server, polls: false },
            World { name: "two cores, polling", client, server, polls: true },
        ]),
        None => println!("one processor: the worlds of two are left out"),
    }
    worlds
}

impl World {
    /// Pins this thread to the client's processor.
    pub(crate) fn enter(&self) {
        pin(self.client);
    }
}

/// Pins this thread, and what it starts from now on.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).unwrap();
}
