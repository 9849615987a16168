"""What a phase of training prints for a program: one JSON line, with the same names whatever the phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.training.trainer import TrainingResult


def print_outcome(result: TrainingResult, *, losses: bool = True) -> None:
    """Where the run is, how far it went and what its verdict is; of a dry run the plan.

    Parameters
    ----------
    losses
        Whether the phase is one that lowers a held-out loss.
    """
    last = [line for line in result.history if "loss" in line]
    facts: dict[str, Any] = {"output": str(result.output), "steps": last[-1]["step"] if last else 0}
    if losses:
        facts |= {"best_loss": result.best_loss, "final_loss": result.final_loss}
        facts["num_parameters"] = result.model.num_parameters
    else:
        # Without the critic's head, if the policy has one.
        facts["num_parameters"] = result.model.config.num_parameters
    facts |= _verdict_facts(result.output) if result.plan is None else result.plan
    print(json.dumps(facts))


def _verdict_facts(folder: Path) -> dict[str, Any]:
    """Nothing is known of a run without one."""
    from ingot.training.verdicts import read_verdict

    verdict = read_verdict(folder)
    if verdict is None:
        return {"passed": None, "verdict": None, "figures": {}}
    return {"passed": verdict.passed, "verdict": verdict.text, "figures": dict(verdict.figures)}
