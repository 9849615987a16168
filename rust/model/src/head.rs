//! The head: final norm, product with the vocabulary, statistics of the next-token distribution and their gradients; the
//! scalar heads; the hidden rows.
//!
//! Only rows that were asked for are computed. Logits exist for one chunk of rows at a time, never for the whole batch;
//! the backward pass makes them again, except in the fused pass, which turns them into their gradient in place.

use ingot_kernels::head::{RowGradients, RowStatistics};
use ingot_kernels::{ArenaPool, Lease, Mat, MatMut};

use crate::adapter::{Gradients, Weights};
use crate::batch::{HeadOptions, OutputGradients, Outputs, Packing};
use crate::layers::{Compute, Linear, NormScratch, ROWS_PER_ITEM, RowMoments};
use crate::parameters::Layout;

/// Most floats of a chunk of logits (16 MiB), unless the vocabulary's matrix is so large that the chunk is small beside it.
const CHUNK_FLOATS: usize = 4 << 20;
/// Share of the vocabulary's matrix that a chunk of logits may take in any case: its gradient is read and written once
/// per chunk, so that chunks of few rows would cost more in memory traffic than in arithmetic.
const MATRIX_SHARE: usize = 4;
/// Most rows of a chunk, whatever their width.
const CHUNK_ROWS: usize = 2048;
/// Rows of logits that one work item takes.
const LOGIT_ROWS_PER_ITEM: usize = 8;

const NO_STATISTICS: RowStatistics = RowStatistics {
    lse: 0.0,
    logprob: 0.0,
    entropy: 0.0,
    zbar: 0.0,
    top1: false,
    largest: 0.0,
    log_sum: 0.0,
};

/// Rows of a chunk, from the shape alone.
pub(crate) fn rows_per_chunk(vocab_size: usize, hidden_size: usize) -> usize {
    let floats = CHUNK_FLOATS.max(vocab_size * hidden_size / MATRIX_SHARE);
    (floats / vocab_size).clamp(16, CHUNK_ROWS)
}

/// The head of one pass: what it reads and where it works.
pub(crate) struct Head<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) weights: Weights<'a>,
    pub(crate) layout: &'a Layout,
}

/// Working memory for a chunk of C rows.
struct Scratch {
    /// Rows of the residual stream, `[C, d]`.
    gathered: Lease,
    /// Final norm's output, `[C, d]`.
    normed: Lease,
    /// Its gradient, `[C, d]`.
    d_normed: Lease,
    /// `[C, V]`.
    logits: Lease,
    partials: Lease,
    moments: Vec<RowMoments>,
    statistics: Vec<RowStatistics>,
}

/// Rows to gather, and where their values, their norms and its moments go.
type GatherItem<'a> = (
    &'a [usize],
    &'a mut [f32],
    &'a mut [f32],
    &'a mut [RowMoments],
);

/// Rows of logits, where their statistics go, their places in the batch and their targets.
type LogitItem<'a> = (
    &'a mut [f32],
    &'a mut [RowStatistics],
    &'a [usize],
    &'a [i32],
);

