//! Dropout whose masks are a function of (seed, layer, site, sequence id, position, element).
//!
//! A mask depends neither on what shares the batch nor on threads, and nothing is stored: the backward pass applies the
//! same call to the gradient.

use ingot_kernels::random::DropoutKey;

use super::{Compute, ROWS_PER_ITEM};

/// Dropout of one forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropout<'a> {
    pub(crate) probability: f32,
    pub(crate) seed: u64,
    /// Identity of each row's sequence, `[N]`.
    pub(crate) sequence_ids: &'a [i64],
    /// Position of each row in its sequence, `[N]`.
    pub(crate) positions: &'a [u32],
}

impl<'a> Dropout<'a> {
    /// The rows `rows` alone.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> Dropout<'a> {
        Dropout {
            sequence_ids: &self.sequence_ids[rows.clone()],
            positions: &self.positions[rows],
            ..*self
        }
    }

    /// Applies the mask of (layer, site) to one row. Used on values and on gradients alike.
    pub(crate) fn apply_row(
        &self,
        compute: &Compute,
        layer: usize,
        site: u32,
        row: usize,
        x: &mut [f32],
    ) {
        let key = DropoutKey {
            seed: self.seed,
            layer: layer as u32,
            site,
            sequence_id: self.sequence_ids[row],
            position: u64::from(self.positions[row]),
        };
        compute.kernels.dropout(key, self.probability, x);
    }

    /// x = dropout(x), `[R, width]`.
    pub(crate) fn apply(
        &self,
        compute: &Compute,
        layer: usize,
        site: u32,
        width: usize,
        x: &mut [f32],
    ) {
        let items = x.chunks_mut(ROWS_PER_ITEM * width).enumerate().collect();
        compute.pool.for_each(items, |(i, x): (usize, &mut [f32])| {
            for (row, x) in x.chunks_exact_mut(width).enumerate() {
                self.apply_row(compute, layer, site, i * ROWS_PER_ITEM + row, x);
            }
        });
    }

    /// y += dropout(x); both `[R, width]`. x is overwritten.
    pub(crate) fn add(
        &self,
        compute: &Compute,
        layer: usize,
        site: u32,
        width: usize,
        x: &mut [f32],
        y: &mut [f32],
    ) {
        let span = ROWS_PER_ITEM * width;
        let items = x
            .chunks_mut(span)
            .zip(y.chunks_mut(span))
            .enumerate()
            .collect();
        compute
            .pool
            .for_each(items, |(i, (x, y)): (usize, (&mut [f32], &mut [f32]))| {
                for (row, (x, y)) in x
                    .chunks_exact_mut(width)
                    .zip(y.chunks_exact_mut(width))
                    .enumerate()
                {
                    self.apply_row(compute, layer, site, i * ROWS_PER_ITEM + row, x);
                    compute.kernels.add_assign(y, x);
                }
            });
    }

    /// out = dropout(x); both `[R, width]`.
    pub(crate) fn copy(
        &self,
        compute: &Compute,
        layer: usize,
        site: u32,
        width: usize,
        x: &[f32],
        out: &mut [f32],
    ) {
        let span = ROWS_PER_ITEM * width;
        let items = x
            .chunks(span)
            .zip(out.chunks_mut(span))
            .enumerate()
            .collect();
        compute
            .pool
            .for_each(items, |(i, (x, out)): (usize, (&[f32], &mut [f32]))| {
                for (row, (x, out)) in x
                    .chunks_exact(width)
                    .zip(out.chunks_exact_mut(width))
                    .enumerate()
                {
                    out.copy_from_slice(x);
                    self.apply_row(compute, layer, site, i * ROWS_PER_ITEM + row, out);
                }
            });
    }
}

#[cfg(test)]
mod tests {
    use super::{Compute, Dropout};
    use ingot_kernels::{Kernels, Pool};

    const WIDTH: usize = 4096;

    /// The elements kept at (layer, site, row).
    fn kept(dropout: &Dropout<'_>, layer: usize, site: u32, row: usize) -> Vec<bool> {
        let compute = Compute {
            kernels: Kernels::best(),
            pool: Pool::new(1),
        };
        let mut x = vec![1.0; WIDTH];
        dropout.apply_row(&compute, layer, site, row, &mut x);
        let expected = 1.0 / (1.0 - dropout.probability);
        assert!(x.iter().all(|&x| x == 0.0 || (x - expected).abs() < 1e-6));
        x.into_iter().map(|x| x != 0.0).collect()
    }

    #[test]
    fn every_layer_site_sequence_and_position_has_a_mask_of_its_own() {
        let dropout = Dropout {
            probability: 0.5,
            seed: 1,
            sequence_ids: &[7, 7, 8, 7],
            positions: &[0, 1, 0, 0],
        };
        let base = kept(&dropout, 0, 1, 0);
        let others = [
            kept(&dropout, 1, 1, 0),
            kept(&dropout, 0, 2, 0),
            kept(&dropout, 0, 1, 1),
            kept(&dropout, 0, 1, 2),
            kept(&Dropout { seed: 2, ..dropout }, 0, 1, 0),
        ];
        for other in others {
            let equal = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            // Independent masks agree in half of the elements; 6 deviations of the binomial either way.
            assert!(
                equal.abs_diff(WIDTH / 2) < 6 * 32,
                "{equal} of {WIDTH} elements agree"
            );
        }
        assert_eq!(
            base,
            kept(&dropout, 0, 1, 3),
            "the same identity at another row"
        );
    }

    #[test]
    fn the_share_dropped_is_the_probability() {
        let dropout = Dropout {
            probability: 0.1,
            seed: 3,
            sequence_ids: &[0],
            positions: &[0],
        };
        let dropped = kept(&dropout, 2, 3, 0)
            .iter()
            .filter(|kept| !**kept)
            .count();
        // Mean 410, deviation 19.
        assert!(dropped.abs_diff(410) < 100, "{dropped}");
    }
}
