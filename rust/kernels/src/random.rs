//! Counter-based random numbers: every number is a function of what it is for, never of how many came before.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a
//! counter into 128 random bits. Dropout takes one Philox block per row and an avalanche hash of the element index under
//! that block's words, which costs a few vector instructions per 16 elements and replays in the backward pass.

use crate::Kernels;
use crate::simd::{LANES, Simd, dispatch};

const PHILOX_MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const PHILOX_WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const PHILOX_ROUNDS: usize = 10;

/// Philox4x32 with ten rounds: 128 random bits from a key and a counter.
#[must_use]
pub fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..PHILOX_ROUNDS {
        let first = u64::from(PHILOX_MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(PHILOX_MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key[0] = key[0].wrapping_add(PHILOX_WEYL[0]);
        key[1] = key[1].wrapping_add(PHILOX_WEYL[1]);
    }
    counter
}

/// What a block of random numbers is for. Two different keys give independent numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RandomKey {
    /// Seed of the run or of the call.
    pub seed: u64,
    /// Layer of the network (below 65536).
    pub layer: u32,
    /// Place within the layer (below 65536), for instance one of the constants of [`site`].
    pub site: u32,
    /// Identity of the sequence, which does not depend on its place in a batch.
    pub sequence_id: i64,
    /// Position within the sequence (taken modulo 2^32).
    pub position: u64,
}

/// Key of a dropout mask: one per row (a token at one place of the network).
pub type DropoutKey = RandomKey;

/// Values of [`RandomKey::site`] used by the network.
pub mod site {
    /// Dropout after the embedding.
    pub const EMBEDDING: u32 = 1;
    /// Dropout on the attention block's contribution to the residual stream.
    pub const ATTENTION_RESIDUAL: u32 = 2;
    /// Dropout on the MLP's contribution to the residual stream.
    pub const MLP_RESIDUAL: u32 = 3;
    /// Sampling a token while generating.
    pub const SAMPLING: u32 = 4;
    /// Dropout at the entrance of an adapter: this plus the number of the linear layer within its block.
    pub const ADAPTER: u32 = 0x4000;
    /// Initial values of parameters.
    pub const INITIALIZATION: u32 = 5;
    /// Dropout on attention weights: this plus the query head.
    pub const ATTENTION_WEIGHTS: u32 = 0x8000;
}

impl RandomKey {
    /// 128 random bits of this key.
    #[must_use]
    pub fn words(&self) -> [u32; 4] {
        debug_assert!(
            self.layer < 1 << 16 && self.site < 1 << 16,
            "layer and site share one word of the counter"
        );
        let sequence = self.sequence_id as u64;
        philox(
            [self.seed as u32, (self.seed >> 32) as u32],
            [
                self.position as u32,
                sequence as u32,
                (sequence >> 32) as u32,
                self.layer << 16 | self.site,
            ],
        )
    }

