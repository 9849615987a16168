//! Adapters of low rank (Hu et al. 2021): linear layers become W + scale B A while the parameters below them stay as they are.
//!
//! An adapter has flat buffers of its own: A and B of each module that it adapts, then scalar heads, as many as it wants.
//! Passes that go through it leave the model's own gradients alone.

use std::ops::Range;

use ingot_kernels::random::site;
use ingot_kernels::{Buffer, Mat, MatMut};

use crate::ModelError;
use crate::layers::{Compute, Dropout, Linear};
use crate::parameters::{Layout, Parameter};

/// What an adapter is, beside the modules that it changes.
#[derive(Clone, Copy, Debug)]
pub struct AdapterOptions {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Factor of B A.
    pub scale: f32,
    /// Scalar heads of its own; as many as the model has unless given.
    pub num_values: Option<usize>,
    /// Share of the elements of each module's input that A does not see while training.
    pub dropout: f32,
}

impl Default for AdapterOptions {
    fn default() -> Self {
        Self {
            rank: 8,
            scale: 2.0,
            num_values: None,
            dropout: 0.0,
        }
    }
}

/// A and B of one module: a run of columns of a linear layer's result.
#[derive(Clone, Debug)]
struct LowRank {
    inputs: usize,
    /// The block that it is in, and its place there: the identity of its dropout masks.
    layer: usize,
    site: u32,
    /// Columns of the layer's result that are the module's.
    columns: Range<usize>,
    /// Offset of A, `[rank, inputs]`.
    a: usize,
    /// Offset of B, `[outputs, rank]`.
    b: usize,
}

/// Where an adapter's tensors lie, by linear layer.
#[derive(Clone, Debug)]
pub(crate) struct LowRanks {
    rank: usize,
    scale: f32,
    pub(crate) dropout: f32,
    /// By [`Linear::index`].
    layers: Vec<Vec<LowRank>>,
    /// The scalar heads' places in the adapter's buffers.
    pub(crate) score: Option<Linear>,
}

/// Parameters beside the model's, with gradients of their own.
pub(crate) struct Adapter {
    pub(crate) places: LowRanks,
    pub(crate) table: Vec<Parameter>,
    pub(crate) parameters: Buffer,
    pub(crate) gradients: Option<Buffer>,
}

/// The parameters that a pass reads: the model's, and those of an adapter where it goes through one.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) base: &'a [f32],
    pub(crate) adapter: Option<AdapterWeights<'a>>,
}

/// What a pass reads of an adapter.
#[derive(Clone, Copy)]
pub(crate) struct AdapterWeights<'a> {
    pub(crate) places: &'a LowRanks,
    pub(crate) parameters: &'a [f32],
    /// Only while training with a probability above 0; of the rows that the pass works on.
    pub(crate) dropout: Option<Dropout<'a>>,
}

impl<'a> Weights<'a> {
    /// Parameters without an adapter.
    pub(crate) fn plain(base: &'a [f32]) -> Self {
        Self {
            base,
            adapter: None,
        }
    }

    /// For the rows `rows` of the batch alone.
    pub(crate) fn rows(self, rows: &Range<usize>) -> Self {
        let adapter = self.adapter.map(|adapter| AdapterWeights {
            dropout: adapter.dropout.map(|dropout| dropout.rows(rows.clone())),
            ..adapter
        });
        Self { adapter, ..self }
    }
}

/// What a backward pass adds to: the model's gradients, or those of the adapter that the forward pass went through.
pub(crate) enum Gradients<'a> {
    Base(&'a mut [f32]),
    Adapter(&'a LowRanks, &'a mut [f32]),
}

impl Gradients<'_> {
    /// The model's gradients, where they are wanted.
    pub(crate) fn base(&mut self) -> Option<&mut [f32]> {
        match self {
            Gradients::Base(gradients) => Some(gradients),
            Gradients::Adapter(..) => None,
        }
    }
}

