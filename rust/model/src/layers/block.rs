//! A transformer block with norms before its sub-layers:
//! middle = x + attention(norm(x)), out = middle + mlp(norm(middle)).
//!
//! All but attention itself works on chunks of rows, so that what lies between two products stays in the cache and is
//! never stored for the whole batch. Chunks are cut by shape only.

use std::ops::Range;

use ingot_kernels::attention::AttentionDropout;
use ingot_kernels::random::site;
use ingot_kernels::{ArenaPool, Lease, Mat, MatMut};

use super::norm::RowMoments;
use super::{Attention, Compute, Dropout, Mlp, Norm, NormScratch, ROWS_PER_ITEM, RotaryTable};
use crate::adapter::{Gradients, Weights};

/// Rows of a chunk: enough for the products to run at full speed, few enough for their operands to stay near.
pub(crate) const CHUNK_ROWS: usize = 1024;

/// The chunks of a batch of `num_rows` rows.
pub(crate) fn chunks(num_rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..num_rows)
        .step_by(CHUNK_ROWS)
        .map(move |start| start..(start + CHUNK_ROWS).min(num_rows))
}

/// Sizes and tensors of a block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) layer: usize,
    pub(crate) attention_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) mlp_norm: Norm,
    pub(crate) mlp: Mlp,
}

/// What all layers of one pass share.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) weights: Weights<'a>,
    pub(crate) rotary: Option<&'a RotaryTable>,
    /// `[S + 1]`.
    pub(crate) offsets: &'a [i64],
    /// `[S]`.
    pub(crate) sequence_ids: &'a [i64],
    /// `[N]`.
    pub(crate) positions: &'a [u32],
    /// Only while training with a probability above 0.
    pub(crate) dropout: Option<Dropout<'a>>,
}

impl<'a> Pass<'a> {
    fn attention_dropout(&self, layer: usize) -> Option<AttentionDropout<'a>> {
        self.dropout.map(|dropout| AttentionDropout {
            p: dropout.probability,
            seed: dropout.seed,
            layer: layer as u32,
            sequence_ids: self.sequence_ids,
        })
    }

    fn dropout_rows(&self, rows: &Range<usize>) -> Option<Dropout<'a>> {
        self.dropout.map(|dropout| dropout.rows(rows.clone()))
    }
}

/// What a block keeps of a forward pass for the backward pass; everything else is made again.
pub(crate) struct BlockActivations<'a> {
    /// The residual stream at the entrance, `[N, d]`.
    pub(crate) x: &'a mut [f32],
    /// Queries, keys and values: as attention sees them, or before the head norms where there are any. `[N, H h + 2 Hkv h]`.
    pub(crate) qkv: &'a mut [f32],
    /// Result of attention before its projection, `[N, H h]`.
    pub(crate) attended: &'a mut [f32],
    /// Log-sum-exp of the attention scores, `[H, N]`.
    pub(crate) lse: &'a mut [f32],
    /// The residual stream after attention, `[N, d]`.
    pub(crate) middle: &'a mut [f32],
    /// Pre-activations of the MLP, `[N, F or 2 F]`.
    pub(crate) pre: &'a mut [f32],
}

impl<'a> BlockActivations<'a> {
    /// Floats that a block keeps for `num_rows` rows.
    pub(crate) fn len(block: &Block, num_rows: usize) -> usize {
        Self::widths(block).iter().sum::<usize>() * num_rows
    }

    fn widths(block: &Block) -> [usize; 6] {
        let (d, attention) = (block.attention_norm.size, &block.attention);
        [
            d,
            attention.qkv_width(),
            attention.query_width(),
            attention.heads,
            d,
            block.mlp.up.outputs,
        ]
    }

    /// Cuts an arena of at least [`BlockActivations::len`] floats.
    pub(crate) fn cut(block: &Block, num_rows: usize, arena: &'a mut [f32]) -> Self {
        let mut rest = arena;
        let [x, qkv, attended, lse, middle, pre] = Self::widths(block).map(|width| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(width * num_rows);
            rest = tail;
            part
        });
        Self {
            x,
            qkv,
            attended,
            lse,
            middle,
            pre,
        }
    }
}

