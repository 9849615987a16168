//! The portable level: arrays of 16 that the compiler vectorises for the target's baseline.

use super::{LANES, Registers, Simd};

/// 16 lanes in memory, aligned so that baseline vectors do not straddle cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lanes<T>([T; LANES]);

impl<T: Copy> Lanes<T> {
    #[inline(always)]
    fn map<R>(self, f: impl Fn(T) -> R) -> Lanes<R> {
        Lanes(self.0.map(f))
    }

    #[inline(always)]
    fn zip<B: Copy, R>(self, other: Lanes<B>, f: impl Fn(T, B) -> R) -> Lanes<R> {
        Lanes(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// Combines the lanes by the fixed tree: i with i+8, i+4, i+2, i+1.
    #[inline(always)]
    fn fold(mut self, f: impl Fn(T, T) -> T) -> T {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                self.0[i] = f(self.0[i], self.0[i + half]);
            }
        }
        self.0[0]
    }
}

/// Multiply-add of the portable level: fused where every CPU of the architecture has the instruction.
#[inline(always)]
pub(crate) fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// The portable token; always available.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Simd for Portable {
    type F = Lanes<f32>;
    type U = Lanes<u32>;
    type M = Lanes<bool>;
    type D = Lanes<f64>;

    const REGISTERS: Registers = Registers::Small;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        Lanes([x; LANES])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        Lanes(*x)
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        *out = x.0;
    }
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        Lanes(lanes)
    }
    #[inline(always)]
    fn store_partial(self, x: Self::F, out: &mut [f32]) {
        let n = out.len();
        out.copy_from_slice(&x.0[..n]);
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Lanes(std::array::from_fn(|i| {
            multiply_add(a.0[i], b.0[i], c.0[i])
        }))
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Lanes(std::array::from_fn(|i| {
            multiply_add(-a.0[i], b.0[i], c.0[i])
        }))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        a.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // Adding and subtracting 1.5 * 2^23 rounds to an integer; a library call per lane would not vectorise.
        const SHIFT: f32 = 12_582_912.0;
        a.map(|a| (a + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::F, n: Self::F) -> Self::F {
        // Two exact powers of two: the first product is normal, so only the second one rounds.
        a.zip(n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            let power = |k: i32| f32::from_bits((127_i32.wrapping_add(k) as u32) << 23);
            a * power(half) * power(n.wrapping_sub(half))
        })
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::M {
        a.zip(b, |a, b| a < b)
    }
    #[inline(always)]
    #[allow(clippy::float_cmp, reason = "exact comparison is the operation")]
    fn equal(self, a: Self::F, b: Self::F) -> Self::M {
        a.zip(b, |a, b| a == b)
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        Lanes(std::array::from_fn(
            |i| if m.0[i] { a.0[i] } else { b.0[i] },
        ))
    }
    #[inline(always)]
    fn first(self, n: usize) -> Self::M {
        Lanes(std::array::from_fn(|i| i < n))
    }
    #[inline(always)]
    fn all(self, m: Self::M) -> bool {
        m.fold(|a, b| a & b)
    }

    #[inline(always)]
    fn splat_u(self, x: u32) -> Self::U {
        Lanes([x; LANES])
    }
    #[inline(always)]
    fn lane_index(self) -> Self::U {
        Lanes(std::array::from_fn(|i| i as u32))
    }
    #[inline(always)]
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U {
        a.zip(b, u32::wrapping_add)
    }
    #[inline(always)]
    fn mul_u(self, a: Self::U, b: Self::U) -> Self::U {
        a.zip(b, u32::wrapping_mul)
    }
    #[inline(always)]
    fn and_u(self, a: Self::U, b: Self::U) -> Self::U {
        a.zip(b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_u(self, a: Self::U, b: Self::U) -> Self::U {
        a.zip(b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor_u(self, a: Self::U, b: Self::U) -> Self::U {
        a.zip(b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::U) -> Self::U {
        a.map(|a| a >> N)
    }
    #[inline(always)]
    fn not_less_u(self, a: Self::U, b: Self::U) -> Self::M {
        a.zip(b, |a, b| a >= b)
    }
    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::U {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    fn float_of_bits(self, a: Self::U) -> Self::F {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    fn to_float(self, a: Self::U) -> Self::F {
        a.map(|a| a as i32 as f32)
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        std::array::from_fn(|column| Lanes(std::array::from_fn(|row| rows[row].0[column])))
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        a.fold(|a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        a.fold(|a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn zero_d(self) -> Self::D {
        Lanes([0.0; LANES])
    }
    #[inline(always)]
    fn add_square(self, acc: Self::D, x: Self::F) -> Self::D {
        acc.zip(x, |acc, x| {
            let x = f64::from(x);
            acc + x * x
        })
    }
    #[inline(always)]
    fn sum_d(self, a: Self::D) -> f64 {
        a.fold(|a, b| a + b)
    }
}
