//! What clients do, one after the other: each session ends with the same answers however often its
//! worker dies meanwhile.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use barkeep_tests::edu::at;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::sealed;
use barkeep_tests::peer::decode_page::DecodePage;
use barkeep_tests::peer::message::{Payload, command, u32_at};
use barkeep_tests::peer::requests::{
    CONFIG, access, decode_page, dma_map, dma_unmap, feature, info, irq, migration, pci,
    region_info, set_irqs, write,
};
use barkeep_tests::supervised::Supervised;
use barkeep_tests::virtio::Load;

use crate::blk;
use crate::script::{Answer, Script, assert_holds, assert_signalled};

/// A session, with the device that it is for.
pub(crate) struct Session {
    pub(crate) name: &'static str,
    /// The device; its own files are in this directory.
    pub(crate) device: fn(&Path) -> String,
    /// All of it, from the connection on; what was answered.
    pub(crate) run: fn(&Supervised) -> Vec<Answer>,
}

pub(crate) const REGISTERS: Session =
    Session { name: "registers", device: |_| "edu".into(), run: registers };
pub(crate) const SHOWN: Session = Session { name: "shown", device: |_| "edu".into(), run: shown };
pub(crate) const INTERRUPTS: Session =
    Session { name: "interrupts", device: |_| "edu".into(), run: interrupts };
pub(crate) const MEMORY: Session =
    Session { name: "memory", device: |_| "edu".into(), run: memory };
pub(crate) const PIPELINED: Session =
    Session { name: "pipelined", device: |_| "edu".into(), run: pipelined };
pub(crate) const MESSAGES: Session =
    Session { name: "messages", device: |_| "edu".into(), run: messages };
pub(crate) const TWIN: Session = Session { name: "twin", device: |_| "edu".into(), run: twin };
pub(crate) const STOPPED: Session =
    Session { name: "stopped", device: |_| "edu".into(), run: stopped };
pub(crate) const SHARED: Session =
    Session { name: "shared", device: |_| "ivshmem,size=1M,vectors=3".into(), run: shared };
pub(crate) const COUNTED: Session =
    Session { name: "counted", device: |_| "test-crash".into(), run: counted };
pub(crate) const DISK: Session = Session { name: "disk", device: image, run: disk };

const MSIX: u32 = 2;
const MSIX_ENABLE: u16 = 1 << 15;
const READ_WRITE: u32 = 3;
const BUFFER: u64 = 0x40000;
const DEVICE_BUSY: u64 = 1;
const INTERRUPT_WHEN_DONE: u64 = 4;
const DONE: u32 = 0x100;

fn described(script: &mut Script) {
    script.call(command::GET_INFO, &info(16, 0)[..16]);
    for region in 0..9 {
        script.call(command::GET_REGION_INFO, &region_info(256, region));
    }
    for index in 0..5 {
        script.call(command::GET_IRQ_INFO, &info(16, index));
    }
}

fn enable(script: &mut Script) {
    script.write_u32(CONFIG, pci::BAR0, 0xfe00_0000);
    script.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
}

/// What a decode page shows is as true as an answer.
fn shown(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    script.call(command::DECODE_PAGE, &decode_page(16, 0));
    let page = DecodePage::map(script.fds.pop().expect("the page's file"));
    for round in 1..4 {
        script.write_u32(CONFIG, pci::BAR0, round << 20);
        assert_eq!(page.bar(0).address, u64::from(round) << 20);
        script.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        assert_eq!(page.bar(0).decoded_at, u64::from(round) << 20);
        assert_eq!(script.read_u32(0, at::IDENTIFICATION), 0x0100_00ed);
        assert!(page.bar(0).decodes);
        script.set_config_u16(pci::COMMAND, 0);
        assert!(!page.bar(0).decodes);
        assert_eq!(script.read_u32(0, at::IDENTIFICATION), u32::MAX);
    }
    script.call(command::DECODE_PAGE, &decode_page(16, 0));
    script.notes()
}

