//! Matrix products in f32.
//!
//! # Definition
//! Each element of a product is one chain over the inner index k, ascending, started at +0:
//!
//! ```text
//! acc = 0;  for k in 0..K { acc = fma(a[k], b[k], acc) }      // one rounding per step where the level fuses
//! acc = acc + bias                                            // if a bias is given
//! c = acc                                                     // or, accumulating: c = c + acc
//! ```
//!
//! Blocking over k stores and reloads the partial chain, which is exact, so the bits of an element depend on its row of A,
//! its column of B and the rounding of the level: not on the other rows, the path taken, or the threads. Without
//! accumulation C is never read before it is written.
//!
//! # Method
//! After Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): operands are packed into
//! panels that the micro-kernel reads in order, once per call. See `plan` for the order of work.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocked;
mod column_sum;
mod direct;
mod isa;
mod pack;
mod plan;
mod portable;
mod thin;

use crate::{Kernels, Level, Mat, MatMut, Pool};
use isa::{Isa, Operand, Output};

/// The inner and outer sizes of a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Size {
    m: usize,
    n: usize,
    k: usize,
}

/// Below this many multiply-adds waking other threads costs more than it saves.
const ALONE_BELOW: usize = 1 << 16;

impl Kernels {
    /// C = A B^T + bias, with A `[M, K]`, B `[N, K]`, C `[M, N]`, bias `[N]`: a linear layer's forward pass.
    /// `accumulate` adds to C instead of overwriting it.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn gemm_nt(
        &self,
        pool: &Pool,
        a: Mat,
        b: Mat,
        mut c: MatMut,
        bias: Option<&[f32]>,
        accumulate: bool,
    ) {
        let size = Size {
            m: a.num_rows(),
            n: b.num_rows(),
            k: a.num_cols(),
        };
        check("gemm_nt", size, b.num_cols(), &c);
        if let Some(bias) = bias {
            assert_eq!(
                bias.len(),
                size.n,
                "gemm_nt: the bias has {} elements for {} columns",
                bias.len(),
                size.n
            );
        }
        let output = Output::new(&mut c, bias, accumulate);
        self.multiply(
            pool,
            size,
            Operand::along_depth(a),
            Operand::along_depth(b),
            output,
        );
    }

    /// C = A B, with A `[M, K]`, B `[K, N]`, C `[M, N]`: the gradient with respect to a linear layer's input.
    /// `accumulate` adds to C instead of overwriting it.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn gemm_nn(&self, pool: &Pool, a: Mat, b: Mat, mut c: MatMut, accumulate: bool) {
        let size = Size {
            m: a.num_rows(),
            n: b.num_cols(),
            k: a.num_cols(),
        };
        check("gemm_nn", size, b.num_rows(), &c);
        let output = Output::new(&mut c, None, accumulate);
        self.multiply(
            pool,
            size,
            Operand::along_depth(a),
            Operand::along_width(b),
            output,
        );
    }

    /// C = A^T B, with A `[K, M]`, B `[K, N]`, C `[M, N]`: the gradient with respect to a linear layer's weight, where K
    /// counts tokens. `accumulate` adds to C instead of overwriting it.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn gemm_tn(&self, pool: &Pool, a: Mat, b: Mat, mut c: MatMut, accumulate: bool) {
        let size = Size {
            m: a.num_cols(),
            n: b.num_cols(),
            k: a.num_rows(),
        };
        check("gemm_tn", size, b.num_rows(), &c);
        let output = Output::new(&mut c, None, accumulate);
        self.multiply(
            pool,
            size,
            Operand::along_width(a),
            Operand::along_width(b),
            output,
        );
    }

    fn multiply(self, pool: &Pool, size: Size, a: Operand, b: Operand, c: Output) {
        if size.m == 0 || size.n == 0 {
            return;
        }
        match self.level() {
            Level::Portable => multiply::<portable::Portable>(pool, size, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => multiply::<avx2::Avx2>(pool, size, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => multiply::<avx512::Avx512>(pool, size, a, b, c),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => unreachable!("a level of another architecture"),
        }
    }
}

fn multiply<I: Isa>(pool: &Pool, size: Size, a: Operand, b: Operand, c: Output) {
    if direct::fits(size, a, b) {
        direct::multiply::<I>(pool, size, a, b, c);
    } else if thin::fits(size, a, b) {
        thin::multiply::<I>(pool, size, a, b, c);
    } else {
        blocked::multiply::<I>(pool, size, a, b, c);
    }
}

fn check(name: &str, size: Size, depth_of_b: usize, c: &MatMut) {
    let Size { m, n, k } = size;
    assert_eq!(
        k, depth_of_b,
        "{name}: the inner sizes of A ({k}) and B ({depth_of_b}) differ"
    );
    assert!(
        c.num_rows() == m && c.num_cols() == n,
        "{name}: C is {} x {} instead of {m} x {n}",
        c.num_rows(),
        c.num_cols()
    );
}
