//! What the preloaded library tells of itself: a page in a memfd named [`NAME`], which the wrapped
//! process keeps open, and which anybody who may look at that process reads.
//!
//! The library writes words and nothing else, so that a signal handler may: every text is in the page
//! before the first thing is counted. A reader takes the page for what a hostile process has written.

use std::sync::atomic::{AtomicU64, Ordering};

/// The memfd's name. `/proc/PID/fd` shows it as `/memfd:barkeep-wrap (deleted)`.
pub const NAME: &str = "barkeep-wrap";
/// Length of the page in bytes.
pub const LENGTH: usize = WORDS * WORD;
/// Length of the page in words of 8 bytes, in the byte order of the processor.
pub const WORDS: usize = 1536;
/// Kinds of things that can be left to the VMM.
pub const REASONS: usize = 32;
/// Devices that are told of; there may be more.
pub const DEVICES: usize = 64;
/// Longest text of a reason in bytes; what is longer is cut off.
pub const REASON_LENGTH: usize = 15 * WORD;
/// Longest name of a device in bytes; what is longer is cut off.
pub const DEVICE_LENGTH: usize = 7 * WORD;

/// `barkeepW`, written last.
const MAGIC: u64 = u64::from_le_bytes(*b"barkeepW");
const VERSION: u64 = 1;
const WORD: usize = size_of::<u64>();
/// Longest version of the library in bytes.
const LIBRARY_LENGTH: usize = 4 * WORD;

// Where things are, in words.
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 1;
const PID_AT: usize = 2;
const LIBRARY_AT: usize = 3;
const VMS_AT: usize = 7;
const VMS_EVER_AT: usize = 8;
const COUNTS_AT: usize = 16;
const REASONS_AT: usize = 64;
const DEVICES_AT: usize = REASONS_AT + REASONS * REASON_WORDS;
/// How often, and the text.
const REASON_WORDS: usize = 1 + REASON_LENGTH / WORD;
/// Whether it is there, and its name.
const DEVICE_WORDS: usize = 1 + DEVICE_LENGTH / WORD;

const _: () = assert!(DEVICES_AT + DEVICES * DEVICE_WORDS <= WORDS);
const _: () = assert!(COUNTS_AT + Count::ALL.len() <= REASONS_AT);
const _: () = assert!(LIBRARY_AT + LIBRARY_LENGTH / WORD <= VMS_AT);

/// Things that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Failures of `KVM_RUN` that were about a BAR that does not decode.
    FaultsLocated,
    /// Slots that were taken from KVM behind the VMM's back.
    SlotsSuspended,
    /// Slots that were given back.
    SlotsRestored,
    /// Reads that completed with all ones.
    UrReads,
    /// Writes that were dropped.
    UrWrites,
    /// Loads and stores of the VMM itself that completed in the handler of `SIGBUS`.
    SigbusCompleted,
    /// Memory faults and accesses that a vfio-user backend was asked about.
    Forwarded,
    /// Things that were not understood and left to the VMM.
    FailOpens,
}

impl Count {
    /// All of them, in the order of the page.
    pub const ALL: [Self; 8] = [
        Self::FaultsLocated,
        Self::SlotsSuspended,
        Self::SlotsRestored,
        Self::UrReads,
        Self::UrWrites,
        Self::SigbusCompleted,
        Self::Forwarded,
        Self::FailOpens,
    ];

    /// Its name for programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FaultsLocated => "faults_located",
            Self::SlotsSuspended => "slots_suspended",
            Self::SlotsRestored => "slots_restored",
            Self::UrReads => "ur_reads",
            Self::UrWrites => "ur_writes",
            Self::SigbusCompleted => "sigbus_completed",
            Self::Forwarded => "forwarded",
            Self::FailOpens => "fail_opens",
        }
    }

    /// What it counts, for people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::FaultsLocated => "KVM_RUN failures located in a disabled BAR",
            Self::SlotsSuspended => "memory slots suspended",
            Self::SlotsRestored => "memory slots given back",
            Self::UrReads => "reads answered with all ones",
            Self::UrWrites => "writes dropped",
            Self::SigbusCompleted => "SIGBUS completed",
            Self::Forwarded => "accesses and faults put to a backend",
            Self::FailOpens => "events left to the VMM",
        }
    }
}

