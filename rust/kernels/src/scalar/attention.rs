//! Twins of attention: one query row at a time, keys in tiles of 64.

use super::math::{exp, log};
use super::multiply_add;
use super::random::is_kept;
use super::reduce::tree;
use crate::random::{DropoutKey, DropoutScale, site};
use crate::{AttentionDropout, AttentionShape, Level, PAGE_POSITIONS};

const TILE: usize = PAGE_POSITIONS;

/// Twin of [`crate::Kernels::attention_forward`] for one sequence of contiguous rows: `q` `[T, heads * head_dim]`, `k` and
/// `v` `[T, kv_heads * head_dim]`. Returns (out, lse `[heads][T]`). `sequence` is the index into the dropout's ids.
#[must_use]
pub fn attention_forward(
    level: Level,
    shape: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dropout: Option<&AttentionDropout>,
    sequence: usize,
) -> (Vec<f32>, Vec<f32>) {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *shape;
    let length = q.len() / (heads * head_dim);
    let mut out = vec![0.0; q.len()];
    let mut lse = vec![0.0; heads * length];
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        let key = |j: usize| &k[(j * kv_heads + kv_head) * head_dim..][..head_dim];
        let value = |j: usize| &v[(j * kv_heads + kv_head) * head_dim..][..head_dim];
        for t in 0..length {
            let query = &q[(t * heads + head) * head_dim..][..head_dim];
            let weighted = &mut out[(t * heads + head) * head_dim..][..head_dim];
            let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
            for first in (0..=t).step_by(TILE) {
                let keys = TILE.min(t + 1 - first);
                let mut scores = [f32::NEG_INFINITY; TILE];
                for (j, score) in scores.iter_mut().take(keys).enumerate() {
                    *score = score_of(level, query, key(first + j)) * shape.scale;
                }
                let previous = largest;
                largest = scores.iter().copied().fold(largest, f32::max);
                let decay = exp(level, previous - largest);
                let weights = scores.map(|score| exp(level, score - largest));
                let lanes =
                    |i: usize| (weights[i] + weights[16 + i]) + (weights[32 + i] + weights[48 + i]);
                sum = sum * decay + tree(std::array::from_fn(lanes));
                for out in weighted.iter_mut() {
                    *out *= decay;
                }
                for (j, weight) in weights.iter().take(keys).enumerate() {
                    let weight = weight * factor(dropout, sequence, head, t, first + j);
                    for (out, value) in weighted.iter_mut().zip(value(first + j)) {
                        *out = multiply_add(level, weight, *value, *out);
                    }
                }
            }
            let inverse = 1.0 / sum;
            for out in weighted.iter_mut() {
                *out *= inverse;
            }
            lse[head * length + t] = largest + log(level, sum);
        }
    }
    (out, lse)
}

fn score_of(level: Level, query: &[f32], key: &[f32]) -> f32 {
    query
        .iter()
        .zip(key)
        .fold(0.0, |sum, (q, k)| multiply_add(level, *q, *k, sum))
}

/// 0 for a dropped weight, 1 / (1 - p) for a kept one.
fn factor(
    dropout: Option<&AttentionDropout>,
    sequence: usize,
    head: usize,
    t: usize,
    j: usize,
) -> f32 {
    let Some(dropout) = dropout else { return 1.0 };
    let key = DropoutKey {
        seed: dropout.seed,
        layer: dropout.layer,
        site: site::ATTENTION_WEIGHTS + head as u32,
        sequence_id: dropout.sequence_ids[sequence],
        position: t as u64,
    };
    if is_kept(key, dropout.p, j as u32) {
        DropoutScale::new(dropout.p).scale
    } else {
        0.0
    }
}

/// Gradients of attention with respect to (q, k, v).
pub type Gradients = (Vec<f32>, Vec<f32>, Vec<f32>);

/// Twin of [`crate::Kernels::attention_backward`] for one sequence; layouts as in [`attention_forward`].
#[must_use]
pub fn attention_backward(
    level: Level,
    shape: &AttentionShape,
    [q, k, v, out, lse, d_out]: [&[f32]; 6],
    dropout: Option<&AttentionDropout>,
    sequence: usize,
) -> Gradients {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *shape;
    let length = q.len() / (heads * head_dim);
    let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        let at = |t: usize| (t * heads + head) * head_dim..(t * heads + head + 1) * head_dim;
        let kv_at =
            |j: usize| (j * kv_heads + kv_head) * head_dim..(j * kv_heads + kv_head + 1) * head_dim;
        for t in 0..length {
            let correlation = lane_product(level, &d_out[at(t)], &out[at(t)]);
            for j in 0..=t {
                let score = score_of(level, &q[at(t)], &k[kv_at(j)]) * shape.scale;
                let p = exp(level, score - lse[head * length + t]);
                let factor = factor(dropout, sequence, head, t, j);
                let d_p = score_of(level, &d_out[at(t)], &v[kv_at(j)]) * factor;
                let d_score = p * (d_p - correlation) * shape.scale;
                let weight = p * factor;
                for d in 0..head_dim {
                    let (query, key) = (at(t).start + d, kv_at(j).start + d);
                    d_q[query] = multiply_add(level, d_score, k[key], d_q[query]);
                    d_k[key] = multiply_add(level, d_score, q[query], d_k[key]);
                    d_v[key] = multiply_add(level, weight, d_out[query], d_v[key]);
                }
            }
        }
    }
    (d_q, d_k, d_v)
}

/// Dot product over lanes i mod 16.
fn lane_product(level: Level, a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % 16] = multiply_add(level, *a, *b, lanes[i % 16]);
    }
    tree(lanes)
}
