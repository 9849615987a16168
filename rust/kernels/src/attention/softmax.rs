//! The softmax of a block of rows against one tile of keys: the online form for the forward pass, the replay from the
//! kept log-sum-exp for the backward pass.

use super::TILE;
use crate::math::{exp, log};
use crate::random::{DropoutScale, kept};
use crate::simd::{LANES, Simd, dispatch};
use crate::{Kernels, Mat};

/// Vectors per row of a tile.
const VECTORS: usize = TILE / LANES;

/// Rows of one call at most.
pub(super) const MAX_ROWS: usize = 2 * LANES;

/// Dropout of the rows of a block.
#[derive(Clone, Copy)]
pub(super) struct BlockDropout<'a> {
    /// Hash words, one pair per row.
    pub(super) rows: &'a [[u32; 2]],
    /// Position of the tile's first key.
    pub(super) first_key: usize,
    pub(super) scale: DropoutScale,
}

/// What the online softmax keeps of each row: the largest score, the sum of exponentials, and the weighted values.
pub(super) struct OnlineState<'a> {
    /// Largest score so far, -inf before the first tile.
    pub(super) largest: &'a mut [f32],
    /// Sum of exp(score - largest) so far.
    pub(super) sum: &'a mut [f32],
    /// Rows of `padded` elements: sum of weights times values so far.
    pub(super) weighted: &'a mut [f32],
    pub(super) padded: usize,
}

/// Number of vectors that hold `keys` keys.
#[inline(always)]
fn vectors_for(keys: usize) -> usize {
    keys.div_ceil(LANES)
}

#[inline(always)]
fn row_vectors_mut(row: &mut [f32]) -> &mut [[f32; LANES]; VECTORS] {
    row[..TILE]
        .as_chunks_mut::<LANES>()
        .0
        .try_into()
        .expect("a tile row has 64 elements")
}

#[inline(always)]
fn online<S: Simd>(
    s: S,
    scores: &mut [f32],
    limits: &[usize],
    scale: f32,
    state: OnlineState,
    dropout: Option<BlockDropout>,
) {
    let rows = limits.len();
    let OnlineState {
        largest,
        sum,
        weighted,
        padded,
    } = state;
    let lowest = s.splat(f32::NEG_INFINITY);
    // Pass 1: scale and mask the scores, find each row's new maximum.
    let mut previous = [0.0_f32; MAX_ROWS];
    let mut current = [0.0_f32; MAX_ROWS];
    let mut decay = [0.0_f32; MAX_ROWS];
    previous[..rows].copy_from_slice(&largest[..rows]);
    for (r, row) in scores.chunks_exact_mut(TILE).take(rows).enumerate() {
        let limit = limits[r];
        let mut maximum = s.splat(previous[r]);
        for (v, chunk) in row_vectors_mut(row)
            .iter_mut()
            .enumerate()
            .take(vectors_for(limit))
        {
            let scaled = s.mul(s.load(chunk), s.splat(scale));
            let masked = s.select(s.first(limit - v * LANES), scaled, lowest);
            s.store(masked, chunk);
            maximum = s.max(maximum, masked);
        }
        current[r] = s.largest(maximum);
    }
    largest[..rows].copy_from_slice(&current[..rows]);
    // Pass 2: what the sums of the earlier tiles shrink by, 16 rows at a time.
    let chunks = previous
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(current.as_chunks::<LANES>().0);
    for ((previous, current), decay) in chunks
        .zip(decay.as_chunks_mut::<LANES>().0)
        .take(vectors_for(rows))
    {
        s.store(exp(s, s.sub(s.load(previous), s.load(current))), decay);
    }
    // Pass 3: exponentials, sums, and the shrinking of the weighted values.
    for (r, row) in scores.chunks_exact_mut(TILE).take(rows).enumerate() {
        let maximum = s.splat(current[r]);
        let used = vectors_for(limits[r]);
        let mut partial = [s.zero(); VECTORS];
        for (v, (chunk, partial)) in row_vectors_mut(row)
            .iter_mut()
            .zip(&mut partial)
            .enumerate()
        {
            if v < used {
                let p = exp(s, s.sub(s.load(chunk), maximum));
                *partial = p;
                let p = match dropout {
                    Some(d) => drop(s, d, r, v, p),
                    None => p,
                };
                s.store(p, chunk);
            } else {
                s.store(s.zero(), chunk);
            }
        }
        let total = s.add(s.add(partial[0], partial[1]), s.add(partial[2], partial[3]));
        sum[r] = sum[r] * decay[r] + s.sum(total);
        // Multiplying by 1 would change nothing.
        #[allow(clippy::float_cmp, reason = "exactly 1 is meant")]
        if decay[r] != 1.0 {
            let factor = s.splat(decay[r]);
            for chunk in weighted[r * padded..][..padded].as_chunks_mut::<LANES>().0 {
                s.store(s.mul(s.load(chunk), factor), chunk);
            }
        }
    }
}