/// The page as the library writes it: with as many [words](WORDS) as a page has, or more.
#[derive(Debug)]
pub struct Page<W>(W);

impl<W: AsRef<[AtomicU64]>> Page<W> {
    /// Begins a page on words that are all 0.
    ///
    /// Returns `None` if there are too few of them. The page is valid only after
    /// [`publish`](Self::publish).
    pub fn new(words: W) -> Option<Self> {
        (words.as_ref().len() >= WORDS).then_some(Self(words))
    }

    /// Makes the page valid: for a library of this version in a process of this ID. The text of each
    /// reason, by its number, is there from now on.
    pub fn publish<'a>(&self, pid: u32, library: &str, reasons: impl IntoIterator<Item = &'a str>) {
        self.word(VERSION_AT).store(VERSION, Ordering::Relaxed);
        self.word(PID_AT).store(pid.into(), Ordering::Relaxed);
        self.write(LIBRARY_AT, LIBRARY_LENGTH, library);
        for (reason, text) in reasons.into_iter().enumerate().take(REASONS) {
            self.write(REASONS_AT + reason * REASON_WORDS + 1, REASON_LENGTH, text);
        }
        self.word(MAGIC_AT).store(MAGIC, Ordering::Release);
    }

    /// The words that it is written in.
    pub fn words(&self) -> &W {
        &self.0
    }

    /// Counts once more. Safe in a signal handler, as everything here is but [`publish`](Self::publish).
    pub fn add(&self, count: Count, number: u64) {
        self.count_word(count).fetch_add(number, Ordering::Relaxed);
    }

    /// How often it was counted.
    pub fn count(&self, count: Count) -> u64 {
        self.count_word(count).load(Ordering::Relaxed)
    }

    /// Counts something that is left to the VMM for a reason. Returns whether it is the reason's first time.
    ///
    /// A reason that the page has no place for is counted among all, and is never the first time.
    pub fn leave(&self, reason: usize) -> bool {
        self.add(Count::FailOpens, 1);
        let Some(word) = (reason < REASONS).then(|| self.word(REASONS_AT + reason * REASON_WORDS))
        else {
            return false;
        };
        word.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// A VM was made.
    pub fn vm_made(&self) {
        self.word(VMS_EVER_AT).fetch_add(1, Ordering::Relaxed);
        self.word(VMS_AT).fetch_add(1, Ordering::Relaxed);
    }

    /// A VM is gone.
    pub fn vm_gone(&self) {
        let less = |vms: u64| Some(vms.saturating_sub(1));
        // It never answers `None`.
        let _ = self.word(VMS_AT).fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How many VMs were ever made.
    pub fn vms_ever(&self) -> u64 {
        self.word(VMS_EVER_AT).load(Ordering::Relaxed)
    }

    /// Tells of a device. Numbers are given by the caller, from 0; one that the page has no place for
    /// is not told of.
    pub fn device_came(&self, device: usize, name: &str) {
        let Some(at) = Self::device_at(device) else { return };
        self.word(at).store(0, Ordering::Release);
        self.write(at + 1, DEVICE_LENGTH, name);
        self.word(at).store(1, Ordering::Release);
    }

    /// A device is gone.
    pub fn device_went(&self, device: usize) {
        let Some(at) = Self::device_at(device) else { return };
        self.word(at).store(0, Ordering::Release);
    }

    /// Begins anew in a process that was forked: what is counted is the parent's, and so are its VMs.
    pub fn forked(&self, pid: u32) {
        self.word(PID_AT).store(pid.into(), Ordering::Relaxed);
        let reasons = (0..REASONS).map(|reason| REASONS_AT + reason * REASON_WORDS);
        let counts = (0..Count::ALL.len()).map(|count| COUNTS_AT + count);
        for word in [VMS_AT, VMS_EVER_AT].into_iter().chain(counts).chain(reasons) {
            self.word(word).store(0, Ordering::Relaxed);
        }
    }

    fn device_at(device: usize) -> Option<usize> {
        (device < DEVICES).then(|| DEVICES_AT + device * DEVICE_WORDS)
    }

    fn count_word(&self, count: Count) -> &AtomicU64 {
        self.word(COUNTS_AT + count as usize)
    }

    /// Writes a text of at most so many bytes, cut off where a character ends.
    fn write(&self, at: usize, length: usize, text: &str) {
        let text = &text.as_bytes()[..text.floor_char_boundary(length)];
        for place in 0..length / WORD {
            let mut bytes = [0; WORD];
            let rest = text.get(place * WORD..).unwrap_or_default();
            let here = &rest[..rest.len().min(WORD)];
            bytes[..here.len()].copy_from_slice(here);
            self.word(at + place).store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.0.as_ref()[at]
    }
}

/// What a page says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Process ID, in the process's own namespace.
    pub pid: u32,
    /// The library's version.
    pub library: String,
    /// VMs that there are.
    pub vms: u64,
    /// VMs that were ever made.
    pub vms_ever: u64,
    /// How often each thing was counted.
    pub counts: [u64; Count::ALL.len()],
    /// Why something was left to the VMM, and how often, where it happened at all.
    pub reasons: Vec<(String, u64)>,
    /// The devices that there are, by name.
    pub devices: Vec<String>,
}

/// Why bytes are no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// They are fewer than a page has.
    #[error("the page is too short")]
    TooShort,
    /// They don't begin as a page does.
    #[error("not a page of the library's")]
    NoPage,
    /// Another layout.
    #[error("the page has layout {0}, and this program knows {VERSION}")]
    Version(u64),
    /// A number that can't be a process ID.
    #[error("the page names no process")]
    Pid,
}

