"""Answers in steps: where each step ends, as text and as ids.

A step ends with a separator (a new line unless said otherwise). Blank lines belong to the step that follows them, so that the text stays
what it was; those behind the last step are left out. A sequence of steps ends with the last separator, without an end of the turn: what
a model says of a step may depend on nothing that comes after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ingot.data.chat import ChatEncoder, Encoded
from ingot.data.rows import Content
from ingot.tokenizer import Tokenizer

STEP_SEPARATOR = "\n"


def split_steps(text: str, separator: str = STEP_SEPARATOR) -> list[str]:
    """The steps of an answer, without the separators that end them; an answer that says nothing is one empty step."""
    steps, blank = [], ""
    for part in text.split(separator):
        if part.strip():
            steps.append(blank + part)
            blank = ""
        else:
            blank += part + separator
    return steps or [""]


def encode_steps(
    prompt: Content, steps: Sequence[str], encoder: ChatEncoder, separator: str = STEP_SEPARATOR
) -> Encoded:
    """Ids of a prompt and an answer in steps; ``ends`` are the last token of each step, which is that of its separator.

    Raises
    ------
    DataError
        The template cannot write the prompt.
    """
    before = encoder.encode_prompt(prompt) if isinstance(prompt, list) else encoder.encode_text_prompt(prompt)
    pieces = [encoder.tokenizer.encode_ordinary(step + separator) for step in steps]
    ids = np.array([*before, *itertools.chain(*pieces)], np.int32)
    ends = itertools.accumulate(map(len, pieces), initial=len(before) - 1)
    return Encoded(ids, np.arange(len(ids)) >= len(before), tuple(ends)[1:])


def with_step_ends(
    ids: npt.NDArray[np.int32],
    first: int,
    tokenizer: Tokenizer,
    separator: str = STEP_SEPARATOR,
    max_length: int | None = None,
) -> Encoded:
    """Ids that were sampled, as they are, with the ends of their steps.

    Parameters
    ----------
    ids
        i32 [n], prompt and answer without an end.
    first
        Where the answer begins.
    max_length
        Where this is too little for a separator that has to be added, it takes the place of the last tokens.

    Returns
    -------
    Encoded
        A separator is put behind an answer that does not end with one, and what is blank behind the last step is left out. A token that
        holds the end of a separator is the end of its step.
    """
    mark = separator.encode()
    pieces = [tokenizer.token_bytes(token) for token in ids[first:].tolist()]
    text, reached = b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
    ends: list[int] = []
    start, at = 0, text.find(mark)
    while at >= 0:
        after = at + len(mark)
        if text[start:at].strip():
            end = first + int(np.searchsorted(reached, after))
            ends += [end] if end not in ends[-1:] else []
        start, at = after, text.find(mark, after)
    if ends and not text[start:].strip():
        ids = ids[: ends[-1] + 1]
    else:
        added = np.array(tokenizer.encode_ordinary(separator), np.int32)
        kept = len(ids) if max_length is None else min(len(ids), max_length - len(added))
        ids = np.concatenate([ids[:kept], added]).astype(np.int32)
        ends = [*(end for end in ends if end < kept), len(ids) - 1]
    return Encoded(ids, np.arange(len(ids)) >= first, tuple(ends))
