//! Twins of the elementary functions.

use super::multiply_add;
use crate::Level;
use crate::math::{
    ERF_LARGE, ERF_RANGE, ERF_SMALL, EXP, EXP_RANGE, LN_2_HIGH, LN_2_LOW, LOG, SQRT_HALF_BITS,
    TANH, TANH_SMALL,
};

fn polynomial(level: Level, x: f32, coefficients: &[f32]) -> f32 {
    let mut sum = *coefficients.last().expect("a polynomial has coefficients");
    for c in coefficients.iter().rev().skip(1) {
        sum = multiply_add(level, sum, x, *c);
    }
    sum
}

/// x 2^n with one rounding, for x in (1/2, 2).
fn scale_by_power(x: f32, n: i32) -> f32 {
    let power = |n: i32| f32::from_bits(((127 + n) as u32) << 23);
    x * power(n >> 1) * power(n - (n >> 1))
}

/// e^x.
#[must_use]
pub fn exp(level: Level, x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let x = x.clamp(EXP_RANGE.0, EXP_RANGE.1);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = multiply_add(level, -n, LN_2_LOW, multiply_add(level, -n, LN_2_HIGH, x));
    let q = polynomial(level, r, &EXP);
    scale_by_power(multiply_add(level, q, r * r, r) + 1.0, n as i32)
}

/// 1 / (1 + e^-x).
#[must_use]
pub fn sigmoid(level: Level, x: f32) -> f32 {
    1.0 / (1.0 + exp(level, 0.0 - x))
}

/// Hyperbolic tangent.
#[must_use]
pub fn tanh(level: Level, x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude < TANH_SMALL {
        let square = x * x;
        multiply_add(level, polynomial(level, square, &TANH) * square, x, x)
    } else {
        (1.0 - 2.0 / (exp(level, magnitude + magnitude) + 1.0)).copysign(x)
    }
}

/// Error function.
#[must_use]
pub fn erf(level: Level, x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude < ERF_RANGE.0 {
        multiply_add(level, polynomial(level, x * x, &ERF_SMALL), x, x)
    } else {
        let clamped = if magnitude > ERF_RANGE.1 {
            ERF_RANGE.1
        } else {
            magnitude
        };
        (1.0 - exp(level, polynomial(level, clamped, &ERF_LARGE))).copysign(x)
    }
}

/// Natural logarithm.
#[must_use]
pub fn log(level: Level, x: f32) -> f32 {
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x < 0.0 || x.is_nan() {
        return f32::NAN;
    }
    if x == f32::INFINITY {
        return x;
    }
    let (scaled, shift) = if x < f32::MIN_POSITIVE {
        (x * 8_388_608.0, -23.0)
    } else {
        (x, 0.0)
    };
    let moved = scaled.to_bits() + (1.0_f32.to_bits() - SQRT_HALF_BITS);
    let k = ((moved >> 23) as i32 - 127) as f32 + shift;
    let f = f32::from_bits((moved & 0x007f_ffff) + SQRT_HALF_BITS) - 1.0;
    let square = f * f;
    let cubic = polynomial(level, f, &LOG) * f * square;
    let tail = multiply_add(level, k, LN_2_LOW, multiply_add(level, -0.5, square, cubic));
    multiply_add(level, k, LN_2_HIGH, tail + f)
}
