use barkeep_protocol::wire::Errno;

use super::*;

/// A test's server and client, one request at a time.
pub(super) struct Talk {
    pub(super) lab: Lab,
    pub(super) client: Client,
}

impl Talk {
    pub(super) fn begin(function: fn() -> ServedFunction) -> Self {
        let (mut lab, socket) = Lab::new(function);
        let mut client = Client::new(socket, Vec::new(), UNSHARED, SIZE);
        lab.start();
        client.also(vec![version(Offer::empty()), enable()]);
        lab.run_until(|| client.step());
        Self { lab, client }
    }

    /// Asks, and restarts the server until it has answered. Returns the answer, and how many died.
    pub(super) fn ask(&mut self, step: Step) -> (Result<Vec<u8>, Errno>, usize) {
        self.client.also(vec![step]);
        let mut deaths = 0;
        while self.lab.dies_within(|| self.client.step()) {
            deaths += 1;
            assert!(deaths < 60, "it dies for ever");
            self.restart();
        }
        (self.client.last(), deaths)
    }

    pub(super) fn expect(&mut self, step: Step) -> Vec<u8> {
        let (answer, deaths) = self.ask(step);
        assert_eq!(deaths, 0);
        answer.unwrap()
    }

    pub(super) fn byte(&mut self, offset: u64) -> u8 {
        *self.expect(read(BAR0, offset, 1)).last().unwrap()
    }

    pub(super) fn restart(&mut self) {
        self.lab.bury();
        self.lab.start();
    }

    pub(super) fn expect_end(mut self) {
        self.lab.round();
        assert!(self.client.is_hung_up());
        assert!(self.lab.has_ended());
        assert_eq!(self.lab.held(), self.lab.kept());
    }
}
