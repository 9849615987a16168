"""What to train on this machine in a given time: the size of the network, tokens, steps, expected time and memory.

The size is chosen by the fitted scaling law of Hoffmann et al. 2022 (arXiv 2203.15556) with the constants of Besiroglu et al. 2024
(arXiv 2404.10102); text that is read again counts less and less, as Muennighoff et al. 2023 (arXiv 2305.16264) measured. The law is
used for the balance of size and tokens alone: its loss is that of another tokenizer on other text, so it is not shown.
Speed is measured: a step of each candidate's shape runs on this machine.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.configs import Architecture, ModelConfig
from ingot.data.corpus import Corpus
from ingot.environment import memory_limit
from ingot.errors import ConfigError
from ingot.training.memory import Held, memory_estimate

if TYPE_CHECKING:
    from ingot.tokenizer import Tokenizer

# Width, layers, heads, key-value heads: heads of 32 while narrow, of 64 from 256 on.
_LADDER = (
    (64, 4, 2, 2),
    (96, 4, 3, 3),
    (128, 4, 4, 4),
    (128, 6, 4, 4),
    (192, 6, 6, 6),
    (256, 6, 4, 4),
    (320, 6, 5, 5),
    (384, 8, 6, 6),
    (512, 8, 8, 8),
    (640, 10, 10, 10),
    (768, 12, 12, 12),
    (1024, 16, 16, 16),
)
_SIZE_CONSTANT, _SIZE_EXPONENT = 482.01, 0.3478
_DATA_CONSTANT, _DATA_EXPONENT = 2085.43, 0.3658
_REPEATS_THAT_HELP = 15.4
# Evaluation, checkpoints and reading take their share of the time beside the steps.
_SHARE_OF_TIME_IN_STEPS = 0.9
_MAX_EPOCHS = 60.0
_LEAST_STEPS = 100
_SAMPLE_BYTES = 4_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of :func:`plan`."""

    architecture: Architecture
    """The network."""
    num_parameters: int
    """Its size."""
    vocab_size: int
    """Token ids."""
    bytes_per_token: float
    """Measured on the data."""
    corpus_bytes: int
    """Size of the text."""
    corpus_tokens: int
    """The same in tokens (estimated from a sample)."""
    max_length: int
    """Sequence length in tokens."""
    per_device_train_batch_size: int
    """Rows of a step."""
    max_steps: int
    """Steps that fit."""
    train_tokens: int
    """Tokens read in all of them."""
    epochs: float
    """How often the text is read."""
    step_s: float
    """Measured time of a step."""
    tokens_per_s: float
    """Measured speed."""
    expected_s: float
    """Steps, evaluation and saving together."""
    peak_memory_gb: float
    """Expected peak, counted from shapes (:mod:`ingot.training.memory`)."""
    learning_rate: float
    """A peak that suits this width."""
    limited_by: str
    """What sets the size: the time, or the amount of text."""
    command: str
    """The command that does it."""


