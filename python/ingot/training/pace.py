"""How fast a run goes: measured times of its parts, hence tokens per second, share of the machine's peak, and time to the end."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import psutil

from ingot.training.cost import Cost
from ingot.training.decisions import Decisions
from ingot.training.progress import Status

if TYPE_CHECKING:
    from ingot.models.base import Model

# Weight of the newest step in the smoothed time.
_SMOOTHING = 0.1
# Asking the system for the memory in use takes as long as a tiny step.
_MEMORY_EVERY_S = 0.5


class Pace:
    """Starts from the estimates of ``cost`` and replaces them by what it is told.

    ``elapsed_s`` is the time that earlier processes of the same run took.
    """

    def __init__(self, cost: Cost, decisions: Decisions, model: Model, max_length: int, elapsed_s: float) -> None:
        self._cost = cost
        self._decisions = decisions
        self._flops_per_token = model.flops_per_token(max_length)
        self._peak_flops = _peak_flops(model)
        self._process = psutil.Process()
        self._began_s = time.perf_counter() - elapsed_s
        self._tokens_per_s = 0.0
        self._memory_bytes = 0
        self._memory_asked_s = -math.inf

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run so far."""
        return time.perf_counter() - self._began_s

    def step_took(self, seconds: float, tokens: int) -> None:
        """A step is done; its times are smoothed over about ten steps."""
        smoothed = self._cost.step_s + _SMOOTHING * (seconds - self._cost.step_s)
        self._cost = dataclasses.replace(self._cost, step_s=smoothed)
        self._tokens_per_s = tokens / smoothed

    def evaluation_took(self, seconds: float) -> None:
        """The held-out loss was measured."""
        self._cost = dataclasses.replace(self._cost, evaluation_s=seconds)

    def save_took(self, seconds: float) -> None:
        """A checkpoint was saved."""
        self._cost = dataclasses.replace(self._cost, save_s=seconds)

    def metrics(self) -> dict[str, Any]:
        """For a line of metrics.jsonl; the names say that they are no function of settings and data."""
        return {
            "time/elapsed_s": self.elapsed_s,
            "time/tokens_per_s": self._tokens_per_s,
            "time/share_of_peak": self._share_of_peak(),
            "time/memory_bytes": self._memory(),
        }

    def status(self, step: int, loss: float | None, eval_loss: float | None) -> Status:
        """For the display."""
        remaining = self._decisions.max_steps - step
        evaluations = -(-remaining // self._decisions.eval_steps)
        saves = -(-remaining // self._decisions.save_steps)
        return Status(
            step=step,
            loss=loss,
            eval_loss=eval_loss,
            tokens_per_s=self._tokens_per_s,
            share_of_peak=self._share_of_peak(),
            memory_bytes=self._memory(),
            eta_s=self._cost.total_s(remaining, evaluations, saves),
        )

    def _memory(self) -> int:
        now = time.perf_counter()
        if now - self._memory_asked_s >= _MEMORY_EVERY_S:
            self._memory_bytes, self._memory_asked_s = int(self._process.memory_info().rss), now
        return self._memory_bytes

    def _share_of_peak(self) -> float | None:
        if self._peak_flops is None:
            return None
        return self._tokens_per_s * self._flops_per_token / self._peak_flops


def _peak_flops(model: Model) -> float | None:
    """Measured f32 operations per second of this machine, for the native backend."""
    if model.backend != "native":
        return None
    from ingot import _native

    return float(_native.measured_peak(model.threads)["gflops"]) * 1e9
