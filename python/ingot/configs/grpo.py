"""Group methods: several answers to each prompt, compared with one another instead of with a critic's guess."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ingot.configs.checks import require
from ingot.configs.online import OnlineConfig

GRPOLossType = Literal[
    "grpo",
    "dr_grpo",
    "bnpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reinforce",
]
AdvantageEstimator = Literal["group", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupMethod:
    """What a method is made of, beside its surrogate and what that is averaged over."""

    advantage_estimator: AdvantageEstimator = "group"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    kl_penalty: Literal["reward", "loss"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"


_METHODS: dict[GRPOLossType, GroupMethod] = {
    "grpo": GroupMethod(),
    "dr_grpo": GroupMethod(scale_rewards="none"),
    "bnpo": GroupMethod(),
    "dapo": GroupMethod(epsilon_high=0.28),
    "gspo": GroupMethod(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "cispo": GroupMethod(epsilon_high=5.0),
    "rloo": GroupMethod(advantage_estimator="rloo", beta=0.05, kl_penalty="reward", kl_estimator="k1"),
    "reinforce_plus_plus": GroupMethod(
        advantage_estimator="reinforce_plus_plus", beta=0.05, kl_penalty="reward", kl_estimator="k1"
    ),
    "reinforce_plus_plus_baseline": GroupMethod(
        advantage_estimator="reinforce_plus_plus_baseline", beta=0.05, kl_estimator="k2"
    ),
    "reinforce": GroupMethod(scale_rewards="none", kl_estimator="k2"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """Group methods: a model that answers and a reward in, a model whose answers are rewarded more out. There is no critic: each answer
    is compared with the others to its prompt. ``loss_type`` names the method; what is left open below is what that method has."""

    output: str = "runs/grpo"
    """The run's folder: model, tokenizer, checkpoints, metrics and curves."""
    loss_type: GRPOLossType = "dapo"
    """The method. grpo: a mean of answers' means; bnpo, dapo: of all tokens; dr_grpo: divided by a constant, rewards not scaled; gspo: one ratio an answer; cispo: no gradient is clipped away; rloo: each answer against the mean of the others; reinforce_plus_plus and its variant with a baseline: rewards scaled over the batch; reinforce: reward less the group's mean, one step an update."""
    num_generations: int = 8
    """Answers to each prompt."""
    max_completion_length: int = 64
    """Most tokens of an answer."""
    missing_eos_penalty: float | None = None
    """What an answer that was cut at its longest length loses, since it never ended; None for nothing."""
    soft_punish_cache: int | None = None
    """An answer loses up to 1 over so many of the last tokens that it may have, 1 at the longest length (DAPO's soft overlong punishment)."""
    mask_truncated_completions: bool = False
    """Learn nothing from the tokens of answers that were cut at the longest length; they still count in their group's mean."""
    advantage_estimator: AdvantageEstimator | None = None
    """What an answer is compared with. group: the mean of its group; rloo: of the others in it; reinforce_plus_plus: of the batch; reinforce_plus_plus_baseline: of its group, scaled over the batch. That of loss_type unless given."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the standard deviation of the group or of the batch, or by nothing (estimator group). That of loss_type unless given."""
    normalize_advantages: bool = False
    """Shift and scale the advantages of an update to mean 0 and deviation 1 (estimator rloo)."""
    gamma: float = 1.0
    """Discount of later rewards, by token (estimators reinforce_plus_plus and its variant)."""
    zero_std_groups: Literal["keep", "drop", "resample"] = "keep"
    """What becomes of groups whose answers are all rewarded the same. keep: they count in means; drop: the update goes without them; resample: other prompts take their place (DAPO's dynamic sampling)."""
    max_resamples: int = 3
    """Most further draws of an update for resample; then it goes with what there is."""
    beta: float | None = None
    """Weight of the KL to the reference. Unless given 0.05 for rloo and reinforce_plus_plus with its variant, otherwise 0."""
    kl_penalty: Literal["reward", "loss"] | None = None
    """Take the KL off the reward, or add it to the loss (k2: KL of the policy to the reference; k3: of the reference to the policy). That of loss_type unless given."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of the KL from sampled tokens: k1 in the reward, k2 or k3 in the loss. That of loss_type unless given."""
    num_iterations: int = 1
    """Passes over the answers of one update."""
    importance_sampling_level: Literal["token", "sequence"] | None = None
    """One ratio of new to old probability for each token, or their geometric mean for the whole answer; that of loss_type unless given."""
    epsilon: float | None = None
    """How far that ratio may fall below 1 before it gains nothing more; 0.2 unless given, 0.0003 for gspo."""
    epsilon_high: float | None = None
    """The same above 1; as epsilon unless given, but 0.28 for dapo and 0.0004 for gspo. For cispo the bound of the ratio itself: 5."""
    delta: float | None = None
    """Bounds the ratio where the advantage is negative (two-sided clipping); 3 is usual. None is off."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    sampling_ratio_cap: float | None = None
    """Weigh tokens by the ratio of the trainer's probability to the sampler's, at most this (truncated importance sampling); for backends where the two differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length", "num_iterations", "max_resamples"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_method()
        size, each = self.per_device_train_batch_size, self.num_generations
        require(
            size % each == 0,
            f"per_device_train_batch_size {size} does not divide by num_generations {each}: an update has whole groups",
        )
        require(self.beta is None or self.beta >= 0.0, f"beta must be 0 or more, got {self.beta}")
        require(self.entropy_coef >= 0.0, f"entropy_coef must be 0 or more, got {self.entropy_coef}")
        require(0.0 <= self.gamma <= 1.0, f"gamma must be between 0 and 1, got {self.gamma}")
        cap, cache = self.sampling_ratio_cap, self.soft_punish_cache
        require(cap is None or cap > 0.0, f"sampling_ratio_cap must be above 0, got {cap}")
        require(
            cache is None or 1 <= cache <= self.max_completion_length,
            f"soft_punish_cache must be at least 1 and at most max_completion_length {self.max_completion_length}, got {cache}",
        )

    def _check_method(self) -> None:
        method, kind = self.method, self.loss_type
        estimator = method.advantage_estimator
        require(
            self.num_generations > 1 or estimator == "reinforce_plus_plus",
            f"num_generations must be at least 2: {kind} compares an answer with others to the same prompt",
        )
        require(
            self.zero_std_groups == "keep" or estimator != "reinforce_plus_plus",
            f"zero_std_groups {self.zero_std_groups} is for methods that compare within groups; {kind} compares over the whole batch",
        )
        for name, needs in (("scale_rewards", "group"), ("normalize_advantages", "rloo")):
            require(
                not getattr(self, name) or estimator == needs,
                f"{name} goes with the advantage estimator {needs}, not with {estimator}: leave it out",
            )
        require(
            self.gamma == 1.0 or estimator.startswith("reinforce"),
            f"gamma discounts rewards by token, which the advantage estimator {estimator} does not have: leave it out",
        )
        require(
            kind != "rloo" or not estimator.startswith("reinforce"),
            f"loss_type rloo takes a whole answer for one action, {estimator} gives each token an advantage: take loss_type {estimator}",
        )
        if kind in ("rloo", "reinforce"):
            require(
                self.importance_sampling_level is None,
                f"importance_sampling_level is not for loss_type {kind}: leave it out",
            )
        if kind in ("rloo", "reinforce", "cispo"):
            require(self.delta is None, f"delta is not for loss_type {kind}: leave it out")
        if kind in ("reinforce", "cispo"):
            require(self.epsilon is None, f"epsilon is not for loss_type {kind}: leave it out")
        if kind == "reinforce":
            require(self.epsilon_high is None, "epsilon_high is not for loss_type reinforce: leave it out")
            require(
                self.num_iterations == self.num_mini_batches == 1,
                "loss_type reinforce takes one step an update, since it does not see that the policy has moved: leave num_iterations "
                "and num_mini_batches at 1, or take bnpo",
            )
        require(
            method.beta > 0.0 or (self.kl_penalty is None and self.kl_estimator is None),
            "kl_penalty and kl_estimator need a weight of the KL: give --beta above 0, or leave them out",
        )
        require(
            method.beta > 0.0 or not self.sync_ref_model,
            "sync_ref_model moves what the policy is held to, which takes a weight of the KL: give --beta above 0, or leave it out",
        )
        require(0.0 < method.epsilon < 1.0, f"epsilon must be above 0 and below 1, got {method.epsilon}")
        require(method.epsilon_high > 0.0, f"epsilon_high must be above 0, got {method.epsilon_high}")
        require(
            self.delta is None or self.delta > 1.0 + method.epsilon_high,
            f"delta must be above 1 + epsilon_high = {1.0 + method.epsilon_high:g}, got {self.delta}",
        )
        require(
            method.kl_penalty == "reward" or method.kl_estimator != "k1",
            "kl_estimator k1 teaches nothing as a loss: give --kl-estimator k2 or k3, or --kl-penalty reward",
        )
        require(
            method.kl_penalty == "loss" or method.kl_estimator == "k1",
            f"kl_estimator {method.kl_estimator} in the reward does not hold the policy (unlikely tokens cost more than likely ones, so that "
            "both become less alike): give --kl-estimator k1, or --kl-penalty loss",
        )

    @property
    def method(self) -> GroupMethod:
        """What ``loss_type`` is made of, with what is given otherwise."""
        base = _METHODS[self.loss_type]
        names = [field.name for field in dataclasses.fields(GroupMethod)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.epsilon is not None and self.epsilon_high is None:
            given["epsilon_high"] = self.epsilon
        if self.kl_estimator is None and self.kl_penalty not in (None, base.kl_penalty):
            given["kl_estimator"] = "k1" if self.kl_penalty == "reward" else "k2"
        return dataclasses.replace(base, **given)

    @property
    def num_prompts(self) -> int:
        """Prompts of an update."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def answer_length(self) -> int:
        """``max_completion_length``."""
        return self.max_completion_length
