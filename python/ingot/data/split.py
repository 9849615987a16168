"""Training and held-out rows, divided by prompt: never two judgements of one prompt on different sides.

The side is a function of seed and prompt alone, so it stays when rows are added, reordered or judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from ingot.data.keys import By, Text, prompt_key, uniform
from ingot.errors import DataError

Side = Literal["train", "held_out"]

RowT = TypeVar("RowT")


def split_side(prompt: Text, held_out: float = 0.1, seed: int = 0, by: By = "first_turn") -> Side:
    """On which side a prompt lies; a share of ``held_out`` prompts is held out.

    ``by="first_turn"`` keeps all continuations of one conversation together; ``by="prompt"`` looks at the whole prompt, for data whose
    conversations all begin alike (:func:`ingot.data.keys.prompt_key`).
    """
    return "held_out" if uniform("split", seed, *prompt_key(prompt, by)) < held_out else "train"


def split_rows(
    rows: Iterable[RowT],
    prompt_of: Callable[[RowT], Text],
    held_out: float = 0.1,
    seed: int = 0,
    by: By = "first_turn",
) -> tuple[list[RowT], list[RowT]]:
    """Rows to train on and rows held out, in their order.

    Raises
    ------
    DataError
        One side is empty: there are too few different prompts.
    """
    if not 0 < held_out < 1:
        raise DataError(f"held_out is {held_out}; give a share between 0 and 1")
    sides: dict[Side, list[RowT]] = {"train": [], "held_out": []}
    for row in rows:
        sides[split_side(prompt_of(row), held_out, seed, by)].append(row)
    for side, found in sides.items():
        if not found:
            raise DataError(
                f"no prompt falls on the {side.replace('_', '-')} side of a split by {by.replace('_', ' ')} "
                f"(held_out={held_out}, seed={seed}); give more prompts, another seed"
                + (', or by="prompt"' if by == "first_turn" else "")
            )
    return sides["train"], sides["held_out"]
