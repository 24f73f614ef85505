//! Who is interrupted, and by whom.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::bench::disk;
use super::fake::{Fake, Traits};

#[test]
fn a_masked_vector_is_pending_and_comes_when_it_is_unmasked() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.mask(2, false);
    bench.mask(1, true);
    fake.state().signal(0);
    bench.serve();
    assert_eq!(bench.signals(1), 0);
    let mut pending = [0];
    bench.function.msix_pending_read(0, &mut pending);
    assert_eq!(pending, [0b10]);

    bench.mask(1, false);
    assert_eq!(bench.signals(1), 1);
    fake.state().signal(0);
    assert_eq!(bench.signals(1), 1, "the daemon's own way again");
}

#[test]
fn an_interrupt_between_the_signal_and_the_look_at_it_is_not_lost() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.mask(2, false);
    bench.mask(1, true);
    fake.state().signal(0);
    bench.mask(1, false);
    assert_eq!(bench.signals(1), 0);
    bench.serve();
    assert_eq!(bench.signals(1), 1);
}

#[test]
fn without_msix_the_pin_is_driven() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.enable_msix(false);
    fake.state().signal(1);
    bench.serve();
    assert_eq!(bench.pin_signals(), 1);
    assert_eq!(bench.signals(2), 0);
    let mut isr = [0];
    bench.read(0x1000, &mut isr);
    assert_eq!(isr, [1]);
}

#[test]
fn other_eventfds_of_the_clients_are_used_from_then_on() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let old = fake.state().vrings[&0].call.as_ref().unwrap().try_clone().unwrap();
    bench.interrupts.msix.clear();
    bench.rewired();
    fake.state().signal(0);
    bench.serve();
    assert_eq!(bench.signals(1), 0, "nothing is connected");
    bench.connect_vectors();
    fake.state().signal(0);
    assert_eq!(bench.signals(1), 1);
    drop(old);
}

#[test]
fn what_happened_while_no_message_could_be_sent_is_told_afterwards() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.mask(2, false);
    bench.mask(1, true);
    let ours = fake.state().vrings[&0].call.as_ref().unwrap().try_clone().unwrap();
    bench.command(false);
    bench.mask(1, false);
    rustix::io::write(&ours, &1_u64.to_ne_bytes()).unwrap();
    bench.serve();
    assert_eq!(bench.signals(1), 0);
    bench.command(true);
    assert_eq!(bench.signals(1), 1);
}

#[test]
fn a_message_from_just_before_the_rings_were_stopped_is_sent_again() {
    for traits in [Traits::disk(), Traits::disk().without(Protocol::INFLIGHT_SHMFD)] {
        let (mut bench, mut fake, place) = disk(traits.clone());
        assert_eq!((bench.signals(1), bench.signals(2)), (0, 0), "not before there was any");
        bench.command(false);
        assert_eq!((bench.signals(1), bench.signals(2)), (0, 0));
        bench.command(true);
        assert_eq!((bench.signals(1), bench.signals(2)), (1, 1));
        bench.rewired();
        bench.serve();
        assert_eq!((bench.signals(1), bench.signals(2)), (0, 0), "once");

        fake.die();
        bench.serve();
        let fake = Fake::start(&place.socket, traits);
        bench.serve_until(|_| fake.state().running() == [0, 1]);
        assert_eq!((bench.signals(1), bench.signals(2)), (1, 1));
        let features = bench.offered();
        bench.set_up(features);
        assert_eq!((bench.signals(1), bench.signals(2)), (0, 0), "another driver had none");
    }
}
