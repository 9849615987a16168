"""The small world as the commands of alignment read it: demonstrations, prompts, and a labeller who goes by the world's rule.

Everything is a conversation: the user asks for a story by its first line, and the assistant tells it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ingot import world
from ingot.data.keys import Text
from ingot.errors import DataError
from ingot.feedback.simulate import SimulatedLabeler
from ingot.feedback.texts import plain

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
    asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if world.parse_request(asked) is None:
        raise DataError(f"the prompt is no request of the small world: {asked!r}")
    return float(world.merit(asked, plain(response).strip()))


def reward(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
    """:func:`merit` of many, in the form of a reward function."""
    return [merit(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def labeler(seed: int, noise: float) -> SimulatedLabeler:
    """Ranks by :func:`merit`; a share ``noise`` of its rankings comes out turned round."""
    return SimulatedLabeler(score=merit, name="rule", noise=0.0, flip_rate=noise, seed=seed)
