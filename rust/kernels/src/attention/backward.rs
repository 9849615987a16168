//! The backward pass over packed sequences (Dao et al. 2022, algorithm 4): weights are recomputed from
//! the kept log-sum-exp.

use std::cmp::Reverse;

use super::product::{Extent, Start, Strided};
use super::softmax::{BackwardRows, BlockDropout};
use super::{AttentionDropout, AttentionShape, HeadDropout, Scratch, TILE, sequences};
use crate::simd::LANES;
use crate::{Kernels, Mat, MatMut, Pool};

/// One (sequence, key-value head): all that its query heads contribute is added in one fixed order.
struct Item<'a> {
    sequence: usize,
    start: usize,
    kv_head: usize,
    d_q: MatMut<'a>,
    d_k: MatMut<'a>,
    d_v: MatMut<'a>,
}

/// What all items read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    out: Mat<'a>,
    lse: &'a [f32],
    d_out: Mat<'a>,
    dropout: Option<&'a AttentionDropout<'a>>,
}

/// Scratch of one item. Sizes in floats; T is the sequence's length, P the padded head dimension.
struct Workspace<'a> {
    /// `[T][P]` of one query head: queries, gradients of outputs, gradients of queries.
    q: &'a mut [f32],
    d_out: &'a mut [f32],
    d_q: &'a mut [f32],
    /// `[T]`: sum of `d_out * out`.
    correlation: &'a mut [f32],
    /// `[64][P]`: the tile's keys.
    k: &'a mut [f32],
    /// `[64][P]`: gradients of the tile's keys and values.
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    /// `[head_dim][64]`: keys and values transposed.
    k_transposed: &'a mut [f32],
    v_transposed: &'a mut [f32],
    /// `[64][64]`: scores, then weights; gradients of weights, then of scores.
    scores: &'a mut [f32],
    d_scores: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    fn floats(shape: &AttentionShape, length: usize) -> usize {
        let padded = shape.padded_dim();
        3 * length * padded
            + length.next_multiple_of(LANES)
            + 3 * TILE * padded
            + 2 * shape.head_dim * TILE
            + 2 * TILE * TILE
    }

    fn new(shape: &AttentionShape, length: usize, scratch: &'a mut [f32]) -> Self {
        let padded = shape.padded_dim();
        let mut scratch = Scratch(scratch);
        let mut piece = |floats| scratch.take(floats);
        Self {
            q: piece(length * padded),
            d_out: piece(length * padded),
            d_q: piece(length * padded),
            correlation: &mut piece(length.next_multiple_of(LANES))[..length],
            k: piece(TILE * padded),
            d_k: piece(TILE * padded),
            d_v: piece(TILE * padded),
            k_transposed: piece(shape.head_dim * TILE),
            v_transposed: piece(shape.head_dim * TILE),
            scores: piece(TILE * TILE),
            d_scores: piece(TILE * TILE),
        }
    }
}

