"""Learning rates as pure functions of the step.

Steps count from 0; step ``total_steps`` would be the first after the run. Warm-up rises linearly, (step + 1) / warmup of the peak.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "linear", "constant"]


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_ratio: float = 0.2,
) -> float:
    """Learning rate of ``step``.

    Parameters
    ----------
    schedule
        ``cosine``: half a cosine from the peak to the floor (Loshchilov and Hutter 2017, eq. 5, without restarts).
        ``linear``: a straight line to the floor.
        ``wsd``: the peak until the last ``decay_ratio`` of the steps, then 1 - sqrt(progress) down to the floor
        (Haegele et al. 2024, arXiv 2405.18392, section 3).
        ``constant``: the peak.
    min_ratio
        The floor as a share of the peak; it would be reached at step ``total_steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    floor = peak * min_ratio
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        decay_steps = max(1, round(decay_ratio * total_steps))
        begin = max(warmup_steps, total_steps - decay_steps)
        if step < begin:
            return peak
        return floor + (peak - floor) * (1.0 - math.sqrt(_progress(step, begin, total_steps)))
    progress = _progress(step, warmup_steps, total_steps)
    if schedule == "linear":
        return floor + (peak - floor) * (1.0 - progress)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def resolve_warmup(warmup_steps: int | None, warmup_ratio: float, total_steps: int) -> int:
    """Steps of warm-up: those given, or the share of all steps; never more than the run has."""
    wanted = round(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps
    return min(wanted, total_steps)


def _progress(step: int, begin: int, end: int) -> float:
    return min(1.0, (step - begin) / max(1, end - begin))
