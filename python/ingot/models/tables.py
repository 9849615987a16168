"""Named arrays: checking a saved state against a model, and showing a model's parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig
from ingot.errors import CheckpointError

_SHOWN_NAMES = 4


class LazyArrays(Mapping[str, npt.NDArray[np.float32]]):
    """Named arrays of which each is made, or looked up, when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], npt.NDArray[np.float32]]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def check_state(state: Mapping[str, npt.NDArray[np.generic]], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse a state that does not have exactly these names and shapes.

    Raises
    ------
    CheckpointError
        Names what is missing, surplus or of another shape.
    """
    missing = [name for name in shapes if name not in state]
    surplus = [name for name in state if name not in shapes]
    wrong = [
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    complaints = [
        f"{label}: {some(names)}"
        for label, names in (("missing", missing), ("surplus", surplus), ("wrong shape", wrong))
        if names
    ]
    if complaints:
        raise CheckpointError(f"{what} is not this model's; {'; '.join(complaints)}")


def parts_table(backend: str, config: ModelConfig, place: str, shapes: Mapping[str, list[int]]) -> str:
    """A model as a table of its parts: name, shape and number of parameters; the blocks, which are alike, once."""
    rows: list[tuple[str, str, int]] = []
    for name, shape in shapes.items():
        block = re.search(r"\.(\d+)\.", name)
        if block and int(block[1]) > 0:
            continue
        count = math.prod(shape)
        if block:
            last = config.num_hidden_layers - 1
            name = name.replace(".0.", ".0." if last == 0 else f".0-{last}.", 1)
            count *= config.num_hidden_layers
        rows.append((name, " x ".join(map(str, shape)), count))
    total = sum(count for _, _, count in rows)
    head = "tied" if config.tie_word_embeddings else "free"
    title = f"{backend} model, {total:,} parameters, {head} head, {place}"
    widths = [max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)]
    number = len(f"{total:,}")
    lines = [f"  {name:<{widths[0]}}  {shape:>{widths[1]}}  {count:>{number},}" for name, shape, count in rows]
    return "\n".join([title, *lines])
