//! A linear layer: y = x W^T + b with W stored as `[outputs, inputs]`.

use ingot_kernels::{Mat, MatMut};

use super::Compute;
use crate::adapter::{Gradients, Weights};

/// Sizes of a linear layer and the places of its tensors in the flat buffers.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Offset of W, `[outputs, inputs]`.
    pub(crate) weight: usize,
    /// Offset of b, `[outputs]`.
    pub(crate) bias: Option<usize>,
    /// Number of the layer among those that adapters may change.
    pub(crate) index: Option<usize>,
}

impl Linear {
    fn weight<'a>(&self, parameters: &'a [f32]) -> Mat<'a> {
        Mat::new(
            &parameters[self.weight..self.weight + self.outputs * self.inputs],
            self.outputs,
            self.inputs,
        )
    }

    /// y = x W^T + b, or y += that. x is `[R, inputs]`, y `[R, outputs]`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        x: Mat<'_>,
        mut y: MatMut<'_>,
        accumulate: bool,
    ) {
        let bias = self
            .bias
            .map(|bias| &weights.base[bias..bias + self.outputs]);
        compute.kernels.gemm_nt(
            &compute.pool,
            x,
            self.weight(weights.base),
            y.reborrow(),
            bias,
            accumulate,
        );
        if let (Some(adapter), Some(index)) = (weights.adapter, self.index) {
            adapter.places.forward(compute, adapter, index, x, y);
        }
    }

    /// `d_x` = `d_y` W, or `d_x` += that.
    pub(crate) fn backward_input(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        d_y: Mat<'_>,
        mut d_x: MatMut<'_>,
        accumulate: bool,
    ) {
        let weight = self.weight(weights.base);
        compute
            .kernels
            .gemm_nn(&compute.pool, d_y, weight, d_x.reborrow(), accumulate);
        if let (Some(adapter), Some(index)) = (weights.adapter, self.index) {
            let places = adapter.places;
            places.backward_input(compute, adapter, index, d_y, d_x);
        }
    }

    /// `d_W` += `d_y`^T x and `d_b` += the rows of `d_y`, in order; or the same for what an adapter has of the layer.
    pub(crate) fn backward_weight(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        gradients: &mut Gradients<'_>,
        d_y: Mat<'_>,
        x: Mat<'_>,
    ) {
        let gradients = match gradients {
            Gradients::Base(gradients) => gradients,
            Gradients::Adapter(places, gradients) => {
                if let (Some(adapter), Some(index)) = (weights.adapter, self.index) {
                    places.backward_weight(compute, adapter, gradients, index, d_y, x);
                }
                return;
            }
        };
        let d_weight = &mut gradients[self.weight..self.weight + self.outputs * self.inputs];
        let d_weight = MatMut::new(d_weight, self.outputs, self.inputs);
        compute
            .kernels
            .gemm_tn(&compute.pool, d_y, x, d_weight, true);
        if let Some(bias) = self.bias {
            compute.kernels.column_sum(
                &compute.pool,
                d_y,
                &mut gradients[bias..bias + self.outputs],
                true,
            );
        }
    }
}
