//! The programs against a tiny machine, on every hypervisor that this computer has.

mod board;

use std::sync::Arc;

use self::board::{
    Board, Bug, CELL_BAR, CELL_BDF, CELL_SLOT, ECAM, EDU_BAR, EDU_BDF, OFF, ON, number,
};
use super::*;
use crate::hypervisor::Vm;
use crate::hypervisor::kvm::Kvm;
use crate::hypervisor::model::Model;

/// Runs a test on every hypervisor that works here.
fn on_every_hypervisor(test: impl Fn(Arc<dyn Vm>)) {
    test(Arc::new(Model::new()));
    match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => test(Arc::new(kvm)),
        Err(reason) => println!("kvm skipped: {reason}"),
    }
}

#[test]
fn toggle_sees_every_state_of_both_functions() {
    on_every_hypervisor(|vm| {
        let board = Board::new(vm, 50, Bug::None);
        board.run(&[Program::Toggle]);
        assert_eq!(
            board.stats(0),
            StatBlock {
                state: RunState::Finished,
                progress: 50,
                reads: 50 * (4 + 3),
                reads_ur: 50 * 2,
                narrow_reads: 0,
                trapped_writes: 50 * 2,
                mapped_writes: 50 * 2,
                recoveries: 0,
                wrong: 0,
                first_wrong: None,
            }
        );
        assert_eq!(board.exit_code(), Some(0));
    });
}

#[test]
fn hammers_see_only_legal_values_while_decode_toggles() {
    on_every_hypervisor(|vm| {
        let kind = vm.kind();
        let board = Board::new(vm, 200, Bug::None);
        board.run(&[Program::Toggle, Program::Hammer, Program::Hammer]);
        for vcpu in 0..3 {
            let stats = board.stats(vcpu);
            println!("{kind} vCPU {vcpu}: {stats:?}");
            assert_eq!(stats.first_wrong, None, "{kind} vCPU {vcpu}");
            assert_eq!(stats.state, RunState::Finished, "{kind} vCPU {vcpu}");
        }
        assert_eq!(board.stats(0).progress, 200);
        assert_eq!(board.exit_code(), Some(0));
    });
}

#[test]
fn hammer_halts_when_asked_to_stop_before_it_starts() {
    on_every_hypervisor(|vm| {
        let board = Board::new(vm, 0, Bug::None);
        request_stop(&board.ram).unwrap();
        board.run(&[Program::Hammer]);
        assert_eq!(board.stats(0).state, RunState::Finished);
        assert_eq!(board.stats(0).reads, 0);
    });
}

#[test]
fn toggle_catches_functions_that_misbehave() {
    for (bug, address) in [
        (Bug::EduIgnoresDecode, EDU_BAR + 0x80),
        (Bug::ZeroForUr, CELL_BAR),
        (Bug::PoisonArrives, CELL_BAR),
    ] {
        let board = Board::new(Arc::new(Model::new()), 3, bug);
        board.run(&[Program::Toggle]);
        let stats = board.stats(0);
        let first = stats.first_wrong.expect("caught");
        assert_eq!(first.address, GuestAddress(address), "{bug:?}");
        assert_ne!(first.value, first.expected, "{bug:?}");
        assert!(stats.wrong >= 3, "{bug:?}: each cycle, {}", stats.wrong);
        assert_eq!(board.exit_code(), Some(1), "{bug:?}");
    }
}

#[test]
fn hammer_catches_functions_that_misbehave() {
    let rows = [
        (Bug::None, None),
        (Bug::WrongIdentification, Some(EDU_BAR)),
        (Bug::AnswersNarrow, Some(EDU_BAR)),
        (Bug::NotInverted, Some(EDU_BAR + 0x04)),
        (Bug::HalfWrites, Some(EDU_BAR + 0x88)),
    ];
    for (bug, address) in rows {
        let mut board = Board::new(Arc::new(Model::new()), 0, bug);
        board.stop_at = Some(100);
        board.run(&[Program::Hammer]);
        let stats = board.stats(0);
        let first = stats.first_wrong.map(|wrong| wrong.address.0);
        assert_eq!(first, address, "{bug:?}: {stats:?}");
    }
}

#[test]
fn hammer_knows_what_its_cell_held() {
    // It has seen a value, its next write is dropped, and then the cell is back to zero.
    let mut board = Board::new(Arc::new(Model::new()), 0, Bug::ZeroForUr);
    board.ram.store_u64(layout::HAMMER_MEMORY + 16, 0xc300_0000_0000_013c).unwrap();
    board.stop_at = Some(100);
    board.state.lock().unwrap().decode.insert(CELL_BDF, false);
    board.vm.unmap_slot(CELL_SLOT).unwrap();
    board.run(&[Program::Hammer]);
    let first = board.stats(0).first_wrong.expect("caught");
    assert_eq!(first.address, GuestAddress(CELL_BAR));
    assert_eq!((first.value, first.expected), (0, 0xc300_0000_0000_013c));
}

