"""Devices, precisions, and the way between tensors and arrays."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingot.errors import ConfigError

Precision = Literal["auto", "f32", "bf16", "f64"]


def find_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; the torch backend runs on cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but torch {torch.__version__} sees no GPU: install a CUDA build of torch, or use device cpu"
        )
    return torch.device(device)


def find_precision(precision: Precision, device: torch.device) -> Precision:
    if precision not in ("auto", "f32", "bf16", "f64"):
        raise ConfigError(f"precision is {precision!r}; the torch backend has auto, f32, bf16 and f64")
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "f32"


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: must be a positive number, got {temperature}")


def as_array(values: npt.NDArray[np.generic]) -> npt.NDArray[Any]:
    """What torch.from_numpy takes: contiguous, and writable as far as torch can know."""
    return np.array(values, order="C", copy=True)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy on the CPU."""
    return tensor.detach().cpu().numpy().copy()


def frozen(tensor: Tensor) -> npt.NDArray[Any]:
    """A read-only copy: a write would be lost, so it is an error."""
    array = to_numpy(tensor)
    array.flags.writeable = False
    return array


def numpy_dtype(dtype: torch.dtype) -> npt.DTypeLike:
    return np.float64 if dtype is torch.float64 else np.float32
