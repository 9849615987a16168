//! Twins of the normalisations.

use super::multiply_add;
use super::reduce::reduce;
use crate::Level;

/// Twin of [`crate::Kernels::layer_norm_forward`].
pub fn layer_norm_forward(
    level: Level,
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = reduce(x.len(), |i, sum| sum + x[i]) / n;
    let variance = reduce(x.len(), |i, sum| {
        multiply_add(level, x[i] - mean, x[i] - mean, sum)
    }) / n;
    let rstd = 1.0 / (variance + eps).sqrt();
    for i in 0..x.len() {
        let x_hat = (x[i] - mean) * rstd;
        out[i] = bias.map_or(x_hat * gain[i], |bias| {
            multiply_add(level, x_hat, gain[i], bias[i])
        });
    }
    (mean, rstd)
}

/// Twin of [`crate::Kernels::layer_norm_backward`] without the bias.
pub fn layer_norm_backward(
    level: Level,
    x: &[f32],
    gain: &[f32],
    mean: f32,
    rstd: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    let offset = reduce(x.len(), |i, sum| sum + d_out[i] * gain[i]) / x.len() as f32;
    backward(level, x, gain, mean, rstd, offset, d_out, d_x, d_gain);
}

/// Twin of [`crate::Kernels::rms_norm_forward`].
pub fn rms_norm_forward(level: Level, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let square = reduce(x.len(), |i, sum| multiply_add(level, x[i], x[i], sum)) / x.len() as f32;
    let rstd = 1.0 / (square + eps).sqrt();
    for i in 0..x.len() {
        out[i] = x[i] * rstd * gain[i];
    }
    rstd
}

/// Twin of [`crate::Kernels::rms_norm_backward`].
pub fn rms_norm_backward(
    level: Level,
    x: &[f32],
    gain: &[f32],
    rstd: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    backward(level, x, gain, 0.0, rstd, 0.0, d_out, d_x, d_gain);
}

fn backward(
    level: Level,
    x: &[f32],
    gain: &[f32],
    mean: f32,
    rstd: f32,
    offset: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    let x_hat = |i: usize| (x[i] - mean) * rstd;
    let n = x.len() as f32;
    let slope = reduce(x.len(), |i, sum| {
        multiply_add(level, d_out[i] * gain[i], x_hat(i), sum)
    }) / n;
    for i in 0..x.len() {
        let centred = multiply_add(level, -x_hat(i), slope, d_out[i] * gain[i] - offset);
        d_x[i] += rstd * centred;
        d_gain[i] += d_out[i] * x_hat(i);
    }
}
