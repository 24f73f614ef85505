//! Requests of a disk in a second: `barkeep serve` over vfio-user and over vhost-user, QEMU's storage
//! daemon over vhost-user, and the same requests by reads and writes of this process without any of them, on the same image, in
//! processes of their own, pinned and in turns. docs/performance.md explains the figures.
//!
//!     cargo bench -p barkeep-tests --bench virtio_blk [-- --quick]
//!
//! QEMU's storage daemon is what `BARKEEP_STORAGE_DAEMON` says, or left out.
#![expect(clippy::unwrap_used, reason = "a benchmark that fails has no result")]
#![expect(clippy::print_stdout, reason = "it prints its tables")]

mod image;
mod servers;
mod subjects;

use std::time::Instant;

use self::image::Image;
use self::servers::Server;
use self::subjects::{Floor, Subject, VfioUser, VhostUser};

/// What is asked for: 4 KiB each, at random places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    rounds: usize,
    requests: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let effort = if quick {
        Effort { rounds: 5, requests: 4_000 }
    } else {
        Effort { rounds: 15, requests: 40_000 }
    };
    barkeep_tests::binary::build_for_benchmark();
    let image = Image::create();
    let servers = [
        Some(Server::barkeep(&image, "vfio-user")),
        Some(Server::barkeep(&image, "vhost-user")),
        Server::storage_daemon(&image),
    ];
    let mut subjects: Vec<(&str, Box<dyn Subject>)> =
        vec![("pread and pwrite, no server", Box::new(Floor::new(&image)))];
    let [vfio, vhost, daemon] = &servers;
    if let Some(server) = vfio {
        subjects.push(("barkeep, vfio-user", Box::new(VfioUser::connect(server))));
    }
    if let Some(server) = vhost {
        subjects.push(("barkeep, vhost-user", Box::new(VhostUser::connect(server))));
    }
    match daemon {
        Some(server) => {
            subjects
                .push(("qemu-storage-daemon, vhost-user", Box::new(VhostUser::connect(server))));
        }
        None => println!("BARKEEP_STORAGE_DAEMON is not set: qemu-storage-daemon is left out"),
    }
    servers::pin_client();
    let Effort { rounds, requests } = effort;
    println!("{rounds} rounds in turns, {requests} requests of 4 KiB each, from the page cache\n");
    println!("| requests | depth | server | thousands a second | time / no server |");
    println!("|---|---|---|---|---|");
    for kind in [Kind::Read, Kind::Write] {
        for depth in [1, 32] {
            tabulate(&mut subjects, kind, depth, effort);
        }
    }
}

/// One line a subject: the median of its rounds, and of its ratios to the first one round by round.
fn tabulate(subjects: &mut [(&str, Box<dyn Subject>)], kind: Kind, depth: usize, effort: Effort) {
    let mut times = vec![Vec::new(); subjects.len()];
    // The first round warms up.
    for round in 0..=effort.rounds {
        for (times, (_, subject)) in times.iter_mut().zip(&mut *subjects) {
            let start = Instant::now();
            subject.perform(kind, depth, effort.requests);
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let base = times[0].clone();
    for ((name, _), times) in subjects.iter().zip(&times) {
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let rate = effort.requests as f64 / median(times.iter().copied()) / 1e3;
        let ratio = median(times.iter().zip(&base).map(|(own, base)| own / base));
        println!("| {kind:?} | {depth} | {name} | {rate:.1} | {ratio:.2} |");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
