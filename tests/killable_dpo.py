"""A tiny run on preferences in a process of its own, for tests that end it by force."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from ingot.configs import DPOConfig, ModelConfig
from ingot.data.chat import ChatTemplate
from ingot.durable import crash_points
from ingot.models import Model
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.companions import write_tokenizer_config
from ingot.training.dpo import dpo, resume


def write_chat_model(folder: Path, seed: int = 3, **shape: Any) -> Path:
    """A model directory as fine-tuning leaves it: bytes, the built-in template and its tokens, random weights."""
    from ingot.data.chat import ChatEncoder

    template = ChatTemplate.built_in()
    base = Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
    tokenizer = base.with_special_tokens(template.missing_special_tokens(base))
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 96, **shape}
    Model(ModelConfig.llama(**config), seed=seed).save(folder)
    tokenizer.save(folder)
    write_tokenizer_config(folder, tokenizer, encoder=ChatEncoder(template, tokenizer))
    return folder


def pairs(count: int = 60) -> list[dict[str, Any]]:
    """Of two answers to a number, the one in capitals is preferred."""
    letters = "abcde"
    return [
        {
            "prompt": [{"role": "user", "content": f"{number}?"}],
            "chosen": letters[number % 5].upper() * (1 + number % 3),
            "rejected": letters[number % 4],
        }
        for number in range(count)
    ]


def rankings(count: int = 20) -> list[dict[str, Any]]:
    """Three answers, two of them tied behind the one in capitals."""
    return [
        {
            "prompt": [{"role": "user", "content": f"which, {number}?"}],
            "responses": ["b", "A", "c"],
            "ranks": [2, 1, 2],
        }
        for number in range(count)
    ]


def verdicts(count: int = 60) -> list[dict[str, Any]]:
    """Single answers: capitals are good."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{number}?"}],
            "completion": ("A" if number % 2 else "b") * (1 + number % 3),
            "label": bool(number % 2),
        }
        for number in range(count)
    ]


def write_rows(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def settings(folder: Path, **changes: Any) -> DPOConfig:
    """Two files of two kinds, several packs a step, an end inside an epoch, a loss in two parts: all that a resume could get wrong."""
    fields: dict[str, Any] = {
        "model": str(folder.parent.parent / "base"),
        "data": tuple(str(folder.parent.parent / name) for name in ("pairs.jsonl", "ranked.jsonl")),
        "output": str(folder),
        "loss_type": ("sigmoid", "sft"),
        "loss_weights": (1.0, 0.1),
        "pack_length": 256,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "max_steps": 10,
        "eval_steps": 4,
        "save_steps": 3,
        "logging_steps": 2,
        "sample_prompts": 2,
        "sample_tokens": 3,
        "threads": 1,
        "seed": 5,
    }
    return DPOConfig(**{**fields, **changes})


def child(folder: Path, kill_at: int | None, log: Path | None, changes: dict[str, Any]) -> None:
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
        dpo(settings(folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))
