"""A tiny run of a group method in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ingot.configs import GRPOConfig
from ingot.durable import crash_points
from ingot.training.grpo import grpo, resume

REWARDS = '''
def vowels(prompts, completions, want, **columns):
    """Asks for a column, and has nothing to say about some prompts."""
    return [None if letter == "k" else sum(c in "aeiou" for c in text) / 4 for text, letter in zip(completions, want)]


def short(prompts, completions):
    return [1.0 if len(text.encode()) < 3 else 0.0 for text in completions]


def constant(prompts, completions):
    return [0.5] * len(completions)


def share_low(prompts, completions):
    return [sum(byte < 64 for byte in text.encode()) / 4 for text in completions]


def low(prompts, completions):
    return [float(sum(byte < 64 for byte in text.encode()) > 1) for text in completions]
'''
"""A file of reward functions."""


def write_prompts(path: Path, count: int = 40) -> str:
    """Prompts that end with a letter, which is in a column too."""
    rows = [{"prompt": f"{number}: {'rbgwk'[number % 5]}", "want": "rbgwk"[number % 5]} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(folder: Path, **changes: Any) -> GRPOConfig:
    """Resampled groups, two rewards one of which does not always apply, several passes and parts: all that a resume could get wrong."""
    place = folder.parent.parent
    config = GRPOConfig(
        model=str(place / "base"),
        prompts=(str(place / "prompts.jsonl"),),
        reward=(f"{place / 'rewards.py'}:vowels", f"{place / 'rewards.py'}:low"),
        reward_weights=(1.0, 0.5),
        output=str(folder),
        loss_type="dapo",
        num_generations=4,
        per_device_train_batch_size=12,
        max_completion_length=4,
        soft_punish_cache=2,
        zero_std_groups="resample",
        num_iterations=2,
        num_mini_batches=2,
        beta=0.02,
        epsilon=0.02,
        learning_rate=3e-3,
        max_steps=8,
        eval_steps=3,
        save_steps=3,
        logging_steps=1,
        sample_prompts=2,
        held_out=0.2,
        pack_length=64,
        max_sequences=5,
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
        grpo(settings(folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))


def lines_without_time(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics, but for how long things took."""
    lines: Sequence[str] = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
