//! Token embedding, plus learned positions where the network has them.

use ingot_kernels::MatMut;
use ingot_kernels::random::site;

use super::{Compute, Dropout, ROWS_PER_ITEM};

/// Columns that one work item of the backward pass takes: it adds all tokens' rows there, in order.
const COLUMNS_PER_ITEM: usize = 64;

/// Width of the embedding and the places of its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Embedding {
    pub(crate) width: usize,
    /// Offset of the token table, `[V, width]`.
    pub(crate) tokens: usize,
    /// Offset of the position table, `[max_position_embeddings, width]`.
    pub(crate) positions: Option<usize>,
}

impl Embedding {
    /// `out[row] = dropout(E[token] + P[position])`; out is `[R, width]`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        parameters: &[f32],
        tokens: &[u32],
        positions: &[u32],
        dropout: Option<&Dropout<'_>>,
        out: &mut [f32],
    ) {
        let row_of = |table: usize, index: u32| {
            let start = table + index as usize * self.width;
            &parameters[start..start + self.width]
        };
        let items = out
            .chunks_mut(ROWS_PER_ITEM * self.width)
            .enumerate()
            .collect();
        compute
            .pool
            .for_each(items, |(i, out): (usize, &mut [f32])| {
                for (row, out) in (i * ROWS_PER_ITEM..).zip(out.chunks_exact_mut(self.width)) {
                    let token = row_of(self.tokens, tokens[row]);
                    if let Some(table) = self.positions {
                        let position = row_of(table, positions[row]);
                        compute.kernels.add(token, position, out);
                    } else {
                        out.copy_from_slice(token);
                    }
                    if let Some(dropout) = dropout {
                        dropout.apply_row(compute, 0, site::EMBEDDING, row, out);
                    }
                }
            });
    }

    /// `d_E[token] += d_out[row]` and `d_P[position]` likewise, rows in order. `d_out` is masked in place.
    pub(crate) fn backward(
        &self,
        compute: &Compute,
        gradients: &mut [f32],
        vocab_size: usize,
        num_positions: usize,
        tokens: &[u32],
        positions: &[u32],
        dropout: Option<&Dropout<'_>>,
        d_out: &mut [f32],
    ) {
        if let Some(dropout) = dropout {
            let items = d_out
                .chunks_mut(ROWS_PER_ITEM * self.width)
                .enumerate()
                .collect();
            compute
                .pool
                .for_each(items, |(i, d_out): (usize, &mut [f32])| {
                    for (row, d_out) in
                        (i * ROWS_PER_ITEM..).zip(d_out.chunks_exact_mut(self.width))
                    {
                        dropout.apply_row(compute, 0, site::EMBEDDING, row, d_out);
                    }
                });
        }
        let table = &mut gradients[self.tokens..self.tokens + vocab_size * self.width];
        self.scatter_add(compute, table, tokens, d_out);
        if let Some(start) = self.positions {
            let table = &mut gradients[start..start + num_positions * self.width];
            self.scatter_add(compute, table, positions, d_out);
        }
    }

    /// `table[indices[row]] += rows[row]`, parallel over columns so that each element's sum runs over rows in order.
    fn scatter_add(&self, compute: &Compute, table: &mut [f32], indices: &[u32], rows: &[f32]) {
        let table = MatMut::new(table, table.len() / self.width, self.width);
        let cuts: Vec<usize> = (0..self.width).step_by(COLUMNS_PER_ITEM).skip(1).collect();
        let items: Vec<_> = table
            .split_grid(&[], &cuts)
            .into_iter()
            .enumerate()
            .collect();
        compute
            .pool
            .for_each(items, |(i, mut table): (usize, MatMut<'_>)| {
                let columns = i * COLUMNS_PER_ITEM..((i + 1) * COLUMNS_PER_ITEM).min(self.width);
                for (&index, row) in indices.iter().zip(rows.chunks_exact(self.width)) {
                    compute
                        .kernels
                        .add_assign(table.row_mut(index as usize), &row[columns.clone()]);
                }
            });
    }
}
