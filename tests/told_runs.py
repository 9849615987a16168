"""Folders of runs as the phases leave them, written by hand: known numbers for the report to tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def write_run(
    folder: Path,
    kind: str,
    *,
    metrics: list[dict[str, Any]] = (),
    samples: list[dict[str, Any]] = (),
    verdict: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    finished: bool = True,
    **facts: Any,
) -> Path:
    """A run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "format_version": 1,
        "kind": kind,
        "finished": finished,
        "config": {"output": str(folder), **(config or {})},
        "decisions": {"max_steps": 200, "eval_steps": 20, "save_steps": 20, "eval_batches": None},
        "level": "avx2",
        "versions": {"ingot": "0.1.0", "numpy": "2.0.0", "python": "3.11.7"},
        "model_config": {"num_hidden_layers": 4, "hidden_size": 128, "vocab_size": 2048},
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if verdict is not None:
        (folder / "verdict.json").write_text(json.dumps({"advice": "", **verdict}))
    return folder


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def sft_lines() -> list[dict[str, Any]]:
    rng = rng_of(1)
    lines: list[dict[str, Any]] = []
    for step in range(201):
        loss = 1.2 + 2.2 * math.exp(-step / 40)
        if step % 2 == 0 and step:
            lines.append(
                {
                    "step": step,
                    "epoch": step / 66,
                    "tokens": 900 * step,
                    "loss": loss + 0.12 * rng.normal(),
                    "mean_token_accuracy": 0.72 - 0.4 * math.exp(-step / 40),
                    "entropy": loss * 0.95,
                    "grad_norm": 1 + rng.random(),
                    "learning_rate": 1e-3 * min(1, step / 10) * (1 - step / 220),
                    "time/elapsed_s": 1.1 * step,
                    "time/tokens_per_s": 4000 + 200 * rng.random(),
                }
            )
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    "eval_loss": loss + 0.05,
                    "eval_mean_token_accuracy": 0.7 - 0.4 * math.exp(-step / 40),
                    "eval_eos_rate": 1 - math.exp(-step / 30),
                }
            )
    return lines


def reward_lines() -> list[dict[str, Any]]:
    rng = rng_of(2)
    lines: list[dict[str, Any]] = []
    for step in range(0, 201, 5):
        share = 1 - math.exp(-step / 60)
        lines.append(
            {
                "step": step,
                "loss": 0.693 - 0.25 * share + 0.03 * rng.normal(),
                "accuracy": 0.5 + 0.27 * share + 0.03 * rng.normal(),
                "margin": 0.9 * share,
                "min_reward": -3 * share,
                "mean_reward": 0.1,
                "max_reward": 3.2 * share,
                "learning_rate": 1e-3 * (1 - step / 220),
                "time/elapsed_s": 0.9 * step,
            }
        )
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    "eval_loss": 0.693 - 0.2 * share,
                    "eval_accuracy": 0.5 + 0.21 * share,
                    "eval_margin": 0.7 * share,
                    "eval_ece": 0.05,
                    "eval_accuracy/helpful": 0.5 + 0.24 * share,
                    "eval_accuracy/harmless": 0.5 + 0.18 * share,
                }
                | {
                    f"eval_accuracy_when_{name}": 0.5 + value * share
                    for name, value in (
                        ("much_shorter", 0.18),
                        ("shorter", 0.2),
                        ("similar", 0.22),
                        ("longer", 0.23),
                        ("much_longer", 0.26),
                    )
                }
            )
    return lines


def dpo_lines() -> list[dict[str, Any]]:
    rng = rng_of(3)
    lines: list[dict[str, Any]] = []
    for step in range(0, 201, 5):
        share = 1 - math.exp(-step / 70)
        lines.append(
            {
                "step": step,
                "loss": 0.693 - 0.3 * share + 0.02 * rng.normal(),
                "rewards/chosen": 0.6 * share - 0.001 * step,
                "rewards/rejected": -0.9 * share - 0.001 * step,
                "rewards/margins": 1.5 * share,
                "rewards/accuracies": 0.5 + 0.3 * share,
                "logps/chosen": -40 - 9 * share,
                "logps/rejected": -44 - 25 * share,
                "learning_rate": 1e-4,
                "time/elapsed_s": 1.4 * step,
            }
        )
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    "eval_loss": 0.693 - 0.25 * share,
                    "eval_rewards/chosen": 0.5 * share - 0.001 * step,
                    "eval_rewards/rejected": -0.8 * share,
                    "eval_rewards/margins": 1.3 * share,
                    "eval_rewards/accuracies": 0.5 + 0.24 * share,
                    "eval_logps/chosen": -41 - 10 * share,
                    "eval_logps/rejected": -44 - 22 * share,
                    "eval_kl": 6 * share,
                    "eval_eos_rate": 0.99,
                }
            )
    return lines


