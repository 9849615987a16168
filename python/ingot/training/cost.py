"""What a run costs, before it starts: a few steps of its own shape, timed on its own batches."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

from ingot.configs import ModelConfig
from ingot.errors import ConfigError

# Of a time budget: left for samples, for the machine's moods, and at most for measuring the held-out loss.
_RESERVED_SHARE = 0.04
_EVALUATION_SHARE = 0.1
_WRITE_BYTES_PER_S = 300e6


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a run's parts on this machine, and its memory."""

    step_s: float
    """One optimizer step."""
    evaluation_s: float
    """One measurement of the held-out loss."""
    save_s: float
    """One checkpoint (estimated from its size)."""
    memory_bytes: int
    """Held at the peak: counted (:mod:`ingot.training.memory`), or what has been held already where that is more."""

    def total_s(self, steps: int, evaluations: int, saves: int) -> float:
        """Seconds of this much of a run."""
        return steps * self.step_s + evaluations * self.evaluation_s + saves * self.save_s


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a few steps on the run's own batches took."""

    step_s: float
    step_tokens: int
    """Targets of a step."""
    evaluation_batch_s: float
    """One batch of the held-out part; 0 where nothing is held out."""
    evaluation_batches: int
    """Batches of the whole held-out part."""


def timed(function: Callable[[], object], budget_s: float) -> float:
    """Mean seconds of a call: one to warm up, then two or more until ``budget_s`` is used; only one where calls are slow."""
    begin = time.perf_counter()
    function()
    first = time.perf_counter() - begin
    times: list[float] = []
    while not times or (time.perf_counter() - begin < budget_s) or (len(times) < 2 and first < 5.0):
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return statistics.fmean(times)


def save_estimate_s(config: ModelConfig) -> float:
    """Seconds of a checkpoint: weights and both moments, written and hashed."""
    return 0.05 + 12.0 * config.num_parameters / _WRITE_BYTES_PER_S


def fit_to_time(
    budget_s: float, step_s: float, save_s: float, evaluation_batch_s: float, evaluation_batches: int
) -> tuple[int, int | None]:
    """Steps that fit into ``budget_s``, beside twelve evaluations and ten checkpoints.

    Returns
    -------
    steps
        At least 1.
    eval_batches
        Where the whole held-out part would take more than a tenth of the time: how much of it to use. Otherwise None.

    Raises
    ------
    ConfigError
        Fewer than ten steps fit.
    """
    budget = budget_s * (1.0 - _RESERVED_SHARE)
    allowed = _EVALUATION_SHARE * budget / 12
    limit = None
    if evaluation_batches * evaluation_batch_s > allowed:
        limit = max(1, int(allowed / evaluation_batch_s))
    used = 12 * evaluation_batch_s * (evaluation_batches if limit is None else limit) + 10 * save_s
    steps = int((budget - used) / step_s)
    if steps < 10:
        raise ConfigError(
            f"only {max(0, steps)} steps of {step_s:.2f} s fit into {budget_s:.0f} s: give --max-time more, or a smaller network"
        )
    return steps, limit