/// Working memory of the blocks' passes. Contents carry nothing from one call to the next.
pub(crate) struct BlockScratch {
    /// Result of a norm, `[C, d]`.
    normed: Lease,
    /// Activations of the MLP, then their gradient, `[C, F]`.
    active: Lease,
    /// Pre-activations where they are not kept, or their gradient, `[C, F or 2 F]`.
    pre: Lease,
    /// A sub-layer's result (or its gradient) while dropout is on, `[C, d]`.
    branch: Lease,
    /// Queries and keys after the head norms and the rotation, `[N, H h + Hkv h]` or empty.
    rotated: Lease,
    /// Gradient of a norm's result, `[C, d]`.
    d_normed: Lease,
    /// Gradients of attention's result and of queries, keys and values where they do not fit into the place of the
    /// pre-activations: `[N, H h]` and `[N, H h + 2 Hkv h]` one after the other.
    d_attention: Option<Lease>,
    /// Partial sums of the norms' gradients.
    partials: Lease,
    moments: Vec<RowMoments>,
}

impl BlockScratch {
    /// Memory for forward passes over `num_rows` rows.
    pub(crate) fn forward(
        arenas: &ArenaPool,
        block: &Block,
        num_rows: usize,
        dropout: bool,
    ) -> Self {
        let chunk = num_rows.min(CHUNK_ROWS);
        let (d, attention, mlp) = (block.attention_norm.size, &block.attention, &block.mlp);
        Self {
            normed: arenas.lease(chunk * d),
            active: arenas.lease(chunk * mlp.width),
            pre: arenas.lease(chunk * mlp.up.outputs),
            branch: arenas.lease(if dropout { chunk * d } else { 0 }),
            rotated: arenas.lease(num_rows * attention.rotated_width()),
            d_normed: arenas.lease(0),
            d_attention: None,
            partials: arenas.lease(0),
            moments: Vec::new(),
        }
    }

    /// Memory for backward passes over `num_rows` rows.
    pub(crate) fn backward(
        arenas: &ArenaPool,
        block: &Block,
        num_rows: usize,
        dropout: bool,
    ) -> Self {
        let chunk = num_rows.min(CHUNK_ROWS);
        let (d, attention) = (block.attention_norm.size, &block.attention);
        Self {
            d_normed: arenas.lease(chunk * d),
            d_attention: (!block.reuses_pre())
                .then(|| arenas.lease(num_rows * block.d_attention_width())),
            partials: arenas.lease(chunk.div_ceil(ROWS_PER_ITEM) * 2 * d.max(attention.head_dim)),
            moments: vec![[0.0; 2]; chunk],
            ..Self::forward(arenas, block, num_rows, dropout)
        }
    }
}

impl Block {
    /// Norm, product and rotation of a chunk: `qkv` `[R, H h + 2 Hkv h]` and `rotated` `[R, H h + Hkv h]` (empty without head
    /// norms) from `x` `[R, d]`. `normed` is scratch `[R, d]`; `copy` becomes a copy of `x`.
    pub(crate) fn attention_input(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        rotary: Option<&RotaryTable>,
        positions: &[u32],
        x: &[f32],
        copy: Option<&mut [f32]>,
        qkv: &mut [f32],
        rotated: &mut [f32],
        normed: &mut [f32],
    ) {
        let rows = positions.len();
        self.attention_norm
            .forward(compute, weights.base, x, normed, copy);
        let normed = Mat::new(normed, rows, self.attention_norm.size);
        let qkv_rows = MatMut::new(qkv, rows, self.attention.qkv_width());
        self.attention
            .qkv
            .forward(compute, weights, normed, qkv_rows, false);
        self.attention
            .rotate(compute, weights.base, rotary, positions, qkv, rotated);
    }

    /// y += attention's projection of `attended` `[R, H h]`; y is `[R, d]`.
    pub(crate) fn attention_output(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        attended: &[f32],
        y: &mut [f32],
    ) {
        let (d, query) = (self.attention_norm.size, self.attention.query_width());
        let rows = y.len() / d;
        let attended = Mat::new(attended, rows, query);
        self.attention
            .output
            .forward(compute, weights, attended, MatMut::new(y, rows, d), true);
    }

    /// y += mlp(normed) for a chunk; `normed` is `[R, d]`, `pre` and `active` become the MLP's inner values.
    pub(crate) fn mlp_output(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        normed: &[f32],
        pre: &mut [f32],
        active: &mut [f32],
        y: &mut [f32],
    ) {
        let d = self.mlp_norm.size;
        let rows = y.len() / d;
        self.mlp
            .expand(compute, weights, Mat::new(normed, rows, d), pre, active);
        let active = Mat::new(active, rows, self.mlp.width);
        self.mlp
            .down
            .forward(compute, weights, active, MatMut::new(y, rows, d), true);
    }

