//! Normalisations and rotary embedding against f64, finite differences and the scalar twins.

#![allow(clippy::float_cmp, reason = "exact results are meant")]

mod common;

use common::{
    LENGTHS, all_kernels, assert_close, assert_same_bits, normal, numerical_gradient, widen,
};
use ingot_kernels::scalar::{norm as twin, rotary as rotary_twin};

const EPS: f32 = 1e-5;

fn layer_norm(x: &[f64], gain: &[f64], bias: &[f64]) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
    (0..x.len())
        .map(|i| (x[i] - mean) * rstd * gain[i] + bias[i])
        .collect()
}

fn rms_norm(x: &[f64], gain: &[f64]) -> Vec<f64> {
    let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let rstd = 1.0 / (square + f64::from(EPS)).sqrt();
    (0..x.len()).map(|i| x[i] * rstd * gain[i]).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

struct Row {
    x: Vec<f32>,
    gain: Vec<f32>,
    bias: Vec<f32>,
    d_out: Vec<f32>,
    start: Vec<f32>,
}

fn row(n: usize) -> Row {
    let shifted = |stream, by: f32| normal(stream, 1.0, n).iter().map(|x| x + by).collect();
    Row {
        x: shifted(1, 0.7),
        gain: shifted(2, 1.0),
        bias: normal(3, 1.0, n),
        d_out: normal(4, 1.0, n),
        start: normal(5, 1.0, n),
    }
}

#[test]
fn layer_norm_matches_f64_and_finite_differences() {
    for kernels in all_kernels() {
        for n in [2, 5, 16, 33, 65, 200] {
            let Row {
                x,
                gain,
                bias,
                d_out,
                start,
            } = row(n);
            let (wx, wg, wb, wd) = (widen(&x), widen(&gain), widen(&bias), widen(&d_out));
            let mut out = vec![0.0; n];
            let (mean, rstd) = kernels.layer_norm_forward(&x, &gain, Some(&bias), EPS, &mut out);
            assert_close(&out, &layer_norm(&wx, &wg, &wb), 2e-6, 0.0, "layer norm");
            let (mut d_x, mut d_gain, mut d_bias) = (start.clone(), start.clone(), start.clone());
            kernels.layer_norm_backward(
                &x,
                &gain,
                mean,
                rstd,
                &d_out,
                &mut d_x,
                &mut d_gain,
                Some(&mut d_bias),
            );
            let added = |gradient: Vec<f64>| -> Vec<f64> {
                gradient
                    .iter()
                    .zip(&start)
                    .map(|(g, s)| g + f64::from(*s))
                    .collect()
            };
            let expected = numerical_gradient(&wx, |x| dot(&layer_norm(x, &wg, &wb), &wd));
            assert_close(&d_x, &added(expected), 1e-5, 1e-5, "layer norm d_x");
            let expected = numerical_gradient(&wg, |g| dot(&layer_norm(&wx, g, &wb), &wd));
            assert_close(&d_gain, &added(expected), 1e-5, 0.0, "layer norm d_gain");
            assert_close(&d_bias, &added(wd), 1e-6, 0.0, "layer norm d_bias");
        }
    }
}

#[test]
fn rms_norm_matches_f64_and_finite_differences() {
    for kernels in all_kernels() {
        for n in [1, 5, 16, 33, 65, 200] {
            let Row {
                x,
                gain,
                d_out,
                start,
                ..
            } = row(n);
            let (wx, wg, wd) = (widen(&x), widen(&gain), widen(&d_out));
            let mut out = vec![0.0; n];
            let rstd = kernels.rms_norm_forward(&x, &gain, EPS, &mut out);
            assert_close(&out, &rms_norm(&wx, &wg), 2e-6, 0.0, "rms norm");
            let (mut d_x, mut d_gain) = (start.clone(), start.clone());
            kernels.rms_norm_backward(&x, &gain, rstd, &d_out, &mut d_x, &mut d_gain);
            let added = |gradient: Vec<f64>| -> Vec<f64> {
                gradient
                    .iter()
                    .zip(&start)
                    .map(|(g, s)| g + f64::from(*s))
                    .collect()
            };
            let expected = numerical_gradient(&wx, |x| dot(&rms_norm(x, &wg), &wd));
            assert_close(&d_x, &added(expected), 1e-5, 1e-5, "rms norm d_x");
            let expected = numerical_gradient(&wg, |g| dot(&rms_norm(&wx, g), &wd));
            assert_close(&d_gain, &added(expected), 1e-5, 0.0, "rms norm d_gain");
        }
    }
}

#[test]
fn norms_match_their_twins_at_every_length() {
    for kernels in all_kernels() {
        let level = kernels.level();
        for n in LENGTHS {
            let Row {
                x,
                gain,
                bias,
                d_out,
                start,
            } = row(n);
            for bias in [None, Some(&bias[..])] {
                let (mut out, mut expected) = (vec![0.0; n], vec![0.0; n]);
                let statistics = kernels.layer_norm_forward(&x, &gain, bias, EPS, &mut out);
                let twin_statistics =
                    twin::layer_norm_forward(level, &x, &gain, bias, EPS, &mut expected);
                assert_eq!(statistics, twin_statistics, "layer norm at {level}, {n}");
                assert_same_bits(&out, &expected, &format!("layer norm at {level}, {n}"));
            }
            let (mean, rstd) = (0.1, 0.9);
            let [mut d_x, mut d_gain, mut twin_x, mut twin_gain] = [(); 4].map(|()| start.clone());
            kernels.layer_norm_backward(&x, &gain, mean, rstd, &d_out, &mut d_x, &mut d_gain, None);
            twin::layer_norm_backward(
                level,
                &x,
                &gain,
                mean,
                rstd,
                &d_out,
                &mut twin_x,
                &mut twin_gain,
            );
            assert_same_bits(&d_x, &twin_x, &format!("layer norm d_x at {level}, {n}"));
            assert_same_bits(
                &d_gain,
                &twin_gain,
                &format!("layer norm d_gain at {level}, {n}"),
            );

            let (mut out, mut expected) = (vec![0.0; n], vec![0.0; n]);
            let rstd = kernels.rms_norm_forward(&x, &gain, EPS, &mut out);
            assert_eq!(
                rstd,
                twin::rms_norm_forward(level, &x, &gain, EPS, &mut expected)
            );
            assert_same_bits(&out, &expected, &format!("rms norm at {level}, {n}"));
            let [mut d_x, mut d_gain, mut twin_x, mut twin_gain] = [(); 4].map(|()| start.clone());
            kernels.rms_norm_backward(&x, &gain, rstd, &d_out, &mut d_x, &mut d_gain);
            twin::rms_norm_backward(level, &x, &gain, rstd, &d_out, &mut twin_x, &mut twin_gain);
            assert_same_bits(&d_x, &twin_x, &format!("rms norm d_x at {level}, {n}"));
            assert_same_bits(
                &d_gain,
                &twin_gain,
                &format!("rms norm d_gain at {level}, {n}"),
            );
        }
    }
}

#[test]
fn rotary_rotates_pairs_and_back() {
    for kernels in all_kernels() {
        let level = kernels.level();
        for half in [1, 3, 16, 17, 32, 40] {
            let angles = normal(8, 2.0, half);
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles
                .iter()
                .map(|a| (f64::from(*a).sin() as f32, f64::from(*a).cos() as f32))
                .unzip();
            // Three elements beyond the rotated part must stay.
            let x = normal(9, 1.0, 2 * half + 3);
            let mut turned = x.clone();
            kernels.rotary(&mut turned, &cos, &sin, false);
            let mut expected = x.clone();
            rotary_twin::rotary(level, &mut expected, &cos, &sin, false);
            assert_same_bits(&turned, &expected, "rotary");
            let mut wide = widen(&x);
            for i in 0..half {
                let (s, c) = f64::from(angles[i]).sin_cos();
                let (a, b) = (f64::from(x[i]), f64::from(x[half + i]));
                wide[i] = a * c - b * s;
                wide[half + i] = b * c + a * s;
            }
            assert_close(&turned, &wide, 1e-6, 0.0, "rotary");
            kernels.rotary(&mut turned, &cos, &sin, true);
            assert_close(&turned, &widen(&x), 1e-6, 0.0, "rotary back");
        }
    }
}
