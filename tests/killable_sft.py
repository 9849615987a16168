"""A tiny fine-tuning run in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

from ingot.configs import ModelConfig, SFTConfig
from ingot.durable import crash_points
from ingot.models import Model
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.sft import resume, sft

WORDS = ("r", "b", "g", "w", "k")


def write_base(folder: Path, **shape: object) -> Path:
    """A model directory that knows no chat: bytes, an end of text, random weights."""
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
    config |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 96, **shape}
    Model(ModelConfig.llama(**config), seed=3).save(folder)
    tokenizer.save(folder)
    return folder


def rows(count: int = 60) -> list[dict[str, object]]:
    """What is asked ends with a letter, and the answer is that letter."""
    asked = [(f"{number}: {WORDS[number % 5]}", WORDS[number % 5]) for number in range(count)]
    return [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in asked
    ]


def write_rows(path: Path, entries: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def settings(folder: Path, **changes: object) -> SFTConfig:
    """Dropout, two files, several packs a step, an end inside an epoch: everything that a resume could get wrong."""
    config = SFTConfig(
        model=str(folder.parent.parent / "base"),
        data=tuple(str(folder.parent.parent / name) for name in ("a.jsonl", "b.jsonl")),
        output=str(folder),
        pack_length=128,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        dropout=0.1,
        prompt_weight=0.1,
        max_steps=10,
        eval_steps=4,
        save_steps=3,
        logging_steps=2,
        sample_prompts=2,
        sample_tokens=3,
        threads=1,
        seed=5,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def child(folder: Path, kill_at: int | None, log: Path | None, **changes: object) -> None:
    """Entry of the process: start or resume; die at the ``kill_at``-th crash point. ``log`` gets their names.

    ``changes`` are settings of the run.
    """
    names: list[str] = []

    def reached(name: str) -> None:
        names.append(name)
        if kill_at is not None and len(names) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    crash_points.append(reached)
    if (folder / "run.json").exists():
        resume(folder, quiet=True)
    else:
        sft(settings(folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))
