//! Elementary functions and activations: units in the last place against f64, bits against the scalar twin.

#![allow(clippy::float_cmp, reason = "exact results are meant")]

mod common;

use common::{
    LENGTHS, all_kernels, assert_close, assert_same_bits, erf_f64, normal, slope, ulps, widen,
};
use ingot_kernels::scalar::{elementwise as twin, math};
use ingot_kernels::{Activation, Function, Level};
use proptest::prelude::*;

/// A scalar twin.
type Scalar = fn(Level, f32) -> f32;

/// f32 values that cover every exponent of both signs, and the special ones.
fn sweep() -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
    ];
    let edges = [
        88.72, 88.73, -87.3, -87.4, -103.9, -104.1, 0.625, 0.92, 4.0, 1e-45, -1e-45,
    ];
    let step = 40_503; // odd: meets every exponent with many mantissas
    (0..=u32::MAX)
        .step_by(step)
        .map(f32::from_bits)
        .chain(special)
        .chain(edges)
        .collect()
}

fn check_function(
    function: Function,
    reference: impl Fn(f64) -> f64,
    scalar: impl Fn(Level, f32) -> f32,
) {
    let x = sweep();
    for kernels in all_kernels() {
        let mut out = vec![0.0; x.len()];
        kernels.apply(function, &x, &mut out);
        let mut worst = (0.0, 0.0);
        for (x, out) in x.iter().zip(&out) {
            let error = ulps(*out, reference(f64::from(*x)));
            if error > worst.0 {
                worst = (error, *x);
            }
        }
        assert!(
            worst.0 <= 4.0,
            "{function:?} at {}: {} ulp at {:e}",
            kernels.level(),
            worst.0,
            worst.1
        );
        let expected: Vec<f32> = x.iter().map(|x| scalar(kernels.level(), *x)).collect();
        assert_same_bits(
            &out,
            &expected,
            &format!("{function:?} at {}", kernels.level()),
        );
    }
}

#[test]
fn exp_is_within_4_ulp() {
    check_function(Function::Exp, f64::exp, math::exp);
}

#[test]
fn log_is_within_4_ulp() {
    check_function(Function::Log, f64::ln, math::log);
}

#[test]
fn tanh_is_within_4_ulp() {
    check_function(Function::Tanh, f64::tanh, math::tanh);
}

#[test]
fn erf_is_within_4_ulp() {
    check_function(Function::Erf, erf_f64, math::erf);
}

#[test]
fn the_reference_erf_is_right() {
    // Abramowitz and Stegun, table 7.1.
    for (x, value) in [
        (0.5, 0.520_499_877_8),
        (1.0, 0.842_700_792_9),
        (2.0, 0.995_322_265_0),
        (2.6, 0.999_763_965_6),
    ] {
        assert!((erf_f64(x) - value).abs() < 1e-10, "{x}");
        assert!((erf_f64(-x) + value).abs() < 1e-10, "{x}");
    }
}

const KINDS: [Activation; 4] = [
    Activation::GeluTanh,
    Activation::Gelu,
    Activation::Relu,
    Activation::Relu2,
];

fn reference(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::GeluTanh => {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf_f64(x / 2.0_f64.sqrt())),
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0).powi(2),
    }
}

#[test]
fn activations_match_f64_and_their_derivatives() {
    let x: Vec<f32> = (-1200_i16..1200)
        .map(|i| f32::from(i) / 100.0 + 0.003)
        .collect();
    let d_out = normal(1, 1.0, x.len());
    for kernels in all_kernels() {
        for kind in KINDS {
            let what = format!("{kind:?} at {}", kernels.level());
            let (mut out, mut d_x) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            kernels.activation_forward(kind, &x, &mut out);
            kernels.activation_backward(kind, &x, &d_out, &mut d_x);
            for (i, x) in x.iter().enumerate() {
                let wide = f64::from(*x);
                let expected = reference(kind, wide);
                let bound = 4e-7 * (1.0 + wide.abs()).powi(2);
                assert!(
                    (f64::from(out[i]) - expected).abs() <= bound,
                    "{what}: f({x}) = {}, not {expected}",
                    out[i]
                );
                let expected = f64::from(d_out[i]) * slope(|x| reference(kind, x), wide);
                let bound = 2e-6 * (1.0 + wide.abs());
                assert!(
                    (f64::from(d_x[i]) - expected).abs() <= bound,
                    "{what}: d_x at {x}: {}, not {expected}",
                    d_x[i]
                );
            }
        }
    }
}

#[test]
fn activations_are_finite_and_right_far_out() {
    let x = [1e30, -1e30, 50.0, -50.0, 3e38, -3e38];
    for kernels in all_kernels() {
        for kind in [Activation::GeluTanh, Activation::Gelu, Activation::Relu] {
            let (mut out, mut d_x) = ([0.0; 6], [0.0; 6]);
            kernels.activation_forward(kind, &x, &mut out);
            kernels.activation_backward(kind, &x, &[1.0; 6], &mut d_x);
            for i in 0..6 {
                let positive = x[i] > 0.0;
                assert!(
                    out[i] == if positive { x[i] } else { 0.0 },
                    "{kind:?} of {} is {}",
                    x[i],
                    out[i]
                );
                assert!(
                    d_x[i] == f32::from(positive),
                    "slope of {kind:?} at {} is {}",
                    x[i],
                    d_x[i]
                );
            }
        }
        let (mut out, nan) = ([0.0], [f32::NAN]);
        for kind in KINDS {
            kernels.activation_forward(kind, &nan, &mut out);
            assert!(out[0].is_nan(), "{kind:?} hides a NaN");
        }
    }
}

