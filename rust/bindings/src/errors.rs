//! The table from Rust's errors to Python's classes.

use std::io;
use std::path::Path;

use ingot_model::ModelError;
use ingot_tokenizer::TokenizerError;
use pyo3::exceptions::{
    PyIndexError, PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;

/// Anything that can go wrong in a call.
#[derive(Debug)]
pub enum NativeError {
    /// The network refused its inputs or settings.
    Model(ModelError),
    /// The tokenizer refused its text, file or settings.
    Tokenizer(TokenizerError),
    /// An object is in use by another thread.
    Busy(&'static str),
    /// An object was left half changed by an internal error.
    Broken(&'static str),
    /// A check inside failed: a defect of ingot, not of the input.
    Internal(String),
}

impl From<ModelError> for NativeError {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

impl From<TokenizerError> for NativeError {
    fn from(error: TokenizerError) -> Self {
        Self::Tokenizer(error)
    }
}

impl NativeError {
    /// The exception to raise.
    pub fn into_python(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Model(error) => model_error(py, &error),
            Self::Tokenizer(error) => tokenizer_error(py, &error),
            Self::Busy(what) => PyRuntimeError::new_err(format!(
                "this {what} is in use by another thread: take turns, or give each thread a {what} of its own"
            )),
            Self::Broken(what) => PyRuntimeError::new_err(format!(
                "this {what} was left half changed by an internal error: load the last checkpoint into a new one"
            )),
            Self::Internal(message) => PyRuntimeError::new_err(format!(
                "internal error: {message}; please report it with what led to it and the output of `ingot env`"
            )),
        }
    }
}

fn model_error(py: Python<'_>, error: &ModelError) -> PyErr {
    let message = error.to_string();
    match error {
        ModelError::Config(_)
        | ModelError::LevelUnavailable { .. }
        | ModelError::SequenceTooLong { .. }
        | ModelError::UnknownParameter { .. }
        | ModelError::DuplicateParameter { .. } => own_class(py, "ConfigError", message),
        ModelError::NotFinite { .. } => own_class(py, "RunError", message),
        ModelError::OutOfRange { .. } => PyIndexError::new_err(message),
        ModelError::ContextSpent
        | ModelError::ContextStale
        | ModelError::ContextForeign
        | ModelError::DecoderStale
        | ModelError::DecoderForeign
        | ModelError::NoGradients
        | ModelError::OptimizerMismatch { .. } => PyRuntimeError::new_err(message),
        // Wrong lengths and values that make no sense; and what later versions add.
        _ => PyValueError::new_err(message),
    }
}

fn tokenizer_error(py: Python<'_>, error: &TokenizerError) -> PyErr {
    let message = error.to_string();
    match error {
        TokenizerError::Io { path, source } => os_error(path, source),
        TokenizerError::Interrupted => PyKeyboardInterrupt::new_err(()),
        TokenizerError::Setting(_) => own_class(py, "ConfigError", message),
        TokenizerError::DisallowedSpecial { .. } => PyValueError::new_err(message),
        // Files, vocabularies and text that cannot be used; and what later versions add.
        _ => own_class(py, "DataError", message),
    }
}

/// `OSError` with number and file name: Python makes `FileNotFoundError` and its like of it.
fn os_error(path: &Path, source: &io::Error) -> PyErr {
    let text = source.to_string();
    match source.raw_os_error() {
        Some(number) => {
            let reason = text
                .split(" (os error")
                .next()
                .unwrap_or_default()
                .to_owned();
            PyOSError::new_err((number, reason, path.as_os_str().to_owned()))
        }
        None => PyOSError::new_err(format!("{}: {text}", path.display())),
    }
}

/// An exception of a class of `ingot.errors`.
pub fn own_class(py: Python<'_>, name: &str, message: String) -> PyErr {
    let class = py
        .import("ingot.errors")
        .and_then(|module| module.getattr(name));
    match class.and_then(|class| class.call1((message,))) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}
