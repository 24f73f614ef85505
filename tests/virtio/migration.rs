//! A block device moves to another process under load.

use std::sync::Arc;

use barkeep_protocol::wire::MigrationState;
use barkeep_tests::virtio::{Function, Kicks, Load, Setup};

use crate::blk::{self, sidecar};
use crate::sidecar::drive;

const SIZE: u64 = 8 << 20;

fn save(function: &Function) -> Vec<u8> {
    const PART: u32 = 4096;
    function.client.set_migration_state(MigrationState::StopCopy).unwrap();
    let mut state = Vec::new();
    while function.client.migration_data_read(PART, &mut state).unwrap() == PART as usize {}
    state
}

/// The image has one owner at a time: the old process is gone when the new one starts.
#[test]
fn a_block_device_under_load_goes_on_in_another_process_without_a_loss() {
    for kicks in [Kicks::Eventfd, Kicks::Write] {
        let (mut sidecar, image) = sidecar(SIZE, ",queues=2");
        let setup = Setup { queues: 2, kicks, ..blk::setup() };
        let mut driver = drive(&sidecar, setup);
        let mut load = Load::new(SIZE, 512, 48);
        for _ in 0..6 {
            load.run(&mut driver, 300);
            load.fill(&mut driver);
            let state = save(&driver.function);
            sidecar = sidecar.killed_and_started_anew();
            let function = Arc::new(Function::connect(&sidecar.socket()));
            function.client.set_migration_state(MigrationState::Resuming).unwrap();
            for part in state.chunks(1000) {
                function.client.migration_data_write(part).unwrap();
            }
            driver.connect(&function);
            function.client.set_migration_state(MigrationState::Running).unwrap();
            driver.go_on_with(&function);
        }
        load.run(&mut driver, 1000);
        load.finish(&mut driver);
        assert_eq!(load.failed, 0);
        load.verify(&image);
    }
}
