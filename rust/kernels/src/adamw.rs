//! `AdamW` (Loshchilov and Hutter 2019) in one pass over flat buffers, and the squared norm for clipping.

use std::ops::Range;

use crate::simd::{LANES, Simd, dispatch};
use crate::{Kernels, Pool};

/// Elements per work item: 256 KiB of each of the four buffers.
const ITEM: usize = 1 << 16;

/// Where epsilon enters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EpsMode {
    /// `m_hat / (sqrt(v_hat) + eps)`: Kingma and Ba 2015, algorithm 1, and torch.
    Torch,
    /// sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps): the form at the end of their section 2, and TensorFlow;
    /// a larger effective epsilon in the first steps.
    Tf,
}

/// Settings shared by all groups of one step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamSettings {
    /// Number of this step, counted from 1.
    pub step: u64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// How it is added.
    pub eps_mode: EpsMode,
    /// Every gradient is multiplied by this first (clipping, averaging).
    pub gradient_scale: f32,
}

/// Elements that share a learning rate and a decay.
#[derive(Clone, PartialEq, Debug)]
pub struct AdamGroup {
    /// Elements of the flat buffers.
    pub range: Range<usize>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decoupled weight decay: the parameter is multiplied by `1 - learning_rate * weight_decay` first.
    pub weight_decay: f64,
}

/// The numbers of one group's update, computed in f64 and rounded once.
#[derive(Clone, Copy)]
struct Coefficients {
    gradient_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// Multiplies sqrt(v) in the denominator.
    root_scale: f32,
    eps: f32,
    /// Multiplies m / denominator.
    step_size: f32,
    /// Multiplies the parameter.
    keep: f32,
}

impl Coefficients {
    fn new(settings: &AdamSettings, group: &AdamGroup) -> Self {
        let (beta1, beta2) = settings.betas;
        let step = settings.step as f64;
        let correction1 = 1.0 - power(beta1, step);
        let correction2 = (1.0 - power(beta2, step)).sqrt();
        let (root_scale, step_size) = match settings.eps_mode {
            EpsMode::Torch => (1.0 / correction2, group.learning_rate / correction1),
            EpsMode::Tf => (1.0, group.learning_rate * correction2 / correction1),
        };
        Self {
            gradient_scale: settings.gradient_scale,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            root_scale: root_scale as f32,
            eps: settings.eps as f32,
            step_size: step_size as f32,
            keep: (1.0 - group.learning_rate * group.weight_decay) as f32,
        }
    }
}

/// base^exponent for a whole exponent by repeated squaring: the system's `pow` may differ between machines.
fn power(base: f64, exponent: f64) -> f64 {
    let mut exponent = exponent as u64;
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

/// One vector: returns (parameter, m, v).
#[inline(always)]
fn update_vector<S: Simd>(
    s: S,
    c: Coefficients,
    p: S::F,
    g: S::F,
    m: S::F,
    v: S::F,
) -> (S::F, S::F, S::F) {
    let g = s.mul(g, s.splat(c.gradient_scale));
    let m = s.fma(s.splat(c.beta1), m, s.mul(s.splat(c.one_minus_beta1), g));
    let v = s.fma(
        s.splat(c.beta2),
        v,
        s.mul(s.mul(s.splat(c.one_minus_beta2), g), g),
    );
    let denominator = s.fma(s.sqrt(v), s.splat(c.root_scale), s.splat(c.eps));
    let step = s.div(s.mul(s.splat(c.step_size), m), denominator);
    (s.sub(s.mul(p, s.splat(c.keep)), step), m, v)
}

#[inline(always)]
fn update<S: Simd>(
    s: S,
    c: Coefficients,
    parameters: &mut [f32],
    gradients: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    let (p, p_tail) = parameters.as_chunks_mut::<LANES>();
    let (g, g_tail) = gradients.as_chunks::<LANES>();
    let (m, m_tail) = m.as_chunks_mut::<LANES>();
    let (v, v_tail) = v.as_chunks_mut::<LANES>();
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let (new_p, new_m, new_v) = update_vector(s, c, s.load(p), s.load(g), s.load(m), s.load(v));
        s.store(new_p, p);
        s.store(new_m, m);
        s.store(new_v, v);
    }
    if !p_tail.is_empty() {
        let (old_p, g) = (s.load_partial(p_tail), s.load_partial(g_tail));
        let (new_p, new_m, new_v) = update_vector(
            s,
            c,
            old_p,
            g,
            s.load_partial(m_tail),
            s.load_partial(v_tail),
        );
        s.store_partial(new_p, p_tail);
        s.store_partial(new_m, m_tail);
        s.store_partial(new_v, v_tail);
    }
}

