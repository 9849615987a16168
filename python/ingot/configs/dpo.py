"""Direct preference optimisation."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from ingot.configs.checks import require
from ingot.configs.lora import LoraConfig
from ingot.configs.sync import SyncConfig
from ingot.configs.training import TrainingConfig

PairLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
"""Losses of pairs against a reference; several may be added up, fine-tuning on the chosen answer (sft) among them."""
FreeLoss = Literal["cpo", "simpo", "orpo"]
"""Losses of pairs without a reference."""
VerdictLoss = Literal["kto", "apo_zero_unpaired", "bco"]
"""Losses of single answers, good or bad, against a reference."""
LossType = Literal[PairLoss, FreeLoss, VerdictLoss]

SMOOTHED: tuple[str, ...] = ("sigmoid", "robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
"""Those that label_smoothing changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(SyncConfig, LoraConfig, TrainingConfig):
    """Direct preference optimisation: a fine-tuned model and pairs, ranked lists or verdicts in, a model that prefers the better answers out."""

    model: str = ""
    """Start from this model: a folder with config.json and model.safetensors, such as a run of ingot sft."""
    reference_model: str | None = None
    """The model that the new one is held to; the one it starts from unless given."""
    data: tuple[str, ...] = ()
    """Preferences: files of rows with prompt, chosen and rejected, of ranked lists (ingot label), or with prompt, completion and label."""
    output: str = "runs/dpo"
    """The run's folder: model, tokenizer, chat template, checkpoints, metrics, curves and verdict."""
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """What is minimised, by TRL's names: sigmoid is DPO (with label_smoothing cDPO), kto, apo_zero_unpaired and bco take single verdicts,
    cpo, simpo and orpo have no reference. Those of pairs with a reference can be added up: --loss-type sigmoid sft."""
    loss_weights: tuple[float, ...] = ()
    """One for each loss_type; 1 each unless given."""
    beta: float = 0.1
    """How closely the model is held to the reference; tau of ipo, weight of the odds ratio in orpo. Take 2 to 2.5 for simpo."""
    label_smoothing: float = 0.0
    """Assumed share of pairs that are labelled the wrong way round."""
    discopop_tau: float = 0.05
    """Width of discopop's blend."""
    simpo_gamma: float = 0.5
    """Margin by which simpo's chosen answer should win, in units of its reward."""
    cpo_alpha: float | None = None
    """Weight of fine-tuning on the chosen answers in cpo and simpo; 1 for cpo and 0 for simpo unless given."""
    desirable_weight: float = 1.0
    """What a good answer counts (kto and its relatives)."""
    undesirable_weight: float = 1.0
    """What a bad answer counts (kto and its relatives). Keep the two sides' sums about equal."""
    held_out: float = 0.1
    """Share of the prompts kept out of training to judge the result; rows with one prompt lie on one side."""
    max_length: int | None = None
    """Leave out rows with an answer of more tokens than this, prompt included; what the model is made for unless given. None is cut."""
    pack_length: int | None = None
    """Most tokens of one forward and backward pass: bounds memory and does not change the loss. All answers to a row's prompt must fit;
    4096, or what they need, unless given."""
    per_device_train_batch_size: int = 64
    """Rows of one step: pairs, ranked lists or verdicts."""
    max_steps: int | None = None
    """Number of optimizer steps. The schedule ends there. Without it, num_train_epochs or max_time decide; 1 epoch where none is given."""
    learning_rate: float = 1e-6
    """Peak learning rate. Networks of a few million weights take 1e-4 to 1e-3."""
    warmup_ratio: float = 0.1
    """Share of all steps that warm up."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors have none."""
    sample_prompts: int = 32
    """Held-out prompts that the model answers at temperature 1 at each evaluation: distance from the reference (eval_kl), length, and the
    share that it ends by itself (eval_eos_rate) are measured on them."""
    sample_tokens: int = 128
    """Most tokens of such an answer; 0 for no answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = _names(LossType)
        require(bool(self.loss_type), f"loss_type is empty: give one of {', '.join(known)}")
        for loss in self.loss_type:
            require(loss in known, f"loss_type must be one of {', '.join(known)}, got {loss!r}")
        require(
            len(set(self.loss_type)) == len(self.loss_type), "loss_type names a loss twice: weigh it with loss_weights"
        )
        alone = [name for name in self.loss_type if name not in _names(PairLoss)]
        require(
            len(self.loss_type) == 1 or not alone,
            f"loss_type {alone[0] if alone else ''} is not added to others: give it alone",
        )
        require(
            self.loss_type != ("sft",),
            "loss_type sft learns from the chosen answers alone: add a preference loss, or run ingot sft",
        )
        require(
            len(self.loss_weights) in (0, len(self.loss_type)),
            f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} losses: give one for each",
        )
        require(all(weight > 0 for weight in self.loss_weights), "loss_weights must all be positive")
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(self.discopop_tau > 0, f"discopop_tau must be positive, got {self.discopop_tau}")
        require(
            0.0 <= self.label_smoothing < 0.5,
            f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}",
        )
        require(
            self.label_smoothing == 0 or any(name in SMOOTHED for name in self.loss_type),
            f"label_smoothing has no effect on loss_type {' '.join(self.loss_type)}: leave it 0, or take one of {', '.join(SMOOTHED)}",
        )
        require(
            "exo_pair" not in self.loss_type or self.label_smoothing > 0,
            "loss_type exo_pair needs label_smoothing above 0, for example 0.001",
        )
        require(
            self.cpo_alpha is None or self.loss_type[0] in ("cpo", "simpo"),
            f"cpo_alpha has no effect on loss_type {' '.join(self.loss_type)}: leave it out",
        )
        require(self.cpo_alpha is None or self.cpo_alpha >= 0, f"cpo_alpha must be 0 or more, got {self.cpo_alpha}")
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
            require(
                value == 1.0 or self.on_verdicts,
                f"{name} has no effect on loss_type {' '.join(self.loss_type)}: leave it 1",
            )
        require(
            self.loss_type[0] != "kto" or self.per_device_train_batch_size > 1,
            "loss_type kto estimates its reference point from the other rows of a step: give per_device_train_batch_size 2 or more",
        )
        require(
            self.reference_model is None or not self.reference_free,
            f"loss_type {self.loss_type[0]} has no reference: leave reference_model out",
        )
        require(
            not (self.sync_ref_model and self.reference_free),
            f"loss_type {self.loss_type[0]} has no reference: leave sync_ref_model out",
        )
        for name in ("max_length", "pack_length"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name} must be at least 2, got {value}")
        require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")

    @property
    def reference_free(self) -> bool:
        """The loss looks at the model alone."""
        return self.loss_type[0] in _names(FreeLoss)

    @property
    def imitates(self) -> bool:
        """The loss also fine-tunes on the chosen answers, without a reference: it may start from a model that knows no chat."""
        return self.loss_type[0] == "orpo" or (self.loss_type[0] == "cpo" and self.cpo_alpha != 0.0)

    @property
    def on_verdicts(self) -> bool:
        """The loss takes single answers, good or bad; pairs and ranked lists are taken apart for it."""
        return self.loss_type[0] in _names(VerdictLoss)

    @property
    def couples_batch(self) -> bool:
        """The loss of a row depends on the other rows of its step, so that all are needed before the first gradient."""
        return bool({"aot", "aot_unpaired", "bco"} & set(self.loss_type))


def _names(kind: object) -> tuple[str, ...]:
    return get_args(kind)
