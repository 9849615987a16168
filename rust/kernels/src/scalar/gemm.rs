//! Scalar twins of the matrix products: the definition of [`crate::gemm`] written as plain loops.

use crate::{Level, Mat, MatMut};

/// One step of a chain at a level: `acc + a * b`, rounded once where the level fuses and twice where it does not.
#[must_use]
pub fn multiply_add(level: Level, a: f32, b: f32, acc: f32) -> f32 {
    if level.is_fused() {
        a.mul_add(b, acc)
    } else {
        a * b + acc
    }
}

fn multiply(
    level: Level,
    depth: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
    c: MatMut,
    bias: Option<&[f32]>,
    accumulate: bool,
) {
    for (i, row) in c.into_rows().enumerate() {
        for (j, c) in row.iter_mut().enumerate() {
            let mut acc = 0.0;
            for k in 0..depth {
                acc = multiply_add(level, a(i, k), b(j, k), acc);
            }
            if let Some(bias) = bias {
                acc += bias[j];
            }
            *c = if accumulate { *c + acc } else { acc };
        }
    }
}

/// Twin of [`crate::Kernels::gemm_nt`].
pub fn gemm_nt(level: Level, a: Mat, b: Mat, c: MatMut, bias: Option<&[f32]>, accumulate: bool) {
    multiply(
        level,
        a.num_cols(),
        |i, k| a.row(i)[k],
        |j, k| b.row(j)[k],
        c,
        bias,
        accumulate,
    );
}

/// Twin of [`crate::Kernels::gemm_nn`].
pub fn gemm_nn(level: Level, a: Mat, b: Mat, c: MatMut, accumulate: bool) {
    multiply(
        level,
        a.num_cols(),
        |i, k| a.row(i)[k],
        |j, k| b.row(k)[j],
        c,
        None,
        accumulate,
    );
}

/// Twin of [`crate::Kernels::gemm_tn`].
pub fn gemm_tn(level: Level, a: Mat, b: Mat, c: MatMut, accumulate: bool) {
    multiply(
        level,
        a.num_rows(),
        |i, k| a.row(k)[i],
        |j, k| b.row(k)[j],
        c,
        None,
        accumulate,
    );
}

/// Twin of [`crate::Kernels::column_sum`].
pub fn column_sum(a: Mat, out: &mut [f32], accumulate: bool) {
    for (j, out) in out.iter_mut().enumerate() {
        let mut acc = 0.0;
        for i in 0..a.num_rows() {
            acc += a.row(i)[j];
        }
        *out = if accumulate { *out + acc } else { acc };
    }
}
