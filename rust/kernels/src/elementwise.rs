//! Elementwise kernels on rows and slices: sums, scaling, activations and their gradients.
//!
//! One element's arithmetic does not depend on its place, so callers may cut rows and tensors as they like.

use crate::Kernels;
use crate::math::{erf, exp, log, sigmoid, tanh};
use crate::simd::{LANES, Simd, dispatch};

/// Activation function of a plain (ungated) MLP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's form (Hendrycks and Gimpel 2016).
    GeluTanh,
    /// x Phi(x) with the error function (Hendrycks and Gimpel 2016).
    Gelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)^2 (So et al. 2021, "Primer").
    Relu2,
}

/// An elementary function, within 4 units in the last place over the whole f32 range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Function {
    /// e^x.
    Exp,
    /// Natural logarithm: -inf at zero, NaN below.
    Log,
    /// Hyperbolic tangent.
    Tanh,
    /// Error function.
    Erf,
}

/// 2 sqrt(2/pi): the tanh form is x sigmoid(2u).
pub(crate) const GELU_TWICE_SCALE: f32 = 1.595_769;
/// Coefficient of the cube in the tanh form.
pub(crate) const GELU_CUBE: f32 = 0.044_715;
/// Beyond this the derivative of both GELU forms is 0 or 1 in f32; clamping keeps its factors finite.
pub(crate) const GELU_SATURATED: f32 = 15.0;
/// sqrt(1/2).
pub(crate) const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1 / sqrt(2 pi).
pub(crate) const NORMAL_PEAK: f32 = 0.398_942_3;

/// A function of one vector, as a type so that it is inlined into the loop that has the target features.
trait Unary: Copy {
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F;
}

/// A function of two vectors.
trait Binary: Copy {
    fn apply<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F;
}

#[inline(always)]
fn map<S: Simd, T: Unary>(s: S, f: T, x: &[f32], out: &mut [f32]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in x.iter().zip(out) {
        s.store(f.apply(s, s.load(x)), out);
    }
    if !x_tail.is_empty() {
        s.store_partial(f.apply(s, s.load_partial(x_tail)), out_tail);
    }
}

#[inline(always)]
fn map_in_place<S: Simd, T: Unary>(s: S, f: T, x: &mut [f32]) {
    let (x, tail) = x.as_chunks_mut::<LANES>();
    for x in x {
        s.store(f.apply(s, s.load(x)), x);
    }
    if !tail.is_empty() {
        s.store_partial(f.apply(s, s.load_partial(tail)), tail);
    }
}

#[inline(always)]
fn map_two<S: Simd, T: Binary>(s: S, f: T, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        s.store(f.apply(s, s.load(a), s.load(b)), out);
    }
    if !a_tail.is_empty() {
        s.store_partial(
            f.apply(s, s.load_partial(a_tail), s.load_partial(b_tail)),
            out_tail,
        );
    }
}

/// `y = f(y, x)`.
#[inline(always)]
fn combine<S: Simd, T: Binary>(s: S, f: T, y: &mut [f32], x: &[f32]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (y, y_tail) = y.as_chunks_mut::<LANES>();
    for (x, y) in x.iter().zip(y) {
        s.store(f.apply(s, s.load(y), s.load(x)), y);
    }
    if !x_tail.is_empty() {
        s.store_partial(
            f.apply(s, s.load_partial(y_tail), s.load_partial(x_tail)),
            y_tail,
        );
    }
}

#[derive(Clone, Copy)]
struct Add;
impl Binary for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F {
        s.add(a, b)
    }
}

/// `a + factor * b`.
#[derive(Clone, Copy)]
struct AddScaled(f32);
impl Binary for AddScaled {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F {
        s.fma(s.splat(self.0), b, a)
    }
}

#[derive(Clone, Copy)]
struct Scale(f32);
impl Unary for Scale {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.mul(x, s.splat(self.0))
    }
}

macro_rules! unary {
    ($name:ident, $function:ident) => {
        #[derive(Clone, Copy)]
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
                $function(s, x)
            }
        }
    };
}
unary!(Exp, exp);
unary!(Log, log);
unary!(Tanh, tanh);
unary!(Erf, erf);

#[inline(always)]
fn apply<S: Simd>(s: S, function: Function, x: &[f32], out: &mut [f32]) {
    match function {
        Function::Exp => map(s, Exp, x, out),
        Function::Log => map(s, Log, x, out),
        Function::Tanh => map(s, Tanh, x, out),
        Function::Erf => map(s, Erf, x, out),
    }
}

/// sigmoid(2u) of the tanh form of GELU.
#[inline(always)]
fn gelu_gate<S: Simd>(s: S, x: S::F) -> S::F {
    let cubic = s.fma(s.mul(s.splat(GELU_CUBE), s.mul(x, x)), x, x);
    sigmoid(s, s.mul(s.splat(GELU_TWICE_SCALE), cubic))
}

/// x limited to where the derivatives of GELU are not yet 0 or 1; NaN passes.
#[inline(always)]
fn clamp_saturated<S: Simd>(s: S, x: S::F) -> S::F {
    s.min(s.splat(GELU_SATURATED), s.max(s.splat(-GELU_SATURATED), x))
}

