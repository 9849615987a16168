//! Rotary position embedding (Su et al. 2021) in the half-split convention of Hugging Face's Llama: element i is paired
//! with element i + rotated/2.

use crate::Kernels;
use crate::simd::{LANES, Simd, dispatch};

/// One vector of pairs: (a cos - b sin, b cos + a sin).
#[inline(always)]
fn rotate<S: Simd>(s: S, a: S::F, b: S::F, cos: S::F, sin: S::F) -> (S::F, S::F) {
    (s.fnma(b, sin, s.mul(a, cos)), s.fma(a, sin, s.mul(b, cos)))
}

#[inline(always)]
fn rotary<S: Simd>(s: S, x: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let half = cos.len();
    let (a, b) = x[..2 * half].split_at_mut(half);
    let sign = s.splat(if inverse { -1.0 } else { 1.0 });
    let (a, a_tail) = a.as_chunks_mut::<LANES>();
    let (b, b_tail) = b.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = cos.as_chunks::<LANES>();
    let (sin, sin_tail) = sin.as_chunks::<LANES>();
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let (first, second) = rotate(
            s,
            s.load(a),
            s.load(b),
            s.load(cos),
            s.mul(sign, s.load(sin)),
        );
        s.store(first, a);
        s.store(second, b);
    }
    if !a_tail.is_empty() {
        let (cos, sin) = (
            s.load_partial(cos_tail),
            s.mul(sign, s.load_partial(sin_tail)),
        );
        let (first, second) = rotate(s, s.load_partial(a_tail), s.load_partial(b_tail), cos, sin);
        s.store_partial(first, a_tail);
        s.store_partial(second, b_tail);
    }
}

impl Kernels {
    /// Rotates the pairs of one head row in place by the angles whose cosines and sines are given. Elements from
    /// `2 * cos.len()` on stay as they are. `inverse` rotates back, which is also the gradient.
    ///
    /// # Panics
    /// If `cos` and `sin` differ in length or `x` is shorter than `2 * cos.len()`.
    pub fn rotary(&self, x: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
        assert!(
            cos.len() == sin.len() && x.len() >= 2 * cos.len(),
            "rotary: lengths do not fit"
        );
        dispatch!(*self, rotary(x: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool));
    }
}
