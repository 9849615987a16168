//! What the kernel tests share: levels, inputs and comparisons.
#![allow(clippy::float_cmp, reason = "infinities are compared")]
#![allow(dead_code, reason = "each test binary uses a part")]

use ingot_kernels::{Kernels, Level, random};

/// The kernels of every level that this CPU has.
pub fn all_kernels() -> Vec<Kernels> {
    Level::available()
        .into_iter()
        .filter_map(Kernels::new)
        .collect()
}

/// Standard normal numbers times `scale`, a different set for each stream.
pub fn normal(stream: u64, scale: f32, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    random::fill_normal(0x1234, stream, 0, scale, &mut out);
    out
}

/// Fails unless the two are the same bits, except that any NaN equals any NaN.
#[track_caller]
pub fn assert_same_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let same = a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan());
        assert!(
            same,
            "{what}: element {i} is {a:e} ({:#x}), twin {e:e} ({:#x})",
            a.to_bits(),
            e.to_bits()
        );
    }
}

/// Fails unless |actual - expected| <= relative * max|expected| + absolute everywhere.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], relative: f64, absolute: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let bound = relative * expected.iter().fold(0.0_f64, |most, e| most.max(e.abs())) + absolute;
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - e).abs();
        assert!(
            error <= bound,
            "{what}: element {i} is {a:e}, reference {e:e}, bound {bound:e}"
        );
    }
}

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Distance of `actual` from `expected` in units of the last place of `expected` as an f32.
pub fn ulps(actual: f32, expected: f64) -> f64 {
    if actual.is_nan() || expected.is_nan() {
        return if actual.is_nan() && expected.is_nan() {
            0.0
        } else {
            f64::INFINITY
        };
    }
    let rounded = expected as f32;
    if !rounded.is_finite() || !actual.is_finite() {
        return if actual == rounded {
            0.0
        } else {
            f64::INFINITY
        };
    }
    let exponent = (expected.abs().max(f64::from(f32::MIN_POSITIVE)).to_bits() >> 52) as i32 - 1023;
    (f64::from(actual) - expected).abs() / 2.0_f64.powi(exponent - 23)
}

/// The error function in f64: Taylor's series near 0, a continued fraction (Lentz) for the complement beyond.
pub fn erf_f64(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    if a < 2.5 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    if a > 6.0 {
        return x.signum();
    }
    // erfc(a) = e^(-a^2) / sqrt(pi) / (a + (1/2)/(a + (2/2)/(a + (3/2)/(a + ...)))), from the far end.
    let mut fraction = a;
    for k in (1..=200).rev() {
        fraction = a + f64::from(k) / 2.0 / fraction;
    }
    (1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / fraction) * x.signum()
}

/// Central difference of `f` at `x`.
pub fn slope(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    let h = 1e-5;
    (f(x + h) - f(x - h)) / (2.0 * h)
}

/// Numerical gradient of `f` with respect to every element of `x`.
pub fn numerical_gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut moved = x.to_vec();
    let mut gradient = Vec::with_capacity(x.len());
    for i in 0..x.len() {
        let h = 1e-5;
        moved[i] = x[i] + h;
        let above = f(&moved);
        moved[i] = x[i] - h;
        let below = f(&moved);
        moved[i] = x[i];
        gradient.push((above - below) / (2.0 * h));
    }
    gradient
}

/// A value small enough to enumerate corner lengths around the vector widths.
pub const LENGTHS: [usize; 14] = [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 1000];