#[derive(Clone, Copy)]
struct GeluTanh;
impl Unary for GeluTanh {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.mul(x, gelu_gate(s, x))
    }
}
impl Binary for GeluTanh {
    /// `d_x = d_out (g + x g (1-g) d(2u)/dx)`, `g = sigmoid(2u)`.
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, d_out: S::F) -> S::F {
        let x = clamp_saturated(s, x);
        let one = s.splat(1.0);
        let gate = gelu_gate(s, x);
        let slope = s.fma(s.mul(s.splat(3.0 * GELU_CUBE), x), x, one);
        let slope = s.mul(s.mul(s.splat(GELU_TWICE_SCALE), slope), x);
        s.mul(d_out, s.fma(s.mul(gate, s.sub(one, gate)), slope, gate))
    }
}

/// Phi(x), the normal distribution function.
#[inline(always)]
fn normal_cdf<S: Simd>(s: S, x: S::F) -> S::F {
    let half = s.splat(0.5);
    s.fma(half, erf(s, s.mul(x, s.splat(SQRT_HALF))), half)
}

#[derive(Clone, Copy)]
struct Gelu;
impl Unary for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.mul(x, normal_cdf(s, x))
    }
}
impl Binary for Gelu {
    /// `d_x = d_out (Phi(x) + x phi(x))`.
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, d_out: S::F) -> S::F {
        let x = clamp_saturated(s, x);
        let density = s.mul(
            s.splat(NORMAL_PEAK),
            exp(s, s.mul(s.mul(s.splat(-0.5), x), x)),
        );
        s.mul(d_out, s.fma(x, density, normal_cdf(s, x)))
    }
}

#[derive(Clone, Copy)]
struct Relu;
impl Unary for Relu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.max(s.zero(), x)
    }
}
impl Binary for Relu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, d_out: S::F) -> S::F {
        s.select(s.less(s.zero(), x), d_out, s.zero())
    }
}

#[derive(Clone, Copy)]
struct Relu2;
impl Unary for Relu2 {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        let positive = s.max(s.zero(), x);
        s.mul(positive, positive)
    }
}
impl Binary for Relu2 {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, d_out: S::F) -> S::F {
        let positive = s.max(s.zero(), x);
        s.mul(d_out, s.add(positive, positive))
    }
}

/// silu(gate) * up.
#[derive(Clone, Copy)]
struct Swiglu;
impl Binary for Swiglu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        s.mul(s.mul(gate, sigmoid(s, gate)), up)
    }
}

#[inline(always)]
fn add_assign<S: Simd>(s: S, y: &mut [f32], x: &[f32]) {
    combine(s, Add, y, x);
}

#[inline(always)]
fn add<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    map_two(s, Add, a, b, out);
}

#[inline(always)]
fn add_scaled<S: Simd>(s: S, y: &mut [f32], factor: f32, x: &[f32]) {
    combine(s, AddScaled(factor), y, x);
}

#[inline(always)]
fn scale<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    map_in_place(s, Scale(factor), x);
}

#[inline(always)]
fn is_finite<S: Simd>(s: S, x: &[f32]) -> bool {
    // x - x is 0 for finite x and NaN otherwise; NaN stays in the sum. Blocks let a bad value end the scan early.
    const BLOCK: usize = 64 * LANES;
    for block in x.chunks(BLOCK) {
        let (chunks, tail) = block.as_chunks::<LANES>();
        let mut sum = s.zero();
        for chunk in chunks {
            let x = s.load(chunk);
            sum = s.add(sum, s.sub(x, x));
        }
        let x = s.load_partial(tail);
        sum = s.add(sum, s.sub(x, x));
        if !s.all(s.equal(sum, s.zero())) {
            return false;
        }
    }
    true
}

#[inline(always)]
fn activation_forward<S: Simd>(s: S, kind: Activation, x: &[f32], out: &mut [f32]) {
    match kind {
        Activation::GeluTanh => map(s, GeluTanh, x, out),
        Activation::Gelu => map(s, Gelu, x, out),
        Activation::Relu => map(s, Relu, x, out),
        Activation::Relu2 => map(s, Relu2, x, out),
    }
}

#[inline(always)]
fn activation_backward<S: Simd>(s: S, kind: Activation, x: &[f32], d_out: &[f32], d_x: &mut [f32]) {
    match kind {
        Activation::GeluTanh => map_two(s, GeluTanh, x, d_out, d_x),
        Activation::Gelu => map_two(s, Gelu, x, d_out, d_x),
        Activation::Relu => map_two(s, Relu, x, d_out, d_x),
        Activation::Relu2 => map_two(s, Relu2, x, d_out, d_x),
    }
}

#[inline(always)]
fn swiglu_forward<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    map_two(s, Swiglu, gate, up, out);
}