    /// The forward pass that keeps what the backward pass needs: from `kept.x` to `out` `[N, d]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        kept: &mut BlockActivations<'_>,
        out: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let compute = pass.compute;
        let num_rows = pass.positions.len();
        let d = self.attention_norm.size;
        let (qkv, query, up, rotated) = (
            self.attention.qkv_width(),
            self.attention.query_width(),
            self.mlp.up.outputs,
            self.attention.rotated_width(),
        );
        for rows in chunks(num_rows) {
            let (start, end) = (rows.start, rows.end);
            self.attention_input(
                compute,
                pass.weights.rows(&rows),
                pass.rotary,
                &pass.positions[rows],
                &kept.x[start * d..end * d],
                Some(&mut kept.middle[start * d..end * d]),
                &mut kept.qkv[start * qkv..end * qkv],
                &mut scratch.rotated[start * rotated..end * rotated],
                &mut scratch.normed[..(end - start) * d],
            );
        }
        self.attention.attend(
            compute,
            pass.offsets,
            kept.qkv,
            &scratch.rotated[..num_rows * rotated],
            kept.attended,
            kept.lse,
            pass.attention_dropout(self.layer).as_ref(),
        );
        for rows in chunks(num_rows) {
            let (start, end, count) = (rows.start, rows.end, rows.len());
            let weights = pass.weights.rows(&rows);
            let attended = &kept.attended[start * query..end * query];
            let middle = &mut kept.middle[start * d..end * d];
            let dropout = pass.dropout_rows(&rows);
            match dropout {
                None => self.attention_output(compute, weights, attended, middle),
                Some(dropout) => {
                    let branch = &mut scratch.branch[..count * d];
                    let attended = Mat::new(attended, count, query);
                    let target = MatMut::new(branch, count, d);
                    self.attention
                        .output
                        .forward(compute, weights, attended, target, false);
                    dropout.add(
                        compute,
                        self.layer,
                        site::ATTENTION_RESIDUAL,
                        d,
                        branch,
                        middle,
                    );
                }
            }
            let normed = &mut scratch.normed[..count * d];
            let out = &mut out[start * d..end * d];
            self.mlp_norm
                .forward(compute, weights.base, middle, normed, Some(&mut *out));
            let pre = &mut kept.pre[start * up..end * up];
            let active = &mut scratch.active[..count * self.mlp.width];
            match dropout {
                None => self.mlp_output(compute, weights, normed, pre, active, out),
                Some(dropout) => {
                    let branch = &mut scratch.branch[..count * d];
                    self.mlp
                        .expand(compute, weights, Mat::new(normed, count, d), pre, active);
                    let active = Mat::new(active, count, self.mlp.width);
                    self.mlp.down.forward(
                        compute,
                        weights,
                        active,
                        MatMut::new(branch, count, d),
                        false,
                    );
                    dropout.add(compute, self.layer, site::MLP_RESIDUAL, d, branch, out);
                }
            }
        }
    }

    /// The forward pass that keeps nothing: `x` `[N, d]` goes from the entrance to the exit of the block. `qkv`,
    /// `attended` and `lse` are scratch for all rows.
    pub(crate) fn forward_in_place(
        &self,
        pass: &Pass<'_>,
        x: &mut [f32],
        qkv: &mut [f32],
        attended: &mut [f32],
        lse: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let (compute, weights) = (pass.compute, pass.weights);
        let num_rows = pass.positions.len();
        let d = self.attention_norm.size;
        let (qkv_width, query, rotated) = (
            self.attention.qkv_width(),
            self.attention.query_width(),
            self.attention.rotated_width(),
        );
        for rows in chunks(num_rows) {
            let (start, end) = (rows.start, rows.end);
            self.attention_input(
                compute,
                weights,
                pass.rotary,
                &pass.positions[rows],
                &x[start * d..end * d],
                None,
                &mut qkv[start * qkv_width..end * qkv_width],
                &mut scratch.rotated[start * rotated..end * rotated],
                &mut scratch.normed[..(end - start) * d],
            );
        }
        self.attention.attend(
            compute,
            pass.offsets,
            qkv,
            &scratch.rotated[..num_rows * rotated],
            attended,
            lse,
            None,
        );
        for rows in chunks(num_rows) {
            let (start, end, count) = (rows.start, rows.end, rows.len());
            let x = &mut x[start * d..end * d];
            self.attention_output(compute, weights, &attended[start * query..end * query], x);
            let normed = &mut scratch.normed[..count * d];
            self.mlp_norm
                .forward(compute, weights.base, x, normed, None);
            let pre = &mut scratch.pre[..count * self.mlp.up.outputs];
            let active = &mut scratch.active[..count * self.mlp.width];
            self.mlp_output(compute, weights, normed, pre, active, x);
        }
    }

    /// Floats per row of the gradients inside attention.
    fn d_attention_width(&self) -> usize {
        self.attention.query_width() + self.attention.qkv_width()
    }

    /// Whether the gradients inside attention fit where the pre-activations lay, which are no longer needed by then.
    fn reuses_pre(&self) -> bool {
        self.mlp.up.outputs >= self.d_attention_width()
    }

    /// Turns `d_x` `[N, d]`, the gradient of the block's result, into that of its entrance, and adds to `gradients`.
    /// What was kept is used up.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients<'_>,
        kept: &mut BlockActivations<'_>,
        d_x: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let num_rows = pass.positions.len();
        let query = self.attention.query_width();
        let mut leased = scratch.d_attention.take();
        for rows in chunks(num_rows) {
            self.backward_mlp(pass, gradients, kept, &rows, d_x, scratch);
            // Rows of attention are no wider than those of the pre-activations, so that this chunk's end lies before the
            // pre-activations of the next.
            let place = leased.as_deref_mut().unwrap_or(kept.pre);
            let d_attended = &mut place[rows.start * query..rows.end * query];
            self.backward_attention_output(
                pass,
                gradients,
                kept.attended,
                &rows,
                d_x,
                d_attended,
                scratch,
            );
        }
        let place = leased
            .as_deref_mut()
            .unwrap_or(std::mem::take(&mut kept.pre));
        let (d_attended, rest) = place.split_at_mut(num_rows * query);
        let d_qkv = &mut rest[..num_rows * self.attention.qkv_width()];
        self.backward_attend(pass, kept, d_attended, d_qkv, scratch);
        for rows in chunks(num_rows) {
            self.backward_attention_input(pass, gradients, kept, &rows, d_qkv, d_x, scratch);
        }
        scratch.d_attention = leased;
    }

    fn backward_mlp(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients<'_>,
        kept: &BlockActivations<'_>,
        rows: &Range<usize>,
        d_x: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let (compute, weights) = (pass.compute, pass.weights.rows(rows));
        let (count, d, width, up) = (
            rows.len(),
            self.mlp_norm.size,
            self.mlp.width,
            self.mlp.up.outputs,
        );
        let middle = &kept.middle[rows.start * d..rows.end * d];
        let pre = &kept.pre[rows.start * up..rows.end * up];
        let d_x = &mut d_x[rows.start * d..rows.end * d];
        let normed = &mut scratch.normed[..count * d];
        let moments = &mut scratch.moments[..count];
        self.mlp_norm
            .recompute(compute, weights.base, middle, normed, moments);
        let active = &mut scratch.active[..count * width];
        self.mlp.activate(compute, pre, active);

        let d_branch: &[f32] = match pass.dropout_rows(rows) {
            None => d_x,
            Some(dropout) => {
                let branch = &mut scratch.branch[..count * d];
                dropout.copy(compute, self.layer, site::MLP_RESIDUAL, d, d_x, branch);
                branch
            }
        };
        let d_branch = Mat::new(d_branch, count, d);
        self.mlp.down.backward_weight(
            compute,
            weights,
            gradients,
            d_branch,
            Mat::new(active, count, width),
        );
        // The activations are no longer needed: their gradient takes their place.
        let d_active = active;
        self.mlp.down.backward_input(
            compute,
            weights,
            d_branch,
            MatMut::new(d_active, count, width),
            false,
        );
        let d_pre = &mut scratch.pre[..count * up];
        self.mlp.activate_backward(compute, pre, d_active, d_pre);
        let d_pre = Mat::new(d_pre, count, up);
        self.mlp.up.backward_weight(
            compute,
            weights,
            gradients,
            d_pre,
            Mat::new(normed, count, d),
        );
        let d_normed = &mut scratch.d_normed[..count * d];
        self.mlp.up.backward_input(
            compute,
            weights,
            d_pre,
            MatMut::new(d_normed, count, d),
            false,
        );
        let mut partials = NormScratch {
            partials: &mut scratch.partials,
        };
        self.mlp_norm.backward(
            compute,
            weights.base,
            gradients.base(),
            middle,
            moments,
            d_normed,
            d_x,
            &mut partials,
        );
    }

    fn backward_attention_output(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients<'_>,
        attended: &[f32],
        rows: &Range<usize>,
        d_x: &[f32],
        d_attended: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let (compute, weights) = (pass.compute, pass.weights.rows(rows));
        let (count, d, query) = (
            rows.len(),
            self.attention_norm.size,
            self.attention.query_width(),
        );
        let d_x = &d_x[rows.start * d..rows.end * d];
        let d_branch: &[f32] = match pass.dropout_rows(rows) {
            None => d_x,
            Some(dropout) => {
                let branch = &mut scratch.branch[..count * d];
                dropout.copy(
                    compute,
                    self.layer,
                    site::ATTENTION_RESIDUAL,
                    d,
                    d_x,
                    branch,
                );
                branch
            }
        };
        let d_branch = Mat::new(d_branch, count, d);
        let attended = Mat::new(
            &attended[rows.start * query..rows.end * query],
            count,
            query,
        );
        self.attention
            .output
            .backward_weight(compute, weights, gradients, d_branch, attended);
        let d_attended = MatMut::new(d_attended, count, query);
        self.attention
            .output
            .backward_input(compute, weights, d_branch, d_attended, false);
    }

    fn backward_attend(
        &self,
        pass: &Pass<'_>,
        kept: &BlockActivations<'_>,
        d_attended: &[f32],
        d_qkv: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let compute = pass.compute;
        let num_rows = pass.positions.len();
        let rotated = &mut scratch.rotated[..num_rows * self.attention.rotated_width()];
        if let Some(norms) = &self.attention.head_norms {
            self.attention.norm_and_rotate(
                compute,
                pass.weights.base,
                norms,
                pass.rotary,
                pass.positions,
                kept.qkv,
                rotated,
            );
        }
        self.attention.attend_backward(
            compute,
            pass.offsets,
            kept.qkv,
            rotated,
            kept.attended,
            kept.lse,
            d_attended,
            d_qkv,
            pass.attention_dropout(self.layer).as_ref(),
        );
    }

    fn backward_attention_input(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients<'_>,
        kept: &BlockActivations<'_>,
        rows: &Range<usize>,
        d_qkv: &mut [f32],
        d_x: &mut [f32],
        scratch: &mut BlockScratch,
    ) {
        let (compute, weights) = (pass.compute, pass.weights.rows(rows));
        let (count, d, width) = (
            rows.len(),
            self.attention_norm.size,
            self.attention.qkv_width(),
        );
        let mut partials = NormScratch {
            partials: &mut scratch.partials,
        };
        let d_qkv = &mut d_qkv[rows.start * width..rows.end * width];
        self.attention.rotate_backward(
            compute,
            weights.base,
            gradients.base(),
            pass.rotary,
            &pass.positions[rows.clone()],
            &kept.qkv[rows.start * width..rows.end * width],
            d_qkv,
            &mut partials,
        );
        let x = &kept.x[rows.start * d..rows.end * d];
        let d_x = &mut d_x[rows.start * d..rows.end * d];
        let normed = &mut scratch.normed[..count * d];
        let moments = &mut scratch.moments[..count];
        self.attention_norm
            .recompute(compute, weights.base, x, normed, moments);
        let d_qkv = Mat::new(d_qkv, count, width);
        self.attention.qkv.backward_weight(
            compute,
            weights,
            gradients,
            d_qkv,
            Mat::new(normed, count, d),
        );
        let d_normed = &mut scratch.d_normed[..count * d];
        self.attention.qkv.backward_input(
            compute,
            weights,
            d_qkv,
            MatMut::new(d_normed, count, d),
            false,
        );
        self.attention_norm.backward(
            compute,
            weights.base,
            gradients.base(),
            x,
            moments,
            d_normed,
            d_x,
            &mut partials,
        );
    }
}
