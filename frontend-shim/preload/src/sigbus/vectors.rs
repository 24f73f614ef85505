use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::OnceLock;

use barkeep_shim::x86::VectorFile;

use super::frame::Area;

/// CPUID leaf that tells where XSAVE puts components, and in which sub-leaf.
const LEAF: u32 = 0xd;
/// State components, by bit (Intel SDM volume 1, 13.1).
const SSE: u32 = 1;
const AVX: u32 = 2;
const OPMASK: u32 = 5;
const ZMM_HIGH: u32 = 6;
const ZMM_UPPER: u32 = 7;
/// XMM0 to XMM15, in FXSAVE's area.
const XMM: Range<usize> = 160..416;
/// XSTATE_BV and XCOMP_BV, in XSAVE's header (13.4.2).
const IN_USE: usize = 512;
const COMPACTED: usize = 520;

/// Where XSAVE puts the components of vector registers; `None` for those that the processor lacks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    avx: Option<usize>,
    opmask: Option<usize>,
    zmm_high: Option<usize>,
    zmm_upper: Option<usize>,
}

static LAYOUT: OnceLock<Layout> = OnceLock::new();

/// Asks the processor, which the handler could not do at this price: a hypervisor may have to answer.
pub(super) fn learn_layout() {
    LAYOUT.get_or_init(|| {
        let offset = |component| {
            let answer = __cpuid_count(LEAF, component);
            usize::try_from(answer.ebx).ok().filter(|_| answer.eax != 0)
        };
        let known = __cpuid_count(0, 0).eax >= LEAF;
        let component = |number| known.then(|| offset(number)).flatten();
        Layout {
            avx: component(AVX),
            opmask: component(OPMASK),
            zmm_high: component(ZMM_HIGH),
            zmm_upper: component(ZMM_UPPER),
        }
    });
}

/// The vector registers of an interrupted thread, and which of them were changed.
#[derive(Debug)]
pub(super) struct FrameVectors {
    registers: [[u8; 64]; 32],
    masks: [u64; 8],
    changed: u32,
    /// How much of a register there is, in bytes.
    width: usize,
    layout: Layout,
}

/// What registers are made of: a component and its part of each register.
struct Part {
    component: u32,
    /// Where the component is.
    place: Range<usize>,
    /// The registers that it has, and their bytes.
    registers: Range<usize>,
    bytes: Range<usize>,
}

impl FrameVectors {
    /// `None` where they can't be known.
    pub(super) fn load(area: &Area<'_>) -> Option<Self> {
        if area.bytes.len() > COMPACTED && quad(area.bytes, COMPACTED)? != 0 {
            return None;
        }
        let found = *LAYOUT.get()?;
        let has = |component: u32| area.features >> component & 1 != 0;
        let avx = found.avx.filter(|_| has(AVX));
        let whole = avx.is_some() && has(OPMASK) && has(ZMM_HIGH) && has(ZMM_UPPER);
        let layout = Layout {
            avx,
            opmask: found.opmask.filter(|_| whole),
            zmm_high: found.zmm_high.filter(|_| whole),
            zmm_upper: found.zmm_upper.filter(|_| whole),
        };
        let width = match layout {
            Layout { opmask: Some(_), zmm_high: Some(_), zmm_upper: Some(_), .. } => 64,
            Layout { avx: Some(_), .. } => 32,
            _ => 16,
        };
        let mut vectors =
            Self { registers: [[0; 64]; 32], masks: [0; 8], changed: 0, width, layout };
        for part in vectors.parts().into_iter().flatten() {
            let Part { component, place, registers, bytes } = part;
            let saved = area.bytes.get(place)?;
            // Not in use means zero, whatever is there.
            if is_in_use(area, component) {
                for (register, value) in registers.zip(saved.chunks_exact(bytes.len())) {
                    vectors.registers[register][bytes.clone()].copy_from_slice(value);
                }
            }
        }
        if let Some(start) = layout.opmask.filter(|_| is_in_use(area, OPMASK)) {
            for (mask, at) in vectors.masks.iter_mut().zip((start..).step_by(8)) {
                *mask = quad(area.bytes, at)?;
            }
        }
        Some(vectors)
    }

    /// Writes back what was changed.
    pub(super) fn store(&self, area: &mut Area<'_>) {
        for part in self.parts().into_iter().flatten() {
            let Part { component, place, registers, bytes } = part;
            let is_changed = |register: &usize| self.changed >> register & 1 != 0;
            let mut values = registers.clone().filter(is_changed);
            let used = is_in_use(area, component);
            if !used && values.all(|register| is_zero(&self.registers[register][bytes.clone()])) {
                continue;
            }
            let Some(saved) = area.bytes.get_mut(place) else { continue };
            if !used {
                saved.fill(0);
            }
            for (register, value) in registers.zip(saved.chunks_exact_mut(bytes.len())) {
                if is_changed(&register) {
                    value.copy_from_slice(&self.registers[register][bytes.clone()]);
                }
            }
            set_in_use(area, component);
        }
    }

    fn parts(&self) -> [Option<Part>; 4] {
        let at = |start: usize, len| start..start + len;
        let part = |component, place, registers, bytes| Part { component, place, registers, bytes };
        [
            Some(part(SSE, XMM, 0..16, 0..16)),
            self.layout.avx.map(|start| part(AVX, at(start, 256), 0..16, 16..32)),
            self.layout.zmm_high.map(|start| part(ZMM_HIGH, at(start, 512), 0..16, 32..64)),
            self.layout.zmm_upper.map(|start| part(ZMM_UPPER, at(start, 1024), 16..32, 0..64)),
        ]
    }

    fn count(&self) -> usize {
        if self.width == 64 { 32 } else { 16 }
    }
}

impl VectorFile for FrameVectors {
    fn get(&self, number: usize) -> Option<&[u8]> {
        Some(&self.registers.get(..self.count())?.get(number)?[..self.width])
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut [u8]> {
        let count = self.count();
        let register = self.registers.get_mut(..count)?.get_mut(number)?;
        self.changed |= 1 << number;
        Some(&mut register[..self.width])
    }

    fn mask(&self, number: usize) -> Option<u64> {
        self.masks.get(number).copied().filter(|_| self.width == 64)
    }
}

fn is_in_use(area: &Area<'_>, component: u32) -> bool {
    // Without a header, FXSAVE's area is all there is, and in use.
    quad(area.bytes, IN_USE).is_none_or(|bits| bits >> component & 1 != 0)
}

fn set_in_use(area: &mut Area<'_>, component: u32) {
    if let Some(bits) = quad(area.bytes, IN_USE) {
        let bits = bits | 1 << component;
        area.bytes[IN_USE..IN_USE + 8].copy_from_slice(&bits.to_le_bytes());
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn quad(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}
