//! Elementary functions on 16 lanes, each within 4 units in the last place over the whole f32 range.
//!
//! No library function is called: results depend on the level's arithmetic (fused or not) and on nothing else. The
//! polynomials are weighted minimax fits (Lawson's iteration on Chebyshev nodes, in f64) made for these intervals.

use crate::simd::Simd;

/// ln 2 cut to 9 significant bits, so that a small integer times it is exact, and the rest of it.
pub(crate) const LN_2_HIGH: f32 = 355.0 / 512.0;
pub(crate) const LN_2_LOW: f32 = -2.121_944_4e-4;

/// (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, lowest power first.
pub(crate) const EXP: [f32; 5] = [
    0.499_999_94,
    0.166_665_21,
    0.041_668_39,
    0.008_368_745,
    0.001_381_454,
];
/// Above this the result is infinite, below the second it is zero; clamping keeps the exponent arithmetic in range.
pub(crate) const EXP_RANGE: (f32, f32) = (-104.0, 89.0);

/// (tanh x - x) / x^3 in x^2, for |x| < 0.625.
pub(crate) const TANH: [f32; 6] = [
    -0.333_333_3,
    0.133_332_06,
    -0.053_946_763,
    0.021_700_703,
    -0.008_177_399,
    0.002_142_961_8,
];
/// Where tanh changes from the polynomial to the exponential.
pub(crate) const TANH_SMALL: f32 = 0.625;

/// erf(x) / x - 1 in x^2, for |x| < 0.92.
pub(crate) const ERF_SMALL: [f32; 7] = [
    0.128_379_17,
    -0.376_126_32,
    0.112_836_875,
    -0.026_858_94,
    0.005_199_907,
    -0.000_813_001_3,
    8.316_775e-5,
];
/// ln(1 - erf(x)) in x, for 0.92 <= x <= 4; beyond 4 erf rounds to 1.
pub(crate) const ERF_LARGE: [f32; 8] = [
    1.746_832e-4,
    -1.129_514_9,
    -0.633_346_9,
    -0.108_280_07,
    0.025_119_416,
    -0.004_171_058_5,
    4.344_617e-4,
    -2.109_496_3e-5,
];
/// Where erf changes from the first polynomial to the second, and where it becomes 1.
pub(crate) const ERF_RANGE: (f32, f32) = (0.92, 4.0);

/// (ln(1 + f) - f + f^2/2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)].
pub(crate) const LOG: [f32; 9] = [
    0.333_333_13,
    -0.250_000_1,
    0.200_021_19,
    -0.166_679_96,
    0.142_195_52,
    -0.124_055_89,
    0.118_881_62,
    -0.116_756_52,
    0.067_466_41,
];
/// Bit pattern of sqrt(1/2): the mantissa range of the logarithm starts there.
pub(crate) const SQRT_HALF_BITS: u32 = 0x3f35_04f3;

/// Evaluates a polynomial, lowest coefficient first, by Horner's rule.
#[inline(always)]
pub(crate) fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, coefficients: &[f32; N]) -> S::F {
    let mut sum = s.splat(coefficients[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.fma(sum, x, s.splat(coefficients[i]));
    }
    sum
}

/// e^x. Overflows to infinity, underflows through the subnormals to zero; NaN stays NaN; exp(0) is exactly 1.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // The constants come first: min and max return their second operand where it is NaN.
    let x = s.min(s.splat(EXP_RANGE.1), s.max(s.splat(EXP_RANGE.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(LN_2_LOW), s.fnma(n, s.splat(LN_2_HIGH), x));
    let q = polynomial(s, r, &EXP);
    let p = s.add(s.fma(q, s.mul(r, r), r), s.splat(1.0));
    s.scale_by_power(p, n)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.zero(), x))))
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let magnitude = s.abs(x);
    let square = s.mul(x, x);
    let small = s.fma(s.mul(polynomial(s, square, &TANH), square), x, x);
    let exponential = exp(s, s.add(magnitude, magnitude));
    let one = s.splat(1.0);
    let large = s.sub(one, s.div(s.splat(2.0), s.add(exponential, one)));
    s.select(
        s.less(magnitude, s.splat(TANH_SMALL)),
        small,
        s.copy_sign(large, x),
    )
}

