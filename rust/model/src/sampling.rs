//! Drawing the next token from a row of scores.
//!
//! The scores are the logits divided by the temperature, banned ids at -inf. A repetition penalty (Keskar et al. 2019,
//! "CTRL", section 4.1) and the truncations come after that, in transformers' order: penalty, top-k (Fan et al. 2018),
//! top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). What is left is drawn from by the inverse of its cumulative
//! distribution, in the order of the ids.

use std::cmp::Ordering;

use ingot_kernels::{Function, Kernels};

use crate::ModelError;

/// How the next token is drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token, and reports its log-probability at temperature 1.
    pub temperature: f32,
    /// Draw among this many likeliest tokens, the lower id first where two are equal; 0 for all.
    pub top_k: usize,
    /// Draw among the likeliest tokens that together reach this probability; in (0, 1].
    pub top_p: f32,
    /// Draw among tokens at least this share as likely as the likeliest; in [0, 1].
    pub min_p: f32,
    /// Scores of tokens that the sequence has are divided by it where positive, multiplied where negative.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    /// The model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// Candidates that are sorted first; usually enough of them for top-p.
const FIRST_SORTED: usize = 256;

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ModelError::Argument`] naming the setting and its value.
    pub fn validate(&self) -> Result<(), ModelError> {
        let ranges = [
            (
                "temperature",
                self.temperature >= 0.0 && self.temperature.is_finite(),
                "0 or more",
                self.temperature,
            ),
            (
                "top_p",
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
                self.top_p,
            ),
            (
                "min_p",
                (0.0..=1.0).contains(&self.min_p),
                "between 0 and 1",
                self.min_p,
            ),
            (
                "repetition_penalty",
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "positive",
                self.repetition_penalty,
            ),
        ];
        match ranges.iter().find(|(_, holds, _, _)| !holds) {
            None => Ok(()),
            Some((name, _, range, value)) => Err(ModelError::argument(
                name,
                format!("must be {range}, got {value}"),
            )),
        }
    }

    /// What the logits are divided by before probabilities are taken.
    pub(crate) fn divisor(&self) -> f32 {
        if self.temperature > 0.0 {
            self.temperature
        } else {
            1.0
        }
    }

    fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// The token at `uniform` in [0, 1). `scores` [V] are scaled and masked, at least one of them finite and none NaN;
    /// `previous` are the sequence's tokens; `scratch` has at least 2 V floats.
    pub(crate) fn draw(
        &self,
        kernels: Kernels,
        scores: &[f32],
        previous: &[i32],
        uniform: f64,
        scratch: &mut [f32],
    ) -> i32 {
        let (penalized, weights) = scratch[..2 * scores.len()].split_at_mut(scores.len());
        penalized.copy_from_slice(scores);
        self.penalize(scores, previous, penalized);
        let largest = penalized.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if self.temperature == 0.0 {
            return penalized
                .iter()
                .position(|&score| score >= largest)
                .unwrap_or_default() as i32;
        }
        for score in penalized.iter_mut() {
            *score -= largest;
        }
        kernels.apply(Function::Exp, penalized, weights);
        if self.truncates() {
            let kept = self.truncate(weights);
            let picked = inverse(kept.iter().map(|&id| weights[id as usize]), uniform);
            return kept[picked] as i32;
        }
        inverse(weights.iter().copied(), uniform) as i32
    }

    fn penalize(&self, scores: &[f32], previous: &[i32], penalized: &mut [f32]) {
        #[allow(clippy::float_cmp, reason = "exactly 1 is no penalty")]
        if self.repetition_penalty == 1.0 {
            return;
        }
        for &token in previous {
            let score = scores[token as usize];
            // From the score as it was: a token that occurred twice is penalised once.
            penalized[token as usize] = if score > 0.0 {
                score / self.repetition_penalty
            } else {
                score * self.repetition_penalty
            };
        }
    }

    /// The ids that remain, ascending. `weights` are proportional to probabilities, the largest of them 1.
    fn truncate(&self, weights: &[f32]) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..weights.len() as u32)
            .filter(|&id| weights[id as usize] > 0.0)
            .collect();
        let likelier = |a: &u32, b: &u32| -> Ordering {
            weights[*b as usize]
                .total_cmp(&weights[*a as usize])
                .then(a.cmp(b))
        };
        if self.top_k > 0 && self.top_k < ids.len() {
            ids.select_nth_unstable_by(self.top_k - 1, likelier);
            ids.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            ids.sort_unstable();
            let total: f64 = ids.iter().map(|&id| f64::from(weights[id as usize])).sum();
            let wanted = f64::from(self.top_p) * total;
            let mut sorted = 0;
            let mut sum = 0.0;
            let mut kept = None;
            while kept.is_none() && sorted < ids.len() {
                // Sorting the likeliest few suffices in most cases; where it does not, more are sorted.
                let end = (sorted * 8).max(FIRST_SORTED).min(ids.len());
                if end < ids.len() {
                    ids[sorted..].select_nth_unstable_by(end - sorted - 1, likelier);
                }
                ids[sorted..end].sort_unstable_by(likelier);
                kept = ids[sorted..end].iter().position(|&id| {
                    sum += f64::from(weights[id as usize]);
                    sum >= wanted
                });
                kept = kept.map(|position| sorted + position + 1);
                sorted = end;
            }
            ids.truncate(kept.unwrap_or(ids.len()));
        }
        if self.min_p > 0.0 {
            ids.retain(|&id| weights[id as usize] >= self.min_p);
        }
        ids.sort_unstable();
        ids
    }
}

/// Index of the weight in which `uniform` times their sum falls.
fn inverse(weights: impl Iterator<Item = f32> + Clone, uniform: f64) -> usize {
    let total: f64 = weights.clone().map(f64::from).sum();
    let point = uniform * total;
    let mut sum = 0.0;
    let mut last = 0;
    for (i, weight) in weights.enumerate() {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = i;
            if sum > point {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::{Sampling, inverse};
    use crate::Kernels;

    const SCORES: [f32; 6] = [0.5, 2.0, -1.0, 2.0, f32::NEG_INFINITY, 1.0];

    /// The ids that can come out, by sweeping the uniform number.
    fn support(sampling: Sampling, previous: &[i32]) -> Vec<i32> {
        let mut scratch = [0.0; 12];
        let mut draw = |i: u32| {
            sampling.draw(
                Kernels::best(),
                &SCORES,
                previous,
                f64::from(i) / 1000.0,
                &mut scratch,
            )
        };
        let mut ids: Vec<i32> = (0..1000).map(&mut draw).collect();
        assert!(ids.is_sorted(), "the inverse follows the order of the ids");
        ids.dedup();
        ids
    }

    #[test]
    fn everything_but_banned_ids_can_be_drawn() {
        assert_eq!(support(Sampling::default(), &[]), [0, 1, 2, 3, 5]);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(
            support(
                Sampling {
                    temperature: 0.0,
                    ..Sampling::default()
                },
                &[]
            ),
            [1]
        );
    }

    #[test]
    fn top_k_prefers_lower_ids_among_equals() {
        assert_eq!(
            support(
                Sampling {
                    top_k: 1,
                    ..Sampling::default()
                },
                &[]
            ),
            [1]
        );
        assert_eq!(
            support(
                Sampling {
                    top_k: 3,
                    ..Sampling::default()
                },
                &[]
            ),
            [1, 3, 5]
        );
        assert_eq!(
            support(
                Sampling {
                    top_k: 99,
                    ..Sampling::default()
                },
                &[]
            ),
            [0, 1, 2, 3, 5]
        );
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        // Weights relative to the largest: .223, 1, .050, 1, 0, .368; sum 2.641.
        let kept = |top_p| {
            support(
                Sampling {
                    top_p,
                    ..Sampling::default()
                },
                &[],
            )
        };
        assert_eq!(kept(0.01), [1]);
        assert_eq!(kept(0.5), [1, 3]);
        assert_eq!(kept(0.757), [1, 3]);
        assert_eq!(kept(0.758), [1, 3, 5]);
    }

    #[test]
    fn top_p_counts_what_top_k_left() {
        // Among 1, 3 and 5 the first two have .845.
        let kept = |top_p| {
            support(
                Sampling {
                    top_k: 3,
                    top_p,
                    ..Sampling::default()
                },
                &[],
            )
        };
        assert_eq!(kept(0.84), [1, 3]);
        assert_eq!(kept(0.85), [1, 3, 5]);
    }

    #[test]
    fn min_p_compares_with_the_likeliest() {
        let kept = |min_p| {
            support(
                Sampling {
                    min_p,
                    ..Sampling::default()
                },
                &[],
            )
        };
        assert_eq!(kept(0.3), [1, 3, 5]);
        assert_eq!(kept(0.2), [0, 1, 3, 5]);
        assert_eq!(kept(1.0), [1, 3]);
    }

    #[test]
    fn repetition_is_penalised_once_and_by_the_sign() {
        let greedy = Sampling {
            temperature: 0.0,
            repetition_penalty: 4.0,
            ..Sampling::default()
        };
        assert_eq!(support(greedy, &[1, 1]), [3]);
        assert_eq!(support(greedy, &[1, 3, 3]), [5]);
        // -1 times 4 is less likely than any other: top-k of four leaves it out.
        let sampling = Sampling {
            repetition_penalty: 4.0,
            top_k: 4,
            ..Sampling::default()
        };
        assert_eq!(support(sampling, &[2]), [0, 1, 3, 5]);
    }

    #[test]
    fn long_tails_are_sorted_further() {
        let scores = vec![0.0_f32; 5000];
        let mut scratch = vec![0.0; 10_000];
        let sampling = Sampling {
            top_p: 0.5,
            ..Sampling::default()
        };
        let last = sampling.draw(Kernels::best(), &scores, &[], 0.999_999, &mut scratch);
        assert_eq!(last, 2499);
    }

    #[test]
    fn inverse_skips_zero_weights_at_both_ends() {
        assert_eq!(inverse([0.0, 1.0, 0.0].into_iter(), 0.0), 1);
        assert_eq!(inverse([0.0, 1.0, 0.0].into_iter(), 1.0 - f64::EPSILON), 1);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let error = Sampling {
            top_p: 0.0,
            ..Sampling::default()
        }
        .validate()
        .unwrap_err()
        .to_string();
        assert_eq!(error, "top_p: must be above 0 and at most 1, got 0");
    }
}
