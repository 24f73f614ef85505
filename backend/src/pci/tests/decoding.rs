//! BARs of every size, and what a function claims when nobody writes its Command register.

use super::*;

fn always() -> Function {
    Function::new(FunctionSpec { decode: Decoding::Always, ..everything_spec() }).unwrap()
}

#[test]
fn every_size_of_bar_is_placed_and_claimed() {
    let small = (4..=12).map(|log2| memory32(BarIndex::BAR0, 1 << log2));
    let wide = (4..=12).map(|log2| memory64(BarIndex::BAR2, 1 << log2));
    let ports = (2..=8).map(|log2| io(BarIndex::BAR5, 1 << log2));
    for bar in small.chain(wide).chain(ports) {
        let spec = FunctionSpec { bars: vec![bar], ..FunctionSpec::new(IDS) };
        let mut function = Function::new(spec).unwrap();
        let offset = spec::header::BAR0 + 4 * usize::from(bar.index);
        let address = 0xc000_0000 + bar.size;
        let effects = function.config_write(offset, &u32::try_from(address).unwrap().to_le_bytes());
        assert!(effects.bars_moved.contains(bar.index), "{bar:?}");
        let placed = function.bar(bar.index).unwrap();
        assert_eq!((placed.address, placed.size), (address, bar.size));
        assert_eq!(placed.last_address(), address + bar.size - 1);

        let io = bar.kind == BarKind::Io;
        let enable = if io { Command::IO_SPACE } else { Command::MEMORY_SPACE };
        let effects = command(&mut function, enable);
        assert_eq!(effects.decode, Some(Decode { memory: !io, io, rom: false }), "{bar:?}");
        assert!(function.claims(bar.index));
        let pieces: Vec<_> = function.bar_pieces(bar.index, 0, 0x2000).collect();
        let whole = 0..usize::try_from(bar.size).unwrap();
        assert_eq!(pieces, [BarPiece { owner: BarOwner::Device, offset: 0, data: whole }]);
    }
}

#[test]
fn decode_always_stands_in_for_the_command_register() {
    let mut function = always();
    assert_eq!(function.decode(), Decode { memory: true, io: true, rom: false });
    assert!(function.bus_master() && function.claims(BarIndex::BAR0));
    for bits in [0x0000, 0xffff, 0x0007] {
        let effects = write16(&mut function, spec::header::COMMAND, bits);
        assert_eq!((effects.decode, effects.bus_master), (None, None));
        assert_eq!(read16(&function, spec::header::COMMAND), bits & Command::all().bits());
    }
    assert_eq!(function.epoch(), 0);
    let _ = write16(&mut function, spec::header::COMMAND, 0);

    // Messages too, and the ROM once it is enabled.
    let msix = EVERYTHING_MSIX + spec::msix::MESSAGE_CONTROL;
    let _ = write16(&mut function, msix, spec::msix::CONTROL_ENABLE);
    let _ = function.msix_table_write(12, &[0]);
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
    let effects = write8(&mut function, spec::header::EXPANSION_ROM, 1);
    assert_eq!(effects.decode, Some(Decode { memory: true, io: true, rom: true }));

    // But not the pin: Interrupt Disable is no enable.
    let _ = write16(&mut function, msix, 0);
    let _ = function.set_intx(true);
    let effects = command(&mut function, Command::INTERRUPT_DISABLE);
    assert_eq!(effects.intx, Some(false));
}

#[test]
fn decode_always_ends_in_d3hot() {
    let mut function = always();
    let effects = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert_eq!(effects.decode, Some(Decode::default()));
    assert_eq!(effects.bus_master, Some(false));
    assert!(!function.claims(BarIndex::BAR0));
    let effects = write8(&mut function, PM + spec::power::PMCSR, 0);
    assert_eq!(effects.decode, Some(Decode { memory: true, io: true, rom: false }));
}

#[test]
fn decode_always_claims_no_space_without_bars() {
    let spec = FunctionSpec { decode: Decoding::Always, ..FunctionSpec::new(IDS) };
    let function = Function::new(spec).unwrap();
    assert_eq!(function.decode(), Decode::default());
    assert!(function.bus_master());
}
