//! The output head's rows against f64, finite differences and the scalar twin.

#![allow(clippy::float_cmp, reason = "exact results are meant")]

mod common;

use common::{all_kernels, assert_close, assert_same_bits, normal, numerical_gradient, widen};
use ingot_kernels::scalar::head as twin;
use ingot_kernels::{RowGradients, RowStatistics};
use proptest::prelude::*;

/// (lse, logprob, entropy, zbar) in f64; logits of -inf are banned.
fn reference(z: &[f64], inverse_temperature: f64, target: usize) -> [f64; 4] {
    let s: Vec<f64> = z.iter().map(|z| z * inverse_temperature).collect();
    let largest = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + s.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
    let allowed: Vec<f64> = s.iter().copied().filter(|s| s.is_finite()).collect();
    let entropy = allowed.iter().map(|s| (s - lse).exp() * (lse - s)).sum();
    [
        lse,
        s[target] - lse,
        entropy,
        allowed.iter().sum::<f64>() / allowed.len() as f64,
    ]
}

fn all_outputs(d: RowGradients) -> [f64; 4] {
    [d.d_lse, d.d_logprob, d.d_entropy, d.d_zbar].map(f64::from)
}

const GRADIENTS: [RowGradients; 5] = [
    RowGradients {
        d_logprob: 0.7,
        d_entropy: 0.0,
        d_lse: 0.0,
        d_zbar: 0.0,
    },
    RowGradients {
        d_logprob: 0.0,
        d_entropy: -1.3,
        d_lse: 0.0,
        d_zbar: 0.0,
    },
    RowGradients {
        d_logprob: 0.0,
        d_entropy: 0.0,
        d_lse: 0.4,
        d_zbar: 0.0,
    },
    RowGradients {
        d_logprob: 0.0,
        d_entropy: 0.0,
        d_lse: 0.0,
        d_zbar: 2.0,
    },
    RowGradients {
        d_logprob: -0.9,
        d_entropy: 0.5,
        d_lse: -0.2,
        d_zbar: 1.1,
    },
];

fn rows() -> Vec<(Vec<f32>, usize)> {
    let mut rows = Vec::new();
    for n in [1, 2, 15, 16, 17, 33, 64, 100, 257] {
        let mut z = normal(n as u64, 3.0, n);
        rows.push((z.clone(), n / 2));
        // Ban some ids, never the target.
        for i in (0..n).step_by(3).filter(|i| *i != n / 2) {
            z[i] = f32::NEG_INFINITY;
        }
        rows.push((z, n / 2));
    }
    rows
}

