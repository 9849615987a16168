//! The forward pass over packed sequences, and the walk of a block of query rows over the tiles of its keys that it
//! shares with decoding.

use std::cmp::Reverse;

use super::product::{Extent, Start, Strided};
use super::softmax::{BlockDropout, MAX_ROWS, OnlineState};
use super::{AttentionDropout, AttentionShape, HeadDropout, Scratch, TILE, sequences};
use crate::simd::LANES;
use crate::{Kernels, Mat, MatMut, Pool};

/// Query rows per work item.
pub(super) const QUERY_BLOCK: usize = 256;

/// Query rows taken together where every row sees the whole tile, and where the diagonal runs through it.
const FULL_ROWS: usize = 24;
const DIAGONAL_ROWS: usize = 6;
const _: () = assert!(FULL_ROWS <= MAX_ROWS && DIAGONAL_ROWS <= MAX_ROWS);

/// One tile of keys as the products want it.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[head_dim][64]`: keys transposed.
    pub(super) keys: &'a [f32],
    /// `[64][padded]`: values by row.
    pub(super) values: &'a [f32],
    /// Position of the tile's first key.
    pub(super) first_key: usize,
}

/// A block of query rows on its way over the tiles.
pub(super) struct Block<'a> {
    /// [rows][padded].
    queries: &'a mut [f32],
    /// [rows][padded]: sums of weighted values, in the end the result.
    weighted: &'a mut [f32],
    /// [rows]: largest score, in the end the log-sum-exp.
    largest: &'a mut [f32],
    /// [rows]: sum of exponentials.
    sum: &'a mut [f32],
    /// `[FULL_ROWS][64]`.
    scores: &'a mut [f32],
    padded: usize,
}

impl<'a> Block<'a> {
    /// Floats of scratch that a block of `rows` rows takes.
    pub(super) fn scratch_floats(shape: &AttentionShape, rows: usize) -> usize {
        2 * rows * shape.padded_dim() + 2 * rows.next_multiple_of(LANES) + FULL_ROWS * TILE
    }

    /// Carves a block out of scratch; the query rows are packed by [`Block::set_queries`].
    pub(super) fn new(shape: &AttentionShape, rows: usize, scratch: &mut Scratch<'a>) -> Self {
        let padded = shape.padded_dim();
        let block = Self {
            queries: scratch.take(rows * padded),
            weighted: scratch.take(rows * padded),
            largest: &mut scratch.take(rows.next_multiple_of(LANES))[..rows],
            sum: &mut scratch.take(rows.next_multiple_of(LANES))[..rows],
            scores: scratch.take(FULL_ROWS * TILE),
            padded,
        };
        block.weighted.fill(0.0);
        block.largest.fill(f32::NEG_INFINITY);
        block.sum.fill(0.0);
        block
    }

    /// Packs query rows of one head from row `first` of the block on.
    pub(super) fn set_queries(&mut self, kernels: Kernels, first: usize, queries: Mat) {
        kernels.pack_rows(
            queries,
            self.padded,
            &mut self.queries[first * self.padded..],
        );
    }

    /// Folds one tile in. Row r sees the keys at positions below `lengths[r]`.
    pub(super) fn attend(
        &mut self,
        kernels: Kernels,
        shape: &AttentionShape,
        tile: Tile,
        lengths: &[usize],
        dropout: Option<(&HeadDropout, &[[u32; 2]])>,
    ) {
        let padded = self.padded;
        let visible = |length: usize| length.saturating_sub(tile.first_key).min(TILE);
        let mut first = 0;
        while first < lengths.len() {
            let full = lengths[first..]
                .iter()
                .take(FULL_ROWS)
                .all(|length| visible(*length) == TILE);
            let rows = (lengths.len() - first).min(if full { FULL_ROWS } else { DIAGONAL_ROWS });
            let mut limits = [0; MAX_ROWS];
            for (limit, length) in limits.iter_mut().zip(&lengths[first..first + rows]) {
                *limit = visible(*length);
            }
            let limits = &limits[..rows];
            let most = *limits.iter().max().expect("a block has rows");
            if most > 0 {
                let queries = Strided {
                    data: &self.queries[first * padded..],
                    row_stride: padded,
                    step_stride: 1,
                };
                let extent = Extent {
                    rows,
                    steps: shape.head_dim,
                    width: most.next_multiple_of(LANES),
                };
                kernels.product(
                    extent,
                    queries,
                    tile.keys,
                    TILE,
                    Start::Zero,
                    self.scores,
                    TILE,
                );
                let state = OnlineState {
                    largest: &mut self.largest[first..first + rows],
                    sum: &mut self.sum[first..first + rows],
                    weighted: &mut self.weighted[first * padded..(first + rows) * padded],
                    padded,
                };
                let dropout = dropout.map(|(head, words)| BlockDropout {
                    rows: &words[first..first + rows],
                    first_key: tile.first_key,
                    scale: head.scale,
                });
                kernels.softmax_online(self.scores, limits, shape.scale, state, dropout);
                let weights = Strided {
                    data: self.scores,
                    row_stride: TILE,
                    step_stride: 1,
                };
                let extent = Extent {
                    rows,
                    steps: most,
                    width: padded,
                };
                let weighted = &mut self.weighted[first * padded..];
                kernels.product(
                    extent,
                    weights,
                    tile.values,
                    padded,
                    Start::Continue,
                    weighted,
                    padded,
                );
            }
            first += rows;
        }
    }

    /// Finishes the softmax and returns (result rows of `padded` elements, log-sum-exp per row).
    pub(super) fn finish(self, kernels: Kernels) -> (&'a [f32], &'a [f32]) {
        kernels.softmax_finish(self.largest, self.sum, self.weighted, self.padded);
        (self.weighted, self.largest)
    }
}

