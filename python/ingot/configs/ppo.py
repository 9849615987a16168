"""Proximal policy optimisation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ingot.configs.checks import require
from ingot.configs.online import OnlineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Proximal policy optimisation: a model that answers and a reward in, a model whose answers are rewarded more out."""

    output: str = "runs/ppo"
    """The run's folder: model, tokenizer, checkpoints, metrics and curves."""
    response_length: int = 64
    """Most tokens of an answer."""
    num_ppo_epochs: int = 4
    """Passes over the answers of one update."""
    adam_epsilon: float = 1e-5
    """AdamW's epsilon."""
    gamma: float = 1.0
    """Discount of later rewards, by token."""
    lam: float = 1.0
    """Of generalized advantages: 1 trusts the rewards, 0 the critic. Answers of more than about 64 tokens take 0.95."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards to deviation 1 before advantages are taken."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of an update to mean 0 and deviation 1."""
    cliprange: float = 0.2
    """The policy gains nothing by moving the ratio of its probability to the sampling policy's further from 1 than this."""
    delta: float | None = None
    """Bounds that ratio above where the advantage is negative (dual clip); 3 is usual. None is off."""
    vf_coef: float = 0.1
    """Weight of the value loss beside the policy's."""
    cliprange_value: float | None = 0.2
    """How far a value may move from its old one within an update; None for any. Meant for rewards of deviation about 1."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = 0.1
    """Weight of the KL to the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL from sampled tokens: k1 where it is taken off the reward, k2 or k3 where it is a loss."""
    kl_penalty: Literal["reward", "loss"] = "reward"
    """Take the KL off the reward, or add it to the loss (k2: KL of the policy to the reference; k3: of the reference to the policy)."""
    kl_target: float | None = None
    """Move kl_coef so that the KL of an answer settles at this many nats (6 is usual); None keeps kl_coef as it is."""
    kl_horizon: float = 10_000.0
    """Answers over which kl_coef reacts to such a target."""
    target_kl: float | None = None
    """End an update early where a step finds the policy this many nats a token (approxkl) from the one that sampled; 0.02 is usual."""
    sampling_ratio_cap: float | None = None
    """Weigh advantages by the ratio of the trainer's probability to the sampler's, at most this; for backends where the two differ."""
    critic: Literal["shared", "policy", "reward_model"] = "shared"
    """What estimates values: a head on the policy's own network, starting at 0; or a network of its own that starts from the model, or from the reward model."""
    critic_learning_rate: float | None = None
    """Peak learning rate of a critic of its own; learning_rate unless given."""
    ptx_data: tuple[str, ...] = ()
    """Text that every step also learns from, so that what pretraining taught is kept: files and folders (.txt, .jsonl)."""
    ptx_coef: float = 1.0
    """Weight of that loss (a mean over tokens) beside PPO's. Both gradients' norms are logged: bring them near each other."""
    ptx_batch_size: int = 8
    """Windows of such text in a step."""
    ptx_length: int = 256
    """Tokens of such a window."""
    separator: str | None = None
    """Cut the files of ptx_data into documents at this string."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("response_length", "num_ppo_epochs", "ptx_batch_size", "ptx_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            require(0.0 <= getattr(self, name) <= 1.0, f"{name} must be between 0 and 1, got {getattr(self, name)}")
        require(0.0 < self.cliprange < 1.0, f"cliprange must be above 0 and below 1, got {self.cliprange}")
        require(
            self.delta is None or self.delta > 1.0 + self.cliprange,
            f"delta must be above 1 + cliprange = {1.0 + self.cliprange:g}, got {self.delta}",
        )
        for name in ("vf_coef", "ent_coef", "kl_coef", "ptx_coef"):
            require(getattr(self, name) >= 0.0, f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in (
            "cliprange_value",
            "kl_target",
            "kl_horizon",
            "target_kl",
            "sampling_ratio_cap",
            "critic_learning_rate",
        ):
            value = getattr(self, name)
            require(value is None or value > 0.0, f"{name} must be above 0, got {value}")
        require(
            self.kl_penalty == "reward" or self.kl_estimator != "k1",
            "kl_estimator k1 teaches nothing as a loss: give --kl-estimator k2 or k3, or --kl-penalty reward",
        )
        require(
            self.kl_penalty == "loss" or self.kl_estimator == "k1",
            f"kl_estimator {self.kl_estimator} in the reward does not hold the policy (its own gradient is missing there): "
            "give --kl-estimator k1, or --kl-penalty loss",
        )
        require(
            self.kl_target is None or self.kl_coef > 0.0,
            "kl_target moves kl_coef, which must be above 0 to begin with",
        )
        require(
            self.kl_coef > 0.0 or not self.sync_ref_model,
            "sync_ref_model moves what the policy is held to, which takes a weight of the KL: give --kl-coef above 0, or leave it out",
        )
        require(
            self.critic != "reward_model" or self.reward_model is not None,
            "critic reward_model needs a reward model to start from: give --reward-model",
        )
        require(
            self.critic_learning_rate is None or self.critic != "shared",
            "critic_learning_rate is of a critic of its own: give --critic policy or --critic reward_model",
        )

    @property
    def answer_length(self) -> int:
        """``response_length``."""
        return self.response_length
