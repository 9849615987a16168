"""From rows to what fine-tuning needs: chat template, tokenizer with its special tokens, examples, held-out ones, batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig, SFTConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
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
from ingot.data.files import changed_files, file_hashes
from ingot.data.row_cache import RowCache
from ingot.data.rows import LanguageModelling, PromptCompletion, RowError
from ingot.errors import ConfigError, DataError, RunError
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.progress import Display
from ingot.training.runs import RunFolder

Rows: TypeAlias = Iterable[Mapping[str, Any]] | None
"""Rows given by a program instead of files."""

_PACK_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """What a run learns from."""

    encoder: ChatEncoder
    """With the template and the tokenizer that knows its special tokens."""
    train: Examples
    held_out: Examples
    sources: tuple[str, ...]
    """Names of the files, different from one another."""
    held_out_sources: npt.NDArray[np.int64]
    """i64 [G]: number of the file of each held-out row."""
    max_length: int
    pack_length: int
    batches: ExampleBatches
    facts: dict[str, Any]
    """For run.json and the card: hashes, counts, how the rows were divided."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The one of the encoder."""
        return self.encoder.tokenizer

    def held_out_packs(self, seed: int, limit: int | None = None) -> Iterator[Pack]:
        """The held-out rows in packs, in an order of their own, or so many packs of them: then a sample of all."""
        for places in self._held_out_places(seed)[:limit]:
            yield assemble_pack([self.held_out.groups[place] for place in places], members=places)

    def count_held_out_packs(self, seed: int) -> int:
        """How many there are."""
        return len(self._held_out_places(seed))

    def _held_out_places(self, seed: int) -> list[list[int]]:
        return next_fit(self.held_out, self.pack_length, seed)

    def prompts(self, count: int, longest: int) -> list[list[int]]:
        """Ids up to the first trained token of ``count`` rows, different from one another: held-out ones where there are any."""
        return first_prompts(self.held_out if len(self.held_out) else self.train, count, longest)


def prepare_demonstrations(
    config: SFTConfig, folder: RunFolder | None, shape: ModelConfig, rows: Rows, display: Display
) -> Demonstrations:
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
        Lengths, template and network do not fit together.
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
    pack_length = config.pack_length or max(max_length, _PACK_LENGTH)
    if pack_length < max_length:
        raise ConfigError(f"pack_length {pack_length} is below max_length {max_length}: a row must fit into a pack")
    encoder = encoder_of(folder, config.model, chat_template=config.chat_template, complete=True)
    if rows is None and not config.data:
        raise DataError("no demonstrations to learn from: give --data with files of rows")
    loaded, sources = _load(config, rows, encoder, max_length, display)
    examples = Examples(
        rows=tuple(row for part in loaded for row in part.rows),
        groups=tuple(group for part in loaded for group in part.groups),
        num_rows=sum(part.num_rows for part in loaded),
        num_too_long=sum(part.num_too_long for part in loaded),
    )
    examples_hash = hash_of(examples)
    require_unchanged(folder, examples_hash, config.data)
    train, held_out = examples.split(config.held_out)
    source_of = {id(row): number for number, part in enumerate(loaded) for row in part.rows}
    trained = sum(int(sequence.mask.sum()) for (sequence,) in train.groups)
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
        "max_length": max_length,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "train_tokens": int(train.lengths().sum()),
        "trained_tokens": trained,
        "split": rule,
    }
    batches = ExampleBatches(
        train,
        batch_size=config.per_device_train_batch_size,
        pack_length=pack_length,
        seed=config.seed,
        prompt_targets=config.prompt_weight > 0,
    )
    numbers = np.array([source_of[id(row)] for row in held_out.rows], np.int64)
    return Demonstrations(encoder, train, held_out, sources, numbers, max_length, pack_length, batches, facts)


def require_unchanged(folder: RunFolder | None, examples_hash: str, data: Sequence[str]) -> None:
    """Refuse to go on with other rows than a run began with.

    Raises
    ------
    RunError
        Says how to start a new run instead.
    """
    known = {} if folder is None else folder.facts.get("data", {})
    if folder is not None and known and known["examples_hash"] != examples_hash:
        raise RunError(
            f"{', '.join(changed_files(data, known.get('files', {}))) or 'the rows given'}: changed since this run began; bring the rows back as they were, or start a new "
            f"run from its weights: ingot {folder.facts['kind']} --model {folder.path} --data ... --output ..."
        )


def encoder_of(
    folder: RunFolder | None, model: str, *, chat_template: str | None = None, complete: bool = False
) -> ChatEncoder:
    """The run's own where it has one; otherwise that of the model it starts from, saved with the run.

    Parameters
    ----------
    folder
        None for a dry run.
    chat_template
        A file with a template to use instead of the model's.
    complete
        Add the special tokens that the template names and the tokenizer lacks.

    Raises
    ------
    DataError
        Template and tokenizer do not fit together, or cannot be read.
    """
    if folder is not None and (folder.path / "tokenizer.json").is_file():
        return ChatEncoder(ChatTemplate.of_model(folder.path), Tokenizer.from_file(folder.path))
    tokenizer, template = Tokenizer.from_file(model), ChatTemplate.of_model(model)
    if chat_template is not None:
        given = ChatTemplate.from_file(chat_template, template.bos_token or END_OF_TEXT)
        if "eos_token" in given.source:
            own = template.eos_token if template.eos_token in tokenizer.special_tokens else END_OF_TEXT
            given = dataclasses.replace(given, eos_token=own)
        template = given
    if complete:
        tokenizer = tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer))
    try:
        encoder = ChatEncoder(template, tokenizer)
    except DataError as error:
        raise DataError(f"{chat_template or model}: {error}") from None
    if folder is not None:
        folder.save_tokenizer(tokenizer, encoder)
    return encoder


def _load(
    config: SFTConfig, rows: Rows, encoder: ChatEncoder, max_length: int, display: Display
) -> tuple[list[Examples], tuple[str, ...]]:
    """The examples of each file, and the names of the files."""
    sources = [rows] if rows is not None else list(config.data)
    cache = RowCache(config.cache_folder, display.say)
    loaded = []
    for source in sources:
        name = source if isinstance(source, str) else "the rows given"
        try:
            part = load_examples(
                source,
                encoder,
                max_length=max_length,
                cache=cache,
                work=display.work,
            )
        except RowError as error:
            raise error if error.file else error.at(name, error.row) from None
        except DataError as error:
            # It counts rows, not knowing where they come from.
            where = "" if str(error).startswith(name) else f"{name}: "
            raise DataError(f"{where}{error}") from None
        for row in part.rows:
            if not isinstance(row, LanguageModelling | PromptCompletion):
                raise RowError(
                    f"is of kind {row.kind}, which fine-tuning on demonstrations does not learn from",
                    "give rows with messages, prompt and completion, or text",
                    file=name,
                    row=row.number,
                )
        if part.num_too_long:
            display.say(
                f"{name}: {part.num_too_long:,} of {part.num_rows:,} rows are longer than {max_length} tokens and left out whole; "
                "--max-length changes that"
            )
        loaded.append(part)
    names = [Path(source).name.split(".")[0] if isinstance(source, str) else "rows" for source in sources]
    unique = [name if names.count(name) == 1 else f"{name}{number}" for number, name in enumerate(names, 1)]
    return loaded, tuple(unique)
