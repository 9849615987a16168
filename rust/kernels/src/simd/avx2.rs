//! The AVX2 + FMA level: a logical vector of 16 lanes is two registers of 8.
#![allow(unsafe_code)]
#![allow(
    clippy::wildcard_imports,
    reason = "the intrinsics, of which this file is made"
)]

use std::arch::x86_64::*;

use super::{LANES, Registers, Simd};

/// Proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU must have AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Sliding window: 8 lanes from index `8 - n` are `n` set lanes followed by clear ones.
static WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Mask of the first `n` (at most 8) of 8 lanes.
#[inline(always)]
fn first8(_: Avx2, n: usize) -> __m256i {
    let window: &[i32] = &WINDOW[8 - n.min(8)..][..8];
    // SAFETY: the token proves AVX2; the slice has 8 elements.
    unsafe { _mm256_loadu_si256(window.as_ptr().cast()) }
}

#[inline(always)]
fn sum4(_: Avx2, a: __m128) -> f32 {
    // SAFETY: the token proves AVX2, which includes SSE.
    unsafe {
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
    }
}

/// Transposes a square of 8 x 8.
#[inline(always)]
fn transpose8(_: Avx2, rows: [__m256; 8]) -> [__m256; 8] {
    let mut a = rows;
    let mut b = rows;
    // SAFETY: the token proves AVX2.
    unsafe {
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..2 {
            a[4 * i] = _mm256_shuffle_ps::<0x44>(b[4 * i], b[4 * i + 2]);
            a[4 * i + 1] = _mm256_shuffle_ps::<0xee>(b[4 * i], b[4 * i + 2]);
            a[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b[4 * i + 1], b[4 * i + 3]);
            a[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b[4 * i + 1], b[4 * i + 3]);
        }
        for i in 0..4 {
            b[i] = _mm256_permute2f128_ps::<0x20>(a[i], a[i + 4]);
            b[i + 4] = _mm256_permute2f128_ps::<0x31>(a[i], a[i + 4]);
        }
    }
    b
}

impl Simd for Avx2 {
    type F = (__m256, __m256);
    type U = (__m256i, __m256i);
    type M = (__m256, __m256);
    type D = (__m256d, __m256d, __m256d, __m256d);

