"""From rows to batches: encoded examples, the held-out ones, and packs of them.

The sequences of one row (the two answers of a pair, the K of a ranked list) are a group. A group is never divided: losses compare
its members. What is longer than ``max_length`` is left out whole and counted, because a cut would hide the end of an answer.

Index legend: N tokens of a pack, S sequences, G groups.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ingot.data.batches import Order
from ingot.data.chat import ChatEncoder, Encoded
from ingot.data.keys import prompt_key
from ingot.data.row_cache import RowCache, encode_rows
from ingot.data.rows import (
    Candidates,
    Content,
    LanguageModelling,
    Preference,
    PromptCompletion,
    RankedList,
    Row,
    RowError,
    Source,
    Stepwise,
    UnpairedPreference,
    common_beginning,
    read_rows,
)
from ingot.data.split import split_side
from ingot.data.steps import STEP_SEPARATOR, encode_steps
from ingot.errors import DataError

# ---- rows to ids


def encode_row(row: Row, encoder: ChatEncoder, *, step_separator: str = STEP_SEPARATOR) -> list[Encoded]:
    """The sequences of a row: one, or chosen and rejected, or one for each response. ``step_separator`` ends each step of an answer in steps.

    Raises
    ------
    RowError
        The template cannot write this row, or it holds nothing to train.
    """
    try:
        return _encode_row(row, encoder, step_separator)
    except RowError:
        raise
    except DataError as error:
        raise RowError(f"cannot be encoded: {error}", "change the row or remove it", row=row.number) from None


def _encode_row(row: Row, encoder: ChatEncoder, step_separator: str) -> list[Encoded]:
    match row:
        case LanguageModelling(content=str(text)):
            return [encoder.encode_text(text)]
        case LanguageModelling(content=list(messages)):
            last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
            return [encoder.encode(messages[: last + 1])]
        case PromptCompletion() | UnpairedPreference():
            return [_answered(row.prompt, row.completion, encoder)]
        case Preference(prompt=None, chosen=str(chosen), rejected=str(rejected)):
            ids = [encoder.tokenizer.encode_ordinary(text) for text in (chosen, rejected)]
            # The longest common ids, not the ids of the longest common text: the two may cut it in another way at its end.
            common = common_beginning(*ids)
            return [encoder.encode_text(each[common:], each[:common]) for each in ids]
        case Preference(prompt=prompt) if prompt is not None:
            return [_answered(prompt, answer, encoder) for answer in (row.chosen, row.rejected)]
        case Candidates() | RankedList():
            return [_answered(row.prompt, response, encoder) for response in row.responses]
        case Stepwise():
            return [encode_steps(row.prompt, row.completions, encoder, step_separator)]
    raise RowError(f"is {row.kind}: it holds no answer", "give rows with answers", row=row.number)


def _answered(prompt: Content, answer: Content, encoder: ChatEncoder) -> Encoded:
    if isinstance(prompt, str) and isinstance(answer, str):
        return encoder.encode_text(answer, prompt)
    assert isinstance(prompt, list)
    assert isinstance(answer, list)
    return encoder.encode([*prompt, *answer], first_trained=len(prompt))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded rows."""

    rows: tuple[Row, ...]
    """One for each group: labels, ranks, margins, other columns."""
    groups: tuple[tuple[Encoded, ...], ...]
    num_rows: int
    """Rows that were read."""
    num_too_long: int
    """Rows that were left out because a sequence of theirs is longer than ``max_length``."""

    def __len__(self) -> int:
        return len(self.groups)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each group, i64 [G]."""
        return np.array([sum(map(len, group)) for group in self.groups], np.int64)

    def most_tokens(self, num_groups: int | None, limit: int) -> int:
        """Of a pass over so many groups, whichever they are, or over all of them (None), where none may have more than ``limit``."""
        lengths = np.sort(self.lengths())
        return min(limit, int(lengths[-num_groups:].sum() if num_groups else lengths.sum()))

    def select(self, numbers: Iterable[int]) -> Examples:
        """These groups, in this order."""
        chosen = list(numbers)
        rows = tuple(self.rows[number] for number in chosen)
        return dataclasses.replace(self, rows=rows, groups=tuple(self.groups[number] for number in chosen))

    def split(self, held_out: float) -> tuple[Examples, Examples]:
        """Those to train on and those held out: rows that ask the same lie on one side, in every run (:mod:`ingot.data.split`).

        Raises
        ------
        DataError
            One side would be empty.
        """
        if held_out == 0.0:
            return self, self.select(())
        sides = [split_side(row.asked(), held_out) for row in self.rows]
        if len(set(sides)) < 2:
            prompts = len({tuple(prompt_key(row.asked())) for row in self.rows})
            raise DataError(
                f"{len(self)} rows with {prompts} different prompts are too few to hold {100 * held_out:g} % of the prompts out: "
                "give more rows, or --held-out 0"
            )
        train, held = ([n for n, found in enumerate(sides) if found == side] for side in ("train", "held_out"))
        return self.select(train), self.select(held)


def first_prompts(examples: Examples, count: int, longest: int) -> list[list[int]]:
    """Ids up to the first trained token of ``count`` rows, of at most ``longest`` tokens and different from one another."""
    prompts: dict[tuple[int, ...], None] = {}
    for sequence, *_ in examples.groups:
        if len(prompts) == count:
            break
        # A text without a prompt is continued from its first token.
        end = max(1, int(np.argmax(sequence.mask)))
        if end <= longest:
            prompts.setdefault(tuple(sequence.ids[:end].tolist()))
    return [list(prompt) for prompt in prompts]


def next_fit(examples: Examples, pack_length: int, seed: int) -> list[list[int]]:
    """Numbers of all examples in an order of their own, cut into packs: to look at all, or at a sample of them."""
    packs: list[list[int]] = []
    room = 0
    lengths = examples.lengths()
    order = Order(len(examples), seed, 0) if len(examples) else ()
    for place in (order[index] for index in range(len(order))):
        if not packs or lengths[place] > room:
            packs.append([])
            room = pack_length
        packs[-1].append(place)
        room -= int(lengths[place])
    return packs


def hash_of(examples: Examples) -> str:
    """sha256, as hex, of ids and masks: of rows, template, tokenizer and the longest length at once."""
    digest = hashlib.sha256()
    for sequence in itertools.chain(*examples.groups):
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.ids.tobytes())
        digest.update(np.packbits(sequence.mask).tobytes())
    return digest.hexdigest()


def load_examples(
    source: Source,
    encoder: ChatEncoder,
    kinds: Sequence[type[Row]] | None = None,
    *,
    max_length: int,
    step_separator: str = STEP_SEPARATOR,
    cache: RowCache | None = None,
    work: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> Examples:
    """Read and encode rows of these kinds; see :func:`ingot.data.rows.read_rows` and :func:`encode_row`. Of ranked lists, the judgements that count.

    Parameters
    ----------
    cache
        Where tokenized rows are kept; nowhere unless given.
    work
        Told what is being done, and how much of how much of it is done.

    Raises
    ------
    RowError
        The first row that cannot be used.
    DataError
        A file cannot be read, no row is short enough, or a file of the cache holds other rows than it should.
    """
    rows = list(read_rows(source, kinds, functools.partial(work, "reading rows")))
    groups = encode_rows(
        rows,
        lambda row: encode_row(row, encoder, step_separator=step_separator),
        tokenizer_hash=encoder.tokenizer.hash,
        template_hash=encoder.template.hash,
        settings={"step_separator": step_separator} if any(isinstance(row, Stepwise) for row in rows) else None,
        cache=cache,
        progress=functools.partial(work, "tokenizing rows"),
    )
    longest = [max(map(len, group)) for group in groups]
    fitting = [number for number, length in enumerate(longest) if length <= max_length]
    if not fitting:
        raise DataError(
            f"none of {len(rows)} rows fits into max_length {max_length}; the shortest needs {min(longest, default=None)} tokens: "
            "raise --max-length"
        )
    read = Examples(tuple(rows), tuple(groups), len(rows), len(rows) - len(fitting))
    return read.select(fitting)


# ---- packs


@dataclasses.dataclass(frozen=True)
class Pack:
    """Groups laid side by side, nothing padded."""

    tokens: npt.NDArray[np.int32]
    """i32 [N]"""
    offsets: npt.NDArray[np.int64]
    """i64 [S+1]: sequence s is tokens[offsets[s] : offsets[s + 1]]"""
    targets: npt.NDArray[np.int32]
    """i32 [N]: the token after each where it is trained (or everywhere, as asked), else -1; -1 at the end of each sequence"""
    mask: npt.NDArray[np.bool_]
    """bool [N]: the target is one that is trained"""
    sequence_ids: npt.NDArray[np.int64]
    """i64 [S]: number of each sequence in its step, however the step is packed; dropout is keyed by it"""
    group_offsets: npt.NDArray[np.int64]
    """i64 [G+1]: group g is sequences group_offsets[g] : group_offsets[g + 1]"""
    members: npt.NDArray[np.int64]
    """i64 [G]: number of each group among the examples"""
    value_rows: npt.NDArray[np.bool_]
    """bool [N]: here a sequence is judged"""

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(np.count_nonzero(self.targets >= 0))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items put into bins: the longest first, each into the fullest bin that has room; equal ones in their order.

    Uses at most 11/9 of the fewest bins possible, plus one (Johnson 1974, "Fast algorithms for bin packing").

    Raises
    ------
    ValueError
        An item is longer than ``capacity``.
    """
    bins: list[list[int]] = []
    # (room left, number of the bin), ascending.
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} has length {length}, more than a bin holds ({capacity})")
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([item])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(place)
            bins[number].append(item)
        bisect.insort(room, (left - length, number))
    return bins


