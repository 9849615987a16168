"""From a configuration to what a loop needs: tokenizer, token file, split, batches, network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.configs import ModelConfig, PretrainConfig
from ingot.data.batches import Batches, Split, make_batches, split
from ingot.data.corpus import Corpus
from ingot.data.shards import TokenShards, cached_path
from ingot.environment import memory_limit
from ingot.errors import ConfigError, DataError, RunError
from ingot.models import Model, load_model
from ingot.models.hf import open_folder, require_writer
from ingot.tokenizer import Tokenizer
from ingot.training.memory import Held, require_memory
from ingot.training.progress import Display
from ingot.training.runs import RunFolder

if TYPE_CHECKING:
    from ingot.models.base import Model as ModelProtocol

_REMEDY = (
    "lower --per-device-train-batch-size (with more --gradient-accumulation-steps), --max-length or the network's size"
)

Data = Corpus | Iterable[str | bytes] | None
"""Text given by a program instead of paths."""


@dataclasses.dataclass(frozen=True)
class Text:
    """What a run reads."""

    tokenizer: Tokenizer
    shards: TokenShards
    split: Split
    windows: str
    """packed or random"""
    batches: Batches
    facts: dict[str, Any]
    """For run.json and the card: hashes, sizes, how the text was divided."""


def prepare_text(config: PretrainConfig, folder: RunFolder | None, data: Data, display: Display) -> Text:
    """Read, tokenize and divide the text; or, for a run that has done so, open its token file without reading the text again.

    ``folder`` is None for a dry run, which leaves nothing but a token file in the cache.

    Raises
    ------
    DataError
        The text cannot be read or is too short.
    RunError
        A resumed run's text has changed.
    """
    known = {} if folder is None else folder.facts.get("data", {})
    shards = None
    if known and folder is not None:
        tokenizer = Tokenizer.from_file(folder.path)
        shards = _cached(config.cache_folder, tokenizer, known)
    if shards is None:
        if data is None and not config.data:
            raise DataError("no text to learn from: give --data with files or folders")
        corpus = data if isinstance(data, Corpus) else Corpus(data or config.data, separator=config.separator)
        if known and corpus.hash != known["source_hash"]:
            raise RunError(
                f"{corpus!r}: the text has changed since this run began; bring it back as it was, or start a new run from its "
                f"weights: ingot pretrain --model {config.output} --data ... --output ..."
            )
        tokenizer = _tokenizer(config, folder, corpus, display)
        shards = TokenShards.build(
            corpus,
            tokenizer,
            config.cache_folder,
            progress=lambda done, total: display.work("tokenizing", done, total),
            threads=config.threads,
        )
    try:
        divided = split(shards, config.held_out)
        windows = config.windows
        if windows == "auto":
            windows = "random" if shards.num_documents == 1 else "packed"
        batches = make_batches(
            shards,
            divided.train,
            windows=windows,
            max_length=config.sequence_length,
            rows=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            seed=config.seed,
            shuffle=config.document_order == "shuffled",
        )
    except DataError as error:
        # It knows token counts, not where they come from.
        name = ", ".join(config.data[:3]) + (", ..." if len(config.data) > 3 else "")
        raise DataError(f"{name}: {error}" if name else str(error)) from None
    facts = {
        "source_hash": shards.source_hash,
        "tokenizer_hash": shards.tokenizer_hash,
        "num_bytes": shards.num_bytes,
        "num_documents": shards.num_documents,
        "num_tokens": shards.num_tokens,
        "train_tokens": divided.train.num_targets,
        "held_out_tokens": divided.held_out.num_targets,
        "split": divided.rule,
        "windows": windows,
    }
    return Text(tokenizer, shards, divided, windows, batches, facts)


def settle_length(config: PretrainConfig) -> PretrainConfig:
    """The settings with a ``max_length``; where none is given, one that the model to go on from has positions for.

    Raises
    ------
    CheckpointError
        There is no such model.
    """
    length = config.sequence_length
    if config.model is not None and config.max_length is None:
        model = open_folder(config.model).config
        if model.position == "learned":
            length = min(length, model.max_position_embeddings)
    return dataclasses.replace(config, max_length=length)


def held(config: PretrainConfig, shape: ModelConfig) -> Held:
    """The network, with the passes of a step."""
    tokens = config.per_device_train_batch_size * config.sequence_length
    return Held(shape, num_trained=shape.num_parameters, batch_tokens=tokens)


def make_model(config: PretrainConfig, tokenizer: Tokenizer, known: dict[str, Any] | None) -> ModelProtocol:
    """The network: new, or that of ``config.model``; of shape ``known`` for a run whose weights are restored from a checkpoint.

    Raises
    ------
    ConfigError
        Network, tokenizer and max_length do not fit together.
    RunError
        The run would not fit into memory.
    """
    place: dict[str, Any] = {
        "backend": config.backend,
        "device": config.device,
        "threads": config.threads,
        "level": config.level,
    }
    if known is None and config.model is not None:
        require_writer(config.model)
        model = load_model(config.model, **place)
    else:
        shape = (
            ModelConfig.from_dict(known)
            if known
            else config.architecture.resolve(tokenizer.vocab_size, config.sequence_length)
        )
        require_memory(memory_limit(), held(config, shape), remedy=_REMEDY)
        model = Model(shape, seed=config.seed, precision=config.precision, **place)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {config.model} only {model.config.vocab_size}: "
            "they do not belong together; leave --tokenizer out to use the model's own"
        )
    if config.sequence_length > model.config.max_position_embeddings and model.config.position == "learned":
        raise ConfigError(
            f"max_length {config.sequence_length} is beyond the {model.config.max_position_embeddings} positions that the model "
            f"learns: give --max-length {model.config.max_position_embeddings} or less"
        )
    return model


def _require_same(tokenizer: Tokenizer, config: PretrainConfig) -> None:
    """Refuse a tokenizer other than the one that the model to go on from lies beside."""
    if config.model is None or not (Path(config.model) / "tokenizer.json").is_file():
        return
    if Tokenizer.from_file(config.model) != tokenizer:
        raise ConfigError(
            f"{config.tokenizer}: not the tokenizer that {config.model} learned with: its ids stand for other text; "
            "leave --tokenizer out to use the model's own"
        )


def _cached(cache_dir: Path, tokenizer: Tokenizer, known: dict[str, Any]) -> TokenShards | None:
    path = cached_path(cache_dir, known["source_hash"], known["tokenizer_hash"])
    try:
        return TokenShards.open(path, tokenizer=tokenizer, source_hash=known["source_hash"])
    except DataError:
        return None


def _tokenizer(config: PretrainConfig, folder: RunFolder | None, corpus: Corpus, display: Display) -> Tokenizer:
    """The run's own where it has one; otherwise as configured, and saved with the run."""
    if folder is not None and (folder.path / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder.path)
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_file(config.tokenizer)
        _require_same(tokenizer, config)
    elif config.model is not None:
        if config.vocab_size is not None:
            raise ConfigError("--model brings its tokenizer: leave --vocab-size out")
        tokenizer = Tokenizer.from_file(config.model)
    elif config.vocab_size is not None:
        if config.vocab_size != 256:
            display.say(f"training a tokenizer of {config.vocab_size} tokens on {corpus.num_bytes:,} bytes")
        tokenizer = Tokenizer.train(
            corpus,
            vocab_size=config.vocab_size,
            threads=config.threads,
            progress=lambda stage, done, total: display.work(f"tokenizer: {stage}", done, total or corpus.num_bytes),
        )
    else:
        tokenizer = Tokenizer.bytes_only()
    if folder is not None:
        folder.save_tokenizer(tokenizer)
    return tokenizer
