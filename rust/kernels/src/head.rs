//! The output head's row of logits: log-probability, entropy and friends, and the gradient of any mixture of them.
//!
//! With s = z / temperature, p = softmax(s), y the target and n the number of ids that are not banned:
//! logprob = s(y) - lse, entropy H = lse - sum p s, zbar = mean of s over the ids that are not banned, and
//!
//! ```text
//! d_z = (1/temperature) [ d_logprob (e_y - p) - d_entropy p (ln p + H) + d_lse p + d_zbar / n ]
//! ```
//!
//! A banned id has the logit -inf: it adds nothing to any sum and its gradient is 0.

use crate::Kernels;
use crate::math::{exp, log_f64};
use crate::reduce::{Reduction, reduce};
use crate::simd::{LANES, Simd, dispatch};

/// What one row of logits says, in nats.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RowStatistics {
    /// ln sum exp s.
    pub lse: f32,
    /// ln p of the target; -inf where the target is banned.
    pub logprob: f32,
    /// Entropy of the distribution, at least 0.
    pub entropy: f32,
    /// Mean of s over the ids that are not banned.
    pub zbar: f32,
    /// Whether the target is the most probable id, the lowest one where several are equal.
    pub top1: bool,
    /// Largest s.
    pub largest: f32,
    /// ln sum exp (s - largest).
    pub log_sum: f64,
}

impl RowStatistics {
    /// ln p of the id whose scaled logit s is `scaled`: the bits of [`RowStatistics::logprob`] where that is the target's.
    #[inline(always)]
    #[must_use]
    pub fn logprob_of(&self, scaled: f32) -> f32 {
        (f64::from(scaled) - f64::from(self.largest) - self.log_sum) as f32
    }
}

/// Gradients of a loss with respect to the fields of [`RowStatistics`] of the same names.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct RowGradients {
    /// With respect to `logprob`.
    pub d_logprob: f32,
    /// With respect to `entropy`.
    pub d_entropy: f32,
    /// With respect to `lse`.
    pub d_lse: f32,
    /// With respect to `zbar`.
    pub d_zbar: f32,
}

/// Multiplies the row by a factor and returns the largest element.
#[inline(always)]
fn scale_and_largest<S: Simd>(s: S, row: &mut [f32], factor: f32) -> f32 {
    let factor = s.splat(factor);
    let lowest = s.splat(f32::NEG_INFINITY);
    let (mut first, mut second) = (lowest, lowest);
    let (pairs, rest) = row.as_chunks_mut::<{ 2 * LANES }>();
    for pair in pairs {
        let (chunks, _) = pair.as_chunks_mut::<LANES>();
        let (a, b) = (
            s.mul(s.load(&chunks[0]), factor),
            s.mul(s.load(&chunks[1]), factor),
        );
        s.store(a, &mut chunks[0]);
        s.store(b, &mut chunks[1]);
        first = s.max(first, a);
        second = s.max(second, b);
    }
    let (chunks, tail) = rest.as_chunks_mut::<LANES>();
    for chunk in chunks {
        let x = s.mul(s.load(chunk), factor);
        s.store(x, chunk);
        first = s.max(first, x);
    }
    if !tail.is_empty() {
        let x = s.mul(s.load_partial(tail), factor);
        s.store_partial(x, tail);
        first = s.max(first, s.select(s.first(tail.len()), x, lowest));
    }
    s.largest(s.max(first, second))
}

/// With d = s - largest: sums of e^d, d e^d, d and 1 over the ids that are not banned.
#[derive(Clone, Copy)]
struct SoftmaxSums(f32);
impl Reduction<1, 4> for SoftmaxSums {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x]: [S::F; 1], [e, product, sum, count]: [S::F; 4]) -> [S::F; 4] {
        let d = s.sub(x, s.splat(self.0));
        let banned = s.equal(d, s.splat(f32::NEG_INFINITY));
        let exponential = exp(s, d);
        let d = s.select(banned, s.zero(), d);
        let one = s.select(banned, s.zero(), s.splat(1.0));
        [
            s.add(e, exponential),
            s.fma(exponential, d, product),
            s.add(sum, d),
            s.add(count, one),
        ]
    }
}

/// Number of ids that are not banned.
#[derive(Clone, Copy)]
struct Allowed;
impl Reduction<1, 1> for Allowed {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x]: [S::F; 1], [count]: [S::F; 1]) -> [S::F; 1] {
        let banned = s.equal(x, s.splat(f32::NEG_INFINITY));
        [s.add(count, s.select(banned, s.zero(), s.splat(1.0)))]
    }
}

