"""The few functions that every objective needs in a form that neither overflows nor cancels. All compute in f64."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
"""What losses take: f32 from a model, f64 from a sum."""
Float32: TypeAlias = npt.NDArray[np.float32]
"""What goes back into a model: gradients by token."""
Float64: TypeAlias = npt.NDArray[np.float64]
"""What losses compute with: sums, coefficients, advantages."""
Ints: TypeAlias = npt.NDArray[np.integer[Any]]
Bools: TypeAlias = npt.NDArray[np.bool_]
Metrics: TypeAlias = dict[str, float]

MAX_LOG_RATIO = 20.0
"""Log-ratios of two policies are held within this before exp: e^20 is 5e8."""


def f64(values: npt.ArrayLike) -> Float64:
    """The same numbers in double precision."""
    return np.asarray(values, dtype=np.float64)


def log_sigmoid(x: Float64) -> Float64:
    """ln(1 / (1 + e^-x)), exact at both ends: -> x for x -> -inf, -> -e^-x for x -> inf."""
    return f64(-np.logaddexp(0.0, -x))


def sigmoid(x: Float64) -> Float64:
    """1 / (1 + e^-x). Take ``sigmoid(-x)`` for its complement: 1 - sigmoid(x) is 0 from x = 37 on."""
    return np.exp(log_sigmoid(x))


def log1mexp(a: Float64) -> Float64:
    """ln(1 - e^a) for a < 0 without cancellation (Maechler 2012); -inf for a = 0, NaN above."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > -np.log(2.0), np.log(-np.expm1(a)), np.log1p(-np.exp(np.minimum(a, 0.0))))


def bounded_ratio(log_ratio: Float64) -> tuple[Float64, Bools]:
    """e^log_ratio with its exponent held within +-``MAX_LOG_RATIO``, and where it was not held (beyond, the gradient is 0)."""
    return np.exp(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)), np.abs(log_ratio) <= MAX_LOG_RATIO


def require_shape(shape: tuple[int, ...], **arrays: npt.ArrayLike | None) -> None:
    """Raise a ``ValueError`` that names the first array of another shape: numpy would stretch it in silence."""
    for name, array in arrays.items():
        if array is not None and np.shape(array) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(np.shape(array))}")


def require_positive(**counts: float) -> None:
    """Raise a ``ValueError`` that names the first normalizer that is not above 0."""
    for name, count in counts.items():
        if not count > 0:
            raise ValueError(f"{name} must be above 0, got {count}")
