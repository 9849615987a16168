//! Scalar twins of the kernels: the same results written as plain loops, for tests to compare with.

pub mod gemm;
