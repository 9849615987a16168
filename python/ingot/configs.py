"""Configurations: frozen, keyword-only, with a docstring under each field; the command line and the TOML files are made from them.

Field names follow TRL and transformers where those have a name for the thing. Derived values are methods or properties, never fields.
This module stays light (no numpy, no native code), so that ``ingot --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro

from ingot.errors import ConfigError

Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"]
AttentionBias = Literal["none", "qkv", "qkvo"]
Backend = Literal["native", "torch"]
Level = Literal["portable", "avx2", "avx512"]

ConfigT = TypeVar("ConfigT")

_GPT2_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "norm": "layer",
    "norm_eps": 1e-5,
    "position": "learned",
    "activation": "gelu_tanh",
    "attention_bias": "qkvo",
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "norm": "rms",
    "norm_eps": 1e-5,
    "position": "rotary",
    "rope_theta": 10000.0,
    "activation": "swiglu",
    "attention_bias": "none",
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. GPT-2, Llama, SmolLM2, Qwen2 and Qwen3 are settings of it.

    Raises :class:`ingot.errors.ConfigError` (a ``ValueError``) where the numbers do not fit together.
    Fields that may be ``None`` are filled in on construction, so a built configuration is always complete.
    """

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of transformer blocks."""
    num_attention_heads: int
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block (grouped-query attention); as many as query heads unless given."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads unless given."""
    intermediate_size: int | None = None
    """Width of the MLP; 4 x hidden_size unless given, for swiglu 8/3 x hidden_size rounded up to a multiple of 32."""
    max_position_embeddings: int = 2048
    """Longest sequence that the model is made for, in tokens. A hard limit for learned positions."""
    norm: Norm = "rms"
    """LayerNorm (with gain and bias) or RMSNorm (gain only), before each sub-layer and after the last block."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norm."""
    position: Position = "rotary"
    """Learned absolute positions, or rotary embeddings (half-split convention)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Mapping[str, Any] | None = None
    """Rotary scaling as in a Hugging Face config: ``{"rope_type": "linear" | "llama3", "factor": ..., ...}``."""
    activation: Activation = "swiglu"
    """Non-linearity of the MLP; swiglu has a gate, the others are plain."""
    attention_bias: AttentionBias = "none"
    """Which attention projections have a bias."""
    mlp_bias: bool = False
    """Whether the MLP's linear layers have a bias."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""
    tie_word_embeddings: bool = True
    """Whether the head shares the embedding's weights."""
    dropout: float = 0.0
    """Probability of dropping a value: after the embedding, on attention weights and on both residual branches."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections of both branches get it divided by sqrt(2 x layers)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}: "
                "choose numbers that divide, or give head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size if self.activation != "swiglu" else 32 * math.ceil(self.hidden_size / 12)
            object.__setattr__(self, "intermediate_size", wide)
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))
        key_value_heads, head_dim = self.num_key_value_heads, self.head_dim
        assert key_value_heads is not None
        assert head_dim is not None
        assert self.intermediate_size is not None
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.num_attention_heads % key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads {key_value_heads}",
        )
        if self.position == "rotary":
            _require(head_dim % 2 == 0, f"rotary positions need an even head_dim, got {head_dim}")
            _require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")
        else:
            _require(self.rope_scaling is None, "rope_scaling needs position = rotary")
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        _require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        _require(self.initializer_range >= 0, f"initializer_range must not be negative, got {self.initializer_range}")
        for name, allowed in (
            ("norm", ("layer", "rms")),
            ("position", ("learned", "rotary")),
            ("activation", ("gelu_tanh", "gelu", "relu", "relu2", "swiglu")),
            ("attention_bias", ("none", "qkv", "qkvo")),
        ):
            _require(
                getattr(self, name) in allowed,
                f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}",
            )

    @classmethod
    def gpt2(cls, **fields: Any) -> ModelConfig:
        """GPT-2's family: LayerNorm, learned positions, tanh-GELU, biases everywhere, tied head. ``fields`` override."""
        return cls(**{**_GPT2_DEFAULTS, **fields})

    @classmethod
    def llama(cls, **fields: Any) -> ModelConfig:
        """Llama's family: RMSNorm, rotary positions, SwiGLU, no biases; tied head as small models have. ``fields`` override."""
        return cls(**{**_LLAMA_DEFAULTS, **fields})

    @property
    def num_parameters(self) -> int:
        """Number of weights of the whole model, a shared head counted once."""
        d, ff = self.hidden_size, self.intermediate_size or 0
        q, kv = self.num_attention_heads * (self.head_dim or 0), (self.num_key_value_heads or 0) * (self.head_dim or 0)
        norm = 2 * d if self.norm == "layer" else d
        attention = d * (q + 2 * kv) + q * d
        attention += {"none": 0, "qkv": q + 2 * kv, "qkvo": q + 2 * kv + d}[self.attention_bias]
        attention += 2 * (self.head_dim or 0) if self.qk_norm else 0
        up = 2 * ff if self.activation == "swiglu" else ff
        mlp = d * up + ff * d + ((up + d) if self.mlp_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        embeddings += self.max_position_embeddings * d if self.position == "learned" else 0
        return self.num_hidden_layers * (attention + mlp + 2 * norm) + norm + embeddings

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward, at sequences of ``length`` tokens.

        6 for each weight of a matrix product (the head's included, the embedding's look-up not) and
        6 x layers x heads x head_dim x length for causal attention (half of the full square).
        """
        d, ff = self.hidden_size, self.intermediate_size or 0
        q, kv = self.num_attention_heads * (self.head_dim or 0), (self.num_key_value_heads or 0) * (self.head_dim or 0)
        up = 2 * ff if self.activation == "swiglu" else ff
        matrices = self.num_hidden_layers * (d * (q + 2 * kv) + q * d + d * up + ff * d) + self.vocab_size * d
        return 6.0 * matrices + 6.0 * self.num_hidden_layers * q * length

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; an unknown field is an error that names the nearest one."""
        check_keys(cls, fields, "model configuration")
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the network looks like, before the vocabulary and the context length are known. Unset fields follow the family."""

    family: Literal["llama", "gpt2"] = "llama"
    """Whose defaults to start from: llama (RMSNorm, rotary, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU)."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 6
    """Number of transformer blocks."""
    num_attention_heads: int = 4
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block; as many as query heads unless given."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads unless given."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model is made for; max_length unless given."""
    norm: Norm | None = None
    """layer or rms."""
    norm_eps: float | None = None
    """Added to the variance inside the norm."""
    position: Position | None = None
    """learned or rotary."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    activation: Activation | None = None
    """Non-linearity of the MLP."""
    attention_bias: AttentionBias | None = None
    """Which attention projections have a bias: none, qkv or qkvo."""
    mlp_bias: bool | None = None
    """Whether the MLP's linear layers have a bias."""
    qk_norm: bool | None = None
    """RMSNorm on each query and key head (Qwen3)."""
    tie_word_embeddings: bool | None = None
    """Whether the head shares the embedding's weights."""
    dropout: float = 0.0
    """Probability of dropping a value while training."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights."""

    def resolve(self, vocab_size: int, max_length: int) -> ModelConfig:
        """The complete configuration for a vocabulary of ``vocab_size`` ids and training sequences of ``max_length`` tokens."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        family = fields.pop("family")
        fields.setdefault("max_position_embeddings", max_length)
        make = ModelConfig.gpt2 if family == "gpt2" else ModelConfig.llama
        return make(vocab_size=vocab_size, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every phase of training is told: how long, how fast, how often it looks and saves, and on what it computes."""

    data: tuple[str, ...] = ()
    """What to learn from: files."""
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
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors have none."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
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
    sample_tokens: int = 100
    """Length of the samples at each evaluation; 0 for none."""
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
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "eval_steps", "eval_batches", "save_steps", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("held_out", "warmup_ratio", "decay_ratio", "min_learning_rate_ratio"):
            _require(0.0 <= getattr(self, name) <= 1.0, f"{name} must be between 0 and 1, got {getattr(self, name)}")
        _require(self.held_out < 1.0, "held_out must leave text to train on: give less than 1")
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _require(self.max_grad_norm >= 0, f"max_grad_norm must not be negative, got {self.max_grad_norm}")
        _require(self.save_total_limit >= 1, f"save_total_limit must be at least 1, got {self.save_total_limit}")
        _require(self.sample_tokens >= 0, f"sample_tokens must not be negative, got {self.sample_tokens}")
        _require(
            self.num_train_epochs is None or self.num_train_epochs > 0,
            f"num_train_epochs must be positive, got {self.num_train_epochs}",
        )
        given = [n for n in ("max_steps", "num_train_epochs", "max_time") if getattr(self, n) is not None]
        _require(len(given) <= 1, f"{' and '.join(given)} each fix the length of the run: give one of them")
        if self.max_time is not None:
            parse_duration(self.max_time)

    @property
    def place(self) -> dict[str, Any]:
        """Where and how the network is computed, as :func:`ingot.Model` and :func:`ingot.load_model` take it."""
        names = ("backend", "device", "threads", "level", "precision")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in the shape that a TOML file has."""
        fields = dataclasses.asdict(self)
        fields["data"] = list(self.data)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def fields_of(cls, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The keyword arguments that a TOML table holds, checked by name."""
        check_keys(cls, fields, source)
        values = dict(fields)
        if "data" in values:
            data = values["data"]
            values["data"] = (data,) if isinstance(data, str) else tuple(data)
        return values

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "configuration") -> Self:
        """Built from such a mapping, over the defaults; unknown keys are errors that name the nearest one and ``source``."""
        return cls(**cls.fields_of(fields, source))


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
    max_length: int = 256
    """Longest sequence in tokens that a step sees."""
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
    cache_dir: str | None = None
    """Where token files are kept for the next run; .cache in the output folder's parent unless given."""

    def __post_init__(self) -> None:
        for name in ("max_length", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        super().__post_init__()
        _require(self.tokenizer is None or self.vocab_size is None, "give tokenizer or vocab_size, not both")

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
            check_keys(Architecture, model, f"{source}, table [model]")
            values["architecture"] = Architecture(**model)
        elif model is not None:
            values["model"] = model
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning: a pretrained model and demonstrations in, a model that answers out."""

    model: str = ""
    """Start from this model: a folder with config.json and model.safetensors, such as a run of ingot pretrain."""
    data: tuple[str, ...] = ()
    """Demonstrations: files of rows with messages, prompt and completion, or text (.jsonl, .json, each also as .gz or .zst; .parquet)."""
    output: str = "runs/sft"
    """The run's folder: model, tokenizer, chat template, checkpoints, metrics and curves."""
    chat_template: str | None = None
    """A file with a chat template in Jinja; that of the model unless given, and the built-in one where it has none."""
    held_out: float = 0.1
    """Share of the prompts kept out of training to measure the held-out loss; rows with one prompt lie on one side."""
    max_length: int | None = None
    """Leave out rows of more tokens than this; what the model is made for unless given. None is cut."""
    pack_length: int | None = None
    """Most tokens of one forward and backward pass: bounds memory and does not change the loss. At least max_length; 4096 unless given."""
    per_device_train_batch_size: int = 16
    """Rows of one step."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there. Without it, num_train_epochs or max_time decide; 3 epochs where none is given."""
    learning_rate: float = 2e-5
    """Peak learning rate. Networks of a few million weights take 1e-4 to 1e-3."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors have none."""
    dropout: float = 0.0
    """Probability of dropping a value while training, whatever the model was pretrained with."""
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy; dft: each token weighed by its own probability (dynamic fine-tuning)."""
    loss_reduction: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    """Every token of a step counts the same, every row does, or all add up."""
    prompt_weight: float = 0.0
    """What a token of a prompt counts beside one of an answer."""
    label_smoothing_factor: float = 0.0
    """Share of the target that is spread over the whole vocabulary (nll only)."""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum of the logits, which keeps their scale in bounds (nll only)."""
    sample_prompts: int = 8
    """Held-out prompts that the model answers at each evaluation; the share that it ends by itself is eval_eos_rate."""
    sample_tokens: int = 128
    """Most tokens of such an answer; 0 for no answers."""
    sample_temperature: float = 0.7
    """Temperature of such an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "pack_length"):
            value = getattr(self, name)
            _require(value is None or value >= 2, f"{name} must be at least 2, got {value}")
        if self.max_length is not None and self.pack_length is not None:
            _require(
                self.pack_length >= self.max_length,
                f"pack_length {self.pack_length} is below max_length {self.max_length}: a row must fit into a pack",
            )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        _require(self.prompt_weight >= 0.0, f"prompt_weight must be 0 or more, got {self.prompt_weight}")
        _require(self.z_loss >= 0.0, f"z_loss must be 0 or more, got {self.z_loss}")
        _require(
            0.0 <= self.label_smoothing_factor < 1.0,
            f"label_smoothing_factor must be at least 0 and below 1, got {self.label_smoothing_factor}",
        )
        _require(
            self.loss_type == "nll" or not (self.label_smoothing_factor or self.z_loss),
            "loss_type dft has neither label_smoothing_factor nor z_loss: leave both 0",
        )
        _require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")
        _require(self.sample_temperature >= 0, f"sample_temperature must be 0 or more, got {self.sample_temperature}")


def check_keys(config: type, fields: Mapping[str, Any], source: str) -> None:
    """Refuse keys that ``config`` has no field for.

    Raises
    ------
    ConfigError
        Names the key, the source and the nearest field.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def load_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a mapping; :class:`ConfigError` names file and line where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def recipe_names() -> list[str]:
    """Names of the recipes shipped in the package."""
    folder = resources.files("ingot") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The recipe of that name as a mapping; an unknown one is an error that names the nearest."""
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no recipe is named {name!r}; {hint}There are: {', '.join(names)}")
    text = (resources.files("ingot") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``2h``, ``1h30m`` or a plain number of seconds.

    >>> parse_duration("1h30m")
    5400.0
    """
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact or any(not u for _, u in parts[:-1]):
        raise ConfigError(f"{text!r} is not a duration: write for example 90s, 30m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise ConfigError(f"{text!r} is not a duration above zero")
    return seconds


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
