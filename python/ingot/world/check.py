"""Reading texts back: does a story consist of well-formed sentences, and does it do what its first line asks?

This reads text alone, with patterns of its own, so it judges what a model wrote as it judges what the grammar wrote.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from ingot.world.grammar import Entity, Facts, Move, Request, log_probability
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
)

ASPECTS: Final = ("who", "where", "thing", "ending")
"""What a first line asks for."""

_ENDING_OF = {word: ending for ending, words in ENDINGS.items() for word in words}
_ENCOUNTER_OF = {(verb, word): kind for kind, (verb, words) in ENCOUNTERS.items() for word in words}


def _one_of(words: Iterable[str]) -> str:
    return "(" + "|".join(map(re.escape, words)) + ")"


_PERSON, _THING, _PLACE = _one_of(PEOPLE), _one_of(THINGS), _one_of(PLACES)
_REQUEST = re.compile(
    rf"A story for a {_one_of(READERS)} about {_PERSON}, a {_THING} and the {_PLACE}, with a {_one_of(ENDINGS)} end\."
)
_OPENING = re.compile(rf"One {_one_of(TIMES)} {_PERSON} was in the {_PLACE} with a {_THING}\.")
_FRIEND = re.compile(rf"{_PERSON} was in the {_PLACE}\.")
_PERSON_MOVES = re.compile(rf"{_PERSON} {_one_of(PERSON_VERBS)} to the {_PLACE}\.")
_THING_MOVES = re.compile(rf"Someone {_one_of(THING_VERBS)} the {_THING} to the {_PLACE}\.")
_ENCOUNTER = re.compile(
    "They (?:" + "|".join(f"({verb}) a {_one_of(words)}" for verb, words in ENCOUNTERS.values()) + r")\."
)
_CLOSING = re.compile(rf"The end was {_one_of(ENDINGS)}: {_PERSON}(?: and {_PERSON})? {_one_of(_ENDING_OF)}\.")
_SENTENCES = (_OPENING, _FRIEND, _PERSON_MOVES, _THING_MOVES, _ENCOUNTER, _CLOSING)


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found in a story."""

    num_sentences: int
    num_well_formed: int
    """Sentences of one of the world's six shapes, each word from the list that belongs there."""
    follows: Mapping[str, bool]
    """For each of ``ASPECTS``, whether the story does what the first line asks."""
    facts: Facts | None
    """What the story tells, where all of it could be read."""
    encounter: str | None
    """The kind of encounter that it tells of; None where there is none, or more than one."""
    possible: bool
    """Whether the world tells such a story on such a request: everything in order, nobody in two places."""

    @property
    def well_formed(self) -> bool:
        """Whether every sentence is."""
        return self.num_sentences == self.num_well_formed

    @property
    def follows_all(self) -> bool:
        """Whether the story does all that was asked."""
        return all(self.follows.values())


def parse_request(line: str) -> Request | None:
    """The request that a first line makes; None where it is no request."""
    match = _REQUEST.fullmatch(line.rstrip("\n"))
    return None if match is None else Request(*match.groups())


def parse_story(text: str) -> Facts | None:
    """What a story tells; None where it is not built as stories are."""
    sentences = split_sentences(text)
    if len(sentences) < 4 or " ".join(sentences) != text:
        return None
    opening, friend, *moves, encounter, closing = sentences
    opened, met = _OPENING.fullmatch(opening), _FRIEND.fullmatch(friend)
    encountered, closed = _ENCOUNTER.fullmatch(encounter), _CLOSING.fullmatch(closing)
    if not (opened and met and encountered and closed):
        return None
    time, who, place, thing = opened.groups()
    friend_name, friend_place = met.groups()
    made = []
    for sentence in moves:
        move = _parse_move(sentence, {who: "who", friend_name: "friend", thing: "thing"})
        if move is None:
            return None
        made.append(move)
    ending, subject, companion, last_word = closed.groups()
    if subject != who or companion not in (None, friend_name) or _ENDING_OF[last_word] != ending:
        return None
    _, word = (group for group in encountered.groups() if group is not None)
    return Facts(
        time, who, place, thing, friend_name, friend_place, tuple(made),
        _kind_of(encountered), word, companion is not None, ending, last_word,
    )  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """The sentences of a line; an end without a full stop is a sentence too."""
    return [piece for piece in re.split(r"(?<=\.) ", text) if piece]


def check(text: str, request: Request) -> Check:
    """Judge a story by the request it was written for."""
    sentences = split_sentences(text)
    well_formed = [any(pattern.fullmatch(sentence) for pattern in _SENTENCES) for sentence in sentences]
    opened = _OPENING.fullmatch(sentences[0]) if sentences else None
    closed = _CLOSING.fullmatch(sentences[-1]) if sentences else None
    follows = {
        "who": opened is not None and opened[2] == request.who and (closed is None or closed[2] == request.who),
        "where": opened is not None and opened[3] == request.place,
        "thing": opened is not None and opened[4] == request.thing,
        "ending": closed is not None and closed[1] == _ENDING_OF[closed[4]] == request.ending,
    }
    facts = parse_story(text)
    encounters = [match for match in map(_ENCOUNTER.fullmatch, sentences) if match]
    return Check(
        num_sentences=max(1, len(sentences)),
        num_well_formed=sum(well_formed),
        follows=follows,
        facts=facts,
        encounter=_kind_of(encounters[0]) if len(encounters) == 1 else None,
        possible=facts is not None and log_probability(request, facts) > -math.inf,
    )


@dataclasses.dataclass(frozen=True)
class Scores:
    """Figures over many samples; each is a share between 0 and 1."""

    num_samples: int
    well_formed: float
    """Of all sentences."""
    distinct: float
    """Different stories among the samples."""
    copied: float
    """Samples that are stories of the training text, word for word."""
    follows_request: Mapping[str, float]
    """Of the stories, by what was asked, and ``all`` of it together."""
    possible: float
    """Stories that the world could have told on that request."""


def score_samples(requests: Sequence[Request], texts: Sequence[str], training: Iterable[str] = ()) -> Scores:
    """Score one story for each request.

    Parameters
    ----------
    texts
        The lines that follow the first line, without a line break.
    training
        The stories that were trained on, to find copies of.
    """
    if len(requests) != len(texts) or not texts:
        raise ValueError(f"{len(requests)} requests and {len(texts)} stories: give as many of each, and at least one")
    checks = [check(text, request) for text, request in zip(texts, requests, strict=True)]
    count = len(checks)
    seen = set(training)
    follows = {aspect: sum(one.follows[aspect] for one in checks) / count for aspect in ASPECTS}
    follows["all"] = sum(one.follows_all for one in checks) / count
    return Scores(
        num_samples=count,
        well_formed=sum(one.num_well_formed for one in checks) / sum(one.num_sentences for one in checks),
        distinct=len(set(texts)) / count,
        copied=sum(text in seen for text in texts) / count,
        follows_request=follows,
        possible=sum(one.possible for one in checks) / count,
    )


def _kind_of(encounter: re.Match[str]) -> str:
    """The kind of encounter that a sentence tells of."""
    verb, word = (group for group in encounter.groups() if group is not None)
    return _ENCOUNTER_OF[verb, word]


def _parse_move(sentence: str, entities: Mapping[str, Entity]) -> Move | None:
    match = _PERSON_MOVES.fullmatch(sentence)
    if match is not None:
        name, verb, place = match.groups()
    else:
        match = _THING_MOVES.fullmatch(sentence)
        if match is None:
            return None
        verb, name, place = match.groups()
    return Move(entities[name], verb, place) if name in entities else None
