"""Labellers of known quality: they rank by a given score, with as much noise and bias as asked. For tests and the small world.

A simulated labeller is a function of what it is shown: the same seed, name, group and repeat give the same judgement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from ingot.data.keys import Text, uniform
from ingot.errors import ConfigError
from ingot.feedback.candidates import Group
from ingot.feedback.criteria import BUILT_IN, Criterion
from ingot.feedback.records import Record, with_id
from ingot.feedback.schedule import shown_order
from ingot.feedback.session import Judgement, Showing
from ingot.feedback.texts import plain

Score = Callable[[Text, Text], float]
"""(prompt, response) -> how good the response is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedLabeler:
    """Ranks by score + noise + biases; a callable for :func:`ingot.feedback.session.collect`.

    With Gumbel noise of scale 1 the ranking is a draw from the Plackett-Luce model of the scores, and of two responses the better
    one wins with probability sigmoid(difference): Bradley-Terry.

    Raises
    ------
    ConfigError
        A setting is out of its range.
    """

    score: Score
    name: str = "simulated"
    """Different names have different noise."""
    noise: float = 1.0
    """Scale of the Gumbel noise, in units of the score; 0 ranks by the score itself, equal scores tied."""
    position_bias: float = 0.0
    """Added to what is shown first, falling evenly to 0 for what is shown last."""
    length_bias: float = 0.0
    """Added for each time a response is e times as long."""
    flip_rate: float = 0.0
    """How often a whole ranking comes out turned round, so that each of its pairs is wrong."""
    tie_width: float = 0.0
    """Responses that differ from the best of their place by no more than this are tied."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("noise", "tie_width"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; give 0 or more")
        if not 0 <= self.flip_rate <= 1:
            raise ConfigError(f"flip_rate is {self.flip_rate}; give a share from 0 to 1")

    def __call__(self, showing: Showing) -> Judgement:
        """Judge one item."""
        key = (self.seed, self.name, showing.group_id, showing.repeat)
        size = len(showing.responses)
        values = []
        for place, response in enumerate(showing.responses):
            value = self.score(showing.prompt, response)
            if self.noise:
                # Keyed by the response, not by its place: what is shown where must not change the noise.
                value += self.noise * -math.log(-math.log(_open_interval(uniform("noise", *key, response))))
            value += self.position_bias * (size - 1 - place) / (size - 1)
            value += self.length_bias * math.log(1 + len(plain(response)))
            values.append(value)
        ranks = _rank(values, self.tie_width)
        if uniform("flip", *key) < self.flip_rate:
            ranks = tuple(max(ranks) + 1 - rank for rank in ranks)
        return Judgement(ranks=ranks)


def simulate_judgements(
    groups: Iterable[Group], labeler: SimulatedLabeler, criterion: Criterion = BUILT_IN["helpful"], repeat: int = 0
) -> list[Record]:
    """The records of a simulated labeller who judges each group once, without a file: what ``collect`` writes, all at once."""
    records = []
    for group in groups:
        order = shown_order(
            len(group.responses), seed=labeler.seed, labeler=labeler.name, group_id=group.group_id, repeat=repeat
        )
        judgement = labeler(
            Showing(group.group_id, repeat, group.prompt, tuple(group.responses[place] for place in order))
        )
        ranks = [0] * len(order)
        for place, rank in zip(order, judgement.ranks, strict=True):
            ranks[place] = rank
        records.append(
            with_id(
                Record(
                    prompt=group.prompt,
                    responses=group.responses,
                    ranks=tuple(ranks),
                    group_id=group.group_id,
                    annotator=labeler.name,
                    criterion=criterion.name,
                    order=order,
                    kind="repeat" if repeat else "new",
                    repeat=repeat,
                    gold_ranks=group.gold_ranks,
                    source_models=group.sources,
                    rubric=criterion.rubric,
                )
            )
        )
    return records


def _rank(values: Sequence[float], tie_width: float) -> tuple[int, ...]:
    """1 for the largest; a value joins the place above while it is within ``tie_width`` of that place's largest."""
    ranks = [0] * len(values)
    rank = 0
    top = math.inf
    for number in sorted(range(len(values)), key=lambda number: -values[number]):
        if rank == 0 or top - values[number] > tie_width:
            rank += 1
            top = values[number]
        ranks[number] = rank
    return tuple(ranks)


def _open_interval(value: float) -> float:
    """0 and 1 have no Gumbel quantile."""
    return min(max(value, 1e-300), 1.0 - 2.0**-53)
