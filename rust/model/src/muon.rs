//! Muon (Jordan et al. 2024): momentum whose matrices are made nearly orthogonal before the step, so that every direction
//! of a matrix moves about equally far. Steps are as long as `AdamW`'s (Liu et al. 2025, equation 4), so both share one
//! learning rate. For a matrix W `[rows, cols]` with gradient g:
//!
//! ```text
//! m = momentum m + (1 - momentum) g
//! u = momentum m + (1 - momentum) g                       // Nesterov
//! X = u / max(|u|_F, 1e-7)
//! 5 times: A = X X^T;  X = (a I + b A + c A A) X          // a, b, c below
//! W = (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, cols)) X
//! ```
//!
//! With u = U S V^T the five rounds (Newton-Schulz) bring the singular values S near 1 and leave U and V as they are.

use ingot_kernels::{ArenaPool, Mat, MatMut};

use crate::layers::Compute;
use crate::parameters::Matrix;

/// Coefficients of the polynomial: not the steps of fastest convergence, but the steepest at 0, for small singular values.
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const ROUNDS: usize = 5;
/// Least norm that is divided by: a gradient of zero stays zero.
const EPS: f64 = 1e-7;
/// Root mean square of an element of `AdamW`'s steps, as Liu et al. found it.
const ADAMW_RMS: f64 = 0.2;
/// Elements from which on a matrix is worth all threads by itself; smaller ones are shared out.
const LARGE: usize = 1 << 20;

/// One matrix in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) matrix: Matrix,
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f64,
}

/// A matrix with its parts of the flat buffers.
struct Item<'a> {
    target: Target,
    parameters: &'a mut [f32],
    gradients: &'a [f32],
    m: &'a mut [f32],
}

/// One step for each of `targets`, which are disjoint and ascend. Every gradient is multiplied by `gradient_scale` first.
pub(crate) fn step(
    compute: &Compute,
    arenas: &ArenaPool,
    mut parameters: &mut [f32],
    gradients: &[f32],
    mut m: &mut [f32],
    targets: &[Target],
    momentum: f64,
    gradient_scale: f32,
) {
    let (mut large, mut small) = (Vec::new(), Vec::new());
    let mut position = 0;
    for &target in targets {
        let range = target.matrix.range();
        let (skipped, len) = (range.start - position, range.len());
        let (own, rest) = parameters.split_at_mut(skipped).1.split_at_mut(len);
        let (own_m, rest_m) = m.split_at_mut(skipped).1.split_at_mut(len);
        (parameters, m, position) = (rest, rest_m, range.end);
        let items = if len >= LARGE { &mut large } else { &mut small };
        items.push(Item {
            target,
            parameters: own,
            gradients: &gradients[range],
            m: own_m,
        });
    }
    let update = |item: Item<'_>| update(compute, arenas, item, momentum, gradient_scale);
    compute.pool.for_each(small, update);
    large.into_iter().for_each(update);
}

fn update(compute: &Compute, arenas: &ArenaPool, item: Item<'_>, momentum: f64, scale: f32) {
    let Matrix { rows, cols, .. } = item.target.matrix;
    let mut x = arenas.lease(rows * cols);
    let (beta, rest) = (momentum as f32, (1.0 - momentum) as f32);
    for ((x, m), g) in x.iter_mut().zip(&mut *item.m).zip(item.gradients) {
        let fresh = rest * (g * scale);
        *m = beta * *m + fresh;
        *x = beta * *m + fresh;
    }
    orthogonalize(compute, arenas, &mut x, rows, cols);
    let learning_rate = item.target.learning_rate;
    let keep = (1.0 - learning_rate * item.target.weight_decay) as f32;
    let length = (ADAMW_RMS * learning_rate * (rows.max(cols) as f64).sqrt()) as f32;
    for (w, x) in item.parameters.iter_mut().zip(&*x) {
        *w = keep * *w - length * x;
    }
}

/// Brings the singular values of `x` `[rows, cols]` near 1, from whatever size they are.
fn orthogonalize(compute: &Compute, arenas: &ArenaPool, x: &mut [f32], rows: usize, cols: usize) {
    let Compute { kernels, pool } = compute;
    let norm = kernels.norm_squared_f64(pool, x).sqrt();
    let inverse = (1.0 / norm.max(EPS)) as f32;
    for x in &mut *x {
        *x *= inverse;
    }
    let (a, b, c) = COEFFICIENTS;
    // The product with itself is taken over the longer side: X X^T of a wide matrix, X^T X of a tall one.
    let side = rows.min(cols);
    let mut gram = arenas.lease(side * side);
    let mut polynomial = arenas.lease(side * side);
    let mut next = arenas.lease(rows * cols);
    for _ in 0..ROUNDS {
        let old = Mat::new(x, rows, cols);
        let out = MatMut::new(&mut gram, side, side);
        if rows <= cols {
            kernels.gemm_nt(pool, old, old, out, None, false);
        } else {
            kernels.gemm_tn(pool, old, old, out, false);
        }
        let square = Mat::new(&gram, side, side);
        let out = MatMut::new(&mut polynomial, side, side);
        kernels.gemm_nn(pool, square, square, out, false);
        for (p, g) in polynomial.iter_mut().zip(&*gram) {
            *p = b * g + c * *p;
        }
        for p in polynomial.iter_mut().step_by(side + 1) {
            *p += a;
        }
        let factor = Mat::new(&polynomial, side, side);
        let out = MatMut::new(&mut next, rows, cols);
        if rows <= cols {
            kernels.gemm_nn(pool, factor, old, out, false);
        } else {
            kernels.gemm_nn(pool, old, factor, out, false);
        }
        x.copy_from_slice(&next);
    }
}
