"""How well a model predicts a text: loss, perplexity and bits per byte, each token scored once.

Index legend: T tokens of a document, L the context length, N tokens of a packed batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingot.data.corpus import Corpus
from ingot.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of :func:`evaluate`."""

    loss: float
    """Mean negative log-probability, nats per token, end-of-text tokens included."""
    perplexity: float
    """exp(loss); comparable only between models with the same tokenizer."""
    bits_per_byte: float
    """Negative log2-probability of the text's tokens per byte of text; end-of-text tokens count neither bits nor bytes."""
    num_tokens: int
    """Tokens that were scored."""
    num_bytes: int
    """Bytes of the scored text."""
    num_documents: int
    """Documents that were read."""
    rule: str
    """How documents longer than the context were cut."""


@dataclasses.dataclass(frozen=True)
class _Window:
    tokens: npt.NDArray[np.int32]  # [n], n <= L
    targets: npt.NDArray[np.int32]  # [n], -1 where another window scores the token


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    data: Corpus | Iterable[str | bytes] | Sequence[str],
    *,
    separator: str | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
) -> Evaluation:
    """Score every token of ``data`` once.

    A document starts after the end-of-text token, where the tokenizer has one, and ends with it. A document longer than the
    context is scored in windows that overlap by half: the first window scores all of its tokens, each later one its second half,
    so every token but the first ones is predicted from at least half a context.

    Parameters
    ----------
    data
        Paths of files and folders, or a :class:`~ingot.data.corpus.Corpus`.
    max_length
        Context length in tokens; the model's ``max_position_embeddings`` unless given.
    batch_tokens
        Tokens in one forward pass. Changes memory and speed, not the result.

    Raises
    ------
    DataError
        The data hold nothing to predict.
    ConfigError
        The tokenizer does not belong to the model, or ``max_length`` is beyond the model's learned positions.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}: they do not belong together"
        )
    length = config.max_position_embeddings if max_length is None else max_length
    if length < 2:
        raise ConfigError(f"max_length must be at least 2, got {length}")
    if config.position == "learned" and length > config.max_position_embeddings:
        raise ConfigError(
            f"max_length {length} is beyond the {config.max_position_embeddings} positions that the model has learned"
        )
    corpus = data if isinstance(data, Corpus) else Corpus(data, separator=separator)
    num_documents = 0
    num_bytes = 0
    end = tokenizer.eos_token_id

    def windows() -> Iterator[_Window]:
        nonlocal num_documents, num_bytes
        for document in corpus:
            ids = np.asarray(tokenizer.encode_to_numpy(document), dtype=np.int32)
            num_documents += 1
            num_bytes += len(document)
            if end is None and len(ids):
                # Nothing predicts the first token of a text without a token before it.
                num_bytes -= len(tokenizer.token_bytes(int(ids[0])))
            sequence = ids if end is None else np.concatenate([[end], ids, [end]]).astype(np.int32)
            yield from _cut(sequence, length)

    total = 0.0
    text = 0.0
    count = 0
    for tokens, offsets, targets in _pack(windows(), max(batch_tokens, length)):
        _, out = model.forward(tokens, offsets, targets, want=("logprobs",), train=False)
        scored = targets >= 0
        logprobs = out.logprobs[scored].astype(np.float64)
        total -= float(logprobs.sum())
        text -= float(logprobs[targets[scored] != end].sum()) if end is not None else float(logprobs.sum())
        count += int(scored.sum())
    if count == 0:
        raise DataError("the data hold no token to predict: give a longer text")
    loss = total / count
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=text / math.log(2.0) / num_bytes if num_bytes else float("nan"),
        num_tokens=count,
        num_bytes=num_bytes,
        num_documents=num_documents,
        rule=f"windows of {length} tokens overlapping by {length // 2}; each token scored once, with at least {length // 2} "
        "tokens before it where the document has them",
    )


def _cut(sequence: npt.NDArray[np.int32], length: int) -> Iterator[_Window]:
    """Windows over one document; the targets of all windows together are each token but the first, once."""
    inputs, targets = sequence[:-1], sequence[1:]
    if len(inputs) == 0:
        return
    yield _Window(inputs[:length], targets[:length])
    stride = max(1, length // 2)
    scored = length
    while scored < len(inputs):
        stop = min(scored + stride, len(inputs))
        start = stop - length
        cut = targets[start:stop].copy()
        cut[: scored - start] = -1
        yield _Window(inputs[start:stop], cut)
        scored = stop


Packed = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int32]]


def _pack(windows: Iterator[_Window], batch_tokens: int) -> Iterator[Packed]:
    """Windows side by side, at most ``batch_tokens`` at a time: tokens [N], offsets [S+1], targets [N]."""
    held: list[_Window] = []
    size = 0
    for window in windows:
        if held and size + len(window.tokens) > batch_tokens:
            yield _join(held)
            held, size = [], 0
        held.append(window)
        size += len(window.tokens)
    if held:
        yield _join(held)


def _join(held: list[_Window]) -> Packed:
    offsets = np.zeros(len(held) + 1, dtype=np.int64)
    np.cumsum([len(window.tokens) for window in held], out=offsets[1:])
    return (
        np.concatenate([window.tokens for window in held]),
        offsets,
        np.concatenate([window.targets for window in held]),
    )