def assemble_pack(
    groups: Sequence[Sequence[Encoded]],
    *,
    members: Sequence[int] | None = None,
    first_sequences: Sequence[int] | None = None,
    prompt_targets: bool = False,
) -> Pack:
    """These groups in this order.

    Parameters
    ----------
    members
        Number of each group among the examples; 0, 1, ... unless given.
    first_sequences
        Number of each group's first sequence in the step; counted through unless given.
    prompt_targets
        Give every token its target, not only the trained ones.
    """
    sequences = [sequence for group in groups for sequence in group]
    sizes = [len(group) for group in groups]
    group_offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in sequences], dtype=np.int64)]).astype(np.int64)
    num_tokens = int(offsets[-1])
    tokens = np.empty(num_tokens, np.int32)
    targets = np.full(num_tokens, -1, np.int32)
    mask = np.zeros(num_tokens, np.bool_)
    value_rows = np.zeros(num_tokens, np.bool_)
    for sequence, low in zip(sequences, offsets[:-1].tolist(), strict=True):
        high = low + len(sequence)
        tokens[low:high] = sequence.ids
        if len(sequence):
            trained = sequence.mask[1:]
            mask[low : high - 1] = trained
            targets[low : high - 1] = sequence.ids[1:] if prompt_targets else np.where(trained, sequence.ids[1:], -1)
        value_rows[[low + end for end in sequence.ends]] = True
    first = group_offsets[:-1] if first_sequences is None else np.asarray(first_sequences, np.int64)
    within = np.arange(len(sequences), dtype=np.int64) - np.repeat(group_offsets[:-1], sizes)
    return Pack(
        tokens=tokens,
        offsets=offsets,
        targets=targets,
        mask=mask,
        sequence_ids=np.repeat(first, sizes) + within,
        group_offsets=group_offsets,
        members=np.arange(len(groups), dtype=np.int64) if members is None else np.asarray(members, np.int64),
        value_rows=value_rows,
    )


