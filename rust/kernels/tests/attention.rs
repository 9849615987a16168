//! Attention: bits against the scalar twin, gradients against finite differences of an f64 reference, and the promises of
//! one arithmetic: alone, packed, in chunks, decoded token by token, on any number of threads.

mod common;

use common::{all_kernels, assert_close, assert_same_bits, normal, numerical_gradient, widen};
use ingot_kernels::scalar::attention as twin;
use ingot_kernels::scalar::random::is_kept;
use ingot_kernels::{
    AttentionDropout, AttentionShape, DropoutKey, Kernels, Mat, MatMut, PAGE_POSITIONS,
    PagedSequence, Pool, random,
};
use proptest::prelude::*;

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
    }
}

fn offsets(lengths: &[usize]) -> Vec<i64> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + *length as i64);
    }
    offsets
}

/// Packed q, k, v and `d_out` for some sequences.
struct Inputs {
    shape: AttentionShape,
    offsets: Vec<i64>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
}

/// Results of a forward and a backward pass.
#[derive(PartialEq)]
struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
}

impl Inputs {
    fn new(shape: AttentionShape, lengths: &[usize]) -> Self {
        let n: usize = lengths.iter().sum();
        let (width, kv_width) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        Self {
            shape,
            offsets: offsets(lengths),
            q: normal(1, 1.5, n * width),
            k: normal(2, 1.5, n * kv_width),
            v: normal(3, 1.0, n * kv_width),
            d_out: normal(4, 1.0, n * width),
        }
    }

    fn widths(&self) -> (usize, usize) {
        (
            self.shape.heads * self.shape.head_dim,
            self.shape.kv_heads * self.shape.head_dim,
        )
    }

    fn num_tokens(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    /// The inputs of one sequence alone.
    fn sequence(&self, s: usize) -> Self {
        let (start, end) = (self.offsets[s] as usize, self.offsets[s + 1] as usize);
        let (width, kv_width) = self.widths();
        let cut = |x: &[f32], width: usize| x[start * width..end * width].to_vec();
        Self {
            shape: self.shape,
            offsets: vec![0, (end - start) as i64],
            q: cut(&self.q, width),
            k: cut(&self.k, kv_width),
            v: cut(&self.v, kv_width),
            d_out: cut(&self.d_out, width),
        }
    }

    fn run(&self, kernels: Kernels, pool: &Pool, dropout: Option<&AttentionDropout>) -> Results {
        let n = self.num_tokens();
        let (width, kv_width) = self.widths();
        // q, k and v side by side, as one product of the model leaves them.
        let stride = width + 2 * kv_width;
        let mut qkv = vec![f32::NAN; n * stride];
        for (t, row) in qkv.chunks_exact_mut(stride).enumerate() {
            row[..width].copy_from_slice(&self.q[t * width..][..width]);
            row[width..width + kv_width].copy_from_slice(&self.k[t * kv_width..][..kv_width]);
            row[width + kv_width..].copy_from_slice(&self.v[t * kv_width..][..kv_width]);
        }
        let all = Mat::new(&qkv, n, stride);
        let (q, k, v) = (
            all.cols(0..width),
            all.cols(width..width + kv_width),
            all.cols(width + kv_width..stride),
        );
        let (mut out, mut lse) = (
            vec![f32::NAN; n * width],
            vec![f32::NAN; n * self.shape.heads],
        );
        let shape = &self.shape;
        kernels.attention_forward(
            pool,
            shape,
            &self.offsets,
            q,
            k,
            v,
            MatMut::new(&mut out, n, width),
            &mut lse,
            dropout,
        );
        let mut d_qkv = vec![f32::NAN; n * stride];
        let (d_q, d_kv) = MatMut::new(&mut d_qkv, n, stride).split_at_col(width);
        let (d_k, d_v) = d_kv.split_at_col(kv_width);
        let (out_mat, d_out) = (Mat::new(&out, n, width), Mat::new(&self.d_out, n, width));
        kernels.attention_backward(
            pool,
            shape,
            &self.offsets,
            q,
            k,
            v,
            out_mat,
            &lse,
            d_out,
            d_q,
            d_k,
            d_v,
            dropout,
        );
        let columns = |range: std::ops::Range<usize>| -> Vec<f32> {
            d_qkv
                .chunks_exact(stride)
                .flat_map(|row| row[range.clone()].iter().copied())
                .collect()
        };
        let (d_q, d_k, d_v) = (
            columns(0..width),
            columns(width..width + kv_width),
            columns(width + kv_width..stride),
        );
        Results {
            out,
            lse,
            d_q,
            d_k,
            d_v,
        }
    }
}

/// Attention of one sequence in f64, straight from the definition; `factor(head, t, j)` multiplies a weight.
fn reference(
    shape: &AttentionShape,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    factor: &dyn Fn(usize, usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *shape;
    let length = q.len() / (heads * head_dim);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; heads * length]);
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        for t in 0..length {
            let query = &q[(t * heads + head) * head_dim..][..head_dim];
            let scores: Vec<f64> = (0..=t)
                .map(|j| {
                    let key = &k[(j * kv_heads + kv_head) * head_dim..][..head_dim];
                    query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(shape.scale)
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
            lse[head * length + t] = log_sum;
            for (j, score) in scores.iter().enumerate() {
                let weight = (score - log_sum).exp() * factor(head, t, j);
                let value = &v[(j * kv_heads + kv_head) * head_dim..][..head_dim];
                for (out, value) in out[(t * heads + head) * head_dim..][..head_dim]
                    .iter_mut()
                    .zip(value)
                {
                    *out += weight * value;
                }
            }
        }
    }
    (out, lse)
}

/// Shapes that meet every edge: odd and tiny heads, widths of 1 to 5 vectors, groups, many tiles.
fn cases() -> Vec<(AttentionShape, Vec<usize>)> {
    vec![
        (shape(1, 1, 1), vec![1, 2, 3]),
        (shape(2, 1, 5), vec![7, 1, 0, 20]),
        (shape(2, 2, 16), vec![63, 64, 65, 1]),
        (shape(4, 2, 24), vec![130]),
        (shape(3, 1, 33), vec![16, 17, 100]),
        (shape(2, 2, 64), vec![200, 64]),
        (shape(6, 2, 65), vec![70]),
        (shape(1, 1, 128), vec![129, 5]),
    ]
}

const IDS: [i64; 4] = [901, -3, 7, 1 << 40];

fn dropout(p: f32, sequences: usize) -> AttentionDropout<'static> {
    AttentionDropout {
        p,
        seed: 5,
        layer: 1,
        sequence_ids: &IDS[..sequences],
    }
}

