"""What a step sees: the held-out split, the order of documents, packing into rows, and random windows of long texts.

All of it is a pure function of (seed, step, cursor), so a run resumes by three integers, without reading anything again.

Index legend: N tokens of a batch, S sequences, R rows, D documents. Positions are indices into the ids of a token file; a stretch
[start, stop) of it predicts ``ids[start + 1 : stop]`` from ``ids[start : stop - 1]``, hence has stop - start - 1 targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ingot.data.shards import TokenShards
from ingot.errors import DataError

Ids = npt.NDArray[Any]

_MASK = (1 << 64) - 1
# The held-out documents of a text are the same in every run, whatever its seed.
_HELD_OUT_KEY = 0x696E_676F_7468_6F6C
_FEW_DOCUMENTS = 50
_WINDOWS_STREAM = 1
_PIECES_TO_COUNT = 50_000


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences, and the rows they lie in. Every token has a target."""

    tokens: npt.NDArray[np.int32]
    """i32 [N]"""
    offsets: npt.NDArray[np.int64]
    """i64 [S+1]: sequence s is tokens[offsets[s] : offsets[s + 1]]"""
    targets: npt.NDArray[np.int32]
    """i32 [N]: the token after each"""
    sequence_ids: npt.NDArray[np.int64]
    """i64 [S]: number of the sequence in its step; dropout is keyed by it"""
    rows: npt.NDArray[np.int64]
    """i64 [R+1]: row r holds sequences rows[r] : rows[r + 1]"""

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(np.count_nonzero(self.targets >= 0))

    def split(self, parts: int) -> list[Batch]:
        """The same sequences in ``parts`` batches of as many rows each; batches without a sequence are left out."""
        num_rows = len(self.rows) - 1
        if num_rows % parts:
            raise ValueError(f"{num_rows} rows do not divide into {parts} parts")
        step = num_rows // parts
        pieces = []
        for first in range(0, num_rows, step):
            begin, end = int(self.rows[first]), int(self.rows[first + step])
            if begin == end:
                continue
            low, high = int(self.offsets[begin]), int(self.offsets[end])
            pieces.append(
                Batch(
                    tokens=self.tokens[low:high],
                    offsets=self.offsets[begin : end + 1] - low,
                    targets=self.targets[low:high],
                    sequence_ids=self.sequence_ids[begin:end],
                    rows=self.rows[first : first + step + 1] - begin,
                )
            )
        return pieces


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the data stand: everything that an exact resume needs of them."""

    epoch: int = 0
    """Passes over the text that are complete."""
    index: int = 0
    """Documents of this epoch's order that are used up."""
    carry: int = 0
    """Targets of the next document that are used up."""


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Parts of the ids, each at least two long."""

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def of(cls, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Stretches:
        """Those that hold a target."""
        keep = stops - starts >= 2
        return cls(np.ascontiguousarray(starts[keep]), np.ascontiguousarray(stops[keep]))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted in one pass."""
        return int((self.stops - self.starts - 1).sum())


@dataclasses.dataclass(frozen=True)
class Split:
    """Result of :func:`split`."""

    train: Stretches
    held_out: Stretches
    rule: str
    """How the text was divided, for people."""


def split(shards: TokenShards, held_out: float) -> Split:
    """Keep a share of the text out of training.

    Documents are chosen by a keyed hash of their content, so that a document stays on its side when others come or go and copies
    of it never lie on both sides. Where the documents are few, or so unequal that the hash would miss the share by more than a
    factor of three, the last part of each document is held out instead.

    Raises
    ------
    DataError
        The text is too short to divide.
    """
    starts = np.asarray(shards.starts[:-1])
    # The end-of-text id that follows a document is its last target.
    stops = np.asarray(shards.starts[1:]) + (shards.eos_token_id is not None)
    if held_out == 0.0:
        return Split(Stretches.of(starts, stops), Stretches.of(starts[:0], stops[:0]), "nothing is held out")
    sizes = stops - starts
    chosen = _mixed(np.asarray(shards.keys) ^ np.uint64(_HELD_OUT_KEY)) < np.uint64(min(_MASK, int(held_out * 2**64)))
    share = float(sizes[chosen].sum()) / float(sizes.sum())
    if len(sizes) >= _FEW_DOCUMENTS and held_out / 3 <= share <= min(3 * held_out, (1 + held_out) / 2):
        rule = f"{int(chosen.sum())} of {len(sizes)} documents are held out, chosen by a hash of their content"
        result = Split(Stretches.of(starts[~chosen], stops[~chosen]), Stretches.of(starts[chosen], stops[chosen]), rule)
    else:
        cuts = starts + (sizes * (1.0 - held_out)).astype(np.int64)
        each = "the text" if len(sizes) == 1 else f"each of {len(sizes)} documents"
        rule = f"the last {100 * held_out:g} % of {each} is held out"
        result = Split(Stretches.of(starts, cuts), Stretches.of(cuts, stops), rule)
    if len(result.train) == 0 or len(result.held_out) == 0:
        raise DataError(
            f"the text has only {shards.num_tokens} tokens, too few to hold {100 * held_out:g} % out: "
            "give more text, or --held-out 0"
        )
    return result


