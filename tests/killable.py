"""A tiny run in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Literal

from ingot.configs import Architecture, PretrainConfig
from ingot.durable import crash_points
from ingot.training.pretrain import pretrain, resume

SEPARATOR = "<|endoftext|>"


def settings(folder: Path) -> PretrainConfig:
    """Dropout, accumulation, documents in packed rows, a tokenizer trained first: everything that a resume could get wrong."""
    return PretrainConfig(
        data=(str(folder.parent / "text.txt"),),
        output=str(folder),
        cache_dir=str(folder.parent / f"{folder.name}-cache"),
        vocab_size=266,
        separator=SEPARATOR,
        architecture=Architecture(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, dropout=0.1
        ),
        max_length=16,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=12,
        eval_steps=4,
        eval_batches=2,
        save_steps=3,
        logging_steps=2,
        sample_tokens=3,
        threads=1,
        seed=5,
    )


def write_text(folder: Path) -> None:
    """Some hundred short documents."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog"]
    documents = [" ".join(words[(i * i + j * (i + 3)) % 10] for j in range(3 + i % 9)) for i in range(120)]
    (folder / "text.txt").write_text(SEPARATOR.join(documents))


def go_on(folder: Path, quiet: bool = True, optim: Literal["adamw", "muon"] = "adamw") -> None:
    """Start the run, or resume it where it has begun."""
    if (folder / "run.json").exists():
        resume(folder, quiet=quiet)
    else:
        pretrain(dataclasses.replace(settings(folder), optim=optim), quiet=quiet)


def child(
    folder: Path,
    kill_at: int | None,
    after_s: float | None,
    log: Path | None,
    optim: Literal["adamw", "muon"] = "adamw",
) -> None:
    """Entry of the process: die at the ``kill_at``-th crash point, or ``after_s`` seconds after the first. ``log`` gets their names.

    The process kills itself: a process id kept elsewhere might by then be another's.
    """
    names: list[str] = []

    def reached(name: str) -> None:
        names.append(name)
        if len(names) == 1 and after_s is not None:
            timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        if kill_at is not None and len(names) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    crash_points.append(reached)
    go_on(folder, optim=optim)
    if log is not None:
        log.write_text("\n".join(names))


def threads_of(config: PretrainConfig, threads: int) -> PretrainConfig:
    """The same run on another number of threads."""
    return dataclasses.replace(config, threads=threads)
