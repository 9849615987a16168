"""Training of a reward model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ingot.configs.checks import require
from ingot.configs.lora import LoraConfig
from ingot.configs.training import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(LoraConfig, TrainingConfig):
    """Training of a reward model: a model that answers and people's judgements in, a model that scores answers as they would out."""

    model: str = ""
    """Start from this model: a folder with config.json and model.safetensors, such as a run of ingot sft."""
    data: tuple[str, ...] = ()
    """Judgements, of one sort: ranked lists (of ingot label; those that count) and rows with prompt, chosen and rejected, optionally with
    "margin", "weight", "soft_label" (probability that the chosen one is better); or rows with prompt, completion and label (true: wanted);
    or with prompt, completions (the steps of one answer) and labels (true: right), for a process reward model. Each optionally with
    "criterion". Files .jsonl, .json, each also as .gz or .zst; .parquet."""
    output: str = "runs/reward"
    """The run's folder: model, tokenizer, chat template, checkpoints, metrics, curves and verdict."""
    criteria: tuple[str, ...] = ()
    """A head for each of these criteria, in this order; judgements about others are left out. Those of the data unless given; one
    head for judgements that name none."""
    loss_type: Literal["pairwise", "plackett_luce", "best_of", "rating"] = "pairwise"
    """Of comparisons; labels are always learnt by binary cross-entropy. pairwise: all pairs of a ranking, each prompt's in one step (InstructGPT); plackett_luce: the whole ranking at once; best_of: the
    one that was picked; rating: squared error to the ratings of ranked lists, scaled to mean 0 and standard deviation 1."""
    ties: Literal["drop", "half"] = "drop"
    """What two responses of one rank teach: nothing, or that either is better with probability 0.5 (pairwise only)."""
    center_rewards_coefficient: float = 0.0
    """Pulls the sum of a pair's rewards to 0; 0.01 keeps them near it (pairwise only)."""
    step_separator: str = "\n"
    """What ends a step of an answer in steps: a new line unless given. The step is judged at its last token."""
    train_on_last_step_only: bool = False
    """Of an answer in steps, learn the last label alone; all are still measured on what is held out."""
    head_init: Literal["normal", "zero"] = "normal"
    """New heads: normal with variance 1 / (hidden_size + 1), or zeros."""
    held_out: float = 0.1
    """Share of the prompts kept out of training to judge the result; all judgements of a prompt lie on one side."""
    max_length: int | None = None
    """Leave out rows with a response of more tokens than this, prompt included; what the model is made for unless given. None is cut."""
    pack_length: int | None = None
    """Most tokens of one forward and backward pass: bounds memory and does not change the loss. All responses to a prompt must fit; 4096,
    or what they need, unless given."""
    per_device_train_batch_size: int = 64
    """Prompts of one step, each with all its responses and judgements."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there. Without it, num_train_epochs or max_time decide; 1 epoch where none is given:
    more of them learn the rankings by heart."""
    learning_rate: float = 1e-4
    """Peak learning rate. Networks of a few million weights take 1e-3 to 2e-3, those of billions 1e-5."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors have none."""
    sample_prompts: int = 4
    """Held-out prompts whose responses are recorded with their scores at each evaluation (samples.jsonl)."""
    sample_tokens: int = 100
    """Record the last so many tokens of such a prompt and the first so many of each response; 0 for no records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "pack_length"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name} must be at least 2, got {value}")
        require(len(set(self.criteria)) == len(self.criteria), "criteria names one twice: name each once")
        require(all(self.criteria), "criteria holds an empty name: leave it out")
        require(bool(self.step_separator), "step_separator is empty: give the text that ends a step")
        require(
            self.center_rewards_coefficient >= 0,
            f"center_rewards_coefficient must be 0 or more, got {self.center_rewards_coefficient}",
        )
        for name, neutral in (("ties", "drop"), ("center_rewards_coefficient", 0.0)):
            require(
                self.loss_type == "pairwise" or getattr(self, name) == neutral,
                f"{name} has no effect on loss_type {self.loss_type}: leave it {neutral}",
            )
        require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")
