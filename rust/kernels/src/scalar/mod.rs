//! Scalar twins of the kernels: the same results written as plain loops, for tests to compare with.
//!
//! A twin has its kernel's order of operations and its level's rounding, so the two agree bit for bit.

pub mod adamw;
pub mod attention;
pub mod elementwise;
pub mod gemm;
pub mod head;
pub mod math;
pub mod norm;
pub mod random;
pub mod reduce;
pub mod rotary;

pub use gemm::multiply_add;
