"""What every phase of training is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ingot.configs.checks import check_keys, check_types, parse_duration, require

Backend = Literal["native", "torch"]
Level = Literal["portable", "avx2", "avx512"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every phase of training is told: how long, how fast, how often it looks and saves, and on what it computes."""

    output: str = "runs/run"
    """The run's folder: model, tokenizer, checkpoints, metrics and curves."""
    held_out: float = 0.1
    """Share of the data kept out of training to measure the held-out loss."""
    per_device_train_batch_size: int = 16
    """Rows of one step."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there."""
    num_train_epochs: float | None = None
    """Passes over the training data, instead of max_steps."""
    max_time: str | None = None
    """Time for training such as 90s, 30m or 2h: the number of steps, and with it the schedule, is fitted to it from measured steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate_ratio: float = 0.1
    """The schedule ends at this share of the peak."""
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; warmup_ratio of all steps unless given."""
    warmup_ratio: float = 0.03
    """Share of all steps that warm up."""
    decay_ratio: float = 0.2
    """Share of all steps that decay at the end (wsd)."""
    optim: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of attention and MLP, with AdamW for the rest and the same learning rate for both. Muon moves
    all directions of a matrix equally far: often fewer steps for pretraining."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors have none."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    adam_eps_mode: Literal["torch", "tf"] = "torch"
    """torch adds epsilon after the correction of the moments' bias; tf before, which makes the first steps smaller."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int | None = None
    """Steps between two held-out losses and samples; a tenth of the run unless given."""
    eval_batches: int | None = None
    """Measure the held-out loss on this many batches; on the whole held-out part unless given."""
    save_steps: int | None = None
    """Steps between two checkpoints; as eval_steps unless given."""
    save_total_limit: int = 2
    """Keep this many of the newest checkpoints, and the best one."""
    cache_dir: str | None = None
    """Where tokenized data are kept for the next run; .cache in the output folder's parent unless given."""
    seed: int = 0
    """Of new weights, the order of the data, dropout and samples."""
    backend: Backend = "native"
    """native: the SIMD core on the CPU; torch: PyTorch, also on a GPU (pip install "ingot[torch]")."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    precision: Literal["auto", "f32"] = "auto"
    """Arithmetic of the matrix products."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given. The result does not depend on it."""
    level: Level | None = None
    """Force an instruction level; the best one unless given."""

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "logging_steps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "eval_steps", "eval_batches", "save_steps", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("held_out", "warmup_ratio", "decay_ratio", "min_learning_rate_ratio"):
            require(0.0 <= getattr(self, name) <= 1.0, f"{name} must be between 0 and 1, got {getattr(self, name)}")
        require(self.held_out < 1.0, "held_out must leave text to train on: give less than 1")
        require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        require(0.0 <= self.muon_momentum < 1.0, f"muon_momentum must be in [0, 1), got {self.muon_momentum}")
        require(self.max_grad_norm >= 0, f"max_grad_norm must not be negative, got {self.max_grad_norm}")
        require(self.save_total_limit >= 1, f"save_total_limit must be at least 1, got {self.save_total_limit}")
        require(
            self.num_train_epochs is None or self.num_train_epochs > 0,
            f"num_train_epochs must be positive, got {self.num_train_epochs}",
        )
        given = [n for n in ("max_steps", "num_train_epochs", "max_time") if getattr(self, n) is not None]
        require(len(given) <= 1, f"{' and '.join(given)} each fix the length of the run: give one of them")
        if self.max_time is not None:
            parse_duration(self.max_time)

    @property
    def place(self) -> dict[str, Any]:
        """Where and how the network is computed, as :func:`ingot.Model` and :func:`ingot.load_model` take it."""
        names = ("backend", "device", "threads", "level", "precision")
        return {name: getattr(self, name) for name in names}

    @property
    def cache_folder(self) -> Path:
        """Where tokenized data are kept."""
        return Path(self.output).parent / ".cache" if self.cache_dir is None else Path(self.cache_dir)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in the shape that a TOML file has: what is None by default is left out, another None is "none"."""
        values = dataclasses.asdict(self)
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = values[field.name]
            if value is not None or field.default is not None:
                plain[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def fields_of(cls, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The keyword arguments that a TOML table holds, checked by name."""
        check_keys(cls, fields, source)
        values = dict(fields)
        for field in dataclasses.fields(cls):
            value = values.get(field.name)
            if isinstance(value, list):
                values[field.name] = tuple(value)
            elif isinstance(field.default, tuple) and isinstance(value, str):
                values[field.name] = (value,)
            elif value == "none" and field.default is not None and "None" in str(field.type):
                values[field.name] = None
        check_types(cls, values, source)
        return values

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "configuration") -> Self:
        """Built from such a mapping, over the defaults; unknown keys are errors that name the nearest one and ``source``."""
        return cls(**cls.fields_of(fields, source))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """A phase that learns from files and shows what the model writes."""

    data: tuple[str, ...] = ()
    """What to learn from: files."""
    sample_tokens: int = 100
    """Length of the samples at each evaluation; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sample_tokens >= 0, f"sample_tokens must not be negative, got {self.sample_tokens}")
