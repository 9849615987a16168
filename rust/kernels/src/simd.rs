//! Sixteen logical lanes of f32 at every instruction level.
//!
//! Kernels are written once, generic over [`Simd`], and instantiated by [`dispatch!`] inside a function that has the
//! level's target features. The logical width is 16 everywhere (one 512-bit register, two 256-bit registers, or an
//! array), and reductions follow one fixed tree, so that the AVX2 and AVX-512 levels give the same bits. The portable
//! level rounds the product of a multiply-add separately where the machine has no fused instruction to rely on.
//!
//! A value of an implementing type is a token: it can only be made where the CPU has the instructions, which is what
//! makes the methods safe to call.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::{Portable, multiply_add};

/// Number of logical lanes at every level.
pub(crate) const LANES: usize = 16;

/// How many accumulators a register-blocked loop may hold: rows times vectors of 16 lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Registers {
    /// Room for 6 rows of 4 vectors (32 registers of 512 bits).
    Wide,
    /// Room for 6 rows of 1 vector (16 registers of 256 bits).
    Narrow,
    /// Room for 2 rows of 1 vector (16 registers of 128 bits).
    Small,
}

/// Operations on 16 lanes. `F` are 16 f32, `U` 16 u32, `M` a mask of 16 lanes, `D` 16 f64.
///
/// `min` and `max` follow x86: where an operand is NaN, or both are zero, the second one is returned.
pub(crate) trait Simd: Copy + Send + Sync {
    /// 16 lanes of f32.
    type F: Copy;
    /// 16 lanes of u32.
    type U: Copy;
    /// 16 truth values.
    type M: Copy;
    /// 16 lanes of f64.
    type D: Copy;

    /// Room for accumulators.
    const REGISTERS: Registers;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    /// Loads fewer than 16 values; the other lanes are +0.
    fn load_partial(self, x: &[f32]) -> Self::F;
    /// Stores the first `out.len()` (fewer than 16) lanes.
    fn store_partial(self, x: Self::F, out: &mut [f32]);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn sqrt(self, a: Self::F) -> Self::F;
    /// `a * b + c`, one rounding where the level fuses.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a * b`, one rounding where the level fuses.
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Nearest integer, ties to even, for |a| < 2^22 (any value where the level has the instruction).
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` with one rounding, for integral n in [-252, 254] and 0.5 <= |a| < 2, or any a that is NaN.
    fn scale_by_power(self, a: Self::F, n: Self::F) -> Self::F;

    /// `a < b` per lane (false where either is NaN).
    fn less(self, a: Self::F, b: Self::F) -> Self::M;
    /// `a == b` per lane (false where either is NaN).
    fn equal(self, a: Self::F, b: Self::F) -> Self::M;
    /// `m ? a : b` per lane.
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// The first `n` lanes (n may exceed 16).
    fn first(self, n: usize) -> Self::M;
    /// Whether every lane is set.
    fn all(self, m: Self::M) -> bool;

    fn splat_u(self, x: u32) -> Self::U;
    /// 0, 1, ..., 15.
    fn lane_index(self) -> Self::U;
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// Low 32 bits of the product.
    fn mul_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn and_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn or_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn xor_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn shift_right<const N: u32>(self, a: Self::U) -> Self::U;
    /// `a >= b`, unsigned.
    fn not_less_u(self, a: Self::U, b: Self::U) -> Self::M;
    fn bits(self, a: Self::F) -> Self::U;
    fn float_of_bits(self, a: Self::U) -> Self::F;
    /// The signed integers in `a` as f32.
    fn to_float(self, a: Self::U) -> Self::F;

    /// Transposes a square of 16 x 16.
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES];

    /// Sum over lanes by the fixed tree: i with i+8, then i with i+4, i+2, i+1.
    fn sum(self, a: Self::F) -> f32;
    /// Largest lane by the same tree, with [`Simd::max`].
    fn largest(self, a: Self::F) -> f32;

    fn zero_d(self) -> Self::D;
    /// `acc + x^2` in f64 (the square of an f32 is exact in f64, so fusing does not matter).
    fn add_square(self, acc: Self::D, x: Self::F) -> Self::D;
    /// Sum over lanes by the same tree as [`Simd::sum`].
    fn sum_d(self, a: Self::D) -> f64;

    /// |a|.
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        self.float_of_bits(self.and_u(self.bits(a), self.splat_u(0x7fff_ffff)))
    }
    /// Magnitude of `a` with the sign bit of `sign`.
    #[inline(always)]
    fn copy_sign(self, a: Self::F, sign: Self::F) -> Self::F {
        let magnitude = self.and_u(self.bits(a), self.splat_u(0x7fff_ffff));
        let sign = self.and_u(self.bits(sign), self.splat_u(0x8000_0000));
        self.float_of_bits(self.or_u(magnitude, sign))
    }
    /// +0 in every lane.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }
}

/// Calls `generic(token, arguments...)` inside a function that has the target features of the level of `$kernels`.
///
/// `generic` must be `#[inline(always)]`, with a token of any `S: Simd` as its first parameter.
macro_rules! dispatch {
    ($kernels:expr, $generic:ident $(<$lt:lifetime>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512 $(<$lt>)? (simd: $crate::simd::Avx512, $($arg: $ty),*) $(-> $ret)? {
            $generic(simd, $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2 $(<$lt>)? (simd: $crate::simd::Avx2, $($arg: $ty),*) $(-> $ret)? {
            $generic(simd, $($arg),*)
        }
        #[allow(unsafe_code, reason = "the level of a `Kernels` is proof that the CPU has the features")]
        fn run $(<$lt>)? (kernels: $crate::Kernels, $($arg: $ty),*) $(-> $ret)? {
            match kernels.level() {
                $crate::Level::Portable => $generic($crate::simd::Portable, $($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a `Kernels` of this level is only made where the CPU has these features.
                $crate::Level::Avx2 => unsafe { avx2($crate::simd::Avx2::assume(), $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a `Kernels` of this level is only made where the CPU has these features.
                $crate::Level::Avx512 => unsafe { avx512($crate::simd::Avx512::assume(), $($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                $crate::Level::Avx2 | $crate::Level::Avx512 => unreachable!("a level of another architecture"),
            }
        }
        run($kernels, $($arg),*)
    }};
}
pub(crate) use dispatch;
