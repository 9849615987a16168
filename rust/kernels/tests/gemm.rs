//! Matrix products at every level of this machine against their scalar twins (bits) and against f64 (bound).
#![allow(
    clippy::print_stdout,
    reason = "levels that were not run are named in the output"
)]

use ingot_kernels::{Kernels, Level, Mat, MatMut, Pool, scalar};
use proptest::prelude::*;

/// The levels of this machine; names those that it lacks, which count as not run.
fn levels() -> Vec<Kernels> {
    for level in Level::ALL {
        if !level.is_available() {
            println!("not run: level {level} (this CPU lacks it)");
        }
    }
    Level::ALL.into_iter().filter_map(Kernels::new).collect()
}

/// Numbers in (-1, 1), some of them exact zeros, from a 64-bit mixing function (Steele et al. 2014, `SplitMix64`).
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            if z.is_multiple_of(32) {
                0.0
            } else {
                (z >> 40) as f32 / (1 << 23) as f32 - 1.0
            }
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Product {
    Nt,
    Nn,
    Tn,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    product: Product,
    m: usize,
    n: usize,
    k: usize,
    /// Added to the widths of A, B and C to give their row strides.
    gap: usize,
    bias: bool,
    accumulate: bool,
    threads: usize,
    seed: u64,
}

impl Case {
    fn new(product: Product, m: usize, n: usize, k: usize) -> Self {
        Self {
            product,
            m,
            n,
            k,
            gap: 0,
            bias: false,
            accumulate: false,
            threads: 2,
            seed: (m * 31 + n * 17 + k) as u64,
        }
    }

    /// Shapes (rows, columns) of A and B.
    fn shapes(&self) -> [(usize, usize); 2] {
        let Self { m, n, k, .. } = *self;
        match self.product {
            Product::Nt => [(m, k), (n, k)],
            Product::Nn => [(m, k), (k, n)],
            Product::Tn => [(k, m), (k, n)],
        }
    }

    fn data(&self, which: u64, rows: usize, cols: usize) -> Vec<f32> {
        numbers(self.seed * 3 + which, rows * (cols + self.gap))
    }

    /// What C holds beforehand: NaN where it must not be read.
    fn initial_c(&self) -> Vec<f32> {
        if self.accumulate {
            self.data(2, self.m, self.n)
        } else {
            vec![f32::NAN; self.m * (self.n + self.gap)]
        }
    }

    fn run(&self, kernels: Option<Kernels>, level: Level, pool: &Pool) -> Vec<f32> {
        let [(a_rows, a_cols), (b_rows, b_cols)] = self.shapes();
        let (a, b) = (self.data(0, a_rows, a_cols), self.data(1, b_rows, b_cols));
        let a = Mat::with_stride(&a, a_rows, a_cols, a_cols + self.gap);
        let b = Mat::with_stride(&b, b_rows, b_cols, b_cols + self.gap);
        let bias = numbers(self.seed + 77, self.n);
        let bias = self.bias.then_some(&bias[..]);
        let mut out = self.initial_c();
        let c = MatMut::with_stride(&mut out, self.m, self.n, self.n + self.gap);
        match (self.product, kernels) {
            (Product::Nt, Some(kernels)) => kernels.gemm_nt(pool, a, b, c, bias, self.accumulate),
            (Product::Nn, Some(kernels)) => kernels.gemm_nn(pool, a, b, c, self.accumulate),
            (Product::Tn, Some(kernels)) => kernels.gemm_tn(pool, a, b, c, self.accumulate),
            (Product::Nt, None) => scalar::gemm::gemm_nt(level, a, b, c, bias, self.accumulate),
            (Product::Nn, None) => scalar::gemm::gemm_nn(level, a, b, c, self.accumulate),
            (Product::Tn, None) => scalar::gemm::gemm_tn(level, a, b, c, self.accumulate),
        }
        out
    }

