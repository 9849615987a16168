"""The native backend: the seam of :mod:`ingot.models.base` over the compiled core."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingot import _native
from ingot.configs import ModelConfig
from ingot.errors import CheckpointError
from ingot.models.adapters import Adapted, Adapter, AdapterSettings
from ingot.models.base import (
    BoolArray,
    Candidates,
    Context,
    DecodeStep,
    EpsMode,
    FloatArray,
    IntArray,
    LongArray,
    Optim,
    Optimizer,
    Outputs,
    ParameterGroup,
    Sampling,
    StepInfo,
    check_want,
)
from ingot.models.grouping import assign_groups, check_optim, check_saved_optim
from ingot.models.hf import write_folder
from ingot.models.packing import check_room, check_seed, ids_array
from ingot.models.tables import check_state, parts_table


class NativeAdapter(Adapter):
    """An adapter of a native model: views of its flat buffers."""

    def __init__(self, core: _native.Model, name: str, settings: AdapterSettings, index: int) -> None:
        super().__init__(name, settings)
        self._core = core
        self._index = index
        self._parameters: Mapping[str, FloatArray] = MappingProxyType(core.adapter_parameters(index))
        self._gradients: Mapping[str, FloatArray] | None = None

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Writable views; a write is seen by the next call."""
        return self._parameters

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Writable views, of memory that is made when it is first needed."""
        if self._gradients is None:
            self._gradients = MappingProxyType(self._core.adapter_gradients(self._index))
        return self._gradients

    def _write(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        # Asking for the views marks the change; mark_changed would also take the weights below out of the memory that a fork shares.
        for name, view in self._core.adapter_parameters(self._index).items():
            view[...] = state[name]


class NativeModel(Adapted):
    """A network on the CPU. See :class:`ingot.models.base.Model` for what its methods do.

    Raises
    ------
    ConfigError
        The configuration makes no network, or the machine does not have the level.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        threads: int | None = None,
        level: str | None = None,
        num_values: int = 0,
    ) -> None:
        check_seed(seed)
        self._config = config
        fields = json.dumps(config.to_dict())
        self._core = _native.Model(fields, seed=seed, level=level, threads=threads, num_values=num_values)
        self._gradients: Mapping[str, FloatArray] | None = None
        self._optimizers: dict[str | None, Optimizer] = {}
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        self._merged: str | None = None
        self._head_deltas: dict[str, FloatArray] = {}

    @property
    def optimizer(self) -> Optimizer:
        """What :meth:`step` uses: that of the active adapter, or of the weights; AdamW with its defaults unless replaced."""
        if self._active not in self._optimizers:
            self._optimizers[self._active] = NativeOptimizer(self)
        return self._optimizers[self._active]

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._optimizers[self._active] = optimizer

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""
        return self._config

    @property
    def backend(self) -> Literal["native", "torch"]:
        """``native``."""
        return "native"

    @property
    def level(self) -> str:
        """Instruction level in use."""
        return self._core.level

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self._core.threads

    @property
    def _own_values(self) -> int:
        return self._core.num_values

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return self._core.num_parameters

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Writable views of the flat buffer; a write is seen by the next call.

        Memory that the model shares (see :meth:`fork`) becomes its own when they are asked for.
        """
        return MappingProxyType(self._core.parameters())

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Writable views of the flat buffer of gradients, which is made when it is first needed."""
        if self._gradients is None:
            self._gradients = MappingProxyType(self._core.gradients())
        return self._gradients

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
    ) -> tuple[Context | None, Outputs]:
        """See :meth:`ingot.models.base.Model.forward`."""
        wanted = check_want(want, self._values_of(self._chosen(adapter)), candidates)
        check_seed(seed)
        context, arrays = self._core.forward(
            tokens,
            offsets,
            targets,
            want=sorted(wanted),
            value_rows=value_rows,
            hidden_rows=hidden_rows,
            candidates=candidates,
            temperature=temperature,
            banned_ids=ids_array(banned_ids),
            train=train,
            seed=seed,
            sequence_ids=sequence_ids,
            adapter=self._index(adapter),
        )
        return context, Outputs(arrays)

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
        if not isinstance(ctx, _native.Context):
            raise TypeError(
                f"ctx is {type(ctx).__name__}, not a context of this backend"
                + (": forward makes one with train=True alone" if ctx is None else "")
            )
        self._core.backward(
            ctx,
            d_logprobs=d_logprobs,
            d_entropy=d_entropy,
            d_values=d_values,
            d_lse=d_lse,
            d_zbar=d_zbar,
            d_hidden=d_hidden,
            d_candidates=d_candidates,
        )

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
        """See :meth:`ingot.models.base.Model.forward_backward`."""
        check_seed(seed)
        return self._core.forward_backward(
            tokens,
            offsets,
            targets,
            weights,
            temperature=temperature,
            banned_ids=ids_array(banned_ids),
            train=train,
            seed=seed,
            sequence_ids=sequence_ids,
            adapter=self._index(adapter),
        )

    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        self._core.zero_grad()

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """``optimizer.step(lr, clip_norm)``."""
        self._require_unmerged()
        return self.optimizer.step(lr, clip_norm)

    def decoder(
        self,
        max_tokens: int,
        max_sequences: int,
        *,
        seed: int = 0,
        banned_ids: Sequence[int] | IntArray | None = None,
        adapter: str | None = None,
    ) -> NativeDecoder:
        """See :meth:`ingot.models.base.Model.decoder`."""
        check_seed(seed)
        check_room(max_tokens, max_sequences)
        core = _native.Decoder(
            self._core,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            seed=seed,
            banned_ids=ids_array(banned_ids),
            adapter=self._index(adapter),
        )
        return NativeDecoder(core)

    def fork(self) -> NativeModel:
        """A second model with the weights that this one has now, in the same memory until one of the two is written to.

        The first write to either (a step, :meth:`load_state`, asking for :attr:`parameters`) takes a copy for it. Where views of this
        model's parameters are held already, a write through them would go unseen: then the copy is taken at once.
        """
        fork = NativeModel.__new__(NativeModel)
        fork._config = self._config
        fork._core = self._core.fork()
        fork._gradients = None
        fork._optimizers = {}
        fork._adapters = {
            name: NativeAdapter(fork._core, name, adapter.settings, adapter._index)
            for name, adapter in self._adapters.items()
            if isinstance(adapter, NativeAdapter)
        }
        fork._active, fork._merged, fork._head_deltas = self._active, self._merged, self._head_deltas
        return fork

    def state(self) -> dict[str, FloatArray]:
        """Copies of all weights, C-contiguous in Hugging Face's shapes."""
        return {name: np.array(view, order="C") for name, view in self._core.snapshot().items()}

    def snapshot(self) -> Mapping[str, FloatArray]:
        """Read-only views; while one of them is held, a write to the model takes a copy and leaves it as it is."""
        return MappingProxyType(self._core.snapshot())

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; strict."""
        self._require_unmerged()
        check_state(state, {name: tuple(shape) for name, shape in self._core.table}, "state")
        for name, view in self.parameters.items():
            view[...] = state[name]
        self.mark_changed()

    def mark_changed(self) -> None:
        """Refuse the contexts and decoders made so far. To be called after weights were written through views while such live."""
        self._core.mark_changed()

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face directory, the active adapter merged."""
        write_folder(folder, self._config, self.merged_state())

    def _make_adapter(self, name: str, settings: AdapterSettings) -> NativeAdapter:
        index = self._core.add_adapter(
            rank=settings.rank,
            scale=settings.scale,
            modules=list(settings.modules),
            num_values=settings.num_values,
            dropout=settings.dropout,
        )
        return NativeAdapter(self._core, name, settings, index)

    def _add_to_weights(self, deltas: Iterator[tuple[str, FloatArray]]) -> None:
        views = self.parameters
        for name, delta in deltas:
            views[name][...] += delta
        self.mark_changed()

    def _index(self, adapter: str | None) -> int | None:
        """The core's number of the adapter that a call goes through."""
        chosen = self._chosen(adapter)
        assert chosen is None or isinstance(chosen, NativeAdapter)
        return None if chosen is None else chosen._index

    def flops_per_token(self, max_length: int) -> float:
        """See :meth:`ingot.configs.ModelConfig.flops_per_token`."""
        return self._config.flops_per_token(max_length)

    def __repr__(self) -> str:
        place = f"level {self.level}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return parts_table("native", self._config, place, dict(self._core.table))


