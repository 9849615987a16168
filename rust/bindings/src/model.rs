//! The model as Python sees it: one crossing per stage of a step, flat arrays in and out.

use std::sync::{Arc, Mutex, OnceLock};

use ingot_kernels::Buffer;
use ingot_model::{
    AdapterOptions, Batch, Candidates, Config, Context, ForwardOptions, Model, Options,
    OutputGradients, Outputs, Parameter, Want,
};
use numpy::{IntoPyArray, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{
    LentBuffer, Size, borrow, borrow_optional, elements, optional_elements, views,
};
use crate::enter::{enter, lock};
use crate::errors::{NativeError, own_class};
use crate::machine::{level, thread_count};

/// See `ingot.models.base.Model`.
#[pyclass(frozen, module = "ingot._native", name = "Model")]
pub struct NativeModel {
    model: Mutex<Model>,
    table: Vec<Parameter>,
    hidden_size: usize,
    num_values: usize,
    level: &'static str,
    threads: usize,
    /// One handle here, and one in each [`ParameterViews`] that lives.
    lent: Arc<()>,
    /// Filled when the gradients are first made.
    gradients: OnceLock<LentBuffer>,
}

/// What views of the parameters keep alive.
#[pyclass(frozen, module = "ingot._native")]
pub struct ParameterViews {
    _model: Py<NativeModel>,
    _hold: Hold,
}

/// How the memory behind views of the parameters is kept in place.
enum Hold {
    /// The buffer is the model's alone as long as this lives: nobody shares it, so no write has to move it.
    Lent(#[allow(dead_code, reason = "counted")] Arc<()>),
    /// A handle of the buffer: a write to the model meanwhile takes a copy and leaves it as it is.
    Shared(#[allow(dead_code, reason = "kept alive")] Arc<Buffer>),
}

/// See `ingot.models.base.Context`.
#[pyclass(frozen, module = "ingot._native", name = "Context")]
pub struct NativeContext {
    context: Mutex<Context>,
}

#[pymethods]
impl NativeContext {
    /// Whether backward was called with it.
    #[getter]
    fn spent(&self, py: Python<'_>) -> PyResult<bool> {
        let context = lock(&self.context, "context").map_err(|error| error.into_python(py))?;
        Ok(context.is_spent())
    }
}

/// The arrays of a batch, borrowed.
struct BorrowedBatch<'py> {
    tokens: PyReadonlyArrayDyn<'py, i32>,
    offsets: PyReadonlyArrayDyn<'py, i64>,
    targets: PyReadonlyArrayDyn<'py, i32>,
    sequence_ids: Option<PyReadonlyArrayDyn<'py, i64>>,
}

impl<'py> BorrowedBatch<'py> {
    fn new(
        tokens: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        targets: &Bound<'py, PyAny>,
        sequence_ids: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let tokens = borrow("tokens", tokens, &[Size::Any("N")])?;
        let offsets = borrow("offsets", offsets, &[Size::Any("S + 1")])?;
        let targets = borrow(
            "targets",
            targets,
            &[Size::Exactly(elements(&tokens)?.len())],
        )?;
        let num_sequences = elements(&offsets)?.len().saturating_sub(1);
        let sequence_ids = borrow_optional(
            "sequence_ids",
            sequence_ids,
            &[Size::Exactly(num_sequences)],
        )?;
        Ok(Self {
            tokens,
            offsets,
            targets,
            sequence_ids,
        })
    }

    fn batch(&self) -> PyResult<Batch<'_>> {
        Ok(Batch {
            tokens: elements(&self.tokens)?,
            offsets: elements(&self.offsets)?,
            targets: elements(&self.targets)?,
            sequence_ids: optional_elements(self.sequence_ids.as_ref())?,
        })
    }
}

#[pymethods]
impl NativeModel {
    /// `config` is a complete `ModelConfig` as JSON.
    #[new]
    #[pyo3(signature = (config, *, seed, level, threads, num_values))]
    fn new(
        py: Python<'_>,
        config: &str,
        seed: u64,
        level: Option<&str>,
        threads: Option<usize>,
        num_values: usize,
    ) -> PyResult<Self> {
        let config: Config = serde_json::from_str(config).map_err(|error| {
            own_class(py, "ConfigError", format!("model configuration: {error}"))
        })?;
        let options = Options {
            level: self::level(py, level)?,
            threads: thread_count(py, threads)?,
            num_values,
        };
        Ok(Self::of(enter(py, || Model::new(config, seed, options))?))
    }

    /// A second model with the same parameters, in the same memory until one of the two is written to. Where views live
    /// through which this one could be written to unseen, the memory is copied at once.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        enter(py, || {
            let model = lock(&self.model, "model")?;
            let mut fork = model.fork();
            if self.is_lent() {
                fork.own_parameters();
            }
            Ok::<_, NativeError>(Self::of(fork))
        })
    }

    /// Name and shape of each parameter, in the order of the flat buffers.
    #[getter]
    fn table(&self) -> Vec<(String, Vec<usize>)> {
        self.table
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor.shape.clone()))
            .collect()
    }

    #[getter]
    fn num_values(&self) -> usize {
        self.num_values
    }

    #[getter]
    fn num_parameters(&self) -> usize {
        self.table.iter().map(Parameter::len).sum()
    }

    #[getter]
    fn level(&self) -> &'static str {
        self.level
    }

    #[getter]
    fn threads(&self) -> usize {
        self.threads
    }

    /// Writable views of the parameters by name, in memory that is this model's alone from here on.
    fn parameters<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let this = slf.get();
        Self::parameter_views(slf, |model| {
            let place = LentBuffer::of(model.own_parameters());
            (Hold::Lent(Arc::clone(&this.lent)), place)
        })
    }

    /// Read-only views of the parameters by name, to be read before the model changes. Memory that is shared stays so.
    fn snapshot<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let this = slf.get();
        Self::parameter_views(slf, |model| {
            let place = LentBuffer::read_only(model.parameters());
            // A handle of a lent buffer would make the next write move it away from its views.
            let hold = if this.is_lent() {
                Hold::Lent(Arc::clone(&this.lent))
            } else {
                Hold::Shared(model.shared_parameters())
            };
            (hold, place)
        })
    }

    /// Writable views of the gradients by name; zeros where there were none yet.
    fn gradients<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let this = slf.get();
        let lent = if let Some(lent) = this.gradients.get() {
            *lent
        } else {
            let lent = enter(slf.py(), || {
                Ok::<_, NativeError>(LentBuffer::of(lock(&this.model, "model")?.gradients_mut()))
            })?;
            *this.gradients.get_or_init(|| lent)
        };
        views(slf, &this.table, lent)
    }

    /// Adds an adapter for some modules and returns its number.
    #[pyo3(signature = (*, rank, scale, modules, num_values, dropout))]
    fn add_adapter(
        &self,
        py: Python<'_>,
        rank: usize,
        scale: f32,
        modules: Vec<String>,
        num_values: usize,
        dropout: f32,
    ) -> PyResult<usize> {
        let options = AdapterOptions {
            rank,
            scale,
            num_values: Some(num_values),
            dropout,
        };
        self.with(py, |model| model.add_adapter(options, &modules))
    }

    /// Writable views of an adapter's parameters by name.
    fn adapter_parameters<'py>(
        slf: &Bound<'py, Self>,
        adapter: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (table, place) = slf
            .get()
            .with(slf.py(), |model| -> Result<_, NativeError> {
                let table = model.table_of(Some(adapter))?.to_vec();
                Ok((
                    table,
                    LentBuffer::of(model.adapter_parameters_mut(adapter)?),
                ))
            })?;
        views(slf, &table, place)
    }

    /// Writable views of an adapter's gradients by name; zeros where there were none yet.
    fn adapter_gradients<'py>(
        slf: &Bound<'py, Self>,
        adapter: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (table, place) = slf
            .get()
            .with(slf.py(), |model| -> Result<_, NativeError> {
                let table = model.table_of(Some(adapter))?.to_vec();
                Ok((table, LentBuffer::of(model.adapter_gradients_mut(adapter)?)))
            })?;
        views(slf, &table, place)
    }

    /// To be called after the parameters were written through views, where contexts and decoders made before are to be
    /// refused from then on.
    fn mark_changed(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, || {
            lock(&self.model, "model")?.parameters_mut();
            Ok::<_, NativeError>(())
        })
    }

    /// Outputs by name, and the context where `train`.
    #[pyo3(signature = (
        tokens, offsets, targets, *, want, value_rows, hidden_rows, candidates, temperature, banned_ids, train, seed,
        sequence_ids, adapter
    ))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        targets: &Bound<'py, PyAny>,
        want: Vec<String>,
        value_rows: Option<&Bound<'py, PyAny>>,
        hidden_rows: Option<&Bound<'py, PyAny>>,
        candidates: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
        temperature: f32,
        banned_ids: &Bound<'py, PyAny>,
        train: bool,
        seed: u64,
        sequence_ids: Option<&Bound<'py, PyAny>>,
        adapter: Option<usize>,
    ) -> PyResult<(Option<NativeContext>, Bound<'py, PyDict>)> {
        let batch = BorrowedBatch::new(tokens, offsets, targets, sequence_ids)?;
        let batch = batch.batch()?;
        let num_rows = batch.tokens.len();
        let value_rows = borrow_optional("value_rows", value_rows, &[Size::Exactly(num_rows)])?;
        let hidden_rows = borrow_optional("hidden_rows", hidden_rows, &[Size::Any("R")])?;
        let candidates = candidates
            .map(|(offsets, ids)| -> PyResult<_> {
                let offsets = borrow("candidates[0]", &offsets, &[Size::Exactly(num_rows + 1)])?;
                Ok((offsets, borrow("candidates[1]", &ids, &[Size::Any("C")])?))
            })
            .transpose()?;
        let candidates = match &candidates {
            None => None,
            Some((offsets, ids)) => Some(Candidates {
                offsets: elements(offsets)?,
                ids: elements(ids)?,
            }),
        };
        let banned_ids = borrow("banned_ids", banned_ids, &[Size::Any("B")])?;
        let options = ForwardOptions {
            want: parse_want(&want)?,
            candidates,
            value_rows: optional_elements(value_rows.as_ref())?,
            hidden_rows: optional_elements(hidden_rows.as_ref())?,
            temperature,
            banned_ids: elements(&banned_ids)?,
            train,
            seed,
            adapter,
        };
        let ((context, outputs), num_values) = enter(py, || -> Result<_, NativeError> {
            let model = lock(&self.model, "model")?;
            Ok((
                model.forward(&batch, &options)?,
                model.num_values_of(adapter),
            ))
        })?;
        let context = context.map(|context| NativeContext {
            context: Mutex::new(context),
        });
        Ok((context, self.arrays(py, outputs, num_rows, num_values)?))
    }

    /// Adds the gradients of the parameters.
    #[pyo3(signature = (context, *, d_logprobs, d_entropy, d_values, d_lse, d_zbar, d_hidden, d_candidates))]
    fn backward<'py>(
        &self,
        py: Python<'py>,
        context: &NativeContext,
        d_logprobs: Option<&Bound<'py, PyAny>>,
        d_entropy: Option<&Bound<'py, PyAny>>,
        d_values: Option<&Bound<'py, PyAny>>,
        d_lse: Option<&Bound<'py, PyAny>>,
        d_zbar: Option<&Bound<'py, PyAny>>,
        d_hidden: Option<&Bound<'py, PyAny>>,
        d_candidates: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (num_rows, num_values, num_hidden_rows, num_candidates) = {
            let context =
                lock(&context.context, "context").map_err(|error| error.into_python(py))?;
            (
                context.num_tokens(),
                context.num_values(),
                context.num_hidden_rows(),
                context.num_candidates(),
            )
        };
        let rows = [Size::Exactly(num_rows)];
        let d_logprobs = borrow_optional("d_logprobs", d_logprobs, &rows)?;
        let d_entropy = borrow_optional("d_entropy", d_entropy, &rows)?;
        let d_lse = borrow_optional("d_lse", d_lse, &rows)?;
        let d_zbar = borrow_optional("d_zbar", d_zbar, &rows)?;
        let values_shape = [Size::Exactly(num_rows), Size::Exactly(num_values)];
        let d_values = borrow_optional(
            "d_values",
            d_values,
            &values_shape[..value_dimensions(num_values)],
        )?;
        let hidden_shape = [
            Size::Exactly(num_hidden_rows),
            Size::Exactly(self.hidden_size),
        ];
        let d_hidden = borrow_optional("d_hidden", d_hidden, &hidden_shape)?;
        let d_candidates = borrow_optional(
            "d_candidates",
            d_candidates,
            &[Size::Exactly(num_candidates)],
        )?;
        let gradients = OutputGradients {
            d_logprobs: self.foreign(py, "d_logprobs", d_logprobs.as_ref())?,
            d_entropy: self.foreign(py, "d_entropy", d_entropy.as_ref())?,
            d_lse: self.foreign(py, "d_lse", d_lse.as_ref())?,
            d_zbar: self.foreign(py, "d_zbar", d_zbar.as_ref())?,
            d_values: self.foreign(py, "d_values", d_values.as_ref())?,
            d_hidden: self.foreign(py, "d_hidden", d_hidden.as_ref())?,
            d_candidates: self.foreign(py, "d_candidates", d_candidates.as_ref())?,
        };
        enter(py, || -> Result<_, NativeError> {
            let mut model = lock(&self.model, "model")?;
            let mut context = lock(&context.context, "context")?;
            Ok(model.backward(&mut context, &gradients)?)
        })
    }

    /// The sum of `weights * -logprobs`; adds its gradient.
    #[pyo3(signature = (
        tokens, offsets, targets, weights, *, temperature, banned_ids, train, seed, sequence_ids, adapter
    ))]
    fn forward_backward<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        targets: &Bound<'py, PyAny>,
        weights: &Bound<'py, PyAny>,
        temperature: f32,
        banned_ids: &Bound<'py, PyAny>,
        train: bool,
        seed: u64,
        sequence_ids: Option<&Bound<'py, PyAny>>,
        adapter: Option<usize>,
    ) -> PyResult<f64> {
        let batch = BorrowedBatch::new(tokens, offsets, targets, sequence_ids)?;
        let batch = batch.batch()?;
        let weights = borrow("weights", weights, &[Size::Exactly(batch.tokens.len())])?;
        let weights = self
            .foreign(py, "weights", Some(&weights))?
            .unwrap_or_default();
        let banned_ids = borrow("banned_ids", banned_ids, &[Size::Any("B")])?;
        let banned_ids = elements(&banned_ids)?;
        let options = ForwardOptions {
            temperature,
            banned_ids,
            train,
            seed,
            adapter,
            ..ForwardOptions::default()
        };
        enter(py, || -> Result<_, NativeError> {
            Ok(lock(&self.model, "model")?.forward_backward(&batch, weights, &options)?)
        })
    }

    /// Sets all gradients to 0.
    fn zero_grad(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, || {
            lock(&self.model, "model")?.zero_grad();
            Ok::<_, NativeError>(())
        })
    }
}

