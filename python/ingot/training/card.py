"""README.md of a run's folder: what the model is and where it comes from, in the form that model hubs read."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def versions() -> dict[str, str]:
    """Versions of what shapes a run's numbers."""
    names = ("ingot", "numpy")
    return {**{name: importlib.metadata.version(name) for name in names}, "python": platform.python_version()}


_INTRODUCTIONS = {
    "pretrain": "A language model trained with `ingot pretrain`. It continues text; it was taught nothing about what is true or wanted.",
    "sft": "A language model fine-tuned on demonstrations with `ingot sft`. It answers in the manner of its examples; "
    "nothing was done to make what it says true or harmless.",
    "dpo": "A language model trained on preferences with `ingot dpo`: of two answers it favours the one that its judges did. "
    "It knows no more than the model that it started from.",
    "ppo": "A language model trained with `ingot ppo` to give answers that a reward likes. It is as good as that reward: "
    "what the reward does not see, nothing was done about.",
    "reward": "A reward model trained on people's rankings with `ingot reward`: it scores answers, higher for those that its judges would "
    "prefer. Scores have mean 0 and standard deviation 1 over answers to its training prompts.",
    "grpo": "A language model trained with `ingot grpo` to give answers that a reward likes, compared with others to the same prompt. "
    "It is as good as that reward: what the reward does not see, nothing was done about.",
    "distill": "A language model trained with `ingot distill` to answer as a better model does. It has its teacher's faults too.",
}
_PIPELINES = {"reward": "text-classification"}


def write_card(facts: Mapping[str, Any], *, step: int, losses: Mapping[str, float | None], num_parameters: int) -> str:
    """The card's text.

    Parameters
    ----------
    facts
        Content of run.json: config, data, model, level.
    losses
        Names for people and values in nats per token; those without a value are left out.
    """
    data, config = facts["data"], facts["config"]
    name = PurePath(str(config["output"])).name or "model"
    measured = [f"| {label} | {value:.4f} |" for label, value in losses.items() if value is not None]
    if facts["kind"] == "pretrain":
        source = {
            "corpus sha256": data["source_hash"],
            "corpus": f"{data['num_bytes']:,} bytes, {data['num_documents']:,} documents, {data['num_tokens']:,} tokens",
            "held out": f"{data['held_out_tokens']:,} tokens; {data['split']}",
        }
    elif "prompts_hash" in data:
        rewards = [config.get("reward_model"), *config.get("reward", ())]
        source = {
            "prompts sha256": data["prompts_hash"],
            "prompts": f"{data['num_rows']:,} rows, {data['num_too_long']:,} of them left out as longer than {data['max_length']} tokens",
            "held out": f"{data['num_held_out']:,} prompts; {data['split']}",
            "rewards": ", ".join(PurePath(str(reward)).name for reward in rewards if reward)
            or "functions of a program",
            "chat template sha256": data["template_hash"],
        }
    else:
        source = {
            "examples sha256": data["examples_hash"],
            "examples": f"{data['num_rows']:,} rows, {data['num_too_long']:,} of them left out as longer than {data['max_length']} tokens",
            "held out": f"{data['num_held_out']:,} rows; {data['split']}",
            "chat template sha256": data["template_hash"],
        }
    lineage = {
        **source,
        "tokenizer hash": data["tokenizer_hash"],
        "started from": config["model"] if isinstance(config.get("model"), str) else "random weights",
        "steps": f"{step:,}",
        "parameters": f"{num_parameters:,}",
        "instruction level": facts.get("level") or "unknown",
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }
    rows = [f"| {label} | {value} |" for label, value in lineage.items()]
    # The card travels with the model: it names the text, not the folders of the machine.
    shown = {key: value for key, value in config.items() if key not in ("output", "cache_dir")}
    for key in ("data", "prompts", "ptx_data"):
        if key in config:
            shown[key] = [PurePath(path).name for path in config[key]]
    settings = json.dumps(shown, indent=1, ensure_ascii=False)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {_PIPELINES.get(facts['kind'], 'text-generation')}",
            "tags:",
            "- ingot",
            "---",
            "",
            f"# {name}",
            "",
            _INTRODUCTIONS[facts["kind"]],
            "",
            _heading(facts),
            "|---|---|",
            *measured,
            "",
            "| lineage | |",
            "|---|---|",
            *rows,
            "",
            "The configuration:",
            "",
            "```json",
            settings,
            "```",
            "",
        ]
    )


def _heading(facts: Mapping[str, Any]) -> str:
    """Of the table of what was measured."""
    if "prompts_hash" in facts["data"]:
        return "| measured on held-out prompts | |"
    return "| losses, nats per judgement | |" if facts["kind"] == "reward" else "| losses, nats per token | |"
