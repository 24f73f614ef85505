//! State of vector registers that a thread has not used, which the kernel may leave out.

use barkeep_shim::x86::VectorFile;

use super::super::frame::Area;
use super::super::vectors::{FrameVectors, learn_layout};
use super::machine::widest;

/// XSTATE_BV.
const IN_USE: usize = 512;
/// All components of vector registers, and x87.
const FEATURES: u64 = 0b1110_0111;

/// An image full of what nobody wrote, of which `in_use` is valid.
fn image(in_use: u64) -> Vec<u8> {
    let mut bytes = vec![0xa5; 4096];
    bytes[IN_USE..IN_USE + 8].copy_from_slice(&in_use.to_le_bytes());
    bytes[IN_USE + 8..IN_USE + 64].fill(0);
    bytes
}

fn load(bytes: &mut [u8], features: u64) -> Option<FrameVectors> {
    learn_layout();
    FrameVectors::load(&Area { bytes, features })
}

#[test]
fn what_is_not_in_use_is_zero_and_stays_so_around_what_changes() {
    let mut bytes = image(1);
    let mut vectors = load(&mut bytes, FEATURES).unwrap();
    let width = widest();
    assert_eq!(vectors.get(15), Some(&[0; 64][..width]));
    vectors.get_mut(3).unwrap().fill(7);
    vectors.store(&mut Area { bytes: &mut bytes, features: FEATURES });

    let after = load(&mut bytes, FEATURES).unwrap();
    assert_eq!(after.get(3), Some(&[7; 64][..width]));
    for other in [0, 2, 4, 15] {
        assert_eq!(after.get(other), Some(&[0; 64][..width]), "register {other}");
    }
    // SSE, AVX, ZMM_HIGH; what has no register that changed is as before.
    let in_use = match width {
        64 => 0b100_0111,
        32 => 0b111,
        _ => 0b11,
    };
    assert_eq!(bytes[IN_USE], in_use);
}

#[test]
fn what_becomes_zero_need_not_be_in_use() {
    let mut bytes = image(0b11);
    let mut vectors = load(&mut bytes, FEATURES).unwrap();
    vectors.get_mut(3).unwrap().fill(0);
    vectors.store(&mut Area { bytes: &mut bytes, features: FEATURES });
    assert_eq!(bytes[IN_USE], 0b11);
    let after = load(&mut bytes, FEATURES).unwrap();
    assert_eq!(after.get(3).unwrap()[..16], [0; 16]);
    assert_eq!(after.get(4).unwrap()[..16], [0xa5; 16]);
}

#[test]
fn only_what_the_kernel_saved_is_known() {
    let mut bytes = image(0b1110_0111);
    assert_eq!(load(&mut bytes, 0b11).unwrap().get(0).unwrap().len(), 16);
    assert_eq!(load(&mut bytes, 0b11).unwrap().mask(1), None);
    if widest() >= 32 {
        // Without the mask registers, there is no AVX-512.
        assert_eq!(load(&mut bytes, 0b1100_0111).unwrap().get(0).unwrap().len(), 32);
        // It says that there is more than the area has room for.
        assert!(load(&mut bytes[..600], 0b111).is_none());
    }
    // FXSAVE's area alone.
    assert_eq!(load(&mut bytes[..512], 0).unwrap().get(0), Some(&[0xa5; 16][..]));
    // XCOMP_BV: a format that no frame has.
    bytes[IN_USE + 15] = 0x80;
    assert!(load(&mut bytes, 0b11).is_none());
}