/// One (block of query rows, head).
struct Item<'a> {
    sequence: usize,
    head: usize,
    /// First token of the sequence, and of the block.
    start: usize,
    first: usize,
    out: MatMut<'a>,
    lse: MatMut<'a>,
}

impl Kernels {
    /// Causal attention of packed sequences: `out[t] = sum over j <= t of softmax_j(scale q_t . k_j) v_j` within each
    /// sequence and head.
    ///
    /// `offsets` `i64[S+1]`: token offsets of the sequences, from 0 to N. `q` and `out` are `[N, heads * head_dim]`, `k` and
    /// `v` `[N, kv_heads * head_dim]`. `lse` `[heads][N]` gets the log-sum-exp of the scaled scores, which the backward pass
    /// takes. Work items are (block of 256 query rows, head).
    ///
    /// The scores must not all be -inf in a row (which finite q and k cannot give, short of overflow); NaN propagates.
    ///
    /// # Panics
    /// If shapes do not fit one another or the offsets do not run from 0 to N.
    pub fn attention_forward(
        &self,
        pool: &Pool,
        shape: &AttentionShape,
        offsets: &[i64],
        q: Mat,
        k: Mat,
        v: Mat,
        out: MatMut,
        lse: &mut [f32],
        dropout: Option<&AttentionDropout>,
    ) {
        shape.assert_valid();
        let n = q.num_rows();
        let (width, kv_width) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        assert!(
            q.num_cols() == width
                && out.num_rows() == n
                && out.num_cols() == width
                && k.num_rows() == n
                && k.num_cols() == kv_width
                && v.num_rows() == n
                && v.num_cols() == kv_width
                && lse.len() == shape.heads * n,
            "attention_forward: shapes do not fit"
        );
        let dropout = dropout.filter(|dropout| dropout.p > 0.0);
        let mut blocks = Vec::new();
        for (sequence, start, end) in sequences(offsets, n, dropout) {
            blocks.extend(
                (start..end)
                    .step_by(QUERY_BLOCK)
                    .map(|first| (sequence, start, first)),
            );
        }
        if blocks.is_empty() {
            return;
        }
        let row_cuts: Vec<usize> = blocks.iter().skip(1).map(|(_, _, first)| *first).collect();
        let column_cuts: Vec<usize> = (1..shape.heads).map(|head| head * shape.head_dim).collect();
        let head_cuts: Vec<usize> = (1..shape.heads).collect();
        let outs = out.split_grid(&row_cuts, &column_cuts);
        // [heads][blocks] here, [blocks][heads] there.
        let mut lses: Vec<Option<MatMut>> = MatMut::new(lse, shape.heads, n)
            .split_grid(&head_cuts, &row_cuts)
            .into_iter()
            .map(Some)
            .collect();
        let num_blocks = blocks.len();
        let items = outs.into_iter().enumerate().map(|(i, out)| {
            let (block, head) = (i / shape.heads, i % shape.heads);
            let (sequence, start, first) = blocks[block];
            let lse = lses[head * num_blocks + block]
                .take()
                .expect("each piece is used once");
            Item {
                sequence,
                head,
                start,
                first,
                out,
                lse,
            }
        });
        let mut items: Vec<Item> = items.collect();
        // The longest first, so that no thread ends long after the others. The order changes no result.
        items.sort_by_key(|item| Reverse(item.first - item.start));
        let padded = shape.padded_dim();
        let scratch_floats =
            Block::scratch_floats(shape, QUERY_BLOCK) + TILE * padded + shape.head_dim * TILE;
        pool.for_each_with_scratch(items, scratch_floats, |item, scratch| {
            forward_item(*self, shape, q, k, v, dropout, item, scratch);
        });
    }
}

fn forward_item(
    kernels: Kernels,
    shape: &AttentionShape,
    q: Mat,
    k: Mat,
    v: Mat,
    dropout: Option<&AttentionDropout>,
    item: Item,
    scratch: &mut [f32],
) {
    let Item {
        sequence,
        head,
        start,
        first,
        out,
        mut lse,
    } = item;
    let rows = out.num_rows();
    let (dim, padded) = (shape.head_dim, shape.padded_dim());
    let query_columns = head * dim..(head + 1) * dim;
    let kv_head = head / shape.group();
    let columns = kv_head * dim..(kv_head + 1) * dim;
    let mut scratch = Scratch(scratch);
    let mut block = Block::new(shape, rows, &mut scratch);
    block.set_queries(kernels, 0, q.rows(first..first + rows).cols(query_columns));
    let (k, v) = (k.cols(columns.clone()), v.cols(columns));
    let values = scratch.take(TILE * padded);
    let keys = scratch.take(dim * TILE);

    let last = first + rows - start;
    let lengths: Vec<usize> = (first - start + 1..=last).collect();
    let head_dropout = dropout.map(|dropout| HeadDropout::new(dropout, sequence, head));
    let words = head_dropout
        .map(|dropout| dropout.row_words(first - start..last))
        .unwrap_or_default();
    for first_key in (0..last).step_by(TILE) {
        let tile_rows = start + first_key..start + (first_key + TILE).min(last);
        kernels.pack_transposed(k.rows(tile_rows.clone()), keys);
        kernels.pack_rows(v.rows(tile_rows), padded, values);
        let tile = Tile {
            keys,
            values,
            first_key,
        };
        block.attend(
            kernels,
            shape,
            tile,
            &lengths,
            head_dropout.as_ref().map(|dropout| (dropout, &words[..])),
        );
    }
    let (result, result_lse) = block.finish(kernels);
    kernels.unpack_rows(result, padded, out);
    lse.row_mut(0).copy_from_slice(result_lse);
}
