//! Causal self-attention with grouped key-value heads, optional norms on query and key heads, optional rotary positions.
//!
//! A row of queries, keys and values lies together: `[H h | Hkv h | Hkv h]`. Without head norms queries and keys are rotated
//! in place; with them the row keeps the values before the norm, which is what the backward pass needs, and the normalised
//! and rotated ones go to a second array `[H h | Hkv h]` that is made again where needed.

use ingot_kernels::attention::{AttentionDropout, AttentionShape};
use ingot_kernels::{Mat, MatMut};

use super::{Compute, Linear, Norm, NormScratch, ROWS_PER_ITEM, RotaryTable};

/// A piece of the rotation's backward pass: partial sums, values, gradients, positions.
type RotateItem<'a> = (&'a mut [f32], &'a [f32], &'a mut [f32], &'a [u32]);

/// Sizes and tensors of an attention layer.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) key_value_heads: usize,
    pub(crate) head_dim: usize,
    /// `[H h + 2 Hkv h, d]`.
    pub(crate) qkv: Linear,
    /// Norms of query and key heads.
    pub(crate) head_norms: Option<(Norm, Norm)>,
    /// [d, H h].
    pub(crate) output: Linear,
}

impl Attention {
    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(crate) fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    pub(crate) fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }

    /// Width of a row of the second array: 0 where queries and keys stay in the first.
    pub(crate) fn rotated_width(&self) -> usize {
        if self.head_norms.is_some() {
            self.query_width() + self.key_value_width()
        } else {
            0
        }
    }

    pub(crate) fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.key_value_heads,
            head_dim: self.head_dim,
            scale: (1.0 / (self.head_dim as f64).sqrt()) as f32,
        }
    }

    /// Queries, keys and values as attention takes them.
    pub(crate) fn split<'a>(
        &self,
        qkv: &'a [f32],
        rotated: &'a [f32],
    ) -> (Mat<'a>, Mat<'a>, Mat<'a>) {
        let (query, key_value) = (self.query_width(), self.key_value_width());
        let qkv = Mat::new(qkv, qkv.len() / self.qkv_width(), self.qkv_width());
        let value = qkv.cols(query + key_value..query + 2 * key_value);
        let queries_keys = match self.rotated_width() {
            0 => qkv,
            width => Mat::new(rotated, qkv.num_rows(), width),
        };
        (
            queries_keys.cols(0..query),
            queries_keys.cols(query..query + key_value),
            value,
        )
    }

    /// Norms and rotates queries and keys: in place, or from `qkv` to `rotated` where there are head norms.
    /// `qkv` is `[R, H h + 2 Hkv h]`, `rotated` `[R, H h + Hkv h]` or empty.
    pub(crate) fn rotate(
        &self,
        compute: &Compute,
        parameters: &[f32],
        rotary: Option<&RotaryTable>,
        positions: &[u32],
        qkv: &mut [f32],
        rotated: &mut [f32],
    ) {
        if let Some(norms) = &self.head_norms {
            self.norm_and_rotate(compute, parameters, norms, rotary, positions, qkv, rotated);
        } else if let Some(rotary) = rotary {
            self.rotate_in_place(compute, rotary, positions, qkv, false);
        }
    }

    /// Rotates the query and key heads of rows `[R, H h + 2 Hkv h]`.
    fn rotate_in_place(
        &self,
        compute: &Compute,
        rotary: &RotaryTable,
        positions: &[u32],
        qkv: &mut [f32],
        inverse: bool,
    ) {
        let width = self.qkv_width();
        let turned = self.query_width() + self.key_value_width();
        let items = qkv
            .chunks_mut(ROWS_PER_ITEM * width)
            .zip(positions.chunks(ROWS_PER_ITEM))
            .collect();
        compute
            .pool
            .for_each(items, |(rows, positions): (&mut [f32], &[u32])| {
                for (row, &position) in rows.chunks_exact_mut(width).zip(positions) {
                    for head in row[..turned].chunks_exact_mut(self.head_dim) {
                        rotary.apply_row(compute, position, head, inverse);
                    }
                }
            });
    }

    /// Fills `rotated` `[R, H h + Hkv h]` from `qkv` `[R, H h + 2 Hkv h]`.
    pub(crate) fn norm_and_rotate(
        &self,
        compute: &Compute,
        parameters: &[f32],
        (query_norm, key_norm): &(Norm, Norm),
        rotary: Option<&RotaryTable>,
        positions: &[u32],
        qkv: &[f32],
        rotated: &mut [f32],
    ) {
        let (width, out_width) = (self.qkv_width(), self.rotated_width());
        let items = qkv
            .chunks(ROWS_PER_ITEM * width)
            .zip(rotated.chunks_mut(ROWS_PER_ITEM * out_width))
            .zip(positions.chunks(ROWS_PER_ITEM))
            .collect();
        compute.pool.for_each(
            items,
            |((rows, out), positions): ((&[f32], &mut [f32]), &[u32])| {
                for ((row, out), &position) in rows
                    .chunks_exact(width)
                    .zip(out.chunks_exact_mut(out_width))
                    .zip(positions)
                {
                    let heads = row
                        .chunks_exact(self.head_dim)
                        .zip(out.chunks_exact_mut(self.head_dim));
                    for (head, (x, out)) in heads.enumerate() {
                        let norm = if head < self.heads {
                            query_norm
                        } else {
                            key_norm
                        };
                        norm.forward_row(compute, parameters, x, out);
                        if let Some(rotary) = rotary {
                            rotary.apply_row(compute, position, out, false);
                        }
                    }
                }
            },
        );
    }

    /// The backward pass of [`Attention::rotate`]: turns the gradient of what attention saw, in `d_qkv` `[R, H h + 2 Hkv h]`,
    /// into that of the product's result. `qkv` are the values before the norm; read only where there are head norms.
    pub(crate) fn rotate_backward(
        &self,
        compute: &Compute,
        parameters: &[f32],
        gradients: Option<&mut [f32]>,
        rotary: Option<&RotaryTable>,
        positions: &[u32],
        qkv: &[f32],
        d_qkv: &mut [f32],
        scratch: &mut NormScratch<'_>,
    ) {
        let Some((query_norm, key_norm)) = &self.head_norms else {
            if let Some(rotary) = rotary {
                self.rotate_in_place(compute, rotary, positions, d_qkv, true);
            }
            return;
        };
        let (width, h) = (self.qkv_width(), self.head_dim);
        let num_items = positions.len().div_ceil(ROWS_PER_ITEM);
        // Per item: the gains' gradients of the query norm and of the key norm.
        let partials = &mut scratch.partials[..num_items * 2 * h];
        let items = partials
            .chunks_exact_mut(2 * h)
            .zip(qkv.chunks(ROWS_PER_ITEM * width))
            .zip(d_qkv.chunks_mut(ROWS_PER_ITEM * width))
            .zip(positions.chunks(ROWS_PER_ITEM))
            .map(|(((partial, qkv), d_qkv), positions)| (partial, qkv, d_qkv, positions))
            .collect();
        compute.pool.for_each_with_scratch(
            items,
            h,
            |(partial, qkv, d_qkv, positions): RotateItem<'_>, head_scratch| {
                partial.fill(0.0);
                let (d_query_gain, d_key_gain) = partial.split_at_mut(h);
                for ((row, d_row), &position) in qkv
                    .chunks_exact(width)
                    .zip(d_qkv.chunks_exact_mut(width))
                    .zip(positions)
                {
                    let heads = row.chunks_exact(h).zip(d_row.chunks_exact_mut(h));
                    for (head, (x, d_x)) in
                        heads.take(self.heads + self.key_value_heads).enumerate()
                    {
                        let (norm, d_gain) = if head < self.heads {
                            (query_norm, &mut *d_query_gain)
                        } else {
                            (key_norm, &mut *d_key_gain)
                        };
                        if let Some(rotary) = rotary {
                            rotary.apply_row(compute, position, d_x, true);
                        }
                        let moments = norm.forward_row(compute, parameters, x, head_scratch);
                        // From here on the scratch is the gradient of the norm's result, d_x that of its input.
                        head_scratch.copy_from_slice(d_x);
                        d_x.fill(0.0);
                        norm.backward_row(
                            compute,
                            parameters,
                            x,
                            moments,
                            head_scratch,
                            d_x,
                            d_gain,
                            &mut [],
                        );
                    }
                }
            },
        );
        let Some(gradients) = gradients else {
            return;
        };
        let partials = Mat::new(partials, num_items, 2 * h);
        for (norm, columns) in [(query_norm, 0..h), (key_norm, h..2 * h)] {
            let d_gain = &mut gradients[norm.gain..norm.gain + h];
            compute
                .kernels
                .column_sum(&compute.pool, partials.cols(columns), d_gain, true);
        }
    }

    /// Attention of whole sequences: `attended` `[N, H h]`, `lse` `[H, N]`.
    pub(crate) fn attend(
        &self,
        compute: &Compute,
        offsets: &[i64],
        qkv: &[f32],
        rotated: &[f32],
        attended: &mut [f32],
        lse: &mut [f32],
        dropout: Option<&AttentionDropout<'_>>,
    ) {
        let (q, k, v) = self.split(qkv, rotated);
        let out = MatMut::new(attended, q.num_rows(), self.query_width());
        compute.kernels.attention_forward(
            &compute.pool,
            &self.shape(),
            offsets,
            q,
            k,
            v,
            out,
            lse,
            dropout,
        );
    }

    /// Gradients of [`Attention::attend`] into `d_qkv` `[N, H h + 2 Hkv h]`, overwritten.
    pub(crate) fn attend_backward(
        &self,
        compute: &Compute,
        offsets: &[i64],
        qkv: &[f32],
        rotated: &[f32],
        attended: &[f32],
        lse: &[f32],
        d_attended: &[f32],
        d_qkv: &mut [f32],
        dropout: Option<&AttentionDropout<'_>>,
    ) {
        let (q, k, v) = self.split(qkv, rotated);
        let (num_rows, query, key_value) =
            (q.num_rows(), self.query_width(), self.key_value_width());
        let out = Mat::new(attended, num_rows, query);
        let d_out = Mat::new(d_attended, num_rows, query);
        let (d_q, d_kv) = MatMut::new(d_qkv, num_rows, self.qkv_width()).split_at_col(query);
        let (d_k, d_v) = d_kv.split_at_col(key_value);
        compute.kernels.attention_backward(
            &compute.pool,
            &self.shape(),
            offsets,
            q,
            k,
            v,
            out,
            lse,
            d_out,
            d_q,
            d_k,
            d_v,
            dropout,
        );
    }
}
