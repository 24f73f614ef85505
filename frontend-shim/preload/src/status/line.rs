use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stderr;

/// Longer lines are cut off.
const LENGTH: usize = 512;
const START: &[u8] = b"barkeep: ";

/// A line on standard error, made and written without allocation, locks or the C library.
#[derive(Debug)]
pub(super) struct Line {
    bytes: [u8; LENGTH],
    used: usize,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { bytes: [0; LENGTH], used: 0 }.bytes(START)
    }

    pub(super) fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    pub(super) fn number(self, mut number: u64) -> Self {
        // As many digits as u64::MAX has.
        let mut digits = [b'0'; 20];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return self.bytes(&digits[first..]);
            }
        }
    }

    /// Writes it at once, if there is somebody to read it: nothing here waits, and a pipe that nobody
    /// reads would raise SIGPIPE.
    pub(super) fn write(self) {
        let line = self.finished();
        let mut asked = [PollFd::from_borrowed_fd(stderr(), PollFlags::OUT)];
        let ready = poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        if ready == Ok(1) && asked[0].revents() == PollFlags::OUT {
            let _ = rustix::io::write(stderr(), &line.bytes[..line.used]);
        }
    }

    #[cfg(test)]
    pub(super) fn shown(self) -> String {
        let line = self.finished();
        String::from_utf8(line.bytes[..line.used].to_vec()).expect("UTF-8")
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        // The last byte is the line's end.
        let room = LENGTH - 1 - self.used;
        let fits = &bytes[..bytes.len().min(room)];
        self.bytes[self.used..self.used + fits.len()].copy_from_slice(fits);
        self.used += fits.len();
        self
    }

    fn finished(mut self) -> Self {
        self.bytes[self.used] = b'\n';
        self.used += 1;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal() {
        for number in [0, 9, 10, 1_234_567_890, u64::MAX] {
            let line = Line::new().number(number).text(" of them");
            assert_eq!(line.shown(), format!("barkeep: {number} of them\n"));
        }
    }

    #[test]
    fn what_is_too_long_is_cut_off_and_still_a_line() {
        let line = Line::new().text(&"x".repeat(2 * LENGTH)).number(7).shown();
        assert_eq!((line.len(), line.ends_with("x\n")), (LENGTH, true));
    }
}
