//! Layer normalisation (Ba, Kiros and Hinton 2016) and root-mean-square normalisation (Zhang and Sennrich 2019), one row
//! at a time, forward and backward.

use crate::Kernels;
use crate::reduce::{Reduction, reduce};
use crate::simd::{LANES, Simd, dispatch};

/// Sum of x.
#[derive(Clone, Copy)]
struct Total;
impl Reduction<1, 1> for Total {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x]: [S::F; 1], [sum]: [S::F; 1]) -> [S::F; 1] {
        [s.add(sum, x)]
    }
}

/// Sum of (x - mean)^2.
#[derive(Clone, Copy)]
struct Deviation(f32);
impl Reduction<1, 1> for Deviation {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x]: [S::F; 1], [sum]: [S::F; 1]) -> [S::F; 1] {
        let d = s.sub(x, s.splat(self.0));
        [s.fma(d, d, sum)]
    }
}

/// Sums of `g` and `g * x_hat`, with `g = d_out * gain` and `x_hat = (x - mean) * rstd`.
#[derive(Clone, Copy)]
struct GradientSums {
    mean: f32,
    rstd: f32,
}
impl Reduction<3, 2> for GradientSums {
    #[inline(always)]
    fn step<S: Simd>(
        self,
        s: S,
        [x, gain, d_out]: [S::F; 3],
        [sum, product]: [S::F; 2],
    ) -> [S::F; 2] {
        let x_hat = s.mul(s.sub(x, s.splat(self.mean)), s.splat(self.rstd));
        let g = s.mul(d_out, gain);
        [s.add(sum, g), s.fma(g, x_hat, product)]
    }
}

#[inline(always)]
fn layer_norm_forward<S: Simd>(
    s: S,
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = reduce(s, Total, [x])[0] / n;
    let rstd = 1.0 / (reduce(s, Deviation(mean), [x])[0] / n + eps).sqrt();
    match bias {
        Some(bias) => normalize(s, x, gain, Some(bias), mean, rstd, out),
        None => normalize(s, x, gain, None, mean, rstd, out),
    }
    (mean, rstd)
}

/// out = (x - mean) * rstd * gain + bias.
#[inline(always)]
fn normalize<S: Simd>(
    s: S,
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    mean: f32,
    rstd: f32,
    out: &mut [f32],
) {
    let (mean, rstd) = (s.splat(mean), s.splat(rstd));
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (gain, gain_tail) = gain.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    if let Some(bias) = bias {
        let (bias, bias_tail) = bias.as_chunks::<LANES>();
        for (((x, gain), bias), out) in x.iter().zip(gain).zip(bias).zip(out) {
            let x_hat = s.mul(s.sub(s.load(x), mean), rstd);
            s.store(s.fma(x_hat, s.load(gain), s.load(bias)), out);
        }
        if !x_tail.is_empty() {
            let x_hat = s.mul(s.sub(s.load_partial(x_tail), mean), rstd);
            s.store_partial(
                s.fma(x_hat, s.load_partial(gain_tail), s.load_partial(bias_tail)),
                out_tail,
            );
        }
    } else {
        for ((x, gain), out) in x.iter().zip(gain).zip(out) {
            let x_hat = s.mul(s.sub(s.load(x), mean), rstd);
            s.store(s.mul(x_hat, s.load(gain)), out);
        }
        if !x_tail.is_empty() {
            let x_hat = s.mul(s.sub(s.load_partial(x_tail), mean), rstd);
            s.store_partial(s.mul(x_hat, s.load_partial(gain_tail)), out_tail);
        }
    }
}

/// What the second pass of a backward row needs: `d_x += rstd * (g - offset - x_hat * slope)`.
#[derive(Clone, Copy)]
struct RowGradient {
    mean: f32,
    rstd: f32,
    offset: f32,
    slope: f32,
}

/// Returns the terms for `d_x` and `d_gain`.
#[inline(always)]
fn gradient_terms<S: Simd>(
    s: S,
    row: RowGradient,
    x: S::F,
    gain: S::F,
    d_out: S::F,
) -> (S::F, S::F) {
    let rstd = s.splat(row.rstd);
    let x_hat = s.mul(s.sub(x, s.splat(row.mean)), rstd);
    let g = s.mul(d_out, gain);
    let centred = s.fnma(x_hat, s.splat(row.slope), s.sub(g, s.splat(row.offset)));
    (s.mul(rstd, centred), s.mul(d_out, x_hat))
}