#[test]
fn every_row_of_the_device_table_is_worked_on() {
    on_every_hypervisor(|vm| {
        let board = Board::with_rows(vm, 5, Bug::None, 3);
        board.run(&[Program::Toggle, Program::Hammer]);
        for vcpu in 0..2 {
            assert_eq!(board.stats(vcpu).first_wrong, None, "vCPU {vcpu}");
        }
        assert_eq!((board.stats(0).progress, board.stats(0).reads), (5, 5 * 3 * 7));
    });
    on_every_hypervisor(|vm| {
        let board = Board::with_rows(vm, 0, Bug::None, 3);
        board.run(&[Program::Edu]);
        for row in 0..3 {
            assert!(EduReport::read(&board.ram, row).unwrap().passed(), "row {row}");
        }
        assert!(!EduReport::read(&board.ram, 3).unwrap().completed);
    });
}

#[test]
fn probe_finds_the_same_functions_both_ways() {
    on_every_hypervisor(|vm| {
        let board = Board::new(vm, 0, Bug::None);
        board.run(&[Program::Probe]);
        let found = |bdf, vendor, device| FoundFunction { bdf, vendor, device };
        assert_eq!(
            ProbeReport::read(&board.ram, 0).unwrap(),
            ProbeReport {
                functions: vec![
                    found(0, 0x1b36, 0x0d57),
                    found(EDU_BDF, 0x1234, 0x11e8),
                    found(CELL_BDF, 0x1af4, 0x1110),
                ],
                mismatches: 0,
                first_mismatch: None,
            }
        );
        assert_eq!(board.exit_code(), Some(0));
    });
}

#[test]
fn probe_reports_an_ecam_that_differs() {
    let board = Board::new(Arc::new(Model::new()), 0, Bug::EcamLies);
    board.run(&[Program::Probe]);
    let report = ProbeReport::read(&board.ram, 0).unwrap();
    assert_eq!(report.mismatches, 1);
    assert_eq!(
        report.first_mismatch,
        Some(WrongValue {
            address: GuestAddress(ECAM + (u64::from(CELL_BDF) << 12)),
            value: 0x1110_1af5,
            expected: 0x1110_1af4,
        })
    );
    assert_eq!(board.exit_code(), Some(1));
}

#[test]
fn edu_counts_and_copies() {
    on_every_hypervisor(|vm| {
        let board = Board::new(vm, 0, Bug::None);
        board.run(&[Program::Edu]);
        let report = EduReport::read(&board.ram, 0).unwrap();
        assert!(report.passed(), "{report:?}");
        assert_eq!(board.exit_code(), Some(0));

        let mut pattern = [0; 8];
        let copy = DMA_BUFFER.0 + 4096;
        board.ram.read(copy + 8 * 511, &mut pattern).unwrap();
        assert_eq!(number(&pattern), 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(513));
    });
}

#[test]
fn edu_reports_what_failed() {
    let run = |bug| {
        let board = Board::new(Arc::new(Model::new()), 0, bug);
        board.run(&[Program::Edu]);
        assert_eq!(board.exit_code(), Some(1), "{bug:?}");
        EduReport::read(&board.ram, 0).unwrap()
    };
    let corrupt = run(Bug::DmaCorrupts);
    assert_eq!((corrupt.completed, corrupt.dma_mismatches), (true, 1));
    assert!(!corrupt.passed());
    let hung = run(Bug::Hangs);
    assert_eq!((hung.completed, hung.timed_out), (false, true));
}

#[test]
fn what_does_not_fit_the_layout_is_refused() {
    let device = Device {
        trapped: ConfigAddress::from_bdf(0),
        trapped_bar: GuestAddress(0),
        narrow: true,
        mapped: ConfigAddress::from_bdf(0),
        mapped_bar: GuestAddress(0),
    };
    let mut parameters = Parameters {
        cycles: 0,
        command_on: ON,
        command_off: OFF,
        ecam: GuestAddress(ECAM),
        poll_limit: 0,
        resets: false,
        devices: vec![device; MAX_DEVICES + 1],
    };
    let ram = HostMapping::anonymous(RAM_SIZE).unwrap();
    assert!(matches!(parameters.install(&ram), Err(GuestError::TooManyDevices { devices: 65 })));
    parameters.devices.pop();
    parameters.install(&ram).unwrap();

    let small = HostMapping::anonymous(0x1000).unwrap();
    assert!(matches!(parameters.install(&small), Err(GuestError::Ram(_))));
    assert!(matches!(Program::Edu.load(&small), Err(GuestError::Ram(_))));
    assert!(matches!(Program::Hammer.entry(64), Err(GuestError::TooManyVcpus { vcpu: 64 })));
    assert!(matches!(StatBlock::read(&ram, 64), Err(GuestError::TooManyVcpus { vcpu: 64 })));
}

#[test]
fn programs_fit_their_place() {
    for program in [Program::Toggle, Program::Hammer, Program::Probe, Program::Edu] {
        let code = program.assemble().unwrap();
        assert!(code.len() < 0x1_0000, "{program:?}: {} bytes", code.len());
    }
}
