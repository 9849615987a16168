//! A linear layer: y = x W^T + b with W stored as `[outputs, inputs]`.

use ingot_kernels::{Mat, MatMut};

use super::Compute;

/// Sizes of a linear layer and the places of its tensors in the flat buffers.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Offset of W, `[outputs, inputs]`.
    pub(crate) weight: usize,
    /// Offset of b, `[outputs]`.
    pub(crate) bias: Option<usize>,
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
        parameters: &[f32],
        x: Mat<'_>,
        y: MatMut<'_>,
        accumulate: bool,
    ) {
        let bias = self.bias.map(|bias| &parameters[bias..bias + self.outputs]);
        compute.kernels.gemm_nt(
            &compute.pool,
            x,
            self.weight(parameters),
            y,
            bias,
            accumulate,
        );
    }

    /// `d_x` = `d_y` W, or `d_x` += that.
    pub(crate) fn backward_input(
        &self,
        compute: &Compute,
        parameters: &[f32],
        d_y: Mat<'_>,
        d_x: MatMut<'_>,
        accumulate: bool,
    ) {
        compute
            .kernels
            .gemm_nn(&compute.pool, d_y, self.weight(parameters), d_x, accumulate);
    }

    /// `d_W` += `d_y`^T x and `d_b` += the rows of `d_y`, in order.
    pub(crate) fn backward_weight(
        &self,
        compute: &Compute,
        gradients: &mut [f32],
        d_y: Mat<'_>,
        x: Mat<'_>,
    ) {
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
