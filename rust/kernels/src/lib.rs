//! Numeric kernels for training transformers on a CPU: the only place of the project with SIMD and raw memory.
//!
//! * [`Level`] and [`Kernels`]: which instruction set is used, chosen at run time. Every kernel is a method of
//!   [`Kernels`], safe to call; lengths and shapes are asserted.
//! * [`Pool`]: persistent threads that share out work items. Items are cut by shape alone, so results do not depend on
//!   the number of threads.
//! * [`Buffer`] and [`ArenaPool`]: aligned memory that is kept between steps.
//! * [`Mat`] and [`MatMut`]: row-major matrix views with a row stride.
//!
//! # One arithmetic
//! The bits of one output element depend on its own inputs and on the level's rounding, never on its neighbours, its
//! place in the matrix, or the threads. [`Level::Avx2`] and [`Level::Avx512`] give the same bits.

pub mod adamw;
pub mod arena;
pub mod attention;
pub mod elementwise;
pub mod gemm;
pub mod head;
pub mod level;
pub mod mat;
mod math;
pub mod norm;
pub mod peak;
pub mod pool;
pub mod random;
mod reduce;
pub mod rotary;
pub mod scalar;
mod simd;

pub use adamw::{AdamGroup, AdamSettings, EpsMode};
pub use arena::{ArenaPool, Buffer, Lease};
pub use attention::{AttentionDropout, AttentionShape, PAGE_POSITIONS, PagedSequence};
pub use elementwise::{Activation, Function};
pub use head::{RowGradients, RowStatistics};
pub use level::{Kernels, Level};
pub use mat::{Mat, MatMut};
pub use peak::{MeasuredPeak, measured_peak};
pub use pool::Pool;
pub use random::{DropoutKey, RandomKey};
