"""Pretraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from ingot.configs.checks import check_keys, check_types, require
from ingot.configs.model import Architecture
from ingot.configs.training import TrainingConfig

_DEFAULT_LENGTH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretraining: a tokenizer and raw text in, a network that predicts the next token out."""

    data: tuple[str, ...] = ()
    """Text to learn from: files and folders (.txt, .jsonl with a "text" field, each also as .gz or .zst)."""
    output: str = "runs/pretrain"
    """The run's folder: model, tokenizer, checkpoints, metrics and curves."""
    tokenizer: str | None = None
    """A trained tokenizer (folder or tokenizer.json). Without one: bytes, or a new one where vocab_size is given."""
    vocab_size: int | None = None
    """Train a tokenizer of this size on the data first (256: bytes as they are). Not together with tokenizer."""
    model: str | None = None
    """Go on from this model (a folder with config.json and model.safetensors) instead of a new one."""
    architecture: Annotated[Architecture, tyro.conf.arg(name="model")] = dataclasses.field(default_factory=Architecture)
    """The new network, where no model to go on from is given."""
    separator: str | None = None
    """Cut each text file into documents at this string, for example "<|endoftext|>"."""
    windows: Literal["auto", "packed", "random"] = "auto"
    """packed: whole documents side by side, never mixed; random: windows anywhere in one long text; auto: random for a single document."""
    document_order: Literal["shuffled", "given"] = "shuffled"
    """shuffled: new in each epoch; given: as the files have them, each time, so that easy documents can come first (packed windows only)."""
    held_out: float = 0.1
    """Share of the data kept out of training to measure the held-out loss: documents, or the last part of one long text."""
    max_length: int | None = None
    """Longest sequence in tokens that a step sees; 256 unless given, or all positions of a model to go on from that has learned fewer."""
    per_device_train_batch_size: int = 16
    """Rows of max_length tokens in one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes whose gradients add up to one step, as if they were one batch."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there. Without it, num_train_epochs or max_time decide; 1000 where none is given."""
    num_train_epochs: float | None = None
    """Passes over the training text, instead of max_steps."""
    sample_prompt: str | None = None
    """Prompt of the sample at each evaluation; the beginning of a held-out text unless given."""
    sample_tokens: int = 100
    """Length of that sample; 0 for none."""
    seed: int = 0
    """Of the initial weights, the order of the data, dropout and samples."""

    def __post_init__(self) -> None:
        for name in ("max_length", "gradient_accumulation_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        super().__post_init__()
        require(self.tokenizer is None or self.vocab_size is None, "give tokenizer or vocab_size, not both")

    @property
    def sequence_length(self) -> int:
        """``max_length``, or what stands for it where it is not given and no model says otherwise."""
        return _DEFAULT_LENGTH if self.max_length is None else self.max_length

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in the shape that a TOML file has (``model`` is the network's table or a path)."""
        fields = super().to_dict()
        architecture = fields.pop("architecture")
        if self.model is None:
            fields["model"] = {name: value for name, value in architecture.items() if value is not None}
        return fields

    @classmethod
    def fields_of(cls, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The keyword arguments that a TOML table holds, checked by name; a table ``model`` is the network's."""
        values = dict(fields)
        model = values.pop("model", None)
        values = super().fields_of(values, source)
        if isinstance(model, Mapping):
            table = f"{source}, table [model]"
            check_keys(Architecture, model, table)
            check_types(Architecture, model, table)
            values["architecture"] = Architecture(**model)
        elif model is not None:
            check_types(cls, {"model": model}, source)
            values["model"] = model
        return values
