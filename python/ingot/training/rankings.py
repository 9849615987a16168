"""From rows to what a reward model learns from: each prompt with all its different responses and every judgement about them.

A prompt's responses are one group: they are run through the network once, in one pack, however many judgements compare them.

Shape legend: S sequences (responses with their prompts) of a pack or a set of groups, k criteria, P pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig, RewardConfig
from ingot.data.chat import ChatEncoder, Encoded
from ingot.data.examples import (
    ExampleBatches,
    Examples,
    Pack,
    assemble_pack,
    hash_of,
    load_examples,
    next_fit,
)
from ingot.data.files import file_hashes
from ingot.data.keys import canonical
from ingot.data.row_cache import RowCache
from ingot.data.rows import Preference, RankedList, Row, RowError
from ingot.errors import ConfigError, DataError
from ingot.inference.scoring import UNNAMED
from ingot.losses.numerics import Float64, f64
from ingot.training.demonstrations import Rows, encoder_of, require_unchanged
from ingot.training.progress import Display
from ingot.training.runs import RunFolder

_PACK_LENGTH = 4096

Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """What one row says of some responses of its prompt."""

    criterion: int
    """Number of the head."""
    members: tuple[int, ...]
    """Numbers of the responses in their group; one that stands in the row twice is there twice."""
    ranks: tuple[int, ...]
    """Of each: 1 is best, equal is a tie."""
    annotator: str | None = None
    weight: float = 1.0
    """What all its pairs count together."""
    margin: float = 0.0
    """By how much the first should win (pairs alone)."""
    soft_label: float = 1.0
    """Probability that the first is the better one (pairs alone)."""
    ratings: tuple[float, ...] | None = None
    """Of each; NaN where there is none."""

    def pairs(self, *, ties: bool = False) -> list[tuple[int, int, bool]]:
        """(better, worse, tied) of every two different responses, the best first; tied ones where they are asked for."""
        order = sorted(range(len(self.members)), key=lambda place: self.ranks[place])
        return [
            (self.members[i], self.members[j], self.ranks[i] == self.ranks[j])
            for i, j in itertools.combinations(order, 2)
            if self.members[i] != self.members[j] and (ties or self.ranks[i] != self.ranks[j])
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """P comparisons of numbered sequences."""

    better: Numbers
    """Number of the sequence that should win, i64 [P]."""
    worse: Numbers
    """i64 [P]"""
    criteria: Numbers
    """Number of the head, i64 [P]."""
    labels: Float64
    """Probability that the better one is better, f64 [P]."""
    weights: Float64
    """f64 [P]; those of a judgement add up to its weight."""
    margins: Float64
    """f64 [P]"""
    groups: Numbers
    """Number of the prompt, i64 [P]."""

    def __len__(self) -> int:
        return len(self.better)

    def of(self, criterion: int) -> Pairs:
        """Those of one head."""
        return self.select(self.criteria == criterion)

    def select(self, mask: npt.NDArray[Any]) -> Pairs:
        """Some of them."""
        names = [field.name for field in dataclasses.fields(self)]
        return Pairs(**{name: getattr(self, name)[mask] for name in names})


def pairs_of(judgements: Sequence[Sequence[Judgement]], first_sequences: npt.ArrayLike, *, ties: bool = False) -> Pairs:
    """All pairs of groups whose sequences begin at these numbers; tied ones, with the label 0.5, where asked for."""
    found: list[tuple[int, int, int, float, float, float, int]] = []
    for group, (first, made) in enumerate(zip(np.asarray(first_sequences).tolist(), judgements, strict=True)):
        for judgement in made:
            pairs = judgement.pairs(ties=ties)
            for better, worse, tied in pairs:
                label = 0.5 if tied else judgement.soft_label
                weight = judgement.weight / len(pairs)
                found.append(
                    (first + better, first + worse, judgement.criterion, label, weight, judgement.margin, group)
                )
    table = f64(found).reshape(len(found), 7)
    better, worse, criteria, groups = table[:, [0, 1, 2, 6]].T.astype(np.int64)
    labels, weights, margins = table[:, 3:6].T.copy()
    return Pairs(better, worse, criteria, labels, weights, margins, groups)


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Judgements as lists, for losses that look at a whole ranking: entry e of list l is one response."""

    sequences: Numbers
    """Number of each entry's sequence, i64 [E]."""
    criteria: Numbers
    """Number of its head, i64 [E]."""
    ranks: Numbers
    """i64 [E]"""
    ratings: Float64
    """f64 [E]; NaN for none."""
    offsets: Numbers
    """Entries of each list, i64 [L + 1]."""


