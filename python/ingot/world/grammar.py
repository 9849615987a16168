"""Stories with their exact probabilities.

A story comes from a short series of choices, each uniform over a list that is known at that point; its probability is the product of
one over the lengths of these lists. No two series give the same text, so the probability of the text is that of its series.

Who, thing and place make a combination. A keyed hash sends each combination to ``train`` or to ``held_out``, and a story of one side
is drawn uniformly from the combinations of that side alone: the held-out ones are never seen together in training, and the
probabilities are those of the side, not of the grammar as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ingot.world.vocabulary import (
    ENCOUNTERS,
    ENDINGS,
    PEOPLE,
    PERSON_VERBS,
    PLACES,
    READERS,
    THING_VERBS,
    THINGS,
    TIMES,
    TOLD,
)

Split = Literal["train", "held_out"]
Entity = Literal["who", "friend", "thing"]

ENTITIES: tuple[Entity, ...] = ("who", "friend", "thing")
NUM_MOVES = (2, 3, 4)
"""How many moves a story can have."""

_HELD_OUT_KEY = b"the small world"
# Reader -> what can be met in stories for this reader: kinds and words.
_ENCOUNTERS = {
    reader: tuple((kind, word) for kind in kinds for word in ENCOUNTERS[kind][1]) for reader, kinds in TOLD.items()
}
_ENDING_KINDS = tuple(ENDINGS)

CHUNK = 256
"""Stories whose random words are drawn at once, because that is ten times as fast."""
# One story takes at most 22.
_WORDS_PER_STORY = 32
_STREAMS: dict[Split, int] = {"train": 1, "held_out": 2}
KEY_MASK = (1 << 64) - 1
"""Seeds are taken modulo 2^64."""


@dataclasses.dataclass(frozen=True)
class Move:
    """Someone or something gets to another place."""

    entity: Entity
    verb: str
    place: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What the first line asks for."""

    reader: str
    who: str
    thing: str
    place: str
    ending: str

    @property
    def text(self) -> str:
        """The first line, without its line break."""
        about = f"{self.who}, a {self.thing} and the {self.place}"
        return f"A story for a {self.reader} about {about}, with a {self.ending} end."


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that a story tells."""

    time: str
    who: str
    place: str
    """Where the story begins: of the hero and of the thing."""
    thing: str
    friend: str
    friend_place: str
    """Where the friend is at first."""
    moves: tuple[Move, ...]
    encounter: str
    """Kind of encounter, a key of ``ENCOUNTERS``."""
    encountered: str
    together: bool
    """Whether the last sentence tells of the friend too."""
    ending: str
    """Kind of ending, a key of ``ENDINGS``."""
    last_word: str

    def name(self, entity: Entity) -> str:
        """The word for it in this story."""
        return {"who": self.who, "friend": self.friend, "thing": self.thing}[entity]

    def whereabouts(self) -> dict[Entity, str]:
        """Where everything is when the story is over."""
        places: dict[Entity, str] = {"who": self.place, "friend": self.friend_place, "thing": self.place}
        for move in self.moves:
            places[move.entity] = move.place
        return places

    def places_mentioned(self) -> list[str]:
        """In the order in which the story mentions them."""
        return [self.place, self.friend_place, *(move.place for move in self.moves)]

    @property
    def text(self) -> str:
        """The story, one line without its line break."""
        sentences = [f"One {self.time} {self.who} was in the {self.place} with a {self.thing}."]
        sentences.append(f"{self.friend} was in the {self.friend_place}.")
        for move in self.moves:
            sentences.append(tell_move(move.entity, self.name(move.entity), move.verb, move.place))
        sentences.append(f"They {ENCOUNTERS[self.encounter][0]} a {self.encountered}.")
        subject = f"{self.who} and {self.friend}" if self.together else self.who
        sentences.append(f"The end was {self.ending}: {subject} {self.last_word}.")
        return " ".join(sentences)


def tell_move(entity: Entity, name: str, verb: str, place: str) -> str:
    """The sentence for a move: things do not move by themselves."""
    return f"Someone {verb} the {name} to the {place}." if entity == "thing" else f"{name} {verb} to the {place}."


@dataclasses.dataclass(frozen=True)
class Story:
    """A request and a story that does what it asks."""

    request: Request
    facts: Facts
    log_probability: float
    """Natural logarithm of the probability of request and story among all stories of its side."""

    @property
    def prompt(self) -> str:
        """The first line with its line break: what a model gets."""
        return self.request.text + "\n"

    @property
    def text(self) -> str:
        """The line that follows."""
        return self.facts.text


@functools.cache
def combinations(split: Split) -> tuple[tuple[str, str, str], ...]:
    """The (who, thing, place) that belong to this side."""
    return tuple(
        (who, thing, place)
        for who in PEOPLE
        for thing in THINGS
        for place in PLACES
        if split_of(who, thing, place) == split
    )


def split_of(who: str, thing: str, place: str) -> Split:
    """The side that a combination belongs to: about half of them are held out."""
    digest = hashlib.blake2b(f"{who} {thing} {place}".encode(), key=_HELD_OUT_KEY, digest_size=1).digest()
    return "held_out" if digest[0] & 1 else "train"


def log_probability(request: Request, facts: Facts) -> float:
    """Natural logarithm of the probability of this request and story on the side of its combination.

    Minus infinity where no story is told like that: it does not do what was asked, or says what cannot be.
    """
    asked = (request.who, request.thing, request.place, request.ending)
    if asked != (facts.who, facts.thing, facts.place, facts.ending):
        return -math.inf
    mentioned = facts.places_mentioned()
    if facts.encounter not in TOLD[request.reader]:
        return -math.inf
    if facts.friend == facts.who or len(set(mentioned)) < len(mentioned) or len(facts.moves) not in NUM_MOVES:
        return -math.inf
    split = split_of(request.who, request.thing, request.place)
    choices = [len(READERS), len(combinations(split)), len(_ENDING_KINDS), len(TIMES), len(PEOPLE) - 1, len(PLACES) - 1]
    choices.append(len(NUM_MOVES))
    for number, move in enumerate(facts.moves):
        verbs = THING_VERBS if move.entity == "thing" else PERSON_VERBS
        choices += [len(ENTITIES), len(verbs), len(PLACES) - 2 - number]
    choices += [len(_ENCOUNTERS[request.reader]), 2, len(ENDINGS[facts.ending])]
    return -math.fsum(map(math.log, choices))


def stories(seed: int, split: Split, count: int | None = None, *, start: int = 0) -> Iterator[Story]:
    """Stories number ``start``, ``start + 1``, ... of this seed and side; without ``count``, endlessly.

    Story i depends on (seed, split, i) alone: not on Python's version, its hash seed, or the stories asked for before.
    """
    key = [seed & KEY_MASK, _STREAMS[split]]
    for words in numbered_words(key, _WORDS_PER_STORY, count, start):
        yield _tell(words, split)


def numbered_words(key: list[int], size: int, count: int | None, start: int) -> Iterator[list[int]]:
    """``size`` random 64-bit words for each of the numbers ``start``, ``start + 1``, ...; those of a number depend on (key, number) alone."""
    stop = math.inf if count is None else start + count
    index = start
    while index < stop:
        chunk = index // CHUNK
        # A chunk has a counter block of its own; each counter of Philox gives four words.
        generator = np.random.Philox(key=key, counter=[0, chunk, 0, 0])
        words = generator.random_raw(CHUNK * size).reshape(CHUNK, -1).tolist()
        while index < stop and index // CHUNK == chunk:
            yield words[index % CHUNK]
            index += 1


class Choices:
    """Uniform choices from random 64-bit words, and the logarithm of the probability of all that were made."""

    def __init__(self, words: list[int]) -> None:
        self._words = iter(words)
        self.log_probability = 0.0

    def below(self, n: int) -> int:
        self.log_probability -= _LOGARITHMS[n] if n < len(_LOGARITHMS) else math.log(n)
        # The high word of the product: off from uniform by less than n / 2^64.
        return (next(self._words) * n) >> 64


_LOGARITHMS = (0.0, *(math.log(n) for n in range(1, 64)))


def _tell(words: list[int], split: Split) -> Story:
    choices = Choices(words)
    below = choices.below
    reader = READERS[below(len(READERS))]
    sides = combinations(split)
    who, thing, place = sides[below(len(sides))]
    ending = _ENDING_KINDS[below(len(_ENDING_KINDS))]
    time = TIMES[below(len(TIMES))]
    people = [person for person in PEOPLE if person != who]
    friend = people[below(len(people))]
    places = [other for other in PLACES if other != place]
    friend_place = places.pop(below(len(places)))
    moves = []
    for _ in range(NUM_MOVES[below(len(NUM_MOVES))]):
        entity = ENTITIES[below(len(ENTITIES))]
        verbs = THING_VERBS if entity == "thing" else PERSON_VERBS
        moves.append(Move(entity, verbs[below(len(verbs))], places.pop(below(len(places)))))
    encounter, encountered = _ENCOUNTERS[reader][below(len(_ENCOUNTERS[reader]))]
    together = below(2) == 1
    last_words = ENDINGS[ending]
    last_word = last_words[below(len(last_words))]
    facts = Facts(
        time, who, place, thing, friend, friend_place, tuple(moves),
        encounter, encountered, together, ending, last_word,
    )  # fmt: skip
    return Story(Request(reader, who, thing, place, ending), facts, choices.log_probability)