/// Dropout of vector `v` of row `r`.
#[inline(always)]
fn drop<S: Simd>(s: S, d: BlockDropout, r: usize, v: usize, p: S::F) -> S::F {
    let mask = kept(
        s,
        d.rows[r],
        (d.first_key + v * LANES) as u32,
        d.scale.threshold,
    );
    s.select(mask, s.mul(p, s.splat(d.scale.scale)), s.zero())
}

/// out = weighted / sum, and lse = largest + ln sum, which replaces `largest`.
#[inline(always)]
fn finish<S: Simd>(s: S, largest: &mut [f32], sum: &[f32], weighted: &mut [f32], padded: usize) {
    for (row, sum) in weighted.chunks_exact_mut(padded).zip(sum) {
        let factor = s.splat(1.0 / sum);
        for chunk in row.as_chunks_mut::<LANES>().0 {
            s.store(s.mul(s.load(chunk), factor), chunk);
        }
    }
    let (largest, largest_tail) = largest.as_chunks_mut::<LANES>();
    let (sum, sum_tail) = sum.as_chunks::<LANES>();
    for (largest, sum) in largest.iter_mut().zip(sum) {
        s.store(s.add(s.load(largest), log(s, s.load(sum))), largest);
    }
    if !largest_tail.is_empty() {
        let lse = s.add(
            s.load_partial(largest_tail),
            log(s, s.load_partial(sum_tail)),
        );
        s.store_partial(lse, largest_tail);
    }
}

/// Per-row constants of the backward pass.
#[derive(Clone, Copy)]
pub(super) struct BackwardRows<'a> {
    pub(super) lse: &'a [f32],
    /// Sum over the head dimension of `d_out * out`.
    pub(super) correlation: &'a [f32],
    /// Number of keys of the tile that each row sees.
    pub(super) limits: &'a [usize],
}

/// Turns raw scores into weights (after dropout) and the gradients of weights into gradients of raw scores, in place.
#[inline(always)]
fn replay<S: Simd>(
    s: S,
    scores: &mut [f32],
    d_weights: &mut [f32],
    rows: BackwardRows,
    scale: f32,
    dropout: Option<BlockDropout>,
) {
    let pairs = scores
        .chunks_exact_mut(TILE)
        .zip(d_weights.chunks_exact_mut(TILE));
    for (r, (scores, d_weights)) in pairs.take(rows.limits.len()).enumerate() {
        let limit = rows.limits[r];
        let (lse, correlation) = (s.splat(rows.lse[r]), s.splat(rows.correlation[r]));
        let chunks = row_vectors_mut(scores)
            .iter_mut()
            .zip(row_vectors_mut(d_weights));
        for (v, (score, d_weight)) in chunks.enumerate() {
            if v * LANES >= limit {
                s.store(s.zero(), score);
                s.store(s.zero(), d_weight);
                continue;
            }
            let visible = s.first(limit - v * LANES);
            let p = exp(s, s.sub(s.mul(s.load(score), s.splat(scale)), lse));
            let p = s.select(visible, p, s.zero());
            let (weight, d_p) = match dropout {
                Some(d) => (drop(s, d, r, v, p), drop(s, d, r, v, s.load(d_weight))),
                None => (p, s.load(d_weight)),
            };
            s.store(weight, score);
            let d_score = s.mul(s.mul(p, s.sub(d_p, correlation)), s.splat(scale));
            s.store(s.select(visible, d_score, s.zero()), d_weight);
        }
    }
}

