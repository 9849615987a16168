"""Muon in f64 numpy, written from its definition (Jordan et al. 2024; length of the step: Liu et al. 2025, equation 4)."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def orthogonalize(gradient: Matrix) -> Matrix:
    """Five rounds of Newton-Schulz, by what they do to the singular values."""
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    values = values / max(np.sqrt(np.sum(values**2)), 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def is_matrix_of_a_block(name: str, weight: npt.NDArray[np.generic]) -> bool:
    """Projections of attention and MLP, of all families."""
    return weight.ndim == 2 and re.search(r"\.(h|layers)\.\d+\.(attn|self_attn|mlp)\.", name) is not None


class Muon:
    """Muon on one matrix."""

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.buffer: Matrix | None = None

    def step(self, weight: Matrix, gradient: Matrix, lr: float) -> Matrix:
        """The new weight."""
        if self.buffer is None:
            self.buffer = np.zeros_like(weight)
        self.buffer = self.momentum * self.buffer + (1.0 - self.momentum) * gradient
        ahead = self.momentum * self.buffer + (1.0 - self.momentum) * gradient
        step = 0.2 * np.sqrt(max(weight.shape)) * orthogonalize(ahead)
        return weight * (1.0 - lr * self.weight_decay) - lr * step


class FusedMuon:
    """Muon on the three matrices that GPT-2 keeps beside one another, ``[in, query | key | value]``."""

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.parts = [Muon(momentum, weight_decay) for _ in range(3)]

    def step(self, weight: Matrix, gradient: Matrix, lr: float) -> Matrix:
        """The new weight."""
        pieces = zip(self.parts, np.hsplit(weight, 3), np.hsplit(gradient, 3), strict=True)
        return np.hstack([part.step(w, g, lr) for part, w, g in pieces])