fn registers(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    described(&mut script);
    assert_eq!(script.read_u32(0, at::IDENTIFICATION), u32::MAX, "it does not decode yet");
    enable(&mut script);
    for value in [1, 0xdead_beef, 0x1234_5678] {
        script.write_u32(0, at::LIVENESS, value);
        assert_eq!(script.read_u32(0, at::LIVENESS), !value);
    }
    script.write_u32(0, at::FACTORIAL, 10);
    assert_eq!(script.read_u32(0, at::FACTORIAL), 3_628_800);
    // What is refused is refused by a worker that died of nothing of it.
    script.call(99, &[]);
    script.call(command::REGION_READ, &access(42, 0, 4));
    script.call(command::REGION_READ, &access(0, u64::MAX, 4));
    script.call(command::DMA_UNMAP, &dma_unmap(0, 0x5000, 0x1000));
    // Many at once, each of which depends on the one before.
    let many = (0..12_u32).flat_map(|value| {
        let set = write(0, at::LIVENESS, &value.to_le_bytes());
        [(command::REGION_WRITE, set), (command::REGION_READ, access(0, at::LIVENESS, 4))]
    });
    script.call_all(&many.collect::<Vec<_>>());
    // A byte at a time.
    script.call_in_pieces(command::REGION_READ, &access(0, at::LIVENESS, 4), 1);
    script.set_config_u16(pci::COMMAND, 0);
    assert_eq!(script.read_u32(0, at::LIVENESS), u32::MAX);
    script.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(script.read_u32(0, at::LIVENESS), !11);
    script.read(CONFIG, 0, 256);
    script.call(command::RESET, &[]);
    script.read(CONFIG, 0, 256);
    enable(&mut script);
    assert_eq!(script.read_u32(0, at::LIVENESS), 0, "the reset cleared it");
    over(script)
}

fn interrupts(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    enable(&mut script);
    let [pin, unmask, msi, error] = [(); 4].map(|()| EventCounter::new());
    script.set_eventfd(irq::INTX, 0, pin.as_fd());
    script.set_eventfd(3, 0, error.as_fd());
    let body = set_irqs(irq::DATA_EVENTFD | irq::ACTION_UNMASK, irq::INTX, 0, 1, &[]);
    script.call_with_fds(command::SET_IRQS, &body, &[unmask.as_fd()]);
    for _ in 0..2 {
        script.write_u32(0, at::INTERRUPT_RAISE, 1);
        assert_signalled(&pin);
        assert_eq!(script.config_u16(pci::STATUS) & pci::INTERRUPT_STATUS, pci::INTERRUPT_STATUS);
        // Nobody has served it: it is signalled again as soon as the pin may speak.
        rustix::io::write(&unmask, &1_u64.to_ne_bytes()).unwrap();
        wait_for_signal(&pin);
        script.write_u32(0, at::INTERRUPT_ACKNOWLEDGE, 1);
        assert_eq!(script.config_u16(pci::STATUS) & pci::INTERRUPT_STATUS, 0);
        let body = set_irqs(irq::DATA_NONE | irq::ACTION_UNMASK, irq::INTX, 0, 1, &[]);
        script.call(command::SET_IRQS, &body);
        let _ = pin.take();
    }
    let body = set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, 3, 0, 1, &[]);
    script.call(command::SET_IRQS, &body);
    assert_signalled(&error);
    script.set_eventfd(irq::MSI, 0, msi.as_fd());
    let control = capability(&mut script, pci::MSI) + 2;
    script.set_config_u16(control, 1);
    for _ in 0..2 {
        script.write_u32(0, at::INTERRUPT_RAISE, 2);
        assert_signalled(&msi);
    }
    // Taken away, it is silent.
    let body = set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, irq::MSI, 0, 0, &[]);
    script.call(command::SET_IRQS, &body);
    let _ = msi.take();
    script.write_u32(0, at::INTERRUPT_RAISE, 4);
    assert_eq!(msi.take(), 0, "an eventfd that was taken away");
    assert_eq!(script.read_u32(0, at::INTERRUPT_STATUS), 6);
    over(script)
}