/// Error function.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    let magnitude = s.abs(x);
    let square = s.mul(x, x);
    let small = s.fma(polynomial(s, square, &ERF_SMALL), x, x);
    let clamped = s.min(s.splat(ERF_RANGE.1), magnitude);
    let large = s.sub(s.splat(1.0), exp(s, polynomial(s, clamped, &ERF_LARGE)));
    s.select(
        s.less(magnitude, s.splat(ERF_RANGE.0)),
        small,
        s.copy_sign(large, x),
    )
}

/// Natural logarithm; -inf at zero, NaN below it.
#[inline(always)]
pub(crate) fn log<S: Simd>(s: S, x: S::F) -> S::F {
    let subnormal = s.less(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(subnormal, s.mul(x, s.splat(8_388_608.0)), x);
    let shift = s.select(subnormal, s.splat(-23.0), s.zero());
    // Exponent and mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
    let moved = s.add_u(s.bits(scaled), s.splat_u(0x3f80_0000 - SQRT_HALF_BITS));
    let exponent = s.to_float(s.add_u(
        s.shift_right::<23>(moved),
        s.splat_u(127_u32.wrapping_neg()),
    ));
    let k = s.add(exponent, shift);
    let mantissa = s.float_of_bits(s.add_u(
        s.and_u(moved, s.splat_u(0x007f_ffff)),
        s.splat_u(SQRT_HALF_BITS),
    ));
    let f = s.sub(mantissa, s.splat(1.0));
    let square = s.mul(f, f);
    let cubic = s.mul(s.mul(polynomial(s, f, &LOG), f), square);
    let tail = s.fma(k, s.splat(LN_2_LOW), s.fnma(s.splat(0.5), square, cubic));
    let result = s.fma(k, s.splat(LN_2_HIGH), s.add(tail, f));
    // Infinity and NaN pass through; zero and negative numbers are set.
    let result = s.select(s.less(x, s.splat(f32::INFINITY)), result, x);
    let result = s.select(s.less(x, s.zero()), s.splat(f32::NAN), result);
    s.select(s.equal(x, s.zero()), s.splat(f32::NEG_INFINITY), result)
}

/// Natural logarithm in f64 of a positive normal number, with relative error below 1e-14 away from 1.
///
/// Plain multiplications and additions: the same bits on every machine, which the system's library does not promise.
pub(crate) fn log_f64(x: f64) -> f64 {
    /// High word of sqrt(1/2): the mantissa is moved into [sqrt(1/2), sqrt(2)).
    const SQRT_HALF: u64 = 0x3fe6_a09e_0000_0000;
    if !(f64::MIN_POSITIVE..f64::INFINITY).contains(&x) {
        return if x == 0.0 {
            f64::NEG_INFINITY
        } else if x < 0.0 || x.is_nan() {
            f64::NAN
        } else if x == f64::INFINITY {
            x
        } else {
            log_f64(x * 18_014_398_509_481_984.0) - 54.0 * std::f64::consts::LN_2
        };
    }
    let moved = x.to_bits() + (0x3ff0_0000_0000_0000 - SQRT_HALF);
    let k = (moved >> 52) as i64 - 1023;
    let mantissa = f64::from_bits((moved & 0x000f_ffff_ffff_ffff) + SQRT_HALF);
    // ln m = 2 artanh z, z = (m-1)/(m+1), |z| <= 0.172: twelve terms of the series reach 1e-20.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let square = z * z;
    let mut series = 0.0;
    for n in (0..12_u32).rev() {
        series = series * square + 1.0 / f64::from(2 * n + 1);
    }
    k as f64 * std::f64::consts::LN_2 + 2.0 * z * series
}
