"""What the phases that learn from their own samples share: PPO and the group methods."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro
from tyro.conf import UseAppendAction

from ingot.configs.checks import require
from ingot.configs.lora import LoraConfig
from ingot.configs.sync import SyncConfig

ExportBy = Literal["last", "objective", "judge", "gold"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig(SyncConfig, LoraConfig):
    """Learning from rewards of one's own samples: what is asked, what is rewarded, and how it is watched."""

    model: str = ""
    """Start from this model: the folder of a run of ingot sft, or of another model that writes. It is also the reference of the KL."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Files of rows with a "prompt", text or messages (.jsonl, .json, each also as .gz or .zst; .parquet). Reward functions get the other columns."""
    reward_model: str | None = None
    """Score answers with this reward model: a folder, or FOLDER:CRITERION."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """Score answers with this: ./file.py:FUNCTION, package.module.FUNCTION, or the folder of a reward model; may be given several times."""
    reward_weights: tuple[float, ...] | None = None
    """One number for each reward, the reward model's first; 1 unless given."""
    reward_timeout: float = 600.0
    """Most seconds of one call of a reward function."""
    judge: str | None = None
    """A second reward model that is not trained against, such as one from other judgements: its scores are recorded beside the reward's."""
    gold: str | None = None
    """A reward function that knows what is really wanted, where there is one (./file.py:FUNCTION): recorded, never trained against."""
    gate_answers: int = 16
    """Before the first update, let the reward choose among this many answers to each of 64 held-out prompts: the judge, or gold, has to like its
    choice better than answers as they come. 0 for no such check; without judge and gold there is none."""
    force: bool = False
    """Go on although the model, the reward model or that check did not pass."""
    missing_eos_penalty: float | None = 1.0
    """What an answer that was cut at its longest length loses, since it never ended; None for nothing."""
    missing_eos: Literal["subtract", "replace"] = "subtract"
    """subtract: its score less the penalty; replace: the negative penalty instead of its score."""
    temperature: float = 1.0
    """Of the policy, in sampling and in training alike."""
    max_prompt_length: int | None = None
    """Leave out prompts of more tokens; what the model's context leaves beside the longest answer unless given. None is cut."""
    held_out: float = 0.1
    """Share of the prompts kept out of training, on which the policy is measured."""
    per_device_train_batch_size: int = 64
    """Answers of one update."""
    num_mini_batches: int = 1
    """Parts that a pass is divided into; each makes one step of the optimizer."""
    max_steps: int | None = None
    """Number of updates. The schedule ends there. Without it, total_episodes, num_train_epochs or max_time decide; 200 where none is given."""
    total_episodes: int | None = None
    """Number of answers in all, instead of max_steps."""
    num_train_epochs: float | None = None
    """Passes over the training prompts, instead of max_steps."""
    learning_rate: float = 1e-5
    """Peak learning rate. Networks of a few million weights take 3e-5 to 3e-4."""
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = "linear"
    """Shape after the warm-up; wsd is warm-up, stable, decay."""
    min_learning_rate_ratio: float = 0.0
    """The schedule ends at this share of the peak."""
    warmup_ratio: float = 0.0
    """Share of all steps that warm up."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors have none."""
    logging_steps: int = 1
    """Updates between two lines of metrics.jsonl."""
    eval_batches: int | None = 4
    """Measure on this many times per_device_train_batch_size held-out prompts; on all of them where None."""
    sample_prompts: int = 8
    """Held-out prompts whose answers are written to samples.jsonl at each evaluation."""
    export_by: ExportBy | None = None
    """Which weights become the run's model: those of the last step, or of the best evaluation by the held-out objective (reward less KL), the judge's score or gold. Unless given: by the judge where there is one, otherwise by the objective."""
    pack_length: int | None = None
    """Most tokens of one forward and backward pass: bounds memory and does not change the loss. At least an answer with its prompt; 4096 unless given."""
    max_sequences: int = 64
    """Answers that are written at a time; more are faster on larger machines and need more memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0.0 < self.temperature < math.inf,
            f"temperature must be above 0, got {self.temperature}: at 0 nothing is explored",
        )
        for name in ("num_mini_batches", "max_prompt_length", "total_episodes", "pack_length", "max_sequences"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.num_mini_batches <= self.per_device_train_batch_size,
            f"num_mini_batches {self.num_mini_batches} is more than the {self.per_device_train_batch_size} answers of an update",
        )
        require(
            self.gate_answers == 0 or self.gate_answers >= 2,
            f"gate_answers must be at least 2, or 0 for no check, got {self.gate_answers}",
        )
        require(self.sample_prompts >= 0, f"sample_prompts must not be negative, got {self.sample_prompts}")
        require(self.reward_timeout > 0, f"reward_timeout must be above 0 seconds, got {self.reward_timeout}")
        require(
            self.missing_eos_penalty is None or 0.0 <= self.missing_eos_penalty < math.inf,
            f"missing_eos_penalty must be 0 or more, or none, got {self.missing_eos_penalty}",
        )
        lengths = ("max_steps", "total_episodes", "num_train_epochs", "max_time")
        given = [name for name in lengths if getattr(self, name) is not None]
        require(len(given) <= 1, f"{' and '.join(given)} each fix the length of the run: give one of them")
        for by, source in (("judge", self.judge), ("gold", self.gold)):
            require(self.export_by != by or source is not None, f"export_by {by} needs --{by}")
        if self.reward_weights is not None:
            # More than the names here: a program may add functions of its own, and all are counted then.
            require(
                len(self.reward_weights) >= len(self.rewards),
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards: give one for each, the reward model's first",
            )

    @property
    def rewards(self) -> tuple[str, ...]:
        """All that is trained against, in the order of ``reward_weights``."""
        return (() if self.reward_model is None else (self.reward_model,)) + self.reward

    @property
    def minibatch_size(self) -> int:
        """Most answers that a step of the optimizer learns from."""
        return -(-self.per_device_train_batch_size // self.num_mini_batches)

    @property
    def answer_length(self) -> int:
        """Most tokens of an answer, by whatever name the phase has for it."""
        raise NotImplementedError