#[test]
fn swiglu_matches_f64_and_its_derivatives() {
    let n = 1003;
    let (gate, up, d_out) = (normal(2, 3.0, n), normal(3, 1.0, n), normal(4, 1.0, n));
    let silu = |g: f64| g / (1.0 + (-g).exp());
    for kernels in all_kernels() {
        let (mut out, mut d_gate, mut d_up) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        kernels.swiglu_forward(&gate, &up, &mut out);
        kernels.swiglu_backward(&gate, &up, &d_out, &mut d_gate, &mut d_up);
        let (g, u, d) = (widen(&gate), widen(&up), widen(&d_out));
        let expected: Vec<f64> = (0..n).map(|i| silu(g[i]) * u[i]).collect();
        assert_close(&out, &expected, 1e-6, 0.0, "swiglu");
        let expected: Vec<f64> = (0..n).map(|i| d[i] * u[i] * slope(silu, g[i])).collect();
        assert_close(&d_gate, &expected, 1e-6, 0.0, "swiglu d_gate");
        let expected: Vec<f64> = (0..n).map(|i| d[i] * silu(g[i])).collect();
        assert_close(&d_up, &expected, 1e-6, 0.0, "swiglu d_up");
    }
}

#[test]
fn every_length_matches_the_twin() {
    for kernels in all_kernels() {
        let level = kernels.level();
        for n in LENGTHS {
            let (x, y, z) = (normal(5, 2.0, n), normal(6, 2.0, n), normal(7, 1.0, n));
            let mut out = vec![f32::NAN; n];
            for kind in KINDS {
                let what = format!("{kind:?} at {level}, {n} elements");
                kernels.activation_forward(kind, &x, &mut out);
                let expected: Vec<f32> = x
                    .iter()
                    .map(|x| twin::activation(level, kind, *x))
                    .collect();
                assert_same_bits(&out, &expected, &what);
                kernels.activation_backward(kind, &x, &y, &mut out);
                let expected: Vec<f32> = x
                    .iter()
                    .zip(&y)
                    .map(|(x, d)| twin::activation_gradient(level, kind, *x, *d))
                    .collect();
                assert_same_bits(&out, &expected, &what);
            }
            kernels.swiglu_forward(&x, &y, &mut out);
            let expected: Vec<f32> = (0..n).map(|i| twin::swiglu(level, x[i], y[i])).collect();
            assert_same_bits(&out, &expected, "swiglu");
            let mut d_up = vec![f32::NAN; n];
            kernels.swiglu_backward(&x, &y, &z, &mut out, &mut d_up);
            let (expected, expected_up): (Vec<f32>, Vec<f32>) = (0..n)
                .map(|i| twin::swiglu_gradient(level, x[i], y[i], z[i]))
                .unzip();
            assert_same_bits(&out, &expected, "swiglu d_gate");
            assert_same_bits(&d_up, &expected_up, "swiglu d_up");
            // Sums and scaling.
            kernels.add(&x, &y, &mut out);
            let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_same_bits(&out, &sums, "add");
            out.copy_from_slice(&x);
            kernels.add_assign(&mut out, &y);
            assert_same_bits(&out, &sums, "add_assign");
            kernels.scale(&mut out, 0.3);
            let scaled: Vec<f32> = sums.iter().map(|x| x * 0.3).collect();
            assert_same_bits(&out, &scaled, "scale");
            kernels.add_scaled(&mut out, -1.5, &y);
            let expected: Vec<f32> = scaled
                .iter()
                .zip(&y)
                .map(|(x, y)| ingot_kernels::scalar::multiply_add(level, -1.5, *y, *x))
                .collect();
            assert_same_bits(&out, &expected, "add_scaled");
        }
    }
}

proptest! {
    #[test]
    fn one_bad_element_is_found(n in 1_usize..3000, at in any::<prop::sample::Index>(), kind in 0_usize..3) {
        let mut x = vec![f32::MAX; n];
        for kernels in all_kernels() {
            prop_assert!(kernels.is_finite(&x));
        }
        x[at.index(n)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
        for kernels in all_kernels() {
            prop_assert!(!kernels.is_finite(&x));
        }
    }

    #[test]
    fn functions_of_arbitrary_bits_match_the_twin(bits in prop::collection::vec(any::<u32>(), 1..70)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let mut out = vec![0.0; x.len()];
        for kernels in all_kernels() {
            let functions: [(Function, Scalar); 4] = [
                (Function::Exp, math::exp), (Function::Log, math::log), (Function::Tanh, math::tanh), (Function::Erf, math::erf),
            ];
            for (function, scalar) in functions {
                kernels.apply(function, &x, &mut out);
                let expected: Vec<f32> = x.iter().map(|x| scalar(kernels.level(), *x)).collect();
                assert_same_bits(&out, &expected, "arbitrary bits");
            }
        }
    }
}

#[test]
fn nothing_is_finite_too() {
    for kernels in all_kernels() {
        assert!(kernels.is_finite(&[]));
    }
}