impl Snapshot {
    /// Reads a page that any process may have written. Texts hold printable characters alone.
    ///
    /// # Errors
    /// If the bytes are no page of a layout that is known.
    pub fn parse(bytes: &[u8]) -> Result<Self, PageError> {
        let bytes = bytes.get(..LENGTH).ok_or(PageError::TooShort)?;
        let word = |at: usize| {
            let mut word = [0; WORD];
            word.copy_from_slice(&bytes[at * WORD..(at + 1) * WORD]);
            u64::from_ne_bytes(word)
        };
        let text = |at: usize, length: usize| printable(&bytes[at * WORD..at * WORD + length]);
        if word(MAGIC_AT) != MAGIC {
            return Err(PageError::NoPage);
        }
        if word(VERSION_AT) != VERSION {
            return Err(PageError::Version(word(VERSION_AT)));
        }
        let pid = u32::try_from(word(PID_AT)).ok().filter(|pid| *pid != 0).ok_or(PageError::Pid)?;
        let reasons = (0..REASONS).map(|reason| REASONS_AT + reason * REASON_WORDS);
        let devices = (0..DEVICES).map(|device| DEVICES_AT + device * DEVICE_WORDS);
        Ok(Self {
            pid,
            library: text(LIBRARY_AT, LIBRARY_LENGTH),
            vms: word(VMS_AT),
            vms_ever: word(VMS_EVER_AT),
            counts: Count::ALL.map(|count| word(COUNTS_AT + count as usize)),
            reasons: reasons
                .filter(|at| word(*at) != 0)
                .map(|at| (text(at + 1, REASON_LENGTH), word(at)))
                .collect(),
            devices: devices
                .filter(|at| word(*at) == 1)
                .map(|at| text(at + 1, DEVICE_LENGTH))
                .collect(),
        })
    }

    /// How often it was counted.
    #[must_use]
    pub fn count(&self, count: Count) -> u64 {
        self.counts[count as usize]
    }
}

