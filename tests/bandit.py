"""A task whose best policy is known: eight steps of eight letters, and each letter that the prompt asks for is worth 1.

The reference is uniform, so that the optimum of reward - beta KL takes the wanted letter with p = e^(1/beta) / (e^(1/beta) + 7) at every
step: at beta = .5 the reward is 4.108, the KL 3.520 and the objective 2.348.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.models.reference import reference_of
from ingot.models.sharing import SharedBase
from ingot.tokenizer import Tokenizer
from ingot.training.memory import Held
from ingot.training.prompts import Prompt, Prompts
from ingot.training.scores import Scores
from ingot.training.setup import Setup

LETTERS, STEPS, PROMPTS = 8, 8, 4
BETA = 0.5
REWARD, KL, OBJECTIVE = 4.108, 3.520, 2.348

SHAPE = ingot.ModelConfig.gpt2(
    vocab_size=LETTERS + PROMPTS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=STEPS + 1,
    tie_word_embeddings=False,
)


class Letters:
    """Stands for the encoder: a prompt is one id beyond the letters, and nothing ends an answer but its length."""

    tokenizer = Tokenizer.bytes_only()
    chat = None
    end_ids: frozenset[int] = frozenset()

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + int(each)) for each in ids)


def hits(experience_rollouts: Any) -> np.ndarray:
    """How many letters of each episode are those that its prompt asks for, f64 [S]."""
    rollouts = experience_rollouts
    wanted = rollouts.tokens[rollouts.offsets[:-1]] - LETTERS
    return np.array([float((rollouts.completion_ids(n) == wanted[n]).sum()) for n in range(len(rollouts))])


def scorer(score: Any, gold: Any = None) -> Any:
    """Stands for the rewards: ``score`` and ``gold`` are functions of rollouts."""

    class Watching:
        has_judge, has_gold = False, gold is not None
        watcher, name = None, "score"

        def __call__(self, rollouts: Any, prompts: Any, texts: Any) -> Scores:
            found = np.asarray(score(rollouts), np.float64)
            return Scores(found, {"score": found}, None, None if gold is None else gold(rollouts))

    return Watching()


def uniform_policy(seed: int, num_values: int = 0) -> Any:
    """A network whose head is 0."""
    model = ingot.Model(SHAPE, seed=seed, num_values=num_values, threads=1)
    model.parameters["lm_head.weight"][...] = 0.0
    for name in ("score.weight", "score.bias"):
        if num_values:
            model.parameters[name][...] = 0.0
    return model


def setup(seed: int, *, num_values: int = 0, score: Any = hits, gold: Any = None, policy: Any = None) -> Setup:
    """What a run starts with."""
    policy = uniform_policy(seed, num_values) if policy is None else policy
    prompts = tuple(Prompt(chr(65 + n), np.array([LETTERS + n], np.int32), {}) for n in range(PROMPTS))
    facts = {"num_train": PROMPTS, "num_held_out": 0, "num_rows": PROMPTS, "num_too_long": 0, "max_length": 1}
    facts |= dict.fromkeys(("prompts_hash", "tokenizer_hash", "template_hash", "model_hash", "split"), "")
    return Setup(
        policy=policy,
        reference=reference_of(policy),
        base=SharedBase(policy, "the uniform policy"),
        encoder=Letters(),  # type: ignore[arg-type]
        prompts=Prompts(prompts, (), facts, seed),
        scorers=scorer(score, gold),
        banned_ids=np.arange(LETTERS, LETTERS + PROMPTS, dtype=np.int32),
        max_new_tokens=STEPS,
        temperature=1.0,
        max_sequences=64,
        pack_length=4096,
        facts=facts,
        held=(Held(SHAPE, num_trained=SHAPE.num_parameters),),
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates(folder: Path) -> list[dict[str, Any]]:
    """Those about training."""
    return [line for line in lines(folder) if "loss" in line]


def last_means(lines: list[dict[str, Any]], *names: str, count: int = 10) -> list[float]:
    """Means over the last updates."""
    return [float(np.mean([line[name] for line in lines[-count:]])) for name in names]
