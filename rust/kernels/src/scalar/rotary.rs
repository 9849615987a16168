//! Twin of the rotary embedding.

use super::multiply_add;
use crate::Level;

/// Twin of [`crate::Kernels::rotary`].
pub fn rotary(level: Level, x: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = (x[i], x[half + i]);
        let sin = if inverse { -sin[i] } else { sin[i] };
        x[i] = multiply_add(level, -b, sin, a * cos[i]);
        x[half + i] = multiply_add(level, a, sin, b * cos[i]);
    }
}