#[test]
fn statistics_and_gradients_match_f64() {
    for kernels in all_kernels() {
        for (z, target) in rows() {
            for inverse_temperature in [1.0, 0.7, 2.5] {
                let wide = widen(&z);
                let mut logits = z.clone();
                let s = kernels.head_row_statistics(&mut logits, inverse_temperature, target);
                let expected = reference(&wide, f64::from(inverse_temperature), target);
                let what = format!(
                    "head at {}, {} ids, {} banned",
                    kernels.level(),
                    z.len(),
                    z.iter().filter(|z| !z.is_finite()).count()
                );
                assert_close(
                    &[s.lse, s.logprob, s.entropy, s.zbar],
                    &expected,
                    1e-6,
                    1e-6,
                    &what,
                );
                assert!(s.entropy >= 0.0);
                assert_eq!(s.logprob_of(logits[target]).to_bits(), s.logprob.to_bits());
                for d in GRADIENTS {
                    let mut d_z = logits.clone();
                    kernels.head_row_gradient(
                        &mut d_z,
                        s.lse,
                        s.entropy,
                        target,
                        d,
                        inverse_temperature,
                    );
                    let loss = |z: &[f64]| {
                        let outputs = reference(z, f64::from(inverse_temperature), target);
                        outputs.iter().zip(all_outputs(d)).map(|(o, d)| o * d).sum()
                    };
                    let finite = |z: &[f64]| numerical_gradient(z, loss);
                    // Moving -inf by a step leaves it -inf: the difference is NaN, the gradient of a banned id is 0.
                    let expected: Vec<f64> = finite(&wide)
                        .iter()
                        .zip(&z)
                        .map(|(g, z)| if z.is_finite() { *g } else { 0.0 })
                        .collect();
                    // ln p = s - lse carries the rounding of lse.
                    let absolute = 4e-7 * f64::from((1.0 + s.lse.abs()) * inverse_temperature);
                    assert_close(&d_z, &expected, 1e-5, absolute, &format!("{what}, {d:?}"));
                    let sum: f64 = d_z.iter().map(|d| f64::from(*d)).sum();
                    let due = f64::from((d.d_lse + d.d_zbar) * inverse_temperature);
                    assert!(
                        (sum - due).abs() < 1e-4,
                        "{what}: the gradient sums to {sum}, not {due}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_match_the_twin_bit_for_bit() {
    for kernels in all_kernels() {
        let level = kernels.level();
        for (z, target) in rows()
            .into_iter()
            .chain([(normal(77, 2.0, 50_257), 50_256)])
        {
            let (mut logits, mut expected) = (z.clone(), z);
            let statistics = kernels.head_row_statistics(&mut logits, 0.7, target);
            assert_eq!(
                statistics,
                twin::row_statistics(level, &mut expected, 0.7, target)
            );
            assert_same_bits(&logits, &expected, "scaled logits");
            let d = GRADIENTS[4];
            kernels.head_row_gradient(
                &mut logits,
                statistics.lse,
                statistics.entropy,
                target,
                d,
                0.7,
            );
            twin::row_gradient(
                level,
                &mut expected,
                statistics.lse,
                statistics.entropy,
                target,
                d,
                0.7,
            );
            assert_same_bits(&logits, &expected, "gradient");
        }
    }
}

#[test]
fn large_vocabularies_stay_accurate() {
    let z = normal(5, 2.0, 131_072);
    for kernels in all_kernels() {
        let s = kernels.head_row_statistics(&mut z.clone(), 1.0, 7);
        let [lse, logprob, entropy, zbar] = reference(&widen(&z), 1.0, 7);
        for (actual, expected) in [
            (s.lse, lse),
            (s.logprob, logprob),
            (s.entropy, entropy),
            (s.zbar, zbar),
        ] {
            assert!(
                (f64::from(actual) - expected).abs() < 4e-6,
                "{}: {actual} is not {expected}",
                kernels.level()
            );
        }
    }
}

#[test]
fn top1_is_the_lowest_of_equals() {
    let mut z = vec![0.5; 40];
    (z[3], z[20]) = (2.0, 2.0);
    for kernels in all_kernels() {
        let top1 = |target| {
            kernels
                .head_row_statistics(&mut z.clone(), 1.0, target)
                .top1
        };
        assert!(top1(3));
        assert!(!top1(20) && !top1(0));
    }
}

#[test]
fn banned_targets_and_rows_give_no_nan() {
    let banned = f32::NEG_INFINITY;
    for kernels in all_kernels() {
        let mut z = normal(6, 1.0, 33);
        z[4] = banned;
        let s = kernels.head_row_statistics(&mut z, 1.0, 4);
        assert!(
            s.logprob == banned
                && s.lse.is_finite()
                && s.entropy.is_finite()
                && s.zbar.is_finite()
                && !s.top1
        );
        kernels.head_row_gradient(&mut z, s.lse, s.entropy, 4, GRADIENTS[4], 1.0);
        assert!(kernels.is_finite(&z) && z[4] == 0.0);

        let mut z = vec![banned; 20];
        let s = kernels.head_row_statistics(&mut z, 1.0, 0);
        assert_eq!(
            s,
            RowStatistics {
                lse: banned,
                logprob: banned,
                entropy: 0.0,
                zbar: 0.0,
                top1: false,
                largest: banned,
                log_sum: 0.0,
            }
        );
        kernels.head_row_gradient(&mut z, s.lse, s.entropy, 0, GRADIENTS[4], 1.0);
        assert_eq!(z, vec![0.0; 20]);
    }
}

#[test]
fn extremes_are_exact_and_nan_shows() {
    for kernels in all_kernels() {
        let mut z = vec![-1e30; 50];
        z[9] = 1e30;
        let s = kernels.head_row_statistics(&mut z, 1.0, 9);
        assert_eq!((s.logprob, s.entropy, s.top1), (0.0, 0.0, true));
        let mut z = vec![0.0; 50];
        z[40] = f32::NAN;
        let s = kernels.head_row_statistics(&mut z, 1.0, 9);
        assert!(s.lse.is_nan() && s.logprob.is_nan() && s.entropy.is_nan());
    }
}

proptest! {
    #[test]
    fn a_row_with_bans_is_the_row_without_them(
        z in prop::collection::vec(-20.0_f32..20.0, 2..120),
        bans in prop::collection::vec(any::<bool>(), 120),
        pick in any::<prop::sample::Index>(),
    ) {
        let target = pick.index(z.len());
        let banned = |i: usize| bans[i] && i != target;
        let with: Vec<f32> = z.iter().enumerate().map(|(i, z)| if banned(i) { f32::NEG_INFINITY } else { *z }).collect();
        let without: Vec<f32> = (0..z.len()).filter(|i| !banned(*i)).map(|i| z[i]).collect();
        let place = (0..target).filter(|i| !banned(*i)).count();
        for kernels in all_kernels() {
            let a = kernels.head_row_statistics(&mut with.clone(), 1.0, target);
            let b = kernels.head_row_statistics(&mut without.clone(), 1.0, place);
            for (a, b) in [(a.lse, b.lse), (a.logprob, b.logprob), (a.entropy, b.entropy), (a.zbar, b.zbar)] {
                // Sums are taken of differences to the largest logit, which is at most 40 away.
                prop_assert!((a - b).abs() <= 2e-5, "{a} {b}");
            }
            prop_assert_eq!(a.top1, b.top1);
        }
    }
}