def ppo_lines() -> list[dict[str, Any]]:
    """Over-optimisation: the proxy climbs, gold turns around at about step 120."""
    rng = rng_of(4)
    lines: list[dict[str, Any]] = []
    for step in range(1, 201):
        share = 1 - math.exp(-step / 60)
        kl = 14 * share
        gold = 0.2 + 2.2 * share - max(0.0, (step - 110) / 60)
        line = {
            "step": step,
            "episode": 64 * step,
            "objective/scores": 2.6 * share + 0.12 * rng.normal(),
            "objective/scores_std": 1 - 0.5 * share,
            "objective/scores_min": -2.0,
            "objective/scores_max": 3.5,
            "objective/judge": 0.1 + 1.6 * share - max(0.0, (step - 130) / 120) + 0.1 * rng.normal(),
            "objective/gold": gold + 0.1 * rng.normal(),
            "objective/kl": kl + 0.3 * rng.normal(),
            "objective/kl_k3": kl * 1.02,
            "objective/entropy": 60 * math.exp(-step / 90),
            "objective/non_score_reward": -0.05 * kl,
            "objective/rlhf_reward": 2.6 * share - 0.05 * kl,
            "policy/approxkl_avg": 0.01 + 0.004 * rng.random(),
            "policy/clipfrac_avg": 0.12 + 0.03 * rng.random(),
            "policy/clipfrac_low": 0.05,
            "policy/clipfrac_high": 0.07,
            "loss/policy_avg": -0.02,
            "loss/value_avg": 0.6 * math.exp(-step / 40) + 0.1,
            "val/ratio": 1.0,
            "val/explained_variance": 0.7 * share - 0.1,
            "completions/mean_length": 28 + 22 * share,
            "completions/mean_terminated_length": 27 + 21 * share,
            "completions/clipped_ratio": 0.02,
            "completions/eos_rate": 0.98,
            "completions/distinct_2": 0.6 - 0.35 * share,
            "completions/repetition": 0.05 + 0.2 * share,
            "objective/score_length_correlation": 0.6 * share,
            "objective/kl_coef": 0.05,
            "grad_norm": 1 + rng.random(),
            "learning_rate": 1e-4 * (1 - step / 200),
            "time/elapsed_s": 3.6 * step,
            "time/tokens_per_s": 3000.0,
        }
        lines.append(line)
        if step in (130, 171):
            name = "over-optimisation" if step == 130 else "collapse"
            message = (
                "over 5 updates objective/scores rose from 2.28 to 2.31 while objective/gold fell from 1.99 to 1.87: the answers please the scorer and not its purpose; restore the checkpoint of the best gold"
                if step == 130
                else "objective/entropy fell from 59.3 to 8.99, below 20 % of its start: the model says the same thing always; raise kl_coef or ent_coef"
            )
            lines.append({"step": step, "alarm": name, "message": message})
    return lines


def grpo_lines() -> list[dict[str, Any]]:
    rng = rng_of(5)
    lines: list[dict[str, Any]] = []
    for step in range(1, 101):
        share = 1 - math.exp(-step / 40)
        lines.append(
            {
                "step": step,
                "reward": 0.2 + 0.5 * share + 0.05 * rng.normal(),
                "reward_std": 0.4 - 0.2 * share,
                "frac_reward_zero_std": 0.1 + 0.4 * share,
                "rewards/format/mean": 0.5 + 0.4 * share,
                "rewards/right/mean": 0.05 + 0.1 * share,
                "kl": 0.1 * share,
                "entropy": 2.0 - share,
                "completions/mean_length": 60 + rng.normal(),
                "completions/clipped_ratio": 0.1,
                "clip_ratio/region_mean": 0.1,
                "clip_ratio/low_mean": 0.04,
                "clip_ratio/high_mean": 0.06,
                "loss": 0.01 * rng.normal(),
                "learning_rate": 1e-4,
                "time/elapsed_s": 5.0 * step,
            }
        )
    return lines


def samples_of(steps: tuple[int, ...], prompts: tuple[str, ...], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": prompt,
            "completion": f"At step {step} I say: the {('cat', 'dog', 'fox')[number % 3]} went home, and all was well.",
            "ended": step > 0,
            **more,
        }
        for step in steps
        for number, prompt in enumerate(prompts)
    ]
