"""The small world as the commands of alignment read it: demonstrations, prompts, and a labeller who goes by the world's rule.

Everything is a conversation: the user asks for a story by its first line, and the assistant tells it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ingot import world
from ingot.data.keys import Text
from ingot.errors import DataError
from ingot.feedback.candidates import read_candidates
from ingot.feedback.criteria import Criterion
from ingot.feedback.journal import Journal
from ingot.feedback.session import Session
from ingot.feedback.simulate import SimulatedLabeler
from ingot.feedback.terminal import Keyboard, Labeler, Quit
from ingot.feedback.texts import plain

if TYPE_CHECKING:
    from rich.console import Console

# Where each use of the world's numbered stories begins, so that none meets another's.
_DEMONSTRATIONS = 1_000_000
_PROMPTS = 2_000_000


def demonstrations(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows of messages: requests, each with a story that does what it asks."""
    for story in world.stories(seed, "train", count, start=_DEMONSTRATIONS):
        yield {"messages": [*conversation(story.request), {"role": "assistant", "content": story.text}]}


def prompts(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows of prompts alone, no two the same."""
    seen: set[str] = set()
    fresh = (
        story.request
        for story in world.stories(seed, "train", start=_PROMPTS)
        if not (story.request.text in seen or seen.add(story.request.text))  # type: ignore[func-returns-value]
    )
    for request in itertools.islice(fresh, count):
        yield {"prompt": conversation(request)}


def held_out_requests(seed: int, count: int) -> list[world.Request]:
    """Requests for combinations of person, thing and place that no training text has."""
    return [story.request for story in world.stories(seed, "held_out", count)]


def conversation(request: world.Request) -> list[dict[str, str]]:
    """The request as a message of the user."""
    return [{"role": "user", "content": request.text}]


def merit(prompt: Text, response: Text) -> float:
    """The world's rule as a score: 2 for a whole story that does what was asked and pleases its reader, 1 for one that only does what
    was asked, 0 for any other.

    Raises
    ------
    DataError
        The prompt does not end with a request of the world.
    """
    asked = asked_by(prompt)
    if world.parse_request(asked) is None:
        raise DataError(f"the prompt is no request of the small world: {asked!r}")
    return float(world.merit(asked, plain(response).strip()))


def quality(prompt: Text, response: Text) -> float:
    """What the labeller goes by: :func:`merit`, and between stories without any, how much of what was asked and of the sentences is right."""
    value = merit(prompt, response)
    if value:
        return value
    request = world.parse_request(asked_by(prompt))
    assert request is not None
    found = world.check(plain(response).strip(), request)
    right = sum(found.follows.values()) / len(found.follows)
    return 0.25 * (right + found.num_well_formed / found.num_sentences)


def asked_by(prompt: Text) -> str:
    """The words of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def reward(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
    """:func:`merit` of many, in the form of a reward function."""
    return [merit(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def labeler(seed: int, noise: float) -> SimulatedLabeler:
    """Ranks by :func:`quality`; a share ``noise`` of its rankings comes out turned round."""
    return SimulatedLabeler(score=quality, name="rule", noise=0.0, flip_rate=noise, seed=seed)


_GUIDELINE = """\
Which story would its reader rather have?
- It does what the first line asks: the person, the thing, the place and the end that were asked for.
- Its sentences are whole, and it stops where it is over.
- After that, what you like: the model is going to learn your taste. The rule that is used where nobody ranks by hand prefers stories in which
  a child or a king meets an animal, a farmer or a baker shares food, a sailor hears music and a poet sees something in the sky."""


def label_by_hand(candidates: str, rankings: str, console: Console, seed: int) -> int:
    """Let the person at the terminal rank responses until there are none left or ``q`` is typed; the number of rankings.

    Raises
    ------
    DataError
        Nothing was ranked.
    """
    session = Session(
        read_candidates(candidates).groups,
        Journal(rankings),
        labeler="me",
        criterion=Criterion("stories", _GUIDELINE),
        seed=seed,
    )
    console.print(
        "Rank what you like, then type q: the demo goes on with your rankings. A few dozen show how it works.\n"
    )
    with contextlib.suppress(Quit):
        Labeler(session, console, Keyboard()).run(None)
    if not session.done():
        raise DataError(
            "nothing was ranked, so there is nothing to learn from; the same command goes on with the ranking"
        )
    return session.done()