impl Adapter {
    /// An adapter of zeros for some modules; the scalar heads are a copy of the model's where it has as many, else zeros.
    pub(crate) fn new(
        layout: &Layout,
        base: &[f32],
        options: AdapterOptions,
        modules: &[String],
    ) -> Result<Self, ModelError> {
        let AdapterOptions {
            rank,
            scale,
            dropout,
            ..
        } = options;
        let model_values = layout.score.as_ref().map_or(0, |score| score.outputs);
        let num_values = options.num_values.unwrap_or(model_values);
        if rank == 0 {
            return Err(ModelError::argument("rank", "must be at least 1, got 0"));
        }
        if !scale.is_finite() {
            return Err(ModelError::argument(
                "scale",
                format!("must be a number, got {scale}"),
            ));
        }
        if !(0.0..1.0).contains(&dropout) {
            let message = format!("must be at least 0 and below 1, got {dropout}");
            return Err(ModelError::argument("dropout", message));
        }
        let mut table: Vec<Parameter> = Vec::new();
        let mut len = 0;
        let mut push = |name: String, shape: Vec<usize>| {
            let parameter = Parameter {
                name,
                offset: len,
                decay: shape.len() > 1,
                shape,
                transposed: false,
            };
            len += parameter.len();
            let offset = parameter.offset;
            table.push(parameter);
            offset
        };
        let mut layers = vec![Vec::new(); layout.num_linears];
        let per_block = (layout.modules.len() / layout.blocks.len().max(1)).max(1);
        for name in modules {
            let mut known = layout.modules.iter().enumerate();
            let Some((number, module)) = known.find(|(_, module)| module.name == *name) else {
                let message = format!("{name} is no linear layer of a block of this model");
                return Err(ModelError::argument("modules", message));
            };
            let outputs = module.columns.len();
            layers[module.linear].push(LowRank {
                inputs: module.inputs,
                layer: number / per_block,
                site: site::ADAPTER + (number % per_block) as u32,
                columns: module.columns.clone(),
                a: push(format!("{name}.lora_A.weight"), vec![rank, module.inputs]),
                b: push(format!("{name}.lora_B.weight"), vec![outputs, rank]),
            });
        }
        let width = layout.final_norm.size;
        let score = (num_values > 0).then(|| Linear {
            inputs: width,
            outputs: num_values,
            weight: push("score.weight".to_owned(), vec![num_values, width]),
            bias: Some(push("score.bias".to_owned(), vec![num_values])),
            index: None,
        });
        let mut parameters = Buffer::zeroed(len);
        let same = layout
            .score
            .as_ref()
            .filter(|score| score.outputs == num_values);
        if let (Some(own), Some(score)) = (&score, same) {
            let size = score.inputs * score.outputs;
            parameters[own.weight..own.weight + size]
                .copy_from_slice(&base[score.weight..score.weight + size]);
            if let (Some(own), Some(bias)) = (own.bias, score.bias) {
                parameters[own..own + score.outputs]
                    .copy_from_slice(&base[bias..bias + score.outputs]);
            }
        }
        Ok(Self {
            places: LowRanks {
                rank,
                scale,
                dropout,
                layers,
                score,
            },
            table,
            parameters,
            gradients: None,
        })
    }

    /// Number of scalar heads.
    pub(crate) fn num_values(&self) -> usize {
        self.places.score.as_ref().map_or(0, |score| score.outputs)
    }

    /// The same numbers in memory of their own, without gradients.
    pub(crate) fn copy(&self) -> Self {
        Self {
            places: self.places.clone(),
            table: self.table.clone(),
            parameters: self.parameters.clone(),
            gradients: None,
        }
    }
}

