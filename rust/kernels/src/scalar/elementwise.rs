//! Twins of the activations.

use super::math::{erf, exp, sigmoid};
use super::multiply_add;
use crate::elementwise::{GELU_CUBE, GELU_SATURATED, GELU_TWICE_SCALE, NORMAL_PEAK, SQRT_HALF};
use crate::{Activation, Level};

fn gelu_gate(level: Level, x: f32) -> f32 {
    let cubic = multiply_add(level, GELU_CUBE * (x * x), x, x);
    sigmoid(level, GELU_TWICE_SCALE * cubic)
}

fn normal_cdf(level: Level, x: f32) -> f32 {
    multiply_add(level, 0.5, erf(level, x * SQRT_HALF), 0.5)
}

/// f(x) of one element.
#[must_use]
pub fn activation(level: Level, kind: Activation, x: f32) -> f32 {
    let positive = if x < 0.0 { 0.0 } else { x };
    match kind {
        Activation::GeluTanh => x * gelu_gate(level, x),
        Activation::Gelu => x * normal_cdf(level, x),
        Activation::Relu => positive,
        Activation::Relu2 => positive * positive,
    }
}

/// `d_out * f'(x)` of one element.
#[must_use]
pub fn activation_gradient(level: Level, kind: Activation, x: f32, d_out: f32) -> f32 {
    let bounded = x.clamp(-GELU_SATURATED, GELU_SATURATED);
    match kind {
        Activation::GeluTanh => {
            let x = bounded;
            let gate = gelu_gate(level, x);
            let slope = multiply_add(level, 3.0 * GELU_CUBE * x, x, 1.0);
            d_out
                * multiply_add(
                    level,
                    gate * (1.0 - gate),
                    GELU_TWICE_SCALE * slope * x,
                    gate,
                )
        }
        Activation::Gelu => {
            let x = bounded;
            let density = NORMAL_PEAK * exp(level, -0.5 * x * x);
            d_out * multiply_add(level, x, density, normal_cdf(level, x))
        }
        Activation::Relu => {
            if x > 0.0 {
                d_out
            } else {
                0.0
            }
        }
        Activation::Relu2 => {
            let positive = if x < 0.0 { 0.0 } else { x };
            d_out * (positive + positive)
        }
    }
}

/// silu(gate) * up of one element.
#[must_use]
pub fn swiglu(level: Level, gate: f32, up: f32) -> f32 {
    gate * sigmoid(level, gate) * up
}

/// Gradients of [`swiglu`] with respect to (gate, up).
#[must_use]
pub fn swiglu_gradient(level: Level, gate: f32, up: f32, d_out: f32) -> (f32, f32) {
    let sigma = sigmoid(level, gate);
    let silu = gate * sigma;
    (
        d_out * up * multiply_add(level, silu, 1.0 - sigma, sigma),
        d_out * silu,
    )
}
