//! Keys and values cached in pages of 64 positions, and attention of new query rows on them.
//!
//! A page holds 64 consecutive positions of one layer. For each key-value head it has the keys transposed,
//! `[head_dim][64]`, then the values by row, `[64][padded head_dim]` (padded to a multiple of 16): the same tile that training
//! packs, so that decoding streams it as it is and gives the same bits.

use super::forward::{Block, QUERY_BLOCK, Tile};
use super::{AttentionShape, Scratch, TILE};
use crate::{Kernels, Mat, MatMut, Pool};

/// Positions per page.
pub const PAGE_POSITIONS: usize = 64;

impl AttentionShape {
    /// Number of f32 of one page.
    pub fn page_floats(&self) -> usize {
        self.kv_heads * self.page_head_floats()
    }

    fn page_head_floats(&self) -> usize {
        TILE * (self.head_dim + self.padded_dim())
    }

    /// Stores the key and the value of one position (rows of `kv_heads * head_dim`) in slot `position % 64` of its page.
    /// Slots never written may hold anything: they are not read below a sequence's length.
    ///
    /// # Panics
    /// If a slice has the wrong length.
    pub fn write_page(&self, page: &mut [f32], position: usize, key: &[f32], value: &[f32]) {
        let (dim, padded) = (self.head_dim, self.padded_dim());
        assert!(
            page.len() == self.page_floats()
                && key.len() == self.kv_heads * dim
                && value.len() == key.len(),
            "write_page: lengths do not fit"
        );
        let slot = position % TILE;
        let heads = page.chunks_exact_mut(self.page_head_floats());
        for ((head, key), value) in heads
            .zip(key.chunks_exact(dim))
            .zip(value.chunks_exact(dim))
        {
            let (keys, values) = head.split_at_mut(dim * TILE);
            for (column, element) in keys.chunks_exact_mut(TILE).zip(key) {
                column[slot] = *element;
            }
            let (value_row, padding) = values[slot * padded..][..padded].split_at_mut(dim);
            value_row.copy_from_slice(value);
            padding.fill(0.0);
        }
    }
}

/// The query rows of one sequence and the pages they look at.
#[derive(Clone, Copy, Debug)]
pub struct PagedSequence<'a> {
    /// Number of query rows: the last `rows` positions of the sequence. 1 when decoding, more in a prompt's chunk.
    pub rows: usize,
    /// Number of positions in the cache, those of the query rows included.
    pub length: usize,
    /// Pages of [`AttentionShape::page_floats`] each, position 0 first; at least length / 64 of them, rounded up.
    /// Sequences may share pages.
    pub pages: &'a [&'a [f32]],
}

/// One (sequence, block of its query rows, key-value head).
struct Item<'a> {
    sequence: PagedSequence<'a>,
    kv_head: usize,
    /// Row of `q` with which the block begins, and the number of keys that row sees.
    first_row: usize,
    first_length: usize,
    out: MatMut<'a>,
}

impl Kernels {
    /// Attention of new query rows on cached pages. The rows of `q` and `out`, both `[R, heads * head_dim]`, belong to
    /// the sequences one after the other; row i of a sequence's n rows sees its first `length - n + 1 + i` positions,
    /// whose keys and values must have been written before.
    ///
    /// Every row has the same bits as in [`Kernels::attention_forward`] without dropout, whether the rows of a sequence
    /// come one at a time, in chunks, or all together. Work items are (sequence, block of rows, key-value head).
    ///
    /// # Panics
    /// If shapes do not fit one another, or a sequence has more rows than positions or too few pages.
    pub fn attention_decode(
        &self,
        pool: &Pool,
        shape: &AttentionShape,
        sequences: &[PagedSequence],
        q: Mat,
        out: MatMut,
    ) {
        shape.assert_valid();
        let n: usize = sequences.iter().map(|sequence| sequence.rows).sum();
        let width = shape.heads * shape.head_dim;
        assert!(
            q.num_rows() == n
                && out.num_rows() == n
                && q.num_cols() == width
                && out.num_cols() == width,
            "attention_decode: shapes do not fit"
        );
        // Blocks have at most QUERY_BLOCK (row, query head) pairs, and at least one row.
        let block_rows = (QUERY_BLOCK / shape.group()).max(1);
        let mut blocks = Vec::new();
        let mut row = 0;
        for sequence in sequences {
            let PagedSequence {
                rows,
                length,
                pages,
            } = *sequence;
            assert!(
                rows <= length,
                "attention_decode: {rows} rows of a sequence of {length} positions"
            );
            assert!(
                pages.len() * PAGE_POSITIONS >= length
                    && pages.iter().all(|page| page.len() == shape.page_floats()),
                "attention_decode: pages do not hold {length} positions"
            );
            let firsts = (0..rows).step_by(block_rows);
            blocks.extend(firsts.map(|first| (*sequence, row + first, length - rows + 1 + first)));
            row += rows;
        }
        if blocks.is_empty() {
            return;
        }
        let row_cuts: Vec<usize> = blocks.iter().skip(1).map(|(_, first, _)| *first).collect();
        let column_cuts: Vec<usize> = (1..shape.kv_heads)
            .map(|head| head * shape.group() * shape.head_dim)
            .collect();
        let outs = out.split_grid(&row_cuts, &column_cuts);
        let items = outs.into_iter().enumerate().map(|(i, out)| {
            let (sequence, first_row, first_length) = blocks[i / shape.kv_heads];
            Item {
                sequence,
                kv_head: i % shape.kv_heads,
                first_row,
                first_length,
                out,
            }
        });
        let items: Vec<Item> = items.collect();
        let scratch_floats = Block::scratch_floats(shape, block_rows * shape.group());
        pool.for_each_with_scratch(items, scratch_floats, |item, scratch| {
            decode_item(*self, shape, q, item, scratch);
        });
    }
}

fn decode_item(kernels: Kernels, shape: &AttentionShape, q: Mat, item: Item, scratch: &mut [f32]) {
    let Item {
        sequence,
        kv_head,
        first_row,
        first_length,
        mut out,
    } = item;
    let (rows, group) = (out.num_rows(), shape.group());
    let (dim, padded) = (shape.head_dim, shape.padded_dim());
    // Block rows are (query head of the group, query row): lengths ascend within a head.
    let mut block = Block::new(shape, rows * group, &mut Scratch(scratch));
    for member in 0..group {
        let head = kv_head * group + member;
        let queries = q
            .rows(first_row..first_row + rows)
            .cols(head * dim..(head + 1) * dim);
        block.set_queries(kernels, member * rows, queries);
    }
    let lengths: Vec<usize> = (0..group)
        .flat_map(|_| first_length..first_length + rows)
        .collect();
    let last = first_length + rows - 1;
    for (page, first_key) in sequence.pages.iter().zip((0..last).step_by(TILE)) {
        let head = &page[kv_head * shape.page_head_floats()..][..shape.page_head_floats()];
        let (keys, values) = head.split_at(dim * TILE);
        block.attend(
            kernels,
            shape,
            Tile {
                keys,
                values,
                first_key,
            },
            &lengths,
            None,
        );
    }
    let (result, _) = block.finish(kernels);
    for (member, head_rows) in result.chunks_exact(rows * padded).enumerate() {
        let columns = member * dim..(member + 1) * dim;
        kernels.unpack_rows(head_rows, padded, out.reborrow().cols(columns));
    }
}
