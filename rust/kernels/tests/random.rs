//! Philox against its published vectors; dropout's masks and the normals against their distributions.

mod common;

use common::{LENGTHS, all_kernels, assert_same_bits, normal};
use ingot_kernels::random::{fill_normal, philox, uniform};
use ingot_kernels::scalar::random as twin;
use ingot_kernels::{DropoutKey, RandomKey};
use proptest::prelude::*;

#[test]
fn philox_gives_the_published_vectors() {
    // Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
    let vectors: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
        (
            [0; 4],
            [0; 2],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in vectors {
        assert_eq!(philox(key, counter), expected);
    }
}

fn key(position: u64) -> DropoutKey {
    DropoutKey {
        seed: 42,
        layer: 3,
        site: 2,
        sequence_id: 17,
        position,
    }
}

#[test]
fn dropout_matches_its_twin_and_replays() {
    for kernels in all_kernels() {
        for n in LENGTHS {
            for p in [0.0, 0.1, 0.5, 0.999] {
                let x = normal(1, 1.0, n);
                let (mut first, mut again, mut expected) = (x.clone(), x.clone(), x.clone());
                kernels.dropout(key(5), p, &mut first);
                kernels.dropout(key(5), p, &mut again);
                twin::dropout(key(5), p, &mut expected);
                assert_same_bits(&first, &expected, "dropout");
                assert_same_bits(&first, &again, "replay");
                if p == 0.0 {
                    assert_same_bits(&first, &x, "p = 0");
                }
            }
        }
    }
}

/// Masks of `rows` consecutive positions.
fn masks(p: f32, rows: u64, n: usize) -> Vec<Vec<bool>> {
    let kernels = all_kernels()[0];
    let row = |position| {
        let mut x = vec![1.0; n];
        kernels.dropout(key(position), p, &mut x);
        x.iter().map(|x| *x == 0.0).collect()
    };
    (0..rows).map(row).collect()
}

#[test]
fn dropout_drops_its_share_independently() {
    let (rows, n) = (500_u64, 1024);
    for p in [0.05_f32, 0.2, 0.5] {
        let masks = masks(p, rows, n);
        let p = f64::from(p);
        let total = (rows as usize * n) as f64;
        let share = masks.iter().flatten().filter(|dropped| **dropped).count() as f64 / total;
        let sigma = (p * (1.0 - p) / total).sqrt();
        assert!((share - p).abs() < 4.5 * sigma, "share {share} of {p}");
        // Pairs at a distance along the row, and between rows, are dropped together with probability p^2.
        let sigma = (p * p * (1.0 - p * p) / total).sqrt();
        for distance in [1, 2, 15, 16, 17, 64, 256] {
            let together =
                |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && **b).count() as f64;
            let along: f64 = masks
                .iter()
                .map(|row| together(&row[..n - distance], &row[distance..]))
                .sum();
            let along = along / (rows as usize * (n - distance)) as f64;
            assert!(
                (along - p * p).abs() < 6.0 * sigma,
                "distance {distance} along: {along}"
            );
            let between: f64 = masks
                .windows(2)
                .map(|pair| together(&pair[0][..n - distance], &pair[1][distance..]))
                .sum();
            let between = between / ((rows as usize - 1) * (n - distance)) as f64;
            assert!(
                (between - p * p).abs() < 6.0 * sigma,
                "distance {distance} between rows: {between}"
            );
        }
        // The counts per row scatter as a binomial's.
        let counts = masks
            .iter()
            .map(|row| row.iter().filter(|dropped| **dropped).count() as f64);
        let spread = counts
            .map(|count| (count - p * n as f64).powi(2))
            .sum::<f64>()
            / rows as f64;
        let ratio = spread / (n as f64 * p * (1.0 - p));
        assert!(
            (ratio - 1.0).abs() < 0.3,
            "variance of the rows' counts is {ratio} of a binomial's"
        );
    }
}