    /// Same bits as the scalar twin at every level; what lies between the rows of C is untouched.
    fn check_bits(&self) {
        let pool = Pool::new(self.threads);
        let mut twins = [None, None];
        for kernels in levels() {
            let level = kernels.level();
            // Levels that round alike have one twin.
            let expected = twins[usize::from(level.is_fused())]
                .get_or_insert_with(|| self.run(None, level, &pool));
            let found = self.run(Some(kernels), level, &pool);
            for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
                let (row, col) = (i / (self.n + self.gap), i % (self.n + self.gap));
                assert_eq!(
                    e.to_bits(),
                    f.to_bits(),
                    "{level} {self:?}: C[{row}][{col}] is {f}, the twin has {e}"
                );
            }
        }
    }

    /// Within 2 K eps sum |a b| of the product in f64 (Higham 2002, section 3.1, with room for bias and accumulation).
    fn check_bound(&self) {
        let pool = Pool::new(self.threads);
        let [(a_rows, a_cols), (b_rows, b_cols)] = self.shapes();
        let (a, b) = (self.data(0, a_rows, a_cols), self.data(1, b_rows, b_cols));
        let at = |data: &[f32], cols: usize, i: usize, j: usize| {
            f64::from(data[i * (cols + self.gap) + j])
        };
        let bias = numbers(self.seed + 77, self.n);
        let before = self.initial_c();
        for kernels in levels() {
            let found = self.run(Some(kernels), kernels.level(), &pool);
            for i in 0..self.m {
                for j in 0..self.n {
                    let (mut sum, mut magnitude) = (0.0, 0.0);
                    for k in 0..self.k {
                        let a = if self.product == Product::Tn {
                            at(&a, a_cols, k, i)
                        } else {
                            at(&a, a_cols, i, k)
                        };
                        let b = if self.product == Product::Nt {
                            at(&b, b_cols, j, k)
                        } else {
                            at(&b, b_cols, k, j)
                        };
                        sum += a * b;
                        magnitude += (a * b).abs();
                    }
                    if self.bias {
                        sum += f64::from(bias[j]);
                        magnitude += f64::from(bias[j]).abs();
                    }
                    if self.accumulate {
                        sum += f64::from(before[i * (self.n + self.gap) + j]);
                        magnitude += f64::from(before[i * (self.n + self.gap) + j]).abs();
                    }
                    let bound = 2.0 * (self.k.max(1) as f64) * f64::from(f32::EPSILON) * magnitude;
                    let error = (f64::from(found[i * (self.n + self.gap) + j]) - sum).abs();
                    assert!(
                        error <= bound,
                        "{} {self:?}: C[{i}][{j}] is off by {error}, bound {bound}",
                        kernels.level()
                    );
                }
            }
        }
    }
}

const PRODUCTS: [Product; 3] = [Product::Nt, Product::Nn, Product::Tn];

#[test]
fn small_sizes_around_the_micro_tiles() {
    let sizes = [
        0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 50,
    ];
    for product in PRODUCTS {
        for m in sizes {
            for n in sizes {
                Case {
                    bias: product == Product::Nt,
                    ..Case::new(product, m, n, 1 + (m * n) % 37)
                }
                .check_bits();
            }
        }
    }
}

#[test]
fn sizes_around_the_tiles_of_work() {
    for product in PRODUCTS {
        for (m, n) in [
            (95, 193),
            (96, 192),
            (97, 191),
            (193, 97),
            (191, 383),
            (389, 50),
            (50, 389),
        ] {
            for (k, accumulate) in [(0, true), (1, false), (16, true), (67, false)] {
                Case {
                    accumulate,
                    gap: 3,
                    ..Case::new(product, m, n, k)
                }
                .check_bits();
            }
        }
    }
}