fn memory(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    enable(&mut script);
    let windows: Vec<_> = (0..4).map(|_| sealed(0x4000)).collect();
    let mut address = 0x10_0000;
    for window in &windows {
        let body = dma_map(READ_WRITE, 0x1000, address, 0x2000);
        script.call_with_fds(command::DMA_MAP, &body, &[window.as_fd()]);
        address += 0x2000;
    }
    // It overlaps.
    let body = dma_map(READ_WRITE, 0, 0x10_1000, 0x1000);
    script.call_with_fds(command::DMA_MAP, &body, &[windows[0].as_fd()]);
    windows[0].write_all_at(b"the first window", 0x1100).unwrap();
    transfer(&mut script, 0x10_0100, BUFFER, 16, DEVICE_BUSY);
    // From the end of the second window to the beginning of the third one.
    transfer(&mut script, BUFFER, 0x10_3ff8, 16, DEVICE_BUSY | 2);
    assert_holds(&windows[1], 0x2ff8, b"the firs");
    assert_holds(&windows[2], 0x1000, b"t window");
    script.call(command::DMA_UNMAP, &dma_unmap(0, 0x10_4000, 0x2000));
    windows[2].write_all_at(&[0x77; 0x4000], 0).unwrap();
    transfer(&mut script, BUFFER, 0x10_4000, 16, DEVICE_BUSY | 2);
    assert_holds(&windows[2], 0, &[0x77; 0x4000]);
    transfer(&mut script, BUFFER, 0x10_6000, 16, DEVICE_BUSY | 2);
    assert_holds(&windows[3], 0x1000, b"the first window");
    script.call(command::DMA_UNMAP, &dma_unmap(0, 0x10_4000, 0x2000));
    script.call(command::DMA_UNMAP, &dma_unmap(2, 0, 0));
    transfer(&mut script, BUFFER, 0x10_0000, 16, DEVICE_BUSY | 2);
    assert_holds(&windows[0], 0x1000, &[0; 16]);
    over(script)
}

/// A client that waits for nothing: registers, and memory that comes and goes between them.
fn pipelined(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    enable(&mut script);
    let windows: Vec<_> = (0..4).map(|_| sealed(0x1000)).collect();
    for round in 0..3_u32 {
        let mut commands = Vec::new();
        for step in 0..16_u32 {
            let value = round << 8 | step;
            commands.push((
                command::REGION_WRITE,
                write(0, at::LIVENESS, &value.to_le_bytes()),
                None,
            ));
            let index = step % 4;
            let address = 0x10_0000 + u64::from(index) * 0x1000;
            if step / 4 % 2 == 0 {
                let window = &windows[usize::try_from(index).expect("a few")];
                let body = dma_map(READ_WRITE, 0, address, 0x1000);
                commands.push((command::DMA_MAP, body, Some(window)));
            } else {
                commands.push((command::DMA_UNMAP, dma_unmap(0, address, 0x1000), None));
            }
            commands.push((command::REGION_READ, access(0, at::LIVENESS, 4), None));
        }
        script.call_all_with_fds(&commands);
    }
    // The answers are compared with those of a session that nothing disturbs, and that one is right.
    assert_eq!(script.read_u32(0, at::LIVENESS), !0x20f);
    over(script)
}

/// Guest memory that is not shared: the server asks for it.
fn messages(run: &Supervised) -> Vec<Answer> {
    asked_for(Script::greeted(run.socket(0)))
}

fn twin(run: &Supervised) -> Vec<Answer> {
    asked_for(Script::with_twin(run.socket(0)))
}

