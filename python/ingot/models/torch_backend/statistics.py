"""The next-token distribution of a row of scores (alignment of names: :class:`ingot.models.base.Outputs`)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of rows of scores; each [R]."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    zbar: Tensor
    top1: Tensor

    @classmethod
    def of(cls, scores: Tensor, targets: Tensor) -> Statistics:
        """From scores [R, V] with banned ids at -inf, and i64 targets [R]."""
        allowed = scores > -math.inf
        lse = scores.logsumexp(-1)
        log_p = scores - lse[:, None]
        entropy = -(log_p.exp() * log_p.masked_fill(~allowed, 0.0)).sum(-1)
        # Rounding can leave a tiny negative number; the gradient is that of the formula all the same.
        entropy = entropy + (entropy.clamp(min=0.0) - entropy).detach()
        chosen = scores.gather(-1, targets[:, None])
        # Of several equal scores the first is the likeliest.
        rivals = (scores > chosen) | (scores == chosen) & (
            torch.arange(scores.shape[-1], device=scores.device) < targets[:, None]
        )
        zbar = scores.masked_fill(~allowed, 0.0).sum(-1) / allowed.sum(-1)
        return cls(chosen[:, 0] - lse, entropy, lse, zbar, ~rivals.any(-1))