/// `out[r] = a[r] . b[r]`, the rows of `b` padded with zeros.
#[inline(always)]
fn row_products<S: Simd>(s: S, a: Mat, b: &[f32], padded: usize, out: &mut [f32]) {
    for (r, (b, out)) in b.chunks_exact(padded).zip(out).enumerate() {
        let (a, tail) = a.row(r).as_chunks::<LANES>();
        let (b, _) = b.as_chunks::<LANES>();
        let mut sum = s.zero();
        for (a, b) in a.iter().zip(b) {
            sum = s.fma(s.load(a), s.load(b), sum);
        }
        if !tail.is_empty() {
            sum = s.fma(s.load_partial(tail), s.load(&b[a.len()]), sum);
        }
        *out = s.sum(sum);
    }
}

impl Kernels {
    /// Folds one tile of raw scores (rows of 64) into the state of its rows and leaves the weights exp(score - largest),
    /// after dropout, in `scores`. Row r sees the first `limits[r]` keys of the tile; the others get an exact zero.
    pub(super) fn softmax_online(
        self,
        scores: &mut [f32],
        limits: &[usize],
        scale: f32,
        state: OnlineState,
        dropout: Option<BlockDropout>,
    ) {
        assert!(
            limits.len() <= MAX_ROWS && limits.iter().all(|limit| *limit <= TILE),
            "softmax_online: sizes"
        );
        dispatch!(
            self,
            online<'a>(
                scores: &mut [f32], limits: &[usize], scale: f32, state: OnlineState<'a>,
                dropout: Option<BlockDropout<'a>>
            )
        );
    }

    /// Divides the weighted values by the sums and turns `largest` into the log-sum-exp.
    pub(super) fn softmax_finish(
        self,
        largest: &mut [f32],
        sum: &[f32],
        weighted: &mut [f32],
        padded: usize,
    ) {
        dispatch!(self, finish(largest: &mut [f32], sum: &[f32], weighted: &mut [f32], padded: usize));
    }

    /// Backward of one tile: `scores` (raw) become the weights after dropout, `d_weights` (gradients with respect to
    /// those) become the gradients with respect to the raw scores.
    pub(super) fn softmax_replay(
        self,
        scores: &mut [f32],
        d_weights: &mut [f32],
        rows: BackwardRows,
        scale: f32,
        dropout: Option<BlockDropout>,
    ) {
        assert!(
            rows.limits.iter().all(|limit| *limit <= TILE),
            "softmax_replay: sizes"
        );
        dispatch!(
            self,
            replay<'a>(
                scores: &mut [f32], d_weights: &mut [f32], rows: BackwardRows<'a>, scale: f32,
                dropout: Option<BlockDropout<'a>>
            )
        );
    }

    /// `out[r] = a[r] . b[r]`; the rows of `b` are padded with zeros to `padded` elements.
    pub(super) fn row_products(self, a: Mat, b: &[f32], padded: usize, out: &mut [f32]) {
        let fits = a.num_cols().next_multiple_of(LANES) == padded && out.len() == a.num_rows();
        assert!(fits, "row_products: sizes do not fit");
        dispatch!(self, row_products<'a>(a: Mat<'a>, b: &[f32], padded: usize, out: &mut [f32]));
    }
}