fn asked_for(mut script: Script) -> Vec<Answer> {
    script.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, 0x10_0000, 0x4000));
    script.messages = Some((0x10_0000, vec![0; 0x4000]));
    enable(&mut script);
    let msi = EventCounter::new();
    script.set_eventfd(irq::MSI, 0, msi.as_fd());
    let control = capability(&mut script, pci::MSI) + 2;
    script.set_config_u16(control, 1);
    for round in 0..6_u8 {
        let byte = 0x40 + round / 2;
        let (source, destination, command) = if round % 2 == 0 {
            memory_of(&mut script)[0x100..0x110].fill(byte);
            (0x10_0100, BUFFER, DEVICE_BUSY)
        } else {
            (BUFFER, 0x10_2000, DEVICE_BUSY | 2)
        };
        transfer(&mut script, source, destination, 16, command | INTERRUPT_WHEN_DONE);
        script.serve_until(&msi);
        until_done(&mut script);
        script.write_u32(0, at::INTERRUPT_ACKNOWLEDGE, DONE);
        let _ = msi.take();
        if round % 2 == 1 {
            assert_eq!(memory_of(&mut script)[0x2000..0x2010], [byte; 16]);
        }
    }
    over(script)
}

/// A function that is stopped, saved, put back and goes on.
fn stopped(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    enable(&mut script);
    script.write_u32(0, at::LIVENESS, 0x1234_5678);
    go_to(&mut script, migration::STOP_COPY);
    assert_eq!(script.read_u32(0, at::LIVENESS), u32::MAX, "it is stopped");
    let request = Payload::new().u32(8 + 0x1_0000).u32(0x1_0000).done();
    let (.., body, _) = script.call(command::MIG_DATA_READ, &request);
    let saved = body[8..].to_vec();
    assert_eq!(u32_at(body, 4) as usize, saved.len());
    // It has the epoch in it, which moves when somebody else goes on with the function.
    let noted = script.noted() - 1;
    script.forget_after(noted);
    assert!(!saved.is_empty() && saved.len() < 0x1_0000);
    go_to(&mut script, migration::STOP);
    go_to(&mut script, migration::RUNNING);
    script.write_u32(0, at::LIVENESS, 1);
    assert_eq!(script.read_u32(0, at::LIVENESS), !1);
    go_to(&mut script, migration::STOP);
    go_to(&mut script, migration::RUNNING);
    assert_eq!(script.read_u32(0, at::LIVENESS), !1);
    over(script)
}

/// Memory behind a BAR, doorbells, and requests of many bytes.
fn shared(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    described(&mut script);
    script.call(command::GET_REGION_INFO, &region_info(256, 2));
    let memory = File::from(script.fds.pop().expect("the memory behind BAR 2"));
    script.write_u32(CONFIG, pci::BAR0 + 8, 0xfd00_0000);
    enable(&mut script);
    let vectors: Vec<_> = (0..3).map(|_| EventCounter::new()).collect();
    for (vector, counter) in (0..).zip(&vectors) {
        script.set_eventfd(MSIX, vector, counter.as_fd());
    }
    let control = capability(&mut script, 0x11) + 2;
    script.set_config_u16(control, MSIX_ENABLE);
    for vector in [2, 0, 1] {
        // Itself.
        script.write_u32(0, 12, vector);
        // The worker is woken by it.
        wait_for_signal(&vectors[usize::try_from(vector).unwrap()]);
    }
    let pattern: Vec<u8> = (0..100_003_u32).map(|at| (at ^ at >> 8).to_le_bytes()[0]).collect();
    script.call_in_pieces(command::REGION_WRITE, &write(2, 0x1001, &pattern), 10_007);
    assert!(script.read(2, 0x1001, 100_003) == pattern, "the large write");
    assert_holds(&memory, 0x1001, &pattern);
    memory.write_all_at(b"from the guest", 0).unwrap();
    assert_eq!(script.read(2, 0, 14), b"from the guest");
    script.call(command::RESET, &[]);
    assert_holds(&memory, 0x1001, &pattern);
    over(script)
}