#[test]
fn chains_across_chunks_of_depth() {
    for product in PRODUCTS {
        for k in [255, 256, 257, 511, 512, 513, 1025, 1543] {
            for (m, n) in [(1, 70), (3, 800), (9, 50), (53, 61)] {
                for accumulate in [false, true] {
                    let bias = product == Product::Nt && k % 2 == 1;
                    Case {
                        bias,
                        accumulate,
                        ..Case::new(product, m, n, k)
                    }
                    .check_bits();
                }
            }
        }
    }
}

#[test]
fn chains_across_blocks_of_depth() {
    for product in PRODUCTS {
        for accumulate in [false, true] {
            for (m, n, k) in [
                (49, 5, 8192 + 777),
                (5, 50, 2 * 8192 + 9),
                (3, 2100, 1100),
                (2100, 3, 1100),
            ] {
                Case {
                    accumulate,
                    ..Case::new(product, m, n, k)
                }
                .check_bits();
            }
        }
    }
}

#[test]
fn wide_operands_are_streamed_in_bands() {
    for product in PRODUCTS {
        for (m, n) in [(49, 21_000), (21_000, 3), (2, 43_000)] {
            let accumulate = m == 2;
            Case {
                accumulate,
                bias: product == Product::Nt,
                ..Case::new(product, m, n, 100)
            }
            .check_bits();
        }
    }
}

#[test]
fn products_are_near_the_exact_ones() {
    for product in PRODUCTS {
        for (m, n, k) in [(37, 61, 1), (64, 96, 64), (65, 50, 1000), (3, 65, 700)] {
            for (bias, accumulate) in [(false, false), (true, true)] {
                let bias = bias && product == Product::Nt;
                Case {
                    bias,
                    accumulate,
                    gap: 5,
                    ..Case::new(product, m, n, k)
                }
                .check_bound();
            }
        }
    }
}

/// A row of the product has the same bits computed alone, with a few others, or with many: decoding equals training.
#[test]
fn a_row_does_not_depend_on_how_many_there_are() {
    let (n, k) = (130, 600);
    let (a, b) = (numbers(1, 300 * k), numbers(2, n * k));
    let pool = Pool::new(2);
    for kernels in levels() {
        let product = |first: usize, rows: usize| {
            let mut c = vec![f32::NAN; rows * n];
            let a = Mat::new(&a, 300, k).rows(first..first + rows);
            kernels.gemm_nt(
                &pool,
                a,
                Mat::new(&b, n, k),
                MatMut::new(&mut c, rows, n),
                None,
                false,
            );
            c
        };
        let all = product(0, 300);
        for rows in [1, 2, 5, 8, 9, 48, 49, 97] {
            for first in [0, 7, 200] {
                assert!(
                    product(first, rows) == all[first * n..(first + rows) * n],
                    "{rows} rows at {}",
                    kernels.level()
                );
            }
        }
    }
}

#[test]
fn avx2_and_avx512_give_the_same_bits() {
    let (Some(narrow), Some(wide)) = (Kernels::new(Level::Avx2), Kernels::new(Level::Avx512))
    else {
        println!("not run: this CPU lacks AVX2 or AVX-512");
        return;
    };
    let pool = Pool::new(2);
    for product in PRODUCTS {
        let case = Case {
            accumulate: true,
            ..Case::new(product, 211, 199, 1300)
        };
        assert!(
            case.run(Some(narrow), Level::Avx2, &pool)
                == case.run(Some(wide), Level::Avx512, &pool)
        );
    }
}

#[test]
fn threads_do_not_change_bits() {
    let pools: Vec<Pool> = [1, 2, 3, 8].into_iter().map(Pool::new).collect();
    for kernels in levels() {
        for product in PRODUCTS {
            for (m, n, k) in [(300, 500, 700), (5, 2000, 300), (2000, 70, 100)] {
                let case = Case {
                    accumulate: true,
                    ..Case::new(product, m, n, k)
                };
                let first = case.run(Some(kernels), kernels.level(), &pools[0]);
                for pool in &pools[1..] {
                    let found = case.run(Some(kernels), kernels.level(), pool);
                    assert!(
                        found == first,
                        "{} {case:?}: {} threads",
                        kernels.level(),
                        pool.threads()
                    );
                }
            }
        }
    }
}

