"""A flat buffer of weights cut into named tensors, and that of their gradients: a model's own, or an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingot.models.adapters import Adapter, AdapterSettings
from ingot.models.base import FloatArray
from ingot.models.parameters import Parameter
from ingot.models.torch_backend.tensors import as_array, frozen


class ParameterSet:
    """Weights that are trained together."""

    def __init__(self, table: list[Parameter], flat: Tensor) -> None:
        self.table = table
        self.flat = flat
        self.gradient: Tensor | None = None
        self.cut()

    def cut(self) -> None:
        """The named parts of the flat buffer: leaves of the graph that share its memory."""
        self.tensors = {p.name: part_of(self.flat, p).detach().requires_grad_() for p in self.table}

    def gradient_buffer(self) -> Tensor:
        """The flat gradient, zeros where there was none yet."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.flat)
        return self.gradient

    def bind_gradients(self) -> None:
        """Let autograd add to the flat gradient."""
        flat = self.gradient_buffer()
        for parameter in self.table:
            tensor = self.tensors[parameter.name]
            if tensor.grad is None:
                tensor.grad = part_of(flat, parameter)

    def write(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Take over values that were checked."""
        with torch.no_grad():
            for parameter in self.table:
                self.tensors[parameter.name].copy_(torch.from_numpy(as_array(state[parameter.name])))

    def parameter_copies(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the weights."""
        return MappingProxyType({p.name: frozen(self.tensors[p.name]) for p in self.table})

    def gradient_copies(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the gradients."""
        flat = self.gradient_buffer()
        return MappingProxyType({p.name: frozen(part_of(flat, p)) for p in self.table})


def part_of(flat: Tensor, parameter: Parameter) -> Tensor:
    """A parameter's part of a flat buffer, in its shape."""
    return flat[parameter.offset : parameter.offset + parameter.size].view(parameter.shape)


class TorchAdapter(Adapter):
    """An adapter of a torch model. ``parameters`` and ``gradients`` are read-only copies."""

    def __init__(self, weights: ParameterSet, name: str, settings: AdapterSettings) -> None:
        super().__init__(name, settings)
        self.weights = weights
        self.changes = 0
        """Writes by :meth:`load_state` so far."""

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Read-only copies."""
        return self.weights.parameter_copies()

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Read-only copies."""
        return self.weights.gradient_copies()

    def _write(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.weights.write(state)
        self.changes += 1
