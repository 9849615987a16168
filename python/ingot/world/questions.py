"""Questions about a story: where someone or something is when it is over. The answer has to be looked up in the story.

Three rules that guess are the baselines that a reader of stories has to beat; none is right in more than two cases of five.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ingot.world.grammar import CHUNK, ENTITIES, KEY_MASK, Entity, Facts, Split, Story, stories

_ORDERS: tuple[tuple[Entity, ...], ...] = tuple(itertools.permutations(ENTITIES))
_STREAMS: dict[Split, int] = {"train": 3, "held_out": 4}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its only right answer."""

    entity: Entity
    text: str
    answer: str
    """A sentence."""
    place: str
    """What the sentence says."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A story with the three questions about it and their answers: what a model is trained on."""

    story: Story
    questions: tuple[Question, ...]
    log_probability: float
    """Natural logarithm of the probability of the whole text among the documents of its side."""

    @property
    def text(self) -> str:
        """First line, story, and one line for each question with its answer; no line break at the end."""
        lines = [f"{question.text} {question.answer}" for question in self.questions]
        return "\n".join([self.story.prompt + self.story.text, *lines])


def questions(facts: Facts) -> tuple[Question, ...]:
    """The questions about a story: hero, friend, thing."""
    return tuple(ask(entity, facts.name(entity), place) for entity, place in facts.whereabouts().items())


def documents(seed: int, split: Split, count: int | None = None, *, start: int = 0) -> Iterator[Document]:
    """Documents number ``start``, ``start + 1``, ...; document i holds story i, with the questions in one of six orders."""
    orders: list[int] = []
    for index, story in enumerate(stories(seed, split, count, start=start), start):
        if not orders or index % CHUNK == 0:
            generator = np.random.Philox(key=[seed & KEY_MASK, _STREAMS[split]], counter=[0, index // CHUNK, 0, 0])
            orders = [(word * len(_ORDERS)) >> 64 for word in generator.random_raw(CHUNK).tolist()]
        by_entity = {question.entity: question for question in questions(story.facts)}
        asked = tuple(by_entity[entity] for entity in _ORDERS[orders[index % CHUNK]])
        yield Document(story, asked, story.log_probability - math.log(len(_ORDERS)))


def baselines(training: Iterable[Document], held_out: Sequence[Document]) -> dict[str, float]:
    """Share of the held-out questions that each guessing rule answers rightly.

    Returns
    -------
    dict
        ``most_frequent``: the most frequent answer of the training text. ``without_story``: the most frequent answer to the same
        question in the training text. ``last_mentioned``: the place that the story mentions last.
    """
    overall: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = {}
    for document in training:
        for question in document.questions:
            overall[question.place] += 1
            by_question.setdefault(question.text, Counter())[question.place] += 1
    frequent = _most_frequent(overall)
    guesses = {text: _most_frequent(counts) for text, counts in by_question.items()}
    right: Counter[str] = Counter()
    total = 0
    for document in held_out:
        last = document.story.facts.places_mentioned()[-1]
        for question in document.questions:
            total += 1
            right["most_frequent"] += question.place == frequent
            right["without_story"] += question.place == guesses.get(question.text, frequent)
            right["last_mentioned"] += question.place == last
    return {name: right[name] / total for name in ("most_frequent", "without_story", "last_mentioned")}


def ask(entity: Entity, name: str, place: str) -> Question:
    """The question where ``name`` is, whose answer is ``place``."""
    if entity == "thing":
        return Question(entity, f"Where is the {name} now?", f"The {name} is in the {place}.", place)
    return Question(entity, f"Where is {name} now?", f"{name} is in the {place}.", place)


def _most_frequent(counts: Counter[str]) -> str:
    """Ties go to the word that sorts first, so that the answer does not depend on the order of counting."""
    return min(counts, key=lambda place: (-counts[place], place))
