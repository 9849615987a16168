"""ingot: make, align and understand a language model on a machine without a GPU.

The names below are loaded when they are first used, so that ``import ingot`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot._native import build_info
    from ingot.configs import Architecture, DistillConfig, DPOConfig, ModelConfig, PretrainConfig, SFTConfig
    from ingot.data.corpus import Corpus
    from ingot.errors import CheckpointError, ConfigError, DataError, IngotError, RunError
    from ingot.inference.evaluate import evaluate
    from ingot.inference.generate import Completion, generate, stream
    from ingot.models import Model, Optimizer, ParameterGroup, Sampling, load_model
    from ingot.tokenizer import Tokenizer
    from ingot.training.distill import distill
    from ingot.training.dpo import dpo
    from ingot.training.pretrain import PretrainResult, pretrain
    from ingot.training.resuming import resume
    from ingot.training.sft import sft
    from ingot.training.trainer import TrainingResult

__version__ = "0.1.0"

_HOMES = {
    "ingot._native": ("build_info",),
    "ingot.configs": ("Architecture", "DPOConfig", "DistillConfig", "ModelConfig", "PretrainConfig", "SFTConfig"),
    "ingot.data.corpus": ("Corpus",),
    "ingot.errors": ("CheckpointError", "ConfigError", "DataError", "IngotError", "RunError"),
    "ingot.inference.evaluate": ("evaluate",),
    "ingot.inference.generate": ("Completion", "generate", "stream"),
    "ingot.models": ("Model", "Optimizer", "ParameterGroup", "Sampling", "load_model"),
    "ingot.tokenizer": ("Tokenizer",),
    "ingot.training.distill": ("distill",),
    "ingot.training.dpo": ("dpo",),
    "ingot.training.pretrain": ("PretrainResult", "pretrain"),
    "ingot.training.resuming": ("resume",),
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
    "IngotError",
    "Model",
    "ModelConfig",
    "Optimizer",
    "ParameterGroup",
    "PretrainConfig",
    "PretrainResult",
    "RunError",
    "SFTConfig",
    "Sampling",
    "Tokenizer",
    "TrainingResult",
    "__version__",
    "build_info",
    "distill",
    "dpo",
    "evaluate",
    "generate",
    "load_model",
    "pretrain",
    "resume",
    "sft",
    "stream",
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
