//! A client that says anything, to servers that are killed anywhere.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof, proptest};
use proptest::test_runner::Config;
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::client::send_with;
use super::*;
use crate::state::{Commit, Journal, PreviousEnd, SectionId, StateFile};

#[derive(Clone, Debug)]
enum Act {
    /// A request as it should be, so many of its bytes, with so many descriptors.
    Ask {
        request: usize,
        length: usize,
        fds: usize,
    },
    Say {
        bytes: Vec<u8>,
        fds: usize,
    },
    Urge(u8),
    /// Takes what was said to it.
    Listen,
    Leave(Shutdown),
    /// The server gets its turn, and dies at this crash point.
    Serve {
        dies_at: u64,
    },
}

fn acts() -> impl Strategy<Value = Act> {
    let length = prop_oneof![4 => 0x10000..0x10001_usize, 1 => 0..60_usize];
    let fds = || prop_oneof![6 => 0..2_usize, 1 => 2..40_usize];
    let ask = (any::<usize>(), length, fds()).prop_map(|(request, length, fds)| Act::Ask {
        request,
        length,
        fds,
    });
    let ends = prop_oneof![
        (0..1).prop_map(|_| Shutdown::Read),
        (0..1).prop_map(|_| Shutdown::Write),
        (0..1).prop_map(|_| Shutdown::Both),
    ];
    prop_oneof![
        8 => ask,
        1 => (vec(any::<u8>(), 1..40), fds()).prop_map(|(bytes, fds)| Act::Say { bytes, fds }),
        1 => any::<u8>().prop_map(Act::Urge),
        2 => (0..1).prop_map(|_| Act::Listen),
        1 => ends.prop_map(Act::Leave),
        4 => (1..400_u64).prop_map(|dies_at| Act::Serve { dies_at }),
        4 => (0..1).prop_map(|_| Act::Serve { dies_at: u64::MAX }),
    ]
}

fn requests() -> Vec<Step> {
    let trigger = |data| set_irq(IrqAction::Trigger, data, 0, None);
    let mut requests = vec![
        version(Offer::empty()),
        version(Offer::TWIN_SOCKET),
        enable(),
        map(MEMORY, None),
        map(UNSHARED, None),
        Step::new(Command::DmaUnmap, DmaUnmap::range(MEMORY, SIZE).to_bytes()),
        trigger(IrqData::Eventfd),
        trigger(IrqData::None),
        set_irq(IrqAction::Unmask, IrqData::Eventfd, 0, None),
        set_irq(IrqAction::Mask, IrqData::None, 0, None),
        read(BAR0, 4, 4),
        write(BAR0, 4, &[1; 4]),
        write(BAR0, 0x60, &[1; 4]),
        go_to(MigrationState::Stop),
        go_to(MigrationState::StopCopy),
        go_to(MigrationState::Resuming),
        go_to(MigrationState::Running),
        Step::new(Command::Reset, Vec::new()),
    ];
    requests.extend(dma(true, UNSHARED, 16));
    requests.extend(dma(false, MEMORY, 16));
    requests
}

struct Siege {
    lab: Lab,
    client: UnixStream,
    /// What its first request is answered with, or that there was none.
    greeted: bool,
    file: OwnedFd,
    said: u16,
}

impl Siege {
    fn begin() -> Self {
        let (mut lab, client) = Lab::new(edu);
        lab.start();
        Self { lab, client, greeted: false, file: memory(), said: 0 }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Ask { request, length, fds } => {
                let requests = requests();
                // Nothing else would come of it.
                let request = if self.greeted { request % requests.len() } else { request % 2 };
                self.greeted = true;
                let message = requests[request].message(self.said);
                self.said += 1;
                self.say(&message[..message.len().min(*length)], *fds);
            }
            Act::Say { bytes, fds } => self.say(bytes, *fds),
            Act::Urge(byte) => {
                let _ =
                    rustix::net::send(&self.client, &[*byte], SendFlags::OOB | SendFlags::NOSIGNAL);
            }
            Act::Listen => {
                while matches!(rustix::io::read(&self.client, &mut [0; 4096]), Ok(1..)) {}
            }
            Act::Leave(how) => drop(self.client.shutdown(*how)),
            Act::Serve { dies_at } => self.serve(*dies_at),
        }
    }

    fn say(&self, bytes: &[u8], fds: usize) {
        if !bytes.is_empty() {
            let fds: Vec<BorrowedFd<'_>> = vec![self.file.as_fd(); fds];
            let sent = send_with(&self.client, bytes, &fds);
            assert!(matches!(sent, Ok(_) | Err(Errno::PIPE | Errno::AGAIN | Errno::CONNRESET)));
        }
    }

    fn serve(&mut self, dies_at: u64) {
        let lab = &mut self.lab;
        let survived = killed_at(dies_at, AssertUnwindSafe(|| (0..3).for_each(|_| lab.round())));
        if survived.is_err() {
            self.lab.bury();
            self.lab.start();
        }
        self.welcome();
    }

    /// A session that has ended leaves nothing, and the next client finds somebody.
    fn welcome(&mut self) {
        if self.lab.has_ended() {
            assert_eq!(self.lab.held(), self.lab.kept());
            self.client = self.lab.accept(false);
            self.greeted = false;
        }
    }

    /// Writes something else into a part of what is recorded.
    fn falsify(&mut self, section: SectionId, edits: &[(usize, u8)], length: usize) {
        self.lab.bury();
        let file = StateFile::open(self.lab.state()).unwrap();
        let (mut journal, recovered) =
            Journal::recover(file, "test", 0, PreviousEnd::ByItself).unwrap();
        let mut bytes = recovered.sections[section.index()].clone().unwrap().unwrap_or_default();
        bytes.truncate(length);
        let length = bytes.len();
        for (at, value) in edits {
            if let Some(byte) = at.checked_rem(length).map(|at| &mut bytes[at]) {
                *byte = *value;
            }
        }
        journal.commit(Commit { sections: &[(section, &bytes)], ..Commit::default() });
    }

    /// Some may die of what they find, but not all.
    fn recover(&mut self) {
        let lab = &mut self.lab;
        let mut start = || {
            lab.start();
            (0..20).for_each(|_| lab.round());
        };
        let lives = (0..40).any(|_| catch_unwind(AssertUnwindSafe(&mut start)).is_ok());
        assert!(lives);
        self.welcome();
    }

    fn end(mut self) {
        let _ = self.client.shutdown(Shutdown::Both);
        for _ in 0..100 {
            self.lab.round();
        }
        assert!(self.lab.has_ended());
        assert_eq!(self.lab.held(), self.lab.kept());
    }
}

proptest! {
    #![proptest_config(Config::with_cases(200))]

    #[test]
    fn no_recorded_state_ends_all_servers(
        section in 0..4_usize,
        edits in vec((any::<usize>(), prop_oneof![any::<u8>(), 0..8_u8]), 0..6),
        length in prop_oneof![4 => 0x1_0000..0x1_0001_usize, 1 => 0..200_usize],
    ) {
        let mut siege = Siege::begin();
        for request in 1..requests().len() - 9 {
            siege.act(&Act::Ask { request, length: usize::MAX, fds: usize::from((3..=8).contains(&request)) });
            siege.serve(u64::MAX);
            siege.act(&Act::Listen);
        }
        siege.falsify(SectionId::ALL[section], &edits, length);
        siege.recover();
        siege.end();
    }

    #[test]
    fn no_client_costs_more_than_its_session(acts in vec(acts(), 1..60)) {
        let mut siege = Siege::begin();
        for act in &acts {
            siege.act(act);
        }
        siege.end();
    }
}
