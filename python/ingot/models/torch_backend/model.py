"""The seam of :class:`ingot.models.base.Model`: checks, the flat buffers, forward and backward."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ingot.configs import ModelConfig
from ingot.errors import ConfigError
from ingot.models.adapters import Adapted, Adapter, AdapterSettings, adapter_table
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
from ingot.models.parameters import initial_values, parameter_table
from ingot.models.tables import check_state, parts_table
from ingot.models.torch_backend.decoder import TorchDecoder
from ingot.models.torch_backend.dropout import Dropout
from ingot.models.torch_backend.network import Network, TokenBatch
from ingot.models.torch_backend.optimizer import TorchOptimizer
from ingot.models.torch_backend.parameter_set import ParameterSet, TorchAdapter
from ingot.models.torch_backend.statistics import Statistics
from ingot.models.torch_backend.tensors import (
    Precision,
    check_temperature,
    find_device,
    find_precision,
    numpy_dtype,
    to_numpy,
)
from ingot.models.torch_backend.turns import alone

CHUNK_LOGITS = 1 << 24
"""Most logits that exist at a time: the head takes as many rows as give this many, and makes them again in the backward pass."""


class TorchContext:
    """Outputs with their graph. See :class:`ingot.models.base.Context`."""

    def __init__(self, model: TorchModel, weights: ParameterSet, outputs: dict[str, Tensor]) -> None:
        self._model = model
        self._version = model._version
        self._set = weights
        self._outputs = outputs
        self._spent = False

    @property
    def spent(self) -> bool:
        """Whether backward was called with it."""
        return self._spent


class TorchModel(Adapted):
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
        table = parameter_table(config, num_values)
        size = table[-1].offset + table[-1].size
        self._own_set = ParameterSet(table, torch.zeros(size, dtype=self._dtype, device=self._device))
        with torch.no_grad():
            for parameter, values in initial_values(config, table, seed):
                self._own_set.tensors[parameter.name].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        self._network = Network(config, self._own_set.tensors, self._dtype)
        self._sharers: weakref.WeakSet[TorchModel] = weakref.WeakSet([self])
        self._begin()

    def _begin(self) -> None:
        """What a model and a fork begin with."""
        self._changes = 0
        self._lock = threading.RLock()
        self._optimizers: dict[str | None, Optimizer] = {}
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        self._merged: str | None = None
        self._head_deltas: dict[str, FloatArray] = {}

    @property
    def optimizer(self) -> Optimizer:
        """What :meth:`step` uses: that of the active adapter, or of the weights; AdamW with its defaults unless replaced."""
        if self._active not in self._optimizers:
            self._optimizers[self._active] = TorchOptimizer(self)
        return self._optimizers[self._active]

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._optimizers[self._active] = optimizer

    @alone
    def fork(self) -> TorchModel:
        """A second model with the weights that this one has now, in the same memory until one of the two is written to.

        The first write to either (a step, :meth:`load_state`) takes a copy for it.
        """
        fork = TorchModel.__new__(TorchModel)
        fork._config, fork._num_values = self._config, self._num_values
        fork._device, fork._precision, fork._dtype = self._device, self._precision, self._dtype
        fork._own_set = ParameterSet(self._own_set.table, self._own_set.flat)
        fork._network = Network(self._config, fork._own_set.tensors, self._dtype)
        fork._sharers = self._sharers
        fork._sharers.add(fork)
        fork._begin()
        for name, adapter in self._adapters.items():
            own = fork._make_adapter(name, adapter.settings)
            own._write(adapter.state())
            fork._adapters[name] = own
        fork._active, fork._merged, fork._head_deltas = self._active, self._merged, self._head_deltas
        return fork

    def _own(self) -> None:
        """Takes a copy of the weights where another model shares them: to be called before they are written to."""
        if len(self._sharers) > 1:
            self._sharers.discard(self)
            self._sharers = weakref.WeakSet([self])
            self._own_set.flat = self._own_set.flat.clone()
            self._own_set.cut()
            self._network = Network(self._config, self._own_set.tensors, self._dtype)

    @property
    def _version(self) -> int:
        """Counts the writes to weights and adapters."""
        return self._changes + sum(adapter.changes for adapter in self._torch_adapters())

    def _torch_adapters(self) -> list[TorchAdapter]:
        return [adapter for adapter in self._adapters.values() if isinstance(adapter, TorchAdapter)]

    def _make_adapter(self, name: str, settings: AdapterSettings) -> TorchAdapter:
        table = adapter_table(self._config, settings.num_values, settings.rank, settings.modules)
        size = table[-1].offset + table[-1].size
        weights = ParameterSet(table, torch.zeros(size, dtype=self._dtype, device=self._device))
        if settings.num_values == self._num_values:
            with torch.no_grad():
                for key in (key for key in weights.tensors if key.startswith("score.")):
                    weights.tensors[key].copy_(self._own_set.tensors[key])
        return TorchAdapter(weights, name, settings)

    @alone
    def _add_to_weights(self, deltas: Iterator[tuple[str, FloatArray]]) -> None:
        self._own()
        with torch.no_grad():
            for name, delta in deltas:
                self._own_set.tensors[name].add_(torch.from_numpy(np.array(delta, order="C")).to(self._device))
        self._changes += 1

    def _pass(self, adapter: str | None) -> tuple[ParameterSet, Network]:
        """What a call through an adapter (or none) trains, and the network that computes it."""
        chosen = self._chosen(adapter)
        if chosen is None:
            return self._own_set, self._network
        assert isinstance(chosen, TorchAdapter)
        # The weights below count as constants.
        tensors = {name: tensor.detach() for name, tensor in self._own_set.tensors.items()} | chosen.weights.tensors
        return chosen.weights, Network(self._config, tensors, self._dtype, chosen.settings)

    def _trained_set(self) -> ParameterSet:
        """What an optimizer made now changes."""
        adapter = self._trained()
        return adapter.weights if isinstance(adapter, TorchAdapter) else self._own_set

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
    def _own_values(self) -> int:
        return self._num_values

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return self._own_set.flat.numel()

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the weights; :meth:`load_state` writes."""
        return self._own_set.parameter_copies()

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Read-only copies of the gradients, zeros before the first backward."""
        return self._own_set.gradient_copies()

    def flops_per_token(self, max_length: int) -> float:
        """Floating-point operations of a training step per token at sequences of ``max_length`` tokens."""
        return self._config.flops_per_token(max_length)

    def __repr__(self) -> str:
        place = f"device {self._device}, {self._precision}"
        return parts_table("torch", self._config, place, {p.name: list(p.shape) for p in self._own_set.table})

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
        adapter: str | None = None,
    ) -> tuple[TorchContext | None, Outputs]:
        """See :meth:`ingot.models.base.Model.forward`."""
        wanted = check_want(want, self._values_of(self._chosen(adapter)), candidates)
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
        weights, network = self._pass(adapter)
        with torch.set_grad_enabled(train), self._autocast():
            x = self._residual(network, packing, train, seed)
            outputs = self._head_outputs(
                network, packing, x, wanted, candidates, temperature, self._banned_mask(banned)
            )
            if "values" in wanted:
                rows = torch.from_numpy(np.arange(num_rows) if value_rows is None else np.flatnonzero(value_rows))
                outputs["values"] = self._values(network, x, rows.to(self._device))
            if "hidden" in wanted:
                chosen = x if hidden_rows is None else x[torch.from_numpy(hidden_rows).to(self._device)]
                outputs["hidden"] = network.final_norm(chosen)
        arrays = {name: to_numpy(tensor) for name, tensor in outputs.items()}
        context = TorchContext(self, weights, {n: t for n, t in outputs.items() if n != "top1"}) if train else None
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
        ctx._set.bind_gradients()
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
        adapter: str | None = None,
    ) -> float:
        """See :meth:`ingot.models.base.Model.forward_backward`. The logits of a chunk of rows turn into gradients at once."""
        check_seed(seed)
        packing = Packing.of(tokens, offsets, targets, sequence_ids, self._config)
        banned = self._banned_mask(check_banned(banned_ids, packing.targets, self._config.vocab_size))
        check_array("weights", weights, numpy_dtype(self._dtype), (len(packing.tokens),))
        check_temperature(temperature)
        trained, network = self._pass(adapter)
        trained.bind_gradients()
        rows, chosen = self._target_rows(packing)
        row_weights = torch.from_numpy(weights).to(self._device)[rows]
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._autocast():
            x = self._residual(network, packing, train, seed)
            hidden = network.final_norm(x[rows])
            leaf = hidden.detach().requires_grad_()
            for part in self._chunks(len(rows)):
                scores = network.scores(leaf[part], temperature, banned)
                logprobs = Statistics.of(scores, chosen[part]).logprobs
                torch.autograd.backward(logprobs, -row_weights[part])
                loss -= (row_weights[part].double() * logprobs.detach().double()).sum()
        if leaf.grad is not None:
            torch.autograd.backward(hidden, leaf.grad)
        return float(loss)

    @alone
    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        for weights in (self._own_set, *(adapter.weights for adapter in self._torch_adapters())):
            if weights.gradient is not None:
                weights.gradient.zero_()

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """``optimizer.step(lr, clip_norm)``."""
        self._require_unmerged()
        return self.optimizer.step(lr, clip_norm)

    @alone
    def _update(self, weights: ParameterSet, rule: Callable[[Tensor], StepInfo]) -> StepInfo:
        """Lets an optimizer change weights by their flat gradient."""
        if weights.gradient is None:
            raise RuntimeError("there are no gradients yet: run backward or forward_backward before the step")
        if weights is self._own_set:
            self._own()
        info = rule(weights.gradient)
        if not info.skipped:
            self._changes += 1
        return info

    def decoder(
        self,
        max_tokens: int,
        max_sequences: int,
        *,
        seed: int = 0,
        banned_ids: Sequence[int] | IntArray | None = None,
        adapter: str | None = None,
    ) -> TorchDecoder:
        """A decoder with room for ``max_sequences`` sequences of up to ``max_tokens`` tokens each, prompt included."""
        return TorchDecoder(self, max_tokens, max_sequences, seed=seed, banned_ids=banned_ids, adapter=adapter)

    # -- weights --

    @alone
    def state(self) -> dict[str, FloatArray]:
        """Copies of all weights by Hugging Face name."""
        return {name: to_numpy(tensor) for name, tensor in self._own_set.tensors.items()}

    def snapshot(self) -> Mapping[str, FloatArray]:
        """:meth:`state`."""
        return self.state()

    @alone
    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; missing, surplus or mis-shaped weights are a ``CheckpointError`` that names them."""
        self._require_unmerged()
        check_state(state, {p.name: p.shape for p in self._own_set.table}, "state")
        self._own()
        self._own_set.write(state)
        self._changes += 1

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, the active adapter merged: a directory that transformers opens."""
        state = {name: array.astype(np.float32, copy=False) for name, array in self.merged_state().items()}
        write_folder(folder, self._config, state)

    # -- inside --

    def _residual(self, network: Network, packing: Packing, train: bool, seed: int) -> Tensor:
        dropout = None
        if train and self._config.dropout > 0.0:
            dropout = Dropout(self._config.dropout, seed, packing, self._device)
        if train and network.adapter is not None and network.adapter.dropout > 0.0:
            network = network.dropping(Dropout(network.adapter.dropout, seed, packing, self._device))
        return network.residual(TokenBatch.of(packing, self._device), dropout)

    def _head_outputs(
        self,
        network: Network,
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
            scores = network.scores(network.final_norm(x_rows), temperature, banned)
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

    def _values(self, network: Network, x: Tensor, rows: Tensor) -> Tensor:
        values = network.values(network.final_norm(x[rows]))
        zeros = torch.zeros(len(x), values.shape[-1], dtype=self._dtype, device=self._device)
        values = zeros.index_put((rows,), values)
        return values[:, 0] if values.shape[-1] == 1 else values

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