def lists_of(judgements: Sequence[Sequence[Judgement]], first_sequences: npt.ArrayLike) -> Lists:
    """All judgements of groups whose sequences begin at these numbers."""
    flat = [
        (first, judgement)
        for first, made in zip(np.asarray(first_sequences).tolist(), judgements, strict=True)
        for judgement in made
    ]
    sizes = [len(judgement.members) for _, judgement in flat]
    unrated = float("nan")
    return Lists(
        np.array([first + member for first, each in flat for member in each.members], np.int64),
        np.repeat(np.array([each.criterion for _, each in flat], np.int64), sizes),
        np.array([rank for _, each in flat for rank in each.ranks], np.int64),
        f64([rating for _, each in flat for rating in each.ratings or (unrated,) * len(each.members)]),
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """Groups and what was judged about them."""

    examples: Examples
    """A prompt each; its sequences are the different responses."""
    judgements: tuple[tuple[Judgement, ...], ...]
    """Of each group."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def first_sequences(self) -> Numbers:
        """Number of each group's first sequence, where all are counted through, i64 [G]."""
        return np.concatenate([[0], np.cumsum([len(group) for group in self.examples.groups], dtype=np.int64)])[:-1]

    @property
    def sequences(self) -> list[Encoded]:
        """All of them, in order."""
        return list(itertools.chain(*self.examples.groups))

    def pairs(self) -> Pairs:
        """All pairs that are strictly ordered."""
        return pairs_of(self.judgements, self.first_sequences)

    def select(self, numbers: Sequence[int]) -> Ranked:
        """These groups."""
        return Ranked(self.examples.select(numbers), tuple(self.judgements[number] for number in numbers))


@dataclasses.dataclass(frozen=True, eq=False)
class Rankings:
    """What a run learns from."""

    encoder: ChatEncoder
    train: Ranked
    held_out: Ranked
    criteria: tuple[str, ...]
    """Names of the heads."""
    max_length: int
    pack_length: int
    batches: ExampleBatches
    facts: dict[str, Any]
    """For run.json and the card: hashes, counts, how the rows were divided."""

    def held_out_packs(self, seed: int, limit: int | None = None) -> Iterator[Pack]:
        """The held-out prompts in packs, in an order of their own, or so many packs of them: then a sample of all."""
        for places in next_fit(self.held_out.examples, self.pack_length, seed)[:limit]:
            yield assemble_pack([self.held_out.examples.groups[place] for place in places], members=places)

    def count_held_out_packs(self, seed: int) -> int:
        """How many there are."""
        return len(next_fit(self.held_out.examples, self.pack_length, seed))


def prepare_rankings(
    config: RewardConfig, folder: RunFolder | None, shape: ModelConfig, rows: Rows, display: Display
) -> Rankings:
    """Read, encode, group and divide the rows.

    Parameters
    ----------
    folder
        Of the run, which keeps its tokenizer and template; None for a dry run.
    shape
        Of the network.

    Raises
    ------
    ConfigError
        Lengths, criteria, template and network do not fit together.
    DataError
        A row cannot be used (:class:`~ingot.data.rows.RowError`), or too few are left.
    RunError
        The rows of a resumed run have changed.
    """
    max_length = config.max_length or shape.max_position_embeddings
    if max_length > shape.max_position_embeddings and shape.position == "learned":
        raise ConfigError(
            f"max_length {max_length} is beyond the {shape.max_position_embeddings} positions that the model learned: "
            f"give --max-length {shape.max_position_embeddings} or less"
        )
    encoder = encoder_of(folder, config.model)
    if rows is None and not config.data:
        raise DataError("no judgements to learn from: give --data with files of ranked lists or pairs")
    name = ", ".join(config.data) if rows is None else "the rows given"
    read = _load(config, rows, encoder, max_length, name, display)
    criteria = _criteria(config, read, name, display)
    ranked = _grouped(config, read, criteria, name, display)
    examples_hash = _hash_of(ranked)
    require_unchanged(folder, examples_hash, config.data)
    train, held_out = _split(ranked, config.held_out)
    longest = int(ranked.examples.lengths().max())
    pack_length = config.pack_length or max(_PACK_LENGTH, longest)
    rule = "nothing is held out"
    if len(held_out):
        rule = f"{len(held_out):,} of {len(ranked):,} prompts are held out, chosen by a hash of the prompt"
    facts = {
        "examples_hash": examples_hash,
        "files": file_hashes(() if rows is not None else config.data),
        "tokenizer_hash": encoder.tokenizer.hash,
        "template_hash": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "num_rows": read.num_rows,
        "num_too_long": read.num_too_long,
        "max_length": max_length,
        "criteria": list(criteria),
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_train_responses": sum(map(len, train.examples.groups)),
        "num_train_pairs": len(train.pairs()),
        "num_held_out_pairs": len(held_out.pairs()),
        "train_tokens": int(train.examples.lengths().sum()),
        "split": rule,
    }
    batches = ExampleBatches(
        train.examples, batch_size=config.per_device_train_batch_size, pack_length=pack_length, seed=config.seed
    )
    return Rankings(encoder, train, held_out, criteria, max_length, pack_length, batches, facts)


def _load(
    config: RewardConfig, rows: Rows, encoder: ChatEncoder, max_length: int, name: str, display: Display
) -> Examples:
    """The rows of all files, read together: a later file may take back a judgement of an earlier one."""
    try:
        examples = load_examples(
            list(config.data) if rows is None else rows,
            encoder,
            max_length=max_length,
            cache=RowCache(config.cache_folder, display.say),
            work=display.work,
        )
        for row in examples.rows:
            _check_row(row, config)
    except RowError as error:
        raise error if error.file else error.at(name, error.row) from None
    except DataError as error:
        # It counts rows, not knowing where they come from.
        known = str(error).startswith((*config.data, name))
        raise DataError(str(error) if known else f"{name}: {error}") from None
    if examples.num_too_long:
        display.say(
            f"{name}: {examples.num_too_long:,} of {examples.num_rows:,} rows have a response that makes more than {max_length} tokens "
            "with its prompt and are left out whole; --max-length changes that"
        )
    return examples


def _check_row(row: Row, config: RewardConfig) -> None:
    """Refuse rows that judge nothing, or in a way that the loss has no use for."""
    if not isinstance(row, Preference | RankedList):
        raise RowError(
            f"is of kind {row.kind}, which compares nothing",
            "give ranked lists (ingot label makes them) or rows with prompt, chosen and rejected",
            row=row.number,
        )
    if isinstance(row, RankedList):
        ratings = _ratings(row)
        if config.loss_type == "rating" and ratings is None:
            raise RowError(
                "has no ratings, which loss_type rating learns from",
                'give "ratings", a number for each response, or another --loss-type',
                row=row.number,
            )
        return
    soft_label = row.extra.get("soft_label")
    if soft_label is not None and (
        isinstance(soft_label, bool) or not isinstance(soft_label, int | float) or not 0 <= soft_label <= 1
    ):
        raise RowError(f"is {soft_label!r}", "give a probability, between 0 and 1", field="soft_label", row=row.number)
    if not isinstance(row.extra.get("criterion"), str | None):
        raise RowError(f"is {row.extra['criterion']!r}", "give a string", field="criterion", row=row.number)
    if config.loss_type == "rating":
        raise RowError(
            "is a pair, but loss_type rating learns from ratings", "take --loss-type pairwise", row=row.number
        )
    if config.loss_type != "pairwise":
        for field, value, neutral in (
            ("margin", row.margin, 0),
            ("weight", row.weight, 1),
            ("soft_label", soft_label, 1),
        ):
            if value not in (None, neutral):
                raise RowError(
                    f"has no use in loss_type {config.loss_type}",
                    "take --loss-type pairwise",
                    field=field,
                    row=row.number,
                )


def _ratings(row: RankedList) -> tuple[float, ...] | None:
    """A number for each response, NaN where there is none."""
    values = row.extra.get("ratings")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(row.responses):
        raise RowError(
            "is no list with an entry for each response", "give one for each", field="ratings", row=row.number
        )
    for number, value in enumerate(values):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value)
        ):
            raise RowError(f"is {value!r}", "give a number or null", field=f"ratings[{number}]", row=row.number)
    return tuple(float("nan") if value is None else float(value) for value in values)