#[test]
fn dropout_keeps_the_mean() {
    let kernels = all_kernels()[0];
    let mut total = 0.0;
    for position in 0..200 {
        let mut x = vec![1.0; 1000];
        kernels.dropout(key(position), 0.3, &mut x);
        total += x.iter().map(|x| f64::from(*x)).sum::<f64>();
    }
    assert!((total / 200_000.0 - 1.0).abs() < 0.01, "{total}");
}

#[test]
fn every_field_of_a_key_matters() {
    let base = RandomKey {
        seed: 1,
        layer: 2,
        site: 3,
        sequence_id: 4,
        position: 5,
    };
    let others = [
        RandomKey {
            seed: 1 + (1 << 40),
            ..base
        },
        RandomKey { seed: 2, ..base },
        RandomKey {
            layer: 3,
            site: 2,
            ..base
        },
        RandomKey { layer: 3, ..base },
        RandomKey { site: 4, ..base },
        RandomKey {
            sequence_id: -4,
            ..base
        },
        RandomKey {
            sequence_id: 4 + (1 << 40),
            ..base
        },
        RandomKey {
            position: 6,
            ..base
        },
    ];
    let mut words: Vec<[u32; 4]> = others.iter().chain([&base]).map(RandomKey::words).collect();
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), others.len() + 1);
}

/// Largest distance between the empirical distribution of `x` and `cdf`.
fn kolmogorov_smirnov(mut x: Vec<f64>, cdf: impl Fn(f64) -> f64) -> f64 {
    x.sort_by(f64::total_cmp);
    let n = x.len() as f64;
    let distances = x.iter().enumerate().map(|(i, x)| {
        let p = cdf(*x);
        (p - i as f64 / n).abs().max((p - (i + 1) as f64 / n).abs())
    });
    distances.fold(0.0, f64::max)
}

#[test]
fn normals_are_normal() {
    let n = 100_000;
    let mut x = vec![0.0; n];
    fill_normal(9, 2, 0, 0.02, &mut x);
    let x: Vec<f64> = x.iter().map(|x| f64::from(*x) / 0.02).collect();
    let distance = kolmogorov_smirnov(x.clone(), |x| {
        0.5 * (1.0 + common::erf_f64(x / 2.0_f64.sqrt()))
    });
    // 1.63 / sqrt(n) is the 1 % point.
    assert!(
        distance < 1.63 / (n as f64).sqrt(),
        "Kolmogorov-Smirnov distance {distance}"
    );
    let serial: f64 = x.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / n as f64;
    assert!(
        serial.abs() < 4.5 / (n as f64).sqrt(),
        "neighbours correlate by {serial}"
    );
}

#[test]
fn uniforms_are_uniform() {
    let n = 100_000;
    let floats: Vec<f64> = (0..n).map(|i| f64::from(uniform(3, 1, i))).collect();
    let keyed: Vec<f64> = (0..n).map(|position| key(position).uniform()).collect();
    for x in [floats, keyed] {
        assert!(x.iter().all(|x| (0.0..1.0).contains(x)));
        let distance = kolmogorov_smirnov(x, |x| x);
        assert!(
            distance < 1.63 / (n as f64).sqrt(),
            "Kolmogorov-Smirnov distance {distance}"
        );
    }
}

proptest! {
    #[test]
    fn pieces_of_a_stream_are_the_stream(cut in 0_usize..50, rest in 0_usize..50, seed in any::<u64>(), stream in any::<u64>()) {
        let mut whole = vec![0.0; 4 * cut + rest];
        fill_normal(seed, stream, 0, 1.0, &mut whole);
        let mut pieces = vec![0.0; 4 * cut + rest];
        let (first, second) = pieces.split_at_mut(4 * cut);
        fill_normal(seed, stream, 0, 1.0, first);
        fill_normal(seed, stream, 4 * cut as u64, 1.0, second);
        prop_assert_eq!(whole, pieces);
    }
}
