//! The AVX-512 level (F, BW, DQ, VL): a logical vector is one register.
#![allow(unsafe_code)]
#![allow(
    clippy::wildcard_imports,
    reason = "the intrinsics, of which this file is made"
)]

use std::arch::x86_64::*;

use super::{LANES, Registers, Simd};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU must have AVX-512 F, BW, DQ and VL, AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Bit mask of the first `n` of 16 lanes.
#[inline(always)]
fn bits_of_first(n: usize) -> __mmask16 {
    ((1_u32 << n.min(LANES)) - 1) as __mmask16
}

impl Simd for Avx512 {
    type F = __m512;
    type U = __m512i;
    type M = __mmask16;
    type D = (__m512d, __m512d);

    const REGISTERS: Registers = Registers::Wide;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: the token proves AVX-512; 16 elements are readable.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX-512; 16 elements are writable.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> Self::F {
        assert!(x.len() < LANES);
        // SAFETY: the token proves AVX-512; only the lanes of the slice are touched.
        unsafe { _mm512_maskz_loadu_ps(bits_of_first(x.len()), x.as_ptr()) }
    }
    #[inline(always)]
    fn store_partial(self, x: Self::F, out: &mut [f32]) {
        assert!(out.len() < LANES);
        // SAFETY: the token proves AVX-512; only the lanes of the slice are touched.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), bits_of_first(out.len()), x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::F, n: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn equal(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::M {
        bits_of_first(n)
    }
    #[inline(always)]
    fn all(self, m: Self::M) -> bool {
        m == __mmask16::MAX
    }

    #[inline(always)]
    fn splat_u(self, x: u32) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_set1_epi32(x as i32) }
    }
    #[inline(always)]
    fn lane_index(self) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) }
    }
    #[inline(always)]
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn mul_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_mullo_epi32(a, b) }
    }
    #[inline(always)]
    fn and_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn xor_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::U) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_srli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn not_less_u(self, a: Self::U, b: Self::U) -> Self::M {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_cmpge_epu32_mask(a, b) }
    }
    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::U {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_castps_si512(a) }
    }
    #[inline(always)]
    fn float_of_bits(self, a: Self::U) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_castsi512_ps(a) }
    }
    #[inline(always)]
    fn to_float(self, a: Self::U) -> Self::F {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut a = rows;
        let mut b = rows;
        // SAFETY: the token proves AVX-512.
        unsafe {
            // Pairs of rows interleaved, then pairs of pairs: quarters of 4 x 4 are transposed.
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                a[4 * i] = _mm512_shuffle_ps::<0x44>(b[4 * i], b[4 * i + 2]);
                a[4 * i + 1] = _mm512_shuffle_ps::<0xee>(b[4 * i], b[4 * i + 2]);
                a[4 * i + 2] = _mm512_shuffle_ps::<0x44>(b[4 * i + 1], b[4 * i + 3]);
                a[4 * i + 3] = _mm512_shuffle_ps::<0xee>(b[4 * i + 1], b[4 * i + 3]);
            }
            // Quarters gathered: first from rows 0-7 and 8-15, then across.
            for i in 0..4 {
                b[i] = _mm512_shuffle_f32x4::<0x88>(a[i], a[i + 4]);
                b[i + 4] = _mm512_shuffle_f32x4::<0xdd>(a[i], a[i + 4]);
                b[i + 8] = _mm512_shuffle_f32x4::<0x88>(a[i + 8], a[i + 12]);
                b[i + 12] = _mm512_shuffle_f32x4::<0xdd>(a[i + 8], a[i + 12]);
            }
            for i in 0..8 {
                a[i] = _mm512_shuffle_f32x4::<0x88>(b[i], b[i + 8]);
                a[i + 8] = _mm512_shuffle_f32x4::<0xdd>(b[i], b[i + 8]);
            }
        }
        a
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // SAFETY: the token proves AVX-512 and AVX2.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        // SAFETY: the token proves AVX-512 and AVX2.
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn zero_d(self) -> Self::D {
        // SAFETY: the token proves AVX-512.
        let zero = unsafe { _mm512_setzero_pd() };
        (zero, zero)
    }
    #[inline(always)]
    fn add_square(self, acc: Self::D, x: Self::F) -> Self::D {
        // SAFETY: the token proves AVX-512.
        unsafe {
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x));
            (
                _mm512_fmadd_pd(low, low, acc.0),
                _mm512_fmadd_pd(high, high, acc.1),
            )
        }
    }
    #[inline(always)]
    fn sum_d(self, a: Self::D) -> f64 {
        // SAFETY: the token proves AVX-512 and AVX2.
        unsafe {
            let eight = _mm512_add_pd(a.0, a.1);
            let four = _mm256_add_pd(
                _mm512_castpd512_pd256(eight),
                _mm512_extractf64x4_pd::<1>(eight),
            );
            let two = _mm_add_pd(
                _mm256_castpd256_pd128(four),
                _mm256_extractf128_pd::<1>(four),
            );
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
}
