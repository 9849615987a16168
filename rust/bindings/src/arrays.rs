//! Arrays in and out: numpy's borrowed strictly, the flat buffers lent as views. The only unsafe code of this crate.
#![allow(unsafe_code)]

use std::fmt::Write;
use std::ptr::NonNull;

use ingot_model::Parameter;
use numpy::ndarray::{ArrayView1, ArrayView2, ShapeBuilder};
use numpy::{
    Element, PyArray, PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
    prelude::*,
};
use pyo3::PyClass;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pyclass::boolean_struct::True;
use pyo3::types::PyDict;

use crate::model::{NativeModel, ParameterViews};
use crate::optimizer::NativeOptimizer;

/// A size that an array must have in one dimension.
#[derive(Clone, Copy)]
pub enum Size {
    /// Any; the letter is what documentation calls it.
    Any(&'static str),
    /// Exactly this many.
    Exactly(usize),
}

/// Borrows an array of one type, C order and expected shape, without a copy.
///
/// # Errors
/// `TypeError` for another type or no array, `ValueError` for another shape or order; either names the argument and type,
/// shape and strides of what was given.
pub fn borrow<'py, T: Element>(
    name: &str,
    object: &Bound<'py, PyAny>,
    shape: &[Size],
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    let Ok(array) = object.cast::<PyUntypedArray>() else {
        let given = object.get_type().name()?;
        return Err(PyTypeError::new_err(format!(
            "{name}: needs {}, got {given}",
            expected::<T>(object.py(), shape)
        )));
    };
    let complaint = || {
        format!(
            "{name}: needs {}, got {}",
            expected::<T>(object.py(), shape),
            describe(array)
        )
    };
    let Ok(typed) = object.cast::<PyArrayDyn<T>>() else {
        return Err(PyTypeError::new_err(complaint()));
    };
    let fits = array.ndim() == shape.len()
        && array
            .shape()
            .iter()
            .zip(shape)
            .all(|(got, want)| match want {
                Size::Any(_) => true,
                Size::Exactly(want) => got == want,
            });
    let aligned = typed.data().is_aligned();
    if !(fits && array.is_c_contiguous() && aligned) {
        return Err(PyValueError::new_err(complaint()));
    }
    typed
        .try_readonly()
        .map_err(|_| PyValueError::new_err(format!("{name}: is being written to")))
}

/// [`borrow`] for an argument that may be `None`.
pub fn borrow_optional<'py, T: Element>(
    name: &str,
    object: Option<&Bound<'py, PyAny>>,
    shape: &[Size],
) -> PyResult<Option<PyReadonlyArrayDyn<'py, T>>> {
    object.map(|object| borrow(name, object, shape)).transpose()
}

/// The elements of a borrowed array.
pub fn elements<'a, T: Element>(array: &'a PyReadonlyArrayDyn<'_, T>) -> PyResult<&'a [T]> {
    Ok(array.as_slice()?)
}

/// [`elements`] of an array that may be missing.
pub fn optional_elements<'a, T: Element>(
    array: Option<&'a PyReadonlyArrayDyn<'_, T>>,
) -> PyResult<Option<&'a [T]>> {
    array.map(elements).transpose()
}

fn expected<T: Element>(py: Python<'_>, shape: &[Size]) -> String {
    let mut text = format!("a C-contiguous {} array of shape [", T::get_dtype(py));
    for (i, size) in shape.iter().enumerate() {
        let comma = if i > 0 { ", " } else { "" };
        // Writing to a string does not fail.
        let _ = match size {
            Size::Any(letter) => write!(text, "{comma}{letter}"),
            Size::Exactly(size) => write!(text, "{comma}{size}"),
        };
    }
    text + "]"
}

fn describe(array: &Bound<'_, PyUntypedArray>) -> String {
    let order = if array.is_c_contiguous() {
        ""
    } else {
        ", not C-contiguous"
    };
    format!(
        "{} of shape {:?} with strides {:?} bytes{order}",
        array.dtype(),
        array.shape(),
        array.strides()
    )
}