#[inline(always)]
fn accumulate_gradients<S: Simd>(
    s: S,
    row: RowGradient,
    x: &[f32],
    gain: &[f32],
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (gain, gain_tail) = gain.as_chunks::<LANES>();
    let (d_out, d_out_tail) = d_out.as_chunks::<LANES>();
    let (d_x, d_x_tail) = d_x.as_chunks_mut::<LANES>();
    let (d_gain, d_gain_tail) = d_gain.as_chunks_mut::<LANES>();
    for ((((x, gain), d_out), d_x), d_gain) in x.iter().zip(gain).zip(d_out).zip(d_x).zip(d_gain) {
        let (for_x, for_gain) = gradient_terms(s, row, s.load(x), s.load(gain), s.load(d_out));
        s.store(s.add(s.load(d_x), for_x), d_x);
        s.store(s.add(s.load(d_gain), for_gain), d_gain);
    }
    if !x_tail.is_empty() {
        let (x, gain, d_out) = (
            s.load_partial(x_tail),
            s.load_partial(gain_tail),
            s.load_partial(d_out_tail),
        );
        let (for_x, for_gain) = gradient_terms(s, row, x, gain, d_out);
        s.store_partial(s.add(s.load_partial(d_x_tail), for_x), d_x_tail);
        s.store_partial(s.add(s.load_partial(d_gain_tail), for_gain), d_gain_tail);
    }
}

#[inline(always)]
fn layer_norm_backward<S: Simd>(
    s: S,
    x: &[f32],
    gain: &[f32],
    mean: f32,
    rstd: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    let n = x.len() as f32;
    let [sum, product] = reduce(s, GradientSums { mean, rstd }, [x, gain, d_out]);
    let row = RowGradient {
        mean,
        rstd,
        offset: sum / n,
        slope: product / n,
    };
    accumulate_gradients(s, row, x, gain, d_out, d_x, d_gain);
}

#[inline(always)]
fn rms_norm_forward<S: Simd>(s: S, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let rstd = 1.0 / (reduce(s, Deviation(0.0), [x])[0] / x.len() as f32 + eps).sqrt();
    normalize(s, x, gain, None, 0.0, rstd, out);
    rstd
}

#[inline(always)]
fn rms_norm_backward<S: Simd>(
    s: S,
    x: &[f32],
    gain: &[f32],
    rstd: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
) {
    let [_, product] = reduce(s, GradientSums { mean: 0.0, rstd }, [x, gain, d_out]);
    let row = RowGradient {
        mean: 0.0,
        rstd,
        offset: 0.0,
        slope: product / x.len() as f32,
    };
    accumulate_gradients(s, row, x, gain, d_out, d_x, d_gain);
}

/// All methods of this block work on one row and panic if their slices differ in length.
#[allow(clippy::missing_panics_doc, reason = "stated once for the block")]
impl Kernels {
    /// out = (x - mean) * rstd * gain + bias, with rstd = 1 / sqrt(variance + eps) and the biased variance. Returns
    /// (mean, rstd), which the backward pass takes.
    pub fn layer_norm_forward(
        &self,
        x: &[f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
        out: &mut [f32],
    ) -> (f32, f32) {
        let n = x.len();
        assert!(
            gain.len() == n && out.len() == n && bias.is_none_or(|bias| bias.len() == n),
            "layer_norm_forward: lengths differ"
        );
        dispatch!(
            *self,
            layer_norm_forward(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) -> (f32, f32)
        )
    }

    /// Gradients of one row of layer normalisation; all are added to. The bias's gradient is `d_out` itself.
    pub fn layer_norm_backward(
        &self,
        x: &[f32],
        gain: &[f32],
        mean: f32,
        rstd: f32,
        d_out: &[f32],
        d_x: &mut [f32],
        d_gain: &mut [f32],
        d_bias: Option<&mut [f32]>,
    ) {
        let n = x.len();
        assert!(
            gain.len() == n && d_out.len() == n && d_x.len() == n && d_gain.len() == n,
            "layer_norm_backward: lengths differ"
        );
        dispatch!(
            *self,
            layer_norm_backward(
                x: &[f32], gain: &[f32], mean: f32, rstd: f32, d_out: &[f32], d_x: &mut [f32], d_gain: &mut [f32]
            )
        );
        if let Some(d_bias) = d_bias {
            self.add_assign(d_bias, d_out);
        }
    }

    /// out = x * rstd * gain with rstd = 1 / sqrt(mean(x^2) + eps). Returns rstd, which the backward pass takes.
    pub fn rms_norm_forward(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> f32 {
        assert!(
            gain.len() == x.len() && out.len() == x.len(),
            "rms_norm_forward: lengths differ"
        );
        dispatch!(*self, rms_norm_forward(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> f32)
    }

    /// Gradients of one row of root-mean-square normalisation; both are added to.
    pub fn rms_norm_backward(
        &self,
        x: &[f32],
        gain: &[f32],
        rstd: f32,
        d_out: &[f32],
        d_x: &mut [f32],
        d_gain: &mut [f32],
    ) {
        let n = x.len();
        assert!(
            gain.len() == n && d_out.len() == n && d_x.len() == n && d_gain.len() == n,
            "rms_norm_backward: lengths differ"
        );
        dispatch!(
            *self,
            rms_norm_backward(
                x: &[f32], gain: &[f32], rstd: f32, d_out: &[f32], d_x: &mut [f32], d_gain: &mut [f32]
            )
        );
    }
}
