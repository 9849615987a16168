"""What a run costs in time and memory, before it starts: a few steps of its own shape, timed on its own batches."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

from ingot.configs import ModelConfig
from ingot.errors import ConfigError, RunError

# A started process, its libraries and the batch itself.
_BASE_BYTES = 150_000_000
# Of a time budget: left for samples, for the machine's moods, and at most for measuring the held-out loss.
_RESERVED_SHARE = 0.04
_EVALUATION_SHARE = 0.1
_WRITE_BYTES_PER_S = 300e6


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a run's parts on this machine."""

    step_s: float
    """One optimizer step."""
    evaluation_s: float
    """One measurement of the held-out loss."""
    save_s: float
    """One checkpoint (estimated from its size)."""

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


def memory_estimate(config: ModelConfig, batch_tokens: int, num_trained: int | None = None) -> float:
    """Bytes for weights, gradients, moments and the activations of one batch, from shapes alone.

    With ``num_trained``, an adapter of so many parameters is trained and the weights below it are not.

    Kept per token and layer are the residual stream twice, queries, keys, values, the attention's output and the MLP's inner layer.
    """
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads or 0
    inner = (2 if config.activation == "swiglu" else 1) * (config.intermediate_size or 0)
    kept = 2 * config.hidden_size + (2 * heads + 2 * key_value_heads) * (config.head_dim or 0) + inner
    trained = 16.0 * config.num_parameters if num_trained is None else 4.0 * config.num_parameters + 16.0 * num_trained
    return _BASE_BYTES + trained + 4.0 * batch_tokens * kept * config.num_hidden_layers


def require_memory(config: ModelConfig, batch_tokens: int, limit: int, num_trained: int | None = None) -> None:
    """Refuse a run that cannot fit.

    Raises
    ------
    RunError
        It needs more than ``limit`` bytes.
    """
    needed = memory_estimate(config, batch_tokens, num_trained)
    if needed > limit:
        raise RunError(
            f"this run needs about {needed / 1e9:.1f} GB of memory and {limit / 1e9:.1f} GB are there: lower "
            "--per-device-train-batch-size (with more --gradient-accumulation-steps), --max-length or the network's size"
        )


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
