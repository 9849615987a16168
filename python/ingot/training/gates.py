"""Before a policy is trained against a reward: does the reward's favourite among n answers please somebody that the reward does not know?

Best of n is what a policy comes to that is trained against the reward with a divergence of about ln n - (n - 1) / n nats. Where the
judge likes the reward's choice no better than any answer, more training makes the reward rise and nothing else.

Shape legend: P prompts, n answers to each.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.data.rows import Content
from ingot.errors import ConfigError, DataError
from ingot.inference.intervals import mean_of
from ingot.inference.prompts import PromptEncoder
from ingot.inference.scoring import split_name
from ingot.losses.best_of_n import best_of_n_kl_bound, expected_of_best
from ingot.losses.numerics import Float64
from ingot.models.base import Sampling
from ingot.training.rewards import RewardFunction, RewardFunctions, completion_like
from ingot.training.rollouts import MAX_SEQUENCES, Progress, banned_ids_of, sample_rollouts
from ingot.training.verdicts import Verdict

if TYPE_CHECKING:
    from ingot.models.base import Model

# Keys the gate's random numbers, so that its answers are none of a run's own.
_STREAM = 0x62_65_73_74 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class BestOfN:
    """What the best of 1 .. n answers, chosen by the reward, is worth."""

    reward: Float64
    """Mean over prompts of the unbiased estimate of the best's reward, f64 [n]."""
    judge: Float64
    """The same of what the judge gives the reward's choice, f64 [n]."""
    gains: Float64
    """The judge's score of the best of n less that of the mean answer, for each prompt, f64 [P]."""
    num_unscored: int
    """Prompts left out because the reward or the judge had nothing to say about an answer."""

    @property
    def gain(self) -> float:
        """Mean of :attr:`gains`."""
        return mean_of(self.gains).value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain, normal over prompts; without bounds below two prompts."""
        found = mean_of(self.gains)
        return found.low, found.high


def best_of_n(reward: Float64, judge: Float64) -> BestOfN:
    """From the scores of n answers to each of P prompts, f64 [P, n]; a prompt with a NaN is left out."""
    there = np.isfinite(reward).all(axis=1) & np.isfinite(judge).all(axis=1)
    size = reward.shape[1]
    rewards = [expected_of_best(scores, scores) for scores in reward[there]]
    judged = [expected_of_best(scores, values) for scores, values in zip(reward[there], judge[there], strict=True)]
    if not judged:
        nothing = np.full(size, math.nan)
        return BestOfN(nothing, nothing, np.empty(0), len(reward))
    table = np.array(judged)
    return BestOfN(
        np.mean(rewards, axis=0), table.mean(axis=0), table[:, -1] - table[:, 0], int(np.count_nonzero(~there))
    )


def best_of_n_gate(
    model: Model,
    encoder: PromptEncoder,
    prompts: Sequence[Content],
    reward: RewardFunctions,
    judge: RewardFunctions,
    *,
    n: int = 16,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    max_sequences: int = MAX_SEQUENCES,
    progress: Progress | None = None,
) -> Verdict:
    """Draw n answers to each prompt, let the reward choose, and let the judge say whether its choice is better than the mean answer.

    It passes where the 95 % interval of the judge's gain, over prompts, lies above 0.

    Parameters
    ----------
    model, encoder
        The policy, before it is trained.
    prompts
        Such as nobody trained on. Those that leave no room to answer are left out.
    reward, judge
        The judge must not know what the reward knows: a function that tells what is really wanted, or a reward model of other
        judgements (:func:`require_other_judge`).
    n
        Answers to each prompt.
    columns
        Other columns of the prompts, one entry for each prompt, for functions that take them.
    progress
        See :data:`ingot.training.rollouts.Progress`.

    Raises
    ------
    ConfigError
        ``n`` is below 2, or a setting does not fit.
    DataError
        No prompt leaves room to answer.
    RewardError
        The reward or the judge failed.
    """
    if n < 2:
        raise ConfigError(f"best of {n} chooses nothing: give at least 2 answers for each prompt")
    ids = [encoder.encode(prompt) for prompt in prompts]
    kept = [number for number, each in enumerate(ids) if len(each) < model.config.max_position_embeddings]
    if not kept:
        raise DataError(
            f"none of {len(prompts)} prompts leaves room to answer in the model's context of {model.config.max_position_embeddings}"
        )
    rollouts = sample_rollouts(
        model,
        [ids[number] for number in kept],
        num_generations=n,
        max_new_tokens=max_new_tokens,
        end_ids=encoder.end_ids,
        seed=seed,
        episode_ids=_STREAM + np.arange(len(kept) * n, dtype=np.int64),
        sampling=Sampling(temperature=temperature),
        banned_ids=banned_ids_of(encoder.tokenizer, model.config.vocab_size, encoder.end_ids),
        max_sequences=max_sequences,
        progress=progress,
    )
    asked = [prompts[number] for number in kept for _ in range(n)]
    answers = [
        completion_like(prompt, encoder.decode(rollouts.completion_ids(place))) for place, prompt in enumerate(asked)
    ]
    named = {name: [values[number] for number in kept for _ in range(n)] for name, values in (columns or {}).items()}
    scores = [each(asked, answers, named).total.reshape(len(kept), n) for each in (reward, judge)]
    return gate_verdict(best_of_n(*scores), reward=" + ".join(reward.names), judge=" + ".join(judge.names))


def gate_verdict(found: BestOfN, *, reward: str, judge: str) -> Verdict:
    """In words and figures; passed where the interval of the gain lies above 0. ``reward`` and ``judge`` are their names."""
    n, num = len(found.judge), len(found.gains)
    low, high = found.interval
    if num < 2:
        return Verdict(
            passed=False,
            sentences=(f"Best of {n} could be judged on {num} prompts.",),
            figures={"n": n, "num_prompts": num, "judge": judge, "reward": reward},
            advice="Give prompts that both the reward and the judge have something to say about.",
        )
    passed = low > 0
    sentences = (
        f"Of {n} answers to each of {num:,} prompts, the one that {reward} likes best gets {found.judge[-1]:.3f} from {judge}, "
        f"an answer as it comes {found.judge[0]:.3f}: a gain of {found.gain:.3f} (95 % interval {low:.3f} to {high:.3f}).",
        f"The reward itself rises from {found.reward[0]:.3f} to {found.reward[-1]:.3f}, "
        f"at a divergence of at most {best_of_n_kl_bound(n):.2f} nats.",
    )
    advice = (
        f"What {reward} likes is not what {judge} likes, so a policy trained against it would please it alone: look at the answers it "
        "prefers, and collect judgements of such answers."
    )
    figures: dict[str, float | int | str | None] = {
        "n": n,
        "num_prompts": num,
        "num_unscored": found.num_unscored,
        "reward": reward,
        "judge": judge,
        "judge_mean": float(found.judge[0]),
        "judge_best": float(found.judge[-1]),
        "gain": found.gain,
        "gain_low": low,
        "gain_high": high,
        "reward_mean": float(found.reward[0]),
        "reward_best": float(found.reward[-1]),
        "kl_bound": best_of_n_kl_bound(n),
    }
    return Verdict(passed=passed, sentences=sentences, figures=figures, advice=advice)


def require_other_judge(rewards: Sequence[RewardFunction | str], judge: RewardFunction | str) -> None:
    """Refuse a judge that is one of the rewards, or a reward model that learnt from the same judgements as one of them.

    Raises
    ------
    ConfigError
        Says which.
    """
    for reward in rewards:
        if same_reward(reward, judge):
            raise ConfigError(
                f"{_name(judge)} is the judge and the reward: it would approve of itself; give a judge that the reward does not know"
            )
        ours, theirs = _examples_hash(reward), _examples_hash(judge)
        if ours is not None and ours == theirs:
            raise ConfigError(
                f"{_name(judge)} learnt from the same judgements as {_name(reward)}: give a judge that learnt from others, or a function"
            )


def same_reward(first: RewardFunction | str, second: RewardFunction | str) -> bool:
    """Whether both name one thing: the same function, or the same file or folder however its path is written."""
    if isinstance(first, str) and isinstance(second, str):
        return _place(first) == _place(second)
    return first is second


def _place(name: str) -> tuple[str, str]:
    folder, criterion = split_name(name)
    if Path(folder).is_dir():
        return str(Path(folder).resolve()), criterion or ""
    path, colon, attribute = name.rpartition(":")
    return (str(Path(path).resolve()), attribute) if colon and path.endswith(".py") else (name.replace(":", "."), "")


def _name(reward: RewardFunction | str) -> str:
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def _examples_hash(reward: RewardFunction | str) -> str | None:
    """Of what a reward model learnt from; None where that is not known."""
    if not isinstance(reward, str):
        return None
    try:
        facts = json.loads((Path(split_name(reward)[0]) / "run.json").read_bytes())
        found: str = facts["data"]["examples_hash"]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None
