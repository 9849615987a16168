"""What a policy answers to held-out requests, in figures, and how two policies differ on the same ones.

Index legend: R requests, one story each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingot import world
from ingot.demo.requests import conversation
from ingot.training.rollouts import Progress, Rollouts, banned_ids_of, recompute_logprobs, sample_rollouts

if TYPE_CHECKING:
    from ingot.inference.prompts import PromptEncoder
    from ingot.models.base import Model

_MAX_NEW_TOKENS = 120
"""No story of the world is longer; a model that does not stop is stopped."""


@dataclasses.dataclass(frozen=True)
class Responses:
    """One story for each request, drawn at temperature 1."""

    requests: Sequence[world.Request]
    texts: list[str]
    rollouts: Rollouts
    pleases: npt.NDArray[np.float64]
    """Whether the world's rule gives it full marks, 0 or 1, f64 [R]."""
    follows: npt.NDArray[np.float64]
    """Whether it does all that was asked, 0 or 1, f64 [R]."""
    well_formed: npt.NDArray[np.float64]
    """Whether each of its sentences is, 0 or 1, f64 [R]."""
    entropy: npt.NDArray[np.float64]
    """Sum over its tokens of the entropy of what could have been written instead, nats, f64 [R]. Its mean is the entropy of all
    stories that the policy can tell."""

    @property
    def distinct(self) -> float:
        """Share of different stories among all."""
        return len(set(self.texts)) / len(self.texts)

    @property
    def ended(self) -> float:
        """Share that ended by themselves."""
        return 1.0 - float(self.rollouts.truncated.mean())

    @property
    def length(self) -> float:
        """Mean length in tokens."""
        return float(self.rollouts.num_actions.mean())

    def divergence(self, reference: Model) -> float:
        """Mean over stories of sum ln(policy / reference), nats: an unbiased estimate of KL(policy || reference) per story."""
        difference = self.rollouts.logprobs.astype(np.float64) - recompute_logprobs(reference, self.rollouts)
        return float(difference.sum() / len(self.rollouts))

    def figures(self) -> dict[str, float]:
        """Means over the requests."""
        return {
            "preferred": float(self.pleases.mean()),
            "follows_prompt": float(self.follows.mean()),
            "well_formed": float(self.well_formed.mean()),
            "diversity": float(self.entropy.mean()),
            "distinct": self.distinct,
            "ended": self.ended,
            "length": self.length,
        }


def respond(
    model: Model,
    encoder: PromptEncoder,
    requests: Sequence[world.Request],
    *,
    seed: int,
    progress: Progress | None = None,
) -> Responses:
    """Let a model that was fine-tuned tell a story for each request. The same seed gives two models the same random numbers."""
    rollouts = sample_rollouts(
        model,
        [encoder.encode(conversation(request)) for request in requests],  # type: ignore[arg-type]
        max_new_tokens=_MAX_NEW_TOKENS,
        end_ids=encoder.end_ids,
        banned_ids=banned_ids_of(encoder.tokenizer, model.config.vocab_size, encoder.end_ids),
        seed=seed,
        progress=progress,
    )
    texts = [encoder.decode(rollouts.completion_ids(number)).strip() for number in range(len(rollouts))]
    checks = [world.check(text, request) for text, request in zip(texts, requests, strict=True)]
    pleases = [world.pleases(request.text, text) for text, request in zip(texts, requests, strict=True)]
    return Responses(
        requests=requests,
        texts=texts,
        rollouts=rollouts,
        pleases=np.array(pleases, np.float64),
        follows=np.array([check.follows_all for check in checks], np.float64),
        well_formed=np.array([check.well_formed for check in checks], np.float64),
        entropy=np.add.reduceat(rollouts.entropy.astype(np.float64), rollouts.offsets[:-1]),
    )