/// Where a flat buffer lies. Cheap to copy: it is the address, not the memory.
#[derive(Clone, Copy)]
pub struct LentBuffer {
    start: NonNull<f32>,
    len: usize,
    writable: bool,
}

// SAFETY: an address; memory is touched only through `views`, which asks for an owner.
unsafe impl Send for LentBuffer {}
// SAFETY: as above.
unsafe impl Sync for LentBuffer {}

impl LentBuffer {
    /// The buffer behind a slice, for writable views.
    pub fn of(buffer: &mut [f32]) -> Self {
        Self {
            len: buffer.len(),
            start: NonNull::from(buffer).cast(),
            writable: true,
        }
    }

    /// The buffer behind a slice, for views that only read.
    pub fn read_only(buffer: &[f32]) -> Self {
        Self {
            len: buffer.len(),
            start: NonNull::from(buffer).cast(),
            writable: false,
        }
    }

    /// Whether a slice lies in the buffer, in part or whole.
    pub fn overlaps(self, slice: &[f32]) -> bool {
        let start = self.start.addr().get();
        let end = start + size_of::<f32>() * self.len;
        let range = slice.as_ptr_range();
        !slice.is_empty() && range.start.addr() < end && range.end.addr() > start
    }
}

/// An object with flat buffers that may be viewed.
///
/// # Safety
/// The buffers must stay where they are, and of their length, as long as the object lives.
pub unsafe trait Lender {}

// SAFETY: gradients, and all that adapters have, live in the model, which is dropped with this object and never replaced;
// the model never moves them, nor frees them once made.
unsafe impl Lender for NativeModel {}

// SAFETY: the object keeps the model alive, and either a handle of the parameters' buffer, or the mark that they are lent:
// a model forks into shared memory only where that mark is missing, and moves only parameters that are shared.
unsafe impl Lender for ParameterViews {}

// SAFETY: the moments live in the optimizer, which is dropped with this object, never replaced, and never moves them.
unsafe impl Lender for NativeOptimizer {}

/// Views of all tensors of one of the owner's buffers by name: without a copy, each keeping the owner alive.
///
/// Memory is shared with Rust, which reads and writes it during calls on the owner alone. A program that writes to a view
/// while another of its threads runs such a call gets numbers from before or after its write, as from two numpy calls.
pub fn views<'py, T>(
    owner: &Bound<'py, T>,
    tensors: &[Parameter],
    buffer: LentBuffer,
) -> PyResult<Bound<'py, PyDict>>
where
    T: Lender + PyClass<Frozen = True> + Sync,
{
    let views = PyDict::new(owner.py());
    for tensor in tensors {
        assert!(
            tensor.range().end <= buffer.len,
            "{} lies outside of its buffer",
            tensor.name
        );
        // SAFETY: the tensor lies inside the buffer.
        let start = unsafe { buffer.start.add(tensor.offset) }
            .as_ptr()
            .cast_const();
        let view = if let &[rows, cols] = tensor.shape.as_slice() {
            let strides = if tensor.transposed {
                (1, rows)
            } else {
                (cols, 1)
            };
            // SAFETY: `rows * cols` floats from `start` are the tensor's, and alive while the owner is.
            let view = unsafe { ArrayView2::from_shape_ptr((rows, cols).strides(strides), start) };
            // SAFETY: the owner becomes the array's base, and keeps the memory alive and in place.
            unsafe { PyArray::borrow_from_array(&view, owner.as_any().clone()) }.into_any()
        } else {
            // SAFETY: as above, for a vector.
            let view = unsafe { ArrayView1::from_shape_ptr(tensor.len(), start) };
            // SAFETY: as above.
            unsafe { PyArray::borrow_from_array(&view, owner.as_any().clone()) }.into_any()
        };
        if !buffer.writable {
            view.call_method1("setflags", (false,))?;
        }
        views.set_item(&tensor.name, view)?;
    }
    Ok(views)
}
