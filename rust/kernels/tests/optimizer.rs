//! `AdamW` and the norm against f64 references and the scalar twins.

mod common;

use common::{all_kernels, assert_close, assert_same_bits, normal, widen};
use ingot_kernels::scalar::adamw as twin;
use ingot_kernels::{AdamGroup, AdamSettings, EpsMode, Pool};

struct State {
    p: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

fn state(n: usize) -> State {
    State {
        p: normal(1, 1.0, n),
        m: vec![0.0; n],
        v: vec![0.0; n],
    }
}

fn gradient(step: u64, n: usize) -> Vec<f32> {
    normal(100 + step, 0.1, n)
}

fn settings(step: u64, eps_mode: EpsMode) -> AdamSettings {
    AdamSettings {
        step,
        betas: (0.9, 0.95),
        eps: 1e-5,
        eps_mode,
        gradient_scale: 0.5,
    }
}

fn groups(n: usize) -> Vec<AdamGroup> {
    let group = |range, learning_rate, weight_decay| AdamGroup {
        range,
        learning_rate,
        weight_decay,
    };
    // A gap between the groups, and elements behind the last one.
    vec![
        group(0..n / 3, 1e-2, 0.1),
        group(n / 3 + 2..n - 1, 3e-3, 0.0),
    ]
}

/// The update as the papers write it, in f64.
fn reference(
    p: &mut [f64],
    m: &mut [f64],
    v: &mut [f64],
    g: &[f32],
    groups: &[AdamGroup],
    s: &AdamSettings,
) {
    let (b1, b2) = s.betas;
    let t = s.step as i32;
    for group in groups {
        for i in group.range.clone() {
            let g = f64::from(g[i]) * f64::from(s.gradient_scale);
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            p[i] -= group.learning_rate * group.weight_decay * p[i];
            p[i] -= match s.eps_mode {
                EpsMode::Torch => {
                    let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                    group.learning_rate * m_hat / (v_hat.sqrt() + s.eps)
                }
                EpsMode::Tf => {
                    let rate = group.learning_rate * (1.0 - b2.powi(t)).sqrt() / (1.0 - b1.powi(t));
                    rate * m[i] / (v[i].sqrt() + s.eps)
                }
            };
        }
    }
}

#[test]
fn twenty_steps_match_f64_and_the_twin() {
    let n = 70_001;
    let pool = Pool::new(2);
    for kernels in all_kernels() {
        for eps_mode in [EpsMode::Torch, EpsMode::Tf] {
            let (mut ours, mut scalar) = (state(n), state(n));
            let (mut p, mut m, mut v) = (widen(&ours.p), vec![0.0; n], vec![0.0; n]);
            for step in 1..=20 {
                let (g, groups, settings) =
                    (gradient(step, n), groups(n), settings(step, eps_mode));
                kernels.adamw(
                    &pool,
                    &mut ours.p,
                    &g,
                    &mut ours.m,
                    &mut ours.v,
                    &groups,
                    &settings,
                );
                twin::adamw(
                    kernels.level(),
                    &mut scalar.p,
                    &g,
                    &mut scalar.m,
                    &mut scalar.v,
                    &groups,
                    &settings,
                );
                reference(&mut p, &mut m, &mut v, &g, &groups, &settings);
            }
            assert_same_bits(&ours.p, &scalar.p, "parameters");
            assert_same_bits(&ours.m, &scalar.m, "first moment");
            assert_same_bits(&ours.v, &scalar.v, "second moment");
            assert_close(&ours.p, &p, 1e-6, 0.0, "parameters");
            assert_close(&ours.m, &m, 1e-6, 0.0, "first moment");
            assert_close(&ours.v, &v, 1e-6, 0.0, "second moment");
            let untouched = normal(1, 1.0, n);
            for i in [n / 3, n / 3 + 1, n - 1] {
                assert_eq!(
                    (ours.p[i], ours.m[i], ours.v[i]),
                    (untouched[i], 0.0, 0.0),
                    "element {i} is in no group"
                );
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let n = 300_007;
    for kernels in all_kernels() {
        let mut results = Vec::new();
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            let mut s = state(n);
            let g = gradient(1, n);
            kernels.adamw(
                &pool,
                &mut s.p,
                &g,
                &mut s.m,
                &mut s.v,
                &groups(n),
                &settings(1, EpsMode::Torch),
            );
            results.push((s.p, s.m, s.v, kernels.norm_squared_f64(&pool, &g).to_bits()));
        }
        assert!(
            results.windows(2).all(|pair| pair[0] == pair[1]),
            "at {}",
            kernels.level()
        );
    }
}

#[test]
fn overlapping_groups_are_refused() {
    let pool = Pool::new(1);
    let group = |range| AdamGroup {
        range,
        learning_rate: 1.0,
        weight_decay: 0.0,
    };
    for groups in [
        vec![group(0..5), group(4..8)],
        vec![group(0..11)],
        vec![group(5..8), group(0..5)],
    ] {
        let call = || {
            let mut s = state(10);
            let settings = settings(1, EpsMode::Torch);
            all_kernels()[0].adamw(
                &pool, &mut s.p, &[0.0; 10], &mut s.m, &mut s.v, &groups, &settings,
            );
        };
        assert!(
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err(),
            "{groups:?}"
        );
    }
}

#[test]
fn the_norm_is_exact_to_f64_and_has_its_twins_bits() {
    let pool = Pool::new(2);
    for n in [
        0, 1, 15, 16, 17, 31, 32, 33, 48, 50, 65_535, 65_536, 65_553, 200_000,
    ] {
        let x = normal(3, 2.0, n);
        let plain: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        for kernels in all_kernels() {
            let norm = kernels.norm_squared_f64(&pool, &x);
            assert!(
                (norm - plain).abs() <= 1e-13 * plain,
                "{n}: {norm} is not {plain}"
            );
            assert_eq!(
                norm.to_bits(),
                twin::norm_squared_f64(&x).to_bits(),
                "{n} at {}",
                kernels.level()
            );
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = normal(4, 1.0, 70_000);
        x[66_000] = bad;
        for kernels in all_kernels() {
            assert!(!kernels.norm_squared_f64(&pool, &x).is_finite());
        }
    }
}