/// The gradients of one vector of silu(gate) * up with respect to gate and up.
#[inline(always)]
fn swiglu_gradient<S: Simd>(s: S, gate: S::F, up: S::F, d_out: S::F) -> (S::F, S::F) {
    let one = s.splat(1.0);
    let sigma = sigmoid(s, gate);
    let silu = s.mul(gate, sigma);
    // silu' = sigma (1 + gate (1 - sigma)) = sigma + silu (1 - sigma).
    let slope = s.fma(silu, s.sub(one, sigma), sigma);
    (s.mul(s.mul(d_out, up), slope), s.mul(d_out, silu))
}

#[inline(always)]
fn swiglu_backward<S: Simd>(
    s: S,
    gate: &[f32],
    up: &[f32],
    d_out: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
) {
    let (gate, gate_tail) = gate.as_chunks::<LANES>();
    let (up, up_tail) = up.as_chunks::<LANES>();
    let (d_out, d_out_tail) = d_out.as_chunks::<LANES>();
    let (d_gate, d_gate_tail) = d_gate.as_chunks_mut::<LANES>();
    let (d_up, d_up_tail) = d_up.as_chunks_mut::<LANES>();
    for ((((gate, up), d_out), d_gate), d_up) in
        gate.iter().zip(up).zip(d_out).zip(d_gate).zip(d_up)
    {
        let (g, u) = swiglu_gradient(s, s.load(gate), s.load(up), s.load(d_out));
        s.store(g, d_gate);
        s.store(u, d_up);
    }
    if !gate_tail.is_empty() {
        let (gate, up, d_out) = (
            s.load_partial(gate_tail),
            s.load_partial(up_tail),
            s.load_partial(d_out_tail),
        );
        let (g, u) = swiglu_gradient(s, gate, up, d_out);
        s.store_partial(g, d_gate_tail);
        s.store_partial(u, d_up_tail);
    }
}

/// All methods of this block panic if their slices differ in length.
#[allow(clippy::missing_panics_doc, reason = "stated once for the block")]
impl Kernels {
    /// y += x.
    pub fn add_assign(&self, y: &mut [f32], x: &[f32]) {
        assert_eq!(y.len(), x.len(), "add_assign: lengths differ");
        dispatch!(*self, add_assign(y: &mut [f32], x: &[f32]));
    }

    /// out = a + b.
    pub fn add(&self, a: &[f32], b: &[f32], out: &mut [f32]) {
        assert!(
            a.len() == out.len() && b.len() == out.len(),
            "add: lengths differ"
        );
        dispatch!(*self, add(a: &[f32], b: &[f32], out: &mut [f32]));
    }

    /// y += factor * x.
    pub fn add_scaled(&self, y: &mut [f32], factor: f32, x: &[f32]) {
        assert_eq!(y.len(), x.len(), "add_scaled: lengths differ");
        dispatch!(*self, add_scaled(y: &mut [f32], factor: f32, x: &[f32]));
    }

    /// x *= factor.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        dispatch!(*self, scale(x: &mut [f32], factor: f32));
    }

    /// Whether no element is NaN or infinite.
    pub fn is_finite(&self, x: &[f32]) -> bool {
        dispatch!(*self, is_finite(x: &[f32]) -> bool)
    }

    /// out = function(x), elementwise.
    pub fn apply(&self, function: Function, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "apply: lengths differ");
        dispatch!(*self, apply(function: Function, x: &[f32], out: &mut [f32]));
    }

    /// out = f(x), elementwise.
    pub fn activation_forward(&self, kind: Activation, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "activation_forward: lengths differ");
        dispatch!(*self, activation_forward(kind: Activation, x: &[f32], out: &mut [f32]));
    }

    /// `d_x = d_out * f'(x)`, elementwise; `d_x` is overwritten. The derivative of relu at 0 is 0.
    pub fn activation_backward(&self, kind: Activation, x: &[f32], d_out: &[f32], d_x: &mut [f32]) {
        assert!(
            x.len() == d_x.len() && d_out.len() == d_x.len(),
            "activation_backward: lengths differ"
        );
        dispatch!(*self, activation_backward(kind: Activation, x: &[f32], d_out: &[f32], d_x: &mut [f32]));
    }

    /// out = silu(gate) * up with silu(g) = g sigmoid(g) (Shazeer 2020, "GLU variants improve transformer").
    pub fn swiglu_forward(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == out.len() && up.len() == out.len(),
            "swiglu_forward: lengths differ"
        );
        dispatch!(*self, swiglu_forward(gate: &[f32], up: &[f32], out: &mut [f32]));
    }

    /// Gradients of [`Kernels::swiglu_forward`] with respect to gate and up; both are overwritten.
    pub fn swiglu_backward(
        &self,
        gate: &[f32],
        up: &[f32],
        d_out: &[f32],
        d_gate: &mut [f32],
        d_up: &mut [f32],
    ) {
        let n = gate.len();
        assert!(
            up.len() == n && d_out.len() == n && d_gate.len() == n && d_up.len() == n,
            "swiglu_backward: lengths differ"
        );
        dispatch!(
            *self,
            swiglu_backward(gate: &[f32], up: &[f32], d_out: &[f32], d_gate: &mut [f32], d_up: &mut [f32])
        );
    }
}
