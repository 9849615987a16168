"""Training an adapter instead of all weights."""

from __future__ import annotations

import dataclasses

from ingot.configs.checks import require
from ingot.configs.training import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(RunConfig):
    """What phases are told that start from a model: whether all its weights are trained, or a LoRA adapter on it."""

    lora_rank: int = 0
    """Train a LoRA adapter of this rank and leave the model's weights as they are; 0 trains all weights. Takes a fraction of the memory,
    and learning rates about ten times as high. Tokens that the model did not know keep their first embeddings."""
    lora_alpha: float = 16.0
    """The adapter's product counts times lora_alpha / lora_rank."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers that the adapter changes: all-linear, or names as they end, such as q_proj v_proj."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora_rank >= 0, f"lora_rank must be 0 (train all weights) or more, got {self.lora_rank}")
        require(self.lora_alpha > 0, f"lora_alpha must be positive, got {self.lora_alpha}")
        require(
            self.lora_rank == 0 or self.optim == "adamw",
            "optim muon is for whole matrices, not for adapters: give --optim adamw, or --lora-rank 0 to train all weights",
        )
        require(bool(self.lora_target_modules), "lora_target_modules names no layer: give all-linear, or some names")