impl LowRanks {
    fn a<'a>(&self, low: &LowRank, parameters: &'a [f32]) -> Mat<'a> {
        let size = self.rank * low.inputs;
        Mat::new(&parameters[low.a..low.a + size], self.rank, low.inputs)
    }

    fn b<'a>(&self, low: &LowRank, parameters: &'a [f32]) -> Mat<'a> {
        let outputs = low.columns.len();
        let size = outputs * self.rank;
        Mat::new(&parameters[low.b..low.b + size], outputs, self.rank)
    }

    /// What A sees of a module's input: all of it, or while dropout is on what is left, which lies in `kept`.
    fn dropped<'m>(
        compute: &Compute,
        low: &LowRank,
        dropout: Option<Dropout<'_>>,
        x: Mat<'m>,
        kept: &'m mut Vec<f32>,
    ) -> Mat<'m> {
        let Some(dropout) = dropout else {
            return x;
        };
        for row in 0..x.num_rows() {
            kept.extend_from_slice(x.row(row));
        }
        dropout.apply(compute, low.layer, low.site, low.inputs, kept);
        Mat::new(kept, x.num_rows(), low.inputs)
    }

    /// scale x A^T, `[R, rank]`.
    fn inner(&self, compute: &Compute, parameters: &[f32], low: &LowRank, x: Mat<'_>) -> Vec<f32> {
        let mut inner = vec![0.0; x.num_rows() * self.rank];
        let out = MatMut::new(&mut inner, x.num_rows(), self.rank);
        let a = self.a(low, parameters);
        compute
            .kernels
            .gemm_nt(&compute.pool, x, a, out, None, false);
        self.scale_all(&mut inner);
        inner
    }

    /// scale `d_y` B, `[R, rank]`.
    fn d_inner(
        &self,
        compute: &Compute,
        parameters: &[f32],
        low: &LowRank,
        d_y: Mat<'_>,
    ) -> Vec<f32> {
        let mut d_inner = vec![0.0; d_y.num_rows() * self.rank];
        let out = MatMut::new(&mut d_inner, d_y.num_rows(), self.rank);
        let (d_y, b) = (d_y.cols(low.columns.clone()), self.b(low, parameters));
        compute.kernels.gemm_nn(&compute.pool, d_y, b, out, false);
        self.scale_all(&mut d_inner);
        d_inner
    }

    fn scale_all(&self, values: &mut [f32]) {
        for value in values {
            *value *= self.scale;
        }
    }

    /// y += scale (x A^T) B^T in the columns of each adapted module of a linear layer.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        adapter: AdapterWeights<'_>,
        linear: usize,
        x: Mat<'_>,
        mut y: MatMut<'_>,
    ) {
        for low in &self.layers[linear] {
            let mut kept = Vec::new();
            let x = Self::dropped(compute, low, adapter.dropout, x, &mut kept);
            let inner = self.inner(compute, adapter.parameters, low, x);
            let inner = Mat::new(&inner, x.num_rows(), self.rank);
            let out = y.reborrow().cols(low.columns.clone());
            let b = self.b(low, adapter.parameters);
            compute
                .kernels
                .gemm_nt(&compute.pool, inner, b, out, None, true);
        }
    }

    /// `d_x` += scale (`d_y` B) A, through the masks of dropout where it was on.
    pub(crate) fn backward_input(
        &self,
        compute: &Compute,
        adapter: AdapterWeights<'_>,
        linear: usize,
        d_y: Mat<'_>,
        mut d_x: MatMut<'_>,
    ) {
        let rows = d_y.num_rows();
        for low in &self.layers[linear] {
            let d_inner = self.d_inner(compute, adapter.parameters, low, d_y);
            let d_inner = Mat::new(&d_inner, rows, self.rank);
            let a = self.a(low, adapter.parameters);
            let Some(dropout) = adapter.dropout else {
                compute
                    .kernels
                    .gemm_nn(&compute.pool, d_inner, a, d_x.reborrow(), true);
                continue;
            };
            let mut d_kept = vec![0.0; rows * low.inputs];
            let out = MatMut::new(&mut d_kept, rows, low.inputs);
            compute
                .kernels
                .gemm_nn(&compute.pool, d_inner, a, out, false);
            dropout.apply(compute, low.layer, low.site, low.inputs, &mut d_kept);
            for (row, d_kept) in d_kept.chunks_exact(low.inputs).enumerate() {
                compute.kernels.add_assign(d_x.row_mut(row), d_kept);
            }
        }
    }

    /// `d_A` += scale (`d_y` B)^T x and `d_B` += scale `d_y`^T (x A^T).
    pub(crate) fn backward_weight(
        &self,
        compute: &Compute,
        adapter: AdapterWeights<'_>,
        gradients: &mut [f32],
        linear: usize,
        d_y: Mat<'_>,
        x: Mat<'_>,
    ) {
        let rows = x.num_rows();
        for low in &self.layers[linear] {
            let outputs = low.columns.len();
            let mut kept = Vec::new();
            let x = Self::dropped(compute, low, adapter.dropout, x, &mut kept);
            let inner = self.inner(compute, adapter.parameters, low, x);
            let d_b = &mut gradients[low.b..low.b + outputs * self.rank];
            compute.kernels.gemm_tn(
                &compute.pool,
                d_y.cols(low.columns.clone()),
                Mat::new(&inner, rows, self.rank),
                MatMut::new(d_b, outputs, self.rank),
                true,
            );
            let d_inner = self.d_inner(compute, adapter.parameters, low, d_y);
            let d_a = &mut gradients[low.a..low.a + self.rank * low.inputs];
            compute.kernels.gemm_tn(
                &compute.pool,
                Mat::new(&d_inner, rows, self.rank),
                x,
                MatMut::new(d_a, self.rank, low.inputs),
                true,
            );
        }
    }
}