class ExampleBatches:
    """Batches of examples: every one once an epoch, in an order that is new in each, packed.

    What a step sees is a function of (seed, step): the step takes the next ``batch_size`` groups of its epoch's order and lays them into
    packs of at most ``pack_length`` tokens. The last step of an epoch takes what is left.

    Raises
    ------
    DataError
        A group is longer than a pack.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, pack_length: int, seed: int, prompt_targets: bool = False
    ) -> None:
        if len(examples) == 0:
            raise DataError("there is no example to train on: give more rows")
        self._examples = examples
        self._batch_size = batch_size
        self._pack_length = pack_length
        self._seed = seed
        self._prompt_targets = prompt_targets
        self._lengths = examples.lengths()
        longest = int(np.argmax(self._lengths))
        if self._lengths[longest] > pack_length:
            raise DataError(
                f"the {len(examples.groups[longest])} sequences of row {examples.rows[longest].number} have {self._lengths[longest]} tokens "
                f"together, more than a pack of {pack_length}: raise the pack length to that, or lower --max-length"
            )
        self._order = Order(len(examples), seed, 0)
        self.steps_per_epoch = -(-len(examples) // batch_size)
        """Steps in which every example is seen once."""

    def take(self, step: int) -> list[Pack]:
        """The packs of a step, numbered from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order.epoch != epoch:
            self._order = Order(len(self._examples), self._seed, epoch)
        begin = index * self._batch_size
        members = [self._order[place] for place in range(begin, min(begin + self._batch_size, len(self._examples)))]
        groups = [self._examples.groups[member] for member in members]
        first = [0, *itertools.accumulate(map(len, groups))]
        return [
            assemble_pack(
                [groups[place] for place in places],
                members=[members[place] for place in places],
                first_sequences=[first[place] for place in places],
                prompt_targets=self._prompt_targets,
            )
            for places in best_fit_decreasing([int(self._lengths[member]) for member in members], self._pack_length)
        ]
