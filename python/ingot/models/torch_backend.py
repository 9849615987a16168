"""The torch backend: the same seam on PyTorch, for CPU and CUDA. The only file that imports torch.

The network is written out in plain tensor operations over one flat parameter buffer; ``backward`` is ``torch.autograd.backward`` on
the outputs. Log-probabilities agree with the native core to rounding, not to the bit. Dropout masks, initial weights and draws come
from the native core's counter-based numbers, so a seed means the same in both backends; dropout on attention weights therefore
holds whole rows of them, which the fused attention without dropout does not.

Precision: "f32" multiplies in f32, "bf16" in bf16 under autocast with f32 weights, gradients, norms, residual stream and softmax, and
"f64" does everything in f64 (the reference of the tests; its arrays are f64). "auto" is bf16 on a GPU that has it, f32 elsewhere.

Shape legend: N tokens of the batch, S sequences, V vocabulary, d hidden size, H query heads, G key-value heads, h head size, k scalar
heads, R chosen rows, n sequences of one length T.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ingot.configs import ModelConfig
from ingot.errors import CheckpointError, ConfigError, RunError
from ingot.models import hf
from ingot.models.base import (
    BoolArray,
    Context,
    DecodeStep,
    EpsMode,
    FloatArray,
    IntArray,
    LongArray,
    Optimizer,
    Outputs,
    ParameterGroup,
    Sampling,
    StepInfo,
    check_want,
)
from ingot.models.drawing import draw
from ingot.models.grouping import assign_groups
from ingot.models.packing import Packing, check_array, check_banned, check_ids, check_rows, check_seed
from ingot.models.parameters import Parameter, initial_values, parameter_table
from ingot.models.randomness import (
    HASH_MULTIPLIERS,
    HASH_STEP,
    SITE_ATTENTION_RESIDUAL,
    SITE_ATTENTION_WEIGHTS,
    SITE_EMBEDDING,
    SITE_MLP_RESIDUAL,
    key_words,
    sampling_uniform,
)
from ingot.models.tables import check_state, parts_table

Precision = Literal["auto", "f32", "bf16", "f64"]

_CHUNK_LOGITS = 1 << 24
"""Most logits that exist at a time: the head takes as many rows as give this many, and makes them again in the backward pass."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Owner = TypeVar("_Owner", bound="TorchModel | TorchDecoder")