#[test]
fn every_level_has_its_twins_bits() {
    let pool = Pool::new(2);
    for kernels in all_kernels() {
        let level = kernels.level();
        for (shape, lengths) in cases() {
            let inputs = Inputs::new(shape, &lengths);
            let drops = dropout(0.2, lengths.len());
            for dropout in [None, Some(&drops)] {
                let results = inputs.run(kernels, &pool, dropout);
                let (width, kv_width) = inputs.widths();
                for s in 0..lengths.len() {
                    let what = format!(
                        "{level}, {shape:?}, {lengths:?}, sequence {s}, dropout {}",
                        dropout.is_some()
                    );
                    let one = inputs.sequence(s);
                    let (start, end) = (inputs.offsets[s] as usize, inputs.offsets[s + 1] as usize);
                    let (out, lse) =
                        twin::attention_forward(level, &shape, &one.q, &one.k, &one.v, dropout, s);
                    assert_same_bits(
                        &results.out[start * width..end * width],
                        &out,
                        &format!("out, {what}"),
                    );
                    let n = inputs.num_tokens();
                    for head in 0..shape.heads {
                        let expected = &lse[head * one.num_tokens()..][..one.num_tokens()];
                        assert_same_bits(
                            &results.lse[head * n + start..head * n + end],
                            expected,
                            &format!("lse, {what}"),
                        );
                    }
                    let arrays = [&one.q[..], &one.k, &one.v, &out, &lse, &one.d_out];
                    let (d_q, d_k, d_v) =
                        twin::attention_backward(level, &shape, arrays, dropout, s);
                    assert_same_bits(
                        &results.d_q[start * width..end * width],
                        &d_q,
                        &format!("d_q, {what}"),
                    );
                    assert_same_bits(
                        &results.d_k[start * kv_width..end * kv_width],
                        &d_k,
                        &format!("d_k, {what}"),
                    );
                    assert_same_bits(
                        &results.d_v[start * kv_width..end * kv_width],
                        &d_v,
                        &format!("d_v, {what}"),
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences_of_f64() {
    let pool = Pool::new(2);
    for (shape, length) in [
        (shape(1, 1, 3), 9),
        (shape(4, 2, 5), 6),
        (shape(2, 1, 4), 67),
    ] {
        let inputs = Inputs::new(shape, &[length]);
        let (q, k, v, d_out) = (
            widen(&inputs.q),
            widen(&inputs.k),
            widen(&inputs.v),
            widen(&inputs.d_out),
        );
        let drops = dropout(0.3, 1);
        for dropout in [None, Some(&drops)] {
            let factor = |head: usize, t: usize, j: usize| {
                let Some(dropout) = dropout else { return 1.0 };
                let key = DropoutKey {
                    seed: dropout.seed,
                    layer: dropout.layer,
                    site: random::site::ATTENTION_WEIGHTS + head as u32,
                    sequence_id: dropout.sequence_ids[0],
                    position: t as u64,
                };
                if is_kept(key, dropout.p, j as u32) {
                    1.0 / (1.0 - f64::from(dropout.p))
                } else {
                    0.0
                }
            };
            let loss = |q: &[f64], k: &[f64], v: &[f64]| {
                let (out, _) = reference(&shape, q, k, v, &factor);
                out.iter().zip(&d_out).map(|(o, d)| o * d).sum()
            };
            let (out, lse) = reference(&shape, &q, &k, &v, &factor);
            let d_q = numerical_gradient(&q, |q| loss(q, &k, &v));
            let d_k = numerical_gradient(&k, |k| loss(&q, k, &v));
            let d_v = numerical_gradient(&v, |v| loss(&q, &k, v));
            for kernels in all_kernels() {
                let results = inputs.run(kernels, &pool, dropout);
                let what = format!(
                    "{} {shape:?} dropout {}",
                    kernels.level(),
                    dropout.is_some()
                );
                assert_close(&results.out, &out, 2e-6, 0.0, &format!("out {what}"));
                assert_close(&results.lse, &lse, 2e-6, 0.0, &format!("lse {what}"));
                assert_close(&results.d_q, &d_q, 1e-5, 0.0, &format!("d_q {what}"));
                assert_close(&results.d_k, &d_k, 1e-5, 0.0, &format!("d_k {what}"));
                assert_close(&results.d_v, &d_v, 1e-5, 0.0, &format!("d_v {what}"));
            }
        }
    }
}

#[test]
fn threads_and_neighbours_change_nothing() {
    let lengths = [150, 3, 77];
    let inputs = Inputs::new(shape(4, 2, 40), &lengths);
    let drops = dropout(0.1, 3);
    for kernels in all_kernels() {
        let base = inputs.run(kernels, &Pool::new(1), Some(&drops));
        for threads in [2, 3, 8] {
            let other = inputs.run(kernels, &Pool::new(threads), Some(&drops));
            assert!(base == other, "{threads} threads at {}", kernels.level());
        }
        let (width, kv_width) = inputs.widths();
        for (s, id) in IDS.iter().enumerate().take(3) {
            let id = [*id];
            let alone = AttentionDropout {
                sequence_ids: &id,
                ..drops
            };
            let one = inputs.sequence(s).run(kernels, &Pool::new(2), Some(&alone));
            let start = inputs.offsets[s] as usize;
            assert_same_bits(
                &one.out,
                &base.out[start * width..][..one.out.len()],
                "out of a sequence alone",
            );
            assert_same_bits(
                &one.d_q,
                &base.d_q[start * width..][..one.d_q.len()],
                "d_q of a sequence alone",
            );
            assert_same_bits(
                &one.d_k,
                &base.d_k[start * kv_width..][..one.d_k.len()],
                "d_k of a sequence alone",
            );
            assert_same_bits(
                &one.d_v,
                &base.d_v[start * kv_width..][..one.d_v.len()],
                "d_v of a sequence alone",
            );
        }
    }
}

#[test]
fn avx2_and_avx512_agree() {
    let fused: Vec<Kernels> = all_kernels()
        .into_iter()
        .filter(|kernels| kernels.level().is_fused())
        .collect();
    let inputs = Inputs::new(shape(3, 3, 48), &[100, 31]);
    let pool = Pool::new(2);
    let results: Vec<Results> = fused
        .iter()
        .map(|kernels| inputs.run(*kernels, &pool, None))
        .collect();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

/// Pages of one sequence, filled with its keys and values; slots never written hold NaN.
fn pages(inputs: &Inputs) -> Vec<Vec<f32>> {
    let shape = &inputs.shape;
    let (_, kv_width) = inputs.widths();
    let mut pages =
        vec![vec![f32::NAN; shape.page_floats()]; inputs.num_tokens().div_ceil(PAGE_POSITIONS)];
    for t in 0..inputs.num_tokens() {
        let row = t * kv_width..(t + 1) * kv_width;
        shape.write_page(
            &mut pages[t / PAGE_POSITIONS],
            t,
            &inputs.k[row.clone()],
            &inputs.v[row],
        );
    }
    pages
}

#[test]
fn decoding_has_the_bits_of_training() {
    let pool = Pool::new(2);
    for kernels in all_kernels() {
        for (shape, lengths) in cases() {
            let inputs = Inputs::new(shape, &lengths);
            let trained = inputs.run(kernels, &pool, None);
            let (width, _) = inputs.widths();
            let alone: Vec<Inputs> = (0..lengths.len()).map(|s| inputs.sequence(s)).collect();
            let stores: Vec<Vec<Vec<f32>>> = alone.iter().map(pages).collect();
            let views: Vec<Vec<&[f32]>> = stores
                .iter()
                .map(|pages| pages.iter().map(Vec::as_slice).collect())
                .collect();
            // One token of every sequence that is long enough, all in one call.
            for t in 0..*lengths.iter().max().expect("cases have sequences") {
                let live: Vec<usize> = (0..lengths.len()).filter(|s| t < lengths[*s]).collect();
                let items: Vec<PagedSequence> = live
                    .iter()
                    .map(|s| PagedSequence {
                        rows: 1,
                        length: t + 1,
                        pages: &views[*s],
                    })
                    .collect();
                let q: Vec<f32> = live
                    .iter()
                    .flat_map(|s| alone[*s].q[t * width..][..width].to_vec())
                    .collect();
                let mut out = vec![f32::NAN; q.len()];
                kernels.attention_decode(
                    &pool,
                    &shape,
                    &items,
                    Mat::new(&q, live.len(), width),
                    MatMut::new(&mut out, live.len(), width),
                );
                for (row, s) in live.iter().enumerate() {
                    let at = (inputs.offsets[*s] as usize + t) * width;
                    let what = format!("{} {shape:?} sequence {s} token {t}", kernels.level());
                    assert_same_bits(
                        &out[row * width..][..width],
                        &trained.out[at..][..width],
                        &what,
                    );
                }
            }
            // Whole prompts in chunks of different sizes.
            for chunk in [1000, 64, 37] {
                for (s, one) in alone.iter().enumerate() {
                    let mut out = vec![f32::NAN; one.q.len()];
                    for first in (0..one.num_tokens()).step_by(chunk) {
                        let rows = chunk.min(one.num_tokens() - first);
                        let items = [PagedSequence {
                            rows,
                            length: first + rows,
                            pages: &views[s],
                        }];
                        let range = first * width..(first + rows) * width;
                        let q = Mat::new(&one.q[range.clone()], rows, width);
                        let out = MatMut::new(&mut out[range], rows, width);
                        kernels.attention_decode(&pool, &shape, &items, q, out);
                    }
                    let start = inputs.offsets[s] as usize * width;
                    let what = format!(
                        "{} {shape:?} sequence {s} in chunks of {chunk}",
                        kernels.level()
                    );
                    assert_same_bits(&out, &trained.out[start..start + out.len()], &what);
                }
            }
        }
    }
}

#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    let pool = Pool::new(2);
    for kernels in all_kernels() {
        let inputs = Inputs::new(shape(2, 1, 20), &[90]);
        let (width, kv_width) = inputs.widths();
        let base = inputs.run(kernels, &pool, None);
        for changed in [0, 40, 89] {
            let mut other = Inputs {
                q: inputs.q.clone(),
                k: inputs.k.clone(),
                v: inputs.v.clone(),
                ..inputs.sequence(0)
            };
            other.k[changed * kv_width] += 1.0;
            other.v[changed * kv_width] += 1.0;
            other.q[changed * width] += 1.0;
            let moved = other.run(kernels, &pool, None);
            let cut = changed * width;
            assert_same_bits(
                &moved.out[..cut],
                &base.out[..cut],
                "tokens before the change",
            );
            for t in changed..90 {
                assert_ne!(
                    moved.out[t * width..][..width],
                    base.out[t * width..][..width],
                    "token {t}"
                );
            }
        }
    }
}

#[test]
fn dropout_of_weights_keeps_the_mean_over_seeds() {
    let inputs = Inputs::new(shape(1, 1, 4), &[20]);
    let pool = Pool::new(1);
    let kernels = all_kernels()[0];
    let plain = inputs.run(kernels, &pool, None).out;
    let seeds = 3000;
    let mut mean = vec![0.0; plain.len()];
    for seed in 0..seeds {
        let dropout = AttentionDropout {
            p: 0.25,
            seed,
            layer: 0,
            sequence_ids: &[1],
        };
        for (mean, out) in mean
            .iter_mut()
            .zip(inputs.run(kernels, &pool, Some(&dropout)).out)
        {
            *mean += f64::from(out) / seeds as f64;
        }
    }
    for (mean, plain) in mean.iter().zip(plain) {
        // A weight of 1 has standard deviation sqrt(p / (1 - p)) = 0.58; values are up to about 3.
        assert!((mean - f64::from(plain)).abs() < 0.15, "{mean} {plain}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let pool = Pool::new(1);
    for kernels in all_kernels() {
        let mut inputs = Inputs::new(shape(1, 1, 8), &[100]);
        for x in inputs.q.iter_mut().chain(&mut inputs.k) {
            *x *= 300.0;
        }
        let results = inputs.run(kernels, &pool, None);
        let all = [
            results.out,
            results.lse,
            results.d_q,
            results.d_k,
            results.d_v,
        ];
        assert!(
            all.iter().all(|x| kernels.is_finite(x)),
            "{}",
            kernels.level()
        );
    }
}

#[test]
fn empty_batches_are_legal() {
    let pool = Pool::new(2);
    for kernels in all_kernels() {
        let results = Inputs::new(shape(2, 1, 4), &[]).run(kernels, &pool, None);
        assert!(results.out.is_empty());
        let results = Inputs::new(shape(2, 1, 4), &[0, 0]).run(kernels, &pool, None);
        assert!(results.d_k.is_empty());
    }
}

#[test]
fn wrong_offsets_and_pages_are_refused() {
    let pool = Pool::new(1);
    let refused =
        |call: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err();
    let kernels = all_kernels()[0];
    for offsets in [vec![0, 3], vec![1, 4], vec![0, 3, 2, 4], vec![]] {
        let mut inputs = Inputs::new(shape(1, 1, 4), &[4]);
        inputs.offsets = offsets;
        let call = || {
            let x = Mat::new(&inputs.q, 4, 4);
            let mut out = [0.0; 16];
            let out = MatMut::new(&mut out, 4, 4);
            kernels.attention_forward(
                &pool,
                &inputs.shape,
                &inputs.offsets,
                x,
                x,
                x,
                out,
                &mut [0.0; 4],
                None,
            );
        };
        assert!(refused(&call), "{:?}", inputs.offsets);
    }
    let shape = shape(1, 1, 4);
    let page = vec![0.0; shape.page_floats()];
    for (rows, length, pages) in [
        (1, 65, vec![&page[..]]),
        (2, 1, vec![&page[..]]),
        (1, 1, vec![&page[1..]]),
    ] {
        let call = || {
            let items = [PagedSequence {
                rows,
                length,
                pages: &pages,
            }];
            let (q, mut out) = (vec![0.0; rows * 4], vec![0.0; rows * 4]);
            kernels.attention_decode(
                &pool,
                &shape,
                &items,
                Mat::new(&q, rows, 4),
                MatMut::new(&mut out, rows, 4),
            );
        };
        assert!(refused(&call), "{rows} rows, {length} positions");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_shape_has_its_twins_bits(
        kv_heads in 1_usize..3,
        group in 1_usize..4,
        head_dim in 1_usize..40,
        lengths in prop::collection::vec(0_usize..100, 1..4),
        p in prop_oneof![Just(0.0_f32), 0.01_f32..0.9],
    ) {
        let inputs = Inputs::new(shape(kv_heads * group, kv_heads, head_dim), &lengths);
        let drops = dropout(p, lengths.len());
        let pool = Pool::new(2);
        let (width, _) = inputs.widths();
        for kernels in all_kernels() {
            let results = inputs.run(kernels, &pool, Some(&drops));
            for s in 0..lengths.len() {
                let one = inputs.sequence(s);
                let (out, _) = twin::attention_forward(kernels.level(), &one.shape, &one.q, &one.k, &one.v, Some(&drops), s);
                let start = inputs.offsets[s] as usize * width;
                assert_same_bits(&results.out[start..start + out.len()], &out, "out");
            }
        }
    }
}
