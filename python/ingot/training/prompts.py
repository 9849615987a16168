"""Prompts to learn from by answering them: read, encoded as the model will see them, divided, and put into an order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ingot.data.batches import Order
from ingot.data.chat import Encoded
from ingot.data.files import file_hashes
from ingot.data.keys import prompt_key
from ingot.data.row_cache import RowCache, encode_rows
from ingot.data.rows import Content, PromptOnly, RowError, read_rows
from ingot.data.split import split_side
from ingot.errors import DataError
from ingot.inference.prompts import PromptEncoder
from ingot.models.base import IntArray
from ingot.training.progress import Display

Rows: TypeAlias = Iterable[Mapping[str, Any]] | None
"""Rows given by a program instead of files."""

_HELD_OUT_KEY = 0x68_65_6C_64


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt."""

    content: Content
    """Text or messages."""
    ids: IntArray
    """Up to where the answer begins, i32 [P]."""
    columns: Mapping[str, Any]
    """The other columns of its row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Those to train on and those held out."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    facts: dict[str, Any]
    """For run.json and the card: hash, counts, how they were divided."""
    seed: int
    """Of the order."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in (*self.train, *self.held_out))

    def take(self, position: int, count: int) -> list[Prompt]:
        """``count`` training prompts from ``position`` on: passes over all of them, each in an order of its own.

        The position is all that a run has to remember of its data.
        """
        chosen = []
        order: Order | None = None
        for place in range(position, position + count):
            epoch, index = divmod(place, len(self.train))
            if order is None or order.epoch != epoch:
                order = Order(len(self.train), self.seed, epoch)
            chosen.append(self.train[order[index]])
        return chosen

    def held_out_sample(self, count: int | None) -> list[Prompt]:
        """So many of the held-out prompts, the same ones each time; all of them for None."""
        if count is None or count >= len(self.held_out):
            return list(self.held_out)
        order = Order(len(self.held_out), _HELD_OUT_KEY, 0)
        return [self.held_out[order[index]] for index in range(count)]


def load_prompts(
    files: Sequence[str],
    rows: Rows,
    encoder: PromptEncoder,
    *,
    longest: int,
    held_out: float,
    seed: int,
    display: Display,
    cache: RowCache | None = None,
) -> Prompts:
    """Read, encode and divide prompts.

    Parameters
    ----------
    files, rows
        Rows of any kind that has a "prompt", from files or from a program.
    longest
        Prompts of more tokens are left out whole, and counted.
    held_out
        Share of the prompts to measure on; the side of a prompt depends on its text alone.
    cache
        Where tokenized prompts are kept; nowhere unless given.

    Raises
    ------
    RowError
        The first row that cannot be used.
    DataError
        There are no prompts, or too few are left.
    """
    if rows is None and not files:
        raise DataError("no prompts to answer: give --prompts with files of rows")
    read = read_prompts(
        files,
        rows,
        encoder.encode,
        tokenizer_hash=encoder.tokenizer.hash,
        template_hash=encoder.chat.template.hash if encoder.chat is not None else "",
        display=display,
        cache=cache,
    )
    prompts = [Prompt(row.prompt, ids, row.extra) for row, ids in read if len(ids) <= longest]
    named = ", ".join(files) or "the rows given"
    num_rows, num_too_long = len(read), len(read) - len(prompts)
    if num_rows == 0:
        raise DataError(f"{named}: no row in it; give rows with a prompt")
    if not prompts:
        shortest = min(len(ids) for _, ids in read)
        raise DataError(
            f"{named}: none of {num_rows} prompts fits: the shortest has {shortest} tokens and there is room for {longest}, which "
            "the model's context leaves beside the longest answer: shorten the answers or the prompts"
        )
    if num_too_long:
        display.say(
            f"{named}: {num_too_long:,} of {num_rows:,} prompts are longer than {longest} tokens and left out whole"
        )
    sides = [split_side(prompt.content, held_out) if held_out else "train" for prompt in prompts]
    if held_out and len(set(sides)) < 2:
        different = len({tuple(prompt_key(prompt.content)) for prompt in prompts})
        raise DataError(
            f"{named}: {len(prompts)} prompts, {different} of them different, are too few to hold {100 * held_out:g} % out: "
            "give more prompts, or --held-out 0"
        )
    train, kept = (
        tuple(prompt for prompt, found in zip(prompts, sides, strict=True) if found == side)
        for side in ("train", "held_out")
    )
    rule = f"{len(kept):,} of {len(prompts):,} prompts are held out, chosen by a hash of their text"
    facts = {
        "prompts_hash": _hash(prompts),
        "files": file_hashes(() if rows is not None else files),
        "num_rows": num_rows,
        "num_too_long": num_too_long,
        "max_length": longest,
        "num_train": len(train),
        "num_held_out": len(kept),
        "split": rule if kept else "nothing is held out",
    }
    return Prompts(train, kept, facts, seed)


def read_prompts(
    files: Sequence[str],
    rows: Rows,
    encode: Callable[[Content], IntArray],
    *,
    tokenizer_hash: str,
    template_hash: str,
    display: Display,
    cache: RowCache | None,
) -> list[tuple[PromptOnly, IntArray]]:
    """The prompts of all rows, of files or given by a program, and their ids.

    Raises
    ------
    RowError
        The first row that cannot be used.
    DataError
        A file cannot be read, or a file of the cache holds other prompts than it should.
    """

    def encoded(row: PromptOnly) -> tuple[Encoded]:
        try:
            ids = encode(row.prompt)
        except DataError as error:
            raise RowError(
                f"cannot be encoded: {error}", "change it or remove the row", field="prompt", row=row.number
            ) from None
        return (Encoded(ids, np.zeros(len(ids), np.bool_)),)

    found: list[tuple[PromptOnly, IntArray]] = []
    for source in files if rows is None else [rows]:
        name = source if isinstance(source, str) else "the rows given"
        read = read_rows(source, (PromptOnly,), functools.partial(display.work, "reading prompts"))
        prompts = [row for row in read if isinstance(row, PromptOnly)]
        try:
            groups = encode_rows(
                prompts,
                encoded,
                tokenizer_hash=tokenizer_hash,
                template_hash=template_hash,
                cache=cache,
                progress=functools.partial(display.work, "tokenizing prompts"),
            )
        except RowError as error:
            raise error.at(name, error.row) from None
        found += [(row, sequence.ids) for row, (sequence,) in zip(prompts, groups, strict=True)]
    return found


def _hash(prompts: Sequence[Prompt]) -> str:
    """sha256, as hex, of the ids: of rows, template, tokenizer and the longest length at once."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt.ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(prompt.ids).tobytes())
    return digest.hexdigest()
