"""A tiny distillation in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from ingot.configs import DistillConfig
from ingot.durable import crash_points
from ingot.training.distill import distill, resume


def settings(folder: Path, **changes: Any) -> DistillConfig:
    """Both kinds of steps, an end inside a pass, several packs a step."""
    place = folder.parent.parent
    config = DistillConfig(
        model=str(place / "student"),
        teacher=str(place / "teacher"),
        data=(str(place / "prompts.jsonl"),),
        output=str(folder),
        lmbda=0.5,
        max_new_tokens=5,
        pack_length=100,
        per_device_train_batch_size=7,
        learning_rate=1e-2,
        held_out=0.2,
        max_steps=10,
        eval_steps=4,
        save_steps=3,
        logging_steps=1,
        sample_prompts=2,
        threads=1,
        seed=5,
    )
    return dataclasses.replace(config, **changes)


def child(folder: Path, kill_at: int | None, log: Path | None, **changes: Any) -> None:
    """Entry of the process: start or resume; die at the ``kill_at``-th crash point. ``log`` gets their names."""
    names: list[str] = []

    def reached(name: str) -> None:
        names.append(name)
        if kill_at is not None and len(names) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    crash_points.append(reached)
    if (folder / "run.json").exists():
        resume(folder, quiet=True)
    else:
        distill(settings(folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))
