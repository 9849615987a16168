//! Speed of the matrix products, packing included, beside the machine's measured peak.
//!
//! `cargo run --release -p ingot-kernels --example gemm [-- LEVEL] [THREADS]`
//!
//! Answers are compared with f64 sums on random elements before anything is timed. Times are the best of several runs.
#![allow(clippy::print_stdout, reason = "a report for the terminal")]

use std::time::Instant;

use ingot_kernels::{Buffer, Kernels, Level, Mat, MatMut, Pool, measured_peak};

/// Random numbers in aligned memory, as parameters and activations have it.
fn numbers(seed: u64, len: usize) -> Buffer {
    let mut state = seed;
    let mut buffer = Buffer::zeroed(len);
    for x in buffer.iter_mut() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *x = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
    }
    buffer
}

/// Time of one call of the pool with an empty item per thread, in microseconds.
fn pool_call_us(pool: &Pool) -> f64 {
    const CALLS: u32 = 1000;
    let start = Instant::now();
    for _ in 0..CALLS {
        pool.for_index(false, pool.threads(), 0, |_, _| {});
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS)
}

/// One linear layer applied to a number of tokens: x `[tokens, inputs]`, weight `[outputs, inputs]`.
struct Layer {
    tokens: usize,
    inputs: usize,
    outputs: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}

impl Layer {
    /// (m, n, k) of a product.
    fn size(&self, product: Product) -> (usize, usize, usize) {
        match product {
            Product::Forward => (self.tokens, self.outputs, self.inputs),
            Product::InputGradient => (self.tokens, self.inputs, self.outputs),
            Product::WeightGradient => (self.outputs, self.inputs, self.tokens),
        }
    }

    /// Checks and times a product; returns the best time in seconds.
    fn measure(&self, product: Product, kernels: Kernels, pool: &Pool) -> f64 {
        let (m, n, k) = self.size(product);
        let (a, b) = (numbers(1, m * k), numbers(2, n * k));
        let mut c = Buffer::zeroed(m * n);
        let run = |c: &mut [f32]| {
            let c = MatMut::new(c, m, n);
            match product {
                Product::Forward => {
                    kernels.gemm_nt(pool, Mat::new(&a, m, k), Mat::new(&b, n, k), c, None, false);
                }
                Product::InputGradient => {
                    kernels.gemm_nn(pool, Mat::new(&a, m, k), Mat::new(&b, k, n), c, false);
                }
                Product::WeightGradient => {
                    kernels.gemm_tn(pool, Mat::new(&a, k, m), Mat::new(&b, k, n), c, true);
                }
            }
        };
        run(&mut c);
        for probe in 0..100 {
            let (i, j) = (probe * 7919 % m, probe * 104_729 % n);
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for l in 0..k {
                let a = if product == Product::WeightGradient {
                    a[l * m + i]
                } else {
                    a[i * k + l]
                };
                let b = if product == Product::Forward {
                    b[j * k + l]
                } else {
                    b[l * n + j]
                };
                sum += f64::from(a) * f64::from(b);
                magnitude += (f64::from(a) * f64::from(b)).abs();
            }
            let error = (f64::from(c[i * n + j]) - sum).abs();
            let bound = 2.0 * k as f64 * f64::from(f32::EPSILON) * magnitude;
            assert!(
                error <= bound,
                "element ({i}, {j}) of {m} x {n} x {k} is off by {error}, bound {bound}"
            );
        }
        let flops = 2.0 * m as f64 * n as f64 * k as f64;
        let repeats = (4e10 / flops).clamp(3.0, 1000.0) as usize;
        (0..repeats).fold(f64::INFINITY, |best, _| {
            let start = Instant::now();
            run(&mut c);
            best.min(start.elapsed().as_secs_f64())
        })
    }
}

fn main() {
    let mut level = Level::best();
    let mut threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for argument in std::env::args().skip(1) {
        match (Level::parse(&argument), argument.parse()) {
            (Some(named), _) => level = named,
            (None, Ok(number)) => threads = number,
            (None, Err(_)) => {
                println!(
                    "unknown argument {argument:?}: expected portable, avx2, avx512 or a number of threads"
                );
                std::process::exit(2);
            }
        }
    }
    let Some(kernels) = Kernels::new(level) else {
        println!(
            "this CPU lacks level {level}; it has {:?}",
            Level::available()
        );
        std::process::exit(2);
    };
    let pool = Pool::new(threads);
    let peak = measured_peak(kernels, &pool);
    println!(
        "level {level}, {threads} threads; peak {:.0} GF/s, read {:.1} GB/s",
        peak.gflops, peak.read_gbps
    );
    println!("one call of the pool: {:.1} us", pool_call_us(&pool));
    println!("GF/s (share of peak), packing included");
    println!(
        "{:>24} {:>14} {:>14} {:>14}",
        "tokens x in -> out", "forward", "d_input", "d_weight"
    );
    for (tokens, inputs, outputs) in [
        (768, 128, 128),
        (768, 128, 512),
        (768, 512, 128),
        (768, 128, 65),
        (4096, 128, 512),
        (1024, 768, 768),
        (1024, 768, 3072),
        (1024, 3072, 768),
        (16_384, 384, 384),
        (16_384, 384, 1536),
        (16_384, 1536, 384),
        (512, 768, 50_257),
    ] {
        let layer = Layer {
            tokens,
            inputs,
            outputs,
        };
        let cell = |product| {
            let (m, n, k) = layer.size(product);
            let gflops = 2e-9 * (m * n * k) as f64 / layer.measure(product, kernels, &pool);
            format!("{gflops:.0} ({:.0} %)", 100.0 * gflops / peak.gflops)
        };
        println!(
            "{:>24} {:>14} {:>14} {:>14}",
            format!("{tokens} x {inputs} -> {outputs}"),
            cell(Product::Forward),
            cell(Product::InputGradient),
            cell(Product::WeightGradient)
        );
    }
    println!("few rows (decoding): microseconds and GB/s of weights read, forward only");
    for (inputs, outputs) in [(128, 512), (768, 2304), (3072, 768), (768, 50_257)] {
        print!("{:>24}", format!("{inputs} -> {outputs}"));
        for tokens in [1, 2, 4, 8, 16, 32, 64] {
            let time_s = Layer {
                tokens,
                inputs,
                outputs,
            }
            .measure(Product::Forward, kernels, &pool);
            print!(
                "  {tokens}: {:.0} us {:.0}",
                time_s * 1e6,
                4e-9 * (inputs * outputs) as f64 / time_s
            );
        }
        println!();
    }
}
