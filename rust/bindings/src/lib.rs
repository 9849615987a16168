//! The extension module `ingot._native`: the only crate that knows Python.
//!
//! Every call takes one way: borrow the arrays ([`arrays`]), release the interpreter, run, map the error ([`enter`],
//! [`errors`]). Classes are frozen; what changes inside them is locked, and a second thread gets an error instead of
//! waiting.

#![allow(
    clippy::needless_pass_by_value,
    reason = "what Python passes arrives owned"
)]

use pyo3::prelude::*;

mod arrays;
mod decoder;
mod enter;
mod errors;
mod machine;
mod model;
mod optimizer;
mod tokenizer;

// `gil_used`: nothing here was tested under a Python without the lock.
#[pymodule(gil_used = true)]
mod _native {
    #[pymodule_export]
    use super::decoder::NativeDecoder;
    #[pymodule_export]
    use super::machine::{build_info, measured_peak};
    #[pymodule_export]
    use super::model::{NativeContext, NativeModel};
    #[pymodule_export]
    use super::optimizer::NativeOptimizer;
    #[pymodule_export]
    use super::tokenizer::{NativeTokenizer, NativeTrainer};
}
