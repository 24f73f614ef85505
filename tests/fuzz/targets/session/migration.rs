//! A function that moves, to itself.

use barkeep_backend::server::ServedFunction;

use super::client::Client;
use super::message::{DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE, REGION_READ};

/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE` with SET.
const SET_STATE: u32 = 2 | 1 << 17;
/// The same with GET.
const GET_STATE: u32 = 2 | 1 << 16;
const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
/// The most that one message carries.
const TRANSFER: u32 = 1 << 20;
/// Configuration space, of a function with PCI Express.
const CONFIG: u32 = 7;
const CONFIG_SIZE: u32 = 4096;

/// Stops the function, takes its state, puts it back with the byte at `at` changed by `flip`, and
/// lets it run. With no change it reads as before; a change that is noticed is an error, from which
/// nothing but a reset leads.
pub(crate) fn migrate(client: &mut Client, at: u16, flip: u8, function: &mut ServedFunction) {
    let Some(()) = set_state(client, STOP, function) else { return };
    let before = config(client, function);
    set_state(client, STOP_COPY, function).expect("it stands still");
    let mut state = Vec::new();
    loop {
        let asked = words(&[8 + TRANSFER, TRANSFER]);
        let part = client.ask(MIG_DATA_READ, &asked, function).expect("its state");
        state.extend_from_slice(&part[8..]);
        if part.len() < (8 + TRANSFER) as usize {
            break;
        }
    }
    let length = state.len();
    if flip != 0 {
        // What is in front matters most.
        state[usize::from(at) % length] ^= flip;
    }
    set_state(client, RESUMING, function).expect("it stands still");
    let mut taken = true;
    for part in state.chunks(usize::from(at).max(1 << 10)) {
        let size = u32::try_from(part.len()).expect("a part of it");
        let body = [&words(&[8 + size, size]), part].concat();
        taken = taken && client.ask(MIG_DATA_WRITE, &body, function).is_some();
    }
    let stopped = set_state(client, STOP, function).is_some();
    assert!(flip != 0 || taken && stopped, "it does not take its own state");
    if !stopped {
        let state = client.ask(DEVICE_FEATURE, &words(&[16, GET_STATE]), function);
        assert_eq!(state.expect("a state")[8..12], ERROR.to_ne_bytes());
        return;
    }
    assert!(flip != 0 || config(client, function) == before, "it reads as another");
    set_state(client, RUNNING, function).expect("it stands still");
}

fn set_state(client: &mut Client, state: u32, function: &mut ServedFunction) -> Option<()> {
    client.ask(DEVICE_FEATURE, &words(&[16, SET_STATE, state, 0]), function).map(|_| ())
}

fn config(client: &mut Client, function: &mut ServedFunction) -> Vec<u8> {
    let access = words(&[0, 0, CONFIG, CONFIG_SIZE]);
    client.ask(REGION_READ, &access, function).expect("configuration space")
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