class Batches(Protocol):
    """Source of a step's batch."""

    tokens_per_epoch: int
    """Targets in one pass over the training text."""

    def take(self, step: int, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch of this step, and the cursor after it."""
        ...

    def steps_per_epoch(self) -> float:
        """Steps in one pass over the training text; for very many documents, extrapolated from the first ones."""
        ...


def make_batches(
    shards: TokenShards,
    stretches: Stretches,
    *,
    windows: Literal["packed", "random"],
    max_length: int,
    rows: int,
    seed: int,
    shuffle: bool = True,
) -> Batches:
    """Batches of ``rows`` rows with at most ``max_length`` tokens each.

    Raises
    ------
    DataError
        The text is shorter than one window; or random windows should keep the order of the documents.
    """
    if stretches.num_targets < max_length:
        raise DataError(
            f"the training text has {stretches.num_targets + 1} tokens, fewer than one window of max_length {max_length} needs: "
            "give more text or a smaller --max-length"
        )
    if windows == "random":
        if not shuffle:
            raise DataError(
                "windows anywhere in one text have no order: leave --document-order out, or give --windows packed"
            )
        return RandomBatches(shards.ids, stretches, max_length, rows, seed)
    return PackedBatches(shards.ids, stretches, max_length, rows, seed, shuffle=shuffle)


class RandomBatches:
    """Windows of ``max_length`` tokens that begin anywhere: every row is drawn independently, by (seed, step, row)."""

    def __init__(self, ids: Ids, stretches: Stretches, max_length: int, rows: int, seed: int) -> None:
        self._ids = ids
        self._max_length = max_length
        self._rows = rows
        self._seed = seed
        counts = np.maximum(0, stretches.stops - stretches.starts - max_length)
        self._starts = stretches.starts
        self._before = np.concatenate([[0], np.cumsum(counts)])
        self.tokens_per_epoch = stretches.num_targets
        if self._before[-1] == 0:
            raise DataError(
                f"no document is as long as a window of max_length {max_length}: give --windows packed or a smaller --max-length"
            )

    def take(self, step: int, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The windows of this step; the cursor stays as it is."""
        raw = np.random.Philox(key=[self._seed & _MASK, _WINDOWS_STREAM], counter=[0, 0, step, 0]).random_raw(
            self._rows
        )
        picks = ((raw >> np.uint64(11)) * 2.0**-53 * float(self._before[-1])).astype(np.int64)
        stretch = np.searchsorted(self._before, picks, side="right") - 1
        starts = self._starts[stretch] + picks - self._before[stretch]
        windows = self._ids[starts[:, None] + np.arange(self._max_length + 1)].astype(
            np.int32
        )  # [rows, max_length + 1]
        rows = np.arange(self._rows + 1, dtype=np.int64)
        tokens, targets = windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1)
        return Batch(tokens, rows * self._max_length, targets, rows[:-1], rows), cursor

    def steps_per_epoch(self) -> float:
        """Steps that read as many tokens as the training text has."""
        return self.tokens_per_epoch / (self._rows * self._max_length)


