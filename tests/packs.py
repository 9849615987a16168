"""Packed batches for the tests of the losses: ragged sequences, some empty, with gaps in what counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Pack:
    """S sequences in N tokens."""

    offsets: np.ndarray
    targets: np.ndarray
    rng: np.random.Generator

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def counted(self) -> np.ndarray:
        return self.targets >= 0

    def slices(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def logprobs(self, scale: float = 1.0) -> np.ndarray:
        """f32 [N], below 0."""
        return -np.abs(self.rng.normal(scale=scale, size=len(self.targets))).astype(np.float32)

    def normal(self, scale: float = 1.0) -> np.ndarray:
        return self.rng.normal(scale=scale, size=len(self.targets)).astype(np.float32)


@st.composite
def packs(draw: st.DrawFn, min_sequences: int = 1, max_sequences: int = 6, max_length: int = 7) -> Pack:
    """Ragged lengths including 0 and 1; at least one token counts."""
    lengths = draw(st.lists(st.integers(0, max_length), min_size=min_sequences, max_size=max_sequences))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths[int(rng.integers(len(lengths)))] += 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    share = draw(st.sampled_from([1.0, 0.6, 0.2]))
    counted = rng.random(offsets[-1]) < share
    counted[rng.integers(offsets[-1])] = True
    return Pack(offsets, np.where(counted, 3, -1).astype(np.int32), rng)


def leaf(values: np.ndarray) -> torch.Tensor:
    """The same numbers in f64, to differentiate by."""
    return torch.tensor(np.asarray(values, np.float64), requires_grad=True)


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[np.ndarray]:
    """dloss/dleaf of each, zeros where the loss does not depend on it."""
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [np.zeros(leaf.shape) if grad is None else grad.numpy() for leaf, grad in zip(leaves, grads, strict=True)]
