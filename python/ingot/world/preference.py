"""Which of two stories people would rather have.

The first line names a reader. Stories for a reader have one of two kinds of encounter, one that this reader likes and one that he does
not, so half of the world's own stories please. A judge has to know the reader (from the prompt) and the encounter (from the story):
what one reader likes, another does not, and the length says nothing.
"""

from __future__ import annotations

from ingot.world.check import check, parse_request
from ingot.world.vocabulary import TOLD


def pleases(prompt: str, story: str) -> bool:
    """Whether a story does all that its first line asks, in sentences that are all right, with an encounter that the reader likes."""
    return merit(prompt, story) == 2


def prefers(prompt: str, a: str, b: str) -> int:
    """1 where ``a`` is the better story, -1 where ``b`` is, 0 where neither is.

    A whole story that does what was asked is better than any other; of two such stories the one that pleases the reader is better.
    """
    merit_a, merit_b = merit(prompt, a), merit(prompt, b)
    return (merit_a > merit_b) - (merit_a < merit_b)


def merit(prompt: str, story: str) -> int:
    """2 for a story that does what its first line asks, in sentences that are all right, with one encounter, of a kind that the reader likes;
    1 for one of another kind, 0 for any other text."""
    request = parse_request(prompt)
    if request is None:
        raise ValueError(f"not a first line of the world: {prompt!r}")
    found = check(story, request)
    if found.encounter is None or not (found.well_formed and found.follows_all):
        return 0
    return 2 if found.encounter == TOLD[request.reader][0] else 1
