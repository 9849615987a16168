//! The optimizer as Python sees it.

use std::sync::Mutex;

use ingot_model::{EpsMode, Optimizer, OptimizerOptions, Parameter, ParameterGroup};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{LentBuffer, views};
use crate::enter::{enter, lock};
use crate::errors::NativeError;
use crate::model::NativeModel;

/// See `ingot.models.base.Optimizer`.
#[pyclass(frozen, module = "ingot._native", name = "Optimizer")]
pub struct NativeOptimizer {
    optimizer: Mutex<Optimizer>,
    table: Vec<Parameter>,
    first_moments: LentBuffer,
    second_moments: LentBuffer,
}

#[pymethods]
impl NativeOptimizer {
    /// `groups` are (names, factor of the learning rate, weight decay); without `muon_momentum` all is `AdamW`.
    #[new]
    #[pyo3(signature = (model, *, groups, betas, eps, eps_mode, muon_momentum, adapter))]
    fn new(
        py: Python<'_>,
        model: &NativeModel,
        groups: Vec<(Vec<String>, f64, f64)>,
        betas: (f64, f64),
        eps: f64,
        eps_mode: &str,
        muon_momentum: Option<f64>,
        adapter: Option<usize>,
    ) -> PyResult<Self> {
        let eps_mode = match eps_mode {
            "torch" => EpsMode::Torch,
            "tf" => EpsMode::Tf,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "eps_mode is {eps_mode:?}; there are \"torch\" and \"tf\""
                )));
            }
        };
        let groups: Vec<ParameterGroup> = groups
            .into_iter()
            .map(
                |(names, learning_rate_scale, weight_decay)| ParameterGroup {
                    names,
                    learning_rate_scale,
                    weight_decay,
                },
            )
            .collect();
        let options = OptimizerOptions {
            betas,
            eps,
            eps_mode,
            muon_momentum,
        };
        let (mut optimizer, table) = model.with(py, |model| -> Result<_, NativeError> {
            let optimizer = Optimizer::of(model, adapter, &groups, options)?;
            Ok((optimizer, model.table_of(adapter)?.to_vec()))
        })?;
        let (first, second) = optimizer.moments_mut();
        Ok(Self {
            first_moments: LentBuffer::of(first),
            second_moments: LentBuffer::of(second),
            optimizer: Mutex::new(optimizer),
            table,
        })
    }

    /// Norm of the gradients before clipping, and whether the step was skipped.
    #[pyo3(signature = (model, *, lr, clip_norm))]
    fn step(
        &self,
        py: Python<'_>,
        model: &NativeModel,
        lr: f64,
        clip_norm: Option<f64>,
    ) -> PyResult<(f64, bool)> {
        let info = model.with(py, |model| -> Result<_, NativeError> {
            Ok(lock(&self.optimizer, "optimizer")?.step(model, lr, clip_norm)?)
        })?;
        Ok((info.grad_norm, info.skipped))
    }

    /// Writable views of the first and the second moments by name.
    fn moments<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyDict>, Bound<'py, PyDict>)> {
        let this = slf.get();
        Ok((
            views(slf, &this.table, this.first_moments)?,
            views(slf, &this.table, this.second_moments)?,
        ))
    }

    #[getter]
    fn steps_taken(&self, py: Python<'_>) -> PyResult<u64> {
        enter(py, || {
            Ok::<_, NativeError>(lock(&self.optimizer, "optimizer")?.steps_taken())
        })
    }

    fn set_steps_taken(&self, py: Python<'_>, steps: u64) -> PyResult<()> {
        enter(py, || {
            lock(&self.optimizer, "optimizer")?.set_steps_taken(steps);
            Ok::<_, NativeError>(())
        })
    }
}
