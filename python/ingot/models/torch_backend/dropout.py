"""Dropout masks that replay: the native core's, from the same counter-based numbers.

Shape legend: N tokens of the batch, n sequences of one length T, H query heads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ingot.models.packing import Packing
from ingot.models.randomness import HASH_MULTIPLIERS, HASH_STEP, SITE_ATTENTION_WEIGHTS, key_words


class Dropout:
    """Masks that are a function of (seed, layer, place, sequence id, position, element): the native core's."""

    def __init__(self, probability: float, seed: int, packing: Packing, device: torch.device) -> None:
        # As the native core: the probability is rounded to f32 first.
        rounded = float(np.float32(probability))
        self._threshold = int(rounded * 4294967296.0)
        self._scale = float(np.float32(1.0 / (1.0 - rounded)))
        self._seed = seed
        self._packing = packing
        self._device = device

    def __call__(self, x: Tensor, layer: int, site: int) -> Tensor:
        """Drops elements of x [N, width] and scales the others."""
        return x * self._mask(self._words(layer, site), x.shape[-1], x.dtype)

    def weights_mask(self, layer: int, num_heads: int, rows: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
        """Factors for attention weights [n, H, T, T] of the sequences of one length."""
        words = torch.stack([self._words(layer, SITE_ATTENTION_WEIGHTS + head) for head in range(num_heads)], 1)
        words = words.view(-1, length, num_heads, 2) if rows is None else words[rows]  # [n, T, H, 2]
        return self._mask(words.transpose(1, 2), length, dtype)

    def _words(self, layer: int, site: int) -> Tensor:
        """Two random words for each row, as i64 [N, 2]."""
        words = key_words(self._seed, layer, site, self._packing.row_sequence_ids, self._packing.positions)
        return torch.from_numpy(words[:2].T.astype(np.int64)).to(self._device)

    def _mask(self, words: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """0 or the scale for each of ``width`` elements of each row: [..., width] for words [..., 2]."""
        low = 0xFFFFFFFF  # 32-bit arithmetic in i64: torch has no unsigned multiplication.
        x = torch.arange(width, device=self._device) * HASH_STEP + words[..., :1] & low
        x = (x ^ x >> 16) * HASH_MULTIPLIERS[0] & low
        x = (x ^ (x >> 15) + words[..., 1:] & low) * HASH_MULTIPLIERS[1] & low
        x = x ^ x >> 16
        return (x >= self._threshold).to(dtype) * self._scale