def plan(
    data: Sequence[str],
    max_time_s: float,
    *,
    tokenizer: Tokenizer | None = None,
    tokenizer_path: str | None = None,
    max_length: int = 256,
    output: str = "runs/planned",
    separator: str | None = None,
    threads: int | None = None,
) -> Plan:
    """Choose what to train on ``data`` in ``max_time_s`` seconds on this machine.

    Parameters
    ----------
    tokenizer
        Use this one (``tokenizer_path`` is where it lies, for the printed command); otherwise a vocabulary size that suits the
        amount of text is proposed.

    Raises
    ------
    DataError
        The data hold no text.
    ConfigError
        Not even the smallest network gets a hundred steps in the time.
    """
    corpus = Corpus(data, separator=separator)
    corpus_bytes = corpus.num_bytes
    vocab_size = tokenizer.vocab_size if tokenizer is not None else _vocabulary_for(corpus_bytes)
    bytes_per_token = _bytes_per_token(corpus, tokenizer, vocab_size)
    corpus_tokens = max(1, round(corpus_bytes / bytes_per_token))
    max_length = max(16, min(max_length, corpus_tokens // 4))
    rows = max(1, 4096 // max_length)
    train_s = max_time_s * _SHARE_OF_TIME_IN_STEPS

    smallest = _architecture(_LADDER[0])
    flops_per_s = _measured_flops(smallest, vocab_size, max_length, rows, threads)
    best = _LADDER[0]
    best_score = math.inf
    for shape in _LADDER:
        config = _architecture(shape).resolve(vocab_size, max_length)
        tokens = min(train_s * flops_per_s / config.flops_per_token(max_length), corpus_tokens * _MAX_EPOCHS)
        score = _law(config.num_parameters, tokens, corpus_tokens)
        if memory_estimate(_held(config, rows * max_length)) < 0.8 * memory_limit() and score < best_score:
            best, best_score = shape, score
            # Wider networks use the machine better: measure again where the choice moved up.
            if shape[0] >= 128:
                flops_per_s = max(
                    flops_per_s, _measured_flops(_architecture(shape), vocab_size, max_length, rows, threads)
                )
        elif score > 1.02 * best_score:
            break

    # The choice went by the fastest step seen; where the machine has slowed down since, a smaller network still learns something.
    for shape in reversed(_LADDER[: _LADDER.index(best) + 1]):
        architecture = _architecture(shape)
        config = architecture.resolve(vocab_size, max_length)
        step_s = _probe(config, max_length, rows, threads)
        if train_s / step_s >= _LEAST_STEPS:
            break
    by_time = int(train_s / step_s)
    by_text = int(corpus_tokens * _MAX_EPOCHS / (rows * max_length))
    max_steps = max(1, min(by_time, by_text))
    if by_time < _LEAST_STEPS:
        raise ConfigError(
            f"only {by_time} steps of {step_s:.2f} s fit into {max_time_s:.0f} s, too few to learn from: give --max-time more"
        )
    train_tokens = max_steps * rows * max_length
    learning_rate = round(2e-3 * math.sqrt(256 / max(architecture.hidden_size, 64)), 5)
    words = ["ingot", "pretrain", "--data", *data, "--output", output]
    words += ["--tokenizer", tokenizer_path] if tokenizer_path is not None else ["--vocab-size", str(vocab_size)]
    words += ["--separator", separator] if separator is not None else []
    words += ["--model.hidden-size", str(shape[0]), "--model.num-hidden-layers", str(shape[1])]
    words += ["--model.num-attention-heads", str(shape[2]), "--max-length", str(max_length)]
    words += ["--per-device-train-batch-size", str(rows), "--max-steps", str(max_steps)]
    words += ["--learning-rate", f"{learning_rate:g}"]
    return Plan(
        architecture=architecture,
        num_parameters=config.num_parameters,
        vocab_size=vocab_size,
        bytes_per_token=round(bytes_per_token, 3),
        corpus_bytes=corpus_bytes,
        corpus_tokens=corpus_tokens,
        max_length=max_length,
        per_device_train_batch_size=rows,
        max_steps=max_steps,
        train_tokens=train_tokens,
        epochs=round(train_tokens / corpus_tokens, 2),
        step_s=step_s,
        tokens_per_s=rows * max_length / step_s,
        expected_s=max_steps * step_s / _SHARE_OF_TIME_IN_STEPS,
        peak_memory_gb=memory_estimate(_held(config, rows * max_length)) / 1e9,
        learning_rate=learning_rate,
        limited_by="the amount of text" if by_text < by_time else "the time",
        command=shlex.join(words),
    )


def _law(num_parameters: int, tokens: float, corpus_tokens: int) -> float:
    """The part of the fitted loss that size and tokens decide; repeated tokens count with exponential decay."""
    repeats = max(0.0, tokens / corpus_tokens - 1.0)
    fresh = min(tokens, corpus_tokens)
    effective = fresh + fresh * _REPEATS_THAT_HELP * (1.0 - math.exp(-repeats / _REPEATS_THAT_HELP))
    size_term: float = _SIZE_CONSTANT / num_parameters**_SIZE_EXPONENT
    data_term: float = _DATA_CONSTANT / effective**_DATA_EXPONENT
    return size_term + data_term


def _vocabulary_for(corpus_bytes: int) -> int:
    """A power of two between 512 and 8192 that leaves each token hundreds of occurrences."""
    return int(min(8192, max(512, 2 ** round(math.log2(max(1, corpus_bytes) / 500)))))


def _bytes_per_token(corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int) -> float:
    from ingot.tokenizer import Tokenizer

    sample: list[bytes] = []
    size = 0
    for document in corpus:
        sample.append(bytes(document[: _SAMPLE_BYTES - size]))
        size += len(sample[-1])
        if size >= _SAMPLE_BYTES:
            break
    if tokenizer is None:
        try:
            tokenizer = Tokenizer.train(sample, vocab_size=vocab_size, special_tokens=["<|endoftext|>"])
        except ValueError:
            return 1.0
    tokens = sum(len(tokenizer.encode_to_numpy(document)) for document in sample)
    return size / max(1, tokens)


def _architecture(shape: tuple[int, int, int, int]) -> Architecture:
    hidden_size, layers, heads, key_value_heads = shape
    return Architecture(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )


def _measured_flops(architecture: Architecture, vocab_size: int, length: int, rows: int, threads: int | None) -> float:
    config = architecture.resolve(vocab_size, length)
    step_s = _probe(config, length, rows, threads)
    return rows * length * config.flops_per_token(length) / step_s


def _probe(config: ModelConfig, length: int, rows: int, threads: int | None) -> float:
    """Median seconds of a training step of this shape."""
    from ingot.models import Model

    model = Model(config, seed=0, threads=threads)
    count = rows * length
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, count + 1).astype(np.int32)
    offsets = np.arange(0, count + 1, length, dtype=np.int64)
    weights = np.full(count, 1.0 / count, dtype=np.float32)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 10 and time.perf_counter() - started < 1.0):
        begin = time.perf_counter()
        model.zero_grad()
        model.forward_backward(tokens[:-1], offsets, tokens[1:], weights)
        model.step(1e-4, clip_norm=1.0)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def _held(config: ModelConfig, batch_tokens: int) -> Held:
    return Held(config, num_trained=config.num_parameters, batch_tokens=batch_tokens)