/// Offsets in BAR0 of the device that is there for tests.
pub(crate) mod crash {
    /// A read panics.
    pub(crate) const PANIC: u64 = 0;
    /// A read aborts.
    pub(crate) const ABORT: u64 = 8;
    /// A write loops for ever.
    pub(crate) const LOOP: u64 = 16;
    /// A read stops its process.
    pub(crate) const STOP: u64 = 24;
    /// A register.
    pub(crate) const REGISTER: u64 = 32;
    /// Counts writes.
    pub(crate) const COUNT: u64 = 40;
}

/// Writes that are counted: not one is done twice, in whatever form it comes.
fn counted(run: &Supervised) -> Vec<Answer> {
    let mut script = Script::greeted(run.socket(0));
    enable(&mut script);
    for count in 1..8 {
        script.write_u32(0, crash::COUNT, 1);
        assert_eq!(script.read_u32(0, crash::COUNT), count);
    }
    let many = vec![(command::REGION_WRITE, write(0, crash::COUNT, &[1; 4])); 16];
    script.call_all(&many);
    assert_eq!(script.read_u32(0, crash::COUNT), 23);
    for _ in 0..4 {
        script.post(command::REGION_WRITE, &write(0, crash::COUNT, &[1; 4]));
    }
    assert_eq!(script.read_u32(0, crash::COUNT), 27);
    script.call_in_pieces(command::REGION_WRITE, &write(0, crash::COUNT, &[1; 4]), 7);
    assert_eq!(script.read_u32(0, crash::COUNT), 28);
    over(script)
}

fn image(directory: &Path) -> String {
    let path = directory.join("image");
    File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
    format!("virtio-blk,path={}", path.display())
}

fn disk(run: &Supervised) -> Vec<Answer> {
    let image = File::open(run.directory().join("image")).unwrap();
    let mut driver = blk::drive(run, 0, blk::setup());
    let mut load = Load::new(1 << 20, 512, 8);
    load.run(&mut driver, 30);
    load.finish(&mut driver);
    blk::assert_settled(&mut driver, &load);
    load.verify(&image);
    Vec::new()
}

fn over(script: Script) -> Vec<Answer> {
    assert!(script.hears_nothing(), "an answer that nobody waits for");
    script.notes()
}

fn transfer(script: &mut Script, source: u64, destination: u64, count: u64, command: u64) {
    for (offset, value) in [
        (at::DMA_SOURCE, source),
        (at::DMA_DESTINATION, destination),
        (at::DMA_COUNT, count),
        (at::DMA_COMMAND, command),
    ] {
        script.write(0, offset, &value.to_le_bytes());
    }
}

/// Looks until the device is no longer busy, once at most unless somebody dies. How often that is, is
/// not noted.
fn until_done(script: &mut Script) {
    let noted = script.noted();
    let start = Instant::now();
    while script.read(0, at::DMA_COMMAND, 8)[0] & 1 != 0 {
        script.serve_twin();
        assert!(start.elapsed() < Duration::from_secs(20), "the transfer is over");
    }
    script.forget_after(noted);
}

fn memory_of(script: &mut Script) -> &mut Vec<u8> {
    &mut script.messages.as_mut().expect("a session with messages").1
}

fn go_to(script: &mut Script, state: u32) {
    let flags = feature::SET | feature::STATE;
    let body = Payload::new().u32(16).u32(flags).u32(state).u32(0).done();
    script.call(command::DEVICE_FEATURE, &body);
}

fn capability(script: &mut Script, id: u8) -> u64 {
    let mut at = script.read(CONFIG, pci::CAPABILITIES_POINTER, 1)[0];
    while at != 0 {
        let [this, next] = script.config_u16(at.into()).to_le_bytes();
        if this == id {
            return at.into();
        }
        at = next;
    }
    unreachable!("the function has no capability {id:#x}")
}

fn wait_for_signal(counter: &EventCounter) {
    assert!(counter.wait(), "no signal");
}
