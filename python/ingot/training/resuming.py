"""Going on with a run, whatever phase it is of."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ingot.errors import RunError
from ingot.training.runs import RunFolder
from ingot.training.trainer import TrainingResult

_PHASES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill")
# Where the loop is in a module of another name.
_MODULES = {"reward": "reward_model"}


def resume(folder: str | Path, **options: Any) -> TrainingResult:
    """Go on with a run from its newest whole checkpoint.

    ``options`` are those of the phase: :func:`ingot.training.pretrain.resume`, :func:`ingot.training.sft.resume`,
    :func:`ingot.training.dpo.resume`, :func:`ingot.training.ppo.resume`, :func:`ingot.training.grpo.resume`,
    :func:`ingot.training.distill.resume`.

    Raises
    ------
    RunError
        There is no run in the folder, or one of a phase that this version does not have; and what the phase raises.
    """
    with RunFolder.open(folder) as run:
        kind = run.facts["kind"]
    if kind not in _PHASES:
        raise RunError(f"{folder}: a run of ingot {kind}, which this version does not have: upgrade ingot")
    result: TrainingResult = importlib.import_module(f"ingot.training.{_MODULES.get(kind, kind)}").resume(
        folder, **options
    )
    return result
