"""How far the policy is from its reference: estimates from sampled tokens, the penalty they make, and its coefficient.

With x drawn from the policy and d = ln pi(x) - ln ref(x), three estimates of KL(pi || ref) (Schulman 2020, "Approximating KL
divergence"):

- k1 = d: unbiased, noisy, negative at times;
- k2 = d^2 / 2: biased, low variance;
- k3 = e^-d - 1 + d: unbiased, low variance, never negative.

As a reward, which is a constant to the gradient, only k1 leads to ref e^(reward / beta) / Z: with k2 and k3 tokens that became unlikely
are the dear ones, so that a step away from ref makes the next one cheaper. As a loss what counts is the gradient: E[grad k1] = 0;
E[grad k2] is the gradient of KL(pi || ref); E[grad k3] is that of KL(ref || pi), whose optimum is another policy.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.numerics import Float32, Float64, Floats, Ints, Metrics, bounded_ratio, f64, require_shape
from ingot.losses.packed import usable

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Floats, ref_logprobs: Floats, kl_estimator: str = "k3") -> tuple[Float64, Float64]:
    """The estimate at each token, and its derivative by ``logprobs``; both f64, like ``logprobs``, in nats."""
    require_shape(np.shape(logprobs), ref_logprobs=ref_logprobs)
    d = f64(logprobs) - f64(ref_logprobs)
    if kl_estimator == "k1":
        return d, np.ones_like(d)
    if kl_estimator == "k2":
        return f64(d**2 / 2), d
    if kl_estimator == "k3":
        inverse, inside = bounded_ratio(-d)
        return inverse - 1 + d, 1 - inverse * inside
    raise ConfigError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {kl_estimator!r}")


def kl_loss(
    logprobs: Floats,
    ref_logprobs: Floats,
    targets: Ints,
    weights: Floats,
    *,
    beta: float,
    kl_estimator: str = "k3",
) -> tuple[float, Float32, Metrics]:
    """L = beta sum_t w_t k(t), a penalty beside the policy loss: k2 for KL(pi || ref), k3 as GRPO has it (Shao et al. 2024, eq. 4).

    Parameters
    ----------
    logprobs, ref_logprobs
        [N], of the policy and of the reference.
    targets
        i32 [N], -1 where nothing counts.
    weights
        [N], from :func:`~ingot.losses.packed.mean_weights`.
    beta
        Coefficient.
    kl_estimator
        ``k2`` or ``k3``; ``k1`` is a ``ConfigError``, its expected gradient is 0.

    Returns
    -------
    loss, d_logprobs, metrics
        f64; f32 [N]; ``kl``: the weighted mean of the estimate.
    """
    if kl_estimator == "k1":
        raise ConfigError("kl_estimator k1 teaches nothing as a loss: take k2 or k3, or put the KL into the reward")
    keep, metrics = usable(targets, logprobs, ref_logprobs)
    require_shape(targets.shape, weights=weights)
    k, d_k = kl_estimate(np.where(keep, logprobs, 0.0), np.where(keep, ref_logprobs, 0.0), kl_estimator)
    w = np.where(keep, f64(weights), 0.0)
    kl = float(w @ k)
    return beta * kl, (beta * w * d_k).astype(np.float32), {"kl": kl, **metrics}


class KLController(Protocol):
    """Holds the coefficient of the KL penalty and says what it is after an update of the policy."""

    @property
    def kl_coef(self) -> float:
        """beta."""

    def updated(self, kl: float, num_episodes: int) -> KLController:
        """The controller for the next rollout, after ``num_episodes`` episodes whose mean KL (summed over tokens) was ``kl``."""


@dataclasses.dataclass(frozen=True)
class FixedKLController:
    """The same coefficient throughout."""

    kl_coef: float
    """beta."""

    def updated(self, kl: float, num_episodes: int) -> FixedKLController:
        """Itself."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveKLController:
    """Moves the coefficient so that the KL settles at a target (Ziegler et al. 2019, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2);  beta <- beta (1 + e num_episodes / horizon).
    """

    kl_coef: float
    """beta."""
    target: float = 6.0
    """Wanted KL of an episode, in nats."""
    horizon: float = 10_000.0
    """Episodes over which an error of 1 would multiply beta by e."""

    def __post_init__(self) -> None:
        for name in ("kl_coef", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")

    def updated(self, kl: float, num_episodes: int) -> AdaptiveKLController:
        """With beta moved by at most 20 % of num_episodes / horizon."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return dataclasses.replace(self, kl_coef=self.kl_coef * (1 + error * num_episodes / self.horizon))
