//! The MLP of a block: y = W2 f(W1 x + b1) + b2, or with a gate y = W2 (silu(Wg x) * (Wu x)) + b2 (Shazeer 2020, equation 6).

use ingot_kernels::Activation;
use ingot_kernels::{Mat, MatMut};

use super::{Compute, Linear, ROWS_PER_ITEM};
use crate::ActivationKind;
use crate::adapter::Weights;

/// Sizes and tensors of an MLP.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) activation: ActivationKind,
    /// F.
    pub(crate) width: usize,
    /// `[F, d]`, or gate and up together [2 F, d].
    pub(crate) up: Linear,
    /// [d, F].
    pub(crate) down: Linear,
}

impl Mlp {
    /// The pre-activations of rows `x` `[R, d]` into `pre` `[R, F or 2 F]` and the activations into `active` `[R, F]`.
    pub(crate) fn expand(
        &self,
        compute: &Compute,
        weights: Weights<'_>,
        x: Mat<'_>,
        pre: &mut [f32],
        active: &mut [f32],
    ) {
        let rows = x.num_rows();
        self.up.forward(
            compute,
            weights,
            x,
            MatMut::new(pre, rows, self.up.outputs),
            false,
        );
        self.activate(compute, pre, active);
    }

    /// active = f(pre).
    pub(crate) fn activate(&self, compute: &Compute, pre: &[f32], active: &mut [f32]) {
        let kernels = &compute.kernels;
        let items = pre
            .chunks(ROWS_PER_ITEM * self.up.outputs)
            .zip(active.chunks_mut(ROWS_PER_ITEM * self.width))
            .collect();
        compute
            .pool
            .for_each(items, |(pre, active): (&[f32], &mut [f32])| {
                match self.plain_activation() {
                    Some(kind) => kernels.activation_forward(kind, pre, active),
                    None => {
                        for (pre, active) in pre
                            .chunks_exact(2 * self.width)
                            .zip(active.chunks_exact_mut(self.width))
                        {
                            let (gate, up) = pre.split_at(self.width);
                            kernels.swiglu_forward(gate, up, active);
                        }
                    }
                }
            });
    }

    /// `d_pre` = `d_active` f'(pre), overwritten.
    pub(crate) fn activate_backward(
        &self,
        compute: &Compute,
        pre: &[f32],
        d_active: &[f32],
        d_pre: &mut [f32],
    ) {
        let kernels = &compute.kernels;
        let span = ROWS_PER_ITEM * self.up.outputs;
        let items = pre
            .chunks(span)
            .zip(d_active.chunks(ROWS_PER_ITEM * self.width))
            .zip(d_pre.chunks_mut(span))
            .collect();
        compute.pool.for_each(
            items,
            |((pre, d_active), d_pre): ((&[f32], &[f32]), &mut [f32])| {
                if let Some(kind) = self.plain_activation() {
                    kernels.activation_backward(kind, pre, d_active, d_pre);
                    return;
                }
                let rows = pre
                    .chunks_exact(2 * self.width)
                    .zip(d_active.chunks_exact(self.width))
                    .zip(d_pre.chunks_exact_mut(2 * self.width));
                for ((pre, d_active), d_pre) in rows {
                    let (gate, up) = pre.split_at(self.width);
                    let (d_gate, d_up) = d_pre.split_at_mut(self.width);
                    kernels.swiglu_backward(gate, up, d_active, d_gate, d_up);
                }
            },
        );
    }

    /// The kernel of an ungated activation; `None` for the gated one.
    fn plain_activation(&self) -> Option<Activation> {
        match self.activation {
            ActivationKind::GeluTanh => Some(Activation::GeluTanh),
            ActivationKind::Gelu => Some(Activation::Gelu),
            ActivationKind::Relu => Some(Activation::Relu),
            ActivationKind::Relu2 => Some(Activation::Relu2),
            ActivationKind::Swiglu => None,
        }
    }
}
