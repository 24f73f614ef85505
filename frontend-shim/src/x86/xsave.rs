//! Vector registers in the memory image of XSAVE, standard format (Intel SDM volume 1, 13.4).
//!
//! Offsets are CPUID's: leaf 0xd has a subleaf for each component.

use std::ops::Range;

use super::Vectors;

/// Images are no longer than this, in bytes.
const IMAGE: usize = 4096;
/// XMM0 to XMM15, 16 bytes each, in the legacy region.
const XMM: usize = 160;
/// Byte of the header that tells which components are not as after a reset.
const IN_USE: usize = 512;
/// Components 1 and 2: XMM, and the upper halves of YMM.
const SSE: u8 = 1 << 1;
const AVX: u8 = 1 << 2;

/// Where the components of extended state are, each if the processor has it.
#[derive(Debug, Clone, Default)]
pub struct XsaveLayout {
    /// Upper halves of YMM0 to YMM15.
    ymm_high: Option<usize>,
    /// Mask registers.
    opmask: Option<usize>,
    /// Upper halves of ZMM0 to ZMM15.
    zmm_high: Option<usize>,
    /// ZMM16 to ZMM31.
    zmm_upper: Option<usize>,
}

/// What leaf 0xd of CPUID tells of a component of extended state.
#[derive(Debug, Clone, Copy, Default)]
pub struct XsaveComponent {
    /// In bytes: EAX of the component's subleaf. 0 for a component that the processor has not.
    pub size: u32,
    /// Where it begins in the image, in bytes: EBX.
    pub offset: u32,
}

impl XsaveLayout {
    /// The layout of a processor that has these components. `component` is given a component's number,
    /// which is that of its subleaf.
    #[must_use]
    pub fn new(component: impl Fn(u32) -> XsaveComponent) -> XsaveLayout {
        let offset = |number, least: u32| {
            let XsaveComponent { size, offset } = component(number);
            let offset = usize::try_from(offset).ok()?;
            (size >= least && offset <= IMAGE - least as usize).then_some(offset)
        };
        XsaveLayout {
            ymm_high: offset(2, 256),
            opmask: offset(5, 64),
            zmm_high: offset(6, 512),
            zmm_upper: offset(7, 1024),
        }
    }
}

/// The image of one virtual CPU.
#[derive(Debug, Clone)]
pub struct XsaveImage {
    bytes: Vec<u8>,
    layout: XsaveLayout,
}

impl XsaveImage {
    /// From what XSAVE, or `KVM_GET_XSAVE`, has written.
    #[must_use]
    pub fn new(mut bytes: Vec<u8>, layout: &XsaveLayout) -> XsaveImage {
        bytes.resize(IMAGE, 0);
        XsaveImage { bytes, layout: layout.clone() }
    }

    /// Vector register `number`, zero where the processor has less of it; `None` for one it has not.
    #[must_use]
    pub fn vector(&self, number: usize) -> Option<[u8; 64]> {
        let mut value = [0; 64];
        if number >= 16 {
            let start = self.layout.zmm_upper? + 64 * (number - 16);
            value.copy_from_slice(self.bytes.get(start..start + 64)?);
            return Some(value);
        }
        let mut part = |target: Range<usize>, base: Option<usize>| {
            if let Some(base) = base {
                let start = base + number * target.len();
                value[target.clone()].copy_from_slice(&self.bytes[start..start + target.len()]);
            }
        };
        part(0..16, Some(XMM));
        part(16..32, self.layout.ymm_high);
        part(32..64, self.layout.zmm_high);
        Some(value)
    }

    /// The first 32 bytes of the first 16 registers.
    pub(crate) fn vectors(&self) -> Vectors {
        Vectors(std::array::from_fn(|number| {
            let mut low = [0; 32];
            if let Some(value) = self.vector(number) {
                low.copy_from_slice(&value[..32]);
            }
            low
        }))
    }

    /// Changes the first 32 bytes of the first 16 registers, and clears the rest of one of them.
    pub(crate) fn set_vectors(&mut self, vectors: &Vectors, cleared: Option<usize>) {
        self.bytes[IN_USE] |= SSE;
        for (number, value) in vectors.0.iter().enumerate() {
            let start = XMM + 16 * number;
            self.bytes[start..start + 16].copy_from_slice(&value[..16]);
        }
        if let Some(base) = self.layout.ymm_high {
            self.bytes[IN_USE] |= AVX;
            for (number, value) in vectors.0.iter().enumerate() {
                let start = base + 16 * number;
                self.bytes[start..start + 16].copy_from_slice(&value[16..]);
            }
        }
        if let (Some(base), Some(number @ 0..16)) = (self.layout.zmm_high, cleared) {
            self.bytes[base + 32 * number..][..32].fill(0);
        }
    }

    /// The whole image.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Mask register `number`.
    #[must_use]
    pub fn mask(&self, number: usize) -> Option<u64> {
        let start = self.layout.opmask? + 8 * number;
        let bytes = self.bytes.get(start..start + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number, offset and size of each component.
    type Components<'a> = &'a [(u32, u32, u32)];

    /// Byte n of the image is n modulo 251.
    fn image(components: Components<'_>) -> XsaveImage {
        let layout = XsaveLayout::new(|number| {
            let found = components.iter().find(|(component, ..)| *component == number);
            let (_, offset, size) = found.copied().unwrap_or_default();
            XsaveComponent { size, offset }
        });
        XsaveImage::new((0..IMAGE).map(pattern).collect(), &layout)
    }

    fn pattern(at: usize) -> u8 {
        u8::try_from(at % 251).unwrap()
    }

    fn bytes(parts: &[(usize, usize)]) -> [u8; 64] {
        let mut bytes = parts.iter().flat_map(|(at, len)| (*at..at + len).map(pattern));
        std::array::from_fn(|_| bytes.next().unwrap_or(0))
    }

    #[test]
    fn registers_are_put_together_from_the_components_there_are() {
        let avx512 = image(&[(2, 576, 256), (5, 832, 64), (6, 896, 512), (7, 1408, 1024)]);
        let zmm3 = bytes(&[(160 + 48, 16), (576 + 48, 16), (896 + 96, 32)]);
        assert_eq!(avx512.vector(3), Some(zmm3));
        assert_eq!(avx512.vector(15).unwrap()[32..], bytes(&[(896 + 480, 32)])[..32]);
        assert_eq!(avx512.vector(17), Some(bytes(&[(1408 + 64, 64)])));
        assert_eq!(avx512.mask(2).unwrap().to_le_bytes(), bytes(&[(832 + 16, 8)])[..8]);

        let sse = image(&[]);
        assert_eq!(sse.vector(3), Some(bytes(&[(160 + 48, 16)])));
        assert_eq!((sse.vector(16), sse.mask(0)), (None, None));
    }

    #[test]
    fn a_component_past_the_end_of_the_image_is_not_there() {
        let image = image(&[(5, 4090, 64), (7, u32::MAX, 1024)]);
        assert_eq!((image.vector(31), image.mask(7)), (None, None));
    }
}
