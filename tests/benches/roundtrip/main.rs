//! What one register access costs over the socket: the raw socket, barkeep's server, and the server of
//! the crate `vfio_user`, in processes of their own, pinned and in turns. docs/performance.md explains
//! the figures.
//!
//!     cargo bench -p barkeep-tests --bench roundtrip [-- --quick]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark that fails has no result")]
#![expect(clippy::print_stdout, reason = "it prints its tables")]

mod clients;
mod many;
mod servers;
mod stats;
mod worlds;

use self::clients::{Access, Measured, Raw, Shim, Their};
use self::servers::{Kind, Served};
use self::stats::{Rounds, Row};
use self::worlds::World;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    rounds: usize,
    accesses: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == servers::START) {
        servers::start(&arguments[1..]);
        return;
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let effort = if quick {
        Effort { rounds: 6, accesses: 500 }
    } else {
        Effort { rounds: 20, accesses: 5000 }
    };
    barkeep_tests::binary::build_for_benchmark();
    let Effort { rounds, accesses } = effort;
    println!("{rounds} rounds in turns, {accesses} accesses each; times in microseconds");
    let worlds = worlds::available();
    println!("\n### Servers, under the same raw client\n");
    println!("| world | access | server | p50 | p99 | p50 / raw socket |");
    println!("|---|---|---|---|---|---|");
    for world in &worlds {
        servers(world, effort);
    }
    println!("\n### Clients, on `barkeep serve`\n");
    println!("| world | access | client | p50 | p99 | p50 / raw client |");
    println!("|---|---|---|---|---|---|");
    for world in &worlds {
        clients(world, effort);
    }
    println!("\n### One busy function of many, blocking\n");
    println!("| world | access | functions in the process | p50 | p99 | p50 / alone |");
    println!("|---|---|---|---|---|---|");
    for world in worlds.iter().filter(|world| !world.polls) {
        many::measure(world, effort);
    }
}

fn servers(world: &World, effort: Effort) {
    let kinds = [Kind::Floor, Kind::Barkeep { functions: 1 }, Kind::Theirs];
    let served: Vec<Served> = kinds.iter().map(|kind| Served::start(*kind, world)).collect();
    let mut measured: Vec<(String, Box<dyn Measured>)> = served
        .iter()
        .map(|served| {
            let raw = Raw::connect(served, 0, world.polls);
            (served.name(world), Box::new(raw) as Box<dyn Measured>)
        })
        .collect();
    tabulate(world, effort, &mut measured);
}

fn clients(world: &World, effort: Effort) {
    let served = Served::start(Kind::Barkeep { functions: 3 }, world);
    let remark = if world.polls { ", blocking" } else { "" };
    let mut measured: Vec<(String, Box<dyn Measured>)> = vec![
        ("raw".into(), Box::new(Raw::connect(&served, 0, world.polls))),
        (format!("barkeep-shim{remark}"), Box::new(Shim::connect(&served, 1))),
        (format!("crate vfio_user{remark}"), Box::new(Their::connect(&served, 2))),
    ];
    tabulate(world, effort, &mut measured);
}

/// Measures all of `measured` in turns and prints a row for each; the first one is what the others
/// are compared with.
fn tabulate(world: &World, effort: Effort, measured: &mut [(String, Box<dyn Measured>)]) {
    world.enter();
    for access in [Access::Read, Access::Write] {
        let mut rounds: Vec<Rounds> = measured.iter().map(|_| Rounds::default()).collect();
        for round in 0..effort.rounds {
            // Who comes first changes, so that what drifts hits all of them.
            for turn in 0..measured.len() {
                let index = (round + turn) % measured.len();
                rounds[index].add(stats::round(
                    measured[index].1.as_mut(),
                    access,
                    effort.accesses,
                ));
            }
        }
        for (index, (name, _)) in measured.iter().enumerate() {
            let Row { p50, p99, ratio } = rounds[index].against(&rounds[0]);
            let world = world.name;
            println!("| {world} | {access} | {name} | {p50:.2} | {p99:.2} | {ratio:.2} |");
        }
    }
}
