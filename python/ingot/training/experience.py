"""One rollout with all that is known of it: what was drawn, how likely it was then and to the reference, and what it is worth."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np

from ingot.data.rows import Content
from ingot.losses.kl import kl_estimate
from ingot.losses.numerics import Float64, f64
from ingot.losses.packed import sum_by_sequence
from ingot.models.base import FloatArray, LongArray, Model, Sampling
from ingot.training.prompts import Prompt
from ingot.training.rollouts import Mismatch, Progress, Rollouts, logprob_mismatch, recompute, sample_rollouts
from ingot.training.scores import Scores, correlation
from ingot.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Draw:
    """The place of a rollout among all of a run: everything that drawing it again takes."""

    position: int = 0
    """Prompts taken before, over all passes."""
    episode: int = 0
    """Episodes drawn before."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experience:
    """Episodes of one policy. Shapes: S episodes, N tokens of all of them."""

    rollouts: Rollouts
    prompts: tuple[Prompt, ...]
    """Of each episode, [S]."""
    texts: tuple[str, ...]
    """The answers, [S]."""
    scores: Scores
    logprobs: FloatArray
    """ln pi(action) by the forward pass of training at the weights that drew, f32 [N]."""
    ref_logprobs: FloatArray
    """By the reference, f32 [N]."""
    values: FloatArray | None
    """Of the policy's own value head, f32 [N]."""
    mismatch: Mismatch
    """Of sampling and training."""
    seconds: Mapping[str, float]
    """What took how long: sampling, scoring, reference (with the old log-probabilities)."""

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def kl(self) -> Float64:
        """KL to the reference of each episode, the sum of k1 over its actions, nats, f64 [S]."""
        return self._kl("k1")

    def _kl(self, estimator: str) -> Float64:
        estimate, _ = kl_estimate(self.logprobs, self.ref_logprobs, estimator)
        return sum_by_sequence(estimate, self.rollouts.targets, self.rollouts.offsets)

    def select(self, numbers: Sequence[int] | LongArray) -> Experience:
        """These episodes, in this order."""
        at = np.asarray(numbers, np.int64)
        rows = self.rollouts.rows_of(at)
        return dataclasses.replace(
            self,
            rollouts=self.rollouts.select(at),
            prompts=tuple(self.prompts[n] for n in at),
            texts=tuple(self.texts[n] for n in at),
            scores=self.scores.select(at),
            logprobs=self.logprobs[rows],
            ref_logprobs=self.ref_logprobs[rows],
            values=None if self.values is None else self.values[rows],
        )

    @classmethod
    def join(cls, parts: Sequence[Experience]) -> Experience:
        """Several of one policy as one, in this order. The mismatch is that of the worst part."""
        values = [part.values for part in parts if part.values is not None]
        return cls(
            rollouts=Rollouts.join([part.rollouts for part in parts]),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            texts=tuple(text for part in parts for text in part.texts),
            scores=Scores.join([part.scores for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            ref_logprobs=np.concatenate([part.ref_logprobs for part in parts]),
            values=np.concatenate(values) if values else None,
            mismatch=max((part.mismatch for part in parts), key=lambda mismatch: mismatch.mean),
            seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        )

    def metrics(self) -> dict[str, float]:
        """Figures of a line of metrics: scores, KL by two estimators, entropy, lengths, how answers ended, how diverse they are."""
        rollouts, total = self.rollouts, self.scores.total
        lengths = f64(rollouts.num_actions)
        distinct, repeated = bigrams(rollouts)
        return {
            **self.scores.metrics(),
            "val/num_episodes": float(len(self)),
            "objective/kl": float(self.kl.mean()),
            "objective/kl_k3": float(self._kl("k3").mean()),
            "objective/entropy": float(sum_by_sequence(rollouts.entropy, rollouts.targets, rollouts.offsets).mean()),
            "objective/score_length_correlation": correlation(total, lengths),
            **rollouts.metrics(),
            "completions/eos_rate": float(1.0 - rollouts.truncated.mean()),
            "completions/distinct_2": distinct,
            "completions/repetition": repeated,
            **self.mismatch.metrics(),
        }


def gather(
    setup: Setup,
    prompts: Sequence[Prompt],
    *,
    policy: Model,
    num_generations: int = 1,
    first_episode: int,
    seed: int,
    values: bool = False,
    reference: Model | None = None,
    progress: Progress | None = None,
) -> Experience:
    """Let the policy answer prompts, and find out all that learning from the answers takes.

    Parameters
    ----------
    policy
        Its weights now. Its old log-probabilities are computed again by the forward pass of training and compared with those of
        sampling; on the native backend the two are the same bits.
    num_generations
        Answers of each prompt; those of one prompt are neighbours, ``rollouts.group_ids`` counts the prompts from 0.
    first_episode, seed
        Episode ``first_episode + i`` of ``seed`` is a function of the weights and its prompt.
    values
        Also ask the policy's own value head.
    reference
        What the policy is held to; the one that the run began with unless given.
    progress
        See :data:`ingot.training.rollouts.Progress`.
    """
    clock = _Clock()
    count = len(prompts) * num_generations
    rollouts = sample_rollouts(
        policy,
        [prompt.ids for prompt in prompts],
        num_generations=num_generations,
        max_new_tokens=setup.max_new_tokens,
        end_ids=setup.encoder.end_ids,
        seed=seed,
        episode_ids=np.arange(first_episode, first_episode + count, dtype=np.int64),
        sampling=Sampling(temperature=setup.temperature),
        banned_ids=setup.banned_ids,
        max_sequences=setup.max_sequences,
        progress=progress,
    )
    clock.lap("sampling")
    want = ("logprobs", "values") if values else ("logprobs",)
    old = recompute(policy, rollouts, want, max_tokens=setup.pack_length)
    held_to = reference or setup.reference
    ref_logprobs = recompute(held_to, rollouts, ("logprobs",), max_tokens=setup.pack_length)["logprobs"]
    clock.lap("reference")
    asked = tuple(prompt for prompt in prompts for _ in range(num_generations))
    texts = tuple(setup.encoder.decode(rollouts.completion_ids(number)) for number in range(count))
    scores = setup.scorers(rollouts, asked, texts)
    clock.lap("scoring")
    return Experience(
        rollouts=rollouts,
        prompts=asked,
        texts=texts,
        scores=scores,
        logprobs=old["logprobs"],
        ref_logprobs=ref_logprobs,
        values=old.get("values"),
        mismatch=logprob_mismatch(rollouts, old["logprobs"]),
        seconds=clock.seconds,
    )


def bigrams(rollouts: Rollouts) -> tuple[float, float]:
    """Share of different pairs of neighbouring tokens among those of all answers (distinct-2, Li et al. 2016), and the share of pairs
    that repeat one of the same answer."""
    seen: set[tuple[int, int]] = set()
    total = repeated = 0
    for number in range(len(rollouts)):
        ids = rollouts.completion_ids(number).tolist()
        pairs = list(itertools.pairwise(ids))
        own = set(pairs)
        seen |= own
        total += len(pairs)
        repeated += len(pairs) - len(own)
    return (len(seen) / total, repeated / total) if total else (0.0, 0.0)


def shown(content: Content) -> str:
    """A prompt as text, for samples."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