#[test]
fn infinities_and_nans_stay_in_their_rows_and_columns() {
    let (m, n, k) = (20, 60, 30);
    let pool = Pool::new(1);
    for kernels in levels() {
        let (mut a, b) = (numbers(5, m * k), numbers(6, n * k));
        a[3 * k + 4] = f32::NAN;
        a[7 * k + 29] = f32::INFINITY;
        let mut c = vec![0.0; m * n];
        kernels.gemm_nt(
            &pool,
            Mat::new(&a, m, k),
            Mat::new(&b, n, k),
            MatMut::new(&mut c, m, n),
            None,
            false,
        );
        for (i, row) in c.chunks(n).enumerate() {
            let finite = row.iter().filter(|x| x.is_finite()).count();
            assert_eq!(
                finite == n,
                i != 3 && i != 7,
                "row {i} at {}",
                kernels.level()
            );
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let pool = Pool::new(1);
    let kernels = Kernels::best();
    let data = vec![0.0; 64];
    let mut out = vec![0.0; 64];
    let mut refused = |f: &dyn Fn(MatMut)| {
        let c = MatMut::new(&mut out, 8, 8);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(c))).is_err()
    };
    assert!(!refused(&|c| kernels.gemm_nt(
        &pool,
        Mat::new(&data, 8, 8),
        Mat::new(&data, 8, 8),
        c,
        None,
        false
    )));
    assert!(refused(&|c| kernels.gemm_nt(
        &pool,
        Mat::new(&data, 8, 8),
        Mat::new(&data, 16, 4),
        c,
        None,
        false
    )));
    assert!(refused(&|c| kernels.gemm_nt(
        &pool,
        Mat::new(&data, 8, 8),
        Mat::new(&data, 8, 8),
        c,
        Some(&[0.0; 7]),
        false
    )));
    assert!(refused(&|c| kernels.gemm_nn(
        &pool,
        Mat::new(&data, 16, 4),
        Mat::new(&data, 4, 16),
        c,
        false
    )));
    assert!(refused(&|c| kernels.gemm_tn(
        &pool,
        Mat::new(&data, 8, 8),
        Mat::new(&data, 4, 16),
        c,
        false
    )));
}

#[test]
fn column_sums_equal_the_twin_at_every_level() {
    let pool = Pool::new(2);
    for (rows, cols, gap) in [
        (0, 5, 0),
        (1, 1, 0),
        (7, 127, 1),
        (1000, 128, 0),
        (1000, 129, 7),
        (333, 517, 0),
    ] {
        let data = numbers(9, rows * (cols + gap));
        let a = Mat::with_stride(&data, rows, cols, cols + gap);
        for accumulate in [false, true] {
            let initial = if accumulate {
                numbers(10, cols)
            } else {
                vec![f32::NAN; cols]
            };
            let mut expected = initial.clone();
            scalar::gemm::column_sum(a, &mut expected, accumulate);
            for kernels in levels() {
                let mut found = initial.clone();
                kernels.column_sum(&pool, a, &mut found, accumulate);
                let same = expected
                    .iter()
                    .zip(&found)
                    .all(|(e, f)| e.to_bits() == f.to_bits());
                assert!(same, "{} {rows} x {cols}", kernels.level());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_product_equals_the_twin(
        product in prop::sample::select(PRODUCTS.to_vec()),
        (m, n, k) in (0_usize..140, 0_usize..260, 0_usize..700),
        gap in 0_usize..9,
        (bias, accumulate) in any::<(bool, bool)>(),
        threads in prop::sample::select(vec![1_usize, 2, 3, 8]),
        seed in 0_u64..1 << 32,
    ) {
        let bias = bias && product == Product::Nt;
        Case { product, m, n, k, gap, bias, accumulate, threads, seed }.check_bits();
    }
}
