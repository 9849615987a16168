//! The decoder as Python sees it.

use std::sync::Mutex;

use ingot_model::{Decoder, DecoderOptions, Sampling};
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use crate::arrays::{Size, borrow, elements};
use crate::enter::{enter, lock};
use crate::errors::NativeError;
use crate::model::NativeModel;

/// Slots, tokens, log-probabilities, entropy.
type StepArrays<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f32>>,
);

/// See `ingot.models.base.Decoder`.
#[pyclass(frozen, module = "ingot._native", name = "Decoder")]
pub struct NativeDecoder {
    model: Py<NativeModel>,
    decoder: Mutex<Decoder>,
}

#[pymethods]
impl NativeDecoder {
    #[new]
    #[pyo3(signature = (model, *, max_tokens, max_sequences, seed, banned_ids, adapter))]
    fn new(
        py: Python<'_>,
        model: Py<NativeModel>,
        max_tokens: usize,
        max_sequences: usize,
        seed: u64,
        banned_ids: &Bound<'_, PyAny>,
        adapter: Option<usize>,
    ) -> PyResult<Self> {
        let banned_ids = borrow("banned_ids", banned_ids, &[Size::Any("B")])?;
        let options = DecoderOptions {
            max_tokens,
            max_sequences,
            seed,
            banned_ids: elements(&banned_ids)?,
            adapter,
        };
        let decoder = model
            .get()
            .with(py, |model| Decoder::new(model, &options))?;
        Ok(Self {
            model,
            decoder: Mutex::new(decoder),
        })
    }

    /// Begins a sequence; its slot.
    #[pyo3(signature = (tokens, sequence_id, *, temperature, top_k, top_p, min_p, repetition_penalty))]
    fn add(
        &self,
        py: Python<'_>,
        tokens: &Bound<'_, PyAny>,
        sequence_id: i64,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
    ) -> PyResult<usize> {
        let tokens = borrow("tokens", tokens, &[Size::Any("T")])?;
        let tokens = elements(&tokens)?;
        let sampling = Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        };
        self.model
            .get()
            .with(py, |model| -> Result<_, NativeError> {
                Ok(lock(&self.decoder, "decoder")?.add(model, tokens, sequence_id, sampling)?)
            })
    }

    /// Begins a sequence with what another one is now; its slot.
    fn fork(&self, py: Python<'_>, slot: usize, sequence_id: i64) -> PyResult<usize> {
        self.model
            .get()
            .with(py, |model| -> Result<_, NativeError> {
                Ok(lock(&self.decoder, "decoder")?.fork(model, slot, sequence_id)?)
            })
    }

    /// A token for each active slot, drawn or taken from `forced` (slot, token).
    fn step<'py>(&self, py: Python<'py>, forced: Vec<(usize, i32)>) -> PyResult<StepArrays<'py>> {
        let step = self
            .model
            .get()
            .with(py, |model| -> Result<_, NativeError> {
                Ok(lock(&self.decoder, "decoder")?.step(model, &forced)?)
            })?;
        let slots: Vec<i32> = step.slots.iter().map(|&slot| slot as i32).collect();
        Ok((
            slots.into_pyarray(py),
            step.tokens.into_pyarray(py),
            step.logprobs.into_pyarray(py),
            step.entropy.into_pyarray(py),
        ))
    }

    /// Ends a sequence.
    fn remove(&self, py: Python<'_>, slot: usize) -> PyResult<()> {
        enter(py, || -> Result<_, NativeError> {
            Ok(lock(&self.decoder, "decoder")?.remove(slot)?)
        })
    }

    /// Slots in use.
    #[getter]
    fn active(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        enter(py, || {
            Ok::<_, NativeError>(lock(&self.decoder, "decoder")?.active())
        })
    }

    /// Tokens of a sequence so far.
    fn length(&self, py: Python<'_>, slot: usize) -> PyResult<usize> {
        enter(py, || -> Result<_, NativeError> {
            Ok(lock(&self.decoder, "decoder")?.length(slot)?)
        })
    }
}
