//! First values of the parameters.
//!
//! GPT-2's scheme (Radford et al. 2019, section 2.3): normal with a fixed deviation, the projections that end in the
//! residual stream divided by sqrt(2 layers) because 2 layers of them add up; norms one, biases zero. Scalar heads follow
//! Stiennon et al. 2020: N(0, 1 / (hidden + 1)) in variance.

use ingot_kernels::random::fill_normal;

use crate::parameters::{Initial, Layout};
use crate::{Compute, Config};

/// Elements that one work item fills; a multiple of 4, because four numbers come from one block of the generator.
const PIECE: usize = 1 << 16;

/// Fills `parameters`. Tensor i of the table is stream i of the seed: the values depend on nothing else.
pub(crate) fn initialize(
    layout: &Layout,
    config: &Config,
    seed: u64,
    compute: &Compute,
    parameters: &mut [f32],
) {
    let range = config.initializer_range;
    for (stream, (tensor, initial)) in layout.table.iter().zip(&layout.initial).enumerate() {
        let values = &mut parameters[tensor.range()];
        let deviation = match initial {
            Initial::Zero => {
                values.fill(0.0);
                continue;
            }
            Initial::One => {
                values.fill(1.0);
                continue;
            }
            Initial::Normal => range,
            Initial::Residual => range / (2.0 * config.num_hidden_layers as f64).sqrt(),
            Initial::Score => 1.0 / (config.hidden_size as f64 + 1.0).sqrt(),
        };
        let pieces: Vec<_> = values.chunks_mut(PIECE).enumerate().collect();
        compute.pool.for_each(pieces, |(i, piece)| {
            fill_normal(
                seed,
                stream as u64,
                (i * PIECE) as u64,
                deviation as f32,
                piece,
            );
        });
    }
}
