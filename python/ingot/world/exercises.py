"""Exercises in keeping track of who and what is where.

In a document three words of a hundred have to be looked up, and chance decides most of the others, so a network takes long to find
out how looking up is done. In an exercise every seventh word has to be looked up. Networks that begin with exercises learn the
documents themselves several times sooner (docs/experiments.md has the figures).

An exercise has no first line and no end. One that is like a story opens as stories do, with a combination that is not held out, and asks as
documents do: it shows that stories are to be read in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from ingot.world.grammar import ENTITIES, KEY_MASK, Choices, Entity, combinations, numbered_words, tell_move
from ingot.world.questions import Question, ask
from ingot.world.vocabulary import PEOPLE, PERSON_VERBS, PLACES, THING_VERBS, THINGS, TIMES

_STREAMS = {False: 5, True: 6}
# One exercise takes at most 74.
_WORDS_PER_EXERCISE = 80
_CAST_SIZES = (2, 3, 4)
_LEAST_EVENTS, _EVENT_COUNTS = 8, 8


def exercises(seed: int, count: int | None = None, *, start: int = 0, like_stories: bool = False) -> Iterator[str]:
    """Exercises number ``start``, ``start + 1``, ... of this seed; without ``count``, endlessly.

    Two to four people and things, each somewhere; then 8 to 15 sentences: someone or something moves (3 in 10), a question with its
    answer (2 in 10), or a reminder of where one of them is now. One that is like a story has two people and a thing, begins with a story's
    first two sentences, goes on for 4 to 11, and ends with a line for each question. Exercise i depends on (seed, kind, i) alone.
    """
    write = _like_a_story if like_stories else _sentences_alone
    for words in numbered_words([seed & KEY_MASK, _STREAMS[like_stories]], _WORDS_PER_EXERCISE, count, start):
        yield write(Choices(words))


_Cast = list[tuple[Entity, str]]


def _sentences_alone(choices: Choices) -> str:
    below = choices.below
    people, things = list(PEOPLE), list(THINGS)
    cast: _Cast = []
    where: dict[str, str] = {}
    sentences = []
    for _ in range(_CAST_SIZES[below(len(_CAST_SIZES))]):
        if below(3) == 0:
            name = things.pop(below(len(things)))
            cast.append(("thing", name))
            subject = f"The {name}"
        else:
            subject = name = people.pop(below(len(people)))
            cast.append(("who", name))
        where[name] = PLACES[below(len(PLACES))]
        sentences.append(f"{subject} was in the {where[name]}.")
    sentences += _events(choices, cast, where, _LEAST_EVENTS + below(_EVENT_COUNTS))
    return " ".join(sentences)


def _like_a_story(choices: Choices) -> str:
    below = choices.below
    sides = combinations("train")
    who, thing, place = sides[below(len(sides))]
    time = TIMES[below(len(TIMES))]
    people = [person for person in PEOPLE if person != who]
    friend = people[below(len(people))]
    places = [other for other in PLACES if other != place]
    cast: _Cast = list(zip(ENTITIES, (who, friend, thing), strict=True))
    where = {who: place, friend: places[below(len(places))], thing: place}
    sentences = [f"One {time} {who} was in the {place} with a {thing}.", f"{friend} was in the {where[friend]}."]
    sentences += _events(choices, cast, where, _LEAST_EVENTS // 2 + below(_EVENT_COUNTS))
    lines = [" ".join(sentences)]
    while cast:
        lines.append(_asked(_question(cast.pop(below(len(cast))), where)))
    return "\n".join(lines)


def _events(choices: Choices, cast: _Cast, where: dict[str, str], count: int) -> list[str]:
    """``count`` sentences about these; ``where`` follows what they tell."""
    below = choices.below
    sentences = []
    for _ in range(count):
        entity, name = cast[below(len(cast))]
        kind = below(10)
        if kind < 3:
            verbs = THING_VERBS if entity == "thing" else PERSON_VERBS
            verb = verbs[below(len(verbs))]
            others = [place for place in PLACES if place != where[name]]
            where[name] = others[below(len(others))]
            sentences.append(tell_move(entity, name, verb, where[name]))
            continue
        question = _question((entity, name), where)
        sentences.append(_asked(question) if kind < 5 else question.answer)
    return sentences


def _question(who: tuple[Entity, str], where: dict[str, str]) -> Question:
    entity, name = who
    return ask(entity, name, where[name])


def _asked(question: Question) -> str:
    return f"{question.text} {question.answer}"
