"""Packed batches: from tokens to sequences and back.

Shape legend of all losses: N tokens of the batch, S sequences, B pairs, G groups (the K responses to one prompt), k scalar heads.

``offsets`` i64 [S + 1] says where sequences begin and end, ``targets`` i32 [N] which tokens count: those with a target (>= 0).
Index t is the state "tokens up to t", ``targets[t]`` the action taken there, so ``logprobs[t]``, ``values[t]`` and
``advantages[t]`` speak of the same decision, and the last action of a finished sequence is its end-of-sequence token.

A loss of sequences takes their summed log-probabilities l_i and gives dL/dl_i; since l_i is a sum, every counted token of sequence
i gets that same gradient, which :func:`spread` writes out.

Normalizers (``num_tokens``, ``num_pairs``, ...) are those of the whole step, of which this batch may be a part: then losses,
gradients and mean metrics of a step's batches add up to those of the whole, however it is divided (:func:`add_metrics`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.numerics import Bools, Float32, Float64, Floats, Ints, Metrics, f64, require_positive, require_shape


def sequence_ids(offsets: Ints) -> Ints:
    """The sequence that each token belongs to, i64 [N]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def sum_by_sequence(values: Floats, targets: Ints, offsets: Ints) -> Float64:
    """f64 [S]: the sum of ``values`` [N] over the counted tokens of each sequence, for log-probabilities l_i = ln pi(y_i | x_i).

    Summed in f64 and in order of position, so a sequence's sum does not depend on its neighbours.
    """
    require_shape((int(offsets[-1]),), values=values, targets=targets)
    counted = targets >= 0
    return f64(np.bincount(sequence_ids(offsets)[counted], f64(values)[counted], minlength=len(offsets) - 1))


def count_by_sequence(targets: Ints, offsets: Ints) -> Ints:
    """i64 [S]: counted tokens n_i of each sequence."""
    require_shape((int(offsets[-1]),), targets=targets)
    return np.bincount(sequence_ids(offsets)[targets >= 0], minlength=len(offsets) - 1)


def spread(coefficients: Floats, targets: Ints, offsets: Ints) -> Float32:
    """f32 [N]: dL/dl_i of each sequence at each of its counted tokens, 0 at the others. The transpose of :func:`sum_by_sequence`."""
    require_shape((len(offsets) - 1,), coefficients=coefficients)
    return np.where(targets >= 0, f64(coefficients)[sequence_ids(offsets)], 0.0).astype(np.float32)


def mean_weights(relative: Floats | Bools, offsets: Ints, *, reduction: str, total: float = 1.0) -> Float64:
    """Weights w_t of a loss L = sum_t w_t L_t, f64 [N], from what each token counts beside the others (``targets >= 0`` if the same).

    ``reduction`` ``"token_mean"``: relative / total, with ``total`` the sum of ``relative`` over the whole step, so every token
    counts the same; ``"sequence_mean"``: the mean within each sequence / total, with ``total`` the sequences of the step, so every
    sequence does; ``"sum"``: relative / total as it is, total 1.
    """
    require_positive(total=total)
    require_shape((int(offsets[-1]),), relative=relative)
    weights = f64(relative)
    if reduction == "sequence_mean":
        ids = sequence_ids(offsets)
        sums = np.bincount(ids, weights, minlength=len(offsets) - 1)
        weights = np.divide(weights, sums[ids], out=np.zeros_like(weights), where=sums[ids] > 0)
    elif reduction not in ("token_mean", "sum"):
        raise ConfigError(f"reduction must be token_mean, sequence_mean or sum, got {reduction!r}")
    return f64(weights / total)


def last_counted(targets: Ints, offsets: Ints) -> Ints:
    """i64 [S]: index of the last counted token of each sequence, where its score is paid; -1 for a sequence without any."""
    counted = np.flatnonzero(targets >= 0)
    last = np.full(len(offsets) - 1, -1, np.int64)
    last[sequence_ids(offsets)[counted]] = counted  # ascending, so the last assignment stays
    return last


def usable(targets: Ints, *arrays: Floats | None) -> tuple[Bools, Metrics]:
    """Counted tokens where all ``arrays`` [N] are finite, and ``num_dropped``: those that are not.

    A log-probability of -inf or NaN would poison the whole step; its token gives nothing instead, and is counted.
    """
    counted = targets >= 0
    keep = counted.copy()
    for array in arrays:
        if array is not None:
            require_shape(targets.shape, array=array)
            keep &= np.isfinite(array)
    return keep, {"num_dropped": float(np.count_nonzero(counted) - np.count_nonzero(keep))}


def add_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Metrics of a step from those of its batches: sums, except that names with a word ``min`` or ``max`` keep the extreme."""
    total: Metrics = {}
    for part in parts:
        for name, value in part.items():
            words = name.replace("/", "_").split("_")
            if name not in total:
                total[name] = value
            elif "min" in words:
                total[name] = min(total[name], value)
            elif "max" in words:
                total[name] = max(total[name], value)
            else:
                total[name] += value
    return total
