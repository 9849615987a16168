"""Pretraining text that a phase of alignment learns from on the side, so that what pretraining taught is kept (PPO-ptx, Ouyang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import PPOConfig
from ingot.data.batches import Batches, Cursor, Split, held_out_batches, make_batches, split
from ingot.data.corpus import Corpus
from ingot.data.shards import TokenShards
from ingot.errors import DataError
from ingot.losses.next_token import token_weights
from ingot.losses.numerics import Metrics
from ingot.models.base import Model
from ingot.tokenizer import Tokenizer
from ingot.training.lora import trained_gradients
from ingot.training.progress import Display

_HELD_OUT = 0.1
_HELD_OUT_BATCHES = 4


class PretrainingMix:
    """A tokenized text, the windows of each step, and a part that is held out."""

    def __init__(self, shards: TokenShards, divided: Split, batches: Batches, length: int, rows: int) -> None:
        self._shards = shards
        self._divided = divided
        self._batches = batches
        self._length = length
        self._rows = rows
        self.facts: dict[str, Any] = {"ptx_hash": shards.source_hash, "ptx_tokens": divided.train.num_targets}
        """For run.json and the card."""

    @classmethod
    def open(cls, config: PPOConfig, tokenizer: Tokenizer, display: Display) -> PretrainingMix | None:
        """The text that ``config.ptx_data`` names; None where it names none.

        Raises
        ------
        DataError
            It cannot be read or is too short.
        """
        if not config.ptx_data:
            return None
        shards = TokenShards.build(
            Corpus(config.ptx_data, separator=config.separator),
            tokenizer,
            config.cache_folder,
            progress=lambda done, total: display.work("tokenizing", done, total),
            threads=config.threads,
        )
        try:
            divided = split(shards, _HELD_OUT)
            batches = make_batches(
                shards,
                divided.train,
                windows="random" if shards.num_documents == 1 else "packed",
                max_length=config.ptx_length,
                rows=config.ptx_batch_size,
                seed=config.seed,
            )
        except DataError as error:
            raise DataError(f"{', '.join(config.ptx_data)}: {error}") from None
        return cls(shards, divided, batches, config.ptx_length, config.ptx_batch_size)

    def backward(self, model: Model, number: int, cursor: Cursor, coef: float) -> tuple[Metrics, Cursor]:
        """Add the gradient of ``coef`` times the mean next-token loss of the windows of step ``number`` to what the model has.

        Returns
        -------
        metrics
            ``loss/ptx_avg``, and the norms of both gradients before clipping: ``grad_norm/ppo`` and ``grad_norm/ptx``.
        cursor
            After these windows.
        """
        before = {name: np.array(gradient) for name, gradient in trained_gradients(model).items()}
        batch, after = self._batches.take(number, cursor)
        weights = (coef * token_weights(batch.targets, batch.num_targets)).astype(np.float32)
        loss = model.forward_backward(batch.tokens, batch.offsets, batch.targets, weights)
        own = (gradient - before[name] for name, gradient in trained_gradients(model).items())
        return {
            "loss/ptx_avg": loss / coef if coef else 0.0,
            "grad_norm/ppo": _norm(before.values()),
            "grad_norm/ptx": _norm(own),
        }, after

    def bits_per_byte(self, model: Model) -> float:
        """Of a part of the held-out text."""
        nats, count = 0.0, 0
        for batch in held_out_batches(
            self._shards.ids,
            self._divided.held_out,
            max_length=self._length,
            rows=self._rows,
            limit=_HELD_OUT_BATCHES,
        ):
            _, out = model.forward(batch.tokens, batch.offsets, batch.targets, train=False)
            nats -= float(out.logprobs.sum(dtype=np.float64))
            count += batch.num_targets
        return nats / count * self._shards.num_tokens / self._shards.num_bytes / math.log(2)


def _norm(arrays: Iterable[npt.NDArray[np.float32]]) -> float:
    return math.sqrt(sum(float(np.vdot(array, array)) for array in arrays))
