"""What a labeller types, read: rankings, ratings, which responses fail a criterion, flags. Numbers are those shown, from 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

FLAGS = {
    "unsafe": "could hurt someone",
    "off-task": "does something else than what was asked",
    "bad-premise": "the prompt itself is wrong or makes no sense",
}
"""What can be wrong with a response, or with the prompt (no number)."""

_EXAMPLE = "such as 2 1=3 (best first, = for ties)"


class AnswerError(ValueError):
    """What was typed cannot be read; the message is one line for the labeller."""


def parse_ranking(text: str, size: int) -> tuple[int, ...]:
    """Ranks of the responses as shown from ``2 1=3``: best first, ``=`` between ties, each response once.

    Numbers are separated by spaces, commas or ``>``; up to nine responses they need no separator (``21=3``). ``=`` alone ties all.

    Raises
    ------
    AnswerError
        A number is missing, there twice, or not one of those shown.
    """
    text = text.strip()
    if text == "=":
        return (1,) * size
    if not re.fullmatch(r"[\d\s,>=]+", text):
        raise AnswerError(f"{text!r} is not a ranking {_EXAMPLE}; h for help")
    tokens = re.findall(r"=|\d" if size <= 9 else r"=|\d+", text)
    ranks: dict[int, int] = {}
    rank = 0
    tied = False
    for place, token in enumerate(tokens):
        if token == "=":
            if tied or not ranks or place == len(tokens) - 1:
                raise AnswerError(f"{text!r}: = stands between two numbers, {_EXAMPLE}")
            tied = True
            continue
        number = int(token)
        if not 1 <= number <= size:
            raise AnswerError(f"there is no response {number}; they are 1 to {size}")
        if number in ranks:
            raise AnswerError(f"response {number} is there twice; name each once, {_EXAMPLE}")
        rank += not tied
        tied = False
        ranks[number] = rank
    missing = [str(number) for number in range(1, size + 1) if number not in ranks]
    if missing:
        raise AnswerError(f"{_and(missing)} missing; rank every response, {_EXAMPLE}")
    return tuple(ranks[number] for number in range(1, size + 1))


def describe_ranking(ranks: Sequence[int]) -> str:
    """``2 > 1 = 3``."""
    levels = [[str(n) for n, rank in enumerate(ranks, 1) if rank == level] for level in sorted(set(ranks))]
    return " > ".join(" = ".join(level) for level in levels)


def parse_ratings(text: str, size: int) -> tuple[int | None, ...] | None:
    """One number from 1 to 7 a response, in the order shown; ``-`` for one without. Nothing typed is no rating.

    Raises
    ------
    AnswerError
        Too many, too few, or something else.
    """
    tokens = re.findall(r"\d+|-|[^\s,]+", text)
    if len(tokens) == 1 and len(tokens[0]) == size > 1 and re.fullmatch(r"[1-7]+", tokens[0]):
        tokens = list(tokens[0])
    if not tokens or tokens == ["-"]:
        return None
    for token in tokens:
        if not re.fullmatch(r"[1-7]|-", token):
            raise AnswerError(f"{token!r} is no rating; give 1 (worst) to 7 (best), or - for none")
    if len(tokens) != size:
        raise AnswerError(f"{len(tokens)} ratings for {size} responses; give one for each, in the order shown")
    return tuple(None if token == "-" else int(token) for token in tokens)


def parse_failures(text: str, names: Sequence[str], size: int) -> dict[str, tuple[bool, ...]]:
    """Which responses fail which criterion, from ``honest 2 harmless 1 3``; those not named meet it. ``ok``: all meet all.

    Names may be shortened as long as they are clear. Nothing typed is no answer.

    Raises
    ------
    AnswerError
        A name or a number is none of those asked about.
    """
    text = text.strip()
    if text in ("", "-"):
        return {}
    meets = {name: [True] * size for name in names}
    if text.casefold() == "ok":
        return {name: tuple(values) for name, values in meets.items()}
    name = None
    named: set[str] = set()
    for token in re.findall(r"\d+|\*|[^\s,\d*]+", text):
        if token == "*" or token.isdecimal():
            if name is None:
                raise AnswerError(f"say what {token} fails, such as {names[0]} {token}; ok if all is well")
            for number in range(1, size + 1) if token == "*" else [int(token)]:
                if not 1 <= number <= size:
                    raise AnswerError(f"there is no response {number}; they are 1 to {size}")
                meets[name][number - 1] = False
                named.discard(name)
        else:
            name = match_name(token, names)
            named.add(name)
    if named:
        raise AnswerError(f"which response fails {sorted(named)[0]!r}? give its number, or * for all")
    return {name: tuple(values) for name, values in meets.items()}


def parse_flag(text: str, size: int) -> tuple[str, list[int]]:
    """A flag and the places (from 0) that it is on, from ``unsafe 2``; no number: the prompt, or all.

    Raises
    ------
    AnswerError
        There is no such flag or response.
    """
    name, *numbers = text.replace(",", " ").split() or [""]
    flag = match_name(name, list(FLAGS))
    places = []
    for token in numbers:
        if not token.isdecimal() or not 1 <= int(token) <= size:
            raise AnswerError(f"there is no response {token}; they are 1 to {size}")
        places.append(int(token) - 1)
    return flag, places


def match_name(token: str, names: Sequence[str]) -> str:
    """The name that ``token`` is, or begins."""
    found = [name for name in names if name.casefold() == token.casefold()]
    found = found or [name for name in names if token and name.casefold().startswith(token.casefold())]
    if len(found) == 1:
        return found[0]
    choice = _and(found or list(names), "or")
    raise AnswerError(f"{token!r} could be {choice}" if found else f"{token!r} is not {choice}")


def _and(words: Sequence[str], word: str = "and") -> str:
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + f" {word} {words[-1]}"