impl Kernels {
    /// Gradients of [`Kernels::attention_forward`]; all three are overwritten.
    ///
    /// `out` and `lse` are what the forward pass gave, `d_out` the gradient of a loss with respect to `out`; shapes are
    /// as there. The same `dropout` must be given: the mask is replayed. Work items are (sequence, key-value head), with
    /// the query heads of a group in order, so that sums have one order on any number of threads.
    ///
    /// # Panics
    /// If shapes do not fit one another or the offsets do not run from 0 to N.
    pub fn attention_backward(
        &self,
        pool: &Pool,
        shape: &AttentionShape,
        offsets: &[i64],
        q: Mat,
        k: Mat,
        v: Mat,
        out: Mat,
        lse: &[f32],
        d_out: Mat,
        d_q: MatMut,
        d_k: MatMut,
        d_v: MatMut,
        dropout: Option<&AttentionDropout>,
    ) {
        shape.assert_valid();
        let n = q.num_rows();
        let (width, kv_width) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        let fits = |m: &Mat, width| m.num_rows() == n && m.num_cols() == width;
        let fits_mut = |m: &MatMut, width| m.num_rows() == n && m.num_cols() == width;
        assert!(
            [q, out, d_out].iter().all(|m| fits(m, width))
                && [k, v].iter().all(|m| fits(m, kv_width))
                && fits_mut(&d_q, width)
                && fits_mut(&d_k, kv_width)
                && fits_mut(&d_v, kv_width)
                && lse.len() == shape.heads * n,
            "attention_backward: shapes do not fit"
        );
        let dropout = dropout.filter(|dropout| dropout.p > 0.0);
        let sequences = sequences(offsets, n, dropout);
        if sequences.is_empty() {
            return;
        }
        let row_cuts: Vec<usize> = sequences
            .iter()
            .skip(1)
            .map(|(_, start, _)| *start)
            .collect();
        let cuts =
            |step: usize| -> Vec<usize> { (1..shape.kv_heads).map(|head| head * step).collect() };
        let (group_cuts, head_cuts) = (cuts(shape.group() * shape.head_dim), cuts(shape.head_dim));
        let d_qs = d_q.split_grid(&row_cuts, &group_cuts);
        let d_ks = d_k.split_grid(&row_cuts, &head_cuts);
        let d_vs = d_v.split_grid(&row_cuts, &head_cuts);
        let items =
            d_qs.into_iter()
                .zip(d_ks)
                .zip(d_vs)
                .enumerate()
                .map(|(i, ((d_q, d_k), d_v))| {
                    let (sequence, start, _) = sequences[i / shape.kv_heads];
                    Item {
                        sequence,
                        start,
                        kv_head: i % shape.kv_heads,
                        d_q,
                        d_k,
                        d_v,
                    }
                });
        let mut items: Vec<Item> = items.collect();
        // The longest first, so that no thread ends long after the others. The order changes no result.
        items.sort_by_key(|item| Reverse(item.d_k.num_rows()));
        let longest = sequences
            .iter()
            .map(|(_, start, end)| end - start)
            .max()
            .unwrap_or(0);
        let inputs = Inputs {
            q,
            k,
            v,
            out,
            lse,
            d_out,
            dropout,
        };
        pool.for_each_with_scratch(items, Workspace::floats(shape, longest), |item, scratch| {
            backward_item(*self, shape, inputs, item, scratch);
        });
    }
}

fn backward_item(
    kernels: Kernels,
    shape: &AttentionShape,
    inputs: Inputs,
    mut item: Item,
    scratch: &mut [f32],
) {
    let (dim, padded, group) = (shape.head_dim, shape.padded_dim(), shape.group());
    let (start, length) = (item.start, item.d_k.num_rows());
    let n = inputs.q.num_rows();
    let kv_columns = item.kv_head * dim..(item.kv_head + 1) * dim;
    let (k, v) = (
        inputs.k.rows(start..start + length),
        inputs.v.rows(start..start + length),
    );
    let (k, v) = (k.cols(kv_columns.clone()), v.cols(kv_columns));
    let mut work = Workspace::new(shape, length, scratch);
    for member in 0..group {
        let head = item.kv_head * group + member;
        let columns = head * dim..(head + 1) * dim;
        let lse = &inputs.lse[head * n + start..][..length];
        let head_dropout = inputs
            .dropout
            .map(|dropout| HeadDropout::new(dropout, item.sequence, head));
        let words = head_dropout
            .map(|dropout| dropout.row_words(0..length))
            .unwrap_or_default();

        kernels.pack_rows(
            inputs.q.rows(start..start + length).cols(columns.clone()),
            padded,
            work.q,
        );
        kernels.pack_rows(
            inputs
                .d_out
                .rows(start..start + length)
                .cols(columns.clone()),
            padded,
            work.d_out,
        );
        let out = inputs.out.rows(start..start + length).cols(columns);
        kernels.row_products(out, work.d_out, padded, work.correlation);
        work.d_q.fill(0.0);

        for first_key in (0..length).step_by(TILE) {
            let keys = TILE.min(length - first_key);
            let tile = first_key..first_key + keys;
            let key_rows = k.rows(tile.clone());
            kernels.pack_rows(key_rows, padded, work.k);
            kernels.pack_transposed(key_rows, work.k_transposed);
            kernels.pack_transposed(v.rows(tile.clone()), work.v_transposed);
            if member == 0 {
                work.d_k.fill(0.0);
                work.d_v.fill(0.0);
            } else {
                kernels.pack_rows(item.d_k.as_ref().rows(tile.clone()), padded, work.d_k);
                kernels.pack_rows(item.d_v.as_ref().rows(tile.clone()), padded, work.d_v);
            }
            for first in (first_key..length).step_by(TILE) {
                let pair = Pair {
                    first,
                    rows: TILE.min(length - first),
                    first_key,
                    keys,
                };
                let dropout = head_dropout.as_ref().map(|dropout| (dropout, &words[..]));
                backward_pair(kernels, shape, &mut work, lse, pair, dropout);
            }
            kernels.unpack_rows(work.d_k, padded, item.d_k.reborrow().rows(tile.clone()));
            kernels.unpack_rows(work.d_v, padded, item.d_v.reborrow().rows(tile));
        }
        let columns = member * dim..(member + 1) * dim;
        kernels.unpack_rows(work.d_q, padded, item.d_q.reborrow().cols(columns));
    }
}