def _alone(method: Callable[Concatenate[_Owner, _P], _T]) -> Callable[Concatenate[_Owner, _P], _T]:
    """One call at a time on a model and what belongs to it; a second thread gets an error, not a race."""

    @functools.wraps(method)
    def locked(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        lock = self._lock
        if not lock.acquire(blocking=False):
            raise RuntimeError(
                "this model is in use by another thread: take turns, or give each thread a model of its own"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            lock.release()

    return locked


# -- what goes through the network ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A packing on the device."""

    tokens: Tensor
    """i64[N]."""
    positions: Tensor
    """i64[N]."""
    groups: list[tuple[Tensor | None, int]]
    """Sequences of one length: their rows, i64[n, T] (None where those are all rows in order), and T. Attention runs once for each."""

    @classmethod
    def of(cls, packing: Packing, device: torch.device) -> _Batch:
        """Groups the sequences by length, so that no row is padding."""
        starts, lengths = packing.offsets[:-1], np.diff(packing.offsets)
        groups: list[tuple[Tensor | None, int]] = []
        for length in np.unique(lengths[lengths > 0]).tolist():
            rows = starts[lengths == length][:, None] + np.arange(length)
            whole = rows.size == len(packing.tokens)
            groups.append((None if whole else torch.from_numpy(rows).to(device), length))
        return cls(
            torch.from_numpy(packing.tokens.astype(np.int64)).to(device),
            torch.from_numpy(packing.positions).to(device),
            groups,
        )


class _Dropout:
    """Masks that are a function of (seed, layer, place, sequence id, position, element): the native core's."""

    def __init__(self, probability: float, seed: int, packing: Packing, device: torch.device) -> None:
        # As the native core: the probability is rounded to f32 first.
        rounded = float(np.float32(probability))
        self._threshold = int(rounded * 4294967296.0)
        self._scale = float(np.float32(1.0 / (1.0 - rounded)))
        self._seed = seed
        self._packing = packing
        self._device = device

    def __call__(self, x: Tensor, layer: int, site: int) -> Tensor:
        """Drops elements of x [N, width] and scales the others."""
        return x * self._mask(self._words(layer, site), x.shape[-1], x.dtype)

    def weights_mask(self, layer: int, num_heads: int, rows: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
        """Factors for attention weights [n, H, T, T] of the sequences of one length."""
        words = torch.stack([self._words(layer, SITE_ATTENTION_WEIGHTS + head) for head in range(num_heads)], 1)
        words = words.view(-1, length, num_heads, 2) if rows is None else words[rows]  # [n, T, H, 2]
        return self._mask(words.transpose(1, 2), length, dtype)

    def _words(self, layer: int, site: int) -> Tensor:
        """Two random words for each row, as i64 [N, 2]."""
        words = key_words(self._seed, layer, site, self._packing.row_sequence_ids, self._packing.positions)
        return torch.from_numpy(words[:2].T.astype(np.int64)).to(self._device)

    def _mask(self, words: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """0 or the scale for each of ``width`` elements of each row: [..., width] for words [..., 2]."""
        low = 0xFFFFFFFF  # 32-bit arithmetic in i64: torch has no unsigned multiplication.
        x = torch.arange(width, device=self._device) * HASH_STEP + words[..., :1] & low
        x = (x ^ x >> 16) * HASH_MULTIPLIERS[0] & low
        x = (x ^ (x >> 15) + words[..., 1:] & low) * HASH_MULTIPLIERS[1] & low
        x = x ^ x >> 16
        return (x >= self._threshold).to(dtype) * self._scale


class _Network:
    """The forward computation over named tensors: stateless, differentiable."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config = config
        self._tensors = tensors
        self._dtype = dtype
        self._is_gpt2 = hf.family_of(config) == "gpt2"
        self._names = _GPT2_NAMES if self._is_gpt2 else _LLAMA_NAMES
        self._frequencies = _rotary_frequencies(config) if config.position == "rotary" else None

    def residual(self, batch: _Batch, dropout: _Dropout | None) -> Tensor:
        """The residual stream after the last block, [N, d]."""
        x = self._embed(batch.tokens, batch.positions)
        if dropout is not None:
            x = dropout(x, 0, SITE_EMBEDDING)
        turn = self._rotation(batch.positions)
        for layer in range(self.config.num_hidden_layers):
            q, k, v = self._queries_keys_values(layer, x, turn)
            branch = self._linear("output", layer, self._attend(layer, batch, q, k, v, dropout))
            x = x + (branch if dropout is None else dropout(branch, layer, SITE_ATTENTION_RESIDUAL))
            branch = self._mlp(layer, x)
            x = x + (branch if dropout is None else dropout(branch, layer, SITE_MLP_RESIDUAL))
        return x

    def continuation(
        self, tokens: Tensor, positions: Tensor, cached: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The residual stream of new rows [N, d]; ``cached`` attends from their queries to everything before them."""
        x = self._embed(tokens, positions)
        turn = self._rotation(positions)
        for layer in range(self.config.num_hidden_layers):
            q, k, v = self._queries_keys_values(layer, x, turn)
            x = x + self._linear("output", layer, cached(layer, q, k, v).flatten(1))
            x = x + self._mlp(layer, x)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """[R, d]."""
        return self._norm(self._names["final_norm"], x)

    def scores(self, hidden: Tensor, temperature: float | Tensor, banned: Tensor) -> Tensor:
        """Logits / temperature [R, V] at f32 (or f64) from the final norm's output, banned ids at -inf."""
        head = "lm_head" if not self.config.tie_word_embeddings else self._names["embedding"]
        scores = F.linear(hidden, self._tensors[head + ".weight"]).to(self._dtype) / temperature
        return scores.masked_fill(banned, -math.inf)

    def values(self, hidden: Tensor) -> Tensor:
        """Scalar heads [R, k]."""
        return F.linear(hidden, self._tensors["score.weight"], self._tensors["score.bias"]).to(self._dtype)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self._tensors[self._names["embedding"] + ".weight"])
        if self.config.position == "learned":
            x = x + F.embedding(positions, self._tensors[self._names["positions"] + ".weight"])
        return x

    def _queries_keys_values(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """[N, H, h], [N, G, h] and [N, G, h], normed and rotated."""
        config, h = self.config, self.config.head_dim or 0
        x = self._norm(self._name("attention_norm", layer), x)
        if self._is_gpt2:
            parts = self._linear("qkv", layer, x).chunk(3, dim=-1)
        else:
            parts = tuple(self._linear(role, layer, x) for role in ("query", "key", "value"))
        q, k, v = (part.reshape(len(x), -1, h) for part in parts)
        if config.qk_norm:
            q = self._rms_norm(self._name("query_norm", layer), q)
            k = self._rms_norm(self._name("key_norm", layer), k)
        if turn is not None:
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        return q, k, v

    def _attend(self, layer: int, batch: _Batch, q: Tensor, k: Tensor, v: Tensor, dropout: _Dropout | None) -> Tensor:
        """Causal attention inside each sequence, [N, H h]."""
        if len(batch.groups) == 1:
            return self._attend_group(layer, batch.groups[0], q, k, v, dropout)
        rows = [rows.flatten() for rows, _ in batch.groups if rows is not None]
        parts = [self._attend_group(layer, group, q, k, v, dropout) for group in batch.groups]
        if not parts:
            return q.flatten(1)
        # The groups' rows are a permutation of all rows: turn it back.
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]

    def _attend_group(
        self, layer: int, group: tuple[Tensor | None, int], q: Tensor, k: Tensor, v: Tensor, dropout: _Dropout | None
    ) -> Tensor:
        rows, length = group
        # [n, H or G, T, h]
        q, k, v = (
            (x.reshape(-1, length, *x.shape[1:]) if rows is None else x[rows]).transpose(1, 2) for x in (q, k, v)
        )
        if dropout is None:
            mixed = _attention(q, k, v, is_causal=True)
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            weights = scores.to(self._dtype).softmax(dim=-1)
            weights = weights * dropout.weights_mask(layer, q.shape[1], rows, length, self._dtype)
            mixed = weights.to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        x = self._norm(self._name("mlp_norm", layer), x)
        up = self._linear("up", layer, x)
        match self.config.activation:
            case "swiglu":
                active = F.silu(self._linear("gate", layer, x)) * up
            case "gelu_tanh":
                active = F.gelu(up, approximate="tanh")
            case "gelu":
                active = F.gelu(up)
            case "relu":
                active = F.relu(up)
            case "relu2":
                active = F.relu(up).square()
        return self._linear("down", layer, active)

    def _linear(self, role: str, layer: int, x: Tensor) -> Tensor:
        name = self._name(role, layer)
        weight = self._tensors[name + ".weight"]
        return F.linear(x, weight.T if self._is_gpt2 else weight, self._tensors.get(name + ".bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if self.config.norm == "rms":
            return self._rms_norm(name, x)
        gain, bias = self._tensors[name + ".weight"], self._tensors[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], gain, bias, self.config.norm_eps)

    def _rms_norm(self, name: str, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * self._tensors[name + ".weight"]
        )

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [N, 1, h/2]; angles in f64, rounded once."""
        if self._frequencies is None:
            return None
        angles = torch.outer(positions.double(), torch.from_numpy(self._frequencies).to(positions.device))[:, None]
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def _name(self, role: str, layer: int) -> str:
        return self._names[role].format(layer)


_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "attention_norm": "transformer.h.{}.ln_1",
    "qkv": "transformer.h.{}.attn.c_attn",
    "output": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "up": "transformer.h.{}.mlp.c_fc",
    "down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
}
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "positions": "model.embed_positions",
    "attention_norm": "model.layers.{}.input_layernorm",
    "query": "model.layers.{}.self_attn.q_proj",
    "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj",
    "query_norm": "model.layers.{}.self_attn.q_norm",
    "key_norm": "model.layers.{}.self_attn.k_norm",
    "output": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
}


def _attention(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """Scaled dot-product attention of [n, H, T, h] on [n, G, T', h]; scale 1 / sqrt(h)."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, equation 34), half-split convention; x [N, heads, h]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotary_frequencies(config: ModelConfig) -> npt.NDArray[np.float64]:
    """Angle per position of each pair, [h/2], radians: theta^(-2i/h), scaled as the configuration says."""
    half = (config.head_dim or 0) // 2
    plain: npt.NDArray[np.float64] = config.rope_theta ** (-np.arange(half) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return np.divide(plain, factor)
    # Llama 3: pairs that make few turns within the original context are stretched in full, those with many not at all.
    turns = scaling["original_max_position_embeddings"] * plain / math.tau
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * plain / factor + kept * plain


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """Of rows of scores; each [R]."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    zbar: Tensor
    top1: Tensor

    @classmethod
    def of(cls, scores: Tensor, targets: Tensor) -> _Statistics:
        """From scores [R, V] with banned ids at -inf, and i64 targets [R]."""
        allowed = scores > -math.inf
        lse = scores.logsumexp(-1)
        log_p = scores - lse[:, None]
        entropy = -(log_p.exp() * log_p.masked_fill(~allowed, 0.0)).sum(-1)
        # Rounding can leave a tiny negative number; the gradient is that of the formula all the same.
        entropy = entropy + (entropy.clamp(min=0.0) - entropy).detach()
        chosen = scores.gather(-1, targets[:, None])
        # Of several equal scores the first is the likeliest.
        rivals = (scores > chosen) | (scores == chosen) & (
            torch.arange(scores.shape[-1], device=scores.device) < targets[:, None]
        )
        zbar = scores.masked_fill(~allowed, 0.0).sum(-1) / allowed.sum(-1)
        return cls(chosen[:, 0] - lse, entropy, lse, zbar, ~rivals.any(-1))


# -- the seam ---------------------------------------------------------------------------------------------------------


class TorchContext:
    """Outputs with their graph. See :class:`ingot.models.base.Context`."""

    def __init__(self, model: TorchModel, outputs: dict[str, Tensor]) -> None:
        self._model = model
        self._version = model._version
        self._outputs = outputs
        self._spent = False

    @property
    def spent(self) -> bool:
        """Whether backward was called with it."""
        return self._spent


class TorchModel:
    """See :class:`ingot.models.base.Model`. ``parameters`` and ``gradients`` are read-only copies here.

    ``threads`` sets torch's number of threads for the whole process.
    """

    backend: Literal["native", "torch"] = "torch"

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        *,
        precision: Precision = "auto",
        device: str | None = None,
        threads: int | None = None,
        num_values: int = 0,
    ) -> None:
        check_seed(seed)
        if num_values < 0:
            raise ConfigError(f"num_values must be 0 or more, got {num_values}")
        self._config = config
        self._num_values = num_values
        self._device = _find_device(device)
        self._precision = _find_precision(precision, self._device)
        self._dtype = torch.float64 if self._precision == "f64" else torch.float32
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self._table = parameter_table(config, num_values)
        size = self._table[-1].offset + self._table[-1].size
        self._flat = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._flat_gradient: Tensor | None = None
        # Leaves of the graph that share the flat buffer's memory.
        self._tensors = {p.name: self._part(self._flat, p).detach().requires_grad_() for p in self._table}
        with torch.no_grad():
            for parameter, values in initial_values(config, self._table, seed):
                self._tensors[parameter.name].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        self._network = _Network(config, self._tensors, self._dtype)
        self._version = 0
        self._lock = threading.RLock()
        self.optimizer: Optimizer = TorchOptimizer(self)

    # -- facts --

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""
        return self._config

    @property
    def level(self) -> str:
        """The device."""
        return str(self._device)

    @property
    def threads(self) -> int:
        """CPU threads that torch uses."""
        return torch.get_num_threads()

    @property
    def num_values(self) -> int:
        """Scalar heads."""
        return self._num_values

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return self._flat.numel()

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the weights; :meth:`load_state` writes."""
        return MappingProxyType({p.name: _frozen(self._tensors[p.name]) for p in self._table})

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the gradients, zeros before the first backward."""
        flat = self._gradient_buffer()
        return MappingProxyType({p.name: _frozen(self._part(flat, p)) for p in self._table})

    def flops_per_token(self, max_length: int) -> float:
        """Floating-point operations of a training step per token at sequences of ``max_length`` tokens."""
        return self._config.flops_per_token(max_length)

    def __repr__(self) -> str:
        place = f"device {self._device}, {self._precision}"
        return parts_table("torch", self._config, place, {p.name: list(p.shape) for p in self._table})

    # -- the passes --

    @_alone
    def forward(
        self,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        *,
        want: Collection[str] = ("logprobs",),
        value_rows: BoolArray | None = None,
        hidden_rows: LongArray | None = None,
        temperature: float = 1.0,
        banned_ids: Sequence[int] | IntArray | None = None,
        train: bool = True,
        seed: int = 0,
        sequence_ids: LongArray | None = None,
    ) -> tuple[TorchContext | None, Outputs]:
        """See :meth:`ingot.models.base.Model.forward`."""
        wanted = check_want(want, self._num_values)
        check_seed(seed)
        packing = Packing.of(tokens, offsets, targets, sequence_ids, self._config)
        banned = check_banned(banned_ids, packing.targets, self._config.vocab_size)
        num_rows = len(packing.tokens)
        _check_temperature(temperature)
        if value_rows is not None:
            check_array("value_rows", value_rows, np.bool_, (num_rows,))
        if hidden_rows is not None:
            check_rows(hidden_rows, num_rows)
        with torch.set_grad_enabled(train), self._autocast():
            x = self._residual(packing, train, seed)
            outputs = self._head_outputs(packing, x, wanted, temperature, self._banned_mask(banned))
            if "values" in wanted:
                rows = torch.from_numpy(np.arange(num_rows) if value_rows is None else np.flatnonzero(value_rows))
                outputs["values"] = self._values(x, rows.to(self._device))
            if "hidden" in wanted:
                chosen = x if hidden_rows is None else x[torch.from_numpy(hidden_rows).to(self._device)]
                outputs["hidden"] = self._network.final_norm(chosen)
        arrays = {name: _to_numpy(tensor) for name, tensor in outputs.items()}
        context = TorchContext(self, {n: t for n, t in outputs.items() if n != "top1"}) if train else None
        return context, Outputs(arrays)

    @_alone
    def backward(
        self,
        ctx: Context,
        d_logprobs: FloatArray | None = None,
        d_entropy: FloatArray | None = None,
        d_values: FloatArray | None = None,
        d_lse: FloatArray | None = None,
        d_zbar: FloatArray | None = None,
        d_hidden: FloatArray | None = None,
    ) -> None:
        """See :meth:`ingot.models.base.Model.backward`."""
        if not isinstance(ctx, TorchContext):
            raise TypeError(
                f"ctx is {type(ctx).__name__}, not a context of this backend"
                + (": forward makes one with train=True alone" if ctx is None else "")
            )
        if ctx._model is not self:
            raise RuntimeError("this context belongs to another model")
        if ctx._spent:
            raise RuntimeError("this context was already used by a backward pass: run forward again")
        if ctx._version != self._version:
            raise RuntimeError(
                "the parameters changed after this context was made (by a step or a write): run forward again"
            )
        given = {
            "logprobs": d_logprobs,
            "entropy": d_entropy,
            "values": d_values,
            "lse": d_lse,
            "zbar": d_zbar,
            "hidden": d_hidden,
        }
        roots, gradients = [], []
        for name, gradient in given.items():
            if gradient is None:
                continue
            if name not in ctx._outputs:
                raise ValueError(f"d_{name}: was given, but the forward pass was not asked for {name}")
            output = ctx._outputs[name]
            check_array(f"d_{name}", gradient, _numpy_dtype(self._dtype), tuple(output.shape))
            if output.requires_grad:
                roots.append(output)
                gradients.append(torch.from_numpy(gradient.copy()).to(self._device, output.dtype))
        ctx._spent = True
        ctx._outputs = {}
        self._bind_gradients()
        if roots:
            torch.autograd.backward(roots, gradients)

    @_alone
    def forward_backward(
        self,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        weights: FloatArray,
        *,
        temperature: float = 1.0,
        banned_ids: Sequence[int] | IntArray | None = None,
        train: bool = True,
        seed: int = 0,
        sequence_ids: LongArray | None = None,
    ) -> float:
        """See :meth:`ingot.models.base.Model.forward_backward`. The logits of a chunk of rows turn into gradients at once."""
        check_seed(seed)
        packing = Packing.of(tokens, offsets, targets, sequence_ids, self._config)
        banned = self._banned_mask(check_banned(banned_ids, packing.targets, self._config.vocab_size))
        check_array("weights", weights, _numpy_dtype(self._dtype), (len(packing.tokens),))
        _check_temperature(temperature)
        self._bind_gradients()
        rows, chosen = self._target_rows(packing)
        row_weights = torch.from_numpy(weights).to(self._device)[rows]
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._autocast():
            x = self._residual(packing, train, seed)
            hidden = self._network.final_norm(x[rows])
            leaf = hidden.detach().requires_grad_()
            for part in self._chunks(len(rows)):
                scores = self._network.scores(leaf[part], temperature, banned)
                logprobs = _Statistics.of(scores, chosen[part]).logprobs
                torch.autograd.backward(logprobs, -row_weights[part])
                loss -= (row_weights[part].double() * logprobs.detach().double()).sum()
        if leaf.grad is not None:
            torch.autograd.backward(hidden, leaf.grad)
        return float(loss)

    @_alone
    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        if self._flat_gradient is not None:
            self._flat_gradient.zero_()

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """``optimizer.step(lr, clip_norm)``."""
        return self.optimizer.step(lr, clip_norm)

    @_alone
    def _update(self, rule: Callable[[Tensor], StepInfo]) -> StepInfo:
        """Lets an optimizer change the weights by the flat gradient."""
        if self._flat_gradient is None:
            raise RuntimeError("there are no gradients yet: run backward or forward_backward before the step")
        info = rule(self._flat_gradient)
        if not info.skipped:
            self._version += 1
        return info

    def decoder(
        self,
        max_tokens: int,
        max_sequences: int,
        *,
        seed: int = 0,
        banned_ids: Sequence[int] | IntArray | None = None,
    ) -> TorchDecoder:
        """A decoder with room for ``max_sequences`` sequences of up to ``max_tokens`` tokens each, prompt included."""
        return TorchDecoder(self, max_tokens, max_sequences, seed=seed, banned_ids=banned_ids)

    # -- weights --

    @_alone
    def state(self) -> dict[str, FloatArray]:
        """Copies of all weights by Hugging Face name."""
        return {p.name: _to_numpy(self._tensors[p.name]) for p in self._table}

    @_alone
    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; missing, surplus or mis-shaped weights are a ``CheckpointError`` that names them."""
        check_state(state, {p.name: p.shape for p in self._table}, "state")
        with torch.no_grad():
            for parameter in self._table:
                self._tensors[parameter.name].copy_(torch.from_numpy(_as_array(state[parameter.name])))
        self._version += 1

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``: a directory that transformers opens."""
        state = {name: array.astype(np.float32, copy=False) for name, array in self.state().items()}
        hf.write_folder(folder, self._config, state)

    # -- inside --

    def _residual(self, packing: Packing, train: bool, seed: int) -> Tensor:
        dropout = None
        if train and self._config.dropout > 0.0:
            dropout = _Dropout(self._config.dropout, seed, packing, self._device)
        return self._network.residual(_Batch.of(packing, self._device), dropout)

    def _head_outputs(
        self, packing: Packing, x: Tensor, wanted: frozenset[str], temperature: float, banned: Tensor
    ) -> dict[str, Tensor]:
        names = [name for name in ("logprobs", "entropy", "lse", "zbar", "top1") if name in wanted]
        if not names:
            return {}
        rows, chosen = self._target_rows(packing)

        def statistics(x_rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            scores = self._network.scores(self._network.final_norm(x_rows), temperature, banned)
            found = _Statistics.of(scores, targets)
            return tuple(getattr(found, name) for name in names)

        parts = []
        for part in self._chunks(len(rows)):
            if x.requires_grad:
                parts.append(
                    checkpoint(statistics, x[rows[part]], chosen[part], use_reentrant=False, preserve_rng_state=False)
                )
            else:
                parts.append(statistics(x[rows[part]], chosen[part]))
        outputs: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            dtype = torch.bool if name == "top1" else self._dtype
            empty = torch.zeros(len(packing.tokens), dtype=dtype, device=self._device)
            column = torch.cat([part[i] for part in parts]) if parts else empty[:0]
            outputs[name] = empty.index_put((rows,), column)
        return outputs

    def _values(self, x: Tensor, rows: Tensor) -> Tensor:
        values = self._network.values(self._network.final_norm(x[rows]))
        zeros = torch.zeros(len(x), self._num_values, dtype=self._dtype, device=self._device)
        values = zeros.index_put((rows,), values)
        return values[:, 0] if self._num_values == 1 else values

    def _target_rows(self, packing: Packing) -> tuple[Tensor, Tensor]:
        """Rows that have a target, and the targets; i64[R] each."""
        rows = np.flatnonzero(packing.targets >= 0)
        targets = packing.targets[rows].astype(np.int64)
        return torch.from_numpy(rows).to(self._device), torch.from_numpy(targets).to(self._device)

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        step = max(1, _CHUNK_LOGITS // self._config.vocab_size)
        return (slice(start, start + step) for start in range(0, num_rows, step))

    def _banned_mask(self, banned: npt.NDArray[np.int64]) -> Tensor:
        mask = np.zeros(self._config.vocab_size, dtype=np.bool_)
        mask[banned] = True
        return torch.from_numpy(mask).to(self._device)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._precision == "bf16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _part(self, flat: Tensor, parameter: Parameter) -> Tensor:
        return flat[parameter.offset : parameter.offset + parameter.size].view(parameter.shape)

    def _gradient_buffer(self) -> Tensor:
        if self._flat_gradient is None:
            self._flat_gradient = torch.zeros_like(self._flat)
        return self._flat_gradient

    def _bind_gradients(self) -> None:
        """Let autograd add to the flat buffer."""
        flat = self._gradient_buffer()
        for parameter in self._table:
            tensor = self._tensors[parameter.name]
            if tensor.grad is None:
                tensor.grad = self._part(flat, parameter)


class TorchOptimizer:
    """AdamW on the flat buffers. See :func:`ingot.models.Optimizer` and :class:`ingot.models.base.Optimizer`."""

    def __init__(
        self,
        model: TorchModel,
        groups: Sequence[ParameterGroup] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        eps_mode: EpsMode = "torch",
        weight_decay: float = 0.1,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas must each be in [0, 1), got {betas}")
        if not 0.0 <= eps < math.inf:
            raise ConfigError(f"eps must be 0 or more, got {eps}")
        if eps_mode not in ("torch", "tf"):
            raise ConfigError(f'eps_mode is {eps_mode!r}; there are "torch" and "tf"')
        if not 0.0 <= weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be 0 or more, got {weight_decay}")
        self._model = model
        self._betas, self._eps, self._eps_mode = betas, eps, eps_mode
        self._runs = _runs(model._table, groups, weight_decay)
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._num_steps = 0

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """See :meth:`ingot.models.base.Optimizer.step`."""
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"learning_rate: must be a finite number of at least 0, got {lr}")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm: must be positive, got {clip_norm}")
        return self._model._update(lambda gradient: self._step(lr, clip_norm, gradient))

    @torch.no_grad()
    def _step(self, lr: float, clip_norm: float | None, gradient: Tensor) -> StepInfo:
        squares = [torch.linalg.vector_norm(gradient[run.part], dtype=torch.float64).square() for run in self._runs]
        norm = math.sqrt(float(sum(squares)))
        if not math.isfinite(norm):
            return StepInfo(norm, skipped=True)
        scale = clip_norm / (norm + 1e-6) if clip_norm is not None and norm > clip_norm else 1.0
        self._num_steps += 1
        first, second = self._moments()
        beta1, beta2 = self._betas
        correction1, correction2 = 1.0 - beta1**self._num_steps, math.sqrt(1.0 - beta2**self._num_steps)
        for run in self._runs:
            p, m, v = self._model._flat[run.part], first[run.part], second[run.part]
            g = gradient[run.part] * scale
            m.mul_(beta1).add_(g, alpha=1.0 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            rate = lr * run.lr_scale
            p.mul_(1.0 - rate * run.weight_decay)
            if self._eps_mode == "torch":
                p.addcdiv_(m, v.sqrt().div_(correction2).add_(self._eps), value=-rate / correction1)
            else:
                p.addcdiv_(m, v.sqrt().add_(self._eps), value=-rate * correction2 / correction1)
        return StepInfo(norm, skipped=False)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Copies: ``step`` i64[1] and for each parameter ``m.NAME`` and ``v.NAME``."""
        state: dict[str, npt.NDArray[np.generic]] = {"step": np.array([self._num_steps], dtype=np.int64)}
        for prefix, flat in zip(("m", "v"), self._moments(), strict=True):
            for parameter in self._model._table:
                state[f"{prefix}.{parameter.name}"] = _to_numpy(self._model._part(flat, parameter))
        return state

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; a missing, surplus or mis-shaped entry is a ``CheckpointError`` that names it."""
        table = self._model._table
        shapes: dict[str, tuple[int, ...]] = {"step": (1,)}
        shapes |= {f"{prefix}.{p.name}": p.shape for prefix in ("m", "v") for p in table}
        check_state(state, shapes, "optimizer state")
        num_steps = int(_as_array(state["step"])[0])
        if num_steps < 0:
            raise CheckpointError(f"optimizer state: step is {num_steps}, but counts from 0")
        self._num_steps = num_steps
        for prefix, flat in zip(("m", "v"), self._moments(), strict=True):
            for parameter in table:
                values = torch.from_numpy(_as_array(state[f"{prefix}.{parameter.name}"]))
                self._model._part(flat, parameter).copy_(values)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(self._model._flat), torch.zeros_like(self._model._flat)
        return self._first, self._second


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbours in the flat buffers that are updated alike."""

    part: slice
    lr_scale: float
    weight_decay: float


def _runs(table: list[Parameter], groups: Sequence[ParameterGroup] | None, weight_decay: float) -> list[_Run]:
    """The groups as pieces of the flat buffers, neighbours joined."""
    assigned = assign_groups({p.name: p.shape for p in table}, groups or (), weight_decay)
    settings = {name: (lr_scale, decay) for names, lr_scale, decay in assigned for name in names}
    runs: list[_Run] = []
    for parameter in table:
        lr_scale, decay = settings[parameter.name]
        stop = parameter.offset + parameter.size
        if runs and (runs[-1].lr_scale, runs[-1].weight_decay) == (lr_scale, decay):
            runs[-1] = _Run(slice(runs[-1].part.start, stop), lr_scale, decay)
        else:
            runs.append(_Run(slice(parameter.offset, stop), lr_scale, decay))
    return runs


# -- writing ----------------------------------------------------------------------------------------------------------


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
    ) -> None:
        check_seed(seed)
        config = model.config
        for name, value in (("max_tokens", max_tokens), ("max_sequences", max_sequences)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if config.position == "learned" and max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"max_tokens: is {max_tokens}, but the learned positions end at max_position_embeddings = "
                f"{config.max_position_embeddings}"
            )
        self._model = model
        self._lock = model._lock
        self._version = model._version
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

    @_alone
    def add(self, tokens: npt.ArrayLike, sequence_id: int, sampling: Sampling | None = None) -> int:
        """Read a prompt of at least one token and return its slot."""
        self._check_model()
        prompt = np.asarray(tokens)
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise TypeError(f"tokens: needs a sequence of ids, got {prompt.dtype} of shape {list(prompt.shape)}")
        if not 1 <= len(prompt) <= self._max_tokens:
            raise ValueError(f"tokens: a prompt has 1 to max_tokens = {self._max_tokens} tokens, got {len(prompt)}")
        check_ids("tokens", prompt, 0, self._model.config.vocab_size)
        return self._occupy(_Slot(sequence_id, sampling or Sampling(), prompt.tolist(), 0))

    @_alone
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

    @_alone
    def remove(self, slot: int) -> None:
        """Give the slot and its cache back."""
        self._slot(slot)
        self._slots[slot] = None

    @_alone
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
            mixed = _attention(q.transpose(0, 1)[None].to(pair.dtype), *pair[:, None, :, :stop], attn_mask=mask)
            return mixed[0].transpose(0, 1)

        tokens = torch.tensor(slot.tokens[start:stop], device=self._model._device)
        with self._model._autocast():
            self._model._network.continuation(tokens, positions, cached)
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
            mixed = _attention(
                q[:, :, None].to(keys.dtype), keys[rows, :, :stop], values[rows, :, :stop], attn_mask=mask
            )
            return mixed[:, :, 0]

        tokens = torch.tensor([slot.tokens[-1] for slot in slots], device=device)
        with self._model._autocast():
            return self._model._network.continuation(tokens, positions, cached)

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
                scores = model._network.scores(model._network.final_norm(x[part]), divisors, self._banned_mask)
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
            found = _Statistics.of(scores, chosen)
            logprobs.append(_to_numpy(found.logprobs))
            entropy.append(_to_numpy(found.entropy))
        return tokens, np.concatenate(logprobs), np.concatenate(entropy)


# -- small parts ------------------------------------------------------------------------------------------------------


def _find_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; the torch backend runs on cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but torch {torch.__version__} sees no GPU: install a CUDA build of torch, or use device cpu"
        )
    return torch.device(device)


def _find_precision(precision: Precision, device: torch.device) -> Precision:
    if precision not in ("auto", "f32", "bf16", "f64"):
        raise ConfigError(f"precision is {precision!r}; the torch backend has auto, f32, bf16 and f64")
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "f32"


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: must be a positive number, got {temperature}")


def _as_array(values: npt.NDArray[np.generic]) -> npt.NDArray[Any]:
    """What torch.from_numpy takes: contiguous, and writable as far as torch can know."""
    return np.array(values, order="C", copy=True)


def _to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy on the CPU."""
    return tensor.detach().cpu().numpy().copy()


def _frozen(tensor: Tensor) -> npt.NDArray[Any]:
    """A read-only copy: a write would be lost, so it is an error."""
    array = _to_numpy(tensor)
    array.flags.writeable = False
    return array


def _numpy_dtype(dtype: torch.dtype) -> npt.DTypeLike:
    return np.float64 if dtype is torch.float64 else np.float32
