//! Twins of the output head's rows.

#![allow(clippy::float_cmp, reason = "equal logits are meant")]

use super::math::exp;
use super::multiply_add;
use super::reduce::reduce;
use crate::math::log_f64;
use crate::{Level, RowGradients, RowStatistics};

const BANNED: f32 = f32::NEG_INFINITY;

/// Twin of [`crate::Kernels::head_row_statistics`].
pub fn row_statistics(
    level: Level,
    logits: &mut [f32],
    inverse_temperature: f32,
    target: usize,
) -> RowStatistics {
    for x in logits.iter_mut() {
        *x *= inverse_temperature;
    }
    let largest = logits.iter().copied().fold(BANNED, f32::max);
    if largest == BANNED {
        return RowStatistics {
            lse: BANNED,
            logprob: BANNED,
            entropy: 0.0,
            zbar: 0.0,
            top1: false,
            largest: BANNED,
            log_sum: 0.0,
        };
    }
    let n = logits.len();
    let d = |i: usize| {
        if logits[i] == BANNED {
            0.0
        } else {
            logits[i] - largest
        }
    };
    let e = |i: usize| exp(level, logits[i] - largest);
    let sum = f64::from(reduce(n, |i, sum| sum + e(i)));
    let product = f64::from(reduce(n, |i, sum| multiply_add(level, e(i), d(i), sum)));
    let total = f64::from(reduce(n, |i, sum| sum + d(i)));
    let allowed = logits.iter().filter(|x| **x != BANNED).count() as f64;
    let (log_sum, largest) = (log_f64(sum), f64::from(largest));
    RowStatistics {
        lse: (largest + log_sum) as f32,
        logprob: (f64::from(logits[target]) - largest - log_sum) as f32,
        entropy: (log_sum - product / sum).max(0.0) as f32,
        zbar: (largest + total / allowed) as f32,
        top1: logits.iter().position(|x| f64::from(*x) == largest) == Some(target),
        largest: largest as f32,
        log_sum,
    }
}

/// Twin of [`crate::Kernels::head_row_gradient`].
pub fn row_gradient(
    level: Level,
    logits: &mut [f32],
    lse: f32,
    entropy: f32,
    target: usize,
    d: RowGradients,
    inverse_temperature: f32,
) {
    let allowed = logits.iter().filter(|x| **x != BANNED).count().max(1) as f32;
    let uniform = if d.d_zbar == 0.0 {
        0.0
    } else {
        d.d_zbar / allowed * inverse_temperature
    };
    let linear = (d.d_lse - d.d_logprob) * inverse_temperature;
    let entropic = -d.d_entropy * inverse_temperature;
    for (i, x) in logits.iter_mut().enumerate() {
        if *x == BANNED {
            *x = 0.0;
            continue;
        }
        let log_p = *x - lse;
        let factor = multiply_add(level, entropic, log_p + entropy, linear);
        *x = multiply_add(level, exp(level, log_p), factor, uniform);
        if i == target {
            *x += d.d_logprob * inverse_temperature;
        }
    }
}