/// A block of query rows against a tile of keys, positions within the sequence.
#[derive(Clone, Copy)]
struct Pair {
    first: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
}

/// Rows (and keys) taken together where the diagonal runs through the pair.
const DIAGONAL: usize = LANES;

fn backward_pair(
    kernels: Kernels,
    shape: &AttentionShape,
    work: &mut Workspace,
    lse: &[f32],
    pair: Pair,
    dropout: Option<(&HeadDropout, &[[u32; 2]])>,
) {
    let (dim, padded) = (shape.head_dim, shape.padded_dim());
    let Pair {
        first,
        rows,
        first_key,
        keys,
    } = pair;
    let diagonal = first == first_key;
    let step = if diagonal { DIAGONAL } else { TILE };
    let row_major = |data, first: usize| Strided {
        data: <[f32]>::split_at(data, first * padded).1,
        row_stride: padded,
        step_stride: 1,
    };
    for chunk in (0..rows).step_by(step) {
        let chunk_rows = step.min(rows - chunk);
        // On the diagonal, row r of the pair sees the keys 0..=r of the tile.
        let mut limits = [keys; TILE];
        if diagonal {
            for (r, limit) in limits.iter_mut().take(chunk_rows).enumerate() {
                *limit = chunk + r + 1;
            }
        }
        let limits = &limits[..chunk_rows];
        let seen = limits[chunk_rows - 1];
        let extent = Extent {
            rows: chunk_rows,
            steps: dim,
            width: seen.next_multiple_of(LANES),
        };
        let (scores, d_scores) = (
            &mut work.scores[chunk * TILE..],
            &mut work.d_scores[chunk * TILE..],
        );
        let queries = row_major(work.q, first + chunk);
        kernels.product(
            extent,
            queries,
            work.k_transposed,
            TILE,
            Start::Zero,
            scores,
            TILE,
        );
        let d_out = row_major(work.d_out, first + chunk);
        kernels.product(
            extent,
            d_out,
            work.v_transposed,
            TILE,
            Start::Zero,
            d_scores,
            TILE,
        );
        let absolute = first + chunk..first + chunk + chunk_rows;
        let row_constants = BackwardRows {
            lse: &lse[absolute.clone()],
            correlation: &work.correlation[absolute.clone()],
            limits,
        };
        let block_dropout = dropout.map(|(head, words)| BlockDropout {
            rows: &words[absolute],
            first_key,
            scale: head.scale,
        });
        kernels.softmax_replay(scores, d_scores, row_constants, shape.scale, block_dropout);
        // d_q[r] += sum over keys of d_score[r][j] k[j].
        let extent = Extent {
            rows: chunk_rows,
            steps: seen,
            width: padded,
        };
        let d_q = &mut work.d_q[(first + chunk) * padded..];
        let d_rows = Strided {
            data: d_scores,
            row_stride: TILE,
            step_stride: 1,
        };
        kernels.product(extent, d_rows, work.k, padded, Start::Continue, d_q, padded);
    }
    // d_v[j] += sum over rows of weight[r][j] d_out[r], d_k[j] likewise from d_score and q. On the diagonal the rows
    // above a key's own do not see it.
    let key_step = if diagonal { DIAGONAL } else { TILE };
    for key in (0..keys).step_by(key_step) {
        let skipped = if diagonal { key } else { 0 };
        let extent = Extent {
            rows: key_step.min(keys - key),
            steps: rows - skipped,
            width: padded,
        };
        let column = skipped * TILE + key;
        let weights = Strided {
            data: &work.scores[column..],
            row_stride: 1,
            step_stride: TILE,
        };
        let d_out = &work.d_out[(first + skipped) * padded..];
        kernels.product(
            extent,
            weights,
            d_out,
            padded,
            Start::Continue,
            &mut work.d_v[key * padded..],
            padded,
        );
        let d_rows = Strided {
            data: &work.d_scores[column..],
            row_stride: 1,
            step_stride: TILE,
        };
        let q = &work.q[(first + skipped) * padded..];
        kernels.product(
            extent,
            d_rows,
            q,
            padded,
            Start::Continue,
            &mut work.d_k[key * padded..],
            padded,
        );
    }
}
