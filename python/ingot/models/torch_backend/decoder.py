"""Writing sequences token by token from a cache of keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingot.errors import RunError
from ingot.models.base import DecodeStep, FloatArray, IntArray, Sampling
from ingot.models.drawing import draw
from ingot.models.packing import check_banned, check_ids, check_room, check_seed, ids_array
from ingot.models.randomness import sampling_uniform
from ingot.models.torch_backend.network import attention
from ingot.models.torch_backend.statistics import Statistics
from ingot.models.torch_backend.tensors import to_numpy
from ingot.models.torch_backend.turns import alone

if TYPE_CHECKING:
    from ingot.models.torch_backend.model import TorchModel


@dataclasses.dataclass
class _Slot:
    """A sequence being written."""

    sequence_id: int
    sampling: Sampling
    tokens: list[int]
    num_cached: int
    """Tokens whose keys and values are in the cache."""

    @property
    def divisor(self) -> float:
        """What its logits are divided by before probabilities are taken."""
        return self.sampling.temperature or 1.0


class TorchDecoder:
    """See :class:`ingot.models.base.Decoder`. Tokens are read lazily: a step first feeds what its sequences gained since the last.

    The cache has one row for each slot, as long as the longest sequence so far; single tokens of all slots go through the network
    together, prompts one by one.
    """

    def __init__(
        self,
        model: TorchModel,
        max_tokens: int,
        max_sequences: int,
        *,
        seed: int = 0,
        banned_ids: Sequence[int] | IntArray | None = None,
        adapter: str | None = None,
    ) -> None:
        check_seed(seed)
        config = model.config
        check_room(max_tokens, max_sequences)
        if config.position == "learned" and max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"max_tokens: is {max_tokens}, but the learned positions end at max_position_embeddings = "
                f"{config.max_position_embeddings}"
            )
        self._model = model
        self._lock = model._lock
        self._version = model._version
        _, self._network = model._pass(adapter)
        self._max_tokens = max_tokens
        self._seed = seed
        self._banned = check_banned(banned_ids, np.empty(0, dtype=np.int32), config.vocab_size)
        self._banned_mask = model._banned_mask(self._banned)
        self._slots: list[_Slot | None] = [None] * max_sequences
        # Keys and values: [layers, 2, slots, G, positions, h].
        shape = (config.num_hidden_layers, 2, max_sequences, config.num_key_value_heads or 0, 0, config.head_dim or 0)
        dtype = torch.bfloat16 if model._precision == "bf16" else model._dtype
        self._cache = torch.zeros(shape, dtype=dtype, device=model._device)

    @property
    def active(self) -> list[int]:
        """Slots in use, ascending."""
        return [index for index, slot in enumerate(self._slots) if slot is not None]

    def length(self, slot: int) -> int:
        """Tokens of the sequence so far, prompt included."""
        return len(self._slot(slot).tokens)

    @alone
    def add(self, tokens: npt.ArrayLike, sequence_id: int, sampling: Sampling | None = None) -> int:
        """Read a prompt of at least one token and return its slot."""
        self._check_model()
        prompt = ids_array(tokens, "tokens")
        if not 1 <= len(prompt) <= self._max_tokens:
            raise ValueError(f"tokens: a prompt has 1 to max_tokens = {self._max_tokens} tokens, got {len(prompt)}")
        check_ids("tokens", prompt, 0, self._model.config.vocab_size)
        return self._occupy(_Slot(sequence_id, sampling or Sampling(), prompt.tolist(), 0))

    @alone
    def fork(self, slot: int, sequence_id: int) -> int:
        """A second sequence that begins as this one is now."""
        self._check_model()
        original = self._slot(slot)
        unread = len(original.tokens) - 1
        copy = self._occupy(_Slot(sequence_id, original.sampling, list(original.tokens), 0))
        self._read(slot, unread)
        self._cache[:, :, copy] = self._cache[:, :, slot]
        self._slot(copy).num_cached = original.num_cached
        return copy

    @alone
    def remove(self, slot: int) -> None:
        """Give the slot and its cache back."""
        self._slot(slot)
        self._slots[slot] = None

    @alone
    def step(self, forced: Mapping[int, int] | None = None) -> DecodeStep:
        """Draw a token for each active slot, or take the one that ``forced`` has for it, and append it to the sequence."""
        self._check_model()
        forced = forced or {}
        for index, token in forced.items():
            self._slot(index)
            check_ids("forced", np.array([token]), 0, self._model.config.vocab_size)
            if token in self._banned:
                raise ValueError(f"forced: {token} for slot {index} is one of banned_ids")
        indices = self.active
        slots = [self._slot(index) for index in indices]
        for index, slot in zip(indices, slots, strict=True):
            if len(slot.tokens) >= self._max_tokens:
                raise ValueError(
                    f"slot: {index} is full with max_tokens = {self._max_tokens} tokens: remove it, or make a larger decoder"
                )
        if not indices:
            nothing = np.empty(0, dtype=np.float32)
            return DecodeStep(nothing.astype(np.int32), nothing.astype(np.int32), nothing, nothing)
        for index, slot in zip(indices, slots, strict=True):
            self._read(index, len(slot.tokens) - 1)
        last = self._read_last(indices, slots)
        tokens, logprobs, entropy = self._draw(indices, slots, last, forced)
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            slot.num_cached = len(slot.tokens)
            slot.tokens.append(token)
        return DecodeStep(np.array(indices, dtype=np.int32), tokens, logprobs, entropy)

    def _check_model(self) -> None:
        if self._version != self._model._version:
            raise RuntimeError(
                "the parameters changed after this decoder was made (by a step or a write): make a new one"
            )

    def _slot(self, index: int) -> _Slot:
        slot = self._slots[index] if 0 <= index < len(self._slots) else None
        if slot is None:
            raise ValueError(f"slot: {index} is not in use")
        return slot

    def _occupy(self, slot: _Slot) -> int:
        if None not in self._slots:
            raise ValueError(f"slots: {len(self._slots)} are all in use: remove a sequence first")
        index = self._slots.index(None)
        self._slots[index] = slot
        return index

    def _reserve(self, num_positions: int) -> None:
        """Room in the cache: doubled, so that growing costs little in total."""
        capacity = self._cache.shape[4]
        if num_positions > capacity:
            wanted = min(self._max_tokens, max(num_positions, 2 * capacity, 64))
            room = self._cache.new_zeros((*self._cache.shape[:4], wanted - capacity, self._cache.shape[5]))
            self._cache = torch.cat([self._cache, room], dim=4)

    @torch.no_grad()
    def _read(self, index: int, stop: int) -> None:
        """Take the tokens of one sequence before ``stop`` through the network, those that are not in the cache."""
        slot = self._slot(index)
        start = slot.num_cached
        if start >= stop:
            return
        self._reserve(stop)
        positions = torch.arange(start, stop, device=self._model._device)
        mask = torch.arange(stop, device=self._model._device) <= positions[:, None]  # [rows, stop]

        def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pair = self._cache[layer, :, index]  # [2, G, positions, h]
            pair[0, :, start:stop] = k.transpose(0, 1).to(pair.dtype)
            pair[1, :, start:stop] = v.transpose(0, 1).to(pair.dtype)
            mixed = attention(q.transpose(0, 1)[None].to(pair.dtype), *pair[:, None, :, :stop], attn_mask=mask)
            return mixed[0].transpose(0, 1)

        tokens = torch.tensor(slot.tokens[start:stop], device=self._model._device)
        with self._model._autocast():
            self._network.continuation(tokens, positions, cached)
        slot.num_cached = stop

    @torch.no_grad()
    def _read_last(self, indices: list[int], slots: list[_Slot]) -> Tensor:
        """Take the last token of each sequence through the network together: the residual stream, [n, d]."""
        device = self._model._device
        stop = max(len(slot.tokens) for slot in slots)
        self._reserve(stop)
        rows = torch.tensor(indices, device=device)
        positions = torch.tensor([len(slot.tokens) - 1 for slot in slots], device=device)
        mask = (torch.arange(stop, device=device) <= positions[:, None])[:, None, None]  # [n, 1, 1, stop]

        def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._cache[layer]  # [slots, G, positions, h]
            keys[rows, :, positions] = k.to(keys.dtype)
            values[rows, :, positions] = v.to(values.dtype)
            mixed = attention(
                q[:, :, None].to(keys.dtype), keys[rows, :, :stop], values[rows, :, :stop], attn_mask=mask
            )
            return mixed[:, :, 0]

        tokens = torch.tensor([slot.tokens[-1] for slot in slots], device=device)
        with self._model._autocast():
            return self._network.continuation(tokens, positions, cached)

    @torch.no_grad()
    def _draw(
        self, indices: list[int], slots: list[_Slot], x: Tensor, forced: Mapping[int, int]
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """Tokens, log-probabilities and entropies from the residual stream [n, d] of the last rows."""
        model = self._model
        tokens = np.empty(len(slots), dtype=np.int32)
        logprobs, entropy = [], []
        for part in model._chunks(len(slots)):
            divisors = torch.tensor([[slot.divisor] for slot in slots[part]], device=model._device, dtype=model._dtype)
            with model._autocast():
                scores = self._network.scores(self._network.final_norm(x[part]), divisors, self._banned_mask)
            if not bool(scores.logsumexp(-1).isfinite().all()):
                broken = int((~scores.logsumexp(-1).isfinite()).nonzero()[0])
                raise RunError(
                    f"the logits of sequence {slots[part][broken].sequence_id} are not finite numbers: the model's weights are "
                    "damaged or diverged"
                )
            rows = scores.cpu().numpy()
            for row, (index, slot) in enumerate(zip(indices[part], slots[part], strict=True)):
                uniform = sampling_uniform(self._seed, slot.sequence_id, len(slot.tokens))
                previous = np.array(slot.tokens, dtype=np.int32)
                drawn = forced[index] if index in forced else draw(rows[row], previous, slot.sampling, uniform)
                tokens[part.start + row] = drawn
            chosen = torch.from_numpy(tokens[part].astype(np.int64)).to(model._device)
            found = Statistics.of(scores, chosen)
            logprobs.append(to_numpy(found.logprobs))
            entropy.append(to_numpy(found.entropy))
        return tokens, np.concatenate(logprobs), np.concatenate(entropy)
