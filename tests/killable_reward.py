"""A tiny reward model's run in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

from ingot.configs import ModelConfig, RewardConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.durable import crash_points
from ingot.models import Model
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.companions import write_tokenizer_config
from ingot.training.reward_model import resume, train_reward_model

WORDS = ("aa", "ab", "bb", "ba b", "b", "aab")


def write_policy(folder: Path, **shape: object) -> Path:
    """A model directory that can be talked to: bytes, the built-in template, random weights."""
    template = ChatTemplate.built_in()
    tokenizer = Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
    tokenizer = tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer))
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    fields |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 96, **shape}
    Model(ModelConfig.llama(**fields), seed=3).save(folder)  # type: ignore[arg-type]
    tokenizer.save(folder)
    write_tokenizer_config(folder, tokenizer, encoder=ChatEncoder(template, tokenizer))
    return folder


def worth(word: str) -> int:
    """The rule of these tests: the more of the letter a, the better."""
    return word.count("a")


def ranks_of(words: list[str], sign: int = 1) -> list[int]:
    levels = sorted({sign * worth(word) for word in words}, reverse=True)
    return [levels.index(sign * worth(word)) + 1 for word in words]


def rows(count: int = 60, criteria: tuple[str | None, ...] = (None,)) -> list[dict[str, Any]]:
    """Ranked lists of three responses; the second criterion turns the order round."""
    made = []
    lists = list(itertools.permutations(WORDS, 3))
    for number, (criterion, sign) in itertools.product(range(count), zip(criteria, (1, -1), strict=False)):
        words = list(lists[number * 7 % len(lists)])
        prompt = [{"role": "user", "content": f"{number}?"}]
        row = {"prompt": prompt, "responses": words, "ranks": ranks_of(words, sign)}
        made.append(row if criterion is None else {**row, "criterion": criterion})
    return made


def labelled_rows(
    count: int, criteria: tuple[str | None, ...] = (None,), *, in_steps: bool = False
) -> list[dict[str, Any]]:
    """Words, or answers of one to three words as steps, each wanted where it begins with the letter a (of the second criterion: not)."""
    made = []
    for number, (criterion, wanted) in itertools.product(range(count), zip(criteria, (True, False), strict=False)):
        words = [WORDS[(number * 5 + place) % len(WORDS)] for place in range(number % 3 + 1 if in_steps else 1)]
        labels = [word.startswith("a") is wanted for word in words]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"{number}?"}]}
        row |= {"completions": words, "labels": labels} if in_steps else {"completion": words[0], "label": labels[0]}
        made.append(row if criterion is None else {**row, "criterion": criterion})
    return made


def settings(folder: Path, **changes: Any) -> RewardConfig:
    """Two heads, ties, several packs a step, an end inside an epoch: everything that a resume could get wrong."""
    config = RewardConfig(
        model=str(folder.parent.parent / "policy"),
        data=tuple(str(folder.parent.parent / name) for name in ("a.jsonl", "b.jsonl")),
        output=str(folder),
        ties="half",
        center_rewards_coefficient=0.01,
        pack_length=256,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        max_steps=10,
        eval_steps=4,
        save_steps=3,
        logging_steps=2,
        threads=1,
        seed=5,
    )
    return dataclasses.replace(config, **changes)


def child(folder: Path, kill_at: int | str | None, log: Path | None, **changes: Any) -> None:
    """Entry of the process: start or resume; die at the ``kill_at``-th crash point, or at the first so named. ``log`` gets their names."""
    names: list[str] = []

    def reached(name: str) -> None:
        names.append(name)
        if len(names) - 1 == kill_at or (isinstance(kill_at, str) and name.startswith(kill_at)):
            os.kill(os.getpid(), signal.SIGKILL)

    crash_points.append(reached)
    if (folder / "run.json").exists():
        resume(folder, quiet=True)
    else:
        train_reward_model(settings(folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))
