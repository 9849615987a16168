//! Twins of the sums in a fixed order.

/// Adds 16 lanes by the tree: i with i+8, i+4, i+2, i+1.
#[must_use]
pub fn tree(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Reduces `length` elements: element i updates partial sum i mod 64 by `step(i, sum)`; the four vectors of 16 are added
/// as (0 + 1) + (2 + 3), their lanes by [`tree`].
#[must_use]
pub fn reduce(length: usize, step: impl Fn(usize, f32) -> f32) -> f32 {
    let mut sums = [0.0; 64];
    for i in 0..length {
        sums[i % 64] = step(i, sums[i % 64]);
    }
    tree(std::array::from_fn(|i| {
        (sums[i] + sums[16 + i]) + (sums[32 + i] + sums[48 + i])
    }))
}
