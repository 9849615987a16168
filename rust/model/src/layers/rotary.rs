//! Rotary position embedding (Su et al. 2021, "`RoFormer`", equation 34), Hugging Face's half-split convention: element i of
//! a head is paired with element i + h/2.

use super::Compute;
use crate::{Config, RopeScaling};

/// Cosines and sines of all angles up to some position.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    /// h/2.
    pairs: usize,
    /// `[positions, pairs]`.
    cos: Vec<f32>,
    /// `[positions, pairs]`.
    sin: Vec<f32>,
}

impl RotaryTable {
    /// A table for positions `0..num_positions`. Angles are computed in f64 and rounded once.
    pub(crate) fn new(config: &Config, num_positions: usize) -> Self {
        let frequencies = frequencies(config);
        let pairs = frequencies.len();
        let mut cos = Vec::with_capacity(num_positions * pairs);
        let mut sin = Vec::with_capacity(num_positions * pairs);
        for position in 0..num_positions {
            for frequency in &frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                cos.push(cosine as f32);
                sin.push(sine as f32);
            }
        }
        Self { pairs, cos, sin }
    }

    pub(crate) fn num_positions(&self) -> usize {
        self.cos.len() / self.pairs
    }

    /// Rotates one head row by its position's angles; `inverse` rotates back, which is the gradient.
    pub(crate) fn apply_row(&self, compute: &Compute, position: u32, x: &mut [f32], inverse: bool) {
        let start = position as usize * self.pairs;
        let range = start..start + self.pairs;
        compute
            .kernels
            .rotary(x, &self.cos[range.clone()], &self.sin[range], inverse);
    }
}

/// Angle per position of each pair, radians: theta^(-2i/h), scaled as the configuration says.
fn frequencies(config: &Config) -> Vec<f64> {
    let head_dim = config.head_dim as f64;
    let plain =
        (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / head_dim));
    match config.rope_scaling {
        None => plain.collect(),
        Some(RopeScaling::Linear { factor }) => plain.map(|frequency| frequency / factor).collect(),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            let context = original_max_position_embeddings as f64;
            plain
                .map(|frequency| {
                    // How many turns the pair makes within the original context: few turns are stretched in full.
                    let turns = context * frequency / std::f64::consts::TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                        .clamp(0.0, 1.0);
                    (1.0 - kept) * frequency / factor + kept * frequency
                })
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::frequencies;
    use crate::{Config, RopeScaling};

    fn config(scaling: Option<RopeScaling>) -> Config {
        Config {
            rope_scaling: scaling,
            head_dim: 8,
            rope_theta: 10_000.0,
            ..crate::testing::llama()
        }
    }

    #[test]
    fn frequencies_without_scaling_are_powers_of_theta() {
        let expected = [1.0, 0.1, 0.01, 0.001];
        for (got, want) in frequencies(&config(None)).into_iter().zip(expected) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let scaled = frequencies(&config(Some(RopeScaling::Linear { factor: 4.0 })));
        assert!((scaled[0] - 0.25).abs() < 1e-15);
        assert!((scaled[3] - 0.00025).abs() < 1e-15);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_stretches_long_ones_and_blends_between() {
        // Context 200 and theta 1e4: the four pairs make 31.8, 3.18, 0.318 and 0.0318 turns.
        let scaled = frequencies(&config(Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 200,
        })));
        assert!((scaled[0] - 1.0).abs() < 1e-15);
        let kept = (200.0 * 0.1 / std::f64::consts::TAU - 1.0) / 3.0;
        assert!((scaled[1] - (kept * 0.1 + (1.0 - kept) * 0.1 / 8.0)).abs() < 1e-15);
        assert!((scaled[2] - 0.01 / 8.0).abs() < 1e-15);
        assert!((scaled[3] - 0.001 / 8.0).abs() < 1e-15);
    }
}