/// A text of the page, up to its first 0, with a question mark for whatever a terminal might obey.
fn printable(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let shown = |byte: &u8| if matches!(byte, b' '..=b'~') { char::from(*byte) } else { '?' };
    bytes[..end].iter().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page<Vec<AtomicU64>> {
        let words = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        Page::new(words).expect("enough words")
    }

    fn bytes(page: &Page<Vec<AtomicU64>>) -> Vec<u8> {
        page.0.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
    }

    fn read(page: &Page<Vec<AtomicU64>>) -> Snapshot {
        Snapshot::parse(&bytes(page)).expect("a page")
    }

    #[test]
    fn what_is_written_is_read() {
        let page = page();
        page.publish(77, "1.2.3", ["first reason", "second reason"]);
        for (times, count) in Count::ALL.into_iter().enumerate() {
            page.add(count, times as u64);
        }
        page.vm_made();
        page.vm_made();
        page.vm_gone();
        page.device_came(0, "vfio 0000:03:00.0");
        page.device_came(1, "gone");
        page.device_went(1);
        page.device_came(DEVICES - 1, "last");
        let mut expected = Snapshot {
            pid: 77,
            library: "1.2.3".into(),
            vms: 1,
            vms_ever: 2,
            counts: [0, 1, 2, 3, 4, 5, 6, 7],
            reasons: Vec::new(),
            devices: vec!["vfio 0000:03:00.0".into(), "last".into()],
        };
        assert_eq!(read(&page), expected);
        assert!(page.leave(1), "for the first time");
        assert!(!page.leave(1));
        expected.counts[Count::FailOpens as usize] += 2;
        expected.reasons = vec![("second reason".into(), 2)];
        assert_eq!(read(&page), expected);
    }

    #[test]
    fn a_page_is_none_before_it_is_published() {
        assert_eq!(Snapshot::parse(&bytes(&page())), Err(PageError::NoPage));
        assert!(Page::new(Vec::<AtomicU64>::new()).is_none());
    }

    #[test]
    fn what_has_no_place_in_the_page_is_left_out() {
        let page = page();
        let many = vec!["reason"; REASONS + 5];
        page.publish(1, &"9".repeat(100), many);
        page.device_came(DEVICES, "too many");
        page.device_went(DEVICES);
        page.vm_gone();
        assert!(!page.leave(REASONS));
        let snapshot = read(&page);
        assert_eq!(snapshot.devices, Vec::<String>::new());
        assert_eq!(snapshot.library, "9".repeat(LIBRARY_LENGTH));
        assert_eq!((snapshot.vms, snapshot.count(Count::FailOpens)), (0, 1));
        assert_eq!(snapshot.reasons, Vec::new());
    }

    #[test]
    fn texts_are_cut_off_between_characters() {
        let page = page();
        page.publish(1, "1", []);
        let name = format!("{}\u{e9}", "x".repeat(DEVICE_LENGTH - 1));
        page.device_came(0, &name);
        assert_eq!(read(&page).devices, ["x".repeat(DEVICE_LENGTH - 1)]);
    }

    #[test]
    fn a_forked_process_has_the_devices_and_no_counts() {
        let page = page();
        page.publish(1, "1", ["reason"]);
        page.device_came(0, "edu");
        page.add(Count::UrReads, 3);
        page.vm_made();
        page.leave(0);
        page.forked(2);
        let snapshot = read(&page);
        assert_eq!((snapshot.pid, snapshot.vms, snapshot.vms_ever), (2, 0, 0));
        assert_eq!(snapshot.counts, [0; 8]);
        assert_eq!((snapshot.reasons.len(), snapshot.devices.len()), (0, 1));
        assert!(page.leave(0), "for the first time in this process");
    }

    #[test]
    fn a_hostile_page_is_refused_or_harmless() {
        let page = page();
        page.publish(1, "1", ["reason"]);
        let good = bytes(&page);
        assert_eq!(Snapshot::parse(&good[..LENGTH - 1]), Err(PageError::TooShort));
        assert_eq!(Snapshot::parse(&[]), Err(PageError::TooShort));
        let with = |at: usize, word: u64| {
            let mut bytes = good.clone();
            bytes[at * WORD..(at + 1) * WORD].copy_from_slice(&word.to_ne_bytes());
            Snapshot::parse(&bytes)
        };
        assert_eq!(with(MAGIC_AT, 0), Err(PageError::NoPage));
        assert_eq!(with(VERSION_AT, 2), Err(PageError::Version(2)));
        assert_eq!(with(PID_AT, 0), Err(PageError::Pid));
        assert_eq!(with(PID_AT, 1 << 32), Err(PageError::Pid));
        // A terminal's commands, and bytes that are no text at all.
        let escape = with(LIBRARY_AT, u64::from_ne_bytes(*b"\x1b[2J\n\xff\x7f\xc3"));
        assert_eq!(escape.expect("a page").library, "?[2J????");
        let mut noise = vec![0xff; LENGTH + 100];
        noise[..4 * WORD].copy_from_slice(&good[..4 * WORD]);
        let snapshot = Snapshot::parse(&noise).expect("a page");
        assert_eq!((snapshot.reasons.len(), snapshot.devices.len()), (REASONS, 0));
        assert_eq!(snapshot.reasons[0], ("?".repeat(REASON_LENGTH), u64::MAX));
    }
}