def _criterion(row: Row) -> str:
    named = row.criterion if isinstance(row, RankedList) else row.extra.get("criterion")
    return named or UNNAMED


def _criteria(config: RewardConfig, read: Examples, name: str, display: Display) -> tuple[str, ...]:
    """The heads: those that are asked for, or those of the rows in the order of first appearance."""
    counts = Counter(map(_criterion, read.rows))
    if not config.criteria:
        return tuple(counts)
    for criterion in config.criteria:
        if criterion not in counts:
            raise ConfigError(f"{name}: no row is about {criterion!r}; criteria there: {', '.join(counts)}")
    others = {criterion: count for criterion, count in counts.items() if criterion not in config.criteria}
    if others:
        display.say(
            f"{name}: left out {', '.join(f'{count:,} rows about {criterion}' for criterion, count in others.items())}"
        )
    return config.criteria


def _grouped(config: RewardConfig, read: Examples, criteria: tuple[str, ...], name: str, display: Display) -> Ranked:
    """One group for each prompt: its different responses, and what every row says of them."""
    rows: dict[bytes, Row] = {}
    groups: dict[bytes, dict[bytes, Encoded]] = {}
    made: dict[bytes, list[Judgement]] = {}
    num_silent = 0
    for row, sequences in zip(read.rows, read.groups, strict=True):
        if _criterion(row) not in criteria:
            continue
        key = canonical(row.asked())
        known = groups.get(key, {})
        fresh = {**known}
        for sequence in sequences:
            fresh.setdefault(sequence.ids.tobytes(), sequence)
        places = {ids: place for place, ids in enumerate(fresh)}
        judgement = _judgement(row, criteria.index(_criterion(row)), [places[each.ids.tobytes()] for each in sequences])
        if not _says_something(judgement, config):
            num_silent += 1
            continue
        rows.setdefault(key, row)
        groups[key] = fresh
        made.setdefault(key, []).append(judgement)
    if not groups:
        raise DataError(f"{name}: no row prefers anything: each ties its responses")
    if num_silent:
        what = "picks no single best response" if config.loss_type == "best_of" else "ties all its responses"
        what = "has no ratings" if config.loss_type == "rating" else what
        display.say(f"{name}: {num_silent:,} of {read.num_rows:,} rows left out: each {what}")
    examples = Examples(
        rows=tuple(rows.values()),
        groups=tuple(tuple(group.values()) for group in groups.values()),
        num_rows=read.num_rows,
        num_too_long=read.num_too_long,
    )
    return Ranked(examples, tuple(tuple(made[key]) for key in groups))