#[inline(always)]
fn square_sum<S: Simd>(s: S, x: &[f32]) -> f64 {
    let mut sums = [s.zero_d(); 2];
    let (pairs, rest) = x.as_chunks::<{ 2 * LANES }>();
    for pair in pairs {
        let (chunks, _) = pair.as_chunks::<LANES>();
        sums[0] = s.add_square(sums[0], s.load(&chunks[0]));
        sums[1] = s.add_square(sums[1], s.load(&chunks[1]));
    }
    let (chunks, tail) = rest.as_chunks::<LANES>();
    for chunk in chunks {
        sums[0] = s.add_square(sums[0], s.load(chunk));
    }
    // Zeros in the missing lanes add nothing.
    sums[1] = s.add_square(sums[1], s.load_partial(tail));
    s.sum_d(sums[0]) + s.sum_d(sums[1])
}

impl Kernels {
    /// One `AdamW` step. `groups` are disjoint, ascending ranges of the four buffers; elements outside of them stay as
    /// they are. Per element, with `g = gradient * gradient_scale`:
    ///
    /// ```text
    /// m = beta1 m + (1 - beta1) g
    /// v = beta2 v + (1 - beta2) g^2
    /// p = (1 - lr weight_decay) p - step_size m / (root_scale sqrt(v) + eps)
    /// ```
    ///
    /// where bias correction (computed in f64) and [`EpsMode`] settle `step_size` and `root_scale`.
    ///
    /// # Panics
    /// If the buffers differ in length or the groups overlap, descend or leave the buffers.
    pub fn adamw(
        &self,
        pool: &Pool,
        parameters: &mut [f32],
        gradients: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        groups: &[AdamGroup],
        settings: &AdamSettings,
    ) {
        let n = parameters.len();
        assert!(
            gradients.len() == n && m.len() == n && v.len() == n,
            "adamw: buffers differ in length"
        );
        let mut items = Vec::new();
        let mut rest = (parameters, gradients, m, v);
        let mut position = 0;
        for group in groups {
            let Range { start, end } = group.range;
            assert!(
                position <= start && start <= end && end <= n,
                "adamw: group {start}..{end} does not fit"
            );
            let coefficients = Coefficients::new(settings, group);
            let (_, p) = rest.0.split_at_mut(start - position);
            let (_, g) = rest.1.split_at(start - position);
            let (_, m) = rest.2.split_at_mut(start - position);
            let (_, v) = rest.3.split_at_mut(start - position);
            let (p, p_rest) = p.split_at_mut(end - start);
            let (g, g_rest) = g.split_at(end - start);
            let (m, m_rest) = m.split_at_mut(end - start);
            let (v, v_rest) = v.split_at_mut(end - start);
            let chunks = p
                .chunks_mut(ITEM)
                .zip(g.chunks(ITEM))
                .zip(m.chunks_mut(ITEM))
                .zip(v.chunks_mut(ITEM));
            items.extend(chunks.map(|(((p, g), m), v)| (coefficients, p, g, m, v)));
            rest = (p_rest, g_rest, m_rest, v_rest);
            position = end;
        }
        let kernels = *self;
        pool.for_each(items, |(c, p, g, m, v)| {
            dispatch!(kernels, update(c: Coefficients, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]));
        });
    }

    /// Sum of squares in f64: fixed blocks of 65536 elements, added in order. NaN and infinity show in the result.
    pub fn norm_squared_f64(&self, pool: &Pool, x: &[f32]) -> f64 {
        let mut partial = vec![0.0; x.len().div_ceil(ITEM)];
        let items: Vec<_> = x.chunks(ITEM).zip(&mut partial).collect();
        let kernels = *self;
        pool.for_each(items, |(x, sum)| {
            *sum = dispatch!(kernels, square_sum(x: &[f32]) -> f64);
        });
        // From +0: the sum of an empty iterator of floats is -0.
        partial.iter().fold(0.0, |sum, part| sum + part)
    }
}