#[inline(always)]
fn statistics<S: Simd>(
    s: S,
    logits: &mut [f32],
    inverse_temperature: f32,
    target: usize,
) -> RowStatistics {
    let largest = scale_and_largest(s, logits, inverse_temperature);
    if largest == f32::NEG_INFINITY {
        let lse = f32::NEG_INFINITY;
        return RowStatistics {
            lse,
            logprob: lse,
            entropy: 0.0,
            zbar: 0.0,
            top1: false,
            largest,
            log_sum: 0.0,
        };
    }
    let [sum, product, total, count] = reduce(s, SoftmaxSums(largest), [&*logits]).map(f64::from);
    let log_sum = log_f64(sum);
    let chosen = logits[target];
    let entropy = log_sum - product / sum;
    RowStatistics {
        lse: (f64::from(largest) + log_sum) as f32,
        logprob: (f64::from(chosen) - f64::from(largest) - log_sum) as f32,
        // A NaN must stay one: a comparison with max() would hide it.
        entropy: if entropy < 0.0 { 0.0 } else { entropy as f32 },
        zbar: (f64::from(largest) + total / count) as f32,
        top1: chosen >= largest && logits[..target].iter().all(|&other| other < largest),
        largest,
        log_sum,
    }
}

/// The coefficients of one row's gradient, ready for the loop.
#[derive(Clone, Copy)]
struct RowCoefficients {
    /// ln p = s - lse.
    lse: f32,
    entropy: f32,
    /// Factor of p: `(d_lse - d_logprob) / temperature`.
    linear: f32,
    /// Factor of p (ln p + H): `-d_entropy / temperature`.
    entropic: f32,
    /// Added to every id that is not banned: `d_zbar / (n temperature)`.
    uniform: f32,
}

/// p (linear + entropic (ln p + H)) + uniform, or 0 for a banned id.
#[inline(always)]
fn gradient_vector<S: Simd>(s: S, row: RowCoefficients, x: S::F) -> S::F {
    let log_p = s.sub(x, s.splat(row.lse));
    let p = exp(s, log_p);
    let factor = s.fma(
        s.splat(row.entropic),
        s.add(log_p, s.splat(row.entropy)),
        s.splat(row.linear),
    );
    let gradient = s.fma(p, factor, s.splat(row.uniform));
    s.select(s.equal(x, s.splat(f32::NEG_INFINITY)), s.zero(), gradient)
}

#[inline(always)]
fn gradient<S: Simd>(
    s: S,
    logits: &mut [f32],
    lse: f32,
    entropy: f32,
    target: usize,
    d: RowGradients,
    inverse_temperature: f32,
) {
    let uniform = if d.d_zbar == 0.0 {
        0.0
    } else {
        d.d_zbar / reduce(s, Allowed, [&*logits])[0].max(1.0) * inverse_temperature
    };
    let row = RowCoefficients {
        lse,
        entropy,
        linear: (d.d_lse - d.d_logprob) * inverse_temperature,
        entropic: -d.d_entropy * inverse_temperature,
        uniform,
    };
    let target_allowed = logits[target] != f32::NEG_INFINITY;
    let (chunks, tail) = logits.as_chunks_mut::<LANES>();
    for chunk in chunks {
        s.store(gradient_vector(s, row, s.load(chunk)), chunk);
    }
    if !tail.is_empty() {
        s.store_partial(gradient_vector(s, row, s.load_partial(tail)), tail);
    }
    if target_allowed {
        logits[target] += d.d_logprob * inverse_temperature;
    }
}

impl Kernels {
    /// Statistics of one row. `logits` come raw and leave multiplied by `inverse_temperature` (banned ids, set to -inf
    /// by the caller, stay so), which is what [`Kernels::head_row_gradient`] takes. A row whose ids are all banned has
    /// lse and logprob -inf and the rest 0.
    ///
    /// # Panics
    /// If `target` is not an index of the row.
    pub fn head_row_statistics(
        &self,
        logits: &mut [f32],
        inverse_temperature: f32,
        target: usize,
    ) -> RowStatistics {
        assert!(
            target < logits.len(),
            "target {target} is not below the row's length {}",
            logits.len()
        );
        dispatch!(
            *self,
            statistics(logits: &mut [f32], inverse_temperature: f32, target: usize) -> RowStatistics
        )
    }

    /// Gradient of one row with respect to the raw logits, in place of the logits that were scaled by
    /// `inverse_temperature`. `lse` and `entropy` are those of [`Kernels::head_row_statistics`]; `entropy` is used only
    /// where `d.d_entropy` is not 0. The formula is at the top of this file.
    ///
    /// # Panics
    /// If `target` is not an index of the row.
    pub fn head_row_gradient(
        &self,
        logits: &mut [f32],
        lse: f32,
        entropy: f32,
        target: usize,
        d: RowGradients,
        inverse_temperature: f32,
    ) {
        assert!(
            target < logits.len(),
            "target {target} is not below the row's length {}",
            logits.len()
        );
        dispatch!(
            *self,
            gradient(
                logits: &mut [f32], lse: f32, entropy: f32, target: usize, d: RowGradients, inverse_temperature: f32
            )
        );
    }
}
