"""Distillation: learning from a better model."""

from __future__ import annotations

import dataclasses
import math

from ingot.configs.checks import require
from ingot.configs.lora import LoraConfig
from ingot.configs.training import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(LoraConfig, TrainingConfig):
    """Distillation: a model that answers, a better one and prompts in, a model that answers more like the better one out."""

    model: str = ""
    """Start from this model, the student: a folder such as a run of ingot sft."""
    teacher: str = ""
    """Learn from this model: a folder with the same tokenizer."""
    data: tuple[str, ...] = ()
    """Prompts: files of rows with a "prompt", text or messages (.jsonl, .json, each also as .gz or .zst; .parquet)."""
    output: str = "runs/distill"
    """The run's folder: model, tokenizer, chat template, checkpoints, metrics, curves and verdict."""
    lmbda: float = 1.0
    """Share of the steps in which the student answers and the teacher says of each token how likely it is to it; in the others the
    teacher answers and the student learns its words. 1: on-policy, 0: sequence-level."""
    beta: float | None = None
    """Compare the two models' whole distributions at each token of an answer, whoever wrote it, instead of looking at its own token alone: 0 for KL(teacher || student), 1 for KL(student || teacher), between them the generalized Jensen-Shannon divergence (GKD's beta). Far less noise, for time that grows with the vocabulary. None for the answer's own tokens."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Of both models, in sampling and in training alike."""
    held_out: float = 0.1
    """Share of the prompts kept out of training, on which the two models are compared."""
    eval_batches: int | None = 2
    """Measure on this many times per_device_train_batch_size held-out prompts; on all of them where None."""
    max_prompt_length: int | None = None
    """Leave out prompts of more tokens; what the model's context leaves beside the longest answer unless given. None is cut."""
    pack_length: int | None = None
    """Most tokens of one forward and backward pass: bounds memory and does not change the loss. At least an answer with its prompt; 4096
    unless given."""
    per_device_train_batch_size: int = 64
    """Prompts of one step, each with one answer."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there. Without it, num_train_epochs or max_time decide; 1 epoch where none is given."""
    learning_rate: float = 1e-5
    """Peak learning rate. Networks of a few million weights take 1e-4 to 1e-3."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors have none."""
    sample_prompts: int = 8
    """Held-out prompts whose answers are written to samples.jsonl at each evaluation, beside the teacher's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.lmbda <= 1.0, f"lmbda must be between 0 and 1, got {self.lmbda}")
        require(self.beta is None or 0.0 <= self.beta <= 1.0, f"beta must be between 0 and 1, or none, got {self.beta}")
        require(
            0.0 < self.temperature < math.inf,
            f"temperature must be above 0, got {self.temperature}: at 0 there is one answer to a prompt",
        )
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        for name in ("max_prompt_length", "pack_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")
