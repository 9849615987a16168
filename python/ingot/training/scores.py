"""What sampled answers are worth: the rewards that are trained against, and those that only watch.

Three kinds of score, side by side and never mixed up:

- the proxy, which the policy is trained to raise: reward models and functions with weights;
- the judge: a reward model that the policy is not trained against;
- gold: a function that knows what is really wanted, where there is one.

Reward models read the sampled tokens themselves, never their text again: another division of the same text into tokens would be
another sequence than the one that was drawn.

Shape legend: S episodes, N tokens of all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ingot.configs import OnlineConfig
from ingot.data.chat import ChatEncoder
from ingot.data.rows import Content
from ingot.errors import ConfigError
from ingot.inference.prompts import PromptEncoder
from ingot.inference.scoring import RewardModel, is_reward_folder
from ingot.losses.advantages import penalize_missing_eos
from ingot.losses.numerics import Float64
from ingot.models.base import IntArray, LongArray
from ingot.tokenizer import Tokenizer
from ingot.training.gates import require_other_judge
from ingot.training.prompts import Prompt
from ingot.training.rewards import RewardFunction, RewardFunctions, completion_like

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.models.sharing import SharedBase
    from ingot.training.rollouts import Rollouts


@runtime_checkable
class TokenScorer(Protocol):
    """What scores sampled tokens: :class:`ingot.inference.scoring.RewardModel`, or something like it from a program."""

    name: str

    def score_tokens(self, tokens: IntArray, offsets: LongArray, *, end_id: int | None = None) -> Float64:
        """Score of each sequence of a packed batch, prompt and answer, f64 [S]; one that was cut is scored as if ``end_id`` followed."""
        ...

    def require_tokens_of(self, encoder: ChatEncoder | Tokenizer, source: str) -> None:
        """Refuse ids of another tokenizer."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the episodes of a rollout. NaN where none applies."""

    total: Float64
    """What is trained against: weighted sum, less the penalty of answers that did not end, f64 [S]."""
    each: Mapping[str, Float64]
    """By reward, before weights and penalty, f64 [S]."""
    judge: Float64 | None
    """f64 [S]"""
    gold: Float64 | None
    """f64 [S]"""

    def metrics(self) -> dict[str, float]:
        """``objective/scores`` with ``_std``, ``_min``, ``_max``; the same for ``judge`` and ``gold``, and how they correlate with the
        scores over these answers; ``rewards/NAME/mean`` and ``/std`` as in TRL."""
        found: dict[str, float] = {}
        for name, values in (("scores", self.total), ("judge", self.judge), ("gold", self.gold)):
            there = np.empty(0) if values is None else values[np.isfinite(values)]
            if there.size:
                found |= {
                    f"objective/{name}": float(there.mean()),
                    f"objective/{name}_std": float(there.std(ddof=1)) if there.size > 1 else 0.0,
                    f"objective/{name}_min": float(there.min()),
                    f"objective/{name}_max": float(there.max()),
                }
        for name, values in (("judge", self.judge), ("gold", self.gold)):
            if values is not None:
                found[f"objective/{name}_correlation"] = correlation(self.total, values)
        for name, values in self.each.items():
            there = values[np.isfinite(values)]
            found[f"rewards/{name}/mean"] = float(there.mean()) if there.size else 0.0
            found[f"rewards/{name}/std"] = float(there.std(ddof=1)) if there.size > 1 else 0.0
        return found

    def select(self, numbers: Sequence[int] | LongArray) -> Scores:
        """Those of these episodes, in this order."""
        at = np.asarray(numbers, np.int64)
        return Scores(
            self.total[at],
            {name: values[at] for name, values in self.each.items()},
            None if self.judge is None else self.judge[at],
            None if self.gold is None else self.gold[at],
        )

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Several as one, in this order."""

        def joined(values: Sequence[Float64 | None]) -> Float64 | None:
            there = [each for each in values if each is not None]
            return np.concatenate(there) if there else None

        return cls(
            np.concatenate([part.total for part in parts]),
            {name: np.concatenate([part.each[name] for part in parts]) for name in parts[0].each},
            joined([part.judge for part in parts]),
            joined([part.gold for part in parts]),
        )


class Scorers:
    """The rewards of a run.

    Parameters
    ----------
    config
        Names rewards, weights, judge, gold and the penalty of answers that do not end.
    encoder
        Of the policy.
    rewards, gold
        Instead of those that ``config`` names: functions, or reward models (:class:`TokenScorer`).

    Reward models are there after :meth:`load_models`.

    Raises
    ------
    ConfigError
        There is no reward, a function cannot be loaded, or judge or gold is what is trained against.
    """

    def __init__(
        self,
        config: OnlineConfig,
        encoder: PromptEncoder,
        rewards: Sequence[RewardFunction | TokenScorer] = (),
        gold: RewardFunction | None = None,
    ) -> None:
        self._encoder = encoder
        self._penalty = config.missing_eos_penalty
        self._replace = config.missing_eos == "replace"
        sources: list[Any] = [*config.rewards, *rewards]
        if not sources:
            raise ConfigError(
                "no reward was given: --reward-model with the folder of one, or --reward ./my_reward.py:FUNCTION"
            )
        weights = config.reward_weights or (1.0,) * len(sources)
        if len(weights) != len(sources):
            raise ConfigError(
                f"reward_weights has {len(weights)} numbers for {len(sources)} rewards: give one for each, the reward model's first"
            )
        known_gold = gold or config.gold
        self._config = config
        self._named: list[tuple[TokenScorer | str, float]] = []
        self._models: list[tuple[TokenScorer, float]] = []
        functions: list[Any] = []
        function_weights: list[float] = []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            must_be_model = number == 0 and config.reward_model is not None
            is_model = isinstance(source, str) and (must_be_model or is_reward_folder(source))
            if is_model or isinstance(source, TokenScorer):
                self._named.append((source, weight))
            else:
                functions.append(source)
                function_weights.append(weight)
        if known_gold is not None:
            require_other_judge(sources, known_gold)
        timeout_s = config.reward_timeout
        self._functions = RewardFunctions(functions, function_weights, timeout_s=timeout_s) if functions else None
        self._gold = None if known_gold is None else RewardFunctions([known_gold], timeout_s=timeout_s)
        self._judge: TokenScorer | None = None
        if config.judge is not None:
            require_other_judge(sources, config.judge)

    def load_models(self, base: SharedBase | None = None) -> None:
        """Load reward models and the judge; those that are adapters on ``base`` take its weights and no memory for their own.

        Raises
        ------
        ConfigError, CheckpointError, DataError
            One cannot be loaded, or reads another tokenizer.
        """
        self._models = [(self._open(source, base), weight) for source, weight in self._named]
        if self._config.judge is not None:
            self._judge = self._open(self._config.judge, base)

    def _open(self, source: TokenScorer | str, base: SharedBase | None) -> TokenScorer:
        if isinstance(source, str):
            source = RewardModel.load(source, base=base, **self._config.place)
        source.require_tokens_of(self._encoder.chat or self._encoder.tokenizer, self._config.model)
        return source

    @property
    def networks(self) -> list[Model]:
        """Those that score and are known to be networks."""
        scorers = [*(model for model, _ in self._models), *([] if self._judge is None else [self._judge])]
        return [scorer.model for scorer in scorers if isinstance(scorer, RewardModel)]

    @property
    def reward_model(self) -> RewardModel:
        """The one that ``config.reward_model`` names, which is the first of all rewards."""
        model = self._models[0][0]
        assert isinstance(model, RewardModel)
        return model

    @property
    def name(self) -> str:
        """Of all that is trained against."""
        functions = () if self._functions is None else self._functions.names
        return " + ".join([*(model.name for model, _ in self._models), *functions])

    @property
    def watcher(self) -> str | None:
        """Who is not trained against and knows best what is wanted: ``gold``, else ``judge``, else nobody."""
        return "gold" if self.has_gold else "judge" if self.has_judge else None

    @property
    def has_judge(self) -> bool:
        """Whether a second reward model watches."""
        return self._config.judge is not None

    @property
    def has_gold(self) -> bool:
        """Whether what is really wanted is known."""
        return self._gold is not None

    def __call__(self, rollouts: Rollouts, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Scores of episodes.

        Parameters
        ----------
        prompts, texts
            Of each episode: [S] each.

        Raises
        ------
        RewardError
            A reward function did something else than giving a number for each.
        """
        each: dict[str, Float64] = {}
        total, applies = np.zeros(len(rollouts)), np.zeros(len(rollouts), np.bool_)
        for model, weight in self._models:
            name = model.name if model.name not in each else f"{model.name}_{len(each)}"
            each[name] = self._by_tokens(model, rollouts, prompts)
            total += weight * each[name]
            applies[:] = True
        if self._functions is not None:
            found = self._functions(*_as_told(prompts, texts))
            each |= dict(zip(found.names, found.each.T, strict=True))
            there = np.isfinite(found.total)
            total += np.where(there, found.total, 0.0)
            applies |= there
        if self._penalty is not None:
            total = penalize_missing_eos(
                total, ~rollouts.truncated, missing_eos_penalty=self._penalty, replace=self._replace
            )
        return Scores(
            np.where(applies, total, np.nan),
            each,
            None if self._judge is None else self._by_tokens(self._judge, rollouts, prompts),
            None if self._gold is None else self._gold(*_as_told(prompts, texts)).total,
        )

    def _by_tokens(self, model: TokenScorer, rollouts: Rollouts, prompts: Sequence[Prompt]) -> Float64:
        scores = np.empty(len(rollouts))
        ends = np.array([self._encoder.end_id_for(prompt.content) for prompt in prompts])
        for end in dict.fromkeys(ends.tolist()):
            at = np.flatnonzero(ends == end)
            part = rollouts if len(at) == len(rollouts) else rollouts.select(at)
            # Only what looks at steps has to know where the answer begins.
            by_steps = isinstance(model, RewardModel) and model.step_separator is not None
            more = {"prompt_lengths": part.prompt_lengths} if by_steps else {}
            scores[at] = model.score_tokens(part.tokens, part.offsets, end_id=end, **more)
        return scores


def _as_told(
    prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[list[Content], list[Content], dict[str, list[Any]]]:
    """Prompts, completions and the prompts' other columns, as reward functions take them."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return (
        [prompt.content for prompt in prompts],
        [completion_like(prompt.content, text) for prompt, text in zip(prompts, texts, strict=True)],
        {name: [prompt.columns.get(name) for prompt in prompts] for name in names},
    )


def correlation(x: Float64, y: Float64) -> float:
    """Pearson's, over pairs that are both finite; 0 where one of the two does not vary."""
    keep = np.isfinite(x) & np.isfinite(y)
    if np.count_nonzero(keep) < 2 or np.ptp(x[keep]) == 0.0 or np.ptp(y[keep]) == 0.0:
        return 0.0
    return float(np.corrcoef(x[keep], y[keep])[0, 1])
