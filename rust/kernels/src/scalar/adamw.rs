//! Twins of the optimizer's pass and of the norm.

use super::multiply_add;
use crate::{AdamGroup, AdamSettings, EpsMode, Level};

/// Twin of [`crate::Kernels::adamw`].
pub fn adamw(
    level: Level,
    parameters: &mut [f32],
    gradients: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    groups: &[AdamGroup],
    settings: &AdamSettings,
) {
    let (beta1, beta2) = settings.betas;
    let power = |base: f64| {
        // Squares and multiplies from the lowest bit of the exponent, as the kernel does.
        let (mut result, mut square, mut exponent) = (1.0, base, settings.step);
        while exponent > 0 {
            if exponent % 2 == 1 {
                result *= square;
            }
            square *= square;
            exponent /= 2;
        }
        result
    };
    let (correction1, correction2) = (1.0 - power(beta1), (1.0 - power(beta2)).sqrt());
    for group in groups {
        let (root_scale, step_size) = match settings.eps_mode {
            EpsMode::Torch => (1.0 / correction2, group.learning_rate / correction1),
            EpsMode::Tf => (1.0, group.learning_rate * correction2 / correction1),
        };
        let keep = (1.0 - group.learning_rate * group.weight_decay) as f32;
        for i in group.range.clone() {
            let g = gradients[i] * settings.gradient_scale;
            m[i] = multiply_add(level, beta1 as f32, m[i], (1.0 - beta1) as f32 * g);
            v[i] = multiply_add(level, beta2 as f32, v[i], (1.0 - beta2) as f32 * g * g);
            let denominator =
                multiply_add(level, v[i].sqrt(), root_scale as f32, settings.eps as f32);
            parameters[i] = parameters[i] * keep - step_size as f32 * m[i] / denominator;
        }
    }
}

/// Twin of [`crate::Kernels::norm_squared_f64`]: blocks of 65536, in each 32 partial sums.
#[must_use]
pub fn norm_squared_f64(x: &[f32]) -> f64 {
    let mut total = 0.0;
    for block in x.chunks(1 << 16) {
        let mut sums = [[0.0_f64; 16]; 2];
        let pairs = block.len() / 32 * 32;
        for (i, x) in block.iter().enumerate() {
            // After the last whole pair of vectors a whole vector goes to the first sums, a partial one to the second.
            let vector = if i < pairs {
                i / 16 % 2
            } else {
                usize::from(i >= block.len() / 16 * 16)
            };
            sums[vector][i % 16] += f64::from(*x) * f64::from(*x);
        }
        for half in [8, 4, 2, 1] {
            for lanes in &mut sums {
                for i in 0..half {
                    lanes[i] += lanes[i + half];
                }
            }
        }
        total += sums[0][0] + sums[1][0];
    }
    total
}