class PackedBatches:
    """Documents side by side, in an order that is new in each epoch unless ``shuffle`` is off; a row never mixes them, a step cuts
    none that fits in a row.

    A step takes documents in order and lays each into the first row with room for it, until one fits nowhere: that one begins the
    next step. Rows need not be full, as nothing is padded. A document longer than a row is cut into rows; where it is much
    longer, the cuts move from epoch to epoch.
    """

    def __init__(
        self, ids: Ids, stretches: Stretches, max_length: int, rows: int, seed: int, *, shuffle: bool = True
    ) -> None:
        self._ids = ids
        self._stretches = stretches
        self._max_length = max_length
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._order = Order(len(stretches), seed, 0)
        self.tokens_per_epoch = stretches.num_targets

    def take(self, step: int, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The documents from ``cursor`` on; ``step`` does not matter."""
        rows, after = self._fill(cursor)
        return assemble(self._ids, rows), after

    def steps_per_epoch(self) -> float:
        """Counted by packing the first epoch, or as much of it as is quickly done."""
        cursor = Cursor()
        steps = pieces = tokens = 0
        while cursor.epoch == 0 and pieces < _PIECES_TO_COUNT:
            rows, cursor = self._fill(cursor)
            steps += 1
            pieces += sum(map(len, rows))
            tokens += sum(length for row in rows for _, length in row)
        return steps * self.tokens_per_epoch / tokens

    def _fill(self, cursor: Cursor) -> tuple[list[list[tuple[int, int]]], Cursor]:
        rows: list[list[tuple[int, int]]] = [[] for _ in range(self._rows)]
        free = np.full(self._rows, self._max_length)
        while True:
            start, length, after = self._piece(cursor)
            row = int(np.argmax(free >= length))
            if free[row] < length:
                return rows, cursor
            rows[row].append((start, length))
            free[row] -= length
            cursor = after

    def _piece(self, cursor: Cursor) -> tuple[int, int, Cursor]:
        """The next piece of text: its position, its targets, and the cursor after it."""
        if self._order.epoch != cursor.epoch:
            self._order = Order(len(self._stretches), self._seed, cursor.epoch)
        document = self._order[cursor.index] if self._shuffle else cursor.index
        start = int(self._stretches.starts[document])
        size = int(self._stretches.stops[document]) - start - 1
        length = self._max_length
        if cursor.carry == 0 and size > 4 * self._max_length:
            length = 1 + mix(self._seed, cursor.epoch, document) % self._max_length
        length = min(length, size - cursor.carry)
        position = start + cursor.carry
        if cursor.carry + length < size:
            return position, length, Cursor(cursor.epoch, cursor.index, cursor.carry + length)
        if cursor.index + 1 < len(self._stretches):
            return position, length, Cursor(cursor.epoch, cursor.index + 1, 0)
        return position, length, Cursor(cursor.epoch + 1, 0, 0)


def held_out_batches(
    ids: Ids, stretches: Stretches, *, max_length: int, rows: int, limit: int | None = None
) -> Iterator[Batch]:
    """Every stretch in consecutive windows of ``max_length``, about ``rows * max_length`` tokens at a time.

    With ``limit``, that many of these batches, evenly spaced; the same ones each time.
    """
    sizes = stretches.stops - stretches.starts - 1
    counts = -(-sizes // max_length)
    first = np.cumsum(counts) - counts
    within = (np.arange(int(counts.sum())) - np.repeat(first, counts)) * max_length
    starts = np.repeat(stretches.starts, counts) + within
    lengths = np.minimum(max_length, np.repeat(sizes, counts) - within)
    group = (np.cumsum(lengths) - lengths) // (rows * max_length)
    _, begins = np.unique(group, return_index=True)
    ends = np.append(begins[1:], len(starts))
    chosen = np.arange(len(begins))
    if limit is not None and limit < len(begins):
        chosen = chosen[:limit] * len(begins) // limit
    for index in chosen:
        windows = range(int(begins[index]), int(ends[index]))
        yield assemble(ids, [[(int(starts[window]), int(lengths[window]))] for window in windows])


def count_held_out_batches(stretches: Stretches, *, max_length: int, rows: int, limit: int | None = None) -> int:
    """About how many batches :func:`held_out_batches` gives."""
    count = -(-stretches.num_targets // (rows * max_length))
    return count if limit is None else min(count, limit)


def assemble(ids: Ids, rows: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    """A batch of the pieces (position, targets) in these rows."""
    pieces = [piece for row in rows for piece in row]
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([length for _, length in pieces], out=offsets[1:])
    tokens = np.empty(int(offsets[-1]), np.int32)
    targets = np.empty_like(tokens)
    for (position, length), low in zip(pieces, offsets[:-1], strict=True):
        tokens[low : low + length] = ids[position : position + length]
        targets[low : low + length] = ids[position + 1 : position + length + 1]
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return Batch(tokens, offsets, targets, np.arange(len(pieces), dtype=np.int64), bounds)


class Order:
    """A permutation of 0 .. n-1 keyed by (seed, epoch) whose i-th element is computed, not stored.

    A balanced Feistel network over the smallest even number of bits that holds n; values beyond n walk on along their cycle
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4).
    """

    _ROUNDS = 4

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self.epoch = epoch
        self._bits = max(1, -(-(n - 1).bit_length() // 2))
        self._half = (1 << self._bits) - 1
        self._keys = [mix(seed, epoch, index, n) for index in range(self._ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside of 0 .. {self.n - 1}")
        value = self._permuted(index)
        while value >= self.n:
            value = self._permuted(value)
        return value

    def _permuted(self, value: int) -> int:
        left, right = value >> self._bits, value & self._half
        for key in self._keys:
            left, right = right, left ^ (_scrambled(key ^ right) & self._half)
        return left << self._bits | right


def mix(*values: int) -> int:
    """A 64-bit key from several integers: each is absorbed by one round of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for value in values:
        state = _scrambled((state ^ (value & _MASK)) + 0x9E37_79B9_7F4A_7C15)
    return state


def _scrambled(value: int) -> int:
    """SplitMix64's finalizer."""
    value &= _MASK
    value = ((value ^ value >> 30) * 0xBF58_476D_1CE4_E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D0_49BB_1331_11EB) & _MASK
    return value ^ value >> 31


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The same finalizer on an array."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ values >> np.uint64(31)
