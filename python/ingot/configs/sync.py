"""A reference that follows the policy."""

from __future__ import annotations

import dataclasses

from ingot.configs.checks import require
from ingot.configs.training import RunConfig

_MIXUP_ALPHA = 0.6
_SYNC_STEPS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncConfig(RunConfig):
    """What phases are told that hold the policy to a reference: whether that stays where the run began, or follows."""

    sync_ref_model: bool = False
    """Let the reference follow the policy, which may then go further than the KL to the start allows (TR-DPO, Gorbatovski et al. 2024). Held-out figures stay measured against the reference that the run began with. Takes memory for one more copy of the weights."""
    ref_model_mixup_alpha: float = _MIXUP_ALPHA
    """How far it goes at a time: reference = alpha * policy + (1 - alpha) * reference, weight by weight; 1 makes it the policy of that moment."""
    ref_model_sync_steps: int = _SYNC_STEPS
    """Steps between two such moves; updates in the phases that learn from their own samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, steps = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        require(0.0 < alpha <= 1.0, f"ref_model_mixup_alpha must be above 0 and at most 1, got {alpha}")
        require(steps >= 1, f"ref_model_sync_steps must be at least 1, got {steps}")
        for name, value, default in (
            ("ref_model_mixup_alpha", alpha, _MIXUP_ALPHA),
            ("ref_model_sync_steps", steps, _SYNC_STEPS),
        ):
            require(
                self.sync_ref_model or value == default,
                f"{name} has no effect without sync_ref_model: give that too, or leave it out",
            )
