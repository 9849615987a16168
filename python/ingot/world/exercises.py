"""Exercises in keeping track of who and what is where.

In a document three words of a hundred have to be looked up, and chance decides most of the others, so a network takes long to find
out how looking up is done. In an exercise every seventh word has to be looked up. Networks that begin with exercises learn the
documents themselves several times sooner (docs/experiments.md has the figures).

An exercise has no first line, no hero and no end, so it is none of the combinations that are held out.
"""

from __future__ import annotations

from collections.abc import Iterator

from ingot.world.grammar import KEY_MASK, Choices, Entity, numbered_words, tell_move
from ingot.world.questions import ask
from ingot.world.vocabulary import PEOPLE, PERSON_VERBS, PLACES, THING_VERBS, THINGS

_STREAM = 5
# One exercise takes at most 74.
_WORDS_PER_EXERCISE = 80
_ENTITIES = (2, 3, 4)
_LEAST_EVENTS, _EVENT_COUNTS = 8, 8


def exercises(seed: int, count: int | None = None, *, start: int = 0) -> Iterator[str]:
    """Exercises number ``start``, ``start + 1``, ... of this seed; without ``count``, endlessly.

    Two to four people and things, each somewhere; then 8 to 15 sentences: someone or something moves (3 in 10), a question with its
    answer (2 in 10), or a reminder of where one of them is now. Exercise i depends on (seed, i) alone.
    """
    for words in numbered_words([seed & KEY_MASK, _STREAM], _WORDS_PER_EXERCISE, count, start):
        yield _write(Choices(words))


def _write(choices: Choices) -> str:
    below = choices.below
    people, things = list(PEOPLE), list(THINGS)
    cast: list[tuple[Entity, str]] = []
    where: dict[str, str] = {}
    sentences = []
    for _ in range(_ENTITIES[below(len(_ENTITIES))]):
        if below(3) == 0:
            name = things.pop(below(len(things)))
            cast.append(("thing", name))
            subject = f"The {name}"
        else:
            subject = name = people.pop(below(len(people)))
            cast.append(("who", name))
        where[name] = PLACES[below(len(PLACES))]
        sentences.append(f"{subject} was in the {where[name]}.")
    for _ in range(_LEAST_EVENTS + below(_EVENT_COUNTS)):
        entity, name = cast[below(len(cast))]
        kind = below(10)
        if kind < 3:
            verbs = THING_VERBS if entity == "thing" else PERSON_VERBS
            verb = verbs[below(len(verbs))]
            others = [place for place in PLACES if place != where[name]]
            where[name] = others[below(len(others))]
            sentences.append(tell_move(entity, name, verb, where[name]))
            continue
        question = ask(entity, name, where[name])
        sentences.append(f"{question.text} {question.answer}" if kind < 5 else question.answer)
    return " ".join(sentences)
