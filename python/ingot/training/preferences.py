"""From rows to what preference losses need: which answers are compared, held-out prompts, packs, KTO's mismatched answers.

Shape legend: S sequences (answers with their prompts), B pairs, U verdicts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import DPOConfig, ModelConfig
from ingot.data.chat import ChatEncoder, Encoded
from ingot.data.examples import (
    ExampleBatches,
    Examples,
    Pack,
    assemble_pack,
    first_prompts,
    hash_of,
    load_examples,
    next_fit,
)
from ingot.data.files import file_hashes
from ingot.data.row_cache import RowCache
from ingot.data.rows import Preference, RankedList, Row, RowError, UnpairedPreference
from ingot.errors import ConfigError, DataError
from ingot.losses.numerics import Float64, f64
from ingot.tokenizer import Tokenizer
from ingot.training.demonstrations import Rows, encoder_of, require_unchanged
from ingot.training.progress import Display
from ingot.training.runs import RunFolder

_PACK_LENGTH = 4096
_PARTNERS_TRIED = 100

Places = npt.NDArray[np.int64]


# ---- what is compared


@dataclasses.dataclass(frozen=True, eq=False)
class Comparisons:
    """Pairs among numbered sequences."""

    chosen: Places
    """Number of the preferred sequence, i64 [B]."""
    rejected: Places
    """i64 [B]"""
    weights: Float64
    """What each pair counts, f64 [B]; the pairs of a ranked list count 1 together."""
    rows: Places
    """Number of the row that each is of, i64 [B]."""

    def __len__(self) -> int:
        return len(self.chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class Verdicts:
    """Numbered sequences, each good or bad. One may appear several times, also as both: in the middle of a ranked list."""

    answers: Places
    """Number of the sequence, i64 [U]."""
    labels: npt.NDArray[np.bool_]
    """bool [U]: good."""
    weights: Float64
    """What each counts, f64 [U]."""
    rows: Places
    """Number of the row that each is of, i64 [U]."""

    def __len__(self) -> int:
        return len(self.answers)


def pairs_of(row: Row) -> list[tuple[int, int, float]]:
    """(chosen, rejected, weight) among the sequences of a row; none where it ties all its answers or holds one alone."""
    if isinstance(row, Preference):
        return [(0, 1, 1.0 if row.weight is None else row.weight)]
    if isinstance(row, RankedList):
        pairs = row.pairs()
        return [(better, worse, 1.0 / len(pairs)) for better, worse in pairs]
    return []


def comparisons_of(rows: Sequence[Row], first_sequences: npt.ArrayLike) -> Comparisons:
    """The pairs of rows whose sequences begin at these numbers."""
    first = np.asarray(first_sequences, np.int64)
    found = [
        (first[number] + chosen, first[number] + rejected, weight, number)
        for number, row in enumerate(rows)
        for chosen, rejected, weight in pairs_of(row)
    ]
    chosen, rejected, weights, numbers = zip(*found, strict=True) if found else ((), (), (), ())
    return Comparisons(
        np.array(chosen, np.int64), np.array(rejected, np.int64), f64(weights), np.array(numbers, np.int64)
    )


def verdicts_of(rows: Sequence[Row], first_sequences: npt.ArrayLike) -> Verdicts:
    """The verdicts of rows whose sequences begin at these numbers; a pair is a good answer and a bad one."""
    first = np.asarray(first_sequences, np.int64)
    single = [
        (first[number], row.label, number) for number, row in enumerate(rows) if isinstance(row, UnpairedPreference)
    ]
    pairs = comparisons_of(rows, first)
    answers, labels, numbers = zip(*single, strict=True) if single else ((), (), ())
    return Verdicts(
        np.concatenate([np.array(answers, np.int64), pairs.chosen, pairs.rejected]),
        np.concatenate([np.array(labels, np.bool_), np.ones(len(pairs), np.bool_), np.zeros(len(pairs), np.bool_)]),
        np.concatenate([np.ones(len(single)), pairs.weights, pairs.weights]),
        np.concatenate([np.array(numbers, np.int64), pairs.rows, pairs.rows]),
    )


def mismatched(examples: Examples, max_length: int) -> Examples:
    """The prompt of each row with the answers of an earlier row that asks something else (the last rows for the first).

    KTO estimates with them how far the policy is from its reference on the whole. The choice is fixed: it does not change from epoch
    to epoch, so that the reference scores them once. A row for which none is short enough gets no answer.
    """
    groups = examples.groups
    prompts = [group[0].ids[: int(np.argmax(group[0].mask))] for group in groups]

    def spliced(number: int) -> tuple[Encoded, ...]:
        prompt = prompts[number]
        for back in range(1, min(len(groups), _PARTNERS_TRIED + 1)):
            partner = number - back
            if np.array_equal(prompts[partner], prompt):
                continue
            found = []
            for place in range(len(groups[number])):
                other = groups[partner][place % len(groups[partner])]
                begin = len(prompts[partner])
                ids = np.concatenate([prompt, other.ids[begin:]])
                mask = np.concatenate([np.zeros(len(prompt), np.bool_), other.mask[begin:]])
                found.append(Encoded(ids, mask, (len(ids) - 1,)))
            if max(map(len, found)) <= max_length:
                return tuple(found)
        return ()

    return dataclasses.replace(examples, groups=tuple(spliced(number) for number in range(len(groups))))


# ---- the data of a run


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What a run learns from."""

    encoder: ChatEncoder
    """Template and tokenizer of the model."""
    train: Examples
    held_out: Examples
    train_mismatched: Examples
    """As :func:`mismatched` makes them; no groups where the loss does not need them."""
    held_out_mismatched: Examples
    max_length: int
    pack_length: int
    batches: ExampleBatches
    facts: dict[str, Any]
    """For run.json and the card: hashes, counts, how the rows were divided."""

    def held_out_packs(self, seed: int, limit: int | None = None) -> Iterator[Pack]:
        """The held-out rows in packs, in an order of their own, or so many packs of them: then a sample of all."""
        for places in next_fit(self.held_out, self.pack_length, seed)[:limit]:
            yield assemble_pack([self.held_out.groups[place] for place in places], members=places)

    def count_held_out_packs(self, seed: int) -> int:
        """How many there are."""
        return len(next_fit(self.held_out, self.pack_length, seed))

    def prompts(self, count: int, longest: int) -> list[list[int]]:
        """Ids of ``count`` prompts, different from one another: held-out ones where there are any."""
        return first_prompts(self.held_out if len(self.held_out) else self.train, count, longest)