class NativeOptimizer:
    """AdamW or Muon over the flat buffers. See :func:`ingot.models.Optimizer`."""

    def __init__(
        self,
        model: NativeModel,
        groups: Sequence[ParameterGroup] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        eps_mode: EpsMode = "torch",
        weight_decay: float = 0.1,
        optim: Optim = "adamw",
        muon_momentum: float = 0.95,
    ) -> None:
        self._model = model._core
        self._optim = optim
        adapter = model._trained()
        check_optim(optim, muon_momentum, adapter is not None)
        assert adapter is None or isinstance(adapter, NativeAdapter)
        if adapter is None:
            shapes = {name: tuple(shape) for name, shape in model._core.table}
        else:
            shapes = {name: view.shape for name, view in adapter.parameters.items()}
        self._core = _native.Optimizer(
            model._core,
            groups=assign_groups(shapes, groups or (), weight_decay),
            betas=betas,
            eps=eps,
            eps_mode=eps_mode,
            muon_momentum=muon_momentum if optim == "muon" else None,
            adapter=None if adapter is None else adapter._index,
        )

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """See :meth:`ingot.models.base.Optimizer.step`."""
        grad_norm, skipped = self._core.step(self._model, lr=lr, clip_norm=clip_norm)
        return StepInfo(grad_norm, skipped)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """See :meth:`ingot.models.base.Optimizer.state`."""
        state: dict[str, npt.NDArray[np.generic]] = {"step": np.array([self._core.steps_taken], dtype=np.int64)}
        for prefix, views in zip("mv", self._core.moments(), strict=True):
            state |= {f"{prefix}.{name}": np.array(view, order="C") for name, view in views.items()}
        if self._optim == "muon":
            state["muon"] = np.ones(1, dtype=np.int64)
        return state

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """See :meth:`ingot.models.base.Optimizer.load_state`."""
        moments = {
            f"{prefix}.{name}": view
            for prefix, views in zip("mv", self._core.moments(), strict=True)
            for name, view in views.items()
        }
        check_saved_optim(state, self._optim)
        marks: dict[str, tuple[int, ...]] = {"step": (1,)}
        if self._optim == "muon":
            marks["muon"] = (1,)
        check_state(state, marks | {name: view.shape for name, view in moments.items()}, "optimizer state")
        steps = int(state["step"][0])
        if steps < 0:
            raise CheckpointError(f"optimizer state: step is {steps}, but counts from 0")
        for name, view in moments.items():
            view[...] = state[name]
        self._core.set_steps_taken(steps)


class NativeDecoder:
    """Writes several sequences at once. See :class:`ingot.models.base.Decoder`."""

    def __init__(self, core: _native.Decoder) -> None:
        self._core = core

    @property
    def active(self) -> list[int]:
        """Slots in use, ascending."""
        return self._core.active

    def add(self, tokens: npt.ArrayLike, sequence_id: int, sampling: Sampling | None = None) -> int:
        """Read a prompt of at least one token and return its slot."""
        how = sampling or Sampling()
        return self._core.add(
            ids_array(tokens, "tokens"),
            sequence_id,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
        )

    def fork(self, slot: int, sequence_id: int) -> int:
        """A second sequence that begins as this one is now."""
        return self._core.fork(slot, sequence_id)

    def step(self, forced: Mapping[int, int] | None = None) -> DecodeStep:
        """Draw a token for each active slot, or take the one that ``forced`` has for it."""
        return DecodeStep(*self._core.step(list((forced or {}).items())))

    def remove(self, slot: int) -> None:
        """Give the slot and its cache back."""
        self._core.remove(slot)

    def length(self, slot: int) -> int:
        """Tokens of the sequence so far, prompt included."""
        return self._core.length(slot)
