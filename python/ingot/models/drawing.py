"""Drawing the next token from a row of scores: the native core's rule in numpy.

The scores are the logits divided by the temperature, banned ids at -inf. Then, in transformers' order: repetition penalty (Keskar et
al. 2019, "CTRL", section 4.1), top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). What is left is
drawn from by the inverse of its cumulative distribution, in the order of the ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.models.base import Sampling


def draw(scores: npt.NDArray[Any], previous: npt.NDArray[np.int32], sampling: Sampling, uniform: float) -> int:
    """The token at ``uniform`` in [0, 1).

    Parameters
    ----------
    scores
        [V], at least one finite and none NaN.
    previous
        The sequence's tokens, for the repetition penalty.
    """
    scores = _penalize(scores, previous, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(np.argmax(scores))
    weights = np.exp(scores - scores.max())
    ids = np.flatnonzero(weights > 0.0)
    # Likeliest first, the lower id first where two are equal.
    if 0 < sampling.top_k < len(ids):
        ids = np.sort(ids[np.argsort(-weights[ids], kind="stable")[: sampling.top_k]])
    if sampling.top_p < 1.0:
        ranked = ids[np.argsort(-weights[ids], kind="stable")]
        sums = np.cumsum(weights[ranked], dtype=np.float64)
        total = weights[ids].sum(dtype=np.float64)
        reached = int(np.searchsorted(sums, float(np.float32(sampling.top_p)) * total))
        ids = np.sort(ranked[: reached + 1])
    if sampling.min_p > 0.0:
        ids = ids[weights[ids] >= np.float32(sampling.min_p)]
    sums = np.cumsum(weights[ids], dtype=np.float64)
    picked = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return int(ids[min(picked, len(ids) - 1)])


def _penalize(scores: npt.NDArray[Any], previous: npt.NDArray[np.int32], penalty: float) -> npt.NDArray[Any]:
    if penalty == 1.0:
        return scores
    seen = np.unique(previous)
    factor = scores.dtype.type(penalty)
    penalized = scores.copy()
    penalized[seen] = np.where(scores[seen] > 0.0, scores[seen] / factor, scores[seen] * factor)
    return penalized
