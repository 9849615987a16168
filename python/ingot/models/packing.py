"""Checks of what goes into a pass, for backends that are written in Python; the native core makes the same ones with the same words.

Shape legend: N tokens of the batch, S sequences, R chosen rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig
from ingot.errors import ConfigError
from ingot.models.base import BoolArray, Candidates, IntArray, LongArray


@dataclasses.dataclass(frozen=True)
class Packing:
    """A checked batch: sequences one after the other, without padding."""

    tokens: IntArray
    """i32[N]."""
    offsets: LongArray
    """i64[S + 1]."""
    targets: IntArray
    """i32[N], -1 for none."""
    positions: LongArray
    """Position of each token in its sequence, i64[N]."""
    row_sequence_ids: LongArray
    """Identity of each token's sequence, i64[N]."""

    @classmethod
    def of(
        cls,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        sequence_ids: LongArray | None,
        config: ModelConfig,
    ) -> Packing:
        """Check the arrays of a batch.

        Raises
        ------
        TypeError
            Another dtype, or no array.
        ValueError
            Another shape, order, or offsets that do not cut the tokens into sequences.
        IndexError
            A token or target that is no id.
        ConfigError
            A sequence longer than the learned positions.
        """
        check_array("tokens", tokens, np.int32, (None,))
        check_array("offsets", offsets, np.int64, (None,))
        check_array("targets", targets, np.int32, (len(tokens),))
        _check_offsets(offsets, len(tokens))
        check_ids("tokens", tokens, 0, config.vocab_size)
        check_ids("targets", targets, -1, config.vocab_size)
        lengths = np.diff(offsets)
        if sequence_ids is None:
            sequence_ids = np.arange(len(lengths), dtype=np.int64)
        check_array("sequence_ids", sequence_ids, np.int64, (len(lengths),))
        if config.position == "learned" and len(lengths) and lengths.max() > config.max_position_embeddings:
            sequence = int(np.argmax(lengths > config.max_position_embeddings))
            raise ConfigError(
                f"sequence {sequence} has {lengths[sequence]} tokens, but the learned positions end at "
                f"max_position_embeddings = {config.max_position_embeddings}: cut the sequence or train a model with more positions"
            )
        positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        return cls(tokens, offsets, targets, positions, np.repeat(sequence_ids, lengths))


def check_array(name: str, array: Any, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Refuse what is not a C-contiguous array of ``dtype`` and ``shape`` (None: any size), naming type, shape and strides."""
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    needed = f"{name}: needs a C-contiguous {np.dtype(dtype)} array of shape [{sizes}]"
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{needed}, got {type(array).__name__}")
    order = "" if array.flags.c_contiguous else ", not C-contiguous"
    given = f"{array.dtype} of shape {list(array.shape)} with strides {list(array.strides)} bytes{order}"
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{needed}, got {given}")
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or order:
        raise ValueError(f"{needed}, got {given}")


def check_ids(name: str, ids: npt.NDArray[Any], low: int, vocab_size: int) -> None:
    """Refuse ids outside ``low`` to ``vocab_size - 1``."""
    wrong = (ids < low) | (ids >= vocab_size)
    if wrong.any():
        position = int(np.argmax(wrong))
        meaning = "-1 for none, else below vocab_size" if low < 0 else "token ids below vocab_size"
        raise IndexError(f"{name}[{position}] is {ids[position]}, outside {low}..{vocab_size} ({meaning})")


def ids_array(ids: npt.ArrayLike | None, name: str = "banned_ids") -> IntArray:
    """Token ids as an i32 array; a list of Python ints is converted, an array of another kind than integers refused."""
    array = np.asarray([] if ids is None else ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ConfigError(f"{name}: needs a list of token ids, got {array.dtype} of shape {list(array.shape)}")
    limits = np.iinfo(np.int32)
    if array.max() > limits.max or array.min() < limits.min:
        raise IndexError(f"{name}: holds numbers that are no token ids (they are below 2^31)")
    return np.ascontiguousarray(array, dtype=np.int32)


def check_rows(hidden_rows: LongArray, num_rows: int) -> None:
    """Refuse rows that the batch does not have."""
    check_array("hidden_rows", hidden_rows, np.int64, (None,))
    wrong = (hidden_rows < 0) | (hidden_rows >= num_rows)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise IndexError(
            f"hidden_rows[{position}] is {hidden_rows[position]}, outside 0..{num_rows} (rows of the batch)"
        )


def check_candidates(candidates: Candidates, num_rows: int, banned: IntArray, vocab_size: int) -> None:
    """Refuse candidates that are no ids, are banned, or are not cut into one run for each row."""
    offsets, ids = candidates
    check_array("candidates[0]", offsets, np.int64, (num_rows + 1,))
    check_array("candidates[1]", ids, np.int32, (None,))
    _check_offsets(offsets, len(ids), "candidate offsets", "tokens", "the number of candidates")
    check_ids("candidates", ids, 0, vocab_size)
    hit: BoolArray = np.isin(ids, banned)
    if hit.any():
        at = int(np.argmax(hit))
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(f"candidates: {ids[at]} at row {row} is one of banned_ids")


def check_banned(banned_ids: Sequence[int] | IntArray | None, targets: IntArray, vocab_size: int) -> IntArray:
    """The banned ids, ascending, each once. At least one id must remain, and none of them be a target."""
    banned = np.unique(ids_array(banned_ids))
    check_ids("banned_ids", banned, 0, vocab_size)
    if len(banned) == vocab_size:
        raise ValueError("banned_ids: names the whole vocabulary: no token could be chosen")
    hit: BoolArray = np.isin(targets, banned)
    if hit.any():
        row = int(np.argmax(hit))
        raise ValueError(f"targets: {targets[row]} at row {row} is one of banned_ids")
    return banned


def check_seed(seed: int) -> None:
    """Refuse what is no 64-bit seed."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed must be between 0 and 2^64 - 1, got {seed}")


def check_room(max_tokens: int, max_sequences: int) -> None:
    """Refuse a decoder without room."""
    for name, value in (("max_tokens", max_tokens), ("max_sequences", max_sequences)):
        if not 1 <= value < 1 << 63:
            raise ConfigError(f"{name}: must be at least 1 and below 2^63, got {value}")


def _check_offsets(
    offsets: LongArray,
    total: int,
    name: str = "offsets",
    parts: str = "sequences",
    entries: str = "the number of tokens",
) -> None:
    """Refuse offsets that do not cut ``total`` entries into runs; ``parts`` and ``entries`` are what messages call those."""
    if len(offsets) == 0:
        raise ValueError(f"{name}: is empty, but needs one entry more than there are {parts}")
    if offsets[0] != 0:
        raise ValueError(f"{name}: starts with {offsets[0]}, but must start with 0")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        at = int(falls[0])
        raise ValueError(f"{name}: decreases from {offsets[at]} to {offsets[at + 1]} at index {at + 1}")
    if offsets[-1] != total:
        raise ValueError(f"{name}: ends with {offsets[-1]}, but must end with {entries}, {total}")