    /// A number in [0, 1) with 53 random bits.
    #[must_use]
    pub fn uniform(&self) -> f64 {
        let [low, high, ..] = self.words();
        ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The two words that key the hash of a row of a dropout mask.
    pub(crate) fn row_words(&self) -> [u32; 2] {
        let [first, second, ..] = self.words();
        [first, second]
    }
}

/// A number in [0, 1) with 24 random bits: element `index` of stream `stream` of `seed`.
#[must_use]
pub fn uniform(seed: u64, stream: u64, index: u64) -> f32 {
    let block = index / 4;
    let words = philox(
        [seed as u32, (seed >> 32) as u32],
        [
            block as u32,
            (block >> 32) as u32,
            stream as u32,
            (stream >> 32) as u32,
        ],
    );
    (words[(index % 4) as usize] >> 8) as f32 / 16_777_216.0
}

/// Fills `out` with normal numbers of mean 0 and the given standard deviation: elements `first..` of stream `stream`.
///
/// Box and Muller's method in f64 with plain multiplications and additions, so that the initial weights of a seed are
/// the same bits on every machine and at every level. `first` must be a multiple of 4, which lets pieces of one tensor
/// be filled by several threads.
///
/// # Panics
/// If `first` is not a multiple of 4.
pub fn fill_normal(seed: u64, stream: u64, first: u64, standard_deviation: f32, out: &mut [f32]) {
    assert!(
        first.is_multiple_of(4),
        "the first element must start a block of 4"
    );
    let key = [seed as u32, (seed >> 32) as u32];
    for (block, chunk) in (first / 4..).zip(out.chunks_mut(4)) {
        let words = philox(
            key,
            [
                block as u32,
                (block >> 32) as u32,
                stream as u32,
                (stream >> 32) as u32,
            ],
        );
        let (a, b) = normal_pair(words[0], words[1]);
        let (c, d) = normal_pair(words[2], words[3]);
        for (value, normal) in chunk.iter_mut().zip([a, b, c, d]) {
            *value = (normal * f64::from(standard_deviation)) as f32;
        }
    }
}

/// Two independent standard normal numbers from two words.
fn normal_pair(radius_bits: u32, angle_bits: u32) -> (f64, f64) {
    // (0, 1]: the logarithm stays finite; the largest radius is 6.8.
    let uniform = (f64::from(radius_bits) + 1.0) / 4_294_967_296.0;
    let radius = (-2.0 * crate::math::log_f64(uniform)).sqrt();
    let (sine, cosine) = sine_cosine_turn(angle_bits);
    (radius * cosine, radius * sine)
}

/// Sine and cosine of `bits / 2^32` turns by Taylor's series in an eighth of a turn (error below 1e-13).
fn sine_cosine_turn(bits: u32) -> (f64, f64) {
    // Nearest quarter turn, and the rest in [-1/8, 1/8] of a turn.
    let quadrant = bits.wrapping_add(1 << 29) >> 30;
    let rest = bits.wrapping_sub(quadrant << 30) as i32;
    let angle = f64::from(rest) * (std::f64::consts::TAU / 4_294_967_296.0);
    let square = angle * angle;
    let (mut sine, mut cosine) = (1.0, 1.0);
    for n in (1..=6_u32).rev() {
        sine = 1.0 - sine * square / f64::from(2 * n * (2 * n + 1));
        cosine = 1.0 - cosine * square / f64::from((2 * n - 1) * (2 * n));
    }
    sine *= angle;
    match quadrant {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

/// A dropout probability as the hash sees it: elements whose 32 bits lie below the threshold are dropped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DropoutScale {
    /// Probability times 2^32.
    pub(crate) threshold: u32,
    /// 1 / (1 - probability).
    pub(crate) scale: f32,
}

impl DropoutScale {
    /// # Panics
    /// If `p` is not in [0, 1).
    pub(crate) fn new(p: f32) -> Self {
        assert!(
            (0.0..1.0).contains(&p),
            "dropout probability {p} is not in [0, 1)"
        );
        Self {
            threshold: (f64::from(p) * 4_294_967_296.0) as u32,
            scale: (1.0 / (1.0 - f64::from(p))) as f32,
        }
    }
}

/// Constants of the mask's hash: a Weyl step per element and two odd multipliers with good avalanche (found by search in
/// Wellons' "hash prospector").
pub(crate) const HASH_STEP: u32 = 0x9E37_79B9;
/// First and second multiplier.
pub(crate) const HASH_MULTIPLIERS: [u32; 2] = [0x7FEB_352D, 0x846C_A68B];

/// 16 lanes that are set where the elements `first..first + 16` of a row are kept.
#[inline(always)]
pub(crate) fn kept<S: Simd>(s: S, row: [u32; 2], first: u32, threshold: u32) -> S::M {
    let index = s.add_u(s.lane_index(), s.splat_u(first));
    let mut x = s.add_u(s.mul_u(index, s.splat_u(HASH_STEP)), s.splat_u(row[0]));
    x = s.xor_u(x, s.shift_right::<16>(x));
    x = s.mul_u(x, s.splat_u(HASH_MULTIPLIERS[0]));
    // The second word enters between the two halves of the mixing: rows are not shifts of one another.
    x = s.xor_u(x, s.add_u(s.shift_right::<15>(x), s.splat_u(row[1])));
    x = s.mul_u(x, s.splat_u(HASH_MULTIPLIERS[1]));
    x = s.xor_u(x, s.shift_right::<16>(x));
    s.not_less_u(x, s.splat_u(threshold))
}

#[inline(always)]
fn dropout<S: Simd>(s: S, row: [u32; 2], scale: DropoutScale, x: &mut [f32]) {
    let factor = s.splat(scale.scale);
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let tail_start = (chunks.len() * LANES) as u32;
    for (i, chunk) in chunks.iter_mut().enumerate() {
        let mask = kept(s, row, (i * LANES) as u32, scale.threshold);
        let value = s.mul(s.load(chunk), factor);
        s.store(s.select(mask, value, s.zero()), chunk);
    }
    if !rest.is_empty() {
        let mask = kept(s, row, tail_start, scale.threshold);
        let value = s.mul(s.load_partial(rest), factor);
        s.store_partial(s.select(mask, value, s.zero()), rest);
    }
}

impl Kernels {
    /// Dropout of one row in place: elements are set to 0 with probability `p`, the others multiplied by `1 / (1 - p)`
    /// (Srivastava et al. 2014, in the scaled form). The mask is a function of (key, element index): applying the call
    /// to the row's gradient replays it. `p = 0` leaves the row as it is.
    ///
    /// # Panics
    /// If `p` is not in [0, 1).
    pub fn dropout(&self, key: DropoutKey, p: f32, x: &mut [f32]) {
        let scale = DropoutScale::new(p);
        if p == 0.0 {
            return;
        }
        let row = key.row_words();
        dispatch!(*self, dropout(row: [u32; 2], scale: DropoutScale, x: &mut [f32]));
    }
}
