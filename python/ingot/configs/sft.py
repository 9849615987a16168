"""Supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ingot.configs.checks import require
from ingot.configs.lora import LoraConfig
from ingot.configs.training import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(LoraConfig, TrainingConfig):
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
    lora_dropout: float = 0.0
    """Of a LoRA adapter: probability of dropping a value of what each layer's adapter reads while training; .05 is usual."""
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
            require(value is None or value >= 2, f"{name} must be at least 2, got {value}")
        if self.max_length is not None and self.pack_length is not None:
            require(
                self.pack_length >= self.max_length,
                f"pack_length {self.pack_length} is below max_length {self.max_length}: a row must fit into a pack",
            )
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        require(0.0 <= self.lora_dropout < 1.0, f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        require(
            not self.lora_dropout or self.lora_rank > 0,
            "lora_dropout is of an adapter: give --lora-rank too, or --dropout for the network's own",
        )
        require(self.prompt_weight >= 0.0, f"prompt_weight must be 0 or more, got {self.prompt_weight}")
        require(self.z_loss >= 0.0, f"z_loss must be 0 or more, got {self.z_loss}")
        require(
            0.0 <= self.label_smoothing_factor < 1.0,
            f"label_smoothing_factor must be at least 0 and below 1, got {self.label_smoothing_factor}",
        )
        require(
            self.loss_type == "nll" or not (self.label_smoothing_factor or self.z_loss),
            "loss_type dft has neither label_smoothing_factor nor z_loss: leave both 0",
        )
        require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")
        require(self.sample_temperature >= 0, f"sample_temperature must be 0 or more, got {self.sample_temperature}")
