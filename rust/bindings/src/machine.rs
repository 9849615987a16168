//! Facts about this build and this machine.

use std::num::NonZero;

use ingot_model::{Kernels, Level, Pool};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::enter::enter;
use crate::errors::{NativeError, own_class};

/// Threads to use: the number given, or as many CPUs as affinity and the container's quota allow.
pub fn thread_count(py: Python<'_>, threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(own_class(
            py,
            "ConfigError",
            "threads must be at least 1, got 0; leave it out for all CPUs that this process may use".to_owned(),
        )),
        Some(threads) => Ok(threads),
        None => Ok(std::thread::available_parallelism().map_or(1, NonZero::get)),
    }
}

/// The instruction level of that name; the best one without a name.
pub fn level(py: Python<'_>, name: Option<&str>) -> PyResult<Option<Level>> {
    let Some(name) = name else { return Ok(None) };
    match Level::parse(name) {
        Some(level) => Ok(Some(level)),
        None => Err(own_class(
            py,
            "ConfigError",
            format!(
                "level is {name:?}; there are portable, avx2 and avx512, on this machine {}",
                available_names()
            ),
        )),
    }
}

fn available_names() -> String {
    Level::available()
        .iter()
        .map(|level| level.name())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Version, build profile, instruction levels and threads.
#[pyfunction]
#[pyo3(signature = (threads=None))]
pub fn build_info(py: Python<'_>, threads: Option<usize>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item(
        "profile",
        if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        },
    )?;
    info.set_item("level", Level::best().name())?;
    info.set_item(
        "levels_available",
        Level::available()
            .iter()
            .map(|level| level.name())
            .collect::<Vec<_>>(),
    )?;
    info.set_item("threads", thread_count(py, threads)?)?;
    Ok(info)
}

/// What the machine can do at most with so many threads, measured for about 0.2 s.
#[pyfunction]
#[pyo3(signature = (threads=None))]
pub fn measured_peak(py: Python<'_>, threads: Option<usize>) -> PyResult<Bound<'_, PyDict>> {
    let threads = thread_count(py, threads)?;
    let peak = enter(py, || {
        Ok::<_, NativeError>(ingot_kernels::measured_peak(
            Kernels::best(),
            &Pool::new(threads),
        ))
    })?;
    let facts = PyDict::new(py);
    facts.set_item("gflops", peak.gflops)?;
    facts.set_item("read_gb_per_s", peak.read_gbps)?;
    Ok(facts)
}
