"""A tiny run of PPO in a process of its own, for tests that end it by force."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

from ingot.configs import ModelConfig, PPOConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.durable import crash_points
from ingot.inference.scoring import RewardModel
from ingot.models import Model
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.companions import write_tokenizer_config
from ingot.training.ppo import ppo, resume

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def chat_encoder() -> ChatEncoder:
    """Bytes, and the tokens of the built-in template."""
    template, tokenizer = ChatTemplate.built_in(), Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
    return ChatEncoder(template, tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer)))


def shape_of(encoder: ChatEncoder, **shape: Any) -> ModelConfig:
    fields = {**SHAPE, "vocab_size": encoder.tokenizer.vocab_size, "max_position_embeddings": 64, **shape}
    return ModelConfig.llama(**fields)


def write_companions(folder: Path, encoder: ChatEncoder) -> None:
    encoder.tokenizer.save(folder)
    write_tokenizer_config(folder, encoder.tokenizer, 64, encoder)


def write_policy(folder: Path, **shape: Any) -> Path:
    """A model that answers, with random weights."""
    encoder = chat_encoder()
    Model(shape_of(encoder, **shape), seed=3).save(folder)
    write_companions(folder, encoder)
    return folder


def write_reward_model(folder: Path, seed: int = 4, **shape: Any) -> Path:
    """A model that scores, with random weights."""
    encoder = chat_encoder()
    RewardModel(Model(shape_of(encoder, **shape), seed=seed, num_values=1), encoder).save(folder)
    write_companions(folder, encoder)
    return folder


def prompt_rows(count: int = 40) -> list[dict[str, Any]]:
    """Questions to answer, each with a column of its own."""
    return [{"prompt": [{"role": "user", "content": f"{n}?"}], "wanted": "abcd"[n % 4]} for n in range(count)]


def write_inputs(root: Path) -> None:
    """All that a run reads."""
    write_policy(root / "base")
    write_reward_model(root / "rm")
    write_reward_model(root / "judge", seed=5)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows()))
    (root / "text.txt").write_text("|".join(f"{n} and {n + 1}" for n in range(300)))
    (root / "reward.py").write_text(
        "def letters(completions, wanted, **_):\n"
        "    return [c[0]['content'].count(w) / 2 for c, w in zip(completions, wanted)]\n"
        "def gold(completions, **_):\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )


def settings(root: Path, folder: Path, **changes: Any) -> PPOConfig:
    """Everything that a resume could get wrong: a moving KL coefficient, minibatches, pretraining text, a judge and gold."""
    config = PPOConfig(
        model=str(root / "base"),
        prompts=(str(root / "prompts.jsonl"),),
        reward_model=str(root / "rm"),
        reward=(f"{root / 'reward.py'}:letters",),
        reward_weights=(0.5, 1.0),
        judge=str(root / "judge"),
        gold=f"{root / 'reward.py'}:gold",
        gate_answers=0,
        output=str(folder),
        response_length=6,
        per_device_train_batch_size=6,
        num_ppo_epochs=2,
        num_mini_batches=2,
        learning_rate=1e-2,
        kl_target=0.5,
        kl_horizon=100.0,
        ent_coef=0.01,
        lam=0.95,
        ptx_data=(str(root / "text.txt"),),
        separator="|",
        ptx_batch_size=2,
        ptx_length=16,
        ptx_coef=0.1,
        cache_dir=str(folder.parent / "cache"),
        held_out=0.2,
        max_steps=7,
        eval_steps=3,
        save_steps=2,
        sample_prompts=2,
        pack_length=96,
        threads=1,
        seed=5,
    )
    return dataclasses.replace(config, **changes)


def child(root: Path, folder: Path, changes: dict[str, Any], kill_at: int | None, log: Path | None) -> None:
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
        ppo(settings(root, folder, **changes), quiet=True)
    if log is not None:
        log.write_text("\n".join(names))