    const REGISTERS: Registers = Registers::Narrow;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token proves AVX2.
        let v = unsafe { _mm256_set1_ps(x) };
        (v, v)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: the token proves AVX2; 16 elements are readable.
        unsafe {
            (
                _mm256_loadu_ps(x.as_ptr()),
                _mm256_loadu_ps(x.as_ptr().add(8)),
            )
        }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX2; 16 elements are writable.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x.1);
        }
    }
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> Self::F {
        let n = x.len();
        assert!(n < LANES);
        let p = x.as_ptr();
        // SAFETY: the token proves AVX2; a masked load touches only the lanes that are set, the first n in all. The
        // second address is computed inside or one past the slice.
        unsafe {
            (
                _mm256_maskload_ps(p, first8(self, n)),
                _mm256_maskload_ps(p.add(n.min(8)), first8(self, n.saturating_sub(8))),
            )
        }
    }
    #[inline(always)]
    fn store_partial(self, x: Self::F, out: &mut [f32]) {
        let n = out.len();
        assert!(n < LANES);
        let p = out.as_mut_ptr();
        // SAFETY: as for `load_partial`.
        unsafe {
            _mm256_maskstore_ps(p, first8(self, n), x.0);
            _mm256_maskstore_ps(p.add(n.min(8)), first8(self, n.saturating_sub(8)), x.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_sqrt_ps(a.0), _mm256_sqrt_ps(a.1)) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token proves FMA.
        unsafe {
            (
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token proves FMA.
        unsafe {
            (
                _mm256_fnmadd_ps(a.0, b.0, c.0),
                _mm256_fnmadd_ps(a.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_round_ps::<NEAREST>(a.0),
                _mm256_round_ps::<NEAREST>(a.1),
            )
        }
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::F, n: Self::F) -> Self::F {
        #[inline(always)]
        fn half(_: Avx2, a: __m256, n: __m256) -> __m256 {
            // SAFETY: the token proves AVX2. Two exact powers of two: only the second product can round.
            unsafe {
                let n = _mm256_cvtps_epi32(n);
                let half = _mm256_srai_epi32::<1>(n);
                let rest = _mm256_sub_epi32(n, half);
                let bias = _mm256_set1_epi32(127);
                let first =
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
                let second =
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
                _mm256_mul_ps(_mm256_mul_ps(a, first), second)
            }
        }
        (half(self, a.0, n.0), half(self, a.1, n.1))
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0),
                _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1),
            )
        }
    }
    #[inline(always)]
    fn equal(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_cmp_ps::<_CMP_EQ_OQ>(a.0, b.0),
                _mm256_cmp_ps::<_CMP_EQ_OQ>(a.1, b.1),
            )
        }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_blendv_ps(b.0, a.0, m.0),
                _mm256_blendv_ps(b.1, a.1, m.1),
            )
        }
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::M {
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_castsi256_ps(first8(self, n)),
                _mm256_castsi256_ps(first8(self, n.saturating_sub(8))),
            )
        }
    }
    #[inline(always)]
    fn all(self, m: Self::M) -> bool {
        // SAFETY: the token proves AVX2.
        unsafe { _mm256_movemask_ps(_mm256_and_ps(m.0, m.1)) == 0xff }
    }

    #[inline(always)]
    fn splat_u(self, x: u32) -> Self::U {
        // SAFETY: the token proves AVX2.
        let v = unsafe { _mm256_set1_epi32(x as i32) };
        (v, v)
    }
    #[inline(always)]
    fn lane_index(self) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe {
            (
                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15),
            )
        }
    }
    #[inline(always)]
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_mullo_epi32(a.0, b.0), _mm256_mullo_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    fn and_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_and_si256(a.0, b.0), _mm256_and_si256(a.1, b.1)) }
    }
    #[inline(always)]
    fn or_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)) }
    }
    #[inline(always)]
    fn xor_u(self, a: Self::U, b: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_xor_si256(a.0, b.0), _mm256_xor_si256(a.1, b.1)) }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::U) -> Self::U {
        // SAFETY: the token proves AVX2. The count becomes an immediate after inlining.
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            (_mm256_srl_epi32(a.0, count), _mm256_srl_epi32(a.1, count))
        }
    }
    #[inline(always)]
    fn not_less_u(self, a: Self::U, b: Self::U) -> Self::M {
        #[inline(always)]
        fn half(_: Avx2, a: __m256i, b: __m256i) -> __m256 {
            // SAFETY: the token proves AVX2. a >= b exactly where the larger of the two is a.
            unsafe { _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a)) }
        }
        (half(self, a.0, b.0), half(self, a.1, b.1))
    }
    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::U {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_castps_si256(a.0), _mm256_castps_si256(a.1)) }
    }
    #[inline(always)]
    fn float_of_bits(self, a: Self::U) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_castsi256_ps(a.0), _mm256_castsi256_ps(a.1)) }
    }
    #[inline(always)]
    fn to_float(self, a: Self::U) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe { (_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)) }
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        // Four squares of 8 x 8, those off the diagonal swapped.
        let mut out = rows;
        for half in 0..2 {
            let mut left = [rows[0].0; 8];
            let mut right = [rows[0].0; 8];
            for i in 0..8 {
                (left[i], right[i]) = rows[8 * half + i];
            }
            (left, right) = (transpose8(self, left), transpose8(self, right));
            for i in 0..8 {
                if half == 0 {
                    (out[i].0, out[8 + i].0) = (left[i], right[i]);
                } else {
                    (out[i].1, out[8 + i].1) = (left[i], right[i]);
                }
            }
        }
        out
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // SAFETY: the token proves AVX2.
        let four = unsafe {
            let eight = _mm256_add_ps(a.0, a.1);
            _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            )
        };
        sum4(self, four)
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let eight = _mm256_max_ps(a.0, a.1);
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
        // SAFETY: the token proves AVX2.
        let zero = unsafe { _mm256_setzero_pd() };
        (zero, zero, zero, zero)
    }
    #[inline(always)]
    fn add_square(self, acc: Self::D, x: Self::F) -> Self::D {
        #[inline(always)]
        fn quarter(_: Avx2, acc: __m256d, x: __m128) -> __m256d {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe {
                let x = _mm256_cvtps_pd(x);
                _mm256_fmadd_pd(x, x, acc)
            }
        }
        // SAFETY: the token proves AVX2.
        let (x0, x1, x2, x3) = unsafe {
            (
                _mm256_castps256_ps128(x.0),
                _mm256_extractf128_ps::<1>(x.0),
                _mm256_castps256_ps128(x.1),
                _mm256_extractf128_ps::<1>(x.1),
            )
        };
        (
            quarter(self, acc.0, x0),
            quarter(self, acc.1, x1),
            quarter(self, acc.2, x2),
            quarter(self, acc.3, x3),
        )
    }
    #[inline(always)]
    fn sum_d(self, a: Self::D) -> f64 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let four = _mm256_add_pd(_mm256_add_pd(a.0, a.2), _mm256_add_pd(a.1, a.3));
            let two = _mm_add_pd(
                _mm256_castpd256_pd128(four),
                _mm256_extractf128_pd::<1>(four),
            );
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
}
