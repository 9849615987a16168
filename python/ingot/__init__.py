"""ingot: make, align and understand a language model on a machine without a GPU.

The names below are loaded when they are first used, so that ``import ingot`` costs next to nothing.
"""

from __future__ import annotations

import importlib

# Known to type checkers; importing typing for it would take longer than all else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ingot._native import build_info
    from ingot.configs import (
        Architecture,
        DistillConfig,
        DPOConfig,
        GRPOConfig,
        ModelConfig,
        PPOConfig,
        PretrainConfig,
        RewardConfig,
        SFTConfig,
    )
    from ingot.data.corpus import Corpus
    from ingot.errors import CheckpointError, ConfigError, DataError, IngotError, RunError
    from ingot.inference.compare import compare_models
    from ingot.inference.evaluate import evaluate
    from ingot.inference.generate import Completion, generate, stream
    from ingot.inference.scoring import RewardModel
    from ingot.models import Model, Optimizer, ParameterGroup, Sampling, load_model
    from ingot.reporting import report
    from ingot.tokenizer import Tokenizer
    from ingot.training.distill import distill
    from ingot.training.dpo import dpo
    from ingot.training.grpo import grpo
    from ingot.training.ppo import ppo
    from ingot.training.pretrain import PretrainResult, pretrain
    from ingot.training.resuming import resume
    from ingot.training.reward_model import train_reward_model
    from ingot.training.sft import sft
    from ingot.training.trainer import TrainingResult

__version__ = "0.1.0"

_HOMES = {
    "ingot._native": ("build_info",),
    "ingot.configs": (
        "Architecture",
        "DPOConfig",
        "DistillConfig",
        "GRPOConfig",
        "ModelConfig",
        "PPOConfig",
        "PretrainConfig",
        "RewardConfig",
        "SFTConfig",
    ),
    "ingot.data.corpus": ("Corpus",),
    "ingot.errors": ("CheckpointError", "ConfigError", "DataError", "IngotError", "RunError"),
    "ingot.inference.compare": ("compare_models",),
    "ingot.inference.evaluate": ("evaluate",),
    "ingot.inference.generate": ("Completion", "generate", "stream"),
    "ingot.inference.scoring": ("RewardModel",),
    "ingot.models": ("Model", "Optimizer", "ParameterGroup", "Sampling", "load_model"),
    "ingot.reporting": ("report",),
    "ingot.tokenizer": ("Tokenizer",),
    "ingot.training.distill": ("distill",),
    "ingot.training.dpo": ("dpo",),
    "ingot.training.grpo": ("grpo",),
    "ingot.training.ppo": ("ppo",),
    "ingot.training.pretrain": ("PretrainResult", "pretrain"),
    "ingot.training.resuming": ("resume",),
    "ingot.training.reward_model": ("train_reward_model",),
    "ingot.training.sft": ("sft",),
    "ingot.training.trainer": ("TrainingResult",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Architecture",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Corpus",
    "DPOConfig",
    "DataError",
    "DistillConfig",
    "GRPOConfig",
    "IngotError",
    "Model",
    "ModelConfig",
    "Optimizer",
    "PPOConfig",
    "ParameterGroup",
    "PretrainConfig",
    "PretrainResult",
    "RewardConfig",
    "RewardModel",
    "RunError",
    "SFTConfig",
    "Sampling",
    "Tokenizer",
    "TrainingResult",
    "__version__",
    "build_info",
    "compare_models",
    "distill",
    "dpo",
    "evaluate",
    "generate",
    "grpo",
    "load_model",
    "ppo",
    "pretrain",
    "report",
    "resume",
    "sft",
    "stream",
    "train_reward_model",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ingot' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
