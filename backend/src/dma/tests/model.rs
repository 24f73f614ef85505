//! The table against a model of guest memory that holds one byte at a time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const PAGE: u64 = 4096;
/// Addresses of the model: some pages, and an end.
const PAGES: u64 = 10;
const MOST_WINDOWS: usize = 4;

#[derive(Clone, Debug)]
enum Action {
    Map {
        page: u64,
        pages: u64,
        access: DmaAccess,
        file: bool,
    },
    Unmap {
        address: u64,
        size: u64,
    },
    Read {
        address: u64,
        len: usize,
    },
    Write {
        address: u64,
        len: usize,
        value: u8,
    },
    /// As a device that is built on `vm-memory`.
    Store {
        address: u64,
        len: usize,
        value: u8,
    },
    Report {
        page: u64,
        pages: u64,
    },
}

/// Addresses near the borders of pages.
fn address() -> impl Strategy<Value = u64> {
    (0..=PAGES, 0..6_u64).prop_map(|(page, near)| (page * PAGE + near).saturating_sub(3))
}

fn length() -> impl Strategy<Value = usize> {
    (0..3_usize, 0..6_usize).prop_map(|(pages, more)| (pages * 4096 + more).saturating_sub(2))
}

fn action() -> impl Strategy<Value = Action> {
    let access = prop_oneof![Just(READ_WRITE), (0..4_u8).prop_map(DmaAccess::from_bits_retain)];
    let unmap = (0..PAGES, 0..5_u64, 0..8_u64).prop_map(|(page, pages, odd)| {
        // Now and then not made of pages.
        Action::Unmap {
            address: page * PAGE + u64::from(odd == 1),
            size: pages * PAGE - u64::from(odd == 2 && pages > 0),
        }
    });
    prop_oneof![
        4 => (0..PAGES, 0..4_u64, access, prop::bool::weighted(0.8))
            .prop_map(|(page, pages, access, file)| Action::Map { page, pages, access, file }),
        2 => unmap,
        4 => (address(), length()).prop_map(|(address, len)| Action::Read { address, len }),
        4 => (address(), length(), 1..=255_u8)
            .prop_map(|(address, len, value)| Action::Write { address, len, value }),
        2 => (address(), length(), 1..=255_u8)
            .prop_map(|(address, len, value)| Action::Store { address, len, value }),
        1 => (0..PAGES, 1..4_u64).prop_map(|(page, pages)| Action::Report { page, pages }),
    ]
}

/// A byte of guest memory: which window it is in, by its first page, and what that allows.
#[derive(Clone, Copy, Debug)]
struct Byte {
    window: u64,
    access: DmaAccess,
    file: bool,
    value: u8,
}

#[derive(Debug, Default)]
struct Model {
    bytes: BTreeMap<u64, Byte>,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn windows(&self) -> BTreeSet<u64> {
        self.bytes.values().map(|byte| byte.window).collect()
    }

    fn map(
        &mut self,
        page: u64,
        pages: u64,
        access: DmaAccess,
        file: bool,
    ) -> Result<(), DmaError> {
        let range = page * PAGE..(page + pages) * PAGE;
        if range.is_empty() {
            return Err(DmaError::Unaligned);
        }
        if self.bytes.range(range.clone()).next().is_some() {
            return Err(DmaError::Overlap);
        }
        if self.windows().len() == MOST_WINDOWS {
            return Err(DmaError::TooMany);
        }
        let byte = Byte { window: page, access, file, value: 0 };
        self.bytes.extend(range.map(|address| (address, byte)));
        Ok(())
    }

    fn unmap(&mut self, address: u64, size: u64) -> Result<(), DmaError> {
        let inside = |at: &u64| (address..address + size).contains(at);
        let touched: BTreeSet<u64> =
            self.bytes.iter().filter(|(at, _)| inside(at)).map(|(_, byte)| byte.window).collect();
        let cut = self.bytes.iter().any(|(at, byte)| touched.contains(&byte.window) && !inside(at));
        if size > 0 && cut {
            return Err(DmaError::Bisected);
        }
        if touched.is_empty() {
            return Err(DmaError::NoSuchWindow);
        }
        self.bytes.retain(|_, byte| !touched.contains(&byte.window));
        Ok(())
    }

    /// What stands in the way of one byte.
    fn obstacle(&self, address: u64, access: DmaAccess) -> Option<DmaError> {
        match self.bytes.get(&address) {
            None => Some(DmaError::Unmapped(address)),
            Some(byte) if !byte.access.contains(access) => Some(DmaError::Denied(address)),
            Some(byte) if !byte.file => Some(DmaError::NotShared(address)),
            Some(_) => None,
        }
    }

    /// The addresses of a range up to the first that can't be accessed.
    fn reach(
        &self,
        address: u64,
        len: usize,
        access: DmaAccess,
    ) -> (Vec<u64>, Result<(), DmaError>) {
        let mut reached = Vec::new();
        for at in address..address + len as u64 {
            match self.obstacle(at, access) {
                None => reached.push(at),
                Some(error) => return (reached, Err(error)),
            }
        }
        (reached, Ok(()))
    }

    fn store(&mut self, addresses: &[u64], value: u8) {
        for at in addresses {
            self.dirty.insert(at / PAGE);
            self.bytes.entry(*at).and_modify(|byte| byte.value = value);
        }
    }
}

fn check(actions: Vec<Action>) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    let mut table = DmaTable::new(MOST_WINDOWS);
    table.start_logging(&[], PAGE).unwrap();
    // In the end, all that was written and not reported yet.
    let end = Action::Report { page: 0, pages: PAGES };
    for action in actions.into_iter().chain([end]) {
        match action {
            Action::Map { page, pages, access, file } => {
                let size = pages * PAGE;
                let memory = file.then(|| (named(size).0, 0));
                let outcome = table.map(Iova(page * PAGE), size, access, memory);
                prop_assert_eq!(outcome, model.map(page, pages, access, file));
            }
            Action::Unmap { address, size } => {
                prop_assert_eq!(table.unmap(Iova(address), size), model.unmap(address, size));
            }
            Action::Read { address, len } => {
                let (reached, expected) = model.reach(address, len, DmaAccess::READ);
                let mut data = vec![0; len];
                prop_assert_eq!(table.read(Iova(address), &mut data), expected);
                let bytes: Vec<u8> = reached.iter().map(|at| model.bytes[at].value).collect();
                prop_assert_eq!(&data[..bytes.len()], &bytes[..]);
            }
            Action::Write { address, len, value } => {
                let (reached, expected) = model.reach(address, len, DmaAccess::WRITE);
                model.store(&reached, value);
                prop_assert_eq!(table.write(Iova(address), &vec![value; len]), expected);
            }
            Action::Store { address, len, value } => {
                let (reached, expected) = model.reach(address, len, DmaAccess::WRITE);
                let outcome = table.view().write_slice(&vec![value; len], GuestAddress(address));
                prop_assert_eq!(outcome.is_ok(), expected.is_ok());
                if expected.is_ok() {
                    model.store(&reached, value);
                }
            }
            Action::Report { page, pages } => {
                let mut bitmap = [0xff; 8];
                table.report(Iova(page * PAGE), pages * PAGE, PAGE, &mut bitmap).unwrap();
                let dirty = (0..pages).filter(|bit| model.dirty.remove(&(page + bit)));
                let expected = dirty.fold(0_u64, |bits, bit| bits | 1 << bit);
                prop_assert_eq!(u64::from_le_bytes(bitmap), expected);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_answer_is_that_of_a_simple_model(actions in vec(action(), 1..40)) {
        check(actions)?;
    }
}