impl Head<'_> {
    fn width(&self) -> usize {
        self.layout.final_norm.size
    }

    fn vocab_size(&self) -> usize {
        self.layout.head.outputs
    }

    /// The scalar heads with the buffer that they lie in: the adapter's, where the pass goes through one.
    fn score(&self) -> Option<(&Linear, Weights<'_>)> {
        let (score, buffer) = match self.weights.adapter {
            Some(adapter) => (&adapter.places.score, adapter.parameters),
            None => (&self.layout.score, self.weights.base),
        };
        Some((score.as_ref()?, Weights::plain(buffer)))
    }

    fn scratch(
        &self,
        arenas: &ArenaPool,
        num_rows: usize,
        logits: bool,
        backward: bool,
    ) -> Scratch {
        let (d, vocab_size) = (self.width(), self.vocab_size());
        let limit = if logits {
            rows_per_chunk(vocab_size, d)
        } else {
            CHUNK_ROWS
        };
        let chunk = num_rows.min(limit);
        let backward_rows = if backward { chunk } else { 0 };
        Scratch {
            gathered: arenas.lease(chunk * d),
            normed: arenas.lease(chunk * d),
            d_normed: arenas.lease(backward_rows * d),
            logits: arenas.lease(if logits { chunk * vocab_size } else { 0 }),
            partials: arenas.lease(backward_rows.div_ceil(ROWS_PER_ITEM) * 2 * d),
            moments: vec![[0.0; 2]; chunk],
            statistics: vec![NO_STATISTICS; if logits { chunk } else { 0 }],
        }
    }

    /// The final norm of chosen rows of the residual stream `x` `[N, d]`.
    fn gather(&self, x: &[f32], rows: &[usize], scratch: &mut Scratch) {
        let d = self.width();
        let span = ROWS_PER_ITEM * d;
        let items = rows
            .chunks(ROWS_PER_ITEM)
            .zip(scratch.gathered.chunks_mut(span))
            .zip(scratch.normed.chunks_mut(span))
            .zip(scratch.moments.chunks_mut(ROWS_PER_ITEM))
            .map(|(((rows, gathered), normed), moments)| (rows, gathered, normed, moments))
            .collect();
        self.compute.pool.for_each(
            items,
            |(rows, gathered, normed, moments): GatherItem<'_>| {
                let outs = gathered
                    .chunks_exact_mut(d)
                    .zip(normed.chunks_exact_mut(d))
                    .zip(moments);
                for (&row, ((gathered, normed), moments)) in rows.iter().zip(outs) {
                    gathered.copy_from_slice(&x[row * d..(row + 1) * d]);
                    *moments = self.layout.final_norm.forward_row(
                        self.compute,
                        self.weights.base,
                        gathered,
                        normed,
                    );
                }
            },
        );
    }

    /// Adds the gradient of the gathered rows, from that of their norm, to the chosen rows of `d_x` `[N, d]`.
    fn scatter_gradient(
        &self,
        gradients: &mut Gradients<'_>,
        rows: &[usize],
        d_x: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let (d, count) = (self.width(), rows.len());
        let d_rows = pick_rows(d_x, d, rows);
        self.layout.final_norm.backward_rows(
            self.compute,
            self.weights.base,
            gradients.base(),
            &scratch.gathered[..count * d],
            &scratch.moments[..count],
            &scratch.d_normed[..count * d],
            d_rows.into_iter(),
            &mut NormScratch {
                partials: &mut scratch.partials,
            },
        );
    }

    /// Raw logits of the gathered rows.
    fn logits(&self, count: usize, scratch: &mut Scratch) {
        let normed = Mat::new(&scratch.normed[..count * self.width()], count, self.width());
        let logits = &mut scratch.logits[..count * self.vocab_size()];
        let logits = MatMut::new(logits, count, self.vocab_size());
        self.layout
            .head
            .forward(self.compute, self.weights, normed, logits, false);
    }

    /// Calls `f` for each row of logits, with the banned ids masked and the statistics taken.
    fn for_each_row(
        &self,
        options: &HeadOptions,
        rows: &[usize],
        targets: &[i32],
        scratch: &mut Scratch,
        f: impl Fn(usize, Option<usize>, &mut [f32], &RowStatistics) + Sync,
    ) {
        let vocab_size = self.vocab_size();
        let kernels = self.compute.kernels;
        let items = scratch
            .logits
            .chunks_mut(LOGIT_ROWS_PER_ITEM * vocab_size)
            .zip(scratch.statistics.chunks_mut(LOGIT_ROWS_PER_ITEM))
            .zip(rows.chunks(LOGIT_ROWS_PER_ITEM))
            .zip(targets.chunks(LOGIT_ROWS_PER_ITEM))
            .map(|(((logits, statistics), rows), targets)| (logits, statistics, rows, targets))
            .collect();
        self.compute.pool.for_each(
            items,
            |(logits, statistics, rows, targets): LogitItem<'_>| {
                let lines = logits.chunks_exact_mut(vocab_size).zip(statistics);
                for ((logits, statistics), (&row, &target)) in lines.zip(rows.iter().zip(targets)) {
                    // Where there is no target, what is said of one is said of id 0, and nobody asks.
                    let target = usize::try_from(target).ok();
                    let scored = target.unwrap_or_default();
                    *statistics = row_statistics(kernels, options, logits, scored);
                    f(row, target, logits, statistics);
                }
            },
        );
    }

    /// All outputs that were asked for, from the residual stream `x` `[N, d]`.
    pub(crate) fn forward(
        &self,
        arenas: &ArenaPool,
        packing: &Packing,
        options: &HeadOptions,
        x: &[f32],
    ) -> Outputs {
        let want = options.want;
        let num_rows = packing.num_rows();
        let zeros = |wanted: bool| wanted.then(|| vec![0.0_f32; num_rows]);
        let mut outputs = Outputs {
            logprobs: zeros(want.logprobs),
            entropy: zeros(want.entropy),
            lse: zeros(want.lse),
            zbar: zeros(want.zbar),
            top1: want.top1.then(|| vec![false; num_rows]),
            values: want
                .values
                .then(|| self.values(arenas, options, num_rows, x)),
            hidden: want.hidden.then(|| self.hidden(options, x)),
            candidate_logprobs: want
                .candidate_logprobs
                .then(|| vec![0.0; options.candidates.len()]),
        };
        if !want.needs_logits() {
            return outputs;
        }
        let mut scratch = self.scratch(arenas, options.rows.len(), true, false);
        let chunk = rows_per_chunk(self.vocab_size(), self.width());
        for (rows, targets) in options
            .rows
            .chunks(chunk)
            .zip(options.targets.chunks(chunk))
        {
            self.gather(x, rows, &mut scratch);
            self.logits(rows.len(), &mut scratch);
            self.for_each_row(options, rows, targets, &mut scratch, |_, _, _, _| ());
            if let Some(logprobs) = &mut outputs.candidate_logprobs {
                let scaled = scratch.logits.chunks_exact(self.vocab_size());
                for ((&row, statistics), scaled) in rows.iter().zip(&scratch.statistics).zip(scaled)
                {
                    for i in options.candidates_of(row) {
                        let id = options.candidates[i] as usize;
                        logprobs[i] = statistics.logprob_of(scaled[id]);
                    }
                }
            }
            let statistics = rows.iter().zip(targets).zip(&scratch.statistics);
            for ((&row, _), statistics) in statistics.filter(|((_, target), _)| **target >= 0) {
                let put = |output: &mut Option<Vec<f32>>, value| {
                    if let Some(output) = output {
                        output[row] = value;
                    }
                };
                put(&mut outputs.logprobs, statistics.logprob);
                put(&mut outputs.entropy, statistics.entropy);
                put(&mut outputs.lse, statistics.lse);
                put(&mut outputs.zbar, statistics.zbar);
                if let Some(top1) = &mut outputs.top1 {
                    top1[row] = statistics.top1;
                }
            }
        }
        outputs
    }

    /// Scalar heads `[N, k]`, 0 in rows that were not asked for.
    fn values(
        &self,
        arenas: &ArenaPool,
        options: &HeadOptions,
        num_rows: usize,
        x: &[f32],
    ) -> Vec<f32> {
        let Some((score, weights)) = self.score() else {
            return Vec::new();
        };
        let (d, k) = (self.width(), score.outputs);
        let mut values = vec![0.0; num_rows * k];
        let mut scratch = self.scratch(arenas, options.value_rows.len(), false, false);
        let mut chunk_values = vec![0.0; scratch.moments.len() * k];
        for rows in options.value_rows.chunks(CHUNK_ROWS) {
            let count = rows.len();
            self.gather(x, rows, &mut scratch);
            let normed = Mat::new(&scratch.normed[..count * d], count, d);
            let out = MatMut::new(&mut chunk_values[..count * k], count, k);
            score.forward(self.compute, weights, normed, out, false);
            for (&row, value) in rows.iter().zip(chunk_values.chunks_exact(k)) {
                values[row * k..(row + 1) * k].copy_from_slice(value);
            }
        }
        values
    }

    /// Final norm's output at `hidden_rows`, `[R, d]`.
    fn hidden(&self, options: &HeadOptions, x: &[f32]) -> Vec<f32> {
        let d = self.width();
        let mut hidden = vec![0.0; options.hidden_rows.len() * d];
        let items = options
            .hidden_rows
            .chunks(ROWS_PER_ITEM)
            .zip(hidden.chunks_mut(ROWS_PER_ITEM * d))
            .collect();
        self.compute
            .pool
            .for_each(items, |(rows, hidden): (&[usize], &mut [f32])| {
                for (&row, hidden) in rows.iter().zip(hidden.chunks_exact_mut(d)) {
                    let x = &x[row * d..(row + 1) * d];
                    self.layout
                        .final_norm
                        .forward_row(self.compute, self.weights.base, x, hidden);
                }
            });
        hidden
    }

    /// Gradients of all outputs: fills `d_x` `[N, d]`, the gradient of the residual stream `x` `[N, d]`, and adds to
    /// `gradients`. The lengths in `d` were checked.
    pub(crate) fn backward(
        &self,
        arenas: &ArenaPool,
        gradients: &mut Gradients<'_>,
        options: &HeadOptions,
        d: &OutputGradients<'_>,
        x: &[f32],
        d_x: &mut [f32],
    ) {
        self.clear(d_x);
        let logits = [d.d_logprobs, d.d_entropy, d.d_lse, d.d_zbar, d.d_candidates];
        if logits.iter().any(Option::is_some) {
            let entry = |array: Option<&[f32]>, row: usize| array.map_or(0.0, |array| array[row]);
            let d_candidates = d.d_candidates.unwrap_or_default();
            self.backward_logits(arenas, gradients, options, d_candidates, x, d_x, |row| {
                RowGradients {
                    d_logprob: entry(d.d_logprobs, row),
                    d_entropy: entry(d.d_entropy, row),
                    d_lse: entry(d.d_lse, row),
                    d_zbar: entry(d.d_zbar, row),
                }
            });
        }
        if let Some(d_values) = d.d_values {
            self.backward_values(arenas, gradients, options, d_values, x, d_x);
        }
        if let Some(d_hidden) = d.d_hidden {
            self.backward_hidden(arenas, gradients, options, d_hidden, x, d_x);
        }
    }

    /// The fused pass for sum of weights * -logprob: one product for logits, statistics and gradient. Returns the sum,
    /// added up in f64 in the order of the rows; fills `d_x` `[N, d]` and adds to `gradients`.
    pub(crate) fn forward_backward(
        &self,
        arenas: &ArenaPool,
        gradients: &mut Gradients<'_>,
        options: &HeadOptions,
        weights: &[f32],
        x: &[f32],
        d_x: &mut [f32],
    ) -> f64 {
        self.clear(d_x);
        self.backward_logits(arenas, gradients, options, &[], x, d_x, |row| {
            RowGradients {
                d_logprob: -weights[row],
                d_entropy: 0.0,
                d_lse: 0.0,
                d_zbar: 0.0,
            }
        })
        .zip(&options.rows)
        .map(|(logprob, &row)| -f64::from(weights[row]) * f64::from(logprob))
        .sum()
    }

    /// Makes the logits again, chunk by chunk, and takes them to the gradients of the vocabulary's matrix and of the
    /// residual stream. `d_candidates` is empty or `[C]`. Returns the log-probabilities of the head's rows.
    fn backward_logits(
        &self,
        arenas: &ArenaPool,
        gradients: &mut Gradients<'_>,
        options: &HeadOptions,
        d_candidates: &[f32],
        x: &[f32],
        d_x: &mut [f32],
        d: impl Fn(usize) -> RowGradients + Sync,
    ) -> std::vec::IntoIter<f32> {
        let (width, vocab_size) = (self.width(), self.vocab_size());
        let inverse_temperature = 1.0 / options.temperature;
        let kernels = self.compute.kernels;
        let mut logprobs = Vec::with_capacity(options.rows.len());
        let mut scratch = self.scratch(arenas, options.rows.len(), true, true);
        let chunk = rows_per_chunk(vocab_size, width);
        for (rows, targets) in options
            .rows
            .chunks(chunk)
            .zip(options.targets.chunks(chunk))
        {
            let count = rows.len();
            self.gather(x, rows, &mut scratch);
            self.logits(count, &mut scratch);
            self.for_each_row(
                options,
                rows,
                targets,
                &mut scratch,
                |row, target, logits, statistics| {
                    let (lse, entropy) = (statistics.lse, statistics.entropy);
                    let mut d_row = target.map_or_else(RowGradients::default, |_| d(row));
                    // sum of g_c (e_c - p): its part in p is that of an lse with the gradient -sum g_c.
                    let candidates = match d_candidates {
                        [] => 0..0,
                        _ => options.candidates_of(row),
                    };
                    let total: f64 = d_candidates[candidates.clone()]
                        .iter()
                        .copied()
                        .map(f64::from)
                        .sum();
                    d_row.d_lse = (f64::from(d_row.d_lse) - total) as f32;
                    kernels.head_row_gradient(
                        logits,
                        lse,
                        entropy,
                        target.unwrap_or_default(),
                        d_row,
                        inverse_temperature,
                    );
                    for i in candidates {
                        let id = options.candidates[i] as usize;
                        logits[id] += d_candidates[i] * inverse_temperature;
                    }
                },
            );
            logprobs.extend(
                scratch.statistics[..count]
                    .iter()
                    .map(|statistics| statistics.logprob),
            );
            let d_logits = Mat::new(&scratch.logits[..count * vocab_size], count, vocab_size);
            let normed = Mat::new(&scratch.normed[..count * width], count, width);
            let (compute, weights) = (self.compute, self.weights);
            self.layout
                .head
                .backward_weight(compute, weights, gradients, d_logits, normed);
            let d_normed = MatMut::new(&mut scratch.d_normed[..count * width], count, width);
            self.layout
                .head
                .backward_input(self.compute, self.weights, d_logits, d_normed, false);
            self.scatter_gradient(gradients, rows, d_x, &mut scratch);
        }
        logprobs.into_iter()
    }

    fn backward_values(
        &self,
        arenas: &ArenaPool,
        gradients: &mut Gradients<'_>,
        options: &HeadOptions,
        d_values: &[f32],
        x: &[f32],
        d_x: &mut [f32],
    ) {
        let Some((score, weights)) = self.score() else {
            return;
        };
        let (d, k) = (self.width(), score.outputs);
        let mut scratch = self.scratch(arenas, options.value_rows.len(), false, true);
        let mut chunk_gradients = vec![0.0; scratch.moments.len() * k];
        for rows in options.value_rows.chunks(CHUNK_ROWS) {
            let count = rows.len();
            for (&row, d_value) in rows.iter().zip(chunk_gradients.chunks_exact_mut(k)) {
                d_value.copy_from_slice(&d_values[row * k..(row + 1) * k]);
            }
            self.gather(x, rows, &mut scratch);
            let d_value = Mat::new(&chunk_gradients[..count * k], count, k);
            let normed = Mat::new(&scratch.normed[..count * d], count, d);
            // The heads are trained with an adapter, which has its own: a plain layer of its buffers.
            let (Gradients::Base(flat) | Gradients::Adapter(_, flat)) = &mut *gradients;
            let mut own = Gradients::Base(flat);
            score.backward_weight(self.compute, weights, &mut own, d_value, normed);
            let d_normed = MatMut::new(&mut scratch.d_normed[..count * d], count, d);
            score.backward_input(self.compute, weights, d_value, d_normed, false);
            self.scatter_gradient(gradients, rows, d_x, &mut scratch);
        }
    }

    fn backward_hidden(
        &self,
        arenas: &ArenaPool,
        gradients: &mut Gradients<'_>,
        options: &HeadOptions,
        d_hidden: &[f32],
        x: &[f32],
        d_x: &mut [f32],
    ) {
        let d = self.width();
        // A row may have been asked for several times: its gradients add up, in the order asked.
        let mut order: Vec<usize> = (0..options.hidden_rows.len()).collect();
        order.sort_by_key(|&i| options.hidden_rows[i]);
        let groups: Vec<&[usize]> = order
            .chunk_by(|&a, &b| options.hidden_rows[a] == options.hidden_rows[b])
            .collect();
        let mut scratch = self.scratch(arenas, groups.len(), false, true);
        for groups in groups.chunks(CHUNK_ROWS) {
            let rows: Vec<usize> = groups
                .iter()
                .map(|group| options.hidden_rows[group[0]])
                .collect();
            self.gather(x, &rows, &mut scratch);
            for (group, d_normed) in groups.iter().zip(scratch.d_normed.chunks_exact_mut(d)) {
                let (&first, others) = group.split_first().unwrap_or((&0, &[]));
                d_normed.copy_from_slice(&d_hidden[first * d..(first + 1) * d]);
                for &i in others {
                    self.compute
                        .kernels
                        .add_assign(d_normed, &d_hidden[i * d..(i + 1) * d]);
                }
            }
            self.scatter_gradient(gradients, &rows, d_x, &mut scratch);
        }
    }

    fn clear(&self, x: &mut [f32]) {
        let pieces = x.chunks_mut(ROWS_PER_ITEM * self.width()).collect();
        self.compute
            .pool
            .for_each(pieces, |piece: &mut [f32]| piece.fill(0.0));
    }
}

/// Masks the banned ids of a row of raw logits, scales it and takes its statistics: the one definition of a
/// next-token distribution, for training and decoding alike.
pub(crate) fn row_statistics(
    kernels: ingot_kernels::Kernels,
    options: &HeadOptions,
    logits: &mut [f32],
    target: usize,
) -> RowStatistics {
    for &id in &options.banned_ids {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    kernels.head_row_statistics(logits, 1.0 / options.temperature, target)
}

/// Mutable views of chosen rows; `rows` ascend.
fn pick_rows<'a>(x: &'a mut [f32], width: usize, rows: &[usize]) -> Vec<&'a mut [f32]> {
    let mut rest = x;
    let mut next = 0;
    rows.iter()
        .map(|&row| {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut((row - next) * width);
            let (picked, tail) = tail.split_at_mut(width);
            rest = tail;
            next = row + 1;
            picked
        })
        .collect()
}
