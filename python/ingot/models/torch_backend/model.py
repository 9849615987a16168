"""The seam of :class:`ingot.models.base.Model`: checks, the flat buffers, forward and backward."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ingot.configs import ModelConfig
from ingot.errors import ConfigError
from ingot.models.base import (
    BoolArray,
    Candidates,
    Context,
    FloatArray,
    IntArray,
    LongArray,
    Optimizer,
    Outputs,
    StepInfo,
    check_want,
)
from ingot.models.hf import write_folder
from ingot.models.packing import Packing, check_array, check_banned, check_candidates, check_rows, check_seed
from ingot.models.parameters import Parameter, initial_values, parameter_table
from ingot.models.tables import check_state, parts_table
from ingot.models.torch_backend.decoder import TorchDecoder
from ingot.models.torch_backend.dropout import Dropout
from ingot.models.torch_backend.network import Network, TokenBatch
from ingot.models.torch_backend.optimizer import TorchOptimizer
from ingot.models.torch_backend.statistics import Statistics
from ingot.models.torch_backend.tensors import (
    Precision,
    as_array,
    check_temperature,
    find_device,
    find_precision,
    frozen,
    numpy_dtype,
    to_numpy,
)
from ingot.models.torch_backend.turns import alone

CHUNK_LOGITS = 1 << 24
"""Most logits that exist at a time: the head takes as many rows as give this many, and makes them again in the backward pass."""


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
        self._device = find_device(device)
        self._precision = find_precision(precision, self._device)
        self._dtype = torch.float64 if self._precision == "f64" else torch.float32
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self._table = parameter_table(config, num_values)
        size = self._table[-1].offset + self._table[-1].size
        self._flat = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._flat_gradient: Tensor | None = None
        self._sharers: weakref.WeakSet[TorchModel] = weakref.WeakSet([self])
        self._cut()
        with torch.no_grad():
            for parameter, values in initial_values(config, self._table, seed):
                self._tensors[parameter.name].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        self._version = 0
        self._lock = threading.RLock()
        self.optimizer: Optimizer = TorchOptimizer(self)

    @alone
    def fork(self) -> TorchModel:
        """A second model with the weights that this one has now, in the same memory until one of the two is written to.

        The first write to either (a step, :meth:`load_state`) takes a copy for it.
        """
        fork = TorchModel.__new__(TorchModel)
        fork._config, fork._num_values = self._config, self._num_values
        fork._device, fork._precision, fork._dtype = self._device, self._precision, self._dtype
        fork._table, fork._flat, fork._flat_gradient = self._table, self._flat, None
        fork._sharers = self._sharers
        fork._sharers.add(fork)
        fork._cut()
        fork._version = 0
        fork._lock = threading.RLock()
        fork.optimizer = TorchOptimizer(fork)
        return fork

    def _cut(self) -> None:
        """The named parts of the flat buffer: leaves of the graph that share its memory."""
        self._tensors = {p.name: self._part(self._flat, p).detach().requires_grad_() for p in self._table}
        self._network = Network(self._config, self._tensors, self._dtype)

    def _own(self) -> None:
        """Takes a copy of the weights where another model shares them: to be called before they are written to."""
        if len(self._sharers) > 1:
            self._sharers.discard(self)
            self._sharers = weakref.WeakSet([self])
            self._flat = self._flat.clone()
            self._cut()

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
        return MappingProxyType({p.name: frozen(self._tensors[p.name]) for p in self._table})

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the gradients, zeros before the first backward."""
        flat = self._gradient_buffer()
        return MappingProxyType({p.name: frozen(self._part(flat, p)) for p in self._table})

    def flops_per_token(self, max_length: int) -> float:
        """Floating-point operations of a training step per token at sequences of ``max_length`` tokens."""
        return self._config.flops_per_token(max_length)

    def __repr__(self) -> str:
        place = f"device {self._device}, {self._precision}"
        return parts_table("torch", self._config, place, {p.name: list(p.shape) for p in self._table})

    # -- the passes --

    @alone
    def forward(
        self,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        *,
        want: Collection[str] = ("logprobs",),
        value_rows: BoolArray | None = None,
        hidden_rows: LongArray | None = None,
        candidates: Candidates | None = None,
        temperature: float = 1.0,
        banned_ids: Sequence[int] | IntArray | None = None,
        train: bool = True,
        seed: int = 0,
        sequence_ids: LongArray | None = None,
    ) -> tuple[TorchContext | None, Outputs]:
        """See :meth:`ingot.models.base.Model.forward`."""
        wanted = check_want(want, self._num_values, candidates)
        check_seed(seed)
        packing = Packing.of(tokens, offsets, targets, sequence_ids, self._config)
        banned = check_banned(banned_ids, packing.targets, self._config.vocab_size)
        num_rows = len(packing.tokens)
        check_temperature(temperature)
        if candidates is not None:
            check_candidates(candidates, num_rows, banned, self._config.vocab_size)
        if value_rows is not None:
            check_array("value_rows", value_rows, np.bool_, (num_rows,))
        if hidden_rows is not None:
            check_rows(hidden_rows, num_rows)
        with torch.set_grad_enabled(train), self._autocast():
            x = self._residual(packing, train, seed)
            outputs = self._head_outputs(packing, x, wanted, candidates, temperature, self._banned_mask(banned))
            if "values" in wanted:
                rows = torch.from_numpy(np.arange(num_rows) if value_rows is None else np.flatnonzero(value_rows))
                outputs["values"] = self._values(x, rows.to(self._device))
            if "hidden" in wanted:
                chosen = x if hidden_rows is None else x[torch.from_numpy(hidden_rows).to(self._device)]
                outputs["hidden"] = self._network.final_norm(chosen)
        arrays = {name: to_numpy(tensor) for name, tensor in outputs.items()}
        context = TorchContext(self, {n: t for n, t in outputs.items() if n != "top1"}) if train else None
        return context, Outputs(arrays)

    @alone
    def backward(
        self,
        ctx: Context,
        d_logprobs: FloatArray | None = None,
        d_entropy: FloatArray | None = None,
        d_values: FloatArray | None = None,
        d_lse: FloatArray | None = None,
        d_zbar: FloatArray | None = None,
        d_hidden: FloatArray | None = None,
        d_candidates: FloatArray | None = None,
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
            "logprobs": ("d_logprobs", d_logprobs),
            "entropy": ("d_entropy", d_entropy),
            "values": ("d_values", d_values),
            "lse": ("d_lse", d_lse),
            "zbar": ("d_zbar", d_zbar),
            "hidden": ("d_hidden", d_hidden),
            "candidate_logprobs": ("d_candidates", d_candidates),
        }
        roots, gradients = [], []
        for name, (argument, gradient) in given.items():
            if gradient is None:
                continue
            if name not in ctx._outputs:
                raise ValueError(f"{argument}: was given, but the forward pass was not asked for {name}")
            output = ctx._outputs[name]
            check_array(argument, gradient, numpy_dtype(self._dtype), tuple(output.shape))
            if output.requires_grad:
                roots.append(output)
                gradients.append(torch.from_numpy(gradient.copy()).to(self._device, output.dtype))
        ctx._spent = True
        ctx._outputs = {}
        self._bind_gradients()
        if roots:
            torch.autograd.backward(roots, gradients)

    @alone
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
        check_array("weights", weights, numpy_dtype(self._dtype), (len(packing.tokens),))
        check_temperature(temperature)
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
                logprobs = Statistics.of(scores, chosen[part]).logprobs
                torch.autograd.backward(logprobs, -row_weights[part])
                loss -= (row_weights[part].double() * logprobs.detach().double()).sum()
        if leaf.grad is not None:
            torch.autograd.backward(hidden, leaf.grad)
        return float(loss)

    @alone
    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        if self._flat_gradient is not None:
            self._flat_gradient.zero_()

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """``optimizer.step(lr, clip_norm)``."""
        return self.optimizer.step(lr, clip_norm)

    @alone
    def _update(self, rule: Callable[[Tensor], StepInfo]) -> StepInfo:
        """Lets an optimizer change the weights by the flat gradient."""
        if self._flat_gradient is None:
            raise RuntimeError("there are no gradients yet: run backward or forward_backward before the step")
        self._own()
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

    @alone
    def state(self) -> dict[str, FloatArray]:
        """Copies of all weights by Hugging Face name."""
        return {p.name: to_numpy(self._tensors[p.name]) for p in self._table}

    @alone
    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; missing, surplus or mis-shaped weights are a ``CheckpointError`` that names them."""
        check_state(state, {p.name: p.shape for p in self._table}, "state")
        self._own()
        with torch.no_grad():
            for parameter in self._table:
                self._tensors[parameter.name].copy_(torch.from_numpy(as_array(state[parameter.name])))
        self._version += 1

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``: a directory that transformers opens."""
        state = {name: array.astype(np.float32, copy=False) for name, array in self.state().items()}
        write_folder(folder, self._config, state)

    # -- inside --

    def _residual(self, packing: Packing, train: bool, seed: int) -> Tensor:
        dropout = None
        if train and self._config.dropout > 0.0:
            dropout = Dropout(self._config.dropout, seed, packing, self._device)
        return self._network.residual(TokenBatch.of(packing, self._device), dropout)

    def _head_outputs(
        self,
        packing: Packing,
        x: Tensor,
        wanted: frozenset[str],
        candidates: Candidates | None,
        temperature: float,
        banned: Tensor,
    ) -> dict[str, Tensor]:
        names = [name for name in ("logprobs", "entropy", "lse", "zbar", "top1") if name in wanted]
        if not names and candidates is None:
            return {}
        num_rows = len(packing.tokens)
        offsets, ids = (np.zeros(num_rows + 1, np.int64), np.empty(0, np.int32)) if candidates is None else candidates
        counts = np.diff(offsets)
        rows = np.flatnonzero((packing.targets >= 0) | (counts > 0))

        def statistics(x_rows: Tensor, targets: Tensor, lines: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
            scores = self._network.scores(self._network.final_norm(x_rows), temperature, banned)
            found = Statistics.of(scores, targets)
            return *(getattr(found, name) for name in names), scores[lines, columns] - found.lse[lines]

        parts = []
        for part in self._chunks(len(rows)):
            chosen = rows[part]
            own = ids[offsets[chosen[0]] : offsets[chosen[-1] + 1]]
            arrays = (
                # Where there is no target, what is said of one is said of id 0, and dropped below.
                np.maximum(packing.targets[chosen], 0).astype(np.int64),
                np.repeat(np.arange(len(chosen)), counts[chosen]),
                own.astype(np.int64),
            )
            inputs = (x[self._to_device(chosen)], *(self._to_device(array) for array in arrays))
            if x.requires_grad:
                parts.append(checkpoint(statistics, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(statistics(*inputs))
        outputs: dict[str, Tensor] = {}
        scored = np.flatnonzero(packing.targets[rows] >= 0)
        for i, name in enumerate(names):
            dtype = torch.bool if name == "top1" else self._dtype
            empty = torch.zeros(num_rows, dtype=dtype, device=self._device)
            column = torch.cat([part[i] for part in parts]) if parts else empty[:0]
            outputs[name] = empty.index_put((self._to_device(rows[scored]),), column[self._to_device(scored)])
        if candidates is not None:
            nothing = torch.zeros(0, dtype=self._dtype, device=self._device)
            outputs["candidate_logprobs"] = torch.cat([part[-1] for part in parts]) if parts else nothing
        return outputs

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

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
        step = max(1, CHUNK_LOGITS // self._config.vocab_size)
        return (slice(start, start + step) for start in range(0, num_rows, step))

    def _banned_mask(self, banned: IntArray) -> Tensor:
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
