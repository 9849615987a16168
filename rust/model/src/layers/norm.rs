//! Normalisation of rows: `LayerNorm` (Ba et al. 2016, equation 4) or `RMSNorm` (Zhang and Sennrich 2019, equation 4).

use ingot_kernels::Mat;

use super::{Compute, ROWS_PER_ITEM};
use crate::NormKind;

/// A norm's size and the places of its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    pub(crate) size: usize,
    /// Offset of the gain, `[size]`.
    pub(crate) gain: usize,
    /// Offset of the bias, `[size]`.
    pub(crate) bias: Option<usize>,
    pub(crate) eps: f32,
}

/// Mean (0 for `RMSNorm`) and reciprocal deviation of a row.
pub(crate) type RowMoments = [f32; 2];

/// Partial sums of parameter gradients: one row per work item, summed in order afterwards.
pub(crate) struct NormScratch<'a> {
    /// At least `[items, 2 size]`.
    pub(crate) partials: &'a mut [f32],
}

impl Norm {
    fn gain<'a>(&self, parameters: &'a [f32]) -> &'a [f32] {
        &parameters[self.gain..self.gain + self.size]
    }

    fn bias<'a>(&self, parameters: &'a [f32]) -> Option<&'a [f32]> {
        self.bias.map(|bias| &parameters[bias..bias + self.size])
    }

    /// Normalises one row.
    pub(crate) fn forward_row(
        &self,
        compute: &Compute,
        parameters: &[f32],
        x: &[f32],
        out: &mut [f32],
    ) -> RowMoments {
        let kernels = &compute.kernels;
        match self.kind {
            NormKind::Layer => {
                let (mean, rstd) = kernels.layer_norm_forward(
                    x,
                    self.gain(parameters),
                    self.bias(parameters),
                    self.eps,
                    out,
                );
                [mean, rstd]
            }
            NormKind::Rms => [
                0.0,
                kernels.rms_norm_forward(x, self.gain(parameters), self.eps, out),
            ],
        }
    }

    /// Gradients of one row: `d_x` and `d_gain` are added to; the bias's is added to `d_bias`.
    pub(crate) fn backward_row(
        &self,
        compute: &Compute,
        parameters: &[f32],
        x: &[f32],
        moments: RowMoments,
        d_out: &[f32],
        d_x: &mut [f32],
        d_gain: &mut [f32],
        d_bias: &mut [f32],
    ) {
        let kernels = &compute.kernels;
        let gain = self.gain(parameters);
        let [mean, rstd] = moments;
        match self.kind {
            NormKind::Layer => {
                let d_bias = self.bias.is_some().then_some(d_bias);
                kernels.layer_norm_backward(x, gain, mean, rstd, d_out, d_x, d_gain, d_bias);
            }
            NormKind::Rms => kernels.rms_norm_backward(x, gain, rstd, d_out, d_x, d_gain),
        }
    }

    /// Normalises the rows of `x` `[R, size]` into `out`. `copy`, where given, becomes a copy of `x`: the place that the
    /// following sub-layer adds its result to, filled while the row is in the cache.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        parameters: &[f32],
        x: &[f32],
        out: &mut [f32],
        copy: Option<&mut [f32]>,
    ) {
        let span = ROWS_PER_ITEM * self.size;
        match copy {
            None => {
                let items = x.chunks(span).zip(out.chunks_mut(span)).collect();
                compute
                    .pool
                    .for_each(items, |(x, out): (&[f32], &mut [f32])| {
                        for (x, out) in x
                            .chunks_exact(self.size)
                            .zip(out.chunks_exact_mut(self.size))
                        {
                            self.forward_row(compute, parameters, x, out);
                        }
                    });
            }
            Some(copy) => {
                let items = x
                    .chunks(span)
                    .zip(out.chunks_mut(span))
                    .zip(copy.chunks_mut(span))
                    .collect();
                compute.pool.for_each(
                    items,
                    |((x, out), copy): ((&[f32], &mut [f32]), &mut [f32])| {
                        for ((x, out), copy) in x
                            .chunks_exact(self.size)
                            .zip(out.chunks_exact_mut(self.size))
                            .zip(copy.chunks_exact_mut(self.size))
                        {
                            self.forward_row(compute, parameters, x, out);
                            copy.copy_from_slice(x);
                        }
                    },
                );
            }
        }
    }

    /// The same as [`Norm::forward`], keeping the moments of each row for [`Norm::backward`].
    pub(crate) fn recompute(
        &self,
        compute: &Compute,
        parameters: &[f32],
        x: &[f32],
        out: &mut [f32],
        moments: &mut [RowMoments],
    ) {
        let span = ROWS_PER_ITEM * self.size;
        let items = x
            .chunks(span)
            .zip(out.chunks_mut(span))
            .zip(moments.chunks_mut(ROWS_PER_ITEM))
            .collect();
        compute.pool.for_each(
            items,
            |((x, out), moments): ((&[f32], &mut [f32]), &mut [RowMoments])| {
                let rows = x
                    .chunks_exact(self.size)
                    .zip(out.chunks_exact_mut(self.size));
                for ((x, out), moments) in rows.zip(moments) {
                    *moments = self.forward_row(compute, parameters, x, out);
                }
            },
        );
    }

    /// Gradients of the rows: adds to `d_x` `[R, size]` and to the gain's and bias's gradients.
    pub(crate) fn backward(
        &self,
        compute: &Compute,
        parameters: &[f32],
        gradients: Option<&mut [f32]>,
        x: &[f32],
        moments: &[RowMoments],
        d_out: &[f32],
        d_x: &mut [f32],
        scratch: &mut NormScratch<'_>,
    ) {
        let rows = d_x.chunks_exact_mut(self.size);
        self.backward_rows(
            compute, parameters, gradients, x, moments, d_out, rows, scratch,
        );
    }

    /// The same as [`Norm::backward`] where the rows of `d_x` do not lie together.
    pub(crate) fn backward_rows<'a>(
        &self,
        compute: &Compute,
        parameters: &[f32],
        gradients: Option<&mut [f32]>,
        x: &[f32],
        moments: &[RowMoments],
        d_out: &[f32],
        d_x: impl ExactSizeIterator<Item = &'a mut [f32]>,
        scratch: &mut NormScratch<'_>,
    ) {
        let num_items = d_x.len().div_ceil(ROWS_PER_ITEM);
        let span = ROWS_PER_ITEM * self.size;
        let partials = &mut scratch.partials[..num_items * 2 * self.size];
        let mut d_x = d_x;
        let items = partials
            .chunks_exact_mut(2 * self.size)
            .zip(x.chunks(span))
            .zip(d_out.chunks(span))
            .zip(moments.chunks(ROWS_PER_ITEM))
            .map(|(((partial, x), d_out), moments)| {
                let d_x: Vec<&mut [f32]> = d_x.by_ref().take(ROWS_PER_ITEM).collect();
                (partial, x, d_out, moments, d_x)
            })
            .collect();
        compute.pool.for_each(
            items,
            |(partial, x, d_out, moments, d_x): (&mut [f32], _, _, &[RowMoments], _)| {
                let x: &[f32] = x;
                let d_out: &[f32] = d_out;
                partial.fill(0.0);
                let (d_gain, d_bias) = partial.split_at_mut(self.size);
                let rows = x
                    .chunks_exact(self.size)
                    .zip(d_out.chunks_exact(self.size))
                    .zip(moments)
                    .zip(d_x);
                for (((x, d_out), &moments), d_x) in rows {
                    self.backward_row(compute, parameters, x, moments, d_out, d_x, d_gain, d_bias);
                }
            },
        );
        let Some(gradients) = gradients else {
            return;
        };
        let partials = Mat::new(partials, num_items, 2 * self.size);
        let mut add = |columns, offset| {
            let sum = &mut gradients[offset..offset + self.size];
            compute
                .kernels
                .column_sum(&compute.pool, partials.cols(columns), sum, true);
        };
        add(0..self.size, self.gain);
        if let Some(bias) = self.bias {
            add(self.size..2 * self.size, bias);
        }
    }
}