def prepare_preferences(
    config: DPOConfig, folder: RunFolder | None, shape: ModelConfig, rows: Rows, display: Display
) -> Preferences:
    """Read, encode and divide the rows.

    Parameters
    ----------
    folder
        Of the run, which keeps its tokenizer and template; None for a dry run.
    shape
        Of the network.

    Raises
    ------
    ConfigError
        Lengths, template, loss and network do not fit together.
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
    # A loss that imitates may start from a model that knows no chat.
    encoder = encoder_of(folder, config.model, complete=config.imitates)
    if (
        config.reference_model is not None
        and Tokenizer.from_file(config.reference_model).hash != encoder.tokenizer.hash
    ):
        raise ConfigError(
            f"{config.reference_model}: has another tokenizer than {config.model}, so that it would score other tokens: "
            "give a reference model with the same one"
        )
    if rows is None and not config.data:
        raise DataError("no preferences to learn from: give --data with files of rows")
    read = _load(config, rows, encoder, max_length, display)
    examples = _comparable(config, read)
    name = ", ".join(config.data) if rows is None else "the rows given"
    if not len(examples):
        raise DataError(f"{name}: no row prefers anything: each ties all its answers")
    num_tied = len(read) - len(examples)
    if num_tied:
        display.say(f"{name}: {num_tied:,} of {read.num_rows:,} rows tie all their answers and are left out")
    examples_hash = hash_of(examples)
    require_unchanged(folder, examples_hash, config.data)
    train, held_out = examples.split(config.held_out)
    if config.on_verdicts:
        _say_balance(config, train, display)
    empty = examples.select(())
    pack_length = config.pack_length or max(_PACK_LENGTH, int(examples.lengths().max()))
    rule = "nothing is held out"
    if len(held_out):
        rule = f"{len(held_out):,} of {len(examples):,} rows are held out, chosen by a hash of their prompt"
    facts = {
        "examples_hash": examples_hash,
        "files": file_hashes(() if rows is not None else config.data),
        "tokenizer_hash": encoder.tokenizer.hash,
        "template_hash": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "num_rows": examples.num_rows,
        "num_too_long": examples.num_too_long,
        "num_tied": num_tied,
        "max_length": max_length,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_train_answers": sum(map(len, train.groups)),
        "train_tokens": int(train.lengths().sum()),
        "split": rule,
    }
    batches = ExampleBatches(
        train, batch_size=config.per_device_train_batch_size, pack_length=pack_length, seed=config.seed
    )
    with_partners = config.loss_type == ("kto",)
    return Preferences(
        encoder,
        train,
        held_out,
        mismatched(train, max_length) if with_partners else empty,
        mismatched(held_out, max_length) if with_partners else empty,
        max_length,
        pack_length,
        batches,
        facts,
    )


def _load(config: DPOConfig, rows: Rows, encoder: ChatEncoder, max_length: int, display: Display) -> Examples:
    """The rows of all files, read together: a later file may take back a judgement of an earlier one."""
    name = ", ".join(config.data) if rows is None else "the rows given"
    try:
        examples = load_examples(
            list(config.data) if rows is None else rows,
            encoder,
            max_length=max_length,
            cache=RowCache(config.cache_folder, display.say),
            work=display.work,
        )
    except RowError as error:
        raise error if error.file else error.at(name, error.row) from None
    except DataError as error:
        # It counts rows, not knowing where they come from.
        raise DataError(
            str(error) if str(error).startswith(tuple(config.data) or name) else f"{name}: {error}"
        ) from None
    loss = config.loss_type[0]
    for row in examples.rows:
        if isinstance(row, UnpairedPreference) and not config.on_verdicts:
            raise RowError(
                f"is of kind {row.kind}, which loss_type {loss} cannot compare with anything",
                "give pairs or ranked lists, or take --loss-type kto",
                file=name,
                row=row.number,
            )
        if not isinstance(row, Preference | RankedList | UnpairedPreference):
            raise RowError(
                f"is of kind {row.kind}, which prefers nothing",
                "give rows with prompt, chosen and rejected, ranked lists of ingot label, or rows with prompt, completion and label",
                file=name,
                row=row.number,
            )
        if {"aot", "aot_unpaired"} & set(config.loss_type) and any(weight != 1.0 for *_, weight in pairs_of(row)):
            raise RowError(
                f"has a weight, or several pairs, but loss_type {loss} compares sorted batches and takes none",
                "give pairs without weights, or take another --loss-type",
                file=name,
                row=row.number,
            )
    if examples.num_too_long:
        display.say(
            f"{name}: {examples.num_too_long:,} of {examples.num_rows:,} rows have an answer that makes more than {max_length} tokens with its "
            "prompt and are left out whole; --max-length changes that"
        )
    return examples


def _say_balance(config: DPOConfig, train: Examples, display: Display) -> None:
    """Where good or bad answers would rule (Ethayarajh et al. 2024 keep w_D n_D between 1 and 4/3 of w_U n_U), say how to balance them."""
    found = verdicts_of(train.rows, np.zeros(len(train.rows), np.int64))
    good, bad = float(found.weights[found.labels].sum()), float(found.weights[~found.labels].sum())
    display.say(f"verdicts  {good:,.0f} good, {bad:,.0f} bad")
    if not good or not bad:
        missing = "bad" if good else "good"
        display.say(
            f"          no answer is {missing}: the model learns what to do, or what not to do, alone; give both"
        )
    elif not 0.75 <= config.desirable_weight * good / (config.undesirable_weight * bad) <= 4 / 3:
        flag, value = ("undesirable", good / bad) if good > bad else ("desirable", bad / good)
        display.say(f"          one kind outweighs the other: --{flag}-weight {value:.2g} would balance them")


def _comparable(config: DPOConfig, examples: Examples) -> Examples:
    """Rows that say that something is better than something else, or good or bad."""
    kept = [
        number
        for number, row in enumerate(examples.rows)
        if pairs_of(row) or (config.on_verdicts and isinstance(row, UnpairedPreference))
    ]
    return examples.select(kept)