impl NativeModel {
    /// Runs `work` with the model to itself and without the interpreter's lock.
    pub fn with<T: Send, E>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Model) -> Result<T, E> + Send,
    ) -> PyResult<T>
    where
        NativeError: From<E>,
    {
        enter(py, || -> Result<_, NativeError> {
            Ok(work(&mut *lock(&self.model, "model")?)?)
        })
    }

    /// Views of the parameters in the place that `take` finds, with what holds it there.
    fn parameter_views<'py>(
        slf: &Bound<'py, Self>,
        take: impl FnOnce(&mut Model) -> (Hold, LentBuffer) + Send,
    ) -> PyResult<Bound<'py, PyDict>> {
        let py = slf.py();
        let (hold, place) = slf
            .get()
            .with(py, |model| Ok::<_, NativeError>(take(model)))?;
        let owner = ParameterViews {
            _model: slf.clone().unbind(),
            _hold: hold,
        };
        views(&Bound::new(py, owner)?, &slf.get().table, place)
    }

    fn of(model: Model) -> Self {
        Self {
            table: model.table().to_vec(),
            hidden_size: model.config().hidden_size,
            num_values: model.num_values(),
            level: model.kernels().level().name(),
            threads: model.pool().threads(),
            lent: Arc::new(()),
            gradients: OnceLock::new(),
            model: Mutex::new(model),
        }
    }

    /// Whether views of the parameters live through which they could be written to.
    fn is_lent(&self) -> bool {
        Arc::strong_count(&self.lent) > 1
    }

    /// The elements of an argument that must not be a view of this model's own buffers, which the call writes to.
    fn foreign<'a>(
        &self,
        py: Python<'_>,
        name: &str,
        array: Option<&'a PyReadonlyArrayDyn<'_, f32>>,
    ) -> PyResult<Option<&'a [f32]>> {
        let Some(slice) = optional_elements(array)? else {
            return Ok(None);
        };
        let is_own = lock(&self.model, "model")
            .map(|model| {
                let mut own = model.buffers().map(LentBuffer::read_only);
                own.any(|buffer| buffer.overlaps(slice))
            })
            .map_err(|error| error.into_python(py))?;
        if is_own {
            let message = format!(
                "{name}: is a view of the model's own memory, which this call writes to: pass a copy"
            );
            return Err(PyValueError::new_err(message));
        }
        Ok(Some(slice))
    }

    fn arrays<'py>(
        &self,
        py: Python<'py>,
        outputs: Outputs,
        num_rows: usize,
        num_values: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        let arrays = PyDict::new(py);
        let vectors = [
            ("logprobs", outputs.logprobs),
            ("entropy", outputs.entropy),
            ("lse", outputs.lse),
            ("zbar", outputs.zbar),
            ("candidate_logprobs", outputs.candidate_logprobs),
        ];
        for (name, vector) in vectors {
            if let Some(vector) = vector {
                arrays.set_item(name, vector.into_pyarray(py))?;
            }
        }
        if let Some(top1) = outputs.top1 {
            arrays.set_item("top1", top1.into_pyarray(py))?;
        }
        if let Some(values) = outputs.values {
            let values = values.into_pyarray(py);
            if value_dimensions(num_values) == 1 {
                arrays.set_item("values", values)?;
            } else {
                arrays.set_item("values", values.reshape([num_rows, num_values])?)?;
            }
        }
        if let Some(hidden) = outputs.hidden {
            let num_hidden_rows = hidden.len() / self.hidden_size;
            arrays.set_item(
                "hidden",
                hidden
                    .into_pyarray(py)
                    .reshape([num_hidden_rows, self.hidden_size])?,
            )?;
        }
        Ok(arrays)
    }
}

/// Dimensions of the values: one head gives a vector.
fn value_dimensions(num_values: usize) -> usize {
    if num_values > 1 { 2 } else { 1 }
}

fn parse_want(names: &[String]) -> PyResult<Want> {
    let mut want = Want::default();
    for name in names {
        let field = match name.as_str() {
            "logprobs" => &mut want.logprobs,
            "entropy" => &mut want.entropy,
            "lse" => &mut want.lse,
            "zbar" => &mut want.zbar,
            "top1" => &mut want.top1,
            "values" => &mut want.values,
            "hidden" => &mut want.hidden,
            "candidate_logprobs" => &mut want.candidate_logprobs,
            _ => {
                return Err(PyRuntimeError::new_err(format!(
                    "there is no output {name:?}"
                )));
            }
        };
        *field = true;
    }
    Ok(want)
}
