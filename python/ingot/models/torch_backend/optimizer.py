"""AdamW (Loshchilov and Hutter 2019, algorithm 2) on the flat buffers, clipped by the global norm (Pascanu et al. 2013), and Muon
(Jordan et al. 2024) on the matrices of the blocks where that is chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingot.errors import CheckpointError, ConfigError
from ingot.models.base import EpsMode, Optim, ParameterGroup, StepInfo
from ingot.models.grouping import assign_groups, check_optim, check_saved_optim
from ingot.models.parameters import Parameter
from ingot.models.tables import check_state
from ingot.models.torch_backend.parameter_set import part_of
from ingot.models.torch_backend.tensors import as_array, to_numpy

if TYPE_CHECKING:
    from ingot.models.torch_backend.model import TorchModel


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
# Least norm that is divided by: a gradient of zero stays zero.
_EPS = 1e-7
# Root mean square of an element of AdamW's steps (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2


class TorchOptimizer:
    """AdamW or Muon on the flat buffers. See :func:`ingot.models.Optimizer` and :class:`ingot.models.base.Optimizer`."""

    def __init__(
        self,
        model: TorchModel,
        groups: Sequence[ParameterGroup] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        eps_mode: EpsMode = "torch",
        weight_decay: float = 0.1,
        optim: Optim = "adamw",
        muon_momentum: float = 0.95,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas must each be in [0, 1), got {betas}")
        if not 0.0 <= eps < math.inf:
            raise ConfigError(f"eps must be 0 or more, got {eps}")
        if eps_mode not in ("torch", "tf"):
            raise ConfigError(f'eps_mode is {eps_mode!r}; there are "torch" and "tf"')
        if not 0.0 <= weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be 0 or more, got {weight_decay}")
        self._model = model
        self._betas, self._eps, self._eps_mode = betas, eps, eps_mode
        self._optim, self._momentum = optim, muon_momentum
        self._set = model._trained_set()
        check_optim(optim, muon_momentum, model._trained() is not None)
        self._runs, self._matrices = _parts(self._set.table, groups, weight_decay, optim)
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._num_steps = 0

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """See :meth:`ingot.models.base.Optimizer.step`."""
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"learning_rate: must be a finite number of at least 0, got {lr}")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm: must be positive, got {clip_norm}")
        return self._model._update(self._set, lambda gradient: self._step(lr, clip_norm, gradient))

    @torch.no_grad()
    def _step(self, lr: float, clip_norm: float | None, gradient: Tensor) -> StepInfo:
        parts = [gradient[run.part] for run in self._runs] + [matrix.of(gradient) for matrix in self._matrices]
        squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]
        norm = math.sqrt(float(sum(squares)))
        if not math.isfinite(norm):
            return StepInfo(norm, skipped=True)
        scale = clip_norm / (norm + 1e-6) if clip_norm is not None and norm > clip_norm else 1.0
        self._num_steps += 1
        first, second = self._moments()
        beta1, beta2 = self._betas
        correction1, correction2 = 1.0 - beta1**self._num_steps, math.sqrt(1.0 - beta2**self._num_steps)
        for run in self._runs:
            p, m, v = self._set.flat[run.part], first[run.part], second[run.part]
            g = gradient[run.part] * scale
            m.mul_(beta1).add_(g, alpha=1.0 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            rate = lr * run.lr_scale
            p.mul_(1.0 - rate * run.weight_decay)
            if self._eps_mode == "torch":
                p.addcdiv_(m, v.sqrt().div_(correction2).add_(self._eps), value=-rate / correction1)
            else:
                p.addcdiv_(m, v.sqrt().add_(self._eps), value=-rate * correction2 / correction1)
        for matrix in self._matrices:
            w, m, g = matrix.of(self._set.flat), matrix.of(first), matrix.of(gradient) * scale
            m.mul_(self._momentum).add_(g, alpha=1.0 - self._momentum)
            u = m.mul(self._momentum).add_(g, alpha=1.0 - self._momentum)
            rate = lr * matrix.lr_scale
            w.mul_(1.0 - rate * matrix.weight_decay)
            w.add_(orthogonalized(u), alpha=-_ADAMW_RMS * rate * math.sqrt(max(w.shape)))
        return StepInfo(norm, skipped=False)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Copies: ``step`` i64[1] and for each parameter ``m.NAME`` and ``v.NAME``."""
        state: dict[str, npt.NDArray[np.generic]] = {"step": np.array([self._num_steps], dtype=np.int64)}
        for prefix, flat in zip(("m", "v"), self._moments(), strict=True):
            for parameter in self._set.table:
                state[f"{prefix}.{parameter.name}"] = to_numpy(part_of(flat, parameter))
        if self._optim == "muon":
            state["muon"] = np.ones(1, dtype=np.int64)
        return state

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; a missing, surplus or mis-shaped entry is a ``CheckpointError`` that names it."""
        table = self._set.table
        check_saved_optim(state, self._optim)
        shapes: dict[str, tuple[int, ...]] = {"step": (1,), **({"muon": (1,)} if self._optim == "muon" else {})}
        shapes |= {f"{prefix}.{p.name}": p.shape for prefix in ("m", "v") for p in table}
        check_state(state, shapes, "optimizer state")
        num_steps = int(as_array(state["step"])[0])
        if num_steps < 0:
            raise CheckpointError(f"optimizer state: step is {num_steps}, but counts from 0")
        self._num_steps = num_steps
        for prefix, flat in zip(("m", "v"), self._moments(), strict=True):
            for parameter in table:
                values = torch.from_numpy(as_array(state[f"{prefix}.{parameter.name}"]))
                part_of(flat, parameter).copy_(values)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(self._set.flat), torch.zeros_like(self._set.flat)
        return self._first, self._second


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbours in the flat buffers that are updated alike."""

    part: slice
    lr_scale: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix that Muon updates: a parameter, or a third of GPT-2's query, key and value."""

    parameter: Parameter
    columns: slice
    lr_scale: float
    weight_decay: float

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a flat buffer."""
        return part_of(flat, self.parameter)[:, self.columns]


def orthogonalized(u: Tensor) -> Tensor:
    """The orthogonal factor of a matrix, nearly: singular values from 0.68 to 1.14 or so for all but the smallest of ``u``.

    Five rounds of Newton-Schulz with the coefficients of Jordan et al. 2024, the product with itself over the longer side.
    """
    a, b, c = _COEFFICIENTS
    x = (u if u.shape[0] <= u.shape[1] else u.T) / float(torch.linalg.vector_norm(u, dtype=torch.float64).clamp(_EPS))
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if u.shape[0] <= u.shape[1] else x.T


def _parts(
    table: list[Parameter], groups: Sequence[ParameterGroup] | None, weight_decay: float, optim: Optim
) -> tuple[list[_Run], list[_Matrix]]:
    """The groups as pieces of the flat buffers: neighbours joined for AdamW, and one by one the matrices for Muon."""
    assigned = assign_groups({p.name: p.shape for p in table}, groups or (), weight_decay)
    settings = {name: (lr_scale, decay) for names, lr_scale, decay in assigned for name in names}
    runs: list[_Run] = []
    matrices: list[_Matrix] = []
    for parameter in table:
        lr_scale, decay = settings[parameter.name]
        stop = parameter.offset + parameter.size
        if optim == "muon" and parameter.in_block:
            matrices += [_Matrix(parameter, columns, lr_scale, decay) for columns in parameter.fused]
        elif runs and (runs[-1].part.stop, runs[-1].lr_scale, runs[-1].weight_decay) == (
            parameter.offset,
            lr_scale,
            decay,
        ):
            runs[-1] = _Run(slice(runs[-1].part.start, stop), lr_scale, decay)
        else:
            runs.append(_Run(slice(parameter.offset, stop), lr_scale, decay))
    return runs, matrices
