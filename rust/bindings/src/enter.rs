//! The one way in and out: release the interpreter, run, honour Ctrl-C, map the error.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;

use crate::errors::NativeError;

/// Runs `work` without the interpreter's lock. A signal that came meanwhile (Ctrl-C) is raised after it.
///
/// Whatever `work` changes is either as before or complete when it is raised: signals are looked at after the work only.
pub fn enter<T, E>(py: Python<'_>, work: impl FnOnce() -> Result<T, E> + Send) -> PyResult<T>
where
    T: Send,
    E: Into<NativeError> + Send,
{
    let result = py.detach(|| match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Into::into),
        Err(panic) => Err(NativeError::Internal(panic_message(&*panic))),
    });
    py.check_signals()?;
    result.map_err(|error| error.into_python(py))
}

/// The value behind a lock that nobody may wait for.
pub fn lock<'a, T>(
    mutex: &'a Mutex<T>,
    what: &'static str,
) -> Result<MutexGuard<'a, T>, NativeError> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::WouldBlock) => Err(NativeError::Busy(what)),
        Err(TryLockError::Poisoned(_)) => Err(NativeError::Broken(what)),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown".to_owned())
}
