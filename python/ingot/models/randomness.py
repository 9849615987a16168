"""Counter-based random numbers in numpy: the native core's numbers, for backends that are written in Python.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A number is a function of what
it is for (seed, layer, place, sequence, position), never of how many came before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ingot.models.base import FloatArray

WordArray = npt.NDArray[np.uint32]

SITE_EMBEDDING = 1
"""Place of the dropout after the embedding."""
SITE_ATTENTION_RESIDUAL = 2
"""Place of the dropout on what attention adds to the residual stream."""
SITE_MLP_RESIDUAL = 3
"""Place of the dropout on what the MLP adds."""
SITE_SAMPLING = 4
"""Drawing a token."""
SITE_ADAPTER = 0x4000
"""Place of the dropout at the entrance of an adapter: this plus the number of the linear layer within its block."""
SITE_ATTENTION_WEIGHTS = 0x8000
"""Place of the dropout on attention weights: this plus the query head."""

HASH_STEP = 0x9E3779B9
"""Dropout mask: added to the hash per element."""
HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Dropout mask: the two odd multipliers of the hash."""

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_PIECE = 1 << 20


def philox(key: tuple[int, int], counter: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """128 random bits for each counter.

    Parameters
    ----------
    key
        Two 32-bit words.
    counter
        [4, n], each below 2^32.

    Returns
    -------
    [4, n], each below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Two 32-bit factors: the product fits 64 bits.
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(k0),
            second & _MASK,
            (first >> _SHIFT) ^ c3 ^ np.uint64(k1),
            first & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def key_words(
    seed: int, layer: int, site: int, sequence_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> WordArray:
    """128 random bits for each (sequence, position) at one place of the network: [4, n]."""
    sequences = sequence_ids.astype(np.int64).view(np.uint64)
    counter = np.stack(
        [
            positions.astype(np.uint64) & _MASK,
            sequences & _MASK,
            sequences >> _SHIFT,
            np.full(len(positions), layer << 16 | site, dtype=np.uint64),
        ]
    )
    return philox(_words(seed), counter).astype(np.uint32)


def sampling_uniform(seed: int, sequence_id: int, position: int) -> float:
    """The number in [0, 1), with 53 random bits, that draws the token at ``position`` of a sequence."""
    low, high, *_ = key_words(seed, 0, SITE_SAMPLING, np.array([sequence_id]), np.array([position]))[:, 0].tolist()
    return float((high << 32 | low) >> 11) / float(1 << 53)


def normals(seed: int, stream: int, size: int, standard_deviation: float) -> FloatArray:
    """Normal numbers of mean 0: the first ``size`` of stream ``stream`` (Box and Muller's method)."""
    out = np.empty(size, dtype=np.float32)
    # Four numbers come from one block of the generator.
    for first in range(0, size, 4 * _PIECE):
        stop = min(size, first + 4 * _PIECE)
        block = np.arange(first // 4, (stop + 3) // 4, dtype=np.uint64)
        high = np.full_like(block, stream)
        words = philox(_words(seed), np.stack([block & _MASK, block >> _SHIFT, high & _MASK, high >> _SHIFT]))
        radius = np.sqrt(-2.0 * np.log((words[0::2] + 1.0) / 4294967296.0))
        angle = words[1::2] * (2.0 * np.pi / 4294967296.0)
        # [block, pair, 2]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).transpose(1, 0, 2)
        out[first:stop] = (pairs * float(np.float32(standard_deviation))).reshape(-1)[: stop - first]
    return out


def _words(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