def _judgement(row: Row, criterion: int, members: list[int]) -> Judgement:
    if isinstance(row, RankedList):
        ratings = _ratings(row)
        return Judgement(criterion, tuple(members), tuple(row.ranks), annotator=row.annotator, ratings=ratings)
    assert isinstance(row, Preference)
    return Judgement(
        criterion,
        tuple(members),
        (1, 2),
        annotator=row.extra.get("annotator"),
        weight=1.0 if row.weight is None else row.weight,
        margin=row.margin or 0.0,
        soft_label=float(row.extra.get("soft_label", 1.0)),
    )


def _says_something(judgement: Judgement, config: RewardConfig) -> bool:
    if config.loss_type == "rating":
        return judgement.ratings is not None and not np.isnan(judgement.ratings).all()
    if config.loss_type == "best_of" and judgement.ranks.count(1) > 1:
        return False
    return bool(judgement.pairs(ties=config.ties == "half"))


def _split(ranked: Ranked, held_out: float) -> tuple[Ranked, Ranked]:
    """By prompt."""
    number_of = {id(row): number for number, row in enumerate(ranked.examples.rows)}
    train, held = (ranked.select([number_of[id(row)] for row in side.rows]) for side in ranked.examples.split(held_out))
    return train, held


def _hash_of(ranked: Ranked) -> str:
    """Of sequences and judgements."""
    digest = hashlib.sha256(hash_of(ranked.examples).encode())
    for made in ranked.judgements:
        digest.update(repr(made).encode())
    return digest.hexdigest()
